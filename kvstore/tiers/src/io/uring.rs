//! [`UringDisk`]: the engine on io_uring. One thread per device owns the ring; callers put requests into its inbox and
//! ring a bell (an eventfd that the ring itself polls), so the thread sleeps in one place for both requests and
//! completions, and never spins.
//!
//! Who owns what: a [`Flight`] holds the request, and through it buffers and file, from before the kernel hears of it
//! until its last completion has been reaped. [`Ring::fly`] is the only place that makes entries, [`Ring::land`] the only
//! one that lets go of a flight. That is the proof behind each `unsafe` block here.

use std::collections::HashMap;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use kvkeep_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::Semaphore;

use super::buf::{IoBuf, Region};
use super::disk::{
    Disk, DiskOptions, EngineInfo, FileId, Flush, Io, Io2, MAX_REGISTERED_BUFFERS, Registration, Space, shut_down,
};
use super::file::{Folder, OpenFile};
use super::request::{self, Backend, Bufs, Kind, Request};
use super::transfer::{Direction, Step, Transfer};

/// Size of the table of registered files, entries. A file beyond it costs a reference count per operation.
pub const MAX_REGISTERED_FILES: u32 = 1024;

/// Largest region that the kernel registers as one buffer, bytes.
pub const MAX_REGISTERED_BYTES: usize = 1 << 30;

/// Bytes asked for in one entry at most; the rest of a longer operation follows as after a short count. The kernel itself
/// stops a page short of 2 GiB.
const MAX_ENTRY_BYTES: usize = 1 << 30;

/// Entries that one operation can have in flight: header and payload.
const MAX_PARTS: usize = 2;

/// Completions taken from the ring at once.
const REAP: usize = 64;

/// `user_data` of the poll on the bell; flights have smaller ones.
const BELL: u64 = u64::MAX;

/// The engine on io_uring. Dropping it ends what is in flight, then joins its thread.
pub struct UringDisk {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    notes: Vec<String>,
    /// That memory stays unregistered is said once, not per arena file.
    said_unregistered: Once,
}

struct Shared {
    folder: Folder,
    options: DiskOptions,
    /// The bound of `inbox.requests` and of the flights together.
    depth: Arc<Semaphore>,
    inbox: Mutex<Inbox>,
    bell: OwnedFd,
}

#[derive(Default)]
struct Inbox {
    requests: Vec<Request>,
    orders: Vec<Order>,
    stopping: bool,
    /// The thread is, or is about to be, asleep in the kernel, and has to be woken by the bell.
    asleep: bool,
}

/// What only the thread that owns the ring may do. Callers block until it is done, so there are as many orders as callers.
enum Order {
    Register {
        index: u16,
        region: Region,
        done: SyncSender<io::Result<()>>,
    },
    Unregister {
        index: u16,
        done: SyncSender<()>,
    },
    /// A file was removed; its place in the table is free again, and with it the last reference to its bytes.
    Forget {
        file: FileId,
        done: SyncSender<()>,
    },
}

impl UringDisk {
    /// Opens the folder at `path`, which must exist, sets up a ring and starts its thread.
    ///
    /// # Errors
    /// `Config` for options out of range, `Unavailable` if this kernel or sandbox refuses io_uring, `Io` if the folder is
    /// not usable or the thread does not start.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self> {
        Self::with_folder(Folder::open(path)?, options)
    }

    pub(crate) fn with_folder(folder: Folder, options: DiskOptions) -> Result<Self> {
        options.check()?;
        let refused = |e: io::Error| Error::new(ErrorKind::Unavailable, "io_uring is refused").with("cause", e);
        let shared = Arc::new(Shared {
            folder,
            options,
            depth: Arc::new(Semaphore::new(options.queue_depth as usize)),
            inbox: Mutex::default(),
            bell: eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| refused(e.into()))?,
        });
        // The ring belongs to the thread that makes it, so what it has to say comes through a channel.
        let (said, hear) = sync_channel(1);
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("kvkeep-uring".to_owned()).spawn(move || {
            match Ring::new(theirs) {
                Ok((mut ring, notes)) => {
                    let _ = said.send(Ok(notes));
                    ring.run();
                }
                Err(e) => {
                    let _ = said.send(Err(e));
                }
            };
        });
        let thread =
            thread.map_err(|e| Error::new(ErrorKind::Io, "cannot start the io_uring thread").with("cause", e))?;
        let mut notes = hear
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the io_uring thread ended while it set up its ring")))
            .map_err(refused)?;
        if !shared.folder.is_direct() {
            notes.push("the filesystem refuses O_DIRECT".to_owned());
        }
        Ok(Self { shared, thread: Some(thread), notes, said_unregistered: Once::new() })
    }

    /// Gives the ring's thread an order and waits until it is done; `None` if the thread is gone.
    fn order<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> Option<T> {
        let (done, answer) = sync_channel(1);
        self.shared.post(|inbox| inbox.orders.push(order(done)));
        answer.recv().ok()
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        self.shared.depth.close();
        self.shared.post(|inbox| inbox.stopping = true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the io_uring thread panicked");
        }
    }
}

