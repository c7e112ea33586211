//! Memory shared with the server, found by its addresses.
//!
//! An engine's own mapping of a region (`also_at`) is the engine's to unmap, and anything may lie there afterwards. So each
//! look-up by such an address asks the kernel whether the file is still there: else the server would read and fill the file,
//! and the engine some other memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvkeep_client as sdk;
use kvkeep_client::region::maps::{FileId, Maps};
use pyo3::exceptions::PyOSError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::error::{raise, wrong_with};
use crate::mapped::MappedBlock;
use crate::place::{Memory, Place};

/// Where regions lie in this process, by their first address. Taken by threads that have the GIL only.
static KNOWN: Mutex<BTreeMap<usize, Known>> = Mutex::new(BTreeMap::new());

struct Known {
    region: sdk::Region,
    number: u64,
    /// The mapping here is the engine's: of this file, from this offset. `None`: it is the region's own.
    of: Option<(FileId, u64)>,
}

fn known() -> MutexGuard<'static, BTreeMap<usize, Known>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The region in which all of this memory lies, and where in it.
pub(crate) fn at(address: usize, bytes: usize) -> Option<(sdk::Region, usize)> {
    let known = known();
    let (first, found) = known.range(..=address).next_back()?;
    let offset = address - first;
    if offset.checked_add(bytes)? > found.region.len() {
        return None;
    }
    if let Some((file, start)) = &found.of {
        let there = Looking::maps(|maps| maps.file_at(address, bytes))?;
        if there != (file.clone(), start + offset as u64) {
            return None;
        }
    }
    Some((found.region.clone(), offset))
}

thread_local! {
    /// What was read once for all look-ups of one call. The outer one: there is such a call.
    static MAPS: RefCell<Option<Option<Maps>>> = const { RefCell::new(None) };
}

/// As long as one lives, look-ups of this thread read the mappings of the process once.
pub(crate) struct Looking(());

impl Looking {
    pub(crate) fn begin() -> Self {
        MAPS.set(Some(None));
        Self(())
    }

    /// `None` as well where the kernel does not tell.
    fn maps<T>(look: impl Fn(&Maps) -> Option<T>) -> Option<T> {
        MAPS.with_borrow_mut(|read| match read {
            None => look(&Maps::read().ok()?),
            Some(Some(maps)) => look(maps),
            Some(read) => look(read.insert(Maps::read().ok()?)),
        })
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        MAPS.set(None);
    }
}

/// Memory shared with the server.
#[pyclass(frozen, weakref, module = "kvkeep")]
pub(crate) struct Region {
    pub(crate) region: sdk::Region,
    number: u64,
    also_at: Option<usize>,
}

impl Region {
    /// `also_at`: the engine's own mapping, and what file it is of.
    fn of(region: sdk::Region, also_at: Option<(usize, (FileId, u64))>) -> Self {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let own = (region.as_ptr().addr(), None);
        let theirs = also_at.map(|(address, of)| (address, Some(of)));
        let also_at = theirs.as_ref().map(|(address, _)| *address);
        for (address, of) in std::iter::once(own).chain(theirs) {
            known().insert(address, Known { region: region.clone(), number, of });
        }
        Self { region, number, also_at }
    }

    fn by_descriptor(
        py: Python<'_>,
        descriptor: OwnedFd,
        offset: u64,
        bytes: Option<usize>,
        also_at: Option<usize>,
    ) -> PyResult<Self> {
        let region = py.detach(|| {
            let to_end = || -> std::io::Result<usize> {
                let size = std::fs::File::from(descriptor.try_clone()?).metadata()?.len();
                Ok(size.saturating_sub(offset) as usize)
            };
            let bytes = bytes.map_or_else(to_end, Ok)?;
            let inode = std::fs::File::from(descriptor.try_clone()?).metadata()?.ino();
            let there = match also_at {
                Some(address) => Some((address, Maps::read()?.file_at(address, bytes))),
                None => None,
            };
            Ok((sdk::Region::from_descriptor(descriptor, offset, bytes), inode, there))
        });
        let (region, inode, there) = region.map_err(|e: std::io::Error| PyOSError::new_err(e))?;
        let also_at = match there {
            None => None,
            Some((address, Some((file, start)))) if file.inode() == inode && start == offset => {
                Some((address, (file, start)))
            }
            Some((address, _)) => {
                let what = "also_at is where a shared mapping of the same bytes of the file begins, and there is none";
                return Err(wrong_with(what, "also_at", address));
            }
        };
        Ok(Self::of(region.map_err(|e| raise(&e))?, also_at))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let mut known = known();
        for address in std::iter::once(self.region.as_ptr().addr()).chain(self.also_at) {
            if known.get(&address).is_some_and(|k| k.number == self.number) {
                known.remove(&address);
            }
        }
    }
}

