//! The arena's memory, and every line of `unsafe` that it needs.
//!
//! ```text
//! Mapping ── one file, mapped shared for as long as anybody holds the Arc
//!    └─ Taken ── the only right to a run of its 4 KiB units (a bitmap refuses to give a unit out twice)
//!          └─ Loan ── a Taken and what happens when it ends
//!                ├─ Writing ── one holder, may write; refuses to touch the bytes while an IoBuf of it is out
//!                └─ Reading ── any number of holders, none may write
//! ```
//! Safe code outside of this module cannot make two holders of one unit, whatever the allocator does: it would get `None`.

use std::any::Any;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use kvkeep_core::slot_entry;

use crate::io::buf::{FixedBuf, IO_ALIGN, IoBuf, Region};

/// Bytes of a unit: what a slot is rounded to, and what O_DIRECT wants.
pub const UNIT_BYTES: usize = IO_ALIGN;

/// Memory is populated in steps: the kernel holds the lock of the address space meanwhile, and other threads' `mmap` waits.
const POPULATE_STEP_BYTES: usize = 16 << 20;

/// One arena file, mapped. Unmapped when the last holder is gone.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// One bit per unit: somebody holds a [`Taken`] over it.
    taken: Box<[AtomicU64]>,
    /// Index of the file, and of its buffer in the I/O engine's table.
    index: u16,
    /// Whether the engine has said that it registered this very mapping.
    registered: AtomicBool,
    /// Whatever must outlive the memory: the lock of the folder.
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is reached only through `Taken`s, which never overlap; the other fields are themselves Send.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` alone gives no access to the bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Where it is, to be registered with an engine.
    pub(super) fn region(self: &Arc<Self>) -> Region {
        let owner: Arc<dyn Any + Send + Sync> = Arc::<Self>::clone(self);
        // SAFETY: mapped as long as the mapping, which `owner` holds, lives.
        unsafe { Region::new(self.base.as_ptr(), self.len, owner) }
    }

    /// Maps `file`, whose length is `len`, and has the kernel give it every page now: a page that is missing later would be a
    /// SIGBUS in the middle of a copy. With `huge`, huge pages are asked for first: pages that exist stay small.
    pub(super) fn new(
        file: &File,
        len: usize,
        index: u16,
        huge: bool,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<Arc<Self>> {
        // SAFETY: a fresh mapping at an address the kernel chooses touches nobody's memory.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(at.cast::<u8>()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        let words = (len / UNIT_BYTES).div_ceil(64);
        let mapping = Self {
            base,
            len,
            taken: (0..words).map(|_| AtomicU64::new(0)).collect(),
            index,
            registered: AtomicBool::new(false),
            _keep: keep,
        };
        if huge {
            // SAFETY: advice about our own mapping; a refusal leaves small pages, which `pages` then reports.
            unsafe { libc::madvise(at, len, libc::MADV_HUGEPAGE) };
        }
        mapping.populate(file)?;
        Ok(Arc::new(mapping))
    }

    fn populate(&self, file: &File) -> io::Result<()> {
        let mut at = 0;
        while at < self.len {
            let step = POPULATE_STEP_BYTES.min(self.len - at);
            // SAFETY: a part of our own mapping; populating keeps what the pages hold, and where memory is short it returns
            // an error and no signal.
            let rc = unsafe { libc::madvise(self.base.as_ptr().add(at).cast(), step, libc::MADV_POPULATE_WRITE) };
            if rc == 0 {
                at += step;
                continue;
            }
            match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                // A kernel before 5.14 does not know the advice; fallocate gives the pages, if not their table entries.
                e if e.raw_os_error() == Some(libc::EINVAL) => return allocate(file, self.len),
                // What a full tmpfs looks like from here.
                e if e.raw_os_error() == Some(libc::EFAULT) => {
                    return Err(io::Error::new(io::ErrorKind::StorageFull, "the file system has no memory left"));
                }
                e => return Err(e),
            }
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn index(&self) -> u16 {
        self.index
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// From now on buffers of this mapping name its index to the engine, or no longer do.
    pub(super) fn set_registered(&self, yes: bool) {
        self.registered.store(yes, Ordering::Release);
    }

    /// The right to the units `from..from + units`; `None` where somebody holds one of them or they lie outside.
    pub(super) fn take(self: &Arc<Self>, from: u32, units: u32) -> Option<Taken> {
        let range = from as usize..from as usize + units as usize;
        if range.end > self.len / UNIT_BYTES {
            return None;
        }
        for (word, mask) in words(range.clone()) {
            let before = self.taken[word].fetch_or(mask, Ordering::Acquire);
            if before & mask != 0 {
                self.taken[word].fetch_and(!(mask & !before), Ordering::Release);
                for (back, mask) in words(range).take_while(|(w, _)| *w < word) {
                    self.taken[back].fetch_and(!mask, Ordering::Release);
                }
                return None;
            }
        }
        // Processes that mapped the file may still look at what lay here before.
        slot_entry::reused();
        Some(Taken { mapping: Arc::clone(self), from, units })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this address and length, and with the last Arc every `Taken` is gone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Words of the bitmap that a run of units touches, with the bits in each.
fn words(units: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (units.start / 64..units.end.div_ceil(64)).map(move |word| {
        let low = units.start.max(word * 64) - word * 64;
        let high = units.end.min(word * 64 + 64) - word * 64;
        (word, (u64::MAX >> (64 - (high - low))) << low)
    })
}

/// The only right to a run of units. Ends with the value.
pub(super) struct Taken {
    mapping: Arc<Mapping>,
    from: u32,
    units: u32,
}

impl Taken {
    fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `take` checked that the run lies inside the mapping.
        unsafe { self.mapping.base.as_ptr().add(self.from as usize * UNIT_BYTES) }
    }

    pub(super) fn len(&self) -> usize {
        self.units as usize * UNIT_BYTES
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped and populated as long as `mapping` lives; the bitmap makes `self` the only holder of the units, and
        // `&self` keeps `bytes_mut` away. Other processes are kept out by the folder's mode 0700 and its lock.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len()) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len()) }
    }

    /// Stores `word` at byte `at` after everything written before: the step that makes a record count.
    ///
    /// # Panics
    /// If `at` is no multiple of 4 inside the run.
    pub(super) fn store_last(&mut self, at: usize, word: u32) {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len(), "word {at} of {} bytes", self.len());
        // SAFETY: in bounds and aligned (units are page-aligned), and `&mut self` makes it the only access from this
        // process; what needs the order is the memory that a later process finds.
        let word_at = unsafe { AtomicU32::from_ptr(self.as_ptr().add(at).cast()) };
        fence(Ordering::SeqCst);
        word_at.store(word.to_le(), Ordering::Release);
    }

    fn fixed(&self) -> Option<FixedBuf> {
        self.mapping.registered.load(Ordering::Acquire).then_some(FixedBuf { index: self.mapping.index })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        for (word, mask) in words(self.from as usize..(self.from + self.units) as usize) {
            self.mapping.taken[word].fetch_and(!mask, Ordering::Release);
        }
    }
}

/// A run of units in somebody's hands, and what to do when the last hand lets go.
pub(super) struct Loan<E> {
    // Dropped in this order: the units are free again before `end` tells the allocator.
    taken: Taken,
    pub(super) end: E,
}

/// The units before they are published: one holder, who writes.
pub(super) struct Writing<E>(Arc<Loan<E>>);

impl<E: Send + Sync + 'static> Writing<E> {
    pub(super) fn new(taken: Taken, end: E) -> Self {
        Self(Arc::new(Loan { taken, end }))
    }

    pub(super) fn end(&self) -> &E {
        &self.0.end
    }

    /// Whether no [`IoBuf`] of these units is alive. None can appear while the answer is borrowed from: `io_buf` takes `&mut`.
    fn sole(&self) -> bool {
        let sole = Arc::strong_count(&self.0) == 1;
        // What an engine wrote before it dropped its buffer is visible from here on.
        fence(Ordering::Acquire);
        sole
    }

    /// The bytes; `None` while an `IoBuf` is out, for the kernel may be writing them.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        self.sole().then(|| self.0.taken.bytes())
    }

    /// The bytes to write; `None` while an `IoBuf` is out.
    pub(super) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        Arc::get_mut(&mut self.0).map(|loan| loan.taken.bytes_mut())
    }

    /// Lends all the bytes to an engine, as source or destination. The units stay taken until the engine lets go.
    pub(super) fn io_buf(&mut self) -> IoBuf {
        let owner: Arc<dyn Any + Send + Sync> = self.0.clone();
        let taken = &self.0.taken;
        // SAFETY: valid as long as `owner`, which holds the `Taken`, lives; and while it lives `sole` is false, so that
        // `bytes`, `bytes_mut` and `finish` of this value refuse.
        unsafe { IoBuf::new(taken.as_ptr(), taken.len(), taken.fixed(), owner) }
    }

    /// Ends the writing; gives the value back while an `IoBuf` is out.
    pub(super) fn finish(self) -> Result<Reading<E>, Self> {
        if self.sole() { Ok(Reading(self.0)) } else { Err(self) }
    }
}

/// The units after they were published: shared, and nobody writes.
pub(super) struct Reading<E>(Arc<Loan<E>>);

impl<E> Clone for Reading<E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<E: Send + Sync + 'static> Reading<E> {
    /// For units that were found as they are (adoption).
    pub(super) fn new(taken: Taken, end: E) -> Self {
        Self(Arc::new(Loan { taken, end }))
    }

    pub(super) fn end(&self) -> &E {
        &self.0.end
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.0.taken.bytes()
    }

    /// All the bytes, padding included, as the source of a write.
    pub(super) fn io_buf(&self) -> IoBuf {
        let owner: Arc<dyn Any + Send + Sync> = self.0.clone();
        let taken = &self.0.taken;
        // SAFETY: valid as long as `owner` lives. Nobody writes: no `Writing` of these units is left and none can be made
        // before the last `Reading` and `IoBuf` are gone; using this buffer as a destination would break what `IoBuf` asks
        // of its users.
        unsafe { IoBuf::new(taken.as_ptr(), taken.len(), taken.fixed(), owner) }
    }
}

fn allocate(file: &File, len: usize) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    // SAFETY: a system call on a descriptor we own.
    let rc = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether `dir` lies on tmpfs.
pub(super) fn is_on_tmpfs(dir: &Path) -> io::Result<bool> {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let dir = File::open(dir)?;
    // SAFETY: `statfs` is plain numbers, for which zeroes are valid.
    let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a struct of ours.
    if unsafe { libc::fstatfs(dir.as_raw_fd(), &raw mut answer) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let kind = (answer.f_type as u64) & 0xffff_ffff;
    Ok(kind == TMPFS_MAGIC)
}

/// The user this process acts as.
pub(super) fn effective_uid() -> u32 {
    // SAFETY: cannot fail and touches no memory.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(units: usize) -> Arc<Mapping> {
        let file = tempfile::tempfile().unwrap();
        file.set_len((units * UNIT_BYTES) as u64).unwrap();
        Mapping::new(&file, units * UNIT_BYTES, 3, false, Arc::new(())).unwrap()
    }

    #[test]
    fn a_unit_is_held_once_at_a_time() {
        let m = mapping(300);
        let a = m.take(60, 130).unwrap();
        assert!(m.take(0, 61).is_none());
        assert!(m.take(189, 5).is_none());
        assert!(m.take(299, 2).is_none());
        let b = m.take(0, 60).unwrap();
        let c = m.take(190, 110).unwrap();
        drop(a);
        assert_eq!(m.take(60, 130).unwrap().len(), 130 * UNIT_BYTES);
        drop((b, c));
        assert!(m.take(0, 300).is_some());
    }

    #[test]
    fn bytes_lent_to_an_engine_are_out_of_reach() {
        let m = mapping(4);
        let mut w = Writing::new(m.take(1, 2).unwrap(), ());
        w.bytes_mut().unwrap().fill(7);
        let mut lent = w.io_buf();
        assert!(w.bytes().is_none() && w.bytes_mut().is_none());
        lent.as_mut_slice()[0] = 9;
        let w = w.finish().err().unwrap();
        drop(lent);
        let r = w.finish().ok().unwrap();
        assert_eq!(r.bytes()[..2], [9, 7]);
        let lent = r.io_buf();
        drop(r);
        assert!(m.take(1, 1).is_none(), "an engine still reads it");
        drop(lent);
        assert!(m.take(1, 1).is_some());
    }
}
