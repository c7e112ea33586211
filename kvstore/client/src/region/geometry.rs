//! Where an engine's blocks lie, said once: block ids in, places out.

use super::{Place, Runs};
use crate::error::{Error, Result};
use kvkeep_core::ErrorKind as CoreKind;

/// Most blocks of one geometry: what an engine's block id (31 bits) can name.
pub const BLOCKS_MAX: u32 = 1 << 31;

/// The memory of an engine's KV blocks: where block 0 lies in each area, and how far the next block is from it.
///
/// An area is one allocation, or a part of one, that holds a piece of every block: the keys of a layer, the values of all
/// layers. Its base is the [`Place`] of block 0 there: one run, or a run per layer ([`Region::strided`](super::Region::strided)).
///
/// ```
/// # use kvkeep_client::{Geometry, Region};
/// # fn main() -> kvkeep_client::Result<()> {
/// // 32 layers; per layer 1,000 blocks of 4 KiB one behind the other, keys in one half of the region and values in the other.
/// let (run, layers, blocks) = (4096, 32, 1000);
/// let half = layers * blocks * run;
/// let region = Region::new(2 * half)?;
/// // SAFETY: a block is given to one call at a time.
/// let geometry = unsafe {
///     let keys = region.strided(0, run, blocks * run, layers as u32);
///     let values = region.strided(half, run, blocks * run, layers as u32);
///     Geometry::new([(keys, run as u64), (values, run as u64)], blocks as u32)?
/// };
/// assert_eq!(geometry.block_bytes(), 2 * 32 * 4096);
/// let places = geometry.places(&[7, 999])?;
/// # assert_eq!(places.len(), 2);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Block 0 of each area, and the distance between two blocks there, bytes.
    areas: Vec<(Place, u64)>,
    blocks: u32,
    block_bytes: u64,
}

impl Geometry {
    /// `areas`: the place of block 0 and the bytes from one block to the next, in the order in which the pieces make up a block;
    /// `blocks`: how many there are, ids 0 to `blocks - 1`.
    ///
    /// # Errors
    /// `invalid_argument` where there is no area or no block, where the last block does not lie in its region, or where two
    /// blocks of an area overlap.
    ///
    /// # Safety
    /// What [`Region::place`](super::Region::place) asks, for every place that this hands out: until each call that it is given to
    /// has been answered (and is not in doubt), nobody else reads the bytes that a get fills, and nobody writes those that a get
    /// fills or a put reads.
    pub unsafe fn new(areas: impl IntoIterator<Item = (Place, u64)>, blocks: u32) -> Result<Self> {
        let areas: Vec<_> = areas.into_iter().collect();
        if areas.is_empty() || blocks == 0 || blocks > BLOCKS_MAX {
            return Err(wrong("a geometry has an area, and 1 to 2^31 blocks").with("blocks", blocks));
        }
        for (n, (base, stride)) in areas.iter().enumerate() {
            for (region, runs) in &base.runs {
                let fits = last_end(runs, *stride, blocks).is_some_and(|end| end <= region.len() as u64);
                if !fits || !are_apart(runs, *stride, blocks) {
                    return Err(wrong("blocks of an area overlap, or do not lie in their region")
                        .with("area", n)
                        .with("run_bytes", runs.bytes)
                        .with("runs", runs.count)
                        .with("block_stride", stride)
                        .with("blocks", blocks)
                        .with("region_bytes", region.len()));
                }
            }
        }
        let block_bytes = areas.iter().map(|(base, _)| base.bytes).sum();
        Ok(Self { areas, blocks, block_bytes })
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block, all areas together.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Where a block lies.
    ///
    /// # Errors
    /// `invalid_argument` where there is no such block.
    pub fn place(&self, block: u32) -> Result<Place> {
        if block >= self.blocks {
            return Err(wrong("there is no such block").with("block", block).with("blocks", self.blocks));
        }
        let runs = self.areas.iter().flat_map(|(base, stride)| {
            let ahead = u64::from(block) * stride;
            base.runs.iter().map(move |(region, r)| (region.clone(), Runs { offset: r.offset + ahead, ..*r }))
        });
        Ok(Place { runs: runs.collect(), bytes: self.block_bytes })
    }

    /// Where some blocks lie, in their order.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn places(&self, blocks: &[u32]) -> Result<Vec<Place>> {
        blocks.iter().map(|block| self.place(*block)).collect()
    }
}

