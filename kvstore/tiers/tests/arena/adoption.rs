//! Files of a previous life: what is right in every bit comes back, nothing else does.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use kvkeep_core::ids::{BlockId, TenantId};
use kvkeep_core::{BlockMeta, ErrorKind, SlotRef};
use kvkeep_tiers::dram::{Arena, ArenaConfig, Purpose};
use proptest::prelude::*;

use crate::common::{
    KIB, MIB, assert_adds_up, assert_holds, config, files, folder, meta, open, open_empty, payload, put, reserve,
};

/// Blocks by id: number, tenant, length.
type Blocks = HashMap<BlockId, (u64, TenantId, usize)>;

const SIZES: [usize; 4] = [900, 70_000, 131_072, 4096];

fn fill(arena: &Arena, count: u64) -> (Blocks, Vec<SlotRef>) {
    let mut blocks = Blocks::new();
    let mut slots = Vec::new();
    for n in 0..count {
        let (tenant, len) = (TenantId(n as u32 % 2), SIZES[n as usize % SIZES.len()]);
        slots.push(put(arena, tenant, n, len).unwrap());
        blocks.insert(meta(n, tenant, &payload(n, len)).id, (n, tenant, len));
    }
    (blocks, slots)
}

fn adopt_all(config: &ArenaConfig) -> (Arena, Vec<(BlockMeta, SlotRef)>) {
    let mut offered = Vec::new();
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let opened = Arena::open(config.clone(), &mut |meta, slot| {
            offered.push((meta.clone(), slot));
            true
        });
        match opened {
            Ok(arena) => return (arena, offered),
            // A child that another test starts just now has the lock's descriptor until it runs its program.
            Err(e) if e.kind() == ErrorKind::Conflict && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(e) => panic!("{e}"),
        }
    }
}

/// Every offered block is one that was put, whole and with all its facts.
fn assert_right(arena: &Arena, offered: &[(BlockMeta, SlotRef)], blocks: &Blocks) {
    for (facts, slot) in offered {
        let (n, tenant, len) = blocks[&facts.id];
        assert_eq!(*facts, meta(n, tenant, &payload(n, len)));
        assert_holds(arena, *slot, tenant, n, len);
    }
}

#[test]
fn a_killed_server_finds_all_its_published_blocks() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open_empty(&config);
    let (mut blocks, slots) = fill(&arena, 40);
    for (i, slot) in slots.iter().enumerate().step_by(3) {
        let tenant = TenantId(i as u32 % 2);
        assert!(arena.free(*slot));
        blocks.remove(&meta(i as u64, tenant, &[]).id);
    }
    let mut unpublished = reserve(&arena, TenantId(0), 900, Purpose::Put).unwrap();
    unpublished.write_at(0, &payload(99, 900)).unwrap();
    // A kill leaves what the stores left: dropping writes nothing either.
    drop((unpublished, arena));

    let (arena, offered) = adopt_all(&config);
    assert_eq!(offered.len(), blocks.len());
    assert_right(&arena, &offered, &blocks);
    assert_adds_up(&arena);
    let report = arena.adoption();
    assert_eq!((report.adopted, report.refused, report.torn, report.damaged), (blocks.len() as u64, 0, 0, 0));
    assert_eq!(arena.usage().blocks, blocks.len() as u64);
    // A slot of this life is none of that life's, even in the same place.
    let (_, old) = offered[0];
    assert!(arena.free(old));
    for n in 200..210 {
        let len = SIZES[n as usize % SIZES.len()];
        assert_ne!(put(&arena, TenantId(0), n, len).unwrap(), old);
    }
    assert!(arena.pin(old).is_none());
}

/// A process that mapped the file compares the generation that it was told, however often the server was started since.
#[test]
fn a_generation_that_was_told_is_not_given_to_another_block_after_a_restart() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open_empty(&config);
    put(&arena, TenantId(0), 0, 4096).unwrap();
    let slot = put(&arena, TenantId(0), 1, 4096).unwrap();
    let told = arena.pin(slot).unwrap().site().unwrap();
    assert!(arena.free(slot));
    drop(arena);

    let (arena, offered) = adopt_all(&config);
    assert_eq!(offered.len(), 1);
    let mut again = false;
    for n in 2..10 {
        let site = arena.pin(put(&arena, TenantId(0), n, 4096).unwrap()).unwrap().site().unwrap();
        assert!(site.generation > told.generation, "{site:?} begins where {told:?} was");
        again |= (site.file, site.offset, site.entry) == (told.file, told.offset, told.entry);
    }
    assert!(again, "the slot was used again");
}

