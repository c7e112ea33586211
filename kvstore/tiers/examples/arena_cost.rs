//! What the arena costs: nanoseconds of its calls, GB/s of its copies and checksums, seconds of memory and adoption.
//!
//! `cargo run --release -p kvkeep-tiers --example arena_cost [DIR]`; DIR lies on tmpfs (default `/dev/shm`). One thread.
//! Each figure is the median of 7 rounds (least .. most); the variants of a round take turns in going first.
//!
//! The floor: a reservation is one lock and two list operations; publishing writes one entry of some 256 bytes; a copy moves
//! each byte once, and reads the destination's line first unless it streams.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use kvkeep_core::ids::{BlockId, DigestKey, GroupId, Handle, Key, KeyDomain, NamespaceId, Revision, ShardId, TenantId};
use kvkeep_core::{BlockMeta, ChunkSums, Class, Fidelity, SlotRef, Version};
use kvkeep_tiers::copy::copy_cold;
use kvkeep_tiers::dram::{Arena, ArenaConfig, NoRoomReason, Purpose, Reserved};

const ROUNDS: usize = 7;
const TENANT: TenantId = TenantId(0);
const CAPACITY_BYTES: u64 = 1 << 30;
/// Far over the last-level cache.
const COPIED_BYTES: usize = 256 << 20;

type Failure = Box<dyn std::error::Error>;

/// Median, least and most of what the rounds gave.
fn line(what: &str, unit: &str, mut rounds: Vec<f64>) {
    rounds.sort_by(f64::total_cmp);
    let (least, most) = (rounds[0], rounds[rounds.len() - 1]);
    println!("{what:<44} {:>9.1} {unit:<5} ({least:.1} .. {most:.1})", rounds[rounds.len() / 2]);
}

fn meta(n: u64, len: usize, sums: &ChunkSums) -> Result<BlockMeta, Failure> {
    let handle = Handle { namespace: NamespaceId(1), revision: Revision(1) };
    let key = Key::new(&[n.to_le_bytes(); 4].concat())?;
    let digest = DigestKey::from_bytes([1; 16]).digest(KeyDomain(0), handle, key.as_bytes());
    Ok(BlockMeta {
        id: BlockId { digest, group: GroupId(0), shard: ShardId(0) },
        tenant: TENANT,
        handle,
        key,
        version: Version(n + 1),
        class: Class::Cache,
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position: n as u32,
        parent: None,
        len: len as u32,
        sums: sums.clone(),
    })
}

fn reserve(arena: &Arena, len: usize) -> Result<Reserved, Failure> {
    loop {
        match arena.reserve(TENANT, len as u32, Purpose::Put) {
            Ok(reserved) => return Ok(reserved),
            Err(no) if no.reason == NoRoomReason::Growing => std::thread::yield_now(),
            Err(no) => return Err(no.to_string().into()),
        }
    }
}

fn calls(arena: &Arena, len: usize, count: usize) -> Result<(), Failure> {
    let sums = ChunkSums::of(&vec![0; len]);
    let metas: Vec<BlockMeta> = (0..count as u64).map(|n| meta(n, len, &sums)).collect::<Result<_, _>>()?;
    let mut figures: [Vec<f64>; 5] = Default::default();
    // The first round makes files and extents; it is not counted.
    for round in 0..=ROUNDS {
        let mut took = [0.0; 5];
        let mut timed = |which: usize, began: Instant| took[which] = began.elapsed().as_nanos() as f64 / count as f64;
        let began = Instant::now();
        let reserved: Vec<Reserved> = (0..count).map(|_| reserve(arena, len)).collect::<Result<_, _>>()?;
        timed(0, began);
        let began = Instant::now();
        let mut slots: Vec<SlotRef> = Vec::with_capacity(count);
        for (reserved, meta) in reserved.into_iter().zip(&metas) {
            slots.push(reserved.publish(meta)?);
        }
        timed(1, began);
        let began = Instant::now();
        for slot in &slots {
            black_box(arena.pin(*slot).map(|p| p[0]));
        }
        timed(2, began);
        let began = Instant::now();
        for (slot, meta) in slots.iter().zip(&metas) {
            black_box(arena.pin(*slot).is_some_and(|p| p.holds(&meta.id, meta.key.as_bytes())));
        }
        timed(3, began);
        let began = Instant::now();
        for slot in &slots {
            arena.free(*slot);
        }
        timed(4, began);
        if round > 0 {
            figures.iter_mut().zip(took).for_each(|(all, one)| all.push(one));
        }
    }
    let names = ["reserve", "publish", "pin, unpin", "pin, compare the key, unpin", "free"];
    for (name, rounds) in names.into_iter().zip(figures) {
        line(&format!("{name}, {} KiB slots", len >> 10), "ns", rounds);
    }
    Ok(())
}

