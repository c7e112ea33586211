//! [`SimDisk`]: the unkind disk. **A test seam**: it keeps files in memory, holds what was not flushed apart from what
//! was, loses a seeded part of it when the power is [cut](SimDisk::cut), and fails on request or at seeded random.
//!
//! Here: the disk and its life. `faults`: what can go wrong, and when. `file`: the bytes of one file,
//! durable and not.
//!
//! No thread and no clock: operations make progress when futures are polled, so a run on a single-threaded runtime is a
//! function of its seeds. A dropped future leaves its operation in the disk, where it ends later, as with the kernel.

mod faults;
mod file;

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use kvkeep_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::buf::{IO_ALIGN, IoBuf};
use super::disk::{Disk, DiskOptions, EngineInfo, FileId, Flush, Io, Io2, Space, check_aligned, not_open, shut_down};
use super::file::{check_name, check_size};
use super::transfer::{Direction, Transfer};
use faults::{Attempt, Faults};
pub use faults::{Dice, Fault, FaultRates, OpCounts, SimOp};
use file::SimFile;

/// A disk in memory that can be unkind. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    depth: Arc<Semaphore>,
    options: DiskOptions,
    state: Arc<Mutex<State>>,
}

struct State {
    total: u64,
    next_id: u32,
    files: BTreeMap<String, SimFile>,
    faults: Faults,
    parked: Vec<Parked>,
    held: Vec<SimOp>,
    off: bool,
}

/// An operation that the device has accepted and not yet ended.
struct Parked {
    op: SimOp,
    file: FileId,
    offset: u64,
    bufs: Vec<IoBuf>,
    /// Ticks until it is served.
    ticks: u32,
    /// Where the file stood when the operation began; what a flush covers.
    begun: u64,
    done: oneshot::Sender<(Vec<IoBuf>, io::Result<usize>)>,
    permit: OwnedSemaphorePermit,
}

/// What happens to bytes that were written and not flushed.
enum End {
    /// The process is gone, the device has its bytes.
    Kill,
    /// The device loses or tears them.
    Cut,
}

impl SimDisk {
    /// An empty disk of `total` bytes. `seed` decides everything random about it.
    pub fn new(total: u64, seed: u64) -> Self {
        Self::with_options(total, seed, DiskOptions::default())
    }

    /// An empty disk with a queue depth of its own.
    pub fn with_options(total: u64, seed: u64, options: DiskOptions) -> Self {
        Self::of(total, seed, options, BTreeMap::new())
    }

    fn of(total: u64, seed: u64, options: DiskOptions, files: BTreeMap<String, SimFile>) -> Self {
        Self {
            depth: Arc::new(Semaphore::new(options.queue_depth as usize)),
            options,
            state: Arc::new(Mutex::new(State {
                total,
                next_id: 0,
                files,
                faults: Faults::new(seed),
                parked: Vec::new(),
                held: Vec::new(),
                off: false,
            })),
        }
    }

    /// Lets `fault` befall the attempt at `on` that comes after `skip` more of them. An operation that is interrupted or
    /// cut short makes more than one attempt.
    pub fn inject(&self, on: SimOp, skip: u64, fault: Fault) {
        self.state.lock().faults.inject(on, skip, fault);
    }

    /// Faults at random from now on.
    pub fn set_rates(&self, rates: FaultRates) {
        self.state.lock().faults.rates = rates;
    }

    /// Attempts so far, by what was attempted.
    pub fn counts(&self) -> OpCounts {
        self.state.lock().faults.counts
    }

    /// From now on operations of these kinds are accepted and none ends, until [`SimDisk::release`].
    pub fn hold(&self, on: &[SimOp]) {
        self.state.lock().held = on.to_vec();
    }

    /// Operations that are accepted and have not ended.
    pub fn held(&self) -> usize {
        self.state.lock().parked.len()
    }

    /// Ends what was held, in a seeded order, and holds no more.
    pub fn release(&self) {
        let mut state = self.state.lock();
        state.held.clear();
        while !state.parked.is_empty() {
            let count = state.parked.len() as u64;
            let at = state.faults.dice.below(count) as usize;
            let parked = state.parked.swap_remove(at);
            state.serve(parked);
        }
    }

