//! Streams for the gRPC server that carry their [`Connection`] with them, and the acceptor of its TCP port. The Unix socket
//! and the block port are accepted in [`crate::block::accept`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::connection::{Connection, Instances, Via};

/// A stream and the connection it is.
pub struct Accepted<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S> Accepted<S> {
    /// Of a stream that was accepted elsewhere.
    pub fn new(stream: S, connection: Arc<Connection>) -> Self {
        Self { stream, connection }
    }
}

impl<S> Connected for Accepted<S> {
    type ConnectInfo = Arc<Connection>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Arc::clone(&self.connection)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Accepted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Accepted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// TCP connections, `TCP_NODELAY` set (a peer without it stalls 40 ms per small answer). One beyond the bound is closed
/// at once: the client sees a refusal, not a queue.
pub fn tcp(
    listener: TcpListener,
    instances: Arc<Instances>,
) -> impl Stream<Item = io::Result<Accepted<tokio::net::TcpStream>>> + Send + 'static {
    futures_util::stream::unfold((listener, instances), |(listener, instances)| async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    if let Err(error) = stream.set_nodelay(true) {
                        debug!(%peer, %error, "nodelay refused");
                    }
                    if let Some(connection) = instances.admit(Via::Tcp(peer)) {
                        return Some((Ok(Accepted { stream, connection }), (listener, instances)));
                    }
                    metrics::counter!("kvkeep_connections_refused_total").increment(1);
                }
                Err(error) => accept_failed(&error).await,
            }
        }
    })
}

/// Out of descriptors, usually: waiting a little beats spinning, and the listener must live on.
async fn accept_failed(error: &io::Error) {
    warn!(%error, "accept failed");
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
}
