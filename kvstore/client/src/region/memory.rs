//! Shared memory of this process, and every line of `unsafe` that it needs.
//!
//! What makes it sound: a mapping lives as long as its [`Memory`]; its file cannot shrink under it (sealed where we made it,
//! by the promise of whoever brought it otherwise); memory that somebody else has lives as long as its keeper, by the promise
//! of whoever lent it; ranges are checked before a pointer is made; and no reference to the bytes is handed out, but for
//! [`Memory::slice_mut`], whose caller promises to be alone.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::process;

/// The kernel populates in steps: it holds the lock of the address space meanwhile.
const POPULATE_STEP_BYTES: usize = 64 << 20;

/// Keeps memory of somebody else where it is, as long as it lives. Dropped by whichever thread is the last to need the memory.
pub type Keeper = Box<dyn Any + Send + Sync>;

/// Memory that blocks go to and come from.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
    /// The process whose mapping it is, where its children do not have it.
    only_of: Option<u64>,
}

/// Where the memory comes from.
#[derive(Debug)]
enum Backing {
    /// Our mapping of a file, from `start` on.
    File { descriptor: OwnedFd, start: u64 },
    /// Memory of this process, lent.
    Lent { _keeper: Keeper },
}

// SAFETY: shared memory reached only as the module's text says.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Fresh memory that another process can be given: a memfd that can neither shrink nor grow, every page there.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("kvkeep-region", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
        Self::map(fd, 0, bytes, true)
    }

    /// Maps a part of a file. The file must stay as long as it is: one that is truncated later ends this process by SIGBUS
    /// when the missing bytes are touched.
    pub(crate) fn map(descriptor: OwnedFd, start: u64, bytes: usize, writable: bool) -> io::Result<Self> {
        let size = rustix::fs::fstat(&descriptor)?.st_size;
        let end = start.checked_add(bytes as u64).filter(|_| bytes > 0);
        if end.is_none_or(|end| i128::from(size) < i128::from(end)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the file is shorter than the memory, or that is empty",
            ));
        }
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address the kernel chooses touches nobody's memory; the range lies in the file.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, &descriptor, start)? };
        let base = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        let memory = Self { base, len: bytes, backing: Backing::File { descriptor, start }, only_of: None };
        let advice = if writable { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        let mut at = 0;
        while at < bytes {
            let step = POPULATE_STEP_BYTES.min(bytes - at);
            // SAFETY: a part of our own mapping; populating keeps what the pages hold. Without it (an old kernel, a file whose
            // memory is short) pages come as they are touched.
            if unsafe { rustix::mm::madvise(memory.base.as_ptr().add(at).cast(), step, advice) }.is_err() {
                break;
            }
            at += step;
        }
        Ok(memory)
    }

    /// Memory of this process. A forked child has its own copy of it.
    ///
    /// # Safety
    /// It is there, readable and writable, as long as the keeper lives, and nobody has references to it but by the rules of
    /// [`crate::region`].
    pub(crate) unsafe fn lent(base: NonNull<u8>, len: usize, keeper: Keeper) -> Self {
        Self { base, len, backing: Backing::Lent { _keeper: keeper }, only_of: None }
    }

    /// Keeps the mapping out of child processes: one that inherits it could read it behind the server's back.
    pub(crate) fn kept_from_children(mut self) -> io::Result<Self> {
        // SAFETY: advice about our own mapping that changes nothing in this process.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxDontFork)? };
        self.only_of = Some(process::this());
        Ok(self)
    }

    /// Whether this process has the mapping. A forked child lacks one that is kept from children.
    pub(crate) fn is_here(&self) -> bool {
        self.only_of.is_none_or(|owner| owner == process::this())
    }

    /// In a forked child that lacks the mapping: puts pages of zeroes where it was, read-only, for the rest of the child's life.
    /// What still points there reads those instead of ending the process. Elsewhere, and a second time, it does nothing.
    pub(crate) fn stand_in(&self) {
        if self.is_here() {
            return;
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: the kernel maps these pages only where nothing is mapped (or, before 4.17, at an address of its choice), so
        // nobody's memory is touched.
        let _ = unsafe { rustix::mm::mmap_anonymous(self.base.as_ptr().cast(), self.len, ProtFlags::READ, flags) };
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// What another process is given, and where in it this begins; `None`: nobody else can have it.
    pub(crate) fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        match &self.backing {
            Backing::File { descriptor, start } => Some((descriptor.as_fd(), *start)),
            Backing::Lent { .. } => None,
        }
    }

    /// # Panics
    /// If the range lies outside.
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
    pub(crate) fn copy_out(&self, offset: usize, to: &mut [u8]) {
        // SAFETY: `at` checks the range; `to` is memory of the caller's, borrowed mutably, which the mapping is not. Another
        // process may write the source meanwhile; then some bytes are copied, and the caller checks which.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset, to.len()), to.as_mut_ptr(), to.len()) }
    }

    /// # Panics
    /// If the range lies outside.
    pub(crate) fn copy_in(&self, offset: usize, from: &[u8]) {
        // SAFETY: as in `copy_out`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at(offset, from.len()), from.len()) }
    }

    /// A 32-bit word.
    ///
    /// # Panics
    /// If it lies outside or is not aligned.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "word {offset} is not aligned");
        // SAFETY: inside (`at`), aligned (mappings are page-aligned), mapped as long as `self` is borrowed, and reached by
        // atomic operations only: words are apart from whatever else lies in their mapping.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// The bytes of a range, to be filled.
    ///
    /// # Safety
    /// As long as the answer lives nobody else, in this process or another, reads or writes the range.
    ///
    /// # Panics
    /// If the range lies outside.
    #[expect(clippy::mut_from_ref, reason = "the caller promises to be alone with the range")]
    pub(crate) unsafe fn slice_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        // SAFETY: inside (`at`) and mapped as long as `self` is borrowed; alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset, len), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.is_here() || self.file().is_none() {
            return; // a forked child: what lies at these addresses there, if anything, is somebody else's; or it was only lent
        }
        // SAFETY: mapped by `map` with this address and length, in this process, and everything that points into it borrows
        // `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Opens a file for memory that a server may write.
pub(crate) fn open(path: &std::path::Path) -> io::Result<OwnedFd> {
    File::options().read(true).write(true).open(path).map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_does_not_unmap_what_only_its_parent_has() {
        let is_mapped = |at: *const u8| {
            let start = format!("{:x}-", at.addr());
            std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| line.starts_with(&start))
        };
        let mut memory = Memory::new(4096).unwrap().kept_from_children().unwrap();
        assert!(memory.is_here());
        // As a child finds it, with something else at the address.
        memory.only_of = Some(process::this() + 1);
        assert!(!memory.is_here());
        let at = memory.as_ptr().cast_const();
        drop(memory);
        assert!(is_mapped(at));
    }
}
