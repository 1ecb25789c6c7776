//! TCP proxy that cuts, freezes or refuses connections on command, between the daemon and the database, the broker or
//! Graph.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards bytes in both directions until told to cut, freeze or refuse.
pub struct Proxy {
    /// Address the proxy listens on.
    pub address: SocketAddr,
    cut: watch::Sender<u64>,
    requests_frozen: watch::Sender<bool>,
    replies_frozen: watch::Sender<bool>,
    refusing: Arc<AtomicBool>,
    edit: watch::Sender<fn(&mut [u8])>,
}

impl Proxy {
    /// Starts a proxy to `target`.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound");
        let proxy = Self {
            address,
            cut: watch::Sender::new(0),
            requests_frozen: watch::Sender::new(false),
            replies_frozen: watch::Sender::new(false),
            refusing: Arc::default(),
            edit: watch::Sender::new(|_| {}),
        };
        let (cuts, refusals) = (proxy.cut.subscribe(), Arc::clone(&proxy.refusing));
        let freezes = (proxy.requests_frozen.subscribe(), proxy.replies_frozen.subscribe());
        let edit = proxy.edit.subscribe();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if refusals.load(Ordering::Relaxed) {
                    continue;
                }
                let edit = *edit.borrow();
                tokio::spawn(forward(client, target, cuts.clone(), freezes.clone(), edit));
            }
        });
        proxy
    }

    /// Closes every open connection.
    pub fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }

    /// Refuses new connections, or accepts them again.
    pub fn refuse(&self, yes: bool) {
        self.refusing.store(yes, Ordering::Relaxed);
    }

    /// Applies `edit` to what the server sends on new connections, in the pieces in which it arrives.
    pub fn edit_replies(&self, edit: fn(&mut [u8])) {
        self.edit.send_replace(edit);
    }

    /// Stops or resumes forwarding in both directions, without closing connections.
    pub fn freeze(&self, yes: bool) {
        self.freeze_requests(yes);
        self.freeze_replies(yes);
    }

    /// Stops or resumes forwarding to the server.
    pub fn freeze_requests(&self, yes: bool) {
        self.requests_frozen.send_replace(yes);
    }

    /// Stops or resumes forwarding to the client.
    pub fn freeze_replies(&self, yes: bool) {
        self.replies_frozen.send_replace(yes);
    }
}

type Freezes = (watch::Receiver<bool>, watch::Receiver<bool>);

async fn forward(
    client: TcpStream,
    target: SocketAddr,
    mut cut: watch::Receiver<u64>,
    (requests, replies): Freezes,
    edit: fn(&mut [u8]),
) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    cut.mark_unchanged();
    let ((client_in, client_out), (server_in, server_out)) = (client.into_split(), server.into_split());
    tokio::select! {
        // The cut comes first, so that bytes released at the same moment are not forwarded.
        biased;
        _ = cut.changed() => {}
        () = copy(client_in, server_out, requests, |_| {}) => {}
        () = copy(server_in, client_out, replies, edit) => {}
    }
}

async fn copy(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut frozen: watch::Receiver<bool>,
    edit: fn(&mut [u8]),
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        edit(&mut buffer[..count]);
        if frozen.wait_for(|frozen| !frozen).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
