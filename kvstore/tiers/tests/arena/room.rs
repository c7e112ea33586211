//! Room: who gets it, what is lost to rounding, and how a size or a tenant that has none comes to some.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::ids::TenantId;
use kvkeep_core::{ErrorKind, SlotRef};
use kvkeep_tiers::dram::{Arena, ArenaConfig, FixedRegion, NoRoomReason, Purpose, ReclaimHint, Registrar, Reserves};
use parking_lot::Mutex;

use crate::common::{
    GROW_WAIT, KIB, MIB, assert_adds_up, assert_holds, config, folder, meta, open, open_empty, payload, put, reserve,
};

const A: TenantId = TenantId(1);
const B: TenantId = TenantId(2);
const C: TenantId = TenantId(3);

/// Puts until there is no room; numbers from `from` on.
fn fill(arena: &Arena, tenant: TenantId, from: u64, len: usize) -> Vec<SlotRef> {
    (from..).map_while(|n| put(arena, tenant, n, len).ok()).collect()
}

#[test]
fn a_uniform_workload_strands_at_most_a_twentieth() {
    for len in [4096usize, 12_288, 65_536, 98_304] {
        let dir = folder();
        let arena = open_empty(&config(dir.path()));
        let slots = fill(&arena, A, 0, len);
        let usage = arena.usage();
        assert!(usage.stranded.total() * 20 <= usage.capacity_bytes, "{len}: {usage:?}");
        // What is neither used nor stranded is the tables (6 % for slots of 4 KiB) and the end of the capacity.
        assert!((slots.len() * len) as u64 * 10 >= usage.capacity_bytes * 9, "{len}: {usage:?}");
        assert_adds_up(&arena);
    }
}

#[test]
fn files_follow_the_rule_of_their_size() {
    let rule = |capacity, slot| ArenaConfig::new("/nowhere", capacity, slot).file_bytes();
    assert_eq!(rule(1024 * MIB, MIB), 64 * MIB);
    assert_eq!(rule(16_384 * MIB, MIB), 256 * MIB, "a sixty-fourth");
    assert_eq!(rule(512 * 1024 * MIB, MIB), 1024 * MIB, "never more than a registered buffer may have");
    assert_eq!(rule(100 * MIB, MIB), 24 * MIB, "a quarter of a small arena, in whole huge pages");
    let large = rule(1024 * MIB, 128 * MIB);
    assert!(large > 128 * MIB && large < 129 * MIB, "one slot and its table: {large}");
}

#[test]
fn an_arena_takes_memory_only_as_it_is_used() {
    let dir = folder();
    let config = ArenaConfig::new(dir.path().join("arena"), 32 * MIB, 512 * KIB);
    let arena = open_empty(&config);
    let at_rest = arena.usage().file_bytes;
    assert_eq!(at_rest, 2 * config.file_bytes(), "two spares");
    fill(&arena, A, 0, 65_536);
    let full = arena.usage().file_bytes;
    assert!(full > at_rest && full <= config.capacity_bytes);
}

#[test]
fn slots_of_the_wrong_size_make_room_when_their_blocks_go() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    let small = fill(&arena, A, 0, 8192);
    let refused = reserve(&arena, A, 262_144, Purpose::Put).unwrap_err();
    assert_eq!(refused.hint, Some(ReclaimHint::AnyBytes), "{refused}");
    small.iter().step_by(16).for_each(|slot| assert!(arena.free(*slot)));
    let refused = reserve(&arena, A, 262_144, Purpose::Put).unwrap_err();
    assert_eq!(refused.hint, Some(ReclaimHint::OtherSizes), "{refused}");
    let victims = arena.reclaim_candidates(A, 262_144);
    assert!(!victims.is_empty() && victims.len() < small.len() / 8, "{} of {}", victims.len(), small.len());
    for (i, (slot, _)) in victims.iter().enumerate() {
        // Half-way the old size may not grab back what was emptied.
        if i == victims.len() / 2 {
            fill(&arena, A, 5000, 8192);
        }
        assert!(arena.free(*slot));
    }
    // Nor may it take the place when it is empty: it is kept for the size that wanted it.
    fill(&arena, A, 6000, 8192);
    let slot = put(&arena, A, 7001, 262_144).unwrap();
    assert_holds(&arena, slot, A, 7001, 262_144);
    assert_adds_up(&arena);
}

#[test]
fn no_active_size_loses_its_last_extent() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    put(&arena, A, 0, 131_072).unwrap();
    let small = fill(&arena, A, 1, 8192);
    assert!(!small.is_empty());
    // Again and again the large size takes from the small one; it must stop at the floor.
    for round in 0.. {
        let victims = arena.reclaim_candidates(A, 262_144);
        if victims.is_empty() && put(&arena, A, 10_000 + round, 262_144).is_err() {
            break;
        }
        victims.iter().for_each(|(slot, _)| assert!(arena.free(*slot)));
        while put(&arena, A, 10_000 + round, 262_144).is_ok() {}
        assert!(round < 1000);
    }
    let left = arena.slots().filter(|s| arena.pin(*s).is_some_and(|p| p.len() == 8192)).count();
    assert!(left > 0, "the small blocks keep an extent");
    assert_eq!(arena.slots().filter(|s| arena.pin(*s).is_some_and(|p| p.len() == 131_072)).count(), 1);
}