#[test]
fn a_refused_block_is_freed_and_not_offered_again() {
    let dir = folder();
    let config = config(dir.path());
    let (blocks, _) = fill(&open_empty(&config), 20);
    let arena = Arena::open(config.clone(), &mut |meta, _| meta.position % 2 == 0).unwrap();
    assert_eq!((arena.adoption().adopted, arena.adoption().refused), (10, 10));
    assert_adds_up(&arena);
    drop(arena);
    let (arena, offered) = adopt_all(&config);
    assert_eq!(offered.len(), 10);
    assert_right(&arena, &offered, &blocks);
}

#[test]
fn files_nobody_wants_are_removed_before_memory_is_asked_for() {
    let dir = folder();
    let config = config(dir.path());
    fill(&open_empty(&config), 20);
    assert!(!files(&config).is_empty());
    let arena = Arena::open(config.clone(), &mut |_, _| false).unwrap();
    let report = arena.adoption();
    assert_eq!((report.files_adopted, report.files_removed), (0, report.files_found));
    assert_eq!(arena.usage().used_bytes, 0);
    assert_adds_up(&arena);
}

#[test]
fn a_smaller_capacity_keeps_only_the_files_that_fit() {
    let dir = folder();
    let large = ArenaConfig::new(dir.path().join("arena"), 16 * MIB, 512 * KIB);
    let (blocks, _) = fill(&open_empty(&large), 120);
    let small = ArenaConfig { capacity_bytes: 9 * MIB, ..large.clone() };
    let (arena, offered) = adopt_all(&small);
    assert!(!offered.is_empty() && offered.len() < blocks.len());
    assert_right(&arena, &offered, &blocks);
    let usage = arena.usage();
    assert!(usage.file_bytes <= small.capacity_bytes, "{usage:?}");
    drop(arena);
    let (arena, again) = adopt_all(&large);
    assert_eq!(again.len(), offered.len());
    assert_right(&arena, &again, &blocks);
}

#[test]
fn a_truncated_a_grown_and_a_foreign_file_are_removed() {
    let dir = folder();
    let config = config(dir.path());
    fill(&open_empty(&config), 20);
    let all = files(&config);
    let owned: Vec<_> = all.iter().filter(|p| std::fs::read(p).unwrap().starts_with(b"KVKARENA")).collect();
    assert!(owned.len() >= 2, "one file per tenant");
    let len = owned[0].metadata().unwrap().len();
    edit(owned[0]).set_len(len - 4096).unwrap();
    edit(owned[1]).set_len(len + 4096).unwrap();
    std::fs::write(config.dir.join("arena-0900.slots"), b"what is this").unwrap();
    let (arena, offered) = adopt_all(&config);
    assert_eq!((offered.len(), arena.adoption().files_adopted), (0, 0));
    assert!(!config.dir.join("arena-0900.slots").exists());
}

#[test]
fn a_file_of_another_layout_version_is_removed() {
    let dir = folder();
    let config = config(dir.path());
    fill(&open_empty(&config), 4);
    for path in files(&config) {
        edit(&path).write_all_at(&[9], 8).unwrap();
    }
    let (arena, offered) = adopt_all(&config);
    assert_eq!((offered.len(), arena.adoption().files_adopted), (0, 0));
}

fn edit(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever a crash or a bad memory cell did to the files, only blocks that are right are offered.
    #[test]
    fn damage_loses_blocks_and_never_changes_one(
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0.0..1.0f64, 1u8.., 1..40usize, any::<bool>()), 1..60)
    ) {
        let dir = folder();
        let config = config(dir.path());
        let (blocks, _) = fill(&open_empty(&config), 30);
        let all = files(&config);
        for (which, place, mask, run, near_start) in damage {
            let path = which.get(&all);
            let file = edit(path);
            let len = file.metadata().unwrap().len();
            // Headers and tables are small and near the start: aim there half of the time.
            let reach = if near_start { 16_384.0 } else { len as f64 - 64.0 };
            let at = (place * reach) as u64;
            let mut bytes = vec![0; run];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes.iter_mut().for_each(|b| *b ^= mask);
            file.write_all_at(&bytes, at).unwrap();
        }
        let (arena, offered) = adopt_all(&config);
        assert_right(&arena, &offered, &blocks);
        assert_adds_up(&arena);
        prop_assert_eq!(arena.usage().blocks, offered.len() as u64);
    }
}

