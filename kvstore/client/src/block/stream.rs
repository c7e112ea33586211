//! Both halves of a connection of the block protocol: TCP, TLS over TCP, or the Unix socket, where descriptors travel
//! beside the bytes. The server uses the same ones.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio_rustls::TlsStream;

use super::reader::patiently;

/// Descriptors that may wait on a connection to be asked for. A peer that sends more has lost its connection.
pub const DESCRIPTORS_WAITING_MAX: usize = 4;
/// Descriptors that one message may carry; the kernel closes what does not fit our buffer.
const DESCRIPTORS_PER_MESSAGE: usize = 4;

/// The half that is read.
pub enum ReadHalf {
    /// Plain TCP.
    Tcp(tcp::OwnedReadHalf),
    /// TLS over TCP.
    Tls(tokio::io::ReadHalf<TlsStream<TcpStream>>),
    /// The Unix socket, and the descriptors that came and were not asked for yet.
    Unix(unix::OwnedReadHalf, VecDeque<OwnedFd>),
}

/// The half that is written.
pub enum WriteHalf {
    /// Plain TCP.
    Tcp(tcp::OwnedWriteHalf),
    /// TLS over TCP.
    Tls(tokio::io::WriteHalf<TlsStream<TcpStream>>),
    /// The Unix socket.
    Unix(unix::OwnedWriteHalf),
}

/// Both halves of a TCP stream.
pub fn tcp(stream: TcpStream) -> (ReadHalf, WriteHalf) {
    let (read, write) = stream.into_split();
    (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
}

/// Both halves of a TLS stream.
pub fn tls(stream: TlsStream<TcpStream>) -> (ReadHalf, WriteHalf) {
    let (read, write) = tokio::io::split(stream);
    (ReadHalf::Tls(read), WriteHalf::Tls(write))
}

/// Both halves of a Unix stream.
pub fn unix(stream: UnixStream) -> (ReadHalf, WriteHalf) {
    let (read, write) = stream.into_split();
    (ReadHalf::Unix(read, VecDeque::new()), WriteHalf::Unix(write))
}

impl ReadHalf {
    /// The oldest descriptor that came and was not taken yet.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        match self {
            Self::Unix(_, waiting) => waiting.pop_front(),
            Self::Tcp(_) | Self::Tls(_) => None,
        }
    }

    /// Whether descriptors wait.
    pub fn has_descriptors(&self) -> bool {
        matches!(self, Self::Unix(_, waiting) if !waiting.is_empty())
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buf),
            Self::Tls(half) => Pin::new(half).poll_read(cx, buf),
            Self::Unix(half, waiting) => {
                let stream: &UnixStream = half.as_ref();
                loop {
                    ready!(stream.poll_read_ready(cx))?;
                    match stream.try_io(Interest::READABLE, || receive(stream, buf, waiting)) {
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        result => return Poll::Ready(result),
                    }
                }
            }
        }
    }
}

/// One `recvmsg`: bytes into `buf`, descriptors to those that wait.
fn receive(stream: &UnixStream, buf: &mut ReadBuf<'_>, waiting: &mut VecDeque<OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(buf.initialize_unfilled())];
    let received = rustix::net::recvmsg(stream, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            waiting.extend(descriptors);
        }
    }
    if waiting.len() > DESCRIPTORS_WAITING_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors than anybody asked for"));
    }
    buf.advance(received.bytes);
    Ok(())
}

impl AsyncWrite for WriteHalf {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_write(cx, buf),
            Self::Tls(half) => Pin::new(half).poll_write(cx, buf),
            Self::Unix(half) => Pin::new(half).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_write_vectored(cx, bufs),
            Self::Tls(half) => Pin::new(half).poll_write_vectored(cx, bufs),
            Self::Unix(half) => Pin::new(half).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        !matches!(self, Self::Tls(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_flush(cx),
            Self::Tls(half) => Pin::new(half).poll_flush(cx),
            Self::Unix(half) => Pin::new(half).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_shutdown(cx),
            Self::Tls(half) => Pin::new(half).poll_shutdown(cx),
            Self::Unix(half) => Pin::new(half).poll_shutdown(cx),
        }
    }
}

impl WriteHalf {
    /// Writes a frame: its head and envelope, then its payload. Answers `Ok` when the kernel has all of it. A descriptor goes
    /// with the first byte; it needs the Unix socket. `patience`: how long the other side may take none of it.
    ///
    /// # Errors
    /// Of the socket; `TimedOut` where patience ended, `Unsupported` for a descriptor on TCP.
    pub async fn write_frame(
        &mut self,
        mut head: &[u8],
        mut payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
        patience: Option<Duration>,
    ) -> io::Result<()> {
        if let Some(descriptor) = descriptor {
            let sent = patiently(patience, self.send_with(head, descriptor)).await?;
            head = &head[sent..];
        }
        while !head.is_empty() {
            let sent = patiently(patience, self.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)])).await?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let of_head = sent.min(head.len());
            head = &head[of_head..];
            payload = &payload[sent - of_head..];
        }
        while !payload.is_empty() {
            match patiently(patience, self.write(payload)).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                sent => payload = &payload[sent..],
            }
        }
        patiently(patience, self.flush()).await
    }

    async fn send_with(&mut self, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<usize> {
        let Self::Unix(half) = self else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "descriptors travel on the Unix socket only"));
        };
        let stream: &UnixStream = half.as_ref();
        loop {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let descriptors = [descriptor];
                control.push(SendAncillaryMessage::ScmRights(&descriptors));
                Ok(rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
            });
            match sent {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                sent => return sent,
            }
        }
    }
}