#[test]
fn a_tenant_without_memory_gets_a_new_file_from_one_that_has_many() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    let theirs = fill(&arena, A, 0, 65_536);
    reserve(&arena, B, 65_536, Purpose::Put).unwrap_err();
    // Any bytes are not enough: no file of theirs is empty.
    for slot in theirs.iter().step_by(8) {
        arena.free(*slot);
    }
    let refused = reserve(&arena, B, 65_536, Purpose::Put).unwrap_err();
    assert_eq!((refused.reason, refused.hint), (NoRoomReason::NoSlot, Some(ReclaimHint::OtherSizes)));
    for (slot, _) in arena.reclaim_candidates(B, 65_536) {
        assert!(arena.free(slot));
    }
    let slot = put(&arena, B, 7000, 65_536).unwrap();
    assert_holds(&arena, slot, B, 7000, 65_536);
    let usage = arena.usage();
    let files = |t: TenantId| usage.tenants.iter().find(|u| u.tenant == t).map_or(0, |u| u.files);
    assert!(files(A) >= 1 && files(B) == 1, "{usage:?}");
    assert_adds_up(&arena);
}

#[test]
fn no_active_tenant_loses_its_last_extent() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    put(&arena, A, 0, 65_536).unwrap();
    put(&arena, C, 1, 65_536).unwrap();
    fill(&arena, B, 2, 65_536);
    for round in 0..20 {
        let victims = arena.reclaim_candidates(B, 131_072);
        victims.iter().for_each(|(slot, _)| assert!(arena.free(*slot)));
        let _ = put(&arena, B, 1000 + round, 131_072);
    }
    let usage = arena.usage();
    assert!([A, C].iter().all(|t| usage.tenants.iter().any(|u| u.tenant == *t && u.blocks == 1)), "{usage:?}");
}

#[test]
fn bytes_of_one_tenant_never_reach_another_through_reused_memory() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    for slot in fill(&arena, A, 0, 65_536) {
        arena.free(slot);
    }
    let reserved = reserve(&arena, B, 65_536, Purpose::Put).unwrap();
    assert!(reserved.bytes().unwrap().iter().all(|b| *b == 0), "a domain changes with a new file only");
}

#[test]
fn a_reserve_is_there_when_puts_have_taken_the_rest() {
    let dir = folder();
    let reserves = Reserves { replicas: MIB, l3_reads: MIB, encode: 256 * KIB, repair: 256 * KIB };
    let arena = open_empty(&ArenaConfig { reserves, ..config(dir.path()) });
    fill(&arena, A, 0, 65_536);
    assert!(arena.usage().free_bytes >= reserves.total());
    let refused = reserve(&arena, A, 65_536, Purpose::Put).unwrap_err();
    assert_eq!((refused.reason, refused.short_bytes > 0), (NoRoomReason::Full, true));
    let mut held = Vec::new();
    for purpose in [Purpose::Promote, Purpose::Replica, Purpose::Encode, Purpose::Repair] {
        held.push(reserve(&arena, A, 65_536, purpose).unwrap());
    }
    while let Ok(more) = reserve(&arena, A, 65_536, Purpose::Promote) {
        held.push(more);
    }
    reserve(&arena, A, 65_536, Purpose::Replica).expect("promotions do not take the replicas' reserve");
}

#[test]
fn a_slot_a_little_larger_serves_when_no_other_does() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    let slots = fill(&arena, A, 0, 40_960);
    // The ends of the files, too small for one more of these.
    fill(&arena, A, 500, 4096);
    arena.free(slots[3]);
    let slot = put(&arena, A, 900, 36_000).unwrap();
    assert_holds(&arena, slot, A, 900, 36_000);
    arena.free(slots[4]);
    assert!(put(&arena, A, 901, 20_000).is_err(), "half a slot would be wasted");
}

#[test]
fn what_can_never_fit_is_refused_for_good() {
    let dir = folder();
    let arena = open(&config(dir.path()));
    for len in [0, 524_289, u32::MAX] {
        let refused = arena.reserve(A, len, Purpose::Put).unwrap_err();
        assert_eq!((refused.reason, refused.hint), (NoRoomReason::TooLarge, None));
    }
    let too_small = ArenaConfig::new(dir.path().join("b"), MIB, 2 * MIB);
    let too_greedy =
        ArenaConfig { reserves: Reserves { repair: 5 * MIB, ..Reserves::default() }, ..config(dir.path()) };
    for config in [too_small, too_greedy] {
        assert_eq!(Arena::open(config, &mut |_, _| true).unwrap_err().kind(), ErrorKind::Config);
    }
}

