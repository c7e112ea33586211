//! [`Ring`]: the ring, its tables, and what flies on it. Lives on one thread, and all of its `unsafe` is here.
//!
//! Who owns what: a [`Flight`] holds the request, and through it buffers and file, from before the kernel hears of it
//! until its last completion has been reaped. [`Ring::fly`] is the only place that makes entries for it, [`Ring::land`]
//! the only one that lets go of it. That is the proof behind each `unsafe` block.

use std::collections::HashMap;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::{Asleep, MAX_REGISTERED_FILES, Order, Shared};
use crate::io::buf::{IoBuf, Region};
use crate::io::disk::{FileId, MAX_REGISTERED_BUFFERS};
use crate::io::file::OpenFile;
use crate::io::request::{Bufs, Kind, Request};
use crate::io::transfer::{Direction, Step, Transfer};

/// Bytes asked for in one entry at most; the rest of a longer operation follows as after a short count. The kernel itself
/// stops a page short of 2 GiB. Blocks are not split further: whole entries of 4 MiB keep up with fio.
const MAX_ENTRY_BYTES: usize = 1 << 30;

/// Entries that one operation can have in flight: header and payload.
const MAX_PARTS: usize = 2;

/// Completions taken from the ring at once.
const REAP: usize = 64;

/// Pause after the kernel has said that it has no memory for a submission.
const OUT_OF_MEMORY_PAUSE: Duration = Duration::from_millis(1);

/// `user_data` of the poll on the bell; flights have smaller ones.
const BELL: u64 = u64::MAX;

/// The ring and what flies on it. Lives on its own thread.
pub(super) struct Ring {
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
    /// One per buffer; a flush has one over no bytes, for the sake of EINTR.
    parts: [Option<Transfer>; MAX_PARTS],
    /// Parts that have not ended.
    left: u32,
    /// What the parts that have ended came to.
    result: io::Result<usize>,
}

impl Ring {
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<(Self, Vec<String>)> {
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
    pub(super) fn run(&mut self) {
        let mut requests = Vec::new();
        loop {
            let nothing_flies = self.nothing_flies();
            let (orders, stopping, idle) = {
                let mut inbox = self.shared.inbox.lock();
                // Told under the lock: whoever posts after this look sees where to wake us.
                while nothing_flies && inbox.is_empty() && !inbox.stopping {
                    inbox.asleep = Asleep::AtHome;
                    self.shared.home.wait(&mut inbox);
                }
                mem::swap(&mut requests, &mut inbox.requests);
                let orders = mem::take(&mut inbox.orders);
                let idle = requests.is_empty() && orders.is_empty();
                inbox.asleep = if idle { Asleep::InRing } else { Asleep::Nowhere };
                (orders, inbox.stopping, idle)
            };
            orders.into_iter().for_each(|order| self.obey(order));
            requests.drain(..).for_each(|request| self.take_off(request));
            if stopping && idle && nothing_flies {
                return;
            }
            // Entries that were just made are submitted by the wait that follows once the inbox is found empty, so that
            // requests which came together go to the kernel together.
            if !idle {
                continue;
            }
            self.poll_bell();
            self.enter(1);
            self.reap();
        }
    }

    fn nothing_flies(&self) -> bool {
        self.free.len() == self.flights.len()
    }

    /// Submits what was made and sleeps until `want` operations, or bells, have completed.
    fn enter(&self, want: usize) {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // What was submitted stays so, the rest goes with the next call: interrupted, or short of room for completions
            // until we have reaped some, or of memory.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {}
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::sleep(OUT_OF_MEMORY_PAUSE),
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
            (Kind::Flush, _) => [Some(Transfer::new(Direction::Write, 0)), None],
            (Kind::Move(way), Bufs::Two(head, body)) => {
                [Some(Transfer::new(*way, head.len())), Some(Transfer::new(*way, body.len()))]
            }
            (Kind::Move(way), bufs) => [Some(Transfer::new(*way, bufs.len())), None],
        };
        let left = parts.iter().flatten().count() as u32;
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
        let transfer = flight.parts[part].as_ref().expect("a flight flies in its parts");
        let entry = match (request.kind, &request.bufs) {
            (Kind::Flush, _) => {
                let flags = FsyncFlags::DATASYNC;
                match fixed_file {
                    Some(at) => opcode::Fsync::new(Fixed(at)).flags(flags).build(),
                    None => opcode::Fsync::new(Fd(file.file.as_raw_fd())).flags(flags).build(),
                }
            }
            (Kind::Move(_), bufs) => {
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
            self.enter(0);
        }
    }

    /// Takes a completion: flies on, or ends the part, and with the last part the flight.
    fn land(&mut self, place: u32, part: usize, result: i32) {
        let flight = self.flights[place as usize].as_mut().expect("a completion belongs to a flight under way");
        let answer = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        let transfer = flight.parts[part].as_mut().expect("a completion belongs to a part of its flight");
        let ended = match transfer.answer(answer) {
            Step::Again => return self.fly(place, part),
            Step::Done(ended) => ended,
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

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.nothing_flies() {
            // Only a panic leads here. The kernel may still write into buffers that would now be let go of and used for
            // something else: better no process than one with foreign bytes in its memory.
            tracing::error!("the io_uring thread failed with operations in flight; the process ends");
            std::process::abort();
        }
    }
}
