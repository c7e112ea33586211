//! Files that are not what they were: misses, never other bytes, and never a crash.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::{Call, GetItem, MatchQuery, Put, WayWish, Wire};
use kvkeep_core::{Class, MissReason, Tier};
use kvkeep_tests::{Node, Options, formats, leaks, payload};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::restart::forget_memory;

const BYTES: usize = 70_000;

/// A node with 32 durable blocks, stopped; their keys.
async fn with_blocks() -> (Node, Vec<Bytes>) {
    let mut node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let keys = payload::chain(1, 32);
    // Each alone, so that one that is lost takes no other with it.
    let put = Put { unordered: true, ..super::put_of(&keys, BYTES, Class::Durable) };
    assert!(ns.put(&put, &Call::default()).await.unwrap().iter().all(|o| o.is_kept()));
    node.kill();
    (node, keys)
}

/// Starts it and counts the blocks that are there; each that is has its bytes. Then stores all again and finds all.
async fn found_then_mended(node: &mut Node, keys: &[Bytes]) -> usize {
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let found = super::found(&ns, keys, BYTES).await;
    assert_eq!(super::found(&ns, keys, BYTES).await, found, "a block that was served is served again");
    let put = Put { unordered: true, ..super::put_of(keys, BYTES, Class::Durable) };
    let outcomes = ns.put(&put, &Call::default()).await.unwrap();
    assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    assert_eq!(super::found(&ns, keys, BYTES).await, keys.len());
    leaks::nothing_is_held(&client).await;
    found
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for name in leaks::names(folder) {
        let path = folder.join(name);
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// Flips one bit.
fn flip(path: &Path, at: u64, bit: u8) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], at).unwrap();
}

/// Every place in the folder's files where `what` stands.
fn places(folder: &Path, what: &[u8]) -> Vec<(PathBuf, u64)> {
    let mut places = Vec::new();
    for path in files(folder) {
        let data = fs::read(&path).unwrap();
        let first = what[0];
        for at in 0..data.len().saturating_sub(what.len()) {
            if data[at] == first && data[at..].starts_with(what) {
                places.push((path.clone(), at as u64));
            }
        }
    }
    places
}

#[tokio::test]
async fn a_flipped_bit_of_a_header_or_of_a_payload_on_nvme_is_a_miss() {
    let (mut node, keys) = with_blocks().await;
    forget_memory(&node);
    let segments = node.segments_dir();
    for key in &keys[..4] {
        let header = places(&segments, key);
        assert_eq!(header.len(), 1, "a header has the key in full");
        flip(&header[0].0, header[0].1 + 17, 3);
    }
    for key in &keys[4..8] {
        let block = payload::block(key, BYTES);
        // At its start, and in its last chunk.
        for (at, bit) in [(0, 0), (BYTES - 40, 7)] {
            let place = places(&segments, &block[at..at + 32]);
            assert_eq!(place.len(), 1, "a block is written once");
            flip(&place[0].0, place[0].1, bit);
        }
    }
    assert_eq!(found_then_mended(&mut node, &keys).await, 24);
}

#[tokio::test]
async fn flipped_bits_anywhere_in_a_segment_are_never_served() {
    let (mut node, keys) = with_blocks().await;
    forget_memory(&node);
    let mut rng = StdRng::seed_from_u64(kvkeep_tests::seed("flipped_bits_anywhere"));
    let first = places(&node.segments_dir(), &payload::block(&keys[0], BYTES)[..32])[0].clone();
    // Around the blocks: headers, payloads, what lies between.
    for _ in 0..64 {
        let at = first.1.saturating_sub(1 << 16) + rng.random_range(0..(keys.len() * (BYTES + 8192)) as u64);
        flip(&first.0, at, rng.random_range(0..8));
    }
    let found = found_then_mended(&mut node, &keys).await;
    assert!(found < keys.len(), "64 flips hit at least one of {} blocks", keys.len());
}

/// Memory of a crashed server is checked in full before it is served.
#[tokio::test]
async fn a_flipped_bit_in_adopted_memory_is_a_miss_or_read_from_nvme() {
    let (mut node, keys) = with_blocks().await;
    let arena = node.arena_dir().to_owned();
    for key in &keys[..8] {
        let block = payload::block(key, BYTES);
        for (path, at) in places(&arena, &block[1000..1032]) {
            flip(&path, at, 2);
        }
    }
    // Half of those are damaged on NVMe, too.
    for key in &keys[..4] {
        let block = payload::block(key, BYTES);
        for (path, at) in places(&node.segments_dir(), &block[1000..1032]) {
            flip(&path, at, 2);
        }
    }
    assert_eq!(found_then_mended(&mut node, &keys).await, 28);
}

