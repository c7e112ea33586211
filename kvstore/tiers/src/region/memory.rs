//! The mapping of a client's memory, and every line of `unsafe` that it needs.
//!
//! What makes it sound: the file cannot shrink (F_SEAL_SHRINK, which cannot be taken back, is checked before), so no access
//! inside of the mapping faults; no reference to its bytes is ever made, only copies through bare pointers, atomic words,
//! and [`IoBuf`]s that the kernel fills. What the other process writes meanwhile changes which bytes are copied and nothing
//! else.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use kvkeep_core::call_word::SharedWord;
use kvkeep_core::checksum::RunningSums;

use crate::copy::{copy_cold, copy_cold_raw};
use crate::io::buf::IoBuf;

/// Page-table entries are made in steps: the kernel holds the lock of the address space meanwhile.
const POPULATE_STEP_BYTES: usize = 64 << 20;

/// Bytes that go through the cache at a time on their way out of a region.
const PAGE_BYTES: usize = 4096;

/// Aligned for the copies.
#[repr(align(64))]
struct Page([u8; PAGE_BYTES]);

/// A mapped region. Unmapped when the last holder is gone.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain shared memory, reached only as the module's text says.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` and has the kernel make every page-table entry now: a fault per page
    /// costs more than the copy of the page.
    pub(super) fn new(file: &File, offset: u64, length: u64) -> io::Result<Self> {
        let len = usize::try_from(length).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a fresh mapping at an address the kernel chooses touches nobody's memory.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(at.cast::<u8>()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        let mapping = Self { base, len };
        let mut at = 0;
        while at < len {
            let step = POPULATE_STEP_BYTES.min(len - at);
            // SAFETY: a part of our own mapping; populating keeps what the pages hold and answers with an error, not a
            // signal, where memory is short.
            let rc = unsafe { libc::madvise(mapping.base.as_ptr().add(at).cast(), step, libc::MADV_POPULATE_WRITE) };
            match if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) } {
                Ok(()) => at += step,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A kernel before 5.14 does not know the advice; the faults then come one by one.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(mapping)
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{offset}+{len} lies outside of {}",
            self.len
        );
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// # Panics
    /// If the range lies outside.
    pub(super) fn write(&self, offset: usize, from: &[u8]) {
        // SAFETY: `at` checks the range; `from` is memory of this process, which the mapping is not; nobody has a reference
        // into the mapping.
        unsafe { copy_cold_raw(self.at(offset, from.len()), from.as_ptr(), from.len()) }
    }

    /// Copies and sums in one pass over the client's memory: by way of a page of this process, which nobody changes between
    /// the sum and the copy, and which never leaves the cache. (Summing where the bytes landed reads them from memory once
    /// more: 235 us instead of 188 us for 1 MiB here.)
    ///
    /// # Panics
    /// If the range lies outside.
    pub(super) fn read(&self, offset: usize, to: &mut [u8], sums: &mut RunningSums) {
        let mut page = Page([0; PAGE_BYTES]);
        for (n, to) in to.chunks_mut(PAGE_BYTES).enumerate() {
            let page = &mut page.0[..to.len()];
            // SAFETY: `at` checks the range; `page` is memory of this thread, which the mapping is not; nobody has a reference
            // into the mapping.
            unsafe {
                std::ptr::copy_nonoverlapping(self.at(offset + n * PAGE_BYTES, to.len()), page.as_mut_ptr(), to.len())
            };
            sums.add(page);
            copy_cold(to, page);
        }
    }

    /// # Panics
    /// If the range lies outside.
    pub(super) fn io_buf(this: &Arc<Self>, offset: usize, len: usize) -> IoBuf {
        let owner: Arc<dyn Any + Send + Sync> = Arc::<Self>::clone(this);
        // SAFETY: mapped as long as `owner` lives. That nobody else touches the bytes cannot be promised of memory that the
        // client shares: it may change under a read of it. What is read is then summed and compared, and a difference is a
        // miss for that same client; nothing else depends on it.
        unsafe { IoBuf::new(this.at(offset, len), len, None, owner) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this address and length; every holder of a pointer into it held the Arc.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A 32-bit word of a region, shared with the client.
#[derive(Clone, Debug)]
pub struct Word {
    mapping: Arc<Mapping>,
    offset: usize,
}

impl Word {
    pub(super) fn new(mapping: &Arc<Mapping>, offset: usize) -> Self {
        Self { mapping: Arc::clone(mapping), offset }
    }

    fn atomic(&self) -> &AtomicU32 {
        // SAFETY: in the mapping (`at` asserts it), 4-byte aligned (`Region::word` checked it, and mappings are
        // page-aligned), mapped as long as `self` lives, and nobody reaches these bytes but by atomic operations of this
        // process and whatever the client does, which an atomic may race with.
        unsafe { AtomicU32::from_ptr(self.mapping.at(self.offset, 4).cast()) }
    }
}

impl SharedWord for Word {
    fn add(&self, n: u32) -> u32 {
        self.atomic().add(n)
    }

    fn set(&self, bits: u32) -> u32 {
        self.atomic().set(bits)
    }

    fn get(&self) -> u32 {
        self.atomic().get()
    }
}
