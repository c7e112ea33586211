//! Where blocks lie in this process: buffers, raw addresses, regions; one by one or by block ids.

use std::ptr::NonNull;

use kvkeep_client as sdk;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::error::{raise, wrong, wrong_with};
use crate::held::Held;
use crate::region::{self, Region};

/// Some memory of this process.
pub(crate) struct Memory {
    region: sdk::Region,
    /// Where in it.
    start: usize,
    bytes: usize,
    readonly: bool,
}

impl Memory {
    pub(crate) fn of_region(region: &sdk::Region) -> Self {
        Self { region: region.clone(), start: 0, bytes: region.len(), readonly: false }
    }

    fn of(said: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(region) = said.cast::<Region>() {
            return Ok(Self::of_region(&region.get().region));
        }
        if let Ok(raw) = said.cast::<PyTuple>() {
            let (address, bytes): (usize, usize) = raw.extract()?;
            return match NonNull::new(address as *mut u8) {
                Some(base) if bytes > 0 => Ok(Self::at(base, bytes, false, Box::new(()))),
                _ => Err(wrong("a raw place is an address that is not 0, and at least one byte")),
            };
        }
        let held = Held::of(said)?;
        let (base, bytes) = held.memory().ok_or_else(|| PyBufferError::new_err("the buffer has no memory"))?;
        let readonly = held.is_readonly();
        Ok(Self::at(base, bytes, readonly, Box::new(held)))
    }

    /// Memory of a region where it lies in one, else lent.
    fn at(base: NonNull<u8>, bytes: usize, readonly: bool, keeper: sdk::Keeper) -> Self {
        if let Some((region, start)) = region::at(base.addr().get(), bytes) {
            return Self { region, start, bytes, readonly };
        }
        // SAFETY: a buffer that `keeper` holds, or memory of which the caller promised (`Places` in the package's text) that it
        // stays until the call has ended. What is read-only is never given to a get: see `Place::sdk`.
        let region = unsafe { sdk::Region::lent(base, bytes, keeper) };
        Self { region, start: 0, bytes, readonly }
    }

    /// `count` runs of `bytes` (`None`: to the end), `stride` apart, from `offset`.
    pub(crate) fn place(&self, offset: usize, bytes: Option<usize>, stride: usize, count: u32) -> PyResult<Place> {
        let bytes = bytes.unwrap_or_else(|| self.bytes.saturating_sub(offset));
        let stride = if count == 1 { bytes } else { stride };
        let end = stride
            .checked_mul(count.saturating_sub(1) as usize)
            .and_then(|end| end.checked_add(offset))
            .and_then(|end| end.checked_add(bytes));
        if bytes == 0 || count == 0 || stride < bytes || end.is_none_or(|end| end > self.bytes) {
            return Err(wrong_with("a place has runs that do not overlap and lie in its memory", "bytes", self.bytes));
        }
        // SAFETY: whose memory it is, and when, is what the package's text says and its callers promise.
        let place = unsafe { self.region.strided(self.start + offset, bytes, stride, count) };
        Ok(Place { place, readonly: self.readonly })
    }
}

/// Where one block lies.
#[pyclass(frozen, module = "kvkeep")]
#[derive(Clone)]
pub(crate) struct Place {
    place: sdk::Place,
    readonly: bool,
}

impl Place {
    fn of(said: &Bound<'_, PyAny>) -> PyResult<Self> {
        match said.cast::<Self>() {
            Ok(place) => Ok(place.get().clone()),
            Err(_) => Memory::of(said)?.place(0, None, 0, 1),
        }
    }

    /// # Errors
    /// `BufferError` where it shall be filled and is read-only.
    fn sdk(self, filled: bool) -> PyResult<sdk::Place> {
        if filled && self.readonly {
            return Err(PyBufferError::new_err("a get fills its places: this one is read-only"));
        }
        Ok(self.place)
    }
}

#[pymethods]
impl Place {
    #[new]
    #[pyo3(signature = (memory, offset = 0, bytes = None, *, stride = 0, count = 1))]
    fn new(
        memory: &Bound<'_, PyAny>,
        offset: usize,
        bytes: Option<usize>,
        stride: usize,
        count: u32,
    ) -> PyResult<Self> {
        Memory::of(memory)?.place(offset, bytes, stride, count)
    }

    fn __add__(&self, other: &Self) -> Self {
        Self { place: self.place.clone().and(other.place.clone()), readonly: self.readonly || other.readonly }
    }

    fn __len__(&self) -> usize {
        self.place.len() as usize
    }

