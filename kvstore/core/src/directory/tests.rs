//! Each rule on its own, by example.

use crate::error::ErrorKind;
use crate::format::{Format, Rule};
use crate::ids::{Digest, GroupId, Handle, InstanceId, Instant, LeaseId, RequestId, Revision, ShardId, Version};
use crate::words::{Class, Fidelity, MissReason, PartStatus, PolicyKind, RequestInfo, Tier};

use super::testing::{
    HANDLE, ask, audit, block, digest, directory, format, meta, place, plain, put, put_chain, slot, small_leases,
};
use super::{Directory, DirectoryLimits, Dropped, Inserted, MatchOutcome, Matcher, Placed};

const INFO: RequestInfo = RequestInfo::NONE;

fn digests(n: std::ops::Range<u32>) -> Vec<Digest> {
    n.map(digest).collect()
}

fn matched(dir: &mut Directory, format: &Format, digests: &[Digest]) -> MatchOutcome {
    let mut matcher = Matcher::new(format, digests.len(), Fidelity::Exact, true, None);
    matcher.feed(dir, digests, Instant(1)).unwrap();
    assert!(!matcher.settle(dir, &INFO, Instant(1)));
    matcher.finish(|_| None)
}

/// Evicts what comes next; the number of its position.
fn evict(dir: &mut Directory, tier: Tier) -> Option<u32> {
    let victim = dir.victim(tier, Instant(9))?;
    for p in &victim.parts {
        let id = crate::ids::BlockId { digest: victim.digest, group: p.group, shard: p.shard };
        let dropped = match tier {
            Tier::Dram => dir.drop_slot(&id, p.slot.unwrap(), MissReason::Evicted),
            _ => dir.drop_place(&id, p.place.unwrap(), MissReason::Evicted),
        };
        assert_ne!(dropped, Dropped::None);
    }
    audit(dir);
    (0..64).find(|n| digest(*n) == victim.digest)
}

// ---------------------------------------------------------------- commits

#[test]
fn the_first_commit_of_a_part_wins() {
    let (mut dir, f) = (directory(), plain());
    let first = meta(block(0, 0, 0), 0, None);
    let second = crate::BlockMeta { version: Version(2), ..first.clone() };
    assert_eq!(dir.insert(&first, &f, Placed::Dram(slot(1)), &INFO, Instant(1)).unwrap(), Inserted::Stored);
    assert_eq!(
        dir.insert(&second, &f, Placed::Dram(slot(2)), &INFO, Instant(1)).unwrap(),
        Inserted::Exists { version: Version(1), class: Class::Cache }
    );
    assert!(!dir.set_nvme(&first.id, Version(2), place(2)), "another version's copy is not this block");
    // Another copy of the same version is one more copy, once.
    assert_eq!(dir.insert(&first, &f, Placed::Nvme(place(1)), &INFO, Instant(1)).unwrap(), Inserted::Stored);
    assert_eq!(
        dir.insert(&first, &f, Placed::Nvme(place(3)), &INFO, Instant(1)).unwrap(),
        Inserted::Exists { version: Version(1), class: Class::Cache }
    );
    audit(&dir);
}

#[test]
fn exact_supersedes_near_and_near_never_exact() {
    let (mut dir, f) = (directory(), plain());
    let near = crate::BlockMeta { fidelity: Fidelity::Near, ..meta(block(0, 0, 0), 0, None) };
    let exact = crate::BlockMeta { version: Version(2), ..meta(block(0, 0, 0), 0, None) };
    dir.insert(&near, &f, Placed::Dram(slot(1)), &INFO, Instant(1)).unwrap();
    dir.set_nvme(&near.id, Version(1), place(1));
    assert_eq!(matched(&mut dir, &f, &digests(0..1)).boundary_positions, 0, "near bytes do not do for an exact match");
    match dir.insert(&exact, &f, Placed::Dram(slot(2)), &INFO, Instant(1)).unwrap() {
        Inserted::Superseded(old) => assert_eq!((old.slot, old.place), (Some(slot(1)), Some(place(1)))),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        dir.insert(&near, &f, Placed::Dram(slot(3)), &INFO, Instant(1)).unwrap(),
        Inserted::Exists { version: Version(2), .. }
    ));
    let here = dir.locate(&digest(0), GroupId(0), ShardId(0)).unwrap();
    assert_eq!((here.fidelity, here.slot, here.place), (Fidelity::Exact, Some(slot(2)), None));
    assert_eq!(dir.totals().dram_bytes, 100);
    audit(&dir);
}

