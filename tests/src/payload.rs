//! Keys, and bytes that follow from them: whoever knows a key knows what must be stored under it.

use bytes::Bytes;
use kvkeep_core::{GroupId, ShardId};

/// Key `n` of chain `chain`: 32 bytes, the chain in front so that `list` can ask for it.
pub fn key(chain: u64, n: u64) -> Bytes {
    let mut key = Vec::with_capacity(32);
    key.extend(chain.to_be_bytes());
    key.extend(n.to_be_bytes());
    key.extend(mix(chain ^ mix(n)).to_be_bytes());
    key.extend(mix(n ^ mix(chain)).to_be_bytes());
    key.into()
}

/// The first keys of a chain.
pub fn chain(chain: u64, keys: u64) -> Vec<Bytes> {
    (0..keys).map(|n| key(chain, n)).collect()
}

/// The bytes of a part: different for each key, group, shard and writer, and no two 8-byte words of it alike.
pub fn part(key: &[u8], group: GroupId, shard: ShardId, writer: u64, bytes: usize) -> Bytes {
    let start = key
        .iter()
        .fold(mix(writer ^ u64::from(group.0) << 32 ^ u64::from(shard.0) << 48), |h, b| mix(h ^ u64::from(*b)));
    let mut data = Vec::with_capacity(bytes + 8);
    let mut word = start;
    while data.len() < bytes {
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        data.extend(mix(word).to_le_bytes());
    }
    data.truncate(bytes);
    data.into()
}

/// The bytes of group 0, shard 0, as writer 0 makes them.
pub fn block(key: &[u8], bytes: usize) -> Bytes {
    part(key, GroupId(0), ShardId(0), 0, bytes)
}

/// Finalizer of splitmix64: a bijection that spreads every bit.
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
