//! L3: blocks in segment files, found through an index.
//!
//! Read in this order: [`place`](mod@place) (segments, units, extents) -> [`header`] (what stands before a block) ->
//! [`entry`] and `records` (what the index holds) -> [`index`] (the seam; [`rocks`] is the real one, [`mem`] forgets what
//! was not synced) -> `extents` (what is free) -> `shared` -> [`config`] -> `writer` (the one thread that changes the index) ->
//! [`store`] (put and free; `grow` makes segments, `budget` counts bytes) -> [`read`](mod@read) -> [`open`] -> [`scrub`].
//!
//! The order of steps, and why: [`NvmeStore`]. What a power cut may and may not take: a block of class durable that was
//! acknowledged is there; one that was freed and acknowledged is not; of the rest any part may be gone, and none is wrong.

mod budget;
pub mod config;
pub mod entry;
mod extents;
mod grow;
pub mod header;
pub mod index;
pub mod mem;
pub mod open;
pub mod place;
pub mod read;
mod records;
pub mod rocks;
pub mod scrub;
mod shared;
pub mod store;
#[cfg(test)]
mod testing;
mod writer;

pub use config::{Clock, NvmeConfig, index_dir, make_dir, make_dirs, segments_dir};
pub use entry::{Heat, IndexEntry};
pub use index::{Change, Index};
pub use mem::MemIndex;
pub use open::{Keep, OpenReport};
pub use place::{Extent, SegmentNo, Sequence, UNIT_BYTES};
pub use read::{Doubt, Expect, Read};
pub use rocks::RocksIndex;
pub use scrub::{ScrubCursor, ScrubFault, ScrubReport};
pub use store::{Admission, NvmeStore, NvmeUsage, padded};
pub use writer::BlockCopy;