#[pymethods]
impl Region {
    #[new]
    fn new(py: Python<'_>, bytes: usize) -> PyResult<Self> {
        let region = py.detach(|| sdk::Region::new(bytes)).map_err(|e| raise(&e))?;
        Ok(Self::of(region, None))
    }

    #[staticmethod]
    #[pyo3(signature = (path, offset = 0, bytes = None, *, also_at = None))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        offset: u64,
        bytes: Option<usize>,
        also_at: Option<usize>,
    ) -> PyResult<Self> {
        let file = std::fs::File::options().read(true).write(true).open(path)?;
        Self::by_descriptor(py, file.into(), offset, bytes, also_at)
    }

    #[staticmethod]
    #[pyo3(signature = (fd, offset = 0, bytes = None, *, also_at = None))]
    fn from_fd(py: Python<'_>, fd: i32, offset: u64, bytes: Option<usize>, also_at: Option<usize>) -> PyResult<Self> {
        if fd < 0 {
            return Err(pyo3::exceptions::PyValueError::new_err("a descriptor is 0 or more"));
        }
        // SAFETY: not -1, and the caller's for as long as this call lasts; where it is not open, duplicating it fails.
        let descriptor = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        Self::by_descriptor(py, descriptor, offset, bytes, also_at)
    }

    fn __len__(&self) -> usize {
        self.region.len()
    }

    #[getter]
    fn address(&self) -> usize {
        self.region.as_ptr().addr()
    }

    #[pyo3(signature = (offset, bytes, *, stride = 0, count = 1))]
    fn place(&self, offset: usize, bytes: usize, stride: usize, count: u32) -> PyResult<Place> {
        Memory::of_region(&self.region).place(offset, Some(bytes), stride, count)
    }

    /// # Safety
    /// Called by Python, with a `view` to be filled.
    unsafe fn __getbuffer__(slf: PyRef<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (base, len) = (slf.region.as_ptr(), slf.region.len());
        // SAFETY: Python's own `view`; the memory stays mapped as long as this object, to which the view keeps a reference. What
        // is read through it while a call fills it is garbage, as the package's text says.
        let failed = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), base.cast(), len as isize, 0, flags) } != 0;
        if failed { Err(PyErr::fetch(slf.py())) } else { Ok(()) }
    }

    fn __repr__(&self) -> String {
        format!("Region({} bytes at {:#x})", self.region.len(), self.address())
    }
}

/// The buffer of a block in the server's memory; what else it has is in `mapped`.
#[pymethods]
impl MappedBlock {
    /// # Safety
    /// Called by Python, with a `view` to be filled.
    unsafe fn __getbuffer__(slf: PyRef<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let block = slf.readable()?;
        let (base, len) = (block.as_ptr().cast_mut(), block.len());
        // SAFETY: Python's own `view`, which is read-only (1). The mapping, which is read-only too, lives as long as this object, to
        // which the view keeps a reference; in a forked child, which lacks it, `mapped::after_fork` has put zeroes there before
        // anybody can look. The server may write the bytes when the lease has ended: whoever reads asks `is_still_there`.
        let failed = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), base.cast(), len as isize, 1, flags) } != 0;
        if failed {
            return Err(PyErr::fetch(slf.py()));
        }
        slf.view_begins();
        Ok(())
    }

    /// # Safety
    /// Called by Python, for a view that was filled above.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.view_ends();
    }
}
