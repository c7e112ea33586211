//! Which process this is, told without a lock and without a system call, and values that every process has for itself.
//!
//! A forked child begins with a copy of everything: locks that another thread held at that moment and that nobody will ever
//! open, threads that are not there, sockets that it shares with its parent. So whoever may be called in a child must see
//! first that it is one, and must see it without touching any of that. A page that the kernel empties in a child
//! (MADV_WIPEONFORK) tells: it holds a number drawn by the process that looked first, and 0 in a fresh child. It is `getpid`,
//! remembered: a load instead of a system call, never stale, and different also where a child has its parent's number, as
//! the first process of a new pid namespace does. Where the kernel has no such page, `getpid` is asked each time.
//!
//! All `unsafe` of that is here.

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use rand::TryRngCore as _;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes of the page that is emptied in children; the kernel rounds it up where its pages are larger.
const PAGE_BYTES: usize = 4096;

/// The page; null until somebody asks, [`NO_PAGE`] where there can be none.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());
/// Where [`PAGE`] points when the kernel refused: its word is never used.
static NO_PAGE: AtomicU64 = AtomicU64::new(0);

/// A number that no ancestor and no sibling of this process has. Never 0.
pub(crate) fn this() -> u64 {
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        page = make_page();
    }
    if std::ptr::eq(page, &NO_PAGE) {
        return number();
    }
    // SAFETY: not null, and not `NO_PAGE`: a page that `make_page` mapped, which is aligned, zeroed or written by atomic
    // operations only, and never unmapped once it stands in `PAGE`.
    let word = unsafe { &*page };
    match word.load(Ordering::Acquire) {
        0 => {
            let mine = random().unwrap_or_else(number);
            // The first one to look decides for all threads.
            word.compare_exchange(0, mine, Ordering::AcqRel, Ordering::Acquire).map_or_else(|theirs| theirs, |_| mine)
        }
        known => known,
    }
}

fn number() -> u64 {
    rustix::process::getpid().as_raw_nonzero().get().unsigned_abs().into()
}

/// Asked of the system each time: a generator in this process would draw the same numbers in each of its children.
fn random() -> Option<u64> {
    rand::rngs::OsRng.try_next_u64().ok().map(|n| n | 1 << 63)
}

/// An instance id that no other process draws, forked or not.
pub(crate) fn fresh_instance() -> kvkeep_core::InstanceId {
    let mut id = [0; 16];
    if rand::rngs::OsRng.try_fill_bytes(&mut id).is_err() {
        id[..8].copy_from_slice(&this().to_le_bytes());
        id[8..].copy_from_slice(&rand::random::<u64>().to_le_bytes());
    }
    kvkeep_core::InstanceId(id)
}

/// No lock: this may run in a child whose other threads were in the middle of it.
fn make_page() -> *mut AtomicU64 {
    // SAFETY: a fresh anonymous mapping at an address the kernel chooses touches nobody's memory.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            PAGE_BYTES,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    };
    let none = (&raw const NO_PAGE).cast_mut();
    let made = match mapped {
        Err(_) => none,
        // SAFETY: advice about the mapping just made, which nobody else knows.
        Ok(at) => match unsafe { rustix::mm::madvise(at, PAGE_BYTES, Advice::LinuxWipeOnFork) } {
            Ok(()) => at.cast(),
            // One page stays mapped, once per process.
            Err(_) => none,
        },
    };
    match PAGE.compare_exchange(std::ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => made,
        Err(theirs) => {
            if !std::ptr::eq(made, none) {
                // SAFETY: mapped above, and never shown to anybody.
                let _ = unsafe { rustix::mm::munmap(made.cast(), PAGE_BYTES) };
            }
            theirs
        }
    }
}

/// A value that every process makes for itself. What a parent made is never dropped in its children and never changed
/// there: it stays as it lay at the moment of the fork, locked or not.
#[derive(Debug)]
pub(crate) struct PerProcess<T> {
    at: AtomicPtr<Made<T>>,
}