#[test]
fn a_part_that_does_not_fit_its_format_is_refused() {
    let (mut dir, f) = (directory(), plain());
    let long = crate::BlockMeta { len: 5000, ..meta(block(0, 0, 0), 0, None) };
    let e = dir.insert(&long, &f, Placed::Dram(slot(1)), &INFO, Instant(1)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::WrongSize);
    let e = dir.insert(&meta(block(0, 0, 1), 0, None), &f, Placed::Dram(slot(1)), &INFO, Instant(1)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument);
    assert_eq!(dir.entries(), 0);
}

#[test]
fn the_bound_of_positions_is_named_and_holds() {
    let mut dir = Directory::new(DirectoryLimits { positions_max: 2, ..DirectoryLimits::default() }, PolicyKind::Lru);
    let f = plain();
    put(&mut dir, &f, 0, None, 0, false);
    // Its parent's entry would be one too many: it stands alone.
    put(&mut dir, &f, 7, Some(6), 7, false);
    assert_eq!(dir.entries(), 2);
    let e = dir.insert(&meta(block(1, 0, 0), 1, None), &f, Placed::Dram(slot(1)), &INFO, Instant(1)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Full);
    assert_eq!(e.context()[0].0, "positions_max");
    audit(&dir);
}

// ---------------------------------------------------------------- chains

/// As an index is loaded: children first. The chain is whole in the end and goes from its tail.
#[test]
fn a_chain_that_arrives_backwards_is_a_chain() {
    let (mut dir, f) = (directory(), plain());
    for n in (0..5).rev() {
        put(&mut dir, &f, n, n.checked_sub(1), n, false);
        audit(&dir);
    }
    assert_eq!(dir.entries(), 5);
    assert_eq!(dir.view(&digest(3)).unwrap().parent, Some(digest(2)));
    assert_eq!((0..5).map(|_| evict(&mut dir, Tier::Dram).unwrap()).collect::<Vec<_>>(), [4, 3, 2, 1, 0]);
    assert_eq!(dir.entries(), 0);
}

#[test]
fn a_removed_position_stays_as_an_entry_until_its_last_child_goes() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 3, false);
    assert_eq!(dir.remove(&digest(1), MissReason::Quarantined).unwrap().len(), 1);
    assert_eq!(dir.remove(&digest(1), MissReason::Removed), None);
    assert_eq!((dir.entries(), dir.totals().positions), (3, 2));
    assert_eq!(dir.view(&digest(1)).unwrap().gone, Some(MissReason::Quarantined));
    assert_eq!(matched(&mut dir, &f, &digests(0..3)).reason, Some(MissReason::Quarantined));
    dir.remove(&digest(2), MissReason::Removed);
    assert_eq!(dir.entries(), 1);
    audit(&dir);
}

/// Two positions that claim each other as parent would never be leaves.
#[test]
fn parents_cannot_form_a_cycle() {
    let (mut dir, f) = (directory(), plain());
    put(&mut dir, &f, 0, Some(1), 5, false);
    put(&mut dir, &f, 1, Some(0), 5, false);
    put(&mut dir, &f, 2, Some(2), 5, false);
    audit(&dir);
    assert!((0..3).all(|_| evict(&mut dir, Tier::Dram).is_some()));
    assert_eq!(dir.entries(), 0);
}

// ---------------------------------------------------------------- matching

#[test]
fn a_gap_ends_the_prefix() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 5, true);
    dir.remove(&digest(3), MissReason::Removed);
    let m = matched(&mut dir, &f, &digests(0..6));
    assert_eq!((m.boundary_positions, m.reason), (3, Some(MissReason::Removed)));
    let hit = PartStatus::Hit.code();
    assert_eq!(m.statuses.iter().map(|s| *s == hit).collect::<Vec<_>>(), [true, true, true, false, true, false]);
    assert_eq!((m.dram_bytes, m.nvme_bytes), (300, 0));
}