    #[getter]
    fn is_shared(&self) -> bool {
        self.place.is_shared()
    }

    fn __repr__(&self) -> String {
        let shared = if self.place.is_shared() { "shared" } else { "not shared" };
        format!("Place({} bytes, {shared})", self.place.len())
    }
}

/// Where an engine's blocks lie.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Geometry {
    geometry: sdk::Geometry,
    readonly: bool,
    shared: bool,
}

#[pymethods]
impl Geometry {
    #[new]
    fn new(areas: Vec<(Bound<'_, PyAny>, u64)>, blocks: u32) -> PyResult<Self> {
        let (mut readonly, mut shared, mut of) = (false, true, Vec::with_capacity(areas.len()));
        for (place, stride) in areas {
            // Block 0; the rest of the memory it is in is known to its region.
            let place = Place::of(&place)?;
            readonly |= place.readonly;
            shared &= place.place.is_shared();
            of.push((place.place, stride));
        }
        // SAFETY: as in `Memory::place`.
        let geometry = unsafe { sdk::Geometry::new(of, blocks) }.map_err(|e| raise(&e))?;
        Ok(Self { geometry, readonly, shared })
    }

    #[getter]
    fn blocks(&self) -> u32 {
        self.geometry.blocks()
    }

    #[getter]
    fn block_bytes(&self) -> u64 {
        self.geometry.block_bytes()
    }

    #[getter]
    fn is_shared(&self) -> bool {
        self.shared
    }

    fn place(&self, block: u32) -> PyResult<Place> {
        let place = self.geometry.place(block).map_err(|e| raise(&e))?;
        Ok(Place { place, readonly: self.readonly })
    }

    fn __repr__(&self) -> String {
        format!("Geometry({} blocks of {} bytes)", self.blocks(), self.block_bytes())
    }
}

/// Block ids: ints, or a buffer of them.
fn block_ids(said: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if said.is_instance_of::<PyList>() || said.is_instance_of::<PyTuple>() {
        return said.extract();
    }
    ids(said)
}

/// Numbers of 32 bits: a sequence of ints, or a buffer of whole numbers of 4 or 8 bytes.
pub(crate) fn ids(said: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let py = said.py();
    let Ok(buffer) = PyUntypedBuffer::get(said) else { return said.extract() };
    let wrong = || PyTypeError::new_err("a buffer of ids holds int32 or int64, none below 0 or above 32 bits");
    fn narrow<T: TryInto<u32>>(ids: Vec<T>) -> Option<Vec<u32>> {
        ids.into_iter().map(|id| id.try_into().ok()).collect()
    }
    let ids = if let Ok(of) = buffer.as_typed::<i32>() {
        narrow(of.to_vec(py)?)
    } else if let Ok(of) = buffer.as_typed::<i64>() {
        narrow(of.to_vec(py)?)
    } else if let Ok(of) = buffer.as_typed::<u32>() {
        Some(of.to_vec(py)?)
    } else if let Ok(of) = buffer.as_typed::<u64>() {
        narrow(of.to_vec(py)?)
    } else {
        None
    };
    buffer.release(py);
    ids.ok_or_else(wrong)
}

/// One place per item. `filled`: they will be written.
pub(crate) fn places(
    said: &Bound<'_, PyAny>,
    blocks: Option<&Bound<'_, PyAny>>,
    items: usize,
    filled: bool,
) -> PyResult<Vec<sdk::Place>> {
    let places = match (said.cast::<Geometry>(), blocks) {
        (Ok(geometry), Some(blocks)) => {
            let geometry = geometry.get();
            if filled && geometry.readonly {
                return Err(PyBufferError::new_err("a get fills its places: this geometry is read-only"));
            }
            geometry.geometry.places(&block_ids(blocks)?).map_err(|e| raise(&e))?
        }
        (Ok(_), None) => return Err(wrong("a geometry takes block ids: one per item")),
        (Err(_), Some(_)) => return Err(wrong("block ids go with a geometry")),
        (Err(_), None) if said.is_instance_of::<PyBytes>() => {
            return Err(wrong("places are a sequence with one place per item"));
        }
        (Err(_), None) => {
            let mut places = Vec::with_capacity(items);
            let _once = region::Looking::begin();
            for place in said.try_iter()? {
                places.push(Place::of(&place?)?.sdk(filled)?);
            }
            places
        }
    };
    if places.len() != items {
        return Err(wrong_with("there is one place (or block id) per item", "places", places.len()));
    }
    Ok(places)
}
