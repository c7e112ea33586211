//! What the tests of the directory share: small formats, digests by number, and an audit of everything that the directory
//! keeps twice.

use std::collections::HashMap;

use crate::block::{BlockMeta, NvmePlace, SlotRef};
use crate::checksum::ChunkSums;
use crate::format::{Format, Group, Rule, SizeRule, Topology};
use crate::ids::{
    BlockId, Digest, GroupId, Handle, InstanceId, Instant, Key, LeaseId, NamespaceId, RequestId, Revision, ShardId,
    TenantId, Version,
};
use crate::lease::{LeaseAsk, LeaseLimits};
use crate::policy::obstacle;
use crate::words::{Class, Fidelity, PolicyKind, RequestInfo};

use super::entry::{Entry, EntryId, Level};
use super::{Directory, DirectoryLimits, Inserted, Placed};

pub(crate) const HANDLE: Handle = Handle { namespace: NamespaceId(1), revision: Revision(1) };

/// Groups as (rule, keys per block, shards), one token per key.
pub(crate) fn format(groups: &[(Rule, u32, u16)]) -> Format {
    let group = |&(rule, tokens_per_block, shards): &(Rule, u32, u16)| Group {
        rule,
        tokens_per_block,
        shards,
        replicated: false,
        size: SizeRule::UpTo(4096),
    };
    let format = Format {
        model: "m".into(),
        dtype: "bf16".into(),
        layout: "l".into(),
        hash_algorithm: "h".into(),
        hash_seed: String::new(),
        tokens_per_key: 1,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: groups.iter().map(group).collect(),
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    };
    format.validate().unwrap();
    format
}

pub(crate) fn plain() -> Format {
    format(&[(Rule::All, 1, 1)])
}

pub(crate) fn digest(n: u32) -> Digest {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&u64::from(n).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    bytes[12..].copy_from_slice(&n.to_le_bytes());
    Digest::from_slice(&bytes).unwrap()
}

pub(crate) fn block(n: u32, group: u16, shard: u16) -> BlockId {
    BlockId { digest: digest(n), group: GroupId(group), shard: ShardId(shard) }
}

pub(crate) fn slot(n: u64) -> SlotRef {
    SlotRef::from_raw(n + 1).unwrap()
}

pub(crate) fn place(n: u64) -> NvmePlace {
    NvmePlace::from_raw(n + 1).unwrap()
}

pub(crate) fn meta(id: BlockId, position: u32, parent: Option<u32>) -> BlockMeta {
    BlockMeta {
        id,
        tenant: TenantId(0),
        handle: HANDLE,
        key: Key::new(b"k").unwrap(),
        version: Version(1),
        class: Class::Cache,
        keeper: crate::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position,
        parent: parent.map(digest),
        len: 100,
        sums: ChunkSums::default(),
    }
}

pub(crate) fn directory() -> Directory {
    Directory::new(DirectoryLimits::default(), PolicyKind::Lru)
}

pub(crate) fn small_leases() -> LeaseLimits {
    LeaseLimits { leases_per_instance: 3, positions_per_instance: 12, instances: 2, ..LeaseLimits::default() }
}

pub(crate) fn ask(instance: u8, request: &[u8], fresh: u64) -> LeaseAsk {
    LeaseAsk {
        instance: InstanceId([instance; 16]),
        request: RequestId::new(request).unwrap(),
        fresh: LeaseId(fresh),
        handle: HANDLE,
        ttl: std::time::Duration::from_secs(10),
    }
}

/// Puts all parts of position `n` of a chain 0, 1, 2 ... into DRAM (and on NVMe).
pub(crate) fn put(dir: &mut Directory, format: &Format, n: u32, parent: Option<u32>, position: u32, nvme: bool) {
    for (group, shard) in format.parts_at(position) {
        let id = BlockId { digest: digest(n), group, shard };
        let copy = u64::from(n) * 64 + u64::from(group.0) * 8 + u64::from(shard.0);
        let m = meta(id, position, parent);
        let stored = dir.insert(&m, format, Placed::Dram(slot(copy)), &RequestInfo::default(), Instant(1)).unwrap();
        assert_eq!(stored, Inserted::Stored);
        if nvme {
            assert!(dir.set_nvme(&id, Version(1), place(copy)));
        }
    }
}

