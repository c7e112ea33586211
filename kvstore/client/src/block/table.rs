//! The table of mapped parts as it travels (drawn in `blocks.proto`): records of a fixed length, so that reading one is a few
//! loads.

use kvkeep_core::ids::{GroupId, ShardId};
use kvkeep_core::{MissReason, PartStatus};
use kvkeep_proto::v1;

/// Bytes of a record.
pub const RECORD_BYTES: usize = 56;

/// One part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Index of the key (match) or of the item (map).
    pub item: u32,
    /// Its group.
    pub group: GroupId,
    /// Its shard.
    pub shard: ShardId,
    /// A hit, `loading`, or a miss.
    pub status: PartStatus,
    /// Why it is no hit.
    pub reason: Option<MissReason>,
    /// Where a hit lies; all zeros where it is none.
    pub place: RecordPlace,
}

/// Where a part lies in the server's arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordPlace {
    /// Bytes of the payload.
    pub length: u32,
    /// Nonce of the file.
    pub file: u64,
    /// Of the payload in the file, bytes.
    pub offset: u64,
    /// Of the slot's entry in the file, bytes.
    pub entry: u64,
    /// Of the put that made the bytes.
    pub version: u64,
    /// Of the slot's use.
    pub generation: u64,
}

impl Record {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        let RecordPlace { length, file, offset, entry, version, generation } = self.place;
        out[0..4].copy_from_slice(&self.item.to_le_bytes());
        out[4..6].copy_from_slice(&self.group.0.to_le_bytes());
        out[6..8].copy_from_slice(&self.shard.0.to_le_bytes());
        out[8] = self.status.code();
        out[9] = self.reason.map_or(0, MissReason::code);
        out[12..16].copy_from_slice(&length.to_le_bytes());
        for (to, word) in out[16..].chunks_exact_mut(8).zip([file, offset, entry, version, generation]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// A status or reason that this version does not know is a miss without a reason.
    fn decode(bytes: &[u8; RECORD_BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            item: u32_at(0),
            group: GroupId(u16_at(4)),
            shard: ShardId(u16_at(6)),
            status: PartStatus::from_code(bytes[8]).unwrap_or(PartStatus::Miss),
            reason: MissReason::from_code(bytes[9]),
            place: RecordPlace {
                length: u32_at(12),
                file: u64_at(16),
                offset: u64_at(24),
                entry: u64_at(32),
                version: u64_at(40),
                generation: u64_at(48),
            },
        }
    }
}

/// Records and sums as they travel.
pub fn to_proto(records: &[Record], crc32: Vec<u32>) -> v1::MappedParts {
    let mut table = Vec::with_capacity(records.len() * RECORD_BYTES);
    records.iter().for_each(|record| table.extend_from_slice(&record.encode()));
    v1::MappedParts { table: table.into(), crc32 }
}

/// The records of a table; `None` where it is not whole records.
pub fn from_proto(parts: &v1::MappedParts) -> Option<impl ExactSizeIterator<Item = Record>> {
    let (records, rest) = parts.table.as_chunks::<RECORD_BYTES>();
    rest.is_empty().then(|| records.iter().map(Record::decode))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Record> {
        let place =
            (any::<u32>(), any::<[u64; 5]>()).prop_map(|(length, [file, offset, entry, version, generation])| {
                RecordPlace { length, file, offset, entry, version, generation }
            });
        let status = prop::sample::select(PartStatus::ALL);
        let reason = prop::option::of(prop::sample::select(MissReason::ALL));
        (any::<(u32, u16, u16)>(), status, reason, place).prop_map(|((item, group, shard), status, reason, place)| {
            Record { item, group: GroupId(group), shard: ShardId(shard), status, reason, place }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(records in prop::collection::vec(record(), 0..9)) {
            let parts = to_proto(&records, Vec::new());
            prop_assert_eq!(from_proto(&parts).unwrap().collect::<Vec<_>>(), records);
        }

        #[test]
        fn garbage_is_read_as_something_or_refused(table in prop::collection::vec(any::<u8>(), 0..300)) {
            let whole = table.len() % RECORD_BYTES == 0;
            let parts = v1::MappedParts { table: table.into(), crc32: Vec::new() };
            prop_assert_eq!(from_proto(&parts).map(Iterator::count).is_some(), whole);
        }
    }

    #[test]
    fn the_table_is_as_it_is_drawn() {
        let place = RecordPlace { length: 3, file: 4, offset: 5, entry: 6, version: 7, generation: 8 };
        let record = Record {
            item: 1,
            group: GroupId(2),
            shard: ShardId(9),
            status: PartStatus::Hit,
            reason: Some(MissReason::Late),
            place,
        };
        let table = to_proto(&[record], Vec::new()).table;
        let mut drawn = vec![1, 0, 0, 0, 2, 0, 9, 0, PartStatus::Hit.code(), MissReason::Late.code(), 0, 0, 3, 0, 0, 0];
        for word in 4..=8 {
            drawn.extend([word, 0, 0, 0, 0, 0, 0, 0]);
        }
        assert_eq!(table, drawn);
    }
}
