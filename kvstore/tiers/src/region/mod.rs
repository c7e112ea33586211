//! Memory of clients that the server reads and writes: what a client registered by sending a descriptor.
//!
//! A descriptor that cannot shrink (a memfd with F_SEAL_SHRINK) is mapped, and reached by copies around the cache and by
//! the disk's DMA. Any other may be truncated at any moment, and a copy into a page that is gone is a SIGBUS: such a region
//! is reached by `pread` and `pwrite`, which answer with an error instead.
//!
//! The bytes of a region are the client's, who may change them whenever it likes. Nothing here believes that two looks at
//! them see the same: what is stored is copied first, and the copy is summed.

mod memory;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use kvkeep_core::call_word::CALL_WORD_BYTES;
use kvkeep_core::checksum::{RunningSums, SUM_CHUNK_BYTES};
use kvkeep_core::{Error, ErrorKind, Result};
use rustix::fs::{FileType, OFlags, SealFlags};

use memory::Mapping;
pub use memory::Word;

use crate::io::buf::{IO_ALIGN, IoBuf};

/// File systems whose pages come out of a pool that may be empty: a fault there is a SIGBUS, whatever the seals say.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Runs of one length in a region: `count` of `bytes`, `stride` apart, from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runs {
    /// First byte, from the region's start.
    pub offset: u64,
    /// Bytes of one run.
    pub bytes: u64,
    /// From the start of one run to the next, bytes.
    pub stride: u64,
    /// How many, at least 1.
    pub count: u32,
}

impl Runs {
    /// Where the runs start and how long they are.
    pub fn each(self) -> impl Iterator<Item = (u64, u64)> {
        (0..u64::from(self.count)).map(move |n| (self.offset + n * self.stride, self.bytes))
    }
}

/// One registered region. Unmapped and closed with its last holder.
#[derive(Debug)]
pub struct Region {
    file: File,
    /// Of the region in the file.
    start: u64,
    len: u64,
    mapping: Option<Arc<Mapping>>,
}

impl Region {
    /// Takes a descriptor as a region of `length` bytes from `offset`. `trusted`: the client could not be kept from harming
    /// this process anyway (same user).
    ///
    /// # Errors
    /// `InvalidArgument` where it is no file, not open for both reading and writing, shorter than it is said to be, sealed
    /// against writing, or where its pages are not allocated; `Full` where the memory cannot be mapped.
    pub fn new(descriptor: OwnedFd, offset: u64, length: u64, trusted: bool) -> Result<Self> {
        let bad = |what: &'static str| Error::new(ErrorKind::InvalidArgument, what);
        let end = offset.checked_add(length).filter(|_| length > 0);
        let end = end.ok_or_else(|| bad("a region has at least one byte").with("length", length))?;
        let stat = rustix::fs::fstat(&descriptor)
            .map_err(|e| bad("the descriptor says nothing of itself").with("cause", e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::RegularFile {
            return Err(
                bad("a region is a memfd or a file; this descriptor is neither").with("kind", format!("{kind:?}"))
            );
        }
        let flags = rustix::fs::fcntl_getfl(&descriptor)
            .map_err(|e| bad("the descriptor's flags cannot be read").with("cause", e))?;
        if flags & OFlags::RWMODE != OFlags::RDWR || flags.intersects(OFlags::APPEND | OFlags::PATH) {
            return Err(bad("a region's descriptor is open for reading and writing, and not for appending"));
        }
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if end > bytes {
            return Err(bad("the file is shorter than the region").with("file_bytes", bytes).with("region_end", end));
        }
        let seals = rustix::fs::fcntl_get_seals(&descriptor).unwrap_or(SealFlags::empty());
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(bad("the descriptor is sealed against writing"));
        }
        let huge = rustix::fs::fstatfs(&descriptor).is_ok_and(|s| s.f_type == HUGETLBFS_MAGIC);
        if huge && !trusted {
            return Err(bad("huge pages of a pool cannot be reached safely for this user: use a plain memfd"));
        }
        let file = File::from(descriptor);
        let mapping = if seals.contains(SealFlags::SHRINK) {
            // Pages that are not there would be allocated here, and charged to the server.
            if !huge && u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) < length {
                return Err(bad(
                    "the region's memory is not allocated: fallocate it, or write to it, before registering it",
                ));
            }
            if !offset.is_multiple_of(IO_ALIGN as u64) {
                return Err(bad("a mapped region starts at a page of 4 KiB").with("offset", offset));
            }
            let map = Mapping::new(&file, offset, length).map_err(|e| {
                Error::new(ErrorKind::Full, "the region's memory cannot be mapped")
                    .with("bytes", length)
                    .with("cause", e)
            })?;
            Some(Arc::new(map))
        } else {
            None
        };
        Ok(Self { file, start: offset, len: length, mapping })
    }

