//! Plain references: what a path cannot do without, in a few lines of our own.
//!
//! ```text
//!  memcpy         source ──copy──> landing                          one thread, both larger than the caches
//!  shm_place      16-byte request, 8-byte answer over a Unix socket; client copies the block out of shared memory
//!  raw_tcp get    16-byte request ──> server writes the block       receiver sums each 64 KiB as it arrives
//!  raw_tcp put    64-byte header and block ──> server sums it       8-byte answer: the sum of the sums
//! ```
//! The server is this program in another process ([`server`]). Sockets are blocking and of the standard library.

pub mod copy;
pub mod place;
pub mod server;
pub mod tcp;

use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use kvkeep_core::ChunkSums;
use tokio::sync::{Mutex, MutexGuard};

use super::memory::Pages;
use super::path::{BLOCK_BYTES, BLOCKS, Entry, WORKING_SET_BYTES};
use crate::block_bytes::{Seed, fill};
use server::Reference;

/// Connections of the references over TCP.
pub const CONNECTIONS: [u32; 2] = [1, 4];
/// Bytes of a request.
const REQUEST_BYTES: usize = 16;
/// Bytes of a request before the block that it brings. A cache line: behind 16 bytes the block would lie in the kernel's
/// buffers at another alignment than in ours, see [`super::memory::Pages`].
const HEADER_BYTES: usize = 64;
/// Bytes of an answer that is no block.
const ANSWER_BYTES: usize = 8;
/// Asks for a block.
const GET: u64 = 1;
/// Brings a block.
const PUT: u64 = 2;

fn request(what: u64, block: usize) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..8].copy_from_slice(&what.to_le_bytes());
    bytes[8..].copy_from_slice(&(block as u64).to_le_bytes());
    bytes
}

/// What [`request`] made; the block's number lies within the working set.
fn parse(bytes: [u8; REQUEST_BYTES]) -> (u64, usize) {
    let [what, block] = bytes.as_chunks::<8>().0 else { unreachable!("16 bytes are twice 8") };
    (u64::from_le_bytes(*what), u64::from_le_bytes(*block) as usize % BLOCKS)
}

/// The bytes of the whole working set: block `n` is the `n`-th anonymous one, so that two processes have the same.
pub fn working_set() -> Pages {
    let mut bytes = Pages::new(WORKING_SET_BYTES);
    for (n, block) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
        fill(Seed::nth(n as u64), block);
    }
    bytes
}

/// A client's memory: what it puts, and where its gets land.
pub struct Memory {
    /// The working set.
    pub source: Bytes,
    /// Of each of its blocks.
    pub sums: Vec<ChunkSums>,
    landing: Mutex<Pages>,
}

impl Memory {
    /// Fills it; every page is touched.
    pub fn new() -> Arc<Self> {
        let source = Bytes::from_owner(working_set());
        let sums = source.chunks_exact(BLOCK_BYTES).map(ChunkSums::of).collect();
        Arc::new(Self { source, sums, landing: Mutex::new(Pages::new(WORKING_SET_BYTES)) })
    }

    /// Block `n` of the source.
    pub fn block(&self, n: usize) -> Bytes {
        self.source.slice(n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES)
    }

    /// Where blocks land. Windows are measured one at a time, so nobody waits for it.
    pub fn landing(&self) -> anyhow::Result<MutexGuard<'_, Pages>> {
        self.landing.try_lock().context("two windows are measured at once")
    }
}

/// Range of block `n`.
fn range(n: usize) -> std::ops::Range<usize> {
    n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES
}

/// All references; their server lives as long as one of them.
pub async fn all(memory: &Arc<Memory>) -> anyhow::Result<Vec<Entry>> {
    let reference = Reference::start().await?;
    let mut entries = copy::entries(memory);
    entries.push(place::entry(memory, &reference)?);
    entries.extend(tcp::entries(memory, &reference)?);
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written_and_stays_in_bounds() {
        assert_eq!(parse(request(PUT, 7)), (PUT, 7));
        assert_eq!(parse(request(GET, usize::MAX)), (GET, BLOCKS - 1));
    }
}
