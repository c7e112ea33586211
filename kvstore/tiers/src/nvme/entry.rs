//! What the index says of one block: the layout of its keys and values.

use kvkeep_core::block::{BlockMeta, NvmePlace};
use kvkeep_core::checksum::ChunkSums;
use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_core::ids::{BlockId, Digest, GroupId, Handle, Key, NamespaceId, Revision, ShardId, TenantId, Version};
use kvkeep_core::words::{Class, Fidelity, Keeper};

use super::header::Shape;
use super::place::{Extent, Place, Sequence, tag_of};

/// Version of the values this code writes, and the newest it reads.
pub const VALUE_VERSION: u8 = 1;
/// Bytes of a block's key in the index.
pub const INDEX_KEY_BYTES: usize = 28;

/// A block's key in the index, big-endian, so that a namespace, a revision and a position are each one range:
///
/// | at | size | field     |
/// |----|------|-----------|
/// |  0 |    4 | namespace |
/// |  4 |    4 | revision  |
/// |  8 |   16 | digest    |
/// | 24 |    2 | group     |
/// | 26 |    2 | shard     |
///
/// Records that are not blocks have keys of other lengths; `records.rs` draws them.
pub type IndexKey = [u8; INDEX_KEY_BYTES];

/// The key of a block.
pub fn index_key(handle: Handle, id: BlockId) -> IndexKey {
    let mut key = [0; INDEX_KEY_BYTES];
    key[..4].copy_from_slice(&handle.namespace.0.to_be_bytes());
    key[4..8].copy_from_slice(&handle.revision.0.to_be_bytes());
    key[8..24].copy_from_slice(id.digest.as_bytes());
    key[24..26].copy_from_slice(&id.group.0.to_be_bytes());
    key[26..].copy_from_slice(&id.shard.0.to_be_bytes());
    key
}

fn from_index_key(key: &IndexKey) -> (Handle, BlockId) {
    let u32_at = |at: usize| u32::from_be_bytes(*key[at..].first_chunk().expect("inside 28 bytes"));
    let u16_at = |at: usize| u16::from_be_bytes(*key[at..].first_chunk().expect("inside 28 bytes"));
    let handle = Handle { namespace: NamespaceId(u32_at(0)), revision: Revision(u32_at(4)) };
    let digest = Digest::from_slice(&key[8..24]).expect("sixteen bytes make a digest");
    (handle, BlockId { digest, group: GroupId(u16_at(24)), shard: ShardId(u16_at(26)) })
}

/// What the policy knew of a block when it was last written down; survives a restart roughly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heat {
    /// Accesses so far.
    pub accesses: u32,
    /// Seconds since the last access, at the time of writing.
    pub age_s: u32,
}

/// One block, as the index knows it: everything of [`BlockMeta`] but the sums, and its place.
///
/// # The value, little-endian
///
/// |   at | size | field                                                     |
/// |------|------|-----------------------------------------------------------|
/// |    0 |    1 | value version, 1                                          |
/// |    1 |    1 | class: the one that counts                                |
/// |    2 |    1 | fidelity                                                  |
/// |    3 |    1 | key length                                                |
/// |    4 |    4 | crc32 of the index key and this value, these four as zero |
/// |    8 |    8 | place (`NvmePlace`)                                       |
/// |   16 |    8 | sequence                                                  |
/// |   24 |    8 | version of the put                                        |
/// |   32 |    4 | raw length, bytes                                         |
/// |   36 |    4 | 4 KiB units of the extent                                 |
/// |   40 |    4 | tenant                                                    |
/// |   44 |    4 | index of the position in its chain                        |
/// |   48 |   16 | digest of the parent; zeros where there is none           |
/// |   64 |    4 | accesses                                                  |
/// |   68 |    4 | age, seconds                                              |
/// |   72 |    1 | flags: 1 = has a parent, 2 = kept for sessions only       |
/// |   73 |    7 | zeros                                                     |
/// |   80 |  1.. | key                                                       |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Which block.
    pub id: BlockId,
    /// Its namespace and revision.
    pub handle: Handle,
    /// Its isolation domain.
    pub tenant: TenantId,
    /// The engine's key.
    pub key: Key,
    /// Of the put that made the bytes.
    pub version: Version,
    /// The class that counts.
    pub class: Class,
    /// On whose word it stays, if it is durable.
    pub keeper: Keeper,
    /// Whether the bytes are those of the put.
    pub fidelity: Fidelity,
    /// Index of its position in its chain.
    pub position: u32,
    /// The position before it.
    pub parent: Option<Digest>,
    /// Raw payload, bytes.
    pub len: u32,
    /// Which put of this device wrote it.
    pub sequence: Sequence,
    /// Where it lies.
    pub place: NvmePlace,
    /// Its heat at the last checkpoint.
    pub heat: Heat,
}