#[test]
fn one_flipped_payload_bit_loses_that_block_alone() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open_empty(&config);
    let (mut blocks, slots) = fill(&arena, 12);
    let pinned = arena.pin(slots[6]).unwrap();
    let bad = pinned.meta().unwrap().id;
    let needle = pinned[..64].to_vec();
    drop((pinned, arena));
    blocks.remove(&bad);
    let mut hits = 0;
    for path in files(&config) {
        let all = std::fs::read(&path).unwrap();
        for at in (0..all.len()).step_by(4096).filter(|at| all[*at..].starts_with(&needle)) {
            edit(&path).write_all_at(&[all[at + 700] ^ 4], at as u64 + 700).unwrap();
            hits += 1;
        }
    }
    assert_eq!(hits, 1);
    let (arena, offered) = adopt_all(&config);
    assert_eq!((offered.len(), arena.adoption().damaged), (blocks.len(), 1));
    assert_right(&arena, &offered, &blocks);
}

#[test]
fn memory_that_turned_bad_is_found_and_never_used_again() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open_empty(&config);
    let slot = put(&arena, TenantId(0), 1, 70_000).unwrap();
    let needle = payload(1, 64);
    for path in files(&config) {
        let all = std::fs::read(&path).unwrap();
        if let Some(at) = (0..all.len()).step_by(4096).find(|at| all[*at..].starts_with(&needle)) {
            edit(&path).write_all_at(&[all[at + 69_999] ^ 1], at as u64 + 69_999).unwrap();
        }
    }
    assert_eq!(arena.verify(slot, || {}), Some(false));
    let held = arena.pin(slot).unwrap();
    let place = held.as_ptr();
    assert!(arena.quarantine(slot));
    assert!(arena.pin(slot).is_none());
    assert_eq!(arena.usage().quarantined_bytes, 0, "somebody still reads it");
    drop(held);
    assert_eq!(arena.usage().quarantined_bytes, 73_728);
    let others: Vec<_> = (0..).map_while(|n| put(&arena, TenantId(0), n, 70_000).ok()).collect();
    assert!(!others.is_empty());
    for slot in &others {
        assert_ne!(arena.pin(*slot).unwrap().as_ptr(), place);
        arena.free(*slot);
    }
    assert_adds_up(&arena);
}

#[test]
fn one_folder_has_one_arena_until_its_last_mapping_is_gone() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open(&config);
    let slot = put(&arena, TenantId(0), 1, 5000).unwrap();
    let refused = Arena::open(config.clone(), &mut |_, _| true).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    let pinned = arena.pin(slot).unwrap();
    drop(arena);
    assert!(Arena::open(config.clone(), &mut |_, _| true).is_err(), "a new arena could write what is still read here");
    assert!(*pinned == *payload(1, 5000));
    assert_eq!(pinned.meta().unwrap_err().kind(), ErrorKind::Unavailable);
    drop(pinned);
    assert_holds(&open(&config), slot, TenantId(0), 1, 5000);
}

#[test]
fn folder_and_files_are_private() {
    let dir = folder();
    let config = config(dir.path());
    std::fs::create_dir(&config.dir).unwrap();
    std::fs::set_permissions(&config.dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let arena = open_empty(&config);
    let mode = |p: &Path| p.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&config.dir), 0o700);
    assert!(!files(&config).is_empty());
    files(&config).iter().for_each(|p| assert_eq!(mode(p), 0o600, "{}", p.display()));
    drop(arena);
}

#[test]
fn a_close_that_removes_leaves_nothing_to_adopt() {
    let dir = folder();
    let config = config(dir.path());
    let arena = open_empty(&config);
    let slot = put(&arena, TenantId(0), 1, 5000).unwrap();
    let pinned = arena.pin(slot).unwrap();
    arena.close(true);
    assert!(arena.reserve(TenantId(0), 1, Purpose::Put).is_err());
    assert!(*pinned == *payload(1, 5000), "what is pinned stays readable");
    assert!(!config.dir.exists(), "the lock and the folder go as well");
    drop((pinned, arena));
    open_empty(&config);
}