#[derive(Debug)]
struct Made<T> {
    process: u64,
    value: T,
}

impl<T> PerProcess<T> {
    /// Nothing yet.
    pub(crate) const fn empty() -> Self {
        Self { at: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// This process made it.
    pub(crate) fn of(value: T) -> Self {
        Self { at: AtomicPtr::new(Box::into_raw(Box::new(Made { process: this(), value }))) }
    }

    fn made(&self) -> Option<&Made<T>> {
        // SAFETY: null, or a `Box` given up by `into_raw`. A process frees only what it made itself and only in `Drop`, which
        // has the value for itself; what is replaced is another process's and is never freed. So it lives as long as `self`.
        unsafe { self.at.load(Ordering::Acquire).as_ref() }
    }

    /// This process's value, where it has made one.
    pub(crate) fn get(&self) -> Option<&T> {
        self.made().filter(|made| made.process == this()).map(|made| &made.value)
    }

    /// What an ancestor of this process made, while this process has made nothing. Only what is sound without a lock may be
    /// done with it.
    pub(crate) fn inherited(&self) -> Option<&T> {
        self.made().filter(|made| made.process != this()).map(|made| &made.value)
    }

    /// This process's value. `make` is told what was inherited; where two threads make one at once, one of them is dropped.
    pub(crate) fn get_or_try<E>(&self, make: impl FnOnce(Option<&T>) -> Result<T, E>) -> Result<&T, E> {
        if let Some(value) = self.get() {
            return Ok(value);
        }
        let before = self.at.load(Ordering::Acquire);
        let made = Made { process: this(), value: make(self.inherited())? };
        let made = Box::into_raw(Box::new(made));
        match self.at.compare_exchange(before, made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just stored: as in `made`.
            Ok(_) => Ok(unsafe { &(*made).value }),
            Err(theirs) => {
                // SAFETY: given up above and shown to nobody.
                drop(unsafe { Box::from_raw(made) });
                // SAFETY: stored by another thread of this process since `before` was read, for nothing else is ever stored: as
                // in `made`.
                Ok(unsafe { &(*theirs).value })
            }
        }
    }
}

impl<T: Default> PerProcess<T> {
    /// This process's value, made where it is not.
    pub(crate) fn here(&self) -> &T {
        match self.get_or_try(|_| Ok::<_, std::convert::Infallible>(T::default())) {
            Ok(value) => value,
            Err(never) => match never {},
        }
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let made = *self.at.get_mut();
        if self.get().is_some() {
            // SAFETY: made by this process by `into_raw`, and nobody borrows `self` any more. Another process's stays.
            drop(unsafe { Box::from_raw(made) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_in_all_its_threads() {
        let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(this)).collect();
        assert!(threads.into_iter().all(|t| t.join().unwrap() == this()));
        assert_ne!(this(), 0);
    }

    #[test]
    fn a_value_is_made_once_and_what_was_inherited_is_left_alone() {
        let value = PerProcess::of(7);
        assert_eq!(value.get(), Some(&7));
        assert_eq!(value.inherited(), None);
        // As a fork leaves it: the number of another process.
        let inherited = PerProcess { at: AtomicPtr::new(Box::into_raw(Box::new(Made { process: 1, value: 7 }))) };
        assert_eq!((inherited.get(), inherited.inherited()), (None, Some(&7)));
        let made = inherited.get_or_try(|before| Ok::<_, ()>(before.unwrap() + 1));
        assert_eq!(made, Ok(&8));
        assert_eq!((inherited.get(), inherited.inherited()), (Some(&8), None));
        let none = PerProcess::<u8>::empty();
        assert_eq!(none.get_or_try(|_| Err("no")), Err("no"));
        assert_eq!(none.here(), &0);
    }

    #[test]
    fn threads_that_make_a_value_at_once_share_one() {
        let value = PerProcess::<u64>::empty();
        let at = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| std::ptr::from_ref(value.here()) as usize)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(at.iter().all(|a| *a == at[0]));
    }
}