#[test]
fn a_position_counts_only_with_all_its_shards() {
    let (mut dir, f) = (directory(), format(&[(Rule::All, 1, 8)]));
    put_chain(&mut dir, &f, 3, false);
    let gone = block(1, 0, 5);
    assert_eq!(
        dir.drop_slot(&gone, dir.locate(&gone.digest, gone.group, gone.shard).unwrap().slot.unwrap(), MissReason::Io),
        Dropped::PartGone
    );
    let m = matched(&mut dir, &f, &digests(0..3));
    assert_eq!((m.boundary_positions, m.reason), (1, Some(MissReason::Incomplete)));
}

#[test]
fn a_boundary_is_valid_under_the_rules_of_all_groups() {
    // One block of `all` per 2 keys, a window of 2 keys, a state per 3 keys: boundaries are multiples of 6.
    let f = format(&[(Rule::All, 2, 1), (Rule::Window { tokens: 2 }, 1, 1), (Rule::State, 3, 1)]);
    let mut dir = directory();
    put_chain(&mut dir, &f, 12, false);
    let m = matched(&mut dir, &f, &digests(0..13));
    // 6 blocks of `all`, 2 of the window, 1 state.
    assert_eq!((m.boundary_positions, m.dram_bytes), (12, 900));
    let drop = |dir: &mut Directory, n: u32, group: u16| {
        let id = block(n, group, 0);
        let slot = dir.locate(&id.digest, id.group, id.shard).unwrap().slot.unwrap();
        dir.drop_slot(&id, slot, MissReason::Evicted);
    };
    drop(&mut dir, 2, 1);
    drop(&mut dir, 5, 2);
    assert_eq!(
        matched(&mut dir, &f, &digests(0..13)).boundary_positions,
        12,
        "behind the boundary nothing of it is needed"
    );
    assert_eq!(matched(&mut dir, &f, &digests(0..9)).boundary_positions, 0, "the state at 6 is gone");
    drop(&mut dir, 10, 1);
    let m = matched(&mut dir, &f, &digests(0..13));
    assert_eq!((m.boundary_positions, m.reason), (0, Some(MissReason::Incomplete)));
}

#[test]
fn a_window_at_the_start_of_a_chain_needs_only_what_is_there() {
    let (mut dir, f) = (directory(), format(&[(Rule::Window { tokens: 10 }, 1, 1)]));
    put_chain(&mut dir, &f, 3, false);
    assert_eq!(matched(&mut dir, &f, &digests(0..3)).boundary_positions, 3);
}

#[test]
fn what_was_never_here_is_explained_by_the_history() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 1, false);
    let mut m = Matcher::new(&f, 2, Fidelity::Exact, false, None);
    m.feed(&mut dir, &digests(0..2), Instant(1)).unwrap();
    assert!(!m.wants_more());
    assert_eq!(m.finish(|d| (*d == digest(1)).then_some(MissReason::Evicted)).reason, Some(MissReason::Evicted));
    assert_eq!(matched(&mut dir, &f, &digests(0..2)).reason, Some(MissReason::NeverStored));
    assert_eq!(matched(&mut dir, &f, &digests(0..1)).reason, None);
}

#[test]
fn a_match_without_a_lease_is_no_access() {
    let (mut dir, f) = (directory(), plain());
    put(&mut dir, &f, 0, None, 0, false);
    put(&mut dir, &f, 1, None, 0, false);
    matched(&mut dir, &f, &digests(0..1));
    assert_eq!(dir.view(&digest(0)).unwrap().accesses, 1);
    assert_eq!(evict(&mut dir, Tier::Dram), Some(0), "the order is that of the puts");
}

#[test]
fn a_match_with_a_lease_holds_what_the_boundary_needs_and_counts_once() {
    let f = format(&[(Rule::Window { tokens: 2 }, 1, 1)]);
    let mut dir = directory();
    put_chain(&mut dir, &f, 6, false);
    dir.remove(&digest(5), MissReason::Removed);
    for _ in 0..2 {
        let mut m = Matcher::new(&f, 6, Fidelity::Exact, false, Some(ask(1, b"r", 5)));
        for slice in digests(0..6).chunks(4) {
            m.feed(&mut dir, slice, Instant(2)).unwrap();
        }
        while m.settle(&mut dir, &INFO, Instant(2)) {}
        let m = m.finish(|_| None);
        assert_eq!((m.boundary_positions, m.lease), (5, Some(LeaseId(5))));
        let leases: Vec<u32> = (0..5).map(|n| dir.view(&digest(n)).unwrap().leases).collect();
        assert_eq!(leases, [0, 0, 0, 1, 1]);
        assert_eq!(dir.view(&digest(4)).unwrap().accesses, 2, "the put and one request");
        audit(&dir);
    }
    assert!(dir.lease_holds(LeaseId(5), &digest(4)) && !dir.lease_holds(LeaseId(5), &digest(0)));
}