const FIXED_BYTES: usize = 80;
const FLAG_PARENT: u8 = 1;
const FLAG_SESSIONS: u8 = 2;

/// Why a value is not an entry that may be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Written by a newer KVKeep.
    #[error("index value has version {0}, newer than {VALUE_VERSION}")]
    NewerVersion(u8),
    /// Its checksum does not hold, or it stands under another block's key.
    #[error("index value checksum")]
    Checksum,
    /// A field contradicts another one.
    #[error("index value field {0}")]
    Field(&'static str),
}

impl IndexEntry {
    /// As the directory takes it. The sums stand in the block's header and nowhere else.
    pub fn described(&self) -> BlockMeta {
        BlockMeta {
            id: self.id,
            tenant: self.tenant,
            handle: self.handle,
            key: self.key.clone(),
            version: self.version,
            class: self.class,
            keeper: self.keeper,
            fidelity: self.fidelity,
            position: self.position,
            parent: self.parent,
            len: self.len,
            sums: ChunkSums::default(),
        }
    }

    /// The entry of a block that was written to `extent` as the put `sequence`.
    pub fn new(meta: &BlockMeta, class: Class, extent: Extent, sequence: Sequence) -> Self {
        Self {
            id: meta.id,
            handle: meta.handle,
            tenant: meta.tenant,
            key: meta.key.clone(),
            version: meta.version,
            class,
            keeper: meta.keeper,
            fidelity: meta.fidelity,
            position: meta.position,
            parent: meta.parent,
            len: meta.len,
            sequence,
            place: Place::new(extent, sequence).pack(),
            heat: Heat::default(),
        }
    }

    /// Its key in the index.
    pub fn index_key(&self) -> IndexKey {
        index_key(self.handle, self.id)
    }

    /// Where the block's header and payload lie.
    pub fn extent(&self) -> Extent {
        let place = Place::unpack(self.place).expect("decode refuses any other, and a store makes no other");
        place.extent(Shape::of(self.len).units)
    }

    /// The value that stands under [`Self::index_key`].
    pub fn encode(&self) -> Vec<u8> {
        let key = self.key.as_bytes();
        let mut v = Vec::with_capacity(FIXED_BYTES + key.len());
        v.extend([VALUE_VERSION, self.class.code(), self.fidelity.code(), key.len() as u8]);
        v.extend([0; 4]);
        v.extend(self.place.raw().to_le_bytes());
        v.extend(self.sequence.0.to_le_bytes());
        v.extend(self.version.0.to_le_bytes());
        v.extend(self.len.to_le_bytes());
        v.extend(Shape::of(self.len).units.to_le_bytes());
        v.extend(self.tenant.0.to_le_bytes());
        v.extend(self.position.to_le_bytes());
        v.extend(self.parent.map_or([0; 16], |p| *p.as_bytes()));
        v.extend(self.heat.accesses.to_le_bytes());
        v.extend(self.heat.age_s.to_le_bytes());
        let parent = if self.parent.is_some() { FLAG_PARENT } else { 0 };
        let sessions = if self.keeper == Keeper::Sessions { FLAG_SESSIONS } else { 0 };
        v.extend([parent | sessions]);
        v.extend([0; 7]);
        debug_assert_eq!(v.len(), FIXED_BYTES);
        v.extend(key);
        let crc = checksum(&self.index_key(), &v);
        v[4..8].copy_from_slice(&crc.to_le_bytes());
        v
    }