#[test]
fn facts_that_are_not_the_slots_are_refused() {
    let dir = folder();
    let arena = open(&config(dir.path()));
    let bytes = payload(1, 5000);
    let right = meta(1, A, &bytes);
    let other_len = meta(1, A, &bytes[1..]);
    let other_tenant = meta(1, B, &bytes);
    for wrong in [other_len, other_tenant] {
        let reserved = reserve(&arena, A, 5000, Purpose::Put).unwrap();
        assert_eq!(reserved.publish(&wrong).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    let mut reserved = reserve(&arena, A, 5000, Purpose::Put).unwrap();
    assert_eq!(reserved.write_at(4999, &[0; 2]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(reserved.write_at(usize::MAX, &[0; 2]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let lent = reserved.io_buf();
    assert_eq!(reserved.publish(&right).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(arena.usage().used_bytes > 0, "the buffer is still out");
    drop(lent);
    assert_eq!(arena.usage().used_bytes, 0);
}

/// What an engine was told, and the index it was told last.
#[derive(Default)]
struct Told(Mutex<(Vec<u16>, usize)>);

impl Registrar for Told {
    fn register(&self, region: &FixedRegion) -> bool {
        assert!(!self.0.lock().0.contains(&region.index()), "registered twice");
        assert!(region.as_ptr().is_aligned() && !region.is_empty());
        self.0.lock().0.push(region.index());
        region.index() != 1
    }

    fn unregister(&self, index: u16) {
        let mut told = self.0.lock();
        assert!(told.0.contains(&index), "never registered");
        told.0.retain(|i| *i != index);
        told.1 += 1;
    }
}

#[test]
fn an_engine_hears_of_every_file_and_buffers_name_only_registered_ones() {
    let dir = folder();
    let arena = open_empty(&config(dir.path()));
    let early = put(&arena, A, 0, 65_536).unwrap();
    assert!(arena.pin(early).unwrap().io_buf().fixed().is_none(), "nobody registers yet");
    let told = Arc::new(Told::default());
    arena.set_registrar(told.clone());
    let slots = fill(&arena, A, 1, 65_536);
    assert!(arena.wait_settled(GROW_WAIT));
    let mut indices: Vec<u16> = arena.fixed_buffers().iter().map(FixedRegion::index).collect();
    indices.sort_unstable();
    told.0.lock().0.sort_unstable();
    assert_eq!(indices, told.0.lock().0);
    let mut registered = 0;
    for slot in slots.iter().chain([&early]) {
        let buf = arena.pin(*slot).unwrap().io_buf();
        match buf.fixed() {
            Some(fixed) => {
                assert!(fixed.index != 1);
                let region = arena.fixed_buffers().into_iter().find(|r| r.index() == fixed.index).unwrap();
                let inside = region.as_ptr() as usize..region.as_ptr() as usize + region.len();
                assert!(inside.contains(&(buf.as_ptr() as usize)));
                registered += 1;
            }
            None => assert!(arena.fixed_buffers().iter().any(|r| r.index() == 1)),
        }
    }
    assert!(registered > 0);
    for (slot, _) in arena.reclaim_candidates(B, 65_536) {
        arena.free(slot);
    }
    put(&arena, B, 9000, 65_536).unwrap();
    assert!(arena.wait_settled(GROW_WAIT));
    assert!(told.0.lock().1 >= 1, "the file that changed hands was unregistered first");
}

#[test]
fn an_arena_that_cannot_grow_serves_with_what_it_has_and_grows_when_it_can() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open_empty(&config);
    // What stands in its way: a folder with the name of the next file.
    let in_the_way = config.dir.join("arena-0002.slots");
    std::fs::create_dir(&in_the_way).unwrap();
    let slots = fill(&arena, A, 0, 65_536);
    let usage = arena.usage();
    assert!(usage.grow_failures > 0 && usage.file_bytes == 2 * config.file_bytes(), "{usage:?}");
    assert!(slots.len() as u64 > usage.file_bytes / 65_536 / 10 * 8);
    let refused = arena.reserve(A, 65_536, Purpose::Put).map(drop);
    assert!(refused.is_err_and(|r| r.reason != NoRoomReason::Full), "memory is there, the system refuses it");
    assert_adds_up(&arena);
    std::fs::remove_dir(&in_the_way).unwrap();
    let deadline = Instant::now() + GROW_WAIT;
    while put(&arena, A, 9999, 65_536).is_err() {
        assert!(Instant::now() < deadline, "it never tried again");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_adds_up(&arena);
}

#[test]
fn the_page_size_is_what_the_kernel_gave() {
    let dir = folder();
    let arena = open(&config(dir.path()));
    let bytes = arena.page_bytes().unwrap();
    assert!(bytes.is_power_of_two() && bytes >= 4096, "{bytes}");
}