#[test]
fn a_lease_that_ends_during_its_match_leaves_nothing_behind() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 4, false);
    let all = digests(0..4);
    // Released between two slices.
    let mut m = Matcher::new(&f, 4, Fidelity::Exact, false, Some(ask(1, b"r", 5)));
    m.feed(&mut dir, &all[..2], Instant(1)).unwrap();
    assert!(dir.release(LeaseId(5)));
    assert_eq!(m.feed(&mut dir, &all[2..], Instant(1)).unwrap_err().kind(), ErrorKind::Expired);
    audit(&dir);
    // Released before it settles, its entries given to others.
    let mut m = Matcher::new(&f, 4, Fidelity::Exact, false, Some(ask(1, b"r", 6)));
    m.feed(&mut dir, &all, Instant(1)).unwrap();
    assert!(dir.release(LeaseId(6)));
    (0..4).for_each(|n| drop(dir.remove(&digest(n), MissReason::Removed)));
    put(&mut dir, &f, 20, None, 0, false);
    while m.settle(&mut dir, &INFO, Instant(1)) {}
    assert_eq!(m.finish(|_| None).lease, None);
    assert_eq!(dir.view(&digest(20)).unwrap().accesses, 1);
    audit(&dir);
}

// ---------------------------------------------------------------- eviction

#[test]
fn leaves_go_first_the_least_recently_used_before_others() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 3, false);
    put(&mut dir, &f, 10, Some(0), 1, false);
    // The tail of the first chain is used again; its head was not, and yet stays.
    assert!(dir.access(&digest(2), &INFO, Instant(5)));
    assert!(dir.access(&digest(2), &INFO, Instant(4)), "a request from before the last one");
    let view = dir.view(&digest(2)).unwrap();
    assert_eq!((view.accesses, view.last_access), (3, Instant(5)));
    assert_eq!((0..4).map(|_| evict(&mut dir, Tier::Dram).unwrap()).collect::<Vec<_>>(), [10, 2, 1, 0]);
}

#[test]
fn a_shared_head_that_was_used_lately_is_not_dragged_along_by_its_old_tail() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 2, false);
    put(&mut dir, &f, 10, None, 0, false);
    dir.access(&digest(0), &INFO, Instant(5));
    assert_eq!((0..3).map(|_| evict(&mut dir, Tier::Dram).unwrap()).collect::<Vec<_>>(), [1, 10, 0]);
}

#[test]
fn tiers_keep_their_own_leaves() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 3, true);
    assert_eq!(evict(&mut dir, Tier::Dram), Some(2));
    assert_eq!(evict(&mut dir, Tier::Dram), Some(1));
    assert!(dir.view(&digest(2)).unwrap().parts[0].nvme);
    assert_eq!(evict(&mut dir, Tier::Nvme), Some(2), "on NVMe the chain is whole, and its tail the leaf");
    assert!(dir.view(&digest(2)).is_none());
    // Promoted again, it is a leaf of DRAM again.
    assert!(dir.set_slot(&block(1, 0, 0), Version(1), slot(99)));
    assert!(!dir.set_slot(&block(1, 0, 0), Version(1), slot(98)));
    assert_eq!(evict(&mut dir, Tier::Dram), Some(1));
    assert_eq!(dir.victim(Tier::Hbm, Instant(1)), None);
}

