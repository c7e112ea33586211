//! Blocks for the unit tests of this folder.

use kvkeep_core::block::BlockMeta;
use kvkeep_core::checksum::ChunkSums;
use kvkeep_core::ids::{BlockId, Digest, GroupId, Handle, Key, NamespaceId, Revision, ShardId, TenantId, Version};
use kvkeep_core::words::{Class, Fidelity};
use proptest::prelude::*;

/// Any block of up to 300,000 bytes, with sums that belong to no bytes in particular.
pub fn any_meta() -> impl Strategy<Value = BlockMeta> {
    let ids = (any::<[u8; 16]>(), any::<[u16; 2]>(), any::<[u32; 3]>(), prop::collection::vec(any::<u8>(), 1..=128));
    let rest =
        (any::<u64>(), 0usize..3, 0usize..2, any::<u32>(), any::<Option<[u8; 16]>>(), 1u32..300_000, any::<u32>());
    (ids, rest).prop_map(
        |((digest, [g, s], [t, n, r], key), (version, class, fidelity, position, parent, len, seed))| {
            let sums: Vec<u32> =
                (0..ChunkSums::count_for(len as usize) as u32).map(|i| seed.wrapping_mul(2 * i + 1)).collect();
            BlockMeta {
                id: BlockId { digest: digest_of(&digest), group: GroupId(g), shard: ShardId(s) },
                tenant: TenantId(t),
                handle: Handle { namespace: NamespaceId(n), revision: Revision(r) },
                key: Key::new(&key).unwrap(),
                version: Version(version),
                class: Class::ALL[class],
                keeper: kvkeep_core::words::Keeper::Caller,
                fidelity: Fidelity::ALL[fidelity],
                position,
                parent: parent.map(|p| digest_of(&p)),
                len,
                sums: ChunkSums::from_slice(&sums),
            }
        },
    )
}

fn digest_of(bytes: &[u8; 16]) -> Digest {
    Digest::from_slice(bytes).unwrap()
}

/// A block of these bytes.
pub fn meta_of(bytes: &[u8]) -> BlockMeta {
    BlockMeta {
        id: BlockId { digest: digest_of(&[9; 16]), group: GroupId(0), shard: ShardId(0) },
        tenant: TenantId(0),
        handle: Handle { namespace: NamespaceId(1), revision: Revision(1) },
        key: Key::new(b"key").unwrap(),
        version: Version(1),
        class: Class::Cache,
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position: 0,
        parent: None,
        len: u32::try_from(bytes.len()).unwrap(),
        sums: ChunkSums::of(bytes),
    }
}
