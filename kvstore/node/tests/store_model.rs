//! The store of a node against a model of fifty lines: under random puts, gets, matches, removals, new revisions and
//! restarts, with a working set several times the arena, a hit is always the bytes of one put under that key, and what was
//! acknowledged durable stays until it is removed.

#![expect(clippy::unwrap_used, reason = "in a test an unwrap is an assertion")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::{
    BlockId, Class, ErrorKind, Fidelity, Format, Group, GroupId, Handle, InstanceId, Key, RequestId, RequestInfo, Rule,
    ShardId, SizeRule, TenantId, Topology,
};
use kvkeep_node::config::Config;
use kvkeep_node::size::ByteSize;
use kvkeep_node::store::Store;
use kvkeep_node::store::get::{Compare, Fetched, PartRead};
use kvkeep_node::store::lookup::MatchWish;
use kvkeep_node::store::put::{Caller, PartAnswer, PartWish, PositionWish, ReserveWish};
use proptest::prelude::*;

const CHAINS: u8 = 6;
const CHAIN_LEN: u8 = 24;
const BLOCK: u32 = 1 << 20;
const NVME: ByteSize = ByteSize::mib(512);
const CALLER: Caller = Caller { instance: InstanceId([7; 16]), tenant: TenantId(0) };

#[derive(Clone, Debug)]
enum Op {
    Put { chain: u8, index: u8, writer: u8, durable: bool },
    Get { chain: u8, index: u8 },
    Match { chain: u8 },
    Remove { chain: u8, index: u8 },
    Advance,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let at = (0..CHAINS, 0..CHAIN_LEN);
    prop_oneof![
        30 => (at.clone(), any::<u8>(), prop::bool::weighted(0.15))
            .prop_map(|((chain, index), writer, durable)| Op::Put { chain, index, writer, durable }),
        20 => at.clone().prop_map(|(chain, index)| Op::Get { chain, index }),
        8 => (0..CHAINS).prop_map(|chain| Op::Match { chain }),
        3 => at.prop_map(|(chain, index)| Op::Remove { chain, index }),
        1 => Just(Op::Advance),
        2 => Just(Op::Restart),
    ]
}

fn format() -> Format {
    Format {
        model: "model".into(),
        dtype: "bf16".into(),
        layout: "test".into(),
        hash_algorithm: "test".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 1,
            replicated: false,
            size: SizeRule::UpTo(u64::from(BLOCK)),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

fn key(chain: u8, index: u8) -> Key {
    Key::new(&[b'k', chain, index]).unwrap()
}

fn bytes(chain: u8, index: u8, writer: u8, revision: u32) -> Vec<u8> {
    let mut seed = u64::from_le_bytes([chain, index, writer, revision as u8, 1, 2, 3, 4]);
    let len = BLOCK as usize - usize::from(writer) * 100;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(seed ^ seed >> 29).to_le_bytes());
    }
    out.truncate(len);
    out
}

fn config(dir: &Path, nvme: ByteSize) -> Config {
    let mut c = Config { data_dir: dir.join("data"), ..Config::default() };
    c.arena.dir = dir.join("arena");
    c.arena.bytes = ByteSize::mib(64);
    c.nvme.bytes = nvme;
    c.nvme.keep_free_bytes = ByteSize::mib(1);
    c.resolve().unwrap()
}

async fn open(dir: &Path, nvme: ByteSize) -> Arc<Store> {
    let config = config(dir, nvme);
    let (store, background) = tokio::task::spawn_blocking(move || Store::open(config)).await.unwrap().unwrap();
    store.start(background);
    store
}

/// What was acknowledged: per key the writer whose bytes are kept, and whether they are durable.
type Model = BTreeMap<(u8, u8), (u8, bool)>;

struct World {
    /// `None` only while it restarts.
    store: Option<Arc<Store>>,
    handle: Handle,
    model: Model,
}