#[test]
fn a_durable_position_never_leaves_nvme_nor_dram_before_it_is_there() {
    let (mut dir, f) = (directory(), plain());
    put(&mut dir, &f, 0, None, 0, false);
    assert!(dir.raise_class(&block(0, 0, 0), Version(1), Class::Durable, crate::words::Keeper::Caller));
    assert!(!dir.raise_class(&block(0, 0, 0), Version(2), Class::Durable, crate::words::Keeper::Caller));
    assert_eq!(dir.victim(Tier::Dram, Instant(1)), None, "its only copy");
    assert!(dir.set_nvme(&block(0, 0, 0), Version(1), place(0)));
    assert_eq!(dir.victim(Tier::Nvme, Instant(1)), None);
    assert_eq!(evict(&mut dir, Tier::Dram), Some(0));
    assert_eq!(dir.victim(Tier::Nvme, Instant(1)), None);
    dir.raise_class(&block(0, 0, 0), Version(1), Class::Cache, crate::words::Keeper::Caller);
    assert_eq!(dir.view(&digest(0)).unwrap().class, Class::Durable, "a class is never weakened");
}

#[test]
fn a_leased_position_leaves_dram_last_and_only_if_nvme_has_all_of_it() {
    let (mut dir, f) = (directory(), plain());
    put(&mut dir, &f, 0, None, 0, true);
    put(&mut dir, &f, 1, None, 0, false);
    put(&mut dir, &f, 2, None, 0, true);
    dir.lease(&ask(1, b"r", 5), &digests(0..2), &INFO, Instant(1), Instant(1)).unwrap();
    assert_eq!(evict(&mut dir, Tier::Dram), Some(2));
    let victim = dir.victim(Tier::Dram, Instant(1)).unwrap();
    assert!(victim.leased);
    assert_eq!(evict(&mut dir, Tier::Dram), Some(0));
    assert_eq!(dir.victim(Tier::Dram, Instant(1)), None, "1 is nowhere else");
    assert_eq!(evict(&mut dir, Tier::Nvme), Some(2));
    assert_eq!(dir.victim(Tier::Nvme, Instant(1)), None);
    dir.release(LeaseId(5));
    assert_eq!(evict(&mut dir, Tier::Nvme), Some(0));
    assert_eq!(evict(&mut dir, Tier::Dram), Some(1));
}

#[test]
fn a_deferred_victim_comes_after_the_others() {
    let (mut dir, f) = (directory(), plain());
    (0..3).for_each(|n| put(&mut dir, &f, n, None, 0, false));
    dir.defer(&digest(0), Tier::Dram);
    assert_eq!((0..3).map(|_| evict(&mut dir, Tier::Dram).unwrap()).collect::<Vec<_>>(), [1, 2, 0]);
}

#[test]
fn the_warm_set_is_hottest_first_and_parents_come_before_children() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 3, false);
    put(&mut dir, &f, 10, None, 0, false);
    dir.access(&digest(1), &INFO, Instant(5));
    let order = |dir: &Directory, n| -> Vec<Digest> { dir.hottest(Tier::Dram, n) };
    assert_eq!(order(&dir, 9), [0, 1, 10, 2].map(digest));
    assert_eq!(order(&dir, 1), [digest(0)]);
}

// ---------------------------------------------------------------- spare parts

#[test]
fn window_parts_behind_the_last_boundary_go_before_any_leaf() {
    let f = format(&[(Rule::All, 1, 1), (Rule::Window { tokens: 2 }, 1, 1)]);
    let mut dir = directory();
    put_chain(&mut dir, &f, 5, true);
    let victims: Vec<(u32, bool, usize)> = (0..4)
        .map(|_| {
            let v = dir.victim(Tier::Dram, Instant(1)).unwrap();
            (evict(&mut dir, Tier::Dram).unwrap(), v.spare, v.parts.len())
        })
        .collect();
    // The window at 5 needs positions 3 and 4; the others lose their window parts, then the leaf goes whole.
    assert_eq!(victims, [(2, true, 1), (1, true, 1), (0, true, 1), (4, false, 2)]);
    assert_eq!(matched(&mut dir, &f, &digests(0..5)).boundary_positions, 5, "NVMe has them all");
}

