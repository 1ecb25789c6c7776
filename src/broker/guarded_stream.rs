//! Stream to the broker that passes every incoming byte through the [`FrameGuard`].
//!
//! The client reads from whatever stream type its runtime kit names. [`GuardedTokio`] is Tokio with a guarded stream, so
//! the guard sits above TLS and below the client's parser.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio, TokioRuntime};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use lapin::tcp::AsyncTcpStream;

use super::frame_guard::FrameGuard;

/// Runtime on which the client's tasks run.
pub(super) type ClientRuntime = Runtime<GuardedTokio>;
/// Socket to the broker, with or without TLS.
pub(super) type BrokerSocket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

const READ_BYTES: usize = 64 * 1024;

/// Tokio, except that TCP streams are guarded.
#[derive(Debug, Clone)]
pub(super) struct GuardedTokio(pub(super) TokioRuntime);

impl RuntimeKit for GuardedTokio {}

impl Executor for GuardedTokio {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, future: F) -> Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, work: F) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(work)
    }
}

impl Reactor for GuardedTokio {
    type TcpStream = GuardedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connect = self.0.tcp_connect_addr(address);
        async move { Ok(GuardedStream::new(AsyncTcpStream::Plain(connect.await?))) }
    }
}

/// Stream whose incoming frames the client can parse.
pub(super) struct GuardedStream {
    socket: BrokerSocket,
    guard: FrameGuard,
    buffer: Box<[u8]>,
}

impl GuardedStream {
    pub(super) fn new(socket: BrokerSocket) -> Self {
        Self { socket, guard: FrameGuard::default(), buffer: vec![0; READ_BYTES].into_boxed_slice() }
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            let taken = this.guard.take(buf);
            if taken > 0 || buf.is_empty() {
                return Poll::Ready(Ok(taken));
            }
            let read = ready!(Pin::new(&mut this.socket).poll_read(cx, &mut this.buffer))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            this.guard.push(&this.buffer[..read])?;
        }
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx)
    }
}
