//! The memory of a cell: one tmpfs file that all sides map, as the arena is one.
//!
//! Why one: how the pages of a buffer lie in physical memory decides how many segments a request has, and on a virtual
//! disk that is a factor of two in throughput, drawn by chance at each allocation. Sharing the very pages takes that
//! chance out of the comparison.

use std::any::Any;
use std::ffi::c_void;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvkeep_tiers::io::IoBuf;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A tmpfs file, every page of it allocated. Removed when dropped.
pub(super) struct Memory {
    path: PathBuf,
    file: File,
    len: usize,
}

impl Memory {
    pub(super) fn new(folder: &Path, len: usize) -> anyhow::Result<Self> {
        let path = folder.join(format!("kvkeep-device-bench-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        let memory = Self { path, file, len };
        fallocate(&memory.file, FallocateFlags::empty(), 0, len as u64)?;
        Ok(memory)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// All of it, mapped and faulted in. Taken once per run.
    pub(super) fn map(&self) -> anyhow::Result<IoBuf> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let ptr =
            unsafe { mmap(std::ptr::null_mut(), self.len, ProtFlags::READ | ProtFlags::WRITE, flags, &self.file, 0)? };
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(Mapping { at: ptr.expose_provenance(), len: self.len });
        // SAFETY: mapped as long as the owner lives; the sides run one after the other, so nobody else touches the file.
        Ok(unsafe { IoBuf::new(ptr.cast(), self.len, None, owner) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Mapping {
    at: usize,
    len: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let at: *mut c_void = std::ptr::with_exposed_provenance_mut(self.at);
        // SAFETY: our own mapping; whoever borrowed from it held this owner.
        let _ = unsafe { munmap(at, self.len) };
    }
}
