//! What the index holds beside blocks: the device's own record, and one per quarantined extent. Their keys are shorter
//! than a block's, so that neither can be taken for the other.

use kvkeep_core::error::{Error, ErrorKind, Result};

use super::index::Change;
use super::place::{Extent, SegmentNo, Sequence};

/// Version of the files of one device, together: segment headers, index keys and values, records. A device that a newer
/// version has written is refused by name.
pub const DEVICE_VERSION: u16 = 1;

const DEVICE_KEY: &[u8] = b"d";
const DEVICE_BYTES: usize = 24;

/// The record of the device, under the key `d`, little-endian:
///
/// | at | size | field                                                                      |
/// |----|------|----------------------------------------------------------------------------|
/// |  0 |    2 | device version, 1                                                          |
/// |  2 |    2 | zeros                                                                      |
/// |  4 |    4 | crc32 of the record, these four as zero                                    |
/// |  8 |    8 | sequence mark: no put has a sequence above it                              |
/// | 16 |    8 | flushed: every put up to this sequence was on the device at a clean stop   |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceRecord {
    pub mark: Sequence,
    pub flushed: Sequence,
}

impl DeviceRecord {
    pub fn key() -> &'static [u8] {
        DEVICE_KEY
    }

    pub fn to_change(self) -> Change {
        let mut v = [0; DEVICE_BYTES];
        v[..2].copy_from_slice(&DEVICE_VERSION.to_le_bytes());
        v[8..16].copy_from_slice(&self.mark.0.to_le_bytes());
        v[16..].copy_from_slice(&self.flushed.0.to_le_bytes());
        let crc = crc32fast::hash(&v);
        v[4..8].copy_from_slice(&crc.to_le_bytes());
        Change::Put(DEVICE_KEY.to_vec(), v.to_vec())
    }

    /// Refuses a newer version before it looks at anything else.
    pub fn decode(value: &[u8]) -> Result<Self> {
        let damaged =
            |why| Error::new(ErrorKind::Corrupt, "the device record in the nvme index is damaged").with("what", why);
        let version = value.first_chunk::<2>().ok_or_else(|| damaged("length"))?;
        let version = u16::from_le_bytes(*version);
        if version > DEVICE_VERSION {
            return Err(Error::new(
                ErrorKind::Config,
                "this nvme device was written by a newer kvkeep; start that version, or give this one an empty folder",
            )
            .with("device_version", version)
            .with("known_version", DEVICE_VERSION));
        }
        let v: &[u8; DEVICE_BYTES] = value.try_into().map_err(|_| damaged("length"))?;
        let mut zeroed = *v;
        zeroed[4..8].fill(0);
        if v[4..8] != crc32fast::hash(&zeroed).to_le_bytes() {
            return Err(damaged("checksum"));
        }
        let u64_at = |at: usize| u64::from_le_bytes(*v[at..].first_chunk().expect("inside 24 bytes"));
        Ok(Self { mark: Sequence(u64_at(8)), flushed: Sequence(u64_at(16)) })
    }
}

const QUARANTINE_TAG: u8 = b'q';
/// What the keys of quarantine records begin with. Keys of blocks may, too.
pub(crate) const QUARANTINE_PREFIX: &[u8] = &[QUARANTINE_TAG];
const QUARANTINE_KEY_BYTES: usize = 7;

/// The key of a quarantined extent: `q`, segment (2 bytes) and unit (4 bytes), big-endian. Its value: units (4 bytes),
/// crc32 of key and units (4 bytes), little-endian.
fn quarantine_key(e: Extent) -> Vec<u8> {
    let mut key = vec![QUARANTINE_TAG];
    key.extend(e.segment.0.to_be_bytes());
    key.extend(e.unit.to_be_bytes());
    key
}

fn quarantine_sum(key: &[u8], units: u32) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(key);
    h.update(&units.to_le_bytes());
    h.finalize()
}

/// Writes an extent down as quarantined.
pub(crate) fn quarantine(e: Extent) -> Change {
    let key = quarantine_key(e);
    let mut value = e.units.to_le_bytes().to_vec();
    value.extend(quarantine_sum(&key, e.units).to_le_bytes());
    Change::Put(key, value)
}

/// Takes that back.
pub(crate) fn pardon(e: Extent) -> Change {
    Change::Delete(quarantine_key(e))
}

/// The extent of a quarantine record; `None` if it is something else or damaged.
pub(crate) fn as_quarantine(key: &[u8], value: &[u8]) -> Option<Extent> {
    let key: &[u8; QUARANTINE_KEY_BYTES] = key.try_into().ok()?;
    let value: &[u8; 8] = value.try_into().ok()?;
    let (&units, &sum) = (value.first_chunk::<4>()?, value.last_chunk::<4>()?);
    let units = u32::from_le_bytes(units);
    (key[0] == QUARANTINE_TAG && u32::from_le_bytes(sum) == quarantine_sum(key, units)).then(|| Extent {
        segment: SegmentNo(u16::from_be_bytes(*key[1..].first_chunk().expect("inside 7 bytes"))),
        unit: u32::from_be_bytes(*key[3..].first_chunk().expect("inside 7 bytes")),
        units,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(change: Change) -> Vec<u8> {
        match change {
            Change::Put(_, value) => value,
            Change::Delete(_) => panic!("a put was expected"),
        }
    }

    #[test]
    fn the_device_record_reads_back_and_a_flipped_bit_is_refused() {
        let record = DeviceRecord { mark: Sequence(7), flushed: Sequence(5) };
        let v = value(record.to_change());
        assert_eq!(DeviceRecord::decode(&v).unwrap(), record);
        for at in 0..v.len() * 8 {
            let mut v = v.clone();
            v[at / 8] ^= 1 << (at % 8);
            assert!(DeviceRecord::decode(&v).is_err(), "bit {at}");
        }
        for len in 0..v.len() {
            assert!(DeviceRecord::decode(&v[..len]).is_err());
        }
    }

    #[test]
    fn a_newer_device_is_refused_by_name() {
        let mut v = value(DeviceRecord { mark: Sequence(1), flushed: Sequence(0) }.to_change());
        v[..2].copy_from_slice(&2u16.to_le_bytes());
        let e = DeviceRecord::decode(&v).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Config);
        assert!(e.to_string().contains("device_version=2"), "{e}");
    }

    #[test]
    fn a_quarantine_record_reads_back_and_nothing_else_is_taken_for_one() {
        let e = Extent { segment: SegmentNo(3), unit: 77, units: 9 };
        let Change::Put(key, value) = quarantine(e) else { panic!("a put was expected") };
        assert_eq!(as_quarantine(&key, &value), Some(e));
        assert_eq!(pardon(e), Change::Delete(key.clone()));
        let mut bad = value.clone();
        bad[0] ^= 1;
        assert_eq!(as_quarantine(&key, &bad), None);
        assert_eq!(as_quarantine(b"d", &value), None);
    }
}
