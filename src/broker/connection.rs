//! One AMQP connection to one broker, opened and closed within time limits.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_rs::TokioRuntime;
use async_rs::traits::Reactor;
use futures_util::future::{Either, select};
use futures_util::io::{AsyncReadExt, AsyncWriteExt};
use lapin::protocol::{AMQPClass, connection, parse_class};
use lapin::tcp::AsyncTcpStream;
use lapin::types::AMQPValue;
use lapin::uri::AMQPUri;
use lapin::{Channel, ConnectionProperties};
use parking_lot::Mutex;

use super::error::{BrokerError, within};
use super::frame_guard::check_start;
use super::guarded_stream::{BrokerSocket, ClientRuntime, GuardedStream, GuardedTokio};
use super::tls::Tls;

/// Stream of connection events (blocked, unblocked, lost).
pub(super) type Events = Pin<Box<dyn futures_util::Stream<Item = lapin::Event> + Send>>;

/// Settings for opening a connection. The client's tasks run on `runtime`, apart from the daemon's own runtime, so that
/// busy workers cannot starve the heartbeats.
#[derive(Clone)]
pub(super) struct Opening {
    pub(super) runtime: TokioRuntime,
    pub(super) tls: Tls,
    pub(super) name: String,
    pub(super) connect_limit: Duration,
    pub(super) answer_limit: Duration,
}

/// Connection whose socket is shut down on drop.
pub(super) struct Connection {
    /// Virtual host that the connection is for.
    pub(super) virtual_host: String,
    /// User that logged in.
    pub(super) user: String,
    connection: lapin::Connection,
    answer_limit: Duration,
    _shutdown: ShutdownOnDrop,
}

impl Connection {
    /// Connects once. The client's own recovery stays off: owners of a lost connection open a new one.
    pub(super) async fn open(opening: &Opening, uri: AMQPUri) -> Result<Self, BrokerError> {
        let shutdown = ShutdownOnDrop::default();
        let (socket, tls, limit) = (shutdown.clone_handle(), opening.tls.clone(), opening.connect_limit);
        let (runtime, client) = (opening.runtime.clone(), ClientRuntime::new(GuardedTokio(opening.runtime.clone())));
        let connect = async move |uri: AMQPUri, _client: ClientRuntime| {
            let stream = within_on(&runtime, limit, tls.connect(&uri, &runtime)).await?;
            socket.keep(&stream)?;
            Ok(AsyncTcpStream::Plain(GuardedStream::new(stream)))
        };
        let (virtual_host, user) = (uri.vhost.clone(), uri.authority.userinfo.username.clone());
        let properties = ConnectionProperties::default().with_connection_name(opening.name.clone().into());
        let connection = lapin::Connection::connector(uri, client, connect, properties);
        let connection = within(limit, "connecting", connection).await?;
        Ok(Self { virtual_host, user, connection, answer_limit: opening.answer_limit, _shutdown: shutdown })
    }

    /// Opens a channel.
    pub(super) async fn channel(&self) -> Result<Channel, BrokerError> {
        within(self.answer_limit, "opening a channel", self.connection.create_channel()).await
    }

    /// Events of this connection.
    pub(super) fn events(&self) -> Events {
        Box::pin(self.connection.events_listener())
    }

    /// True while the broker blocks publishing on this connection (memory or disk alarm).
    pub(super) fn blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Negotiated frame size.
    pub(super) fn frame_max(&self) -> usize {
        usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX)
    }

    /// True until the connection is closed or lost.
    pub(super) fn connected(&self) -> bool {
        self.connection.status().connected()
    }

    /// Closes the connection; after `limit` the socket is shut down instead. A blocked connection never closes in order.
    pub(super) async fn close(self, limit: Duration) {
        if let Err(error) = within(limit, "closing the connection", self.connection.close(200, "OK".into())).await {
            tracing::debug!(%error, "connection not closed in order; socket shut down");
        }
    }
}

/// Reads product and version from `connection.start`, before any login. The client does not expose them, so this opens
/// a separate connection; the broker logs one line about it.
pub(super) async fn server_version(opening: &Opening, uri: &AMQPUri) -> Result<(String, String), BrokerError> {
    let ask = async {
        let connect = opening.tls.connect(uri, &opening.runtime);
        let stream = within_on(&opening.runtime, opening.connect_limit, connect).await?;
        ask_for_start(stream).await
    };
    let doing = "asking for the broker's version";
    match tokio::time::timeout(opening.connect_limit, ask).await {
        Ok(answer) => answer.map_err(|error| BrokerError::Lost { doing, source: Box::new(error) }),
        Err(_) => Err(BrokerError::TimedOut { doing, after: opening.connect_limit }),
    }
}

