//! Systemd, as far as a service sees it: a socket that takes what the service says of itself.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

/// The socket of a service of `Type=notify`.
pub struct Systemd {
    socket: UnixDatagram,
    /// Where it is, for `NOTIFY_SOCKET`.
    pub path: PathBuf,
    heard: Vec<String>,
}

impl Systemd {
    /// A socket for the service `name`.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("{name}notify"));
        let socket = UnixDatagram::bind(&path).expect("the socket can be made");
        socket.set_nonblocking(true).expect("a socket can be told not to wait");
        Self { socket, path, heard: Vec::new() }
    }

    /// Everything that was said so far, in order.
    pub fn heard(&mut self) -> &[String] {
        let mut message = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut message) {
            let text = String::from_utf8_lossy(&message[..length]);
            self.heard.extend(text.lines().map(str::to_owned));
        }
        &self.heard
    }

    /// How often `line` was said so far.
    pub fn count(&mut self, line: &str) -> usize {
        self.heard().iter().filter(|heard| *heard == line).count()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
