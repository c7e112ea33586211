//! What the directory costs: bytes per tracked position, time per insert, match, lease, access and victim.
//!
//! `cargo run --release -p kvkeep-core --example directory_cost -- [positions] [policy]` (10,000,000 and sage unless said).
//! One group, one shard, 32-byte keys (which the directory does not keep), chains of 4,096. In chain order every position
//! is put in DRAM and then on NVMe; in the order of digests it is found on NVMe, as when an index is opened.
//! Matches are timed by the wall clock, the rest by the time on the processor. Floors: an insert or a look-up of a position that is in no cache is 2 to 3 misses to memory (table, entry, and for an
//! insert the list's old end); 128 bytes per position is the bar.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant as Clock};

use kvkeep_core::directory::{Directory, DirectoryLimits, Dropped, Inserted, Matcher, Placed, SLICE};
use kvkeep_core::{
    BlockId, BlockMeta, ChunkSums, Class, Digest, DigestKey, Fidelity, Format, Group, GroupId, Handle, InstanceId,
    Instant, Key, KeyDomain, LeaseAsk, LeaseId, MissReason, NamespaceId, NvmePlace, PolicyKind, RequestId, RequestInfo,
    Revision, Rule, ShardId, SizeRule, SlotRef, TenantId, Tier, Topology, Version,
};

const CHAIN: usize = 4096;
const MATCHES: usize = 400;
const FITS: usize = 21;
const HANDLE: Handle = Handle { namespace: NamespaceId(1), revision: Revision(1) };

fn main() {
    let positions: usize = argument(1, 10_000_000);
    let kind = argument(2, PolicyKind::Sage);
    let positions = positions.next_multiple_of(CHAIN);
    let digests: Vec<Digest> = (0..positions).map(digest).collect();
    println!("{positions} positions, chains of {CHAIN}, policy {kind}");

    chain_order(&digests, kind);
    digest_order(&digests, kind);
}

fn argument<T: std::str::FromStr<Err: std::fmt::Display>>(n: usize, default: T) -> T {
    match std::env::args().nth(n).map(|text| text.parse()) {
        None => default,
        Some(Ok(value)) => value,
        Some(Err(e)) => {
            eprintln!("argument {n}: {e}");
            std::process::exit(2);
        }
    }
}

