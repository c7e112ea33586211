//! Random operations against a model that remembers what every slot must hold.

use std::collections::HashMap;

use kvkeep_core::SlotRef;
use kvkeep_core::ids::TenantId;
use kvkeep_tiers::dram::{Arena, ArenaUsage, Pinned, Purpose, Reserved};
use kvkeep_tiers::io::buf::IoBuf;
use proptest::prelude::*;

use crate::common::{assert_adds_up, assert_holds, config, folder, meta, open_empty, payload, put, reserve};

/// Lengths that meet the corners: below a unit, whole units, one byte over, several sums, the largest.
const LENS: &[usize] = &[1, 1000, 4096, 4097, 20_000, 65_536, 65_537, 131_072, 300_000, 524_288];

#[derive(Clone, Debug)]
enum Op {
    Reserve { tenant: u32, len: usize, purpose: usize },
    Publish(usize),
    Abandon(usize),
    AbandonWithBufferOut(usize),
    Pin(usize),
    CloneIntoBytes(usize),
    Unpin(usize),
    DropBuffer(usize),
    Free(usize),
    Quarantine(usize),
    UseStale(usize),
    Reclaim { tenant: u32, len: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let any = any::<usize>();
    let len = (0..LENS.len()).prop_map(|i| LENS[i]);
    prop_oneof![
        8 => (0..3u32, len.clone(), 0..5usize).prop_map(|(tenant, len, purpose)| Op::Reserve { tenant, len, purpose }),
        8 => any.prop_map(Op::Publish),
        1 => any.prop_map(Op::Abandon),
        1 => any.prop_map(Op::AbandonWithBufferOut),
        3 => any.prop_map(Op::Pin),
        1 => any.prop_map(Op::CloneIntoBytes),
        3 => any.prop_map(Op::Unpin),
        1 => any.prop_map(Op::DropBuffer),
        4 => any.prop_map(Op::Free),
        1 => any.prop_map(Op::Quarantine),
        2 => any.prop_map(Op::UseStale),
        1 => (0..3u32, len).prop_map(|(tenant, len)| Op::Reclaim { tenant, len }),
    ]
}

struct Block {
    n: u64,
    tenant: TenantId,
    len: usize,
}

#[derive(Default)]
struct Model {
    /// Payload by number of the block.
    written: Vec<Vec<u8>>,
    reserved: Vec<(u64, Reserved)>,
    live: HashMap<SlotRef, Block>,
    /// Pins outlive what they pin.
    pins: Vec<(u64, Pinned)>,
    bytes: Vec<(u64, usize, bytes::Bytes)>,
    buffers: Vec<IoBuf>,
    stale: Vec<SlotRef>,
}

fn pick<T>(from: &mut Vec<T>, n: usize) -> Option<T> {
    if from.is_empty() { None } else { Some(from.swap_remove(n % from.len())) }
}

impl Model {
    fn slot(&self, n: usize) -> Option<SlotRef> {
        let mut slots: Vec<SlotRef> = self.live.keys().copied().collect();
        slots.sort_unstable();
        (!slots.is_empty()).then(|| slots[n % slots.len()])
    }

    fn gone(&mut self, slot: SlotRef) {
        self.live.remove(&slot);
        self.stale.push(slot);
    }

    fn apply(&mut self, arena: &Arena, op: &Op) {
        const PURPOSES: [Purpose; 5] =
            [Purpose::Put, Purpose::Promote, Purpose::Replica, Purpose::Encode, Purpose::Repair];
        match *op {
            Op::Reserve { tenant, len, purpose } => {
                let Ok(mut reserved) = reserve(arena, TenantId(tenant), len, PURPOSES[purpose]) else { return };
                assert_eq!(reserved.len(), len);
                let n = self.written.len() as u64;
                self.written.push(payload(n, len));
                reserved.write_at(0, &self.written[n as usize]).unwrap();
                self.reserved.push((n, reserved));
            }
            Op::Publish(i) => {
                let Some((n, reserved)) = pick(&mut self.reserved, i) else { return };
                let (tenant, len) = (reserved.tenant(), reserved.len());
                let bytes = &self.written[n as usize];
                assert!(reserved.bytes().unwrap() == bytes, "a reserved slot keeps what was written");
                let slot = reserved.publish(&meta(n, tenant, bytes)).unwrap();
                assert!(self.live.insert(slot, Block { n, tenant, len }).is_none());
            }
            Op::Abandon(i) => drop(pick(&mut self.reserved, i)),
            Op::AbandonWithBufferOut(i) => {
                let Some((_, mut reserved)) = pick(&mut self.reserved, i) else { return };
                self.buffers.push(reserved.io_buf());
                assert!(reserved.bytes().is_err() && reserved.bytes_mut().is_err());
            }
            Op::Pin(i) => {
                let Some(slot) = self.slot(i) else { return };
                self.pins.push((self.live[&slot].n, arena.pin(slot).expect("it is live")));
            }
            Op::CloneIntoBytes(i) => {
                let Some(slot) = self.slot(i) else { return };
                let pinned = arena.pin(slot).expect("it is live");
                let from = pinned.len() / 3;
                assert!(pinned.range(from..pinned.len() + 1).is_none());
                let n = self.live[&slot].n;
                self.bytes.push((n, from, pinned.range(from..).unwrap()));
                self.bytes.push((n, 0, pinned.into_bytes()));
            }
            Op::Unpin(i) => {
                drop(pick(&mut self.pins, i));
                drop(pick(&mut self.bytes, i));
            }
            Op::DropBuffer(i) => drop(pick(&mut self.buffers, i)),
            Op::Free(i) => {
                let Some(slot) = self.slot(i) else { return };
                assert!(arena.free(slot));
                self.gone(slot);
            }
            Op::Quarantine(i) => {
                // A few: what is quarantined is lost for good.
                if i % 8 != 0 {
                    return;
                }
                let Some(slot) = self.slot(i) else { return };
                assert!(arena.quarantine(slot));
                self.gone(slot);
            }
            Op::UseStale(i) => {
                if self.stale.is_empty() {
                    return;
                }
                let slot = self.stale[i % self.stale.len()];
                assert!(arena.pin(slot).is_none());
                assert!(!arena.free(slot) && !arena.quarantine(slot));
                assert_eq!(arena.verify(slot, || {}), None);
            }
            Op::Reclaim { tenant, len } => {
                for (slot, id) in arena.reclaim_candidates(TenantId(tenant), len as u32) {
                    let block = &self.live[&slot];
                    assert_eq!(id, meta(block.n, block.tenant, &[]).id);
                    assert!(arena.free(slot));
                    self.gone(slot);
                }
            }
        }
    }

