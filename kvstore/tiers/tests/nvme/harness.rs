//! Blocks whose bytes follow from their name, and rigs: a store on a simulated disk and an index in memory, and what is
//! left of them after a cut.

use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::block::{BlockMeta, NvmePlace};
use kvkeep_core::checksum::ChunkSums;
use kvkeep_core::error::Result;
use kvkeep_core::ids::Version;
use kvkeep_core::ids::{BlockId, DigestKey, GroupId, Handle, Key, KeyDomain, NamespaceId, Revision, ShardId, TenantId};
use kvkeep_core::words::{Class, Fidelity};
use kvkeep_tiers::io::sim::Dice;
use kvkeep_tiers::io::{FlushCoordinator, IoBuf, SimDisk};
use kvkeep_tiers::nvme::config::{SyncPlan, SyncPoint, segment_name};
use kvkeep_tiers::nvme::{
    BlockCopy, Expect, IndexEntry, Keep, MemIndex, NvmeConfig, NvmeStore, OpenReport, Read, SegmentNo, padded,
};

/// Bytes of a segment of a rig.
pub const SEGMENT_BYTES: u64 = 256 * 1024;

/// A block: what it is, and its bytes.
#[derive(Clone)]
pub struct Block {
    pub meta: BlockMeta,
    pub bytes: Vec<u8>,
}

/// Block `n` as put `version` made it, `len` bytes.
pub fn block(n: u32, version: u64, len: u32, class: Class) -> Block {
    let handle = Handle { namespace: NamespaceId(1), revision: Revision(1) };
    let key = n.to_le_bytes();
    let mut dice = Dice::new(version ^ u64::from(n) << 32);
    let bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| dice.next_u64().to_le_bytes()).take(len as usize).collect();
    let meta = BlockMeta {
        id: BlockId {
            digest: DigestKey::from_bytes([7; 16]).digest(KeyDomain(0), handle, &key),
            group: GroupId(0),
            shard: ShardId(0),
        },
        tenant: TenantId(3),
        handle,
        key: Key::new(&key).unwrap(),
        version: Version(version),
        class,
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position: n,
        parent: None,
        len,
        sums: ChunkSums::of(&bytes),
    };
    Block { meta, bytes }
}

impl Block {
    pub fn buffer(&self) -> IoBuf {
        let mut buf = IoBuf::alloc(padded(self.meta.len));
        buf.as_mut_slice()[..self.bytes.len()].copy_from_slice(&self.bytes);
        buf
    }

    pub fn expect(&self) -> Expect {
        Expect {
            id: self.meta.id,
            handle: self.meta.handle,
            key: Some(self.meta.key.clone()),
            version: self.meta.version,
            len: self.meta.len,
        }
    }

    pub fn copy_at(&self, place: NvmePlace) -> BlockCopy {
        BlockCopy { handle: self.meta.handle, id: self.meta.id, place }
    }

    pub async fn put(&self, store: &NvmeStore) -> Result<NvmePlace> {
        store.put(&self.meta, self.buffer(), false).await
    }

    /// Reads it; panics if what is called right is not every byte that was put.
    pub async fn get(&self, store: &NvmeStore, place: NvmePlace) -> Read {
        let read = store.get(&self.expect(), place, IoBuf::alloc(padded(self.meta.len))).await;
        if let Read::Ok { meta, payload } = &read {
            assert_eq!(**meta, self.meta, "meta of a read that was called right");
            assert!(payload.as_slice()[..self.bytes.len()] == self.bytes[..], "WRONG BYTES of {:?}", self.meta.id);
        }
        read
    }

    pub async fn must_read(&self, store: &NvmeStore, place: NvmePlace) {
        let read = self.get(store, place).await;
        assert!(matches!(read, Read::Ok { .. }), "block {} is {read:?}", self.meta.position);
    }

    pub fn entry(&self, store: &NvmeStore) -> Option<IndexEntry> {
        store.entry(self.meta.handle, self.meta.id).unwrap()
    }
}

/// A simulated device.
pub struct Rig {
    pub disk: SimDisk,
    pub index: Arc<MemIndex>,
    pub config: NvmeConfig,
}

impl Rig {
    /// With room for `segments` segments of [`SEGMENT_BYTES`].
    pub fn new(segments: u64, seed: u64) -> Self {
        let capacity = segments * SEGMENT_BYTES;
        let config = NvmeConfig {
            segment_bytes: SEGMENT_BYTES,
            keep_free_bytes: 0,
            clock: Arc::new(|| Duration::ZERO),
            ..NvmeConfig::new(None, capacity)
        };
        Self { disk: SimDisk::new(2 * capacity, seed), index: Arc::new(MemIndex::new()), config }
    }

    /// Leaves one sync out.
    pub fn without(mut self, skip: SyncPoint) -> Self {
        self.config.sync_plan = SyncPlan { skip: Some(skip) };
        self
    }

    pub fn try_open_with(&self, visit: &mut dyn FnMut(&IndexEntry) -> Keep) -> Result<(NvmeStore, OpenReport)> {
        let disk = Arc::new(FlushCoordinator::new(self.disk.clone()));
        NvmeStore::open(self.config.clone(), disk, Arc::clone(&self.index) as _, visit)
    }

    pub fn open(&self) -> NvmeStore {
        self.open_with(&mut |_| Keep::Yes).0
    }

    pub fn open_with(&self, visit: &mut dyn FnMut(&IndexEntry) -> Keep) -> (NvmeStore, OpenReport) {
        let (store, report) = self.try_open_with(visit).unwrap();
        check(&store);
        (store, report)
    }

    /// The power fails: of what was not flushed or synced, a seeded part is gone. `store` is the last handle.
    pub fn cut(&mut self, store: NvmeStore, seed: u64) {
        let mut dice = Dice::new(seed);
        self.disk = self.disk.cut(dice.next_u64());
        drop(store);
        let at_stake = self.index.unsynced() as u64;
        self.index.cut(dice.below(at_stake + 1) as usize);
    }

    /// The power fails: of the index everything that was not synced is gone, of the device a seeded part of what was not
    /// flushed.
    pub fn cut_index_short(&mut self, store: NvmeStore, seed: u64) {
        self.disk = self.disk.cut(seed);
        drop(store);
        self.index.cut(0);
    }

    /// The process ends without a word; the machine goes on.
    pub fn kill(&mut self, store: NvmeStore, seed: u64) {
        self.disk = self.disk.kill(seed);
        drop(store);
    }
}

/// Waits until the index thread has done what it does after it has answered.
pub async fn settle(store: &NvmeStore) {
    store.set_heat(&[]).await.unwrap();
}

/// What must hold of a store at any moment when nothing is in flight.
pub fn check(store: &NvmeStore) {
    store.check_space().unwrap();
    let u = store.usage();
    assert_eq!(u.free_bytes + u.used_bytes + u.leaving_bytes + u.quarantined_bytes, u.segment_bytes, "{u:?}");
    assert_eq!(u.payload_bytes + u.overhead_bytes, u.used_bytes, "blocks and used space differ: {u:?}");
}

pub fn first_segment() -> String {
    segment_name(SegmentNo(1))
}
