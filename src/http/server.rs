//! HTTP/1.1 server with limits on connections, headers and time, so that idle or slow clients can't exhaust the file
//! descriptors that runs need. `axum::serve` has none of these limits.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Maximum number of open connections; a new one closes the oldest, so that a probe is always answered.
pub(super) const MAX_CONNECTIONS: usize = 64;
/// Time for the headers of a request, which also ends idle connections.
pub(super) const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum lifetime of a connection, which also ends clients that do not read their response.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
/// Maximum size of the headers of a request, in bytes.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Time for open requests once the server stops.
pub(super) const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);
/// Wait after a failed accept, for instance without free file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves connections until `stop` is cancelled and the open requests have ended.
pub(super) async fn serve(listener: TcpListener, router: Router, stop: &CancellationToken) {
    let mut tasks = JoinSet::new();
    let mut open: VecDeque<CancellationToken> = VecDeque::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => open.retain(|connection| !connection.is_cancelled()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if open.len() >= MAX_CONNECTIONS && let Some(oldest) = open.pop_front() {
                        oldest.cancel();
                    }
                    let closed = CancellationToken::new();
                    open.push_back(closed.clone());
                    tasks.spawn(serve_connection(stream, router.clone(), closed, stop.clone()));
                }
                Err(error) => {
                    debug!(%error, "HTTP connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
    let drained = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(SHUTDOWN_GRACE, drained).await;
}

/// Serves one connection until it ends, is closed in favour of a new one, or exceeds its lifetime.
async fn serve_connection(stream: TcpStream, router: Router, closed: CancellationToken, stop: CancellationToken) {
    // Cancelled in any case, which marks the connection as ended.
    let _ended = closed.clone().drop_guard();
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEADER_BYTES);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // An error is the client's: a broken connection, a malformed request, a timeout.
        _ = connection.as_mut() => {}
        () = closed.cancelled() => {}
        () = tokio::time::sleep(CONNECTION_LIFETIME) => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(SHUTDOWN_GRACE, connection).await;
        }
    }
}