fn copies(arena: &Arena, len: usize) -> Result<(), Failure> {
    let from: Vec<u8> = (0..COPIED_BYTES).map(|i| (i as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
    let mut slots: Vec<Reserved> = (0..COPIED_BYTES / len).map(|_| reserve(arena, len)).collect::<Result<_, _>>()?;
    let mut figures: [Vec<f64>; 3] = Default::default();
    for round in 0..=ROUNDS {
        for turn in 0..figures.len() {
            let which = (round + turn) % figures.len();
            let began = Instant::now();
            for (slot, from) in slots.iter_mut().zip(from.chunks_exact(len)) {
                match which {
                    0 => slot.bytes_mut()?.copy_from_slice(from),
                    1 => copy_cold(slot.bytes_mut()?, from),
                    _ => _ = black_box(ChunkSums::of(slot.bytes()?)),
                }
            }
            if round > 0 {
                figures[which].push(COPIED_BYTES as f64 / 1e9 / began.elapsed().as_secs_f64());
            }
        }
    }
    let names = ["copy into cold slots, std", "copy into cold slots, streaming", "crc32 of cold slots"];
    for (name, rounds) in names.into_iter().zip(figures) {
        line(&format!("{name}, {} KiB", len >> 10), "GB/s", rounds);
    }
    Ok(())
}

fn adoption(config: &ArenaConfig, len: usize) -> Result<(), Failure> {
    let arena = Arena::open(config.clone(), &mut |_, _| false)?;
    let bytes = vec![7; len];
    let sums = ChunkSums::of(&bytes);
    for n in 0..COPIED_BYTES / len {
        let mut reserved = reserve(&arena, len)?;
        reserved.write_at(0, &bytes)?;
        reserved.publish(&meta(n as u64, len, &sums)?)?;
    }
    drop(arena);
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let arena = Arena::open(config.clone(), &mut |_, _| true)?;
        let report = arena.adoption();
        rounds.push(report.bytes as f64 / 1e9 / report.took.as_secs_f64());
    }
    line(&format!("adoption (map, verify all), {} KiB slots", len >> 10), "GB/s", rounds);
    Ok(())
}

fn main() -> Result<(), Failure> {
    let base = std::env::args().nth(1).map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    let dir = base.join(format!("kvkeep-arena-cost-{}", std::process::id()));
    let config = ArenaConfig::new(dir.join("arena"), CAPACITY_BYTES, 1 << 20);
    let began = Instant::now();
    let arena = Arena::open(config.clone(), &mut |_, _| false)?;
    println!("load: {}", std::fs::read_to_string("/proc/loadavg")?.trim());
    println!("open with the first file of {} MiB: {:.0?}", config.file_bytes() >> 20, began.elapsed());
    println!("pages of {} bytes, as smaps shows", arena.page_bytes()?);
    calls(&arena, 4 << 10, 16_384)?;
    calls(&arena, 1 << 20, 512)?;
    copies(&arena, 1 << 20)?;
    copies(&arena, 128 << 10)?;
    arena.close(true);
    drop(arena);
    adoption(&config, 1 << 20)?;
    adoption(&config, 4 << 10)?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
