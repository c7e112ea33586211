//! Finding room for a block, and making segments when there is none.

use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::error::{Error, ErrorKind, Result};

use super::config::{SEGMENT_BYTES_MIN, segment_name};
use super::place::{Extent, SEGMENTS_MAX, SegmentNo, UNIT_BYTES};
use super::shared::{Shared, Space};
use super::store::NvmeStore;

/// After the filesystem refused a segment it is not asked again for this long: puts on a full device stay cheap.
const GROWTH_RETRY: Duration = Duration::from_secs(1);

impl NvmeStore {
    /// Takes `units` contiguous units, from a new segment if need be.
    pub(crate) async fn alloc(&self, units: u32) -> Result<Extent> {
        loop {
            if let Some(extent) = self.shared.space.lock().extents.alloc(units, false) {
                return Ok(extent);
            }
            let _growing = self.shared.growth.acquire().await.expect("nobody closes the growth semaphore");
            let wanted = {
                let mut space = self.shared.space.lock();
                // Another put may have made a segment while this one waited.
                if let Some(extent) = space.extents.alloc(units, false) {
                    return Ok(extent);
                }
                let wanted = self.shared.next_segment_units(&space).filter(|&n| n >= units);
                match wanted {
                    Some(wanted) => wanted,
                    None => return space.extents.alloc(units, true).ok_or_else(|| self.full(&space, units)),
                }
            };
            let shared = Arc::clone(&self.shared);
            // Allocating a file of a gigabyte blocks.
            let made = tokio::task::spawn_blocking(move || shared.make_segment(wanted)).await;
            match made {
                Ok(Ok(())) => {}
                Ok(Err(e)) if e.kind() == ErrorKind::Full => {
                    let mut space = self.shared.space.lock();
                    space.growth_refused = Some((self.shared.config.clock)());
                    return space.extents.alloc(units, true).ok_or_else(|| self.full(&space, units));
                }
                Ok(Err(e)) => return Err(e),
                Err(_) => return Err(Error::new(ErrorKind::Unavailable, "the runtime stopped during an nvme put")),
            }
        }
    }

    fn full(&self, space: &Space, units: u32) -> Error {
        let bytes = u64::from(units) * UNIT_BYTES;
        if bytes > self.shared.config.segment_bytes {
            return Error::new(
                ErrorKind::TooLarge,
                "the block is larger than a segment of this device; set larger segments",
            )
            .with("bytes", bytes)
            .with("segment_bytes", self.shared.config.segment_bytes);
        }
        Error::new(ErrorKind::Full, "no room on the nvme device for a block of this size")
            .with("bytes", bytes)
            .with("free_bytes", space.extents.counts().free * UNIT_BYTES)
            .with("largest_free_bytes", u64::from(space.extents.largest_free()) * UNIT_BYTES)
    }
}

impl Shared {
    /// Units of the segment that would be made next; `None` at the capacity, or shortly after the filesystem had no room.
    pub(crate) fn next_segment_units(&self, space: &Space) -> Option<u32> {
        let now = (self.config.clock)();
        if space.growth_refused.is_some_and(|at| now.saturating_sub(at) < GROWTH_RETRY) {
            return None;
        }
        let left = self.config.capacity_bytes.saturating_sub(space.segment_bytes());
        let bytes = left.min(self.config.segment_bytes);
        // What is left at the end makes a smaller segment, unless it is hardly worth a file.
        (bytes >= SEGMENT_BYTES_MIN && space.extents.segment_count() < SEGMENTS_MAX as usize)
            .then(|| u32::try_from(bytes / UNIT_BYTES).expect("a segment has at most 2^22 units"))
    }

    /// Makes a segment of `units` and adds it to the free space. Blocks. `Full` where the keep-free floor or the
    /// filesystem forbids it.
    fn make_segment(&self, units: u32) -> Result<()> {
        let bytes = u64::from(units) * UNIT_BYTES;
        let free = self.disk.space()?.free;
        if free.saturating_sub(bytes) < self.config.keep_free_bytes {
            return Err(Error::new(ErrorKind::Full, "the filesystem must keep its free bytes").with("free_bytes", free));
        }
        let no = {
            let space = self.space.lock();
            let no = (1..=u16::MAX).map(SegmentNo).find(|&no| !space.extents.has_segment(no));
            no.ok_or_else(|| Error::new(ErrorKind::Full, "no segment number is free"))?
        };
        let file = self.disk.create(&segment_name(no), bytes)?;
        let mut space = self.space.lock();
        space.files.insert(no, file);
        space.extents.add_segment(no, units);
        tracing::info!(segment = %no, bytes, "nvme segment added");
        Ok(())
    }
}