/// As a node meets them: each chain from its start, then the main calls on random chains.
fn chain_order(digests: &[Digest], kind: PolicyKind) {
    let format = format();
    let before = resident_bytes();
    let mut dir = Directory::new(DirectoryLimits::default(), kind);
    let start = on_cpu();
    let parent = |i: usize| (!i.is_multiple_of(CHAIN)).then(|| digests[i - 1]);
    insert(&mut dir, &format, digests.iter().enumerate().map(|(i, d)| (i, *d, parent(i))), true);
    let took = on_cpu() - start;
    let grown = resident_bytes() - before;
    println!("insert in chain order     {:>9.1} ns each, {:.2} s", per(took, digests.len()), took.as_secs_f64());
    println!("memory                    {:>9.1} bytes per position", grown as f64 / digests.len() as f64);

    let info = RequestInfo::default();
    let mut random = Random(7);
    let chains = NonZeroUsize::new(digests.len() / CHAIN).expect("at least one chain");
    for leased in [false, true] {
        let mut times = Vec::new();
        let mut longest_hold = Duration::ZERO;
        for n in 0..MATCHES {
            let first = random.below(chains) * CHAIN;
            let chain = &digests[first..first + CHAIN];
            let ask = leased.then(|| LeaseAsk {
                instance: InstanceId([1; 16]),
                request: RequestId::default(),
                fresh: LeaseId(n as u64 + 1),
                handle: HANDLE,
                ttl: Duration::from_secs(30),
            });
            let clock = Clock::now();
            let mut matcher = Matcher::new(&format, chain.len(), Fidelity::Exact, false, ask);
            for slice in chain.chunks(SLICE) {
                let hold = Clock::now();
                matcher.feed(&mut dir, slice, Instant(1)).expect("within the bounds");
                longest_hold = longest_hold.max(hold.elapsed());
            }
            while matcher.settle(&mut dir, &info, Instant(1)) {}
            let outcome = matcher.finish(|_| None);
            times.push(clock.elapsed());
            assert_eq!(outcome.boundary_positions as usize, CHAIN);
            if let Some(lease) = outcome.lease {
                dir.release(lease);
                while dir.part(SLICE) {}
            }
        }
        times.sort();
        let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        let what = if leased { "match + lease of 4,096    " } else { "match of 4,096            " };
        println!(
            "{what}{:>9.1} ns per key, p50 {:.0} us, p99 {:.0} us, longest lock hold {:.0} us",
            per(p50, CHAIN),
            micros(p50),
            micros(p99),
            micros(longest_hold)
        );
    }

    let draws: Vec<usize> =
        (0..1_000_000).map(|_| random.below(chains) * CHAIN + random.below(chains) % CHAIN).collect();
    let start = on_cpu();
    for i in &draws {
        assert!(dir.access(&digests[*i], &info, Instant(2)));
    }
    println!("access, random            {:>9.1} ns each", per(on_cpu() - start, draws.len()));

    let victims = digests.len() / 4;
    let start = on_cpu();
    for _ in 0..victims {
        let victim = dir.victim(Tier::Dram, Instant(3)).expect("there are leaves");
        for part in &victim.parts {
            let id = BlockId { digest: victim.digest, group: part.group, shard: part.shard };
            let slot = part.slot.expect("a victim in DRAM has a slot");
            assert_eq!(dir.drop_slot(&id, slot, MissReason::Evicted), Dropped::StillOnNvme);
        }
    }
    println!("victim and drop, DRAM     {:>9.1} ns each", per(on_cpu() - start, victims));
    // A victim long after: every position has grown older, and what was seen is learned from.
    let (start, later) = (Clock::now(), Instant(120_000));
    dir.victim(Tier::Dram, later).expect("there are leaves");
    println!("a victim that learns first {:>8.1} us", micros(start.elapsed()));
    let later = if kind == PolicyKind::Sage { fits(&mut dir, later) } else { later };
    let (start, before) = (on_cpu(), resident_bytes());
    for _ in 0..victims {
        let victim = dir.victim(Tier::Nvme, later).expect("there are leaves");
        for part in &victim.parts {
            let id = BlockId { digest: victim.digest, group: part.group, shard: part.shard };
            let place = part.place.expect("a victim on NVMe has a place");
            dir.drop_place(&id, place, MissReason::Evicted);
        }
    }
    println!("victim and drop, NVMe     {:>9.1} ns each", per(on_cpu() - start, victims));
    let (grown, ghosts) = (resident_bytes().saturating_sub(before), dir.ghosts());
    println!("ghosts                    {:>9.1} bytes each, {ghosts}", grown as f64 / ghosts.max(1) as f64);
    let start = on_cpu();
    for digest in digests {
        dir.remove(digest, MissReason::Removed);
    }
    println!("remove                    {:>9.1} ns each", per(on_cpu() - start, digests.len()));
    assert_eq!(dir.entries(), 0);
}

/// As an index is opened: on NVMe, in the order of digests, children before or after their parents.
fn digest_order(digests: &[Digest], kind: PolicyKind) {
    let format = format();
    // What an index gives, side by side: number, digest, parent.
    let mut index: Vec<(usize, Digest, Option<Digest>)> =
        (0..digests.len()).map(|i| (i, digests[i], (!i.is_multiple_of(CHAIN)).then(|| digests[i - 1]))).collect();
    index.sort_unstable_by_key(|(_, digest, _)| *digest);
    let before = resident_bytes();
    let mut dir = Directory::new(DirectoryLimits::default(), kind);
    let start = on_cpu();
    for slice in index.chunks(SLICE) {
        dir.warm(slice.iter().filter_map(|(_, _, parent)| parent.as_ref()));
        insert(&mut dir, &format, slice.iter().copied(), false);
    }
    let took = on_cpu() - start;
    let grown = resident_bytes() - before;
    println!("insert in digest order    {:>9.1} ns each, {:.2} s", per(took, digests.len()), took.as_secs_f64(),);
    println!("memory                    {:>9.1} bytes per position", grown as f64 / digests.len() as f64);
}