/// A get over the port compares a block piece by piece while it is sent: what is found behind its first piece ends the block.
#[tokio::test]
async fn a_flipped_bit_in_memory_ends_the_part_that_is_being_sent() {
    const BYTES: usize = 2 << 20;
    // A scrub would find the damage as well, and before the get does.
    let node = Node::start(Options { arena: "scrub_bytes_per_s = 0".into(), ..Options::default() });
    let client = node.client_with(|c| c.way = WayWish::Only(Wire::Port)).await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let keys = payload::chain(1, 3);
    let put = super::put_of(&keys, BYTES, Class::Durable);
    assert!(ns.put(&put, &Call::default()).await.unwrap().iter().all(|o| o.is_kept()));
    // In the first piece of one, in the last of the other.
    for (key, at) in [(&keys[0], 1000), (&keys[1], BYTES - 1000)] {
        let place = places(node.arena_dir(), &payload::block(key, BYTES)[at..at + 32]);
        assert_eq!(place.len(), 1, "a block has one slot");
        flip(&place[0].0, place[0].1, 5);
    }
    let items: Vec<_> = keys.iter().cloned().map(GetItem::of).collect();
    let first = ns.get(&items, None, &Call::default()).await.unwrap();
    let told: Vec<_> = first.iter().map(|got| (got.reason, got.tier)).collect();
    let (dram, nvme) = ((None, Some(Tier::Dram)), (None, Some(Tier::Nvme)));
    assert_eq!(told, [nvme, (Some(MissReason::Quarantined), None), dram]);
    let again = ns.get(&items, None, &Call::default()).await.unwrap();
    for (got, key) in first.iter().filter(|got| got.is_hit()).zip([&keys[0], &keys[2]]).chain(again.iter().zip(&keys)) {
        assert!(got.is_hit() && got.data == payload::block(key, BYTES), "{:?}", got.reason);
    }
    leaks::eventually(&client, "both copies are counted", |s| s.counters["kvkeep_corrupt_copies_total"] == 2).await;
    leaks::nothing_is_held(&client).await;
}

/// A scrub and a get find the same damage at the same time, often enough.
#[tokio::test]
async fn a_copy_that_two_find_bad_is_counted_once() {
    const BYTES: usize = 2 << 20;
    let node = Node::start(Options { arena: "scrub_bytes_per_s = 4294967296".into(), ..Options::default() });
    let client = node.client_with(|c| c.way = WayWish::Only(Wire::Port)).await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    for round in 1..=8 {
        let keys = payload::chain(round, 1);
        assert!(ns.put(&super::put_of(&keys, BYTES, Class::Durable), &Call::default()).await.unwrap()[0].is_kept());
        let place = places(node.arena_dir(), &payload::block(&keys[0], BYTES)[BYTES - 1000..][..32]);
        flip(&place[0].0, place[0].1, 5);
        let got = ns.get(&[GetItem::of(keys[0].clone())], None, &Call::default()).await.unwrap();
        assert!(got[0].data.is_empty() || got[0].data == payload::block(&keys[0], BYTES), "{:?}", got[0].reason);
        leaks::eventually(&client, "it is counted", |s| s.counters["kvkeep_corrupt_copies_total"] >= round).await;
        // Who came second has ended: it held the copy.
        leaks::nothing_is_held(&client).await;
        assert_eq!(client.stats(&Call::default()).await.unwrap().counters["kvkeep_corrupt_copies_total"], round);
    }
}

/// The tables beside the slots say which block a slot holds: damage there adopts nothing wrong.
#[tokio::test]
async fn flipped_bits_anywhere_in_arena_files_are_never_served() {
    let (mut node, keys) = with_blocks().await;
    let mut rng = StdRng::seed_from_u64(kvkeep_tests::seed("flipped_bits_anywhere_in_arena"));
    for path in files(node.arena_dir()) {
        let data = fs::read(&path).unwrap();
        let used: Vec<_> = (0..data.len() as u64).filter(|at| data[*at as usize] != 0).collect();
        for _ in 0..400.min(used.len()) {
            flip(&path, used[rng.random_range(0..used.len())], rng.random_range(0..8));
        }
    }
    // Whatever memory says, NVMe has every block.
    assert_eq!(found_then_mended(&mut node, &keys).await, keys.len());
}