    fn check(&self, arena: &Arena) {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut run = |bytes: &[u8]| runs.push((bytes.as_ptr() as usize, bytes.len().next_multiple_of(4096)));
        self.reserved.iter().for_each(|(_, r)| run(r.bytes().unwrap()));
        let pins: Vec<(SlotRef, Pinned)> = self.live.keys().map(|s| (*s, arena.pin(*s).unwrap())).collect();
        pins.iter().for_each(|(_, p)| run(p));
        self.buffers.iter().for_each(|b| run(b.as_slice()));
        let dead = self.pins.iter().filter(|(_, p)| !self.live.contains_key(&p.slot()));
        let mut dead: Vec<&Pinned> = dead.map(|(_, p)| p).collect();
        dead.sort_by_key(|p| p.as_ptr());
        dead.dedup_by_key(|p| p.as_ptr());
        dead.into_iter().for_each(|p| run(p));
        runs.sort_unstable();
        for pair in runs.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "two live slots share memory");
        }
        for (n, pinned) in &self.pins {
            assert!(**pinned == *self.written[*n as usize], "a pinned slot changed");
        }
        for (n, from, bytes) in &self.bytes {
            assert!(*bytes == self.written[*n as usize][*from..], "lent bytes changed");
        }
        drop(pins);
        assert_adds_up(arena);
        let usage = arena.usage();
        assert_eq!(usage.blocks as usize, self.live.len());
        assert_eq!(usage.used_bytes == 0, self.is_empty(), "{usage:?}");
        assert_eq!(usage.reserved_bytes == 0, self.reserved.is_empty() && self.buffers.is_empty());
    }

    fn is_empty(&self) -> bool {
        self.live.is_empty()
            && self.reserved.is_empty()
            && self.pins.is_empty()
            && self.buffers.is_empty()
            && self.bytes.is_empty()
    }
}

fn assert_nothing_used(usage: &ArenaUsage) {
    assert_eq!((usage.used_bytes, usage.payload_bytes, usage.reserved_bytes), (0, 0, 0), "{usage:?}");
    assert_eq!((usage.pinned_slots, usage.pinned_bytes, usage.blocks), (0, 0, 0), "{usage:?}");
    assert_eq!(usage.stranded.rounding, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn slots_never_overlap_and_pinned_bytes_never_change(ops in prop::collection::vec(op(), 1..160)) {
        let dir = folder();
        let arena = open_empty(&config(dir.path()));
        let mut model = Model::default();
        for op in &ops {
            model.apply(&arena, op);
            model.check(&arena);
        }
        for (slot, block) in &model.live {
            assert_holds(&arena, *slot, block.tenant, block.n, block.len);
        }
        let mut walked: Vec<SlotRef> = arena.slots().collect();
        let mut live: Vec<SlotRef> = model.live.keys().copied().collect();
        walked.sort_unstable();
        live.sort_unstable();
        prop_assert_eq!(walked, live);
        for slot in std::mem::take(&mut model.live).into_keys() {
            prop_assert!(arena.free(slot));
        }
        drop(model);
        assert_nothing_used(&arena.usage());
        assert_adds_up(&arena);
    }
}

#[test]
fn threads_that_write_pin_and_free_at_once_see_only_whole_blocks() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let arena = arena.clone();
            scope.spawn(move || {
                let tenant = TenantId(thread as u32 % 2);
                let mut mine = std::collections::VecDeque::new();
                for i in 0..600u64 {
                    let (n, len) = (thread * 10_000 + i, LENS[(i * 7 + thread) as usize % LENS.len()]);
                    match put(&arena, tenant, n, len) {
                        Ok(slot) => mine.push_back((slot, n, len)),
                        Err(_) => {
                            for (slot, _) in arena.reclaim_candidates(tenant, len as u32) {
                                arena.free(slot);
                            }
                        }
                    }
                    if mine.len() > 6 {
                        let (slot, n, len) = mine.pop_front().unwrap();
                        if let Some(pinned) = arena.pin(slot) {
                            assert!(arena.free(slot) || arena.pin(slot).is_none());
                            assert!(*pinned == *payload(n, len));
                            assert!(pinned.meta().unwrap().sums.matches(&pinned));
                        }
                    }
                }
                for (slot, ..) in mine {
                    arena.free(slot);
                }
            });
        }
    });
    let left: Vec<SlotRef> = arena.slots().collect();
    left.into_iter().for_each(|slot| assert!(arena.free(slot)));
    assert_nothing_used(&arena.usage());
    assert_adds_up(&arena);
}