impl World {
    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("it is open between steps")
    }

    fn id(&self, chain: u8, index: u8) -> BlockId {
        let digest = self.store().digests(CALLER, self.handle, [key(chain, index).as_bytes()])[0];
        BlockId { digest, group: GroupId(0), shard: ShardId(0) }
    }

    async fn put(&mut self, chain: u8, index: u8, writer: u8, durable: bool) {
        let data = bytes(chain, index, writer, self.handle.revision.0);
        let class = if durable { Class::Durable } else { Class::Cache };
        let wish = ReserveWish {
            keeper: kvkeep_core::words::Keeper::Caller,
            handle: self.handle,
            request: RequestId::default(),
            info: RequestInfo::default(),
            parent: index.checked_sub(1).map(|before| key(chain, before)),
            first_position: u32::from(index),
            positions: vec![PositionWish {
                key: key(chain, index),
                parts: vec![PartWish { group: GroupId(0), shard: ShardId(0), len: data.len() as u32 }],
                token_ids: Arc::default(),
            }],
            unordered: false,
            class,
            fidelity: Fidelity::Exact,
            keep: false,
            bytes_max: 0,
            ttl: None,
        };
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let reserves = self.store().reserve(CALLER, wish, deadline).await.unwrap();
        if let Some(lease) = reserves.lease {
            // It holds what is present until the append that the put serves is answered; none is.
            assert_eq!(self.store().release(CALLER, &[lease], &[]), 1);
        }
        let (id, brings_bytes) = match reserves.answers.as_slice() {
            [PartAnswer::Slot(id)] => (*id, true),
            [PartAnswer::Upgrade(id)] => (*id, false),
            [PartAnswer::Present { class: reached, .. }] => {
                assert!(*reached >= class, "present below the class that was asked for");
                let known = self.model.get(&(chain, index)).expect("present and never acknowledged");
                assert!(
                    *reached < Class::Durable || known.1,
                    "durable and never acknowledged as such: {chain}/{index}"
                );
                return;
            }
            other => panic!("unexpected answer {other:?}"),
        };
        if brings_bytes {
            let mut w = self.store().writer(CALLER);
            for (i, chunk) in data.chunks(300_000).enumerate() {
                w.chunk(id, i as u64 * 300_000, chunk).unwrap();
            }
            assert!(w.finish().results.iter().all(|r| r.error.is_none()));
        }
        let committed = self.store().commit(CALLER, RequestInfo::default(), vec![(id, Vec::new())]).await;
        match &committed[0].1 {
            Ok(c) => {
                assert!(!c.superseded, "nobody else writes");
                let kept = self.model.entry((chain, index)).or_insert((writer, durable));
                if brings_bytes {
                    kept.0 = writer;
                }
                kept.1 |= durable;
            }
            // It may have been evicted between the two steps; nothing was acknowledged then.
            Err(e) => assert!(!brings_bytes || e.kind() == ErrorKind::Full, "{e}"),
        }
    }

    async fn get(&self, chain: u8, index: u8) -> bool {
        let read = PartRead {
            id: self.id(chain, index),
            key: key(chain, index),
            offset: 0,
            length: 0,
            version: None,
            fidelity: Fidelity::Exact,
        };
        match (self.store().fetch(CALLER, self.handle, read, Compare::All).await, self.model.get(&(chain, index))) {
            (Fetched::Hit { part, .. }, Some((writer, _))) => {
                assert!(
                    *part == *bytes(chain, index, *writer, self.handle.revision.0),
                    "wrong bytes for {chain}/{index}"
                );
                true
            }
            (Fetched::Hit { .. }, None) => panic!("a hit on what was never put, or was removed: {chain}/{index}"),
            (Fetched::No(status, reason), Some((_, true))) => {
                panic!("durable {chain}/{index} is lost: {status} {reason}")
            }
            (Fetched::No(..), _) => false,
            (Fetched::Bad(e), _) => panic!("{e}"),
        }
    }

    async fn match_chain(&self, chain: u8) {
        let keys: Vec<_> = (0..CHAIN_LEN).map(|i| key(chain, i)).collect();
        let wish = MatchWish {
            request_id: RequestId::new(&[chain]).unwrap(),
            handle: self.handle,
            digests: self.store().digests(CALLER, self.handle, keys.iter().map(Key::as_bytes)),
            lease: Some(Duration::from_secs(30)),
            promote: false,
            statuses: false,
            fidelity: Fidelity::Exact,
        };
        let matched = self.store().match_chain(CALLER, &RequestInfo::default(), &wish).unwrap();
        for index in 0..matched.outcome.boundary_positions as u8 {
            assert!(self.get(chain, index).await, "a leased position inside the boundary is readable: {chain}/{index}");
        }
        if let Some((lease, _)) = matched.lease {
            assert_eq!(self.store().release(CALLER, &[lease], &[]), 1);
        }
    }

    async fn step(&mut self, dir: &Path, op: &Op) {
        match *op {
            Op::Put { chain, index, writer, durable } => self.put(chain, index, writer, durable).await,
            Op::Get { chain, index } => drop(self.get(chain, index).await),
            Op::Match { chain } => self.match_chain(chain).await,
            Op::Remove { chain, index } => {
                let digest = self.id(chain, index).digest;
                self.store().remove(&[digest]).await;
                self.model.remove(&(chain, index));
            }
            Op::Advance => {
                let digest = format!("weights-{}", self.handle.revision.0 + 1);
                let old = self.handle;
                self.handle = self.store().advance_revision(CALLER, old, digest).await.unwrap();
                assert_ne!(self.handle.revision, old.revision);
                self.model.clear();
            }
            Op::Restart => {
                let old = self.store.take().expect("it was open");
                old.close().await;
                let stopped = Arc::downgrade(&old);
                drop(old);
                // The old one lets go of its locks when its last task has ended.
                while stopped.strong_count() > 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                self.store = Some(open(dir, NVME).await);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_store_agrees_with_the_model(ops in proptest::collection::vec(op(), 40..160)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        runtime.block_on(async {
            let store = open(dir.path(), NVME).await;
            let registered =
                store.register_namespace(CALLER, "model".into(), format(), "weights-1".into(), false).await.unwrap();
            let mut world =
                World { store: Some(store), handle: registered.namespace.handle(), model: Model::new() };
            for op in &ops {
                world.step(dir.path(), op).await;
            }
            for (chain, index) in world.model.keys().copied().collect::<Vec<_>>() {
                world.get(chain, index).await;
            }
            let stats = world.store().stats();
            assert_eq!((stats.reservations, stats.leases, stats.leased_positions), (0, 0, 0), "nothing leaks");
            world.store().close().await;
        });
    }
}

/// Fills NVMe with durable blocks, so that raising one more fails: the block stays what it was acknowledged as, and the
/// next put that wants it durable is not told that it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_class_that_could_not_be_raised_is_not_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), ByteSize::mib(64)).await;
    let registered =
        store.register_namespace(CALLER, "full".into(), format(), "weights-1".into(), false).await.unwrap();
    let mut world = World { store: Some(store), handle: registered.namespace.handle(), model: Model::new() };
    for n in 0..80 {
        world.put(n / CHAIN_LEN, n % CHAIN_LEN, 0, true).await;
    }
    assert!(world.model.len() < 80, "NVMe is full");
    for _ in 0..2 {
        world.put(5, 0, 0, false).await;
        world.put(5, 0, 0, true).await;
        assert_eq!(world.model.get(&(5, 0)), Some(&(0, false)), "not durable");
    }
    world.store().close().await;
}