impl Shared {
    /// Changes the inbox, and rings the bell if the thread would not look otherwise.
    fn post(&self, change: impl FnOnce(&mut Inbox)) {
        let asleep = {
            let mut inbox = self.inbox.lock();
            change(&mut inbox);
            mem::take(&mut inbox.asleep)
        };
        if asleep {
            // An eventfd takes 2^64-2 rings before it would block, and fails only if it is not one.
            rustix::io::write(&self.bell, &1u64.to_ne_bytes()).expect("an eventfd of ours takes a ring");
        }
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
        let mut refused = None;
        self.post(|inbox| {
            if inbox.stopping {
                refused = Some(request);
            } else {
                inbox.requests.push(request);
            }
        });
        if let Some(request) = refused {
            request.answer(Err(shut_down()));
        }
    }
}

/// The ring and what flies on it. Lives on its own thread.
struct Ring {
    shared: Arc<Shared>,
    ring: IoUring,
    flights: Vec<Option<Flight>>,
    /// Places in `flights` that are empty.
    free: Vec<u32>,
    /// Places in the kernel's table of files: who is where, and which are empty.
    files: HashMap<FileId, u32>,
    free_files: Vec<u32>,
    /// What lies at each index of the kernel's table of buffers.
    regions: Vec<Option<Region>>,
    bell_polled: bool,
}

/// An operation of which the kernel knows.
struct Flight {
    request: Request,
    parts: [Option<Transfer>; MAX_PARTS],
    /// Parts that have not ended.
    left: u32,
    /// What the parts that have ended came to.
    result: io::Result<usize>,
}

