//! The listener: TLS, HTTP/2 or HTTP/1.1 by ALPN, and a handle on each connection so that a rule can cut it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::routing::post;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower_service::Service;

use super::{Shared, admin, graph};

/// The connection that a request came on.
#[derive(Clone, Debug)]
pub struct Connection {
    /// No two have the same.
    pub number: u64,
    cut: Arc<Notify>,
}

impl Connection {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { number: NEXT.fetch_add(1, Ordering::Relaxed), cut: Arc::default() }
    }

    /// Closes it without a response.
    pub fn cut(&self) {
        self.cut.notify_one();
    }
}

/// Serves until the task that runs this is aborted; its connections end with it.
pub async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, shared: Arc<Shared>) {
    let router = Router::new()
        .nest("/admin", admin::routes())
        .route("/{tenant}/oauth2/v2.0/token", post(graph::answer_token))
        .fallback(graph::answer)
        .with_state(shared);
    let acceptor = TlsAcceptor::from(tls);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve_connection(stream, acceptor.clone(), router.clone()));
                }
                // Probably no free file descriptor: wait until one is closed.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_connection(stream: TcpStream, acceptor: TlsAcceptor, router: Router) {
    // Pages are written whole: waiting for more to send would only add delay.
    let _ = stream.set_nodelay(true);
    let Ok(tls) = acceptor.accept(stream).await else { return };
    let connection = Connection::new();
    let cut = Arc::clone(&connection.cut);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(connection.clone());
        router.clone().call(request)
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    tokio::select! {
        // Errors of a connection are caused by its client.
        _ = builder.serve_connection(TokioIo::new(tls), service) => {}
        () = cut.notified() => {}
    }
}
