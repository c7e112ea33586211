//! Where an extent lies, and how that is packed into an [`NvmePlace`].

use std::fmt;

use kvkeep_core::block::NvmePlace;

/// Bytes of the unit in which segments are cut: a page, as O_DIRECT wants it.
pub const UNIT_BYTES: u64 = 4096;

/// Bits of a place that name the segment.
const SEGMENT_BITS: u32 = 16;
/// Bits of a place that name the first 4 KiB unit.
const UNIT_BITS: u32 = 22;
/// Low bits of the block's sequence in a place.
const TAG_BITS: u32 = 26;
const _: () = assert!(SEGMENT_BITS + UNIT_BITS + TAG_BITS == u64::BITS);

/// Most segments of one device.
pub const SEGMENTS_MAX: u32 = (1 << SEGMENT_BITS) - 1;
/// Most 4 KiB units of one segment (16 GiB).
pub const SEGMENT_UNITS_MAX: u32 = 1 << UNIT_BITS;

/// Counts the puts of one device, across restarts; never 0 and never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(pub u64);

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sequence({})", self.0)
    }
}

/// Number of a segment file, from 1: 0 would make a place that is 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNo(pub u16);

impl fmt::Display for SegmentNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SegmentNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SegmentNo({})", self.0)
    }
}

/// A run of 4 KiB units in one segment: a block's header and payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// The segment.
    pub segment: SegmentNo,
    /// First unit.
    pub unit: u32,
    /// Number of units, never 0.
    pub units: u32,
}

impl Extent {
    /// Byte offset in the segment file.
    pub fn offset(self) -> u64 {
        u64::from(self.unit) * UNIT_BYTES
    }

    /// Size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.units) * UNIT_BYTES
    }
}

/// What an [`NvmePlace`] says:
///
/// | bits     | field                                    |
/// |----------|------------------------------------------|
/// | 63 .. 48 | segment, from 1                          |
/// | 47 .. 26 | first 4 KiB unit                         |
/// | 25 .. 0  | low bits of the sequence of the put      |
///
/// The low bits of the sequence make a place that outlived its block (freed, and the unit given to another) differ from
/// the new one's, so that a read needs no look into the index to see that it is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub segment: SegmentNo,
    pub unit: u32,
    pub tag: u32,
}

impl Place {
    pub fn new(extent: Extent, sequence: Sequence) -> Self {
        Self { segment: extent.segment, unit: extent.unit, tag: tag_of(sequence) }
    }

    pub fn pack(self) -> NvmePlace {
        let raw = u64::from(self.segment.0) << (UNIT_BITS + TAG_BITS)
            | u64::from(self.unit) << TAG_BITS
            | u64::from(self.tag);
        NvmePlace::from_raw(raw).expect("segments count from 1, so the top bits are not all zero")
    }

    /// `None` for a place no store made.
    pub fn unpack(place: NvmePlace) -> Option<Self> {
        let raw = place.raw();
        let segment = u16::try_from(raw >> (UNIT_BITS + TAG_BITS)).expect("48 bits were shifted out of 64");
        let unit = (raw >> TAG_BITS) & ((1 << UNIT_BITS) - 1);
        let tag = raw & ((1 << TAG_BITS) - 1);
        (segment != 0).then_some(Self { segment: SegmentNo(segment), unit: unit as u32, tag: tag as u32 })
    }

    pub fn extent(self, units: u32) -> Extent {
        Extent { segment: self.segment, unit: self.unit, units }
    }
}

/// The part of a sequence that a place carries.
pub(crate) fn tag_of(sequence: Sequence) -> u32 {
    (sequence.0 & ((1 << TAG_BITS) - 1)) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_place_unpacks_to_what_was_packed(
            segment in 1u16..=u16::MAX, unit in 0..SEGMENT_UNITS_MAX, sequence in any::<u64>(),
        ) {
            let extent = Extent { segment: SegmentNo(segment), unit, units: 1 };
            let place = Place::new(extent, Sequence(sequence));
            prop_assert_eq!(Place::unpack(place.pack()), Some(place));
            prop_assert_eq!(place.extent(1), extent);
        }

        #[test]
        fn any_number_unpacks_or_is_refused(raw in 1u64..) {
            let place = NvmePlace::from_raw(raw).unwrap();
            match Place::unpack(place) {
                Some(p) => prop_assert_eq!(p.pack(), place),
                None => prop_assert_eq!(raw >> 48, 0),
            }
        }
    }
}