/// A chain of positions `0..len`, digests the same.
pub(crate) fn put_chain(dir: &mut Directory, format: &Format, len: u32, nvme: bool) {
    for n in 0..len {
        put(dir, format, n, n.checked_sub(1), n, nvme);
    }
}

/// Recounts everything that the directory keeps twice, and checks that nothing evictable is forgotten.
pub(crate) fn audit(dir: &Directory) {
    let all: Vec<(EntryId, &Entry)> =
        (0..dir.slab.end()).filter_map(|i| dir.slab.live(i).map(|e| (EntryId(i), e))).collect();
    assert_eq!(all.len(), dir.slab.len() as usize);
    let mut children: HashMap<EntryId, (u32, [u32; 2])> = HashMap::new();
    for (id, e) in &all {
        assert_eq!(dir.slab.find(&e.digest), Some(*id));
        if let Some(parent) = e.parent.some() {
            let p = dir.slab.live(parent.0).expect("a parent is never vacant");
            assert!(p.position < e.position && p.home == e.home);
            let counts = children.entry(parent).or_default();
            counts.0 += 1;
            for level in Level::BOTH {
                counts.1[level as usize] += u32::from(e.resident(level));
            }
        }
    }
    let mut listed = [0; 2];
    let mut spare = [0; 2];
    let mut trim = 0;
    let mut leased = 0;
    for (id, e) in &all {
        let counts = children.get(id).copied().unwrap_or_default();
        assert_eq!((e.children, e.resident_children), counts, "{e:?}");
        assert!(!e.parts.is_empty() || e.children > 0 || e.leases > 0, "an entry that nothing needs: {e:?}");
        assert_eq!(e.has(Entry::DURABLE), e.class() == Class::Durable);
        assert_eq!(e.has(Entry::EXPIRES), dir.expiry_of.contains_key(&e.digest));
        let pins = dir.pins.get(&e.digest).copied().unwrap_or_default();
        assert_eq!(Entry::PINNED.map(|pinned| e.has(pinned)), pins.map(|n| n > 0));
        leased += u32::from(e.leases > 0);
        trim += u32::from(e.has(Entry::TRIM));
        for level in Level::BOTH {
            let l = level as usize;
            assert_eq!(e.resident(level), e.parts.as_slice().iter().any(|p| p.on(level)));
            spare[l] += u32::from(e.has(Entry::SPARE_LISTED[l]));
            listed[l] += u32::from(e.seat[l] != 0);
            if e.resident(level) {
                let kept = obstacle(&dir.slab, *id, level);
                assert!(e.seat[l] != 0 || kept.is_some(), "evictable but in no list of {level:?}: {e:?}");
            } else {
                assert_eq!(e.seat[l], 0);
            }
        }
    }
    assert_eq!(leased, dir.leased);
    assert_eq!(trim, dir.trim.len());
    assert_eq!(spare, [dir.spare[0].len(), dir.spare[1].len()]);
    for level in Level::BOTH {
        let mut walked = 0;
        dir.policy.hottest(&dir.slab, level, &mut |id| {
            assert!(dir.slab[id].resident(level));
            walked += 1;
            true
        });
        assert_eq!(walked, listed[level as usize]);
    }
    let mut counts: HashMap<EntryId, u32> = HashMap::new();
    for info in dir.leases(usize::MAX) {
        let lease = dir.leases.get(info.id).expect("listed");
        lease.positions.iter().for_each(|id| *counts.entry(id).or_default() += 1);
    }
    for (id, e) in &all {
        assert_eq!(e.leases, counts.get(id).copied().unwrap_or(0));
    }
    assert_eq!(dir.expiry.len(), dir.expiry_of.len());
}