    /// Whether it is mapped; else it is reached by system calls, which may wait for a disk.
    pub fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes the runs have together.
    ///
    /// # Errors
    /// `InvalidArgument` where one of them lies outside, or they overlap each other.
    pub fn check(&self, runs: Runs) -> Result<u64> {
        let total = runs.bytes.checked_mul(u64::from(runs.count)).filter(|n| *n > 0);
        let last = (runs.stride).checked_mul(u64::from(runs.count.saturating_sub(1)));
        let end = last.and_then(|l| runs.offset.checked_add(l)).and_then(|l| l.checked_add(runs.bytes));
        let apart = runs.count == 1 || runs.stride >= runs.bytes;
        match (total, end) {
            (Some(total), Some(end)) if end <= self.len && apart => Ok(total),
            _ => Err(Error::new(ErrorKind::InvalidArgument, "runs overlap, are empty, or lie outside of their region")
                .with("runs", format!("{runs:?}"))
                .with("region_bytes", self.len)),
        }
    }

    fn inside(&self, offset: u64, len: usize) -> Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::new(ErrorKind::InvalidArgument, "a copy outside of its region")
                .with("offset", offset)
                .with("bytes", len)),
        }
    }

    /// Copies bytes into the region.
    ///
    /// # Errors
    /// `InvalidArgument` where they lie outside; `Io` where the file has become too short, or its device fails.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.inside(offset, from.len())?;
        match &self.mapping {
            Some(mapping) => mapping.write(offset as usize, from),
            None => {
                // A file that the client has truncated would grow again under a pwrite.
                self.still_whole()?;
                self.file.write_all_at(from, self.start + offset).map_err(|e| gone(&e))?;
            }
        }
        Ok(())
    }

    /// Copies bytes out of the region, and sums what was copied: never what the client may have made of it since.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn read(&self, offset: u64, to: &mut [u8], sums: &mut RunningSums) -> Result<()> {
        self.inside(offset, to.len())?;
        match &self.mapping {
            Some(mapping) => mapping.read(offset as usize, to, sums),
            None => {
                // In pieces that are still in the cache when they are summed.
                let mut at = self.start + offset;
                for to in to.chunks_mut(SUM_CHUNK_BYTES) {
                    self.file.read_exact_at(to, at).map_err(|e| gone(&e))?;
                    sums.add(to);
                    at += to.len() as u64;
                }
            }
        }
        Ok(())
    }

    fn still_whole(&self) -> Result<()> {
        let bytes = rustix::fs::fstat(self.file.as_fd()).map(|s| u64::try_from(s.st_size).unwrap_or(0)).unwrap_or(0);
        if bytes < self.start + self.len {
            return Err(gone(&io::Error::from(io::ErrorKind::UnexpectedEof)).with("file_bytes", bytes));
        }
        Ok(())
    }

    /// A call word in the region.
    ///
    /// # Errors
    /// `InvalidArgument` where it does not lie in it, is not aligned, or the region is not mapped.
    pub fn word(&self, offset: u64) -> Result<Word> {
        self.inside(offset, CALL_WORD_BYTES)?;
        let mapping = self.mapping.as_ref().filter(|_| offset.is_multiple_of(CALL_WORD_BYTES as u64));
        mapping.map(|m| Word::new(m, offset as usize)).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, "a call word is 4-byte aligned in a mapped region")
                .with("offset", offset)
        })
    }

    /// The run as the destination of a device read: `None` where the region is not mapped or the run is not whole pages.
    pub fn io_buf(&self, offset: u64, len: usize) -> Option<IoBuf> {
        self.inside(offset, len).ok()?;
        let whole = offset.is_multiple_of(IO_ALIGN as u64) && len.is_multiple_of(IO_ALIGN) && len > 0;
        self.mapping.as_ref().filter(|_| whole).map(|m| Mapping::io_buf(m, offset as usize, len))
    }
}

fn gone(error: &io::Error) -> Error {
    Error::new(ErrorKind::Io, "the region's file is shorter than it was, or its device fails").with("cause", error)
}

#[cfg(test)]
mod tests;
