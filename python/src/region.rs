//! Memory shared with the server, found by its addresses.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvkeep_client as sdk;
use pyo3::exceptions::PyOSError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::error::raise;
use crate::mapped::MappedBlock;
use crate::place::{Memory, Place};

/// Where regions lie in this process, by their first address. Taken by threads that have the GIL only.
static KNOWN: Mutex<BTreeMap<usize, Known>> = Mutex::new(BTreeMap::new());

struct Known {
    region: sdk::Region,
    number: u64,
}

fn known() -> MutexGuard<'static, BTreeMap<usize, Known>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The region in which all of this memory lies, and where in it.
pub(crate) fn at(address: usize, bytes: usize) -> Option<(sdk::Region, usize)> {
    let known = known();
    let (first, found) = known.range(..=address).next_back()?;
    let offset = address - first;
    (offset.checked_add(bytes)? <= found.region.len()).then(|| (found.region.clone(), offset))
}

/// Memory shared with the server.
#[pyclass(frozen, weakref, module = "kvkeep")]
pub(crate) struct Region {
    pub(crate) region: sdk::Region,
    number: u64,
    also_at: Option<usize>,
}

impl Region {
    fn of(region: sdk::Region, also_at: Option<usize>) -> Self {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        for address in std::iter::once(region.as_ptr().addr()).chain(also_at) {
            known().insert(address, Known { region: region.clone(), number });
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
            Ok(sdk::Region::from_descriptor(descriptor, offset, bytes))
        });
        let region = region.map_err(|e: std::io::Error| PyOSError::new_err(e))?;
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