fn wrong(message: &'static str) -> Error {
    kvkeep_core::Error::new(CoreKind::InvalidArgument, message).into()
}

/// Where the last run of the last block ends; `None`: nowhere.
fn last_end(runs: &Runs, stride: u64, blocks: u32) -> Option<u64> {
    let before = stride.checked_mul(u64::from(blocks - 1))?.checked_add(runs.offset)?;
    before.checked_add(span(runs)?)
}

/// From the first byte of a block's first run to behind its last one.
fn span(runs: &Runs) -> Option<u64> {
    runs.stride.checked_mul(u64::from(runs.count.saturating_sub(1)))?.checked_add(runs.bytes)
}

/// Whether no byte belongs to two blocks: all blocks of a layer before the next layer, or all layers of a block before the
/// next block.
fn are_apart(runs: &Runs, stride: u64, blocks: u32) -> bool {
    let by_layer = || {
        let one_layer = stride.checked_mul(u64::from(blocks - 1)).and_then(|all| all.checked_add(runs.bytes));
        stride >= runs.bytes && (runs.count == 1 || one_layer.is_some_and(|bytes| runs.stride >= bytes))
    };
    let by_block = || span(runs).is_some_and(|bytes| stride >= bytes);
    blocks == 1 || by_layer() || by_block()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;

    /// Every byte of every block is written with its block's number through its place, and found where arithmetic says.
    #[test]
    fn blocks_lie_where_layers_and_strides_say_and_never_on_each_other() {
        const RUN: usize = 64;
        const LAYERS: usize = 3;
        const BLOCKS: usize = 5;
        let region = Region::new(4 * LAYERS * BLOCKS * RUN).unwrap();
        let values = LAYERS * BLOCKS * RUN;
        // SAFETY: nobody else knows the region.
        let geometry = unsafe {
            let by_layer = region.strided(0, RUN, BLOCKS * RUN, LAYERS as u32);
            let by_block = region.strided(values, RUN, RUN, LAYERS as u32);
            Geometry::new([(by_layer, RUN as u64), (by_block, (LAYERS * RUN) as u64)], BLOCKS as u32).unwrap()
        };
        assert_eq!((geometry.block_bytes(), geometry.blocks()), (2 * 3 * 64, 5));
        let mut expected = vec![0; region.len()];
        for (block, place) in geometry.places(&[0, 1, 2, 3, 4]).unwrap().iter().enumerate() {
            for (region, at, len) in place.pieces(0, place.len()) {
                let mut there = vec![0; len];
                region.read(at, &mut there);
                assert!(there.iter().all(|b| *b == 0), "another block lies there");
                region.write(at, &vec![block as u8 + 1; len]);
            }
            for layer in 0..LAYERS {
                expected[(layer * BLOCKS + block) * RUN..][..RUN].fill(block as u8 + 1);
                expected[values + (block * LAYERS + layer) * RUN..][..RUN].fill(block as u8 + 1);
            }
        }
        let mut bytes = vec![0; region.len()];
        region.read(0, &mut bytes);
        assert!(bytes == expected);
    }

    #[test]
    fn what_does_not_fit_or_overlaps_is_refused() {
        let region = Region::new(4096).unwrap();
        // SAFETY: nothing is done with the places.
        let of = |bytes, layer, layers, stride, blocks| unsafe {
            Geometry::new([(region.strided(0, bytes, layer, layers), stride)], blocks)
        };
        assert!(of(1024, 1024, 1, 1024, 4).is_ok());
        assert!(of(1024, 1024, 1, 1024, 5).is_err(), "the last block lies outside");
        assert!(of(1024, 1024, 1, 512, 2).is_err(), "blocks overlap");
        assert!(of(512, 1024, 2, 512, 2).is_ok());
        assert!(of(512, 1024, 2, 512, 3).is_err(), "a block lies on the next layer of another");
        assert!(of(512, 512, 2, 1024, 4).is_ok());
        assert!(of(512, 512, 2, u64::MAX, 4).is_err());
        assert!(of(512, 512, 1, 512, 0).is_err());
        let geometry = of(1024, 1024, 1, 1024, 4).unwrap();
        assert!(geometry.place(4).unwrap_err().to_string().contains("no such block"));
        // SAFETY: as above.
        assert!(unsafe { Geometry::new([], 1) }.is_err());
    }
}
