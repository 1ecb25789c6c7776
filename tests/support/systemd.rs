//! Systemd as a service sees it: the notification socket.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

/// Notification socket of a `Type=notify` service.
pub struct Systemd {
    socket: UnixDatagram,
    /// Path for `NOTIFY_SOCKET`.
    pub path: PathBuf,
    heard: Vec<String>,
}

impl Systemd {
    /// Creates the socket of the service `name`.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("{name}notify"));
        let socket = UnixDatagram::bind(&path).expect("the socket can be created");
        socket.set_nonblocking(true).expect("the socket can be non-blocking");
        Self { socket, path, heard: Vec::new() }
    }

    /// Returns every line received so far, in order.
    pub fn heard(&mut self) -> &[String] {
        let mut message = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut message) {
            let text = String::from_utf8_lossy(&message[..length]);
            self.heard.extend(text.lines().map(str::to_owned));
        }
        &self.heard
    }

    /// Counts how often `line` was received.
    pub fn count(&mut self, line: &str) -> usize {
        self.heard().iter().filter(|heard| *heard == line).count()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