/// The state in the middle is the last boundary of the chain as long as no later one is here.
#[test]
fn the_last_state_of_a_chain_is_kept_wherever_it_is() {
    let f = format(&[(Rule::All, 1, 1), (Rule::State, 1, 1)]);
    let mut dir = directory();
    let add = |dir: &mut Directory, n: u32, state: bool| {
        for group in 0..=u16::from(state) {
            let m = meta(block(n, group, 0), n, n.checked_sub(1));
            let at = Placed::Dram(slot(u64::from(n) * 2 + u64::from(group)));
            dir.insert(&m, &f, at, &INFO, Instant(1)).unwrap();
        }
    };
    (0..6).for_each(|n| add(&mut dir, n, n == 1 || n == 3));
    assert_eq!(evict(&mut dir, Tier::Dram), Some(1), "the older state is of no use");
    assert!(!dir.victim(Tier::Dram, Instant(1)).unwrap().spare, "the newer one is");
    assert_eq!(matched(&mut dir, &f, &digests(0..6)).boundary_positions, 4);
    add(&mut dir, 6, true);
    let v = dir.victim(Tier::Dram, Instant(1)).unwrap();
    assert_eq!((v.digest, v.spare), (digest(3), true), "until a later one comes");
}

#[test]
fn a_fork_keeps_its_state() {
    let f = format(&[(Rule::All, 1, 1), (Rule::State, 1, 1)]);
    let mut dir = directory();
    put_chain(&mut dir, &f, 4, false);
    put(&mut dir, &f, 10, Some(1), 2, false);
    let mut spare = Vec::new();
    while dir.victim(Tier::Dram, Instant(1)).is_some_and(|v| v.spare) {
        spare.push(evict(&mut dir, Tier::Dram).unwrap());
    }
    spare.sort_unstable();
    assert_eq!(spare, [0, 2]);
    // When both branches have gone, the fork is the end of its chain.
    for _ in 0..3 {
        assert!(!dir.victim(Tier::Dram, Instant(1)).unwrap().spare);
        evict(&mut dir, Tier::Dram);
    }
    assert_eq!(matched(&mut dir, &f, &digests(0..2)).boundary_positions, 2);
}

#[test]
fn what_a_lease_of_the_same_request_holds_is_not_accessed_again() {
    let f = format(&[(Rule::All, 1, 1)]);
    let mut dir = directory();
    put_chain(&mut dir, &f, 3, true);
    let uses = |dir: &Directory| {
        digests(0..3).iter().map(|d| dir.locate(d, GroupId(0), ShardId(0)).unwrap().accesses).collect::<Vec<_>>()
    };
    dir.lease(&ask(1, b"r", 5), &digests(0..2), &INFO, Instant(1), Instant(1)).unwrap();
    assert_eq!(uses(&dir), [2, 2, 1]);
    let counted = dir.lease_of_request(InstanceId([1; 16]), &RequestId::new(b"r").unwrap());
    assert_eq!(counted, Some(LeaseId(5)));
    dir.lease_beside(&ask(1, b"", 6), &digests(0..3), &INFO, Instant(2), Instant(2), counted).unwrap();
    assert_eq!(uses(&dir), [2, 2, 2]);
}

#[test]
fn a_leased_spare_part_stays_until_the_lease_ends() {
    let f = format(&[(Rule::All, 1, 1), (Rule::State, 1, 1)]);
    let mut dir = directory();
    put_chain(&mut dir, &f, 2, true);
    dir.lease(&ask(1, b"r", 5), &digests(0..1), &INFO, Instant(1), Instant(1)).unwrap();
    for tier in [Tier::Dram, Tier::Nvme] {
        assert!(!dir.victim(tier, Instant(1)).unwrap().spare);
    }
    dir.release(LeaseId(5));
    for tier in [Tier::Dram, Tier::Nvme] {
        let v = dir.victim(tier, Instant(1)).unwrap();
        assert_eq!((v.digest, v.spare), (digest(0), true));
    }
    // Deferred, it waits for the turn of its position.
    dir.defer(&digest(0), Tier::Dram);
    assert!(!dir.victim(Tier::Dram, Instant(1)).unwrap().spare);
    audit(&dir);
}

// ---------------------------------------------------------------- leases