    /// Power loss. Returns the disk as it is found afterwards: flushed bytes exactly, and of the others, page by page, an
    /// old version, a newer one, or a page torn between two at a sector of 512 bytes, as `seed` decides. Writes in flight
    /// count as not flushed. This disk, and every clone of it, answers nothing but EIO from now on.
    #[must_use]
    pub fn cut(&self, seed: u64) -> Self {
        self.end(&End::Cut, seed)
    }

    /// The process dies, the device stays. Returns the disk as the next process finds it: whole writes are there, though
    /// still not flushed; of writes in flight any pages, as `seed` decides. This disk answers nothing but EIO from now on.
    #[must_use]
    pub fn kill(&self, seed: u64) -> Self {
        self.end(&End::Kill, seed)
    }

    fn end(&self, end: &End, seed: u64) -> Self {
        let mut state = self.state.lock();
        let mut dice = Dice::new(seed);
        state.off = true;
        self.depth.close();
        for parked in std::mem::take(&mut state.parked) {
            if parked.op == SimOp::Write
                && let Some(file) = state.file(parked.file)
            {
                let bytes: Vec<u8> = parked.bufs.iter().flat_map(|buf| buf.as_slice().iter().copied()).collect();
                for (n, page) in bytes.chunks(IO_ALIGN).enumerate() {
                    let at = parked.offset + (n * IO_ALIGN) as u64;
                    if at < file.len() && dice.one_in(2) {
                        file.write(at, page);
                    }
                }
            }
            parked.answer(Err(power_is_off()));
        }
        let mut files = std::mem::take(&mut state.files);
        if matches!(end, End::Cut) {
            files.values_mut().for_each(|file| file.cut(&mut dice));
        }
        files.values_mut().for_each(|file| file.id = None);
        Self::of(state.total, dice.next_u64(), self.options, files)
    }

