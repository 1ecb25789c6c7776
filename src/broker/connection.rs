//! One connection to one broker: opened with a limit, asked for its version, closed with a limit.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

use super::error::{BrokerError, within};
use super::tls::{self, Stream, Tls};

/// What happens to a connection, as it happens.
pub(super) type Events = Pin<Box<dyn futures_util::Stream<Item = lapin::Event> + Send>>;

/// What a connection is opened with. The client's tasks run on `runtime`, which is not the one that runs the work:
/// a busy worker must not starve the heartbeats.
#[derive(Clone)]
pub(super) struct Opening {
    pub(super) runtime: TokioRuntime,
    pub(super) tls: Tls,
    pub(super) name: String,
    pub(super) connect_limit: Duration,
    pub(super) answer_limit: Duration,
}

/// A connection that is cut when it is dropped.
pub(super) struct Connection {
    connection: lapin::Connection,
    answer_limit: Duration,
    _shutdown: ShutdownOnDrop,
}

impl Connection {
    /// Connects once, without any recovery in the client: whoever holds the wire builds a new one.
    pub(super) async fn open(opening: &Opening, uri: AMQPUri) -> Result<Self, BrokerError> {
        let shutdown = ShutdownOnDrop::default();
        let (socket, tls, limit) = (shutdown.clone_handle(), opening.tls.clone(), opening.connect_limit);
        let connect = async move |uri: AMQPUri, runtime: TokioRuntime| {
            let stream = within_on(&runtime, limit, tls.connect(&uri, &runtime)).await?;
            socket.keep(&stream)?;
            Ok(stream)
        };
        let properties = ConnectionProperties::default().with_connection_name(opening.name.clone().into());
        let connection = lapin::Connection::connector(uri, opening.runtime.clone(), connect, properties);
        let connection = within(limit, "connecting", connection).await?;
        Ok(Self { connection, answer_limit: opening.answer_limit, _shutdown: shutdown })
    }

    /// A new channel.
    pub(super) async fn channel(&self) -> Result<Channel, BrokerError> {
        within(self.answer_limit, "opening a channel", self.connection.create_channel()).await
    }

    /// What happens to the connection, as it happens.
    pub(super) fn events(&self) -> Events {
        Box::pin(self.connection.events_listener())
    }

    /// Whether the broker takes nothing from this connection for now, because of a memory or disk alarm.
    pub(super) fn blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Whether it still stands.
    pub(super) fn connected(&self) -> bool {
        self.connection.status().connected()
    }

    /// Says goodbye, or cuts the line if that takes too long: on a blocked connection it takes for ever.
    pub(super) async fn close(self, limit: Duration) {
        if let Err(error) = within(limit, "closing the connection", self.connection.close(200, "OK".into())).await {
            tracing::debug!(%error, "the connection was cut, not closed");
        }
    }
}

/// What the broker says of itself before anyone logs in: product and version. The client does not tell, so this
/// opens a connection of its own; the broker logs one line about it.
pub(super) async fn server_version(opening: &Opening, uri: &AMQPUri) -> Result<(String, String), BrokerError> {
    let ask = async {
        let connect = opening.tls.connect(uri, &opening.runtime);
        let stream = within_on(&opening.runtime, opening.connect_limit, connect).await?;
        ask_for_start(stream).await.map_err(|error| tls::explain(uri, error))
    };
    let doing = "asking for the broker's version";
    match tokio::time::timeout(opening.connect_limit, ask).await {
        Ok(answer) => answer.map_err(|error| BrokerError::Lost { doing, source: Box::new(error) }),
        Err(_) => Err(BrokerError::TimedOut { doing, after: opening.connect_limit }),
    }
}

async fn ask_for_start(mut stream: Stream) -> io::Result<(String, String)> {
    stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
    stream.flush().await?;
    let mut header = [0; 7];
    stream.read_exact(&mut header).await?;
    let length = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
    if header[0] != 1 || length > 1 << 17 {
        return Err(io::Error::other("it does not speak AMQP 0-9-1"));
    }
    let mut frame = vec![0; length as usize];
    stream.read_exact(&mut frame).await?;
    read_start(&frame).ok_or_else(|| io::Error::other("it does not open as AMQP 0-9-1 brokers do"))
}

fn read_start(frame: &[u8]) -> Option<(String, String)> {
    let (_, method) = parse_class(frame).ok()?;
    let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = method else { return None };
    let text = |key: &str| match start.server_properties.inner().get(key) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    Some((text("product"), text("version")))
}

/// Whether this broker has quorum queues with message TTL and dead-lettering at least once.
pub(super) fn is_new_enough(product: &str, version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '+', '~']).map(|part| part.parse::<u32>().unwrap_or(0));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    product == "RabbitMQ" && (major, minor) >= (3, 10)
}

/// A limit inside the client's own thread: a connect that nobody waits for any more would hold that thread for as
/// long as the kernel keeps trying.
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

/// A second handle on the socket. Dropping the client's connection asks its thread to say goodbye, which it can't do
/// while the broker blocks it or is frozen; shutting the socket ends the thread in any case.
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
        if let Socket::Open(socket) = std::mem::replace(&mut *lock(&self.0), Socket::Cut) {
            // It fails if the peer has closed already, which is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Hands the socket to the shutdown once it is open.
struct SocketHandle(Arc<Mutex<Socket>>);

impl SocketHandle {
    fn keep(&self, stream: &Stream) -> io::Result<()> {
        let socket = match stream {
            AsyncTcpStream::Plain(plain) => plain.get_ref().as_fd().try_clone_to_owned()?,
            AsyncTcpStream::Rustls(tls) => tls.get_ref().0.get_ref().as_fd().try_clone_to_owned()?,
            _ => return Ok(()),
        };
        let mut slot = lock(&self.0);
        if matches!(*slot, Socket::Cut) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        *slot = Socket::Open(socket.into());
        Ok(())
    }
}

fn lock(socket: &Mutex<Socket>) -> MutexGuard<'_, Socket> {
    socket.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_brokers_and_other_products_are_told_apart() {
        for version in ["3.10.0", "3.10.8", "3.13.7+2", "4.0.1", "4.3.0-rc.1", "10.0"] {
            assert!(is_new_enough("RabbitMQ", version), "{version}");
        }
        for version in ["3.9.29", "3.8", "2.8.7", "", "unknown"] {
            assert!(!is_new_enough("RabbitMQ", version), "{version}");
        }
        assert!(!is_new_enough("LavinMQ", "4.0.0"));
    }

    #[test]
    fn the_opening_of_a_broker_is_read() {
        let mut frame = vec![0, 10, 0, 10, 0, 9];
        let table = b"\x07productS\x00\x00\x00\x08RabbitMQ\x07versionS\x00\x00\x00\x063.10.8";
        frame.extend((table.len() as u32).to_be_bytes());
        frame.extend(table);
        frame.extend(b"\x00\x00\x00\x05PLAIN\x00\x00\x00\x05en_US");
        assert_eq!(read_start(&frame), Some(("RabbitMQ".to_owned(), "3.10.8".to_owned())));
        assert_eq!(read_start(b"AMQP\x00\x00\x09\x01"), None);
    }
}