#[test]
fn a_second_lease_of_a_request_extends_the_first_to_the_union() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 4, false);
    let lease = |dir: &mut Directory, range, fresh, now| {
        dir.lease(&ask(1, b"r", fresh), &digests(range), &INFO, Instant(now), Instant(now)).unwrap()
    };
    assert_eq!(lease(&mut dir, 0..2, 5, 0), (Some(LeaseId(5)), vec![true, true]));
    assert_eq!(lease(&mut dir, 1..6, 6, 3000), (Some(LeaseId(5)), vec![true, true, true, false, false]));
    let info = dir.lease_info(LeaseId(5)).unwrap();
    assert_eq!((info.positions, info.ends, info.handle), (4, Instant(13_000), HANDLE));
    assert_eq!(dir.leased_positions(), 4);
    let lease = dir.lease_of_request(InstanceId([1; 16]), &RequestId::new(b"r").unwrap()).unwrap();
    assert!(dir.release(lease));
    assert!(!dir.release(LeaseId(5)));
    assert_eq!((dir.leased_positions(), dir.lease_count()), (0, 0));
    // Without a request id each is a lease of its own; over nothing there is none.
    let unnamed = |dir: &mut Directory, n: u32, fresh| {
        dir.lease(&ask(1, b"", fresh), &digests(n..n + 1), &INFO, Instant(0), Instant(0)).unwrap().0
    };
    assert_eq!(
        (unnamed(&mut dir, 0, 7), unnamed(&mut dir, 0, 8), unnamed(&mut dir, 50, 9)),
        (Some(LeaseId(7)), Some(LeaseId(8)), None)
    );
    audit(&dir);
}

#[test]
fn a_lease_is_renewed_up_to_its_longest_life_and_then_expires() {
    let limits = crate::LeaseLimits { life_max: std::time::Duration::from_secs(15), ..small_leases() };
    let mut dir = Directory::new(DirectoryLimits { leases: limits, ..DirectoryLimits::default() }, PolicyKind::Lru);
    let f = plain();
    put(&mut dir, &f, 0, None, 0, false);
    dir.lease(&ask(1, b"r", 5), &digests(0..1), &INFO, Instant(0), Instant(0)).unwrap();
    let ttl = std::time::Duration::from_secs(10);
    assert_eq!(dir.renew_lease(LeaseId(5), ttl, Instant(2_000)).unwrap(), Instant(12_000));
    assert_eq!(dir.renew_lease(LeaseId(5), ttl, Instant(9_000)).unwrap(), Instant(15_000));
    assert_eq!(dir.expire_leases(Instant(14_999), 9), 0);
    assert_eq!(dir.renew_lease(LeaseId(5), ttl, Instant(15_000)).unwrap_err().kind(), ErrorKind::Expired);
    // Asked for again before anybody has ended it, it is a new one.
    let (id, _) = dir.lease(&ask(1, b"r", 6), &digests(0..1), &INFO, Instant(15_000), Instant(0)).unwrap();
    assert_eq!(id, Some(LeaseId(6)));
    assert_eq!(dir.expire_leases(Instant(25_000), 9), 1);
    assert_eq!(dir.leased_positions(), 0);
    audit(&dir);
}

#[test]
fn a_bound_on_leases_is_named_and_nothing_is_taken() {
    let mut dir =
        Directory::new(DirectoryLimits { leases: small_leases(), ..DirectoryLimits::default() }, PolicyKind::Lru);
    let f = plain();
    put_chain(&mut dir, &f, 20, false);
    let mut lease = |instance, request: &[u8], range, fresh| {
        let got = dir.lease(&ask(instance, request, fresh), &digests(range), &INFO, Instant(0), Instant(0));
        audit(&dir);
        got.map_err(|e| (e.kind(), e.context()[0].0))
    };
    let positions = "leased_positions_per_instance";
    assert_eq!(lease(1, b"a", 0..13, 1), Err((ErrorKind::TooLarge, positions)));
    assert!(lease(1, b"a", 0..8, 2).is_ok());
    assert_eq!(lease(1, b"b", 8..13, 3), Err((ErrorKind::Throttled, positions)));
    assert!(lease(1, b"b", 8..9, 4).is_ok());
    assert!(lease(1, b"c", 9..10, 5).is_ok());
    assert_eq!(lease(1, b"d", 9..10, 6), Err((ErrorKind::Throttled, "leases_per_instance")));
    assert!(lease(2, b"a", 0..8, 7).is_ok());
    assert_eq!(lease(3, b"a", 0..8, 8), Err((ErrorKind::Throttled, "lease_instances")));
    assert!(dir.end_instance(InstanceId([1; 16]), 2), "there is one more");
    assert!(!dir.end_instance(InstanceId([1; 16]), 2));
    assert_eq!((dir.lease_count(), dir.leased_positions()), (1, 8));
}

