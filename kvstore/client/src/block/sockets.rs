//! The sockets of a client, remembered so that a forked child can close its copies: a server takes a connection for open as
//! long as any process holds it, and would not see the parent go while a child lives.
//!
//! Numbers in fixed slots and no lock, because a child reads them as they lay when it was forked. Beside each number lies the
//! socket's inode: a program may close and open files of its own in a child first (as daemons do), and then the number is
//! somebody else's. A socket that is being connected at the very moment of a fork is missed; it then ends with the child.
//!
//! Everything else a child inherits (the runtime's epoll and eventfd, pidfds, the memory of call words) is left open: nobody
//! at another end waits for it.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Sockets remembered at a time: 64 connections, 64 block connections, and as many again that are being replaced.
const SLOTS: usize = 256;
/// A slot that is free.
const NONE: i32 = -1;
/// One that is being filled.
const TAKEN: i32 = -2;

/// All sockets of one client.
#[derive(Debug)]
pub(crate) struct Sockets([Slot; SLOTS]);

#[derive(Debug)]
struct Slot {
    number: AtomicI32,
    inode: AtomicU64,
}

/// A socket that is remembered until this is dropped, which must be before the socket is closed.
#[derive(Debug)]
pub(crate) struct Noted {
    sockets: Arc<Sockets>,
    slot: Option<usize>,
}

impl Default for Sockets {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Slot { number: AtomicI32::new(NONE), inode: AtomicU64::new(0) }))
    }
}

impl Sockets {
    /// Remembers a socket. One too many is not remembered, and ends with the last process that holds it.
    pub(crate) fn note(self: &Arc<Self>, socket: BorrowedFd<'_>) -> Noted {
        let inode = rustix::fs::fstat(socket).map(|s| s.st_ino).ok();
        let free =
            |slot: &Slot| slot.number.compare_exchange(NONE, TAKEN, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        let slot = inode.and_then(|_| self.0.iter().position(free));
        if let (Some(slot), Some(inode)) = (slot, inode) {
            self.0[slot].inode.store(inode, Ordering::Relaxed);
            self.0[slot].number.store(socket.as_raw_fd(), Ordering::Release);
        }
        Noted { sockets: Arc::clone(self), slot }
    }

    /// In a child: closes its copies of its parent's sockets. Answers how many there were.
    ///
    /// # Safety
    /// This process inherited the sockets, and nothing in it uses or drops what owns them ever again.
    pub(crate) unsafe fn close_inherited(&self) -> usize {
        let mut closed = 0;
        for slot in &self.0 {
            let number = slot.number.swap(NONE, Ordering::AcqRel);
            if number < 0 {
                continue;
            }
            // SAFETY: borrowed for one question; a number that is not open any more is answered with EBADF.
            let socket = unsafe { BorrowedFd::borrow_raw(number) };
            let ours = rustix::fs::fstat(socket)
                .is_ok_and(|s| s.st_ino == slot.inode.load(Ordering::Relaxed) && is_socket(s.st_mode));
            if ours {
                // SAFETY: open, and the very socket that was noted; its owner is never used again, as the caller promises, and the
                // slot was emptied, so nobody closes it twice.
                unsafe { rustix::io::close(number) };
                closed += 1;
            }
        }
        closed
    }
}

fn is_socket(mode: u32) -> bool {
    rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::Socket
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.sockets.0[slot].number.store(NONE, Ordering::Release);
        }
    }
}

/// A stream whose socket is remembered as long as it is open.
pub(crate) struct NotedStream<S> {
    // Dropped first: once the socket is closed its number may be another file's.
    _noted: Noted,
    stream: S,
}

impl<S: std::os::fd::AsFd> NotedStream<S> {
    pub(crate) fn new(sockets: &Arc<Sockets>, stream: S) -> Self {
        Self { _noted: sockets.note(stream.as_fd()), stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for NotedStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for NotedStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd as _, IntoRawFd as _};
    use std::os::unix::net::UnixStream;

    /// As in a child: what was noted is closed once, and nothing else is; seen at the other end.
    #[test]
    fn what_is_noted_is_closed_and_nothing_else() {
        use std::io::Read as _;
        let sockets = Arc::new(Sockets::default());
        let (ours, mut other) = UnixStream::pair().unwrap();
        let (kept, _kept_other) = UnixStream::pair().unwrap();
        let noted = sockets.note(ours.as_fd());
        drop(sockets.note(kept.as_fd()));
        std::mem::forget(noted);
        let _ = ours.into_raw_fd(); // as good as leaked: nobody drops it
        // SAFETY: the one socket that is noted has no owner any more.
        assert_eq!(unsafe { sockets.close_inherited() }, 1);
        assert_eq!(other.read(&mut [0; 1]).unwrap(), 0, "the other end sees it closed");
        // SAFETY: as above.
        assert_eq!(unsafe { sockets.close_inherited() }, 0);
        rustix::fs::fstat(&kept).unwrap();
    }

    #[test]
    fn a_number_that_became_another_file_is_left_alone() {
        let sockets = Arc::new(Sockets::default());
        let (a, _b) = UnixStream::pair().unwrap();
        let noted = sockets.note(a.as_fd());
        // The number is another file's now, as after a daemon closed all it had.
        sockets.0[noted.slot.unwrap()].inode.store(1, Ordering::Relaxed);
        // SAFETY: nothing is closed, which is what is tested.
        assert_eq!(unsafe { sockets.close_inherited() }, 0);
        rustix::fs::fstat(&a).unwrap();
    }

    #[test]
    fn one_too_many_is_not_remembered_and_slots_come_back() {
        let sockets = Arc::new(Sockets::default());
        let (a, _b) = UnixStream::pair().unwrap();
        let mut noted: Vec<_> = (0..SLOTS).map(|_| sockets.note(a.as_fd())).collect();
        assert!(noted.iter().all(|n| n.slot.is_some()));
        assert!(sockets.note(a.as_fd()).slot.is_none());
        noted.pop();
        assert!(sockets.note(a.as_fd()).slot.is_some());
    }
}