    /// While nothing has it open: cuts a file to `bytes` bytes.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn truncate(&self, name: &str, bytes: u64) {
        self.surgery(name, |file| file.truncate(bytes));
    }

    /// Flips one bit of a file, durably.
    ///
    /// # Panics
    /// If there is no such file or bit.
    pub fn flip_bit(&self, name: &str, bit: u64) {
        self.surgery(name, |file| file.flip_durably(bit));
    }

    /// Replaces bytes of a file, durably.
    ///
    /// # Panics
    /// If there is no such file or range.
    pub fn overwrite(&self, name: &str, offset: u64, bytes: &[u8]) {
        self.surgery(name, |file| file.overwrite_durably(offset, bytes));
    }

    /// Takes a file away without a word to who has it open.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn lose(&self, name: &str) {
        self.state.lock().files.remove(name).expect("the test names a file that exists");
    }

    /// What a read of the whole file would return.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn contents(&self, name: &str) -> Vec<u8> {
        self.surgery(name, |file| {
            let mut bytes = vec![0; file.len() as usize];
            file.read(0, &mut bytes);
            bytes
        })
    }

    fn surgery<T>(&self, name: &str, cut: impl FnOnce(&mut SimFile) -> T) -> T {
        cut(self.state.lock().files.get_mut(name).expect("the test names a file that exists"))
    }

    async fn perform(self, op: SimOp, file: FileId, offset: u64, bufs: Vec<IoBuf>) -> (Vec<IoBuf>, io::Result<usize>) {
        if let Err(e) = check_aligned(offset, &bufs.iter().collect::<Vec<_>>()) {
            return (bufs, Err(e));
        }
        let Ok(permit) = Arc::clone(&self.depth).acquire_owned().await else {
            return (bufs, Err(if self.state.lock().off { power_is_off() } else { shut_down() }));
        };
        let (done, mut answer) = oneshot::channel();
        {
            let mut state = self.state.lock();
            let Some(begun) = state.file(file).map(|f| f.clock()) else {
                return (bufs, Err(not_open(file)));
            };
            let ticks = state.faults.delay();
            state.parked.push(Parked { op, file, offset, bufs, ticks, begun, done, permit });
        }
        poll_fn(|cx| self.poll_answer(op, &mut answer, cx)).await
    }

    /// Every poll of anyone's operation is a tick for all of them.
    fn poll_answer<T>(&self, op: SimOp, answer: &mut oneshot::Receiver<T>, cx: &mut Context<'_>) -> Poll<T> {
        self.state.lock().tick();
        match Pin::new(answer).poll(cx) {
            Poll::Ready(answered) => Poll::Ready(answered.expect("the disk answers every operation it accepted")),
            Poll::Pending => {
                if !self.state.lock().held.contains(&op) {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
        }
    }
}

impl Parked {
    fn answer(self, result: io::Result<usize>) {
        drop(self.permit);
        let _ = self.done.send((self.bufs, result));
    }
}

impl State {
    fn file(&mut self, id: FileId) -> Option<&mut SimFile> {
        self.files.values_mut().find(|file| file.id == Some(id))
    }

    fn tick(&mut self) {
        let Self { parked, held, .. } = self;
        let due: Vec<Parked> = parked.extract_if(.., |p| !held.contains(&p.op) && p.ticks == 0).collect();
        for late in parked.iter_mut().filter(|p| !held.contains(&p.op)) {
            late.ticks -= 1;
        }
        for parked in due {
            self.serve(parked);
        }
    }

    fn serve(&mut self, mut parked: Parked) {
        let Self { files, faults, .. } = self;
        let Some(file) = files.values_mut().find(|file| file.id == Some(parked.file)) else {
            // Removed meanwhile: the operation goes to bytes that nobody can name any more.
            let len = parked.bufs.iter().map(IoBuf::len).sum();
            return parked.answer(Ok(len));
        };
        let result = match parked.op {
            SimOp::Flush => serve_flush(file, faults, parked.begun),
            SimOp::Read => serve_read(file, faults, parked.offset, &mut parked.bufs),
            SimOp::Write => serve_write(file, faults, parked.offset, &parked.bufs),
            SimOp::Create | SimOp::Remove => unreachable!("they are not parked"),
        };
        parked.answer(result);
    }

    fn space(&self) -> Space {
        let used: u64 = self.files.values().map(SimFile::len).sum();
        Space { free: self.total.saturating_sub(used), total: self.total }
    }

    fn check_on(&self) -> Result<()> {
        if self.off {
            return Err(Error::new(ErrorKind::Io, "the power of this simulated disk is off"));
        }
        Ok(())
    }
}

fn serve_flush(file: &mut SimFile, faults: &mut Faults, begun: u64) -> io::Result<usize> {
    match faults.attempt(SimOp::Flush, 0) {
        Attempt::Fails(error) if error.kind() != io::ErrorKind::Interrupted => {
            file.flush_failed(begun);
            Err(error)
        }
        Attempt::Lost => Ok(0),
        _ => {
            file.flush(begun);
            Ok(0)
        }
    }
}

fn serve_read(file: &SimFile, faults: &mut Faults, offset: u64, bufs: &mut [IoBuf]) -> io::Result<usize> {
    let [buf] = bufs else { unreachable!("a read has one buffer") };
    Transfer::new(Direction::Read, buf.len()).run(|resume| {
        let at = offset + resume as u64;
        let into = &mut buf.as_mut_slice()[resume..];
        match faults.attempt(SimOp::Read, into.len()) {
            Attempt::Fails(error) => Err(error),
            Attempt::Short(bytes) => Ok(file.read(at, &mut into[..bytes])),
            Attempt::Misdirected => Ok(file.read(faults.elsewhere(at, into.len(), file.len()), into)),
            Attempt::Flipped(bit) => {
                let read = file.read(at, into);
                if read > 0 {
                    into[(bit / 8) as usize % read] ^= 1 << (bit % 8);
                }
                Ok(read)
            }
            Attempt::Whole | Attempt::Lost => Ok(file.read(at, into)),
        }
    })
}

fn serve_write(file: &mut SimFile, faults: &mut Faults, offset: u64, bufs: &[IoBuf]) -> io::Result<usize> {
    let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.as_slice().iter().copied()).collect();
    if offset + bytes.len() as u64 > file.len() {
        // Segments are allocated whole; a write behind the end is a bug of the caller that a real disk would hide.
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    Transfer::new(Direction::Write, bytes.len()).run(|resume| {
        let (at, from) = (offset + resume as u64, &bytes[resume..]);
        match faults.attempt(SimOp::Write, from.len()) {
            Attempt::Fails(error) => return Err(error),
            Attempt::Short(short) => {
                file.write(at, &from[..short]);
                return Ok(short);
            }
            Attempt::Misdirected => file.write(faults.elsewhere(at, from.len(), file.len()), from),
            Attempt::Flipped(bit) => {
                let mut flipped = from.to_vec();
                let len = flipped.len();
                flipped[(bit / 8) as usize % len] ^= 1 << (bit % 8);
                file.write(at, &flipped);
            }
            Attempt::Lost => {}
            Attempt::Whole => file.write(at, from),
        }
        Ok(from.len())
    })
}

fn power_is_off() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Disk for SimDisk {
    fn create(&self, name: &str, bytes: u64) -> Result<FileId> {
        check_name(name)?;
        check_size(bytes)?;
        let mut state = self.state.lock();
        state.check_on()?;
        if state.files.contains_key(name) {
            return Err(Error::new(ErrorKind::Conflict, "cannot create a segment file: it exists").with("file", name));
        }
        if bytes > state.space().free {
            return Err(Error::new(ErrorKind::Full, "cannot allocate a segment file").with("bytes", bytes));
        }
        state.faults.attempt(SimOp::Create, 0).into_result()?;
        let id = state.new_id();
        state.files.insert(name.to_owned(), SimFile::new(id, bytes));
        Ok(id)
    }

    fn open(&self, name: &str) -> Result<(FileId, u64)> {
        check_name(name)?;
        let mut state = self.state.lock();
        state.check_on()?;
        let fresh = state.new_id();
        let Some(file) = state.files.get_mut(name) else {
            return Err(Error::new(ErrorKind::Io, "cannot open a segment file: no such file").with("file", name));
        };
        Ok((*file.id.get_or_insert(fresh), file.len()))
    }

    fn list(&self) -> Result<Vec<(String, u64)>> {
        let state = self.state.lock();
        state.check_on()?;
        Ok(state.files.iter().map(|(name, file)| (name.clone(), file.len())).collect())
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_name(name)?;
        let mut state = self.state.lock();
        state.check_on()?;
        state.faults.attempt(SimOp::Remove, 0).into_result()?;
        match state.files.remove(name) {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::Io, "cannot remove a segment file: no such file").with("file", name)),
        }
    }

    fn read(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        let performed = self.clone().perform(SimOp::Read, file, offset, vec![buf]);
        Box::pin(async move {
            let (mut bufs, result) = performed.await;
            (bufs.remove(0), result)
        })
    }

    fn write(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        let performed = self.clone().perform(SimOp::Write, file, offset, vec![buf]);
        Box::pin(async move {
            let (mut bufs, result) = performed.await;
            (bufs.remove(0), result)
        })
    }

    fn write2(&self, file: FileId, offset: u64, head: IoBuf, body: IoBuf) -> Io2 {
        let performed = self.clone().perform(SimOp::Write, file, offset, vec![head, body]);
        Box::pin(async move {
            let (mut bufs, result) = performed.await;
            let body = bufs.remove(1);
            (bufs.remove(0), body, result.map(|_| ()))
        })
    }

    fn flush(&self, file: FileId) -> Flush {
        let performed = self.clone().perform(SimOp::Flush, file, 0, Vec::new());
        Box::pin(async move { performed.await.1.map(|_| ()) })
    }

    fn space(&self) -> Result<Space> {
        let state = self.state.lock();
        state.check_on()?;
        Ok(state.space())
    }

    fn engine(&self) -> EngineInfo {
        EngineInfo { name: "sim", direct: true, queue_depth: self.options.queue_depth, notes: Vec::new() }
    }
}

impl State {
    fn new_id(&mut self) -> FileId {
        let id = FileId::nth(self.next_id).expect("a test opens far fewer than 2^32 files");
        self.next_id += 1;
        id
    }
}