#[test]
fn a_position_removed_under_a_lease_is_unreadable_at_once_and_forgotten_when_it_ends() {
    let (mut dir, f) = (directory(), plain());
    put(&mut dir, &f, 0, None, 0, false);
    dir.lease(&ask(1, b"r", 5), &digests(0..1), &INFO, Instant(0), Instant(0)).unwrap();
    assert!(dir.remove(&digest(0), MissReason::Removed).is_some());
    assert_eq!(dir.locate(&digest(0), GroupId(0), ShardId(0)), None);
    assert_eq!(dir.entries(), 1);
    dir.release(LeaseId(5));
    assert_eq!(dir.entries(), 0);
}

// ---------------------------------------------------------------- upkeep

#[test]
fn positions_expire_when_their_time_comes_and_once() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 3, false);
    assert!(dir.set_expiry(&digest(1), Some(Instant(50))));
    assert!(dir.set_expiry(&digest(2), Some(Instant(40))));
    assert!(dir.set_expiry(&digest(0), Some(Instant(30))));
    assert!(dir.set_expiry(&digest(0), None));
    assert!(!dir.set_expiry(&digest(9), Some(Instant(30))));
    assert_eq!(dir.expire(Instant(39), 9), []);
    assert_eq!(dir.expire(Instant(50), 1), [digest(2)]);
    // One that leaves before its time takes it along.
    dir.remove(&digest(1), MissReason::Removed);
    assert_eq!(dir.expire(Instant(50), 9), []);
    audit(&dir);
}

#[test]
fn stale_revisions_are_found_in_slices() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 3, false);
    let next = Handle { revision: Revision(2), ..HANDLE };
    let mut new = meta(block(10, 0, 0), 0, None);
    new.handle = next;
    dir.insert(&new, &f, Placed::Dram(slot(10)), &INFO, Instant(1)).unwrap();
    let (mut stale, mut cursor) = (Vec::new(), Some(0));
    while let Some(at) = cursor {
        let slice = dir.sweep_stale(|h| h == next, at, 2);
        stale.extend(slice.stale);
        cursor = slice.next;
    }
    assert_eq!(stale, digests(0..3));
    assert_eq!((dir.usage(HANDLE).positions, dir.usage(next).positions), (3, 1));
    stale.iter().for_each(|d| drop(dir.remove(d, MissReason::Revision)));
    assert_eq!((dir.usage(HANDLE).positions, dir.usages().len()), (0, 1));
}

#[test]
fn a_scan_shows_every_readable_position() {
    let (mut dir, f) = (directory(), plain());
    put_chain(&mut dir, &f, 5, false);
    dir.remove(&digest(2), MissReason::Removed);
    let (mut seen, mut cursor) = (Vec::new(), Some(0));
    while let Some(at) = cursor {
        let (views, next) = dir.scan(at, 2);
        seen.extend(views.iter().map(|v| v.position));
        cursor = next;
    }
    assert_eq!(seen, [0, 1, 3, 4]);
    assert_eq!(dir.warm(digests(0..9).iter()), 5, "the removed one still stands for its child");
}

/// A lease over more positions than one slice ends at once for its holder; its positions follow slice by slice.
#[test]
fn a_large_lease_is_let_go_of_in_slices() {
    let (mut dir, f) = (directory(), plain());
    let many = 3 * super::matching::SLICE as u32;
    put_chain(&mut dir, &f, many, false);
    let (lease, _) = dir.lease(&ask(1, b"large", 1), &digests(0..many), &INFO, Instant(1), Instant(1)).unwrap();
    assert_eq!(dir.leased_positions(), many);
    assert!(dir.release(lease.unwrap()));
    assert_eq!(dir.lease_count(), 0);
    assert_eq!(dir.leased_positions(), many, "still counted, so still not evicted");
    let mut slices = 0;
    while dir.part(super::matching::SLICE) {
        slices += 1;
    }
    assert!(slices >= 2);
    assert_eq!(dir.leased_positions(), 0);
}