/// Inserts positions given as (number, digest, parent), in DRAM and then on NVMe or only on NVMe.
fn insert(
    dir: &mut Directory,
    format: &Format,
    positions: impl Iterator<Item = (usize, Digest, Option<Digest>)>,
    both: bool,
) {
    let info = RequestInfo::default();
    let mut meta = BlockMeta {
        id: BlockId { digest: digest(0), group: GroupId(0), shard: ShardId(0) },
        tenant: TenantId(0),
        handle: HANDLE,
        key: Key::new(&[1; 32]).expect("a key of 32 bytes"),
        version: Version(1),
        class: Class::Cache,
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position: 0,
        parent: None,
        len: 65_536,
        sums: ChunkSums::default(),
    };
    for (i, digest, parent) in positions {
        meta.id.digest = digest;
        meta.position = (i % CHAIN) as u32;
        meta.parent = parent;
        let slot = SlotRef::from_raw(i as u64 + 1).expect("not zero");
        let place = NvmePlace::from_raw(i as u64 + 1).expect("not zero");
        let at = if both { Placed::Dram(slot) } else { Placed::Nvme(place) };
        let stored = dir.insert(&meta, format, at, &info, Instant(0)).expect("within the bounds");
        assert_eq!(stored, Inserted::Stored);
        if both {
            assert!(dir.set_nvme(&meta.id, meta.version, place));
        }
    }
}

fn digest(i: usize) -> Digest {
    DigestKey::from_bytes([9; 16]).digest(KeyDomain(0), HANDLE, &(i as u64).to_le_bytes())
}

fn format() -> Format {
    Format {
        model: "cost".into(),
        dtype: "bf16".into(),
        layout: "any".into(),
        hash_algorithm: "any".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 1,
            replicated: false,
            size: SizeRule::Exact(65_536),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

/// xorshift64*: enough to choose chains.
struct Random(u64);

impl Random {
    fn below(&mut self, n: NonZeroUsize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) as usize % n
    }
}

fn per(took: Duration, n: usize) -> f64 {
    took.as_nanos() as f64 / n as f64
}

fn micros(d: Duration) -> f64 {
    d.as_nanos() as f64 / 1000.0
}

/// Time that this thread has spent on a processor: what a phase of seconds costs, whoever else is running.
fn on_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has /proc");
    let nanos = stat.split_whitespace().next().and_then(|n| n.parse().ok()).expect("its first field is a number");
    Duration::from_nanos(nanos)
}

/// Anonymous memory of this process, bytes, as the kernel counts it.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has /proc");
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).expect("RssAnon is in it");
    let kib: usize = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    kib * 1024
}

/// What learning costs whoever waits for the directory: within a victim, and apart from it, by the wall clock: the
/// time on the processor is counted too coarsely for it. Answers the time it is then.
fn fits(dir: &mut Directory, mut now: Instant) -> Instant {
    let mut next = || {
        now = now.after(Duration::from_secs(61));
        now
    };
    let mut within: Vec<Duration> = Vec::new();
    for _ in 0..FITS {
        let (at, start) = (next(), Clock::now());
        dir.victim(Tier::Dram, at).expect("there are leaves");
        within.push(start.elapsed());
    }
    dir.fit_elsewhere();
    let (mut locked, mut longest, mut free) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..FITS {
        let at = next();
        let mut holds = [Duration::ZERO; 3];
        let start = Clock::now();
        dir.victim(Tier::Dram, at).expect("there are leaves");
        holds[0] = start.elapsed();
        let start = Clock::now();
        let fit = dir.begin_fit().expect("it is time to");
        holds[1] = start.elapsed();
        let start = Clock::now();
        let fitted = fit.run();
        free.push(start.elapsed());
        let start = Clock::now();
        dir.end_fit(fitted);
        holds[2] = start.elapsed();
        locked.push(holds.iter().sum());
        longest.push(holds[1].max(holds[2]));
    }
    let middle = |mut times: Vec<Duration>| {
        times.sort();
        micros(times[times.len() / 2])
    };
    println!(
        "a fit within a victim      {:>8.1} us; apart: {:.1} us without the lock, {:.1} us with it, at most {:.1} us at a time",
        middle(within),
        middle(free),
        middle(locked),
        middle(longest)
    );
    now
}
