//! Objects whose buffers a call uses. They are held from the call to its end, and let go by a thread that has the GIL: the SDK's
//! own thread, which may be the last to need the memory, must never wait for Python.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;

/// One object's buffer. Contiguous, of at least one byte.
pub(crate) struct Held(Option<Box<Node>>);

struct Node {
    buffer: PyUntypedBuffer,
    next: *mut Node,
}

// SAFETY: a `PyUntypedBuffer` may be sent; `next` is only followed by whoever has taken the whole list.
unsafe impl Send for Held {}
// SAFETY: nothing is changed through a shared reference.
unsafe impl Sync for Held {}

/// Buffers that nobody uses any more and that wait for the GIL. A list without a lock: a fork finds it whole.
static LET_GO: AtomicPtr<Node> = AtomicPtr::new(std::ptr::null_mut());

impl Held {
    /// # Errors
    /// `BufferError` or `TypeError` where the object has no contiguous buffer.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        // Some (arrays of ctypes) leave out what a memoryview of them fills in.
        let buffer =
            PyUntypedBuffer::get(object).or_else(|_| PyUntypedBuffer::get(PyMemoryView::from(object)?.as_any()))?;
        if !buffer.is_c_contiguous() || buffer.len_bytes() == 0 {
            return Err(PyBufferError::new_err(
                "a place is contiguous memory of at least one byte; use Place for strides",
            ));
        }
        Ok(Self(Some(Box::new(Node { buffer, next: std::ptr::null_mut() }))))
    }

    fn buffer(&self) -> Option<&PyUntypedBuffer> {
        self.0.as_ref().map(|node| &node.buffer)
    }

    /// Where it lies, and how many bytes.
    pub(crate) fn memory(&self) -> Option<(NonNull<u8>, usize)> {
        let buffer = self.buffer()?;
        Some((NonNull::new(buffer.buf_ptr().cast())?, buffer.len_bytes()))
    }

    pub(crate) fn is_readonly(&self) -> bool {
        self.buffer().is_none_or(PyUntypedBuffer::readonly)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(node) = self.0.take() else { return };
        let node = Box::into_raw(node);
        let mut head = LET_GO.load(Ordering::Relaxed);
        loop {
            // SAFETY: given up by `into_raw` just now and not in the list yet: nobody else has it.
            unsafe { (*node).next = head };
            match LET_GO.compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

/// Lets go of what nobody uses any more. Called by every call that may have ended one.
pub(crate) fn sweep(py: Python<'_>) {
    if LET_GO.load(Ordering::Relaxed).is_null() {
        return;
    }
    let mut node = LET_GO.swap(std::ptr::null_mut(), Ordering::Acquire);
    while !node.is_null() {
        // SAFETY: the whole list was taken by the swap, so its nodes are ours; each was given up by `into_raw`, once.
        let taken = unsafe { Box::from_raw(node) };
        node = taken.next;
        taken.buffer.release(py);
    }
}
