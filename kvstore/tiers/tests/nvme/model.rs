//! Random operations, cuts and restarts against a small model: what was acknowledged durable is there and right, what was
//! freed is gone, nothing wrong is ever returned, and every unit is accounted for.

use std::collections::BTreeMap;

use kvkeep_core::block::NvmePlace;
use kvkeep_core::error::ErrorKind;
use kvkeep_core::words::Class;
use kvkeep_tiers::nvme::{NvmeStore, Read};
use proptest::prelude::*;

use crate::harness::{Block, Rig, block, check, settle};

const BLOCKS: u32 = 10;
const SEGMENTS: u64 = 4;

#[derive(Clone, Debug)]
pub enum Step {
    Put { n: u32, len: u32, class: Class, durable: bool },
    Get { n: u32 },
    GetDead { pick: prop::sample::Index },
    Free { n: Vec<u32> },
    Class { n: u32, class: Class },
    FlushAll,
    Scrub,
    Cut { seed: u64 },
    Kill { seed: u64 },
    Restart,
}

pub fn steps(max: usize) -> impl Strategy<Value = Vec<Step>> {
    let n = || 0..BLOCKS;
    let class = || prop::sample::select(Class::ALL);
    let len = prop_oneof![1u32..4000, 1u32..70_000, 1u32..250_000];
    let step = prop_oneof![
        8 => (n(), len, class(), any::<bool>()).prop_map(|(n, len, class, d)| Step::Put { n, len, class, durable: d }),
        4 => n().prop_map(|n| Step::Get { n }),
        2 => any::<prop::sample::Index>().prop_map(|pick| Step::GetDead { pick }),
        3 => prop::collection::vec(n(), 1..4).prop_map(|n| Step::Free { n }),
        2 => (n(), class()).prop_map(|(n, class)| Step::Class { n, class }),
        1 => Just(Step::FlushAll),
        1 => Just(Step::Scrub),
        2 => any::<u64>().prop_map(|seed| Step::Cut { seed }),
        1 => any::<u64>().prop_map(|seed| Step::Kill { seed }),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..max)
}

/// A block as the store acknowledged it.
#[derive(Clone)]
struct Stored {
    block: Block,
    place: NvmePlace,
    class: Class,
    /// Its bytes were flushed.
    safe: bool,
}

#[derive(Default)]
pub struct Model {
    now: BTreeMap<u32, Stored>,
    /// For each block what it was when the index was last known to be synced, and everything it has been since.
    possible: BTreeMap<u32, Vec<Option<Stored>>>,
    dead: Vec<(Block, NvmePlace)>,
    versions: u64,
}

impl Model {
    fn set(&mut self, n: u32, stored: Option<Stored>) {
        self.possible.entry(n).or_insert_with(|| vec![None]).push(stored.clone());
        let old = match stored {
            Some(s) => self.now.insert(n, s),
            None => self.now.remove(&n),
        };
        self.dead.extend(old.map(|s| (s.block, s.place)));
    }

    fn synced(&mut self) {
        self.possible = (0..BLOCKS).map(|n| (n, vec![self.now.get(&n).cloned()])).collect();
    }