#[tokio::test]
async fn a_segment_deleted_or_truncated_while_down_is_misses_and_the_node_starts() {
    type Harm = fn(&Path);
    let harms: [Harm; 3] = [
        |path| fs::remove_file(path).unwrap(),
        |path| File::options().write(true).open(path).unwrap().set_len(0).unwrap(),
        |path| {
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(file.metadata().unwrap().len() / 64).unwrap();
        },
    ];
    for harm in harms {
        let (mut node, keys) = with_blocks().await;
        forget_memory(&node);
        let holding: Vec<_> = files(&node.segments_dir())
            .into_iter()
            .filter(|path| !places(path.parent().unwrap(), &keys[0]).is_empty() && path.metadata().unwrap().len() > 0)
            .collect();
        assert!(!holding.is_empty());
        holding.iter().for_each(|path| harm(path));
        assert!(found_then_mended(&mut node, &keys).await < keys.len());
        node.terminate().await;
        leaks::no_stray_files(&node);
    }
}

#[tokio::test]
async fn without_its_index_the_device_is_empty_and_nothing_is_resurrected() {
    let (mut node, keys) = with_blocks().await;
    forget_memory(&node);
    fs::remove_dir_all(node.index_dir()).unwrap();
    assert_eq!(found_then_mended(&mut node, &keys).await, 0);
    // The room of what is gone can be used again.
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    ns.remove(&keys, &Call::default()).await.unwrap();
    leaks::nothing_is_left(&client).await;
}

/// RocksDB finds the damage, or recovers what came before it: the server refuses to start by name of the index, or serves
/// what is right.
#[tokio::test]
async fn a_flipped_bit_of_the_index_never_brings_wrong_bytes() {
    let mut rng = StdRng::seed_from_u64(kvkeep_tests::seed("a_flipped_bit_of_the_index"));
    let (mut refused, mut started) = (0, 0);
    for round in 0..6 {
        let (mut node, keys) = with_blocks().await;
        forget_memory(&node);
        // The log is replayed at the start; later rounds have it in a table.
        if round % 2 == 1 {
            node.restart();
            node.terminate().await;
            forget_memory(&node);
        }
        let big: Vec<_> = files(&node.index_dir())
            .into_iter()
            .filter(|p| !p.ends_with("LOG") && p.metadata().unwrap().len() > 200)
            .collect();
        for path in &big {
            let bytes = path.metadata().unwrap().len();
            for _ in 0..2 {
                flip(path, rng.random_range(0..bytes), rng.random_range(0..8));
            }
        }
        match node.try_restart() {
            Ok(()) => {
                let client = node.client().await;
                let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
                super::found(&ns, &keys, BYTES).await;
                started += 1;
            }
            Err(said) => {
                assert!(said.contains("index"), "{said}");
                refused += 1;
                fs::remove_dir_all(node.index_dir()).unwrap();
                assert_eq!(found_then_mended(&mut node, &keys).await, 0);
            }
        }
    }
    println!("{refused} refused, {started} started");
}

/// A file system that fills up under the node: writes are refused or skipped, nothing is lost that was acknowledged, and
/// nothing crashes.
#[tokio::test]
async fn a_full_disk_refuses_and_loses_nothing() {
    let can_mount = Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|s| s.success());
    if !can_mount {
        return kvkeep_tests::skipped("a_full_disk_refuses_and_loses_nothing", "no right to mount a small file system");
    }
    let mut node = Node::new(Options { nvme_bytes: 512 << 20, ..Options::default() });
    fs::create_dir_all(node.data_dir()).unwrap();
    let mount = "mount -t tmpfs -o size=200m tmpfs \"$0\" && exec \"$@\"";
    let data_dir = node.data_dir().display().to_string();
    node.options_mut().wrapper = ["unshare", "--mount", "sh", "-c", mount].map(String::from).to_vec();
    node.options_mut().wrapper.push(data_dir);
    node.options_mut().nvme = "segment_bytes = \"32MiB\"\n".into();
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(1 << 20)).await;
    let (mut kept, mut refused) = (Vec::new(), 0);
    for chain in 0..400 {
        let keys = payload::chain(chain, 1);
        let call = Call::default().within(Duration::from_secs(3));
        match ns.put(&super::put_of(&keys, 1 << 20, Class::Durable), &call).await {
            Ok(outcomes) if outcomes[0].is_kept() => kept.extend(keys),
            Ok(_) | Err(_) => refused += 1,
        }
        if refused > 3 {
            break;
        }
    }
    assert!(refused > 0 && kept.len() >= 64, "{refused} refused, {} kept", kept.len());
    assert_eq!(super::found(&ns, &kept, 1 << 20).await, kept.len());
    let found = ns.match_chain(&MatchQuery::of(kept[..1].to_vec()), &Call::default()).await.unwrap();
    assert_eq!(found.boundary_positions, 1);
    // Class cache goes on without the disk.
    let cached = payload::chain(1000, 4);
    super::store(&ns, &cached, 1 << 20, Class::Cache).await;
    assert_eq!(super::found(&ns, &cached, 1 << 20).await, 4);
    leaks::nothing_is_held(&client).await;
    node.kill(); // the mount ends with it
}