    /// Reads the value that stood under `index_key`.
    pub fn decode(index_key: &IndexKey, value: &[u8]) -> Result<Self, EntryError> {
        use EntryError::Field;
        let version = *value.first().ok_or(Field("length"))?;
        if version > VALUE_VERSION {
            return Err(EntryError::NewerVersion(version));
        }
        let (fixed, key) = value.split_first_chunk::<FIXED_BYTES>().ok_or(Field("length"))?;
        let u32_at = |at: usize| u32::from_le_bytes(*fixed[at..].first_chunk().expect("inside the fixed part"));
        let u64_at = |at: usize| u64::from_le_bytes(*fixed[at..].first_chunk().expect("inside the fixed part"));
        if checksum(index_key, value) != u32_at(4) {
            return Err(EntryError::Checksum);
        }
        if version == 0 {
            return Err(Field("version"));
        }
        if key.len() != fixed[3] as usize {
            return Err(Field("key length"));
        }
        let (handle, id) = from_index_key(index_key);
        let len = u32_at(32);
        if len == 0 || u64::from(len) > BLOCK_BYTES_MAX {
            return Err(Field("raw length"));
        }
        if u32_at(36) != Shape::of(len).units {
            return Err(Field("units"));
        }
        let place = NvmePlace::from_raw(u64_at(8)).ok_or(Field("place"))?;
        let sequence = Sequence(u64_at(16));
        if Place::unpack(place).is_none_or(|p| p.tag != tag_of(sequence)) {
            return Err(Field("place"));
        }
        let parent = Digest::from_slice(&fixed[48..64]).expect("sixteen bytes make a digest");
        Ok(Self {
            id,
            handle,
            tenant: TenantId(u32_at(40)),
            key: Key::new(key).map_err(|_| Field("key length"))?,
            version: Version(u64_at(24)),
            class: Class::from_code(fixed[1]).ok_or(Field("class"))?,
            keeper: if fixed[72] & FLAG_SESSIONS == 0 { Keeper::Caller } else { Keeper::Sessions },
            fidelity: Fidelity::from_code(fixed[2]).ok_or(Field("fidelity"))?,
            position: u32_at(44),
            parent: (fixed[72] & FLAG_PARENT != 0).then_some(parent),
            len,
            sequence,
            place,
            heat: Heat { accesses: u32_at(64), age_s: u32_at(68) },
        })
    }
}

/// Over the index key too: a value that strayed under another block's key is not believed.
fn checksum(index_key: &IndexKey, value: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(index_key);
    h.update(&value[..4]);
    h.update(&[0; 4]);
    h.update(&value[8..]);
    h.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nvme::place::SegmentNo;
    use crate::nvme::testing::any_meta;

    fn any_entry() -> impl Strategy<Value = IndexEntry> {
        (any_meta(), any::<u64>(), 1u16.., 0u32..1 << 22, any::<(u32, u32)>()).prop_map(
            |(meta, sequence, seg, unit, h)| {
                let extent = Extent { segment: SegmentNo(seg), unit, units: 1 };
                let mut entry = IndexEntry::new(&meta, Class::Durable, extent, Sequence(sequence));
                entry.heat = Heat { accesses: h.0, age_s: h.1 };
                entry
            },
        )
    }

    proptest! {
        #[test]
        fn an_entry_reads_back_as_it_was_written(entry in any_entry()) {
            prop_assert_eq!(IndexEntry::decode(&entry.index_key(), &entry.encode()), Ok(entry));
        }

        #[test]
        fn a_flipped_bit_is_refused(entry in any_entry(), at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let mut value = entry.encode();
            let at = at.index(value.len());
            value[at] ^= 1u8 << bit;
            prop_assert!(IndexEntry::decode(&entry.index_key(), &value).is_err());
        }

        #[test]
        fn a_value_under_another_blocks_key_is_refused(entry in any_entry(), at in 0..INDEX_KEY_BYTES) {
            let mut key = entry.index_key();
            key[at] ^= 1;
            prop_assert_eq!(IndexEntry::decode(&key, &entry.encode()), Err(EntryError::Checksum));
        }

        #[test]
        fn arbitrary_bytes_never_panic(key: [u8; INDEX_KEY_BYTES], value in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = IndexEntry::decode(&key, &value);
        }
    }

    #[test]
    fn blocks_of_one_position_stand_together() {
        let handle = Handle { namespace: NamespaceId(1), revision: Revision(2) };
        let id = |d: u8, g, s| BlockId {
            digest: Digest::from_slice(&[d; 16]).unwrap(),
            group: GroupId(g),
            shard: ShardId(s),
        };
        let keys = [
            index_key(handle, id(1, 0, 0)),
            index_key(handle, id(1, 0, 1)),
            index_key(handle, id(1, 1, 0)),
            index_key(handle, id(2, 0, 0)),
            index_key(Handle { revision: Revision(3), ..handle }, id(0, 0, 0)),
            index_key(Handle { namespace: NamespaceId(256), ..handle }, id(0, 0, 0)),
        ];
        assert!(keys.is_sorted());
    }
}