    /// One step of a life. The caller does cuts and restarts.
    pub async fn step(&mut self, store: &NvmeStore, step: Step) {
        match step {
            Step::Put { n, len, class, durable } => {
                self.versions += 1;
                let block = block(n, self.versions, len, class);
                match store.put(&block.meta, block.buffer(), durable).await {
                    Ok(place) => {
                        let old = self.now.get(&n).map(|s| s.class);
                        let safe = durable || class == Class::Durable || old == Some(Class::Durable);
                        let class = old.map_or(class, |c| c.max(class));
                        self.set(n, Some(Stored { block, place, class, safe }));
                        if safe {
                            self.synced();
                        }
                    }
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Full, "{e}"),
                }
            }
            Step::Get { n } => {
                if let Some(s) = self.now.get(&n) {
                    s.block.must_read(store, s.place).await;
                }
            }
            Step::GetDead { pick } => {
                if !self.dead.is_empty() {
                    let (block, place) = &self.dead[pick.index(self.dead.len())];
                    let read = block.get(store, *place).await;
                    assert!(matches!(read, Read::Stale), "a dead place is {read:?}");
                }
            }
            Step::Free { n } => {
                let stored: Vec<_> = n.iter().filter_map(|n| self.now.get(n)).collect();
                let copies: Vec<_> = stored.iter().map(|s| s.block.copy_at(s.place)).collect();
                let mut distinct = n.clone();
                distinct.sort_unstable();
                distinct.dedup();
                let there = distinct.iter().filter(|n| self.now.contains_key(n)).count();
                assert_eq!(store.free(&copies).await.unwrap(), there as u64);
                for n in distinct {
                    self.set(n, None);
                }
                if there > 0 {
                    self.synced();
                }
            }
            Step::Class { n, class } => {
                if let Some(s) = self.now.get(&n).cloned() {
                    let rises = class > s.class;
                    assert_eq!(
                        store
                            .set_class(&[s.block.copy_at(s.place)], class, kvkeep_core::words::Keeper::Caller)
                            .await
                            .unwrap(),
                        u64::from(rises)
                    );
                    let safe = s.safe || class == Class::Durable;
                    let next = Stored { class: s.class.max(class), safe, ..s };
                    self.now.insert(n, next.clone());
                    self.possible.entry(n).or_insert_with(|| vec![None]).push(Some(next));
                    if class == Class::Durable {
                        self.synced();
                    }
                }
            }
            Step::FlushAll => {
                store.flush_all().await.unwrap();
                self.now.values_mut().for_each(|s| s.safe = true);
                self.synced();
            }
            Step::Scrub => {
                let mut cursor = None;
                let mut checked = 0;
                loop {
                    let report = store.scrub(cursor, 3).await.unwrap();
                    assert_eq!(report.faults, []);
                    checked += report.checked;
                    cursor = report.next;
                    if cursor.is_none() {
                        break;
                    }
                }
                assert_eq!(checked, self.now.len() as u64);
            }
            Step::Cut { .. } | Step::Kill { .. } | Step::Restart => unreachable!("done by the caller"),
        }
        settle(store).await;
        let u = store.usage();
        assert_eq!((u.entries, u.quarantined_bytes, u.poisoned), (self.now.len() as u64, 0, false));
        check(store);
    }

    /// After a cut: each block is something it may be, and if its bytes were flushed they are there.
    pub async fn after_cut(&mut self, store: &NvmeStore) {
        for (n, possible) in std::mem::take(&mut self.possible) {
            let entry = block(n, 0, 1, Class::Cache).entry(store);
            let found = possible
                .into_iter()
                .rev()
                .find(|p| match (p, &entry) {
                    (None, None) => true,
                    (Some(p), Some(e)) => (p.place, p.block.meta.version, p.class) == (e.place, e.version, e.class),
                    _ => false,
                })
                .unwrap_or_else(|| panic!("block {n} came back as something it never was, or was lost: {entry:?}"));
            self.now.remove(&n);
            let Some(stored) = found else { continue };
            match stored.block.get(store, stored.place).await {
                Read::Ok { .. } => drop(self.now.insert(n, stored)),
                Read::Stale if !stored.safe => {
                    assert!(stored.block.entry(store).is_none(), "a stale entry stays");
                    self.dead.push((stored.block, stored.place));
                }
                other => panic!("block {n}, flushed: {}, is {other:?} after the cut", stored.safe),
            }
        }
        // A place may be in use again that was dead before the cut.
        self.dead.retain(|(_, place)| self.now.values().all(|s| s.place != *place));
        self.synced();
        let u = store.usage();
        assert_eq!((u.entries, u.quarantined_bytes), (self.now.len() as u64, 0));
        check(store);
    }

    /// After the end of the process alone: nothing that was acknowledged is gone.
    pub async fn after_kill(&mut self, store: &NvmeStore) {
        self.synced();
        self.after_cut(store).await;
    }

    /// After an orderly end everything is as it was.
    pub async fn after_restart(&mut self, store: &NvmeStore) {
        self.now.values_mut().for_each(|s| s.safe = true);
        self.synced();
        self.after_cut(store).await;
    }
}

async fn run(steps: Vec<Step>, seed: u64) {
    let mut rig = Rig::new(SEGMENTS, seed);
    let mut store = rig.open();
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Cut { seed } => {
                rig.cut(store, seed);
                store = rig.open();
                model.after_cut(&store).await;
            }
            Step::Kill { seed } => {
                // Batches reach the kernel when they are written; only the power can take them.
                rig.kill(store, seed);
                store = rig.open();
                model.after_kill(&store).await;
            }
            Step::Restart => {
                store.close().await.unwrap();
                drop(store);
                store = rig.open();
                model.after_restart(&store).await;
            }
            step => model.step(&store, step).await,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn a_store_over_cuts_and_restarts_is_what_the_model_says(steps in steps(60), seed: u64) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(run(steps, seed));
    }
}