impl Ring {
    fn new(shared: Arc<Shared>) -> io::Result<(Self, Vec<String>)> {
        let depth = shared.options.queue_depth;
        // Room for every part of every operation, and the bell.
        let entries = (depth * MAX_PARTS as u32 + 1).next_power_of_two();
        let mut notes = Vec::new();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|_| {
            notes.push("the kernel is too old for deferred task work (6.1)".to_owned());
            IoUring::new(entries)
        })?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::ReadFixed::CODE,
            opcode::WriteFixed::CODE,
            opcode::Fsync::CODE,
            opcode::PollAdd::CODE,
        ];
        if let Some(missing) = needed.into_iter().find(|code| !probe.is_supported(*code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("operation {missing} is missing")));
        }
        let mut table = |what: &str, made: io::Result<()>| {
            made.inspect_err(|e| notes.push(format!("no table of registered {what}: {e}"))).is_ok()
        };
        let files = table("files", ring.submitter().register_files_sparse(MAX_REGISTERED_FILES));
        let buffers = table("buffers", ring.submitter().register_buffers_sparse(MAX_REGISTERED_BUFFERS.into()));
        let ring = Self {
            shared,
            ring,
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            files: HashMap::new(),
            free_files: if files { (0..MAX_REGISTERED_FILES).rev().collect() } else { Vec::new() },
            regions: (0..if buffers { MAX_REGISTERED_BUFFERS } else { 0 }).map(|_| None).collect(),
            bell_polled: false,
        };
        Ok((ring, notes))
    }

    /// Serves until the engine is stopping and nothing flies any more.
    fn run(&mut self) {
        let mut requests = Vec::new();
        loop {
            let (orders, stopping, idle) = {
                let mut inbox = self.shared.inbox.lock();
                mem::swap(&mut requests, &mut inbox.requests);
                let orders = mem::take(&mut inbox.orders);
                let idle = requests.is_empty() && orders.is_empty();
                // Told under the lock: whoever posts after this look sees it and rings.
                inbox.asleep = idle && !inbox.stopping;
                (orders, inbox.stopping, idle)
            };
            orders.into_iter().for_each(|order| self.obey(order));
            requests.drain(..).for_each(|request| self.take_off(request));
            if stopping && idle && self.free.len() == self.flights.len() {
                return;
            }
            // Entries that were just made are submitted by the wait that follows once the inbox is found empty, so that
            // requests which came together go to the kernel together.
            if !idle {
                continue;
            }
            self.poll_bell();
            self.wait();
            self.reap();
        }
    }

    /// Submits what was made and sleeps until something completes: an operation, or the bell.
    fn wait(&self) {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            // Interrupted, or short of memory or completion room for the moment: what was submitted stays so, the rest
            // goes with the next call.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(e) => panic!("io_uring_enter refuses a ring that it has set up: {e}"),
        }
    }

    fn reap(&mut self) {
        // Taken out first: landing a flight may make new entries, which needs the ring.
        loop {
            let mut some = [const { mem::MaybeUninit::<cqueue::Entry>::uninit() }; REAP];
            let some = self.ring.completion().fill(&mut some);
            if some.is_empty() {
                return;
            }
            for completion in some {
                if completion.user_data() == BELL {
                    self.bell_polled &= cqueue::more(completion.flags());
                    continue;
                }
                let place = completion.user_data() / MAX_PARTS as u64;
                let part = completion.user_data() % MAX_PARTS as u64;
                self.land(place as u32, part as usize, completion.result());
            }
        }
    }

    /// Keeps the bell polled. The poll is edge-triggered and fires again and again, so nobody ever reads the eventfd.
    fn poll_bell(&mut self) {
        if !mem::replace(&mut self.bell_polled, true) {
            let poll = opcode::PollAdd::new(Fd(self.shared.bell.as_raw_fd()), libc::POLLIN as u32).multi(true);
            self.push(&poll.build().user_data(BELL));
        }
    }

    fn take_off(&mut self, request: Request) {
        let parts = match (&request.kind, &request.bufs) {
            (Kind::Flush, _) => [None, None],
            (Kind::Move(way), Bufs::Two(head, body)) => {
                [Some(Transfer::new(*way, head.len())), Some(Transfer::new(*way, body.len()))]
            }
            (Kind::Move(way), bufs) => [Some(Transfer::new(*way, bufs.len())), None],
        };
        let left = parts.iter().flatten().count().max(1) as u32;
        let place = self.free.pop().expect("there are as many places as permits, and every request holds one");
        self.flights[place as usize] = Some(Flight { request, parts, left, result: Ok(0) });
        for part in 0..left as usize {
            self.fly(place, part);
        }
    }

    /// Makes the entry for what is left of a part.
    fn fly(&mut self, place: u32, part: usize) {
        let file = {
            let flight = self.flights[place as usize].as_ref().expect("only a flight that is under way flies on");
            Arc::clone(&flight.request.file)
        };
        let fixed_file = self.fixed_file(&file);
        let flight = self.flights[place as usize].as_ref().expect("as above");
        let request = &flight.request;
        let entry = match (&flight.parts[part], &request.bufs) {
            (None, _) => {
                let flags = FsyncFlags::DATASYNC;
                match fixed_file {
                    Some(at) => opcode::Fsync::new(Fixed(at)).flags(flags).build(),
                    None => opcode::Fsync::new(Fd(file.file.as_raw_fd())).flags(flags).build(),
                }
            }
            (Some(transfer), bufs) => {
                let (buf, before) = match (bufs, part) {
                    (Bufs::Two(head, body), 1) => (body, head.len()),
                    (Bufs::One(buf) | Bufs::Two(buf, _), _) => (buf, 0),
                    (Bufs::None, _) => unreachable!("every move has a buffer"),
                };
                let resume = transfer.resume_at();
                let len = (buf.len() - resume).min(MAX_ENTRY_BYTES) as u32;
                // In the buffer: `resume` is less than its length as long as the transfer goes on.
                let start = buf.as_ptr().wrapping_add(resume);
                let offset = request.offset + (before + resume) as u64;
                let fixed_buf = self.fixed_buf(buf);
                macro_rules! entry {
                    ($fd:expr) => {
                        match (transfer.direction(), fixed_buf) {
                            (Direction::Read, Some(at)) => {
                                opcode::ReadFixed::new($fd, start, len, at).offset(offset).build()
                            }
                            (Direction::Read, None) => opcode::Read::new($fd, start, len).offset(offset).build(),
                            (Direction::Write, Some(at)) => {
                                opcode::WriteFixed::new($fd, start, len, at).offset(offset).build()
                            }
                            (Direction::Write, None) => opcode::Write::new($fd, start, len).offset(offset).build(),
                        }
                    };
                }
                match fixed_file {
                    Some(at) => entry!(Fixed(at)),
                    None => entry!(Fd(file.file.as_raw_fd())),
                }
            }
        };
        self.push(&entry.user_data(u64::from(place) * MAX_PARTS as u64 + part as u64));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: an entry points either to nothing (flush, bell) or into buffers that its flight holds until `land`
            // has seen its completion (`fly`); its file is held by the flight as well, the bell by `shared`, which
            // outlives the ring (fields drop in order, and `run` ends only when no flight is left).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // There is an entry for every part of every operation, so the queue is full only of entries that the kernel
            // has not fetched yet.
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => panic!("io_uring_enter refuses a ring that it has set up: {e}"),
            }
        }
    }

    /// Takes a completion: flies on, or ends the part, and with the last part the flight.
    fn land(&mut self, place: u32, part: usize, result: i32) {
        let flight = self.flights[place as usize].as_mut().expect("a completion belongs to a flight under way");
        let answer = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        let ended = match &mut flight.parts[part] {
            Some(transfer) => match transfer.answer(answer) {
                Step::Again => return self.fly(place, part),
                Step::Done(ended) => ended,
            },
            None => answer,
        };
        flight.left -= 1;
        flight.result = match (mem::replace(&mut flight.result, Ok(0)), ended) {
            (Ok(before), Ok(bytes)) => Ok(before + bytes),
            (Err(first), _) | (Ok(_), Err(first)) => Err(first),
        };
        if flight.left == 0 {
            let flight = self.flights[place as usize].take().expect("seen just above");
            self.free.push(place);
            flight.request.answer(flight.result);
        }
    }

    /// The place of a file in the kernel's table; takes one on first use.
    fn fixed_file(&mut self, file: &OpenFile) -> Option<u32> {
        if let Some(at) = self.files.get(&file.id) {
            return Some(*at);
        }
        if file.is_removed() {
            return None;
        }
        let at = self.free_files.pop()?;
        match self.ring.submitter().register_files_update(at, &[file.file.as_raw_fd()]) {
            Ok(_) => {
                self.files.insert(file.id, at);
                Some(at)
            }
            Err(error) => {
                tracing::warn!(file = %file.id, %error, "a file stays unregistered");
                self.free_files.push(at);
                None
            }
        }
    }

    /// The registration that a buffer names, if it really lies inside.
    fn fixed_buf(&self, buf: &IoBuf) -> Option<u16> {
        let index = buf.fixed()?.index;
        let region = self.regions.get(usize::from(index))?.as_ref()?;
        region.contains(buf).then_some(index)
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Register { index, region, done } => {
                let _ = done.send(self.register(index, region));
            }
            Order::Unregister { index, done } => {
                if let Some(region) = self.regions.get_mut(usize::from(index)).and_then(Option::take) {
                    let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
                    // SAFETY: an empty entry names no memory.
                    let emptied =
                        unsafe { self.ring.submitter().register_buffers_update(index.into(), &[nothing], None) };
                    if let Err(error) = emptied {
                        tracing::warn!(index, %error, "a registered buffer cannot be given back; its memory stays pinned");
                    }
                    drop(region);
                }
                let _ = done.send(());
            }
            Order::Forget { file, done } => {
                if let Some(at) = self.files.remove(&file) {
                    match self.ring.submitter().register_files_update(at, &[-1]) {
                        Ok(_) => self.free_files.push(at),
                        Err(error) => tracing::warn!(%file, %error, "a removed file keeps its place and its bytes"),
                    }
                }
                let _ = done.send(());
            }
        }
    }

    fn register(&mut self, index: u16, region: Region) -> io::Result<()> {
        let Some(place) = self.regions.get_mut(usize::from(index)) else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "there is no table of registered buffers"));
        };
        let memory = libc::iovec { iov_base: region.as_ptr().cast(), iov_len: region.len() };
        // SAFETY: valid memory as long as `region` holds its owner, which is until the entry is emptied (`Unregister`),
        // replaced (below, after the kernel has taken the new one), or the ring is gone.
        unsafe { self.ring.submitter().register_buffers_update(index.into(), &[memory], None)? };
        *place = Some(region);
        Ok(())
    }
}

impl Disk for UringDisk {
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
        if let Some(file) = self.shared.folder.remove(name)? {
            self.order(|done| Order::Forget { file, done });
        }
        Ok(())
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
        EngineInfo {
            name: "uring",
            direct: self.shared.folder.is_direct(),
            queue_depth: self.shared.options.queue_depth,
            notes: self.notes.clone(),
        }
    }

    fn register(&self, index: u16, region: Region) -> Registration {
        assert!(index < MAX_REGISTERED_BUFFERS, "{index} lies outside of the table of registered buffers");
        let bytes = region.len();
        let done = if bytes > MAX_REGISTERED_BYTES {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "larger than 1 GiB"))
        } else {
            self.order(|done| Order::Register { index, region, done }).unwrap_or_else(|| Err(shut_down()))
        };
        match done {
            Ok(()) => Registration::Fixed,
            Err(error) => {
                self.said_unregistered.call_once(|| {
                    tracing::warn!(index, bytes, %error, "memory stays unregistered with io_uring (raise RLIMIT_MEMLOCK); it costs CPU, nothing else");
                });
                Registration::Unregistered
            }
        }
    }

    fn unregister(&self, index: u16) {
        self.order(|done| Order::Unregister { index, done });
    }
}