async fn ask_for_start(mut stream: BrokerSocket) -> io::Result<(String, String)> {
    stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
    stream.flush().await?;
    let mut header = [0; 7];
    stream.read_exact(&mut header).await?;
    let length = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
    if header[0] != 1 || length > 1 << 17 {
        return Err(io::Error::other("not an AMQP 0-9-1 server"));
    }
    let mut frame = vec![0; length as usize];
    stream.read_exact(&mut frame).await?;
    read_start(&frame).ok_or_else(|| io::Error::other("unreadable connection.start; not an AMQP 0-9-1 server"))
}

fn read_start(frame: &[u8]) -> Option<(String, String)> {
    check_start(frame.get(4..)?).ok()?;
    let (_, method) = parse_class(frame).ok()?;
    let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = method else { return None };
    let text = |key: &str| match start.server_properties.inner().get(key) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    Some((text("product"), text("version")))
}

/// Versions of RabbitMQ that the tests run on, oldest and newest.
pub const TESTED_VERSIONS: &str = "3.10 to 4.3";

/// True for RabbitMQ 3.10 and newer: quorum queues with message TTL and at-least-once dead-lettering.
pub(super) fn is_new_enough(product: &str, version: &str) -> bool {
    product == "RabbitMQ" && major_and_minor(version) >= (3, 10)
}

/// True for [`TESTED_VERSIONS`] and those between them.
pub(super) fn is_tested(version: &str) -> bool {
    ((3, 10)..=(4, 3)).contains(&major_and_minor(version))
}

fn major_and_minor(version: &str) -> (u32, u32) {
    let mut numbers = version.split(['.', '-', '+', '~']).map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Time limit inside the client's own thread: an abandoned connect would occupy that thread until the kernel gives up.
async fn within_on<T>(
    runtime: &TokioRuntime,
    limit: Duration,
    answer: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match select(Box::pin(answer), Box::pin(runtime.sleep(limit))).await {
        Either::Left((answer, _)) => answer,
        Either::Right(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Second handle on the socket, shut down on drop. Dropping the client's connection asks its thread for an orderly
/// close, which never completes while the broker is blocked or frozen; a shut socket ends the thread in any case.
#[derive(Default)]
struct ShutdownOnDrop(Arc<Mutex<Socket>>);

#[derive(Default)]
enum Socket {
    #[default]
    NotYet,
    Open(TcpStream),
    Cut,
}

impl ShutdownOnDrop {
    fn clone_handle(&self) -> SocketHandle {
        SocketHandle(Arc::clone(&self.0))
    }
}

impl Drop for ShutdownOnDrop {
    fn drop(&mut self) {
        if let Socket::Open(socket) = std::mem::replace(&mut *self.0.lock(), Socket::Cut) {
            // Fails only if the peer has closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Passes the open socket to [`ShutdownOnDrop`].
struct SocketHandle(Arc<Mutex<Socket>>);

impl SocketHandle {
    fn keep(&self, stream: &BrokerSocket) -> io::Result<()> {
        let socket = match stream {
            AsyncTcpStream::Plain(plain) => plain.get_ref().as_fd().try_clone_to_owned()?,
            AsyncTcpStream::Rustls(tls) => tls.get_ref().0.get_ref().as_fd().try_clone_to_owned()?,
            _ => return Ok(()),
        };
        let mut slot = self.0.lock();
        if matches!(*slot, Socket::Cut) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        *slot = Socket::Open(socket.into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_before_3_10_and_other_products_are_refused() {
        for version in ["3.10.0", "3.10.8", "3.13.7+2", "4.0.1", "4.3.0-rc.1", "10.0"] {
            assert!(is_new_enough("RabbitMQ", version), "{version}");
        }
        for version in ["3.9.29", "3.8", "2.8.7", "", "unknown"] {
            assert!(!is_new_enough("RabbitMQ", version), "{version}");
        }
        assert!(!is_new_enough("LavinMQ", "4.0.0"));
        assert!(is_tested("3.10.8") && is_tested("4.3.6") && !is_tested("4.4.0") && !is_tested("5.0"));
    }

    #[test]
    fn product_and_version_are_read_from_connection_start() {
        let mut frame = vec![0, 10, 0, 10, 0, 9];
        let table = b"\x07productS\x00\x00\x00\x08RabbitMQ\x07versionS\x00\x00\x00\x063.10.8";
        frame.extend((table.len() as u32).to_be_bytes());
        frame.extend(table);
        frame.extend(b"\x00\x00\x00\x05PLAIN\x00\x00\x00\x05en_US");
        assert_eq!(read_start(&frame), Some(("RabbitMQ".to_owned(), "3.10.8".to_owned())));
        assert_eq!(read_start(b"AMQP\x00\x00\x09\x01"), None);
    }
}
