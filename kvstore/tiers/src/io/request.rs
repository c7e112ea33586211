//! [`Request`]: one operation on its way through an engine, and the way in that the engines share: check, wait for room,
//! hand over, wait for the answer.

use std::io;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::buf::IoBuf;
use super::disk::{FileId, Flush, Io, Io2, check_aligned, shut_down};
use super::file::{Folder, OpenFile};
use super::transfer::Direction;

/// What is asked of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Bytes move between the device and the buffers.
    Move(Direction),
    /// What was written becomes durable.
    Flush,
}

/// The buffers of one operation, contiguous on the device.
#[derive(Debug)]
pub(crate) enum Bufs {
    None,
    One(IoBuf),
    Two(IoBuf, IoBuf),
}

impl Bufs {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(buf) => buf.len(),
            Self::Two(head, body) => head.len() + body.len(),
        }
    }

    fn one(self) -> IoBuf {
        match self {
            Self::One(buf) => buf,
            _ => unreachable!("an engine gives back the buffers it was given"),
        }
    }

    fn two(self) -> (IoBuf, IoBuf) {
        match self {
            Self::Two(head, body) => (head, body),
            _ => unreachable!("an engine gives back the buffers it was given"),
        }
    }
}

/// The buffers, and the bytes moved or what went wrong.
pub(crate) type Answer = (Bufs, io::Result<usize>);

/// One operation. Whoever holds it keeps the buffers and the file alive; it is dropped only after the kernel has
/// answered, or before the kernel has heard of it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) file: Arc<OpenFile>,
    pub(crate) offset: u64,
    pub(crate) bufs: Bufs,
    done: oneshot::Sender<Answer>,
    permit: OwnedSemaphorePermit,
}

impl Request {
    /// Answers. Room is made first, so that who hears the answer finds it; an answer that nobody waits for any more is
    /// dropped here, and the buffers with it.
    pub(crate) fn answer(self, result: io::Result<usize>) {
        drop(self.permit);
        let _ = self.done.send((self.bufs, result));
    }
}

/// What an engine offers to the shared way in.
pub(crate) trait Backend: Send + Sync + 'static {
    /// Where the files are.
    fn folder(&self) -> &Folder;
    /// One permit per operation in flight. Closed when the engine shuts down.
    fn depth(&self) -> &Arc<Semaphore>;
    /// Takes a request, and sees to it that it is answered: with [`shut_down`] if the engine is stopping.
    fn start(&self, request: Request);
}

async fn perform<B: Backend>(backend: Arc<B>, kind: Kind, file: FileId, offset: u64, bufs: Bufs) -> Answer {
    let aligned = match &bufs {
        Bufs::None => Ok(()),
        Bufs::One(buf) => check_aligned(offset, &[buf]),
        Bufs::Two(head, body) => check_aligned(offset, &[head, body]),
    };
    if let Err(e) = aligned {
        return (bufs, Err(e));
    }
    let Ok(permit) = Arc::clone(backend.depth()).acquire_owned().await else {
        return (bufs, Err(shut_down()));
    };
    let file = match backend.folder().get(file) {
        Ok(file) => file,
        Err(e) => return (bufs, Err(e)),
    };
    let (done, answer) = oneshot::channel();
    backend.start(Request { kind, file, offset, bufs, done, permit });
    drop(backend);
    answer.await.expect("an engine answers every request that it has taken")
}

pub(crate) fn read<B: Backend>(backend: &Arc<B>, file: FileId, offset: u64, buf: IoBuf) -> Io {
    let moved = perform(Arc::clone(backend), Kind::Move(Direction::Read), file, offset, Bufs::One(buf));
    Box::pin(async move {
        let (bufs, result) = moved.await;
        (bufs.one(), result)
    })
}

pub(crate) fn write<B: Backend>(backend: &Arc<B>, file: FileId, offset: u64, buf: IoBuf) -> Io {
    let moved = perform(Arc::clone(backend), Kind::Move(Direction::Write), file, offset, Bufs::One(buf));
    Box::pin(async move {
        let (bufs, result) = moved.await;
        (bufs.one(), result)
    })
}

pub(crate) fn write2<B: Backend>(backend: &Arc<B>, file: FileId, offset: u64, head: IoBuf, body: IoBuf) -> Io2 {
    let moved = perform(Arc::clone(backend), Kind::Move(Direction::Write), file, offset, Bufs::Two(head, body));
    Box::pin(async move {
        let (bufs, result) = moved.await;
        let (head, body) = bufs.two();
        (head, body, result.map(|_| ()))
    })
}

pub(crate) fn flush<B: Backend>(backend: &Arc<B>, file: FileId) -> Flush {
    let flushed = perform(Arc::clone(backend), Kind::Flush, file, 0, Bufs::None);
    Box::pin(async move { flushed.await.1.map(|_| ()) })
}
