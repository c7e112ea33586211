//! One suite for every engine ([`conformance`]), what only some of them can show ([`engines`]), the coordinator
//! ([`flushing`]), and the unkind disk itself ([`unkind`]).

mod conformance;
mod engines;
mod flushing;
mod unkind;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const PAGE: usize = IO_ALIGN;

/// Runs a future to its end on a runtime of its own.
fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A buffer of `pages` pages whose every 8 bytes say `tag` and where they are.
fn filled(pages: usize, tag: u32) -> IoBuf {
    let mut buf = IoBuf::alloc(pages * PAGE);
    for (n, word) in buf.as_mut_slice().chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(u64::from(tag) << 32 | n as u64).to_le_bytes());
    }
    buf
}

/// A buffer that counts when its memory is let go.
fn watched(pages: usize, drops: &Arc<AtomicUsize>) -> IoBuf {
    struct Guard(Arc<AtomicUsize>);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    IoBuf::alloc_with(pages * PAGE, Arc::new(Guard(Arc::clone(drops))))
}
