//! [`IoBuf`]: memory handed to an I/O engine by value. The engine keeps it, and through it whatever owns the memory, until
//! the kernel has answered; a caller that goes away cannot pull memory out from under a running read.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// A page: O_DIRECT wants offsets, lengths and addresses in these units.
pub const IO_ALIGN: usize = 4096;

/// Names the registration that a buffer lies in. A wrong one costs nothing but speed: an engine compares addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedBuf {
    /// Index in the engine's table of registered buffers.
    pub index: u16,
}

/// A run of memory and the owner that keeps it alive and exclusively ours.
pub struct IoBuf {
    ptr: *mut u8,
    len: usize,
    fixed: Option<FixedBuf>,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an `IoBuf` is moved between threads, never shared while an operation runs on it; `new` makes the caller promise
// that `owner` keeps the memory alive and that nobody else writes it (or reads it, for an engine read) meanwhile.
unsafe impl Send for IoBuf {}

impl IoBuf {
    /// Lends `len` bytes at `ptr` for as long as the returned value, or an engine that took it, lives.
    ///
    /// # Safety
    /// `ptr..ptr+len` stays valid memory as long as `owner` lives. While the buffer is used as the destination of a read
    /// nobody else accesses it; while it is the source of a write nobody else writes it.
    pub unsafe fn new(ptr: *mut u8, len: usize, fixed: Option<FixedBuf>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { ptr, len, fixed, owner }
    }

    /// A zeroed, page-aligned buffer of its own.
    pub fn alloc(len: usize) -> Self {
        let owned = AlignedBox::zeroed(len);
        let ptr = owned.ptr;
        Self { ptr, len, fixed: None, owner: Arc::new(owned) }
    }

    /// The same, and keeps `guard` until it is dropped: a permit, a share of a budget.
    pub fn alloc_with(len: usize, guard: Arc<dyn Any + Send + Sync>) -> Self {
        let owned = AlignedBox::zeroed(len);
        let ptr = owned.ptr;
        Self { ptr, len, fixed: None, owner: Arc::new((owned, guard)) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Its registration, if any.
    pub fn fixed(&self) -> Option<FixedBuf> {
        self.fixed
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: valid for `len` as long as `owner` lives (`new`), and `self` borrows it; no operation runs on it, since
        // engines take the buffer by value.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// The bytes, to be written. Only for a buffer that is a destination.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` with the promise of `new` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }

    /// The part `at..at+len` of it. Takes the buffer by value: two parts that overlap must never exist.
    ///
    /// # Panics
    /// If the range does not lie inside.
    #[must_use]
    pub fn slice(self, at: usize, len: usize) -> Self {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{at}+{len} lies outside of {}", self.len);
        // SAFETY: inside the range that `new` promised.
        let ptr = unsafe { self.ptr.add(at) };
        Self { ptr, len, fixed: self.fixed, owner: self.owner }
    }

    /// The part before `at` and the part from `at` on, sharing the owner.
    ///
    /// # Panics
    /// If `at` does not lie inside.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len, "{at} lies outside of {}", self.len);
        // SAFETY: inside the range that `new` promised, or one past its end with nothing behind.
        let ptr = unsafe { self.ptr.add(at) };
        let tail = Self { ptr, len: self.len - at, fixed: self.fixed, owner: Arc::clone(&self.owner) };
        (Self { len: at, ..self }, tail)
    }

    /// The same buffer, said to lie in registration `index`.
    #[must_use]
    pub fn with_fixed(self, index: u16) -> Self {
        Self { fixed: Some(FixedBuf { index }), ..self }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuf").field("len", &self.len).field("fixed", &self.fixed).finish_non_exhaustive()
    }
}

/// Memory to be registered with an engine: where it is and who keeps it alive. Gives no access to the bytes, so it may
/// overlap any number of [`IoBuf`]s.
pub struct Region {
    start: usize,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

impl Region {
    /// `len` bytes at `ptr`, which stay mapped as long as `owner` lives.
    ///
    /// # Safety
    /// They do.
    pub unsafe fn new(ptr: *mut u8, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { start: ptr.expose_provenance(), len, owner }
    }

    /// Where `buf` lies.
    pub fn of(buf: &IoBuf) -> Self {
        Self { start: buf.ptr.expose_provenance(), len: buf.len, owner: Arc::clone(&buf.owner) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.start)
    }

    /// Whether all of `buf` lies inside.
    pub fn contains(&self, buf: &IoBuf) -> bool {
        let at = buf.ptr.addr();
        self.start <= at && at + buf.len <= self.start + self.len
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("len", &self.len).field("owners", &Arc::strong_count(&self.owner)).finish()
    }
}

struct AlignedBox {
    ptr: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for AlignedBox {}
// SAFETY: never accessed through `&AlignedBox`; only `IoBuf` touches the memory.
unsafe impl Sync for AlignedBox {}

impl AlignedBox {
    fn zeroed(len: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(len.max(1).next_multiple_of(IO_ALIGN), IO_ALIGN)
            .expect("a length over isize::MAX cannot have been asked for: block sizes are bounded");
        // SAFETY: the layout has a size of at least one page.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        if ptr.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Self { ptr, layout }
    }
}

impl Drop for AlignedBox {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { std::alloc::dealloc(self.ptr, self.layout) }
    }
}
