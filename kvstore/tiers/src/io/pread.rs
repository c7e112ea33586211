//! [`PreadDisk`]: the engine of plain system calls on a few threads, for hosts where io_uring is refused.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvkeep_core::{Error, ErrorKind, Result};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Semaphore;

use super::buf::IoBuf;
use super::disk::{Disk, DiskOptions, EngineInfo, FileId, Flush, Io, Io2, Space, shut_down};
use super::file::Folder;
use super::request::{self, Backend, Bufs, Kind, Request};
use super::transfer::{Direction, Transfer};

/// Threads that do system calls, at most; fewer where the queue depth is smaller. Each is one operation that the device
/// can see.
pub const MAX_PREAD_THREADS: u32 = 16;

/// The engine of plain system calls. Dropping it ends what was queued, then joins its threads.
pub struct PreadDisk {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    folder: Folder,
    options: DiskOptions,
    /// The bound of `queue`: a request holds a permit from before it is queued until it has ended.
    depth: Arc<Semaphore>,
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    requests: VecDeque<Request>,
    stopping: bool,
}

impl PreadDisk {
    /// Opens the folder at `path`, which must exist, and starts the threads.
    ///
    /// # Errors
    /// `Config` for options out of range, `Io` if the folder is not usable or a thread does not start.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self> {
        Self::with_folder(Folder::open(path)?, options)
    }

    pub(crate) fn with_folder(folder: Folder, options: DiskOptions) -> Result<Self> {
        options.check()?;
        let shared = Arc::new(Shared {
            folder,
            options,
            depth: Arc::new(Semaphore::new(options.queue_depth as usize)),
            queue: Mutex::default(),
            work: Condvar::new(),
        });
        let mut disk = Self { shared, threads: Vec::new() };
        for n in 0..options.queue_depth.min(MAX_PREAD_THREADS) {
            let shared = Arc::clone(&disk.shared);
            let thread = std::thread::Builder::new().name(format!("kvkeep-pread-{n}")).spawn(move || shared.run());
            let thread = thread
                .map_err(|e| Error::new(ErrorKind::Io, "cannot start a thread of the pread engine").with("cause", e))?;
            disk.threads.push(thread);
        }
        Ok(disk)
    }
}

impl Drop for PreadDisk {
    fn drop(&mut self) {
        self.shared.depth.close();
        self.shared.queue.lock().stopping = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the pread engine panicked");
            }
        }
    }
}

impl Shared {
    /// What each thread does: requests in order, until there are none and the engine is stopping.
    fn run(&self) {
        loop {
            let mut request = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(request) = queue.requests.pop_front() {
                        break request;
                    }
                    if queue.stopping {
                        return;
                    }
                    self.work.wait(&mut queue);
                }
            };
            let result = serve(&mut request);
            request.answer(result);
        }
    }
}

/// One operation, from its first system call to its last.
fn serve(request: &mut Request) -> io::Result<usize> {
    let Request { kind, file, offset, bufs, .. } = request;
    let Kind::Move(direction) = *kind else {
        // std repeats it after EINTR; every other failure is for the flush coordinator to hear.
        return file.file.sync_data().map(|()| 0);
    };
    let transfer = Transfer::new(direction, bufs.len());
    let at = |resume: usize| *offset + resume as u64;
    let file = &file.file;
    match (direction, bufs) {
        (Direction::Read, Bufs::One(buf)) => transfer.run(|n| file.read_at(&mut buf.as_mut_slice()[n..], at(n))),
        (Direction::Write, Bufs::One(buf)) => transfer.run(|n| file.write_at(&buf.as_slice()[n..], at(n))),
        (Direction::Write, Bufs::Two(head, body)) => transfer.run(|n| {
            let (h, b) = (n.min(head.len()), n.saturating_sub(head.len()));
            let parts = [IoSlice::new(&head.as_slice()[h..]), IoSlice::new(&body.as_slice()[b..])];
            Ok(rustix::io::pwritev(file, &parts, at(n))?)
        }),
        _ => unreachable!("only writes have two buffers, and every move has at least one"),
    }
}

impl Backend for Shared {
    fn folder(&self) -> &Folder {
        &self.folder
    }

    fn depth(&self) -> &Arc<Semaphore> {
        &self.depth
    }

    fn start(&self, request: Request) {
        let mut queue = self.queue.lock();
        if queue.stopping {
            drop(queue);
            return request.answer(Err(shut_down()));
        }
        queue.requests.push_back(request);
        drop(queue);
        self.work.notify_one();
    }
}

impl Disk for PreadDisk {
    fn create(&self, name: &str, bytes: u64) -> Result<FileId> {
        self.shared.folder.create(name, bytes).map(|file| file.id)
    }

    fn open(&self, name: &str) -> Result<(FileId, u64)> {
        self.shared.folder.open_named(name).map(|(file, bytes)| (file.id, bytes))
    }

    fn list(&self) -> Result<Vec<(String, u64)>> {
        self.shared.folder.list()
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.shared.folder.remove(name).map(|_| ())
    }

    fn read(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        request::read(&self.shared, file, offset, buf)
    }

    fn write(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        request::write(&self.shared, file, offset, buf)
    }

    fn write2(&self, file: FileId, offset: u64, head: IoBuf, body: IoBuf) -> Io2 {
        request::write2(&self.shared, file, offset, head, body)
    }

    fn flush(&self, file: FileId) -> Flush {
        request::flush(&self.shared, file)
    }

    fn space(&self) -> Result<Space> {
        self.shared.folder.space()
    }

    fn engine(&self) -> EngineInfo {
        let direct = self.shared.folder.is_direct();
        let notes = if direct { Vec::new() } else { vec!["the filesystem refuses O_DIRECT".to_owned()] };
        EngineInfo { name: "pread", direct, queue_depth: self.shared.options.queue_depth, notes }
    }
}
