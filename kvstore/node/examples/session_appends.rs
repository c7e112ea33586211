//! Appends to sessions through the one-voter log: `cargo run --release -p kvkeep-node --example session_appends -- DIR
//! [seconds]`.
//!
//! 256 durable sessions, one append of one position in flight for each, in three settings: alone, with token ids (a durable
//! block of 64 of them per append), and alone while other tasks write durable blocks of 1 MiB as fast as the device takes them.
//! Five rounds of each, one after the other, the median first.
//!
//! Floor of an append: one digest, one look at the directory, about 150 bytes in the log and 700 in the state, a share of one
//! sync. With token ids: one write of 4 KiB, a share of a device flush and of two syncs more.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use kvkeep_core::session::text::Tokens;
use kvkeep_core::session::{Declared, SessionId, SessionName};
use kvkeep_core::words::Keeper;
use kvkeep_core::{
    Class, Fidelity, Format, Group, GroupId, Handle, InstanceId, Key, RequestId, RequestInfo, Rule, ShardId, SizeRule,
    TenantId, Topology,
};
use kvkeep_node::config::Config;
use kvkeep_node::size::ByteSize;
use kvkeep_node::store::Store;
use kvkeep_node::store::put::{Caller, PartAnswer, PartWish, PositionWish, ReserveWish};
use kvkeep_node::store::sessions::AppendWish;

const SESSIONS: usize = 256;
/// Positions that exist; a session that has named them all begins anew.
const CHAIN: u64 = 4096;
const SMALL_BYTES: usize = 4096;
const LARGE_BYTES: usize = 1 << 20;
const TOKENS: u64 = 64;
const WRITERS: usize = 4;
const ROUNDS: usize = 5;
const CALLER: Caller = Caller { instance: InstanceId([1; 16]), tenant: TenantId(0) };

#[derive(Clone, Copy)]
enum Setting {
    Alone,
    Tokens,
    BesideWrites,
}

fn format() -> Format {
    Format {
        model: "model".into(),
        dtype: "bf16".into(),
        layout: "example".into(),
        hash_algorithm: "counted".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 1,
            replicated: false,
            size: SizeRule::UpTo(LARGE_BYTES as u64),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

fn key(n: u64) -> Vec<u8> {
    [&b"position"[..], &n.to_le_bytes()].concat()
}

async fn put(store: &Arc<Store>, handle: Handle, n: u64, bytes: &[u8], class: Class) -> anyhow::Result<()> {
    let wish = ReserveWish {
        handle,
        request: RequestId::default(),
        info: RequestInfo::default(),
        parent: None,
        first_position: 0,
        positions: vec![PositionWish {
            key: Key::new(&key(n))?,
            parts: vec![PartWish { group: GroupId(0), shard: ShardId(0), len: bytes.len() as u32 }],
            token_ids: Arc::default(),
        }],
        unordered: true,
        class,
        keeper: Keeper::Caller,
        fidelity: Fidelity::Exact,
        keep: true,
        bytes_max: 0,
        ttl: None,
    };
    let until = tokio::time::Instant::now() + Duration::from_secs(60);
    let reserves = store.reserve(CALLER, wish, until).await?;
    if let Some(lease) = reserves.lease {
        store.release(CALLER, &[lease], &[]);
    }
    let id = match reserves.answers.into_iter().next() {
        Some(PartAnswer::Slot(id)) => id,
        Some(PartAnswer::Present { .. }) => return Ok(()),
        other => bail!("{other:?}"),
    };
    store.fill(CALLER, id, |slot, sums| {
        slot.copy_from_slice(bytes);
        sums.add(bytes);
        Ok(())
    })?;
    let committed = store.commit(CALLER, RequestInfo::default(), vec![(id, Vec::new())]).await;
    committed.into_iter().try_for_each(|(_, result)| result.map(|_| ()))?;
    Ok(())
}

/// Writes durable blocks until it is told to stop; bytes.
async fn write(store: Arc<Store>, handle: Handle, from: u64, stop: Arc<AtomicBool>) -> anyhow::Result<u64> {
    let bytes = vec![7; LARGE_BYTES];
    let mut written = 0;
    let mut n = from;
    while !stop.load(Ordering::Relaxed) {
        put(&store, handle, n, &bytes, Class::Durable).await?;
        // It stays until it is removed, and the device is to take the next.
        let digest = store.digests(CALLER, handle, [&key(n)[..]]);
        store.remove(&digest).await;
        written += LARGE_BYTES as u64;
        n += 1;
    }
    Ok(written)
}

/// One session's appends until the time is over; how long each took, microseconds.
async fn append(
    store: Arc<Store>,
    handle: Handle,
    n: usize,
    round: u64,
    tokens: bool,
    until: Instant,
) -> anyhow::Result<Vec<u32>> {
    let id = SessionId::new(&format!("session-{n}-{round}"))?;
    let name = SessionName { namespace: handle.namespace, id: id.clone() };
    let declared = Declared { class: Some(Class::Durable), ..Declared::default() };
    store.open_session(CALLER, handle, id, declared, None).await?;
    let (mut took, mut at, mut token) = (Vec::new(), 0, 0);
    while Instant::now() < until && at < CHAIN {
        let text = tokens.then(|| Tokens {
            first: token,
            ids: (0..TOKENS as u32).map(|i| i ^ (at as u32) << 8 ^ (n as u32)).collect(),
            content: Vec::new(),
        });
        token += if tokens { TOKENS } else { 0 };
        let keys = vec![Bytes::from(key(at))];
        let wish = AppendWish { name: name.clone(), handle, from_position: at, keys, tokens: text };
        let began = Instant::now();
        store.append_session(CALLER, wish).await?;
        took.push(u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX));
        at += 1;
    }
    store.delete_session(CALLER, &name).await?;
    Ok(took)
}

struct Round {
    appends_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    written_mb_s: f64,
}

async fn round(store: &Arc<Store>, handle: Handle, setting: Setting, time: Duration, n: u64) -> anyhow::Result<Round> {
    let stop = Arc::new(AtomicBool::new(false));
    let writers = if matches!(setting, Setting::BesideWrites) { WRITERS } else { 0 };
    let writing: Vec<_> = (0..writers as u64)
        .map(|w| tokio::spawn(write(Arc::clone(store), handle, (n * 16 + w + 1) << 32, Arc::clone(&stop))))
        .collect();
    let began = Instant::now();
    let until = began + time;
    let tokens = matches!(setting, Setting::Tokens);
    let appending: Vec<_> =
        (0..SESSIONS).map(|s| tokio::spawn(append(Arc::clone(store), handle, s, n, tokens, until))).collect();
    let mut took = Vec::new();
    for one in appending {
        took.extend(one.await??);
    }
    let elapsed = began.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let written = AtomicU64::new(0);
    for one in writing {
        written.fetch_add(one.await??, Ordering::Relaxed);
    }
    took.sort_unstable();
    let at = |share: f64| f64::from(took[((took.len() - 1) as f64 * share) as usize]) / 1000.0;
    Ok(Round {
        appends_s: took.len() as f64 / elapsed,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        written_mb_s: written.into_inner() as f64 / elapsed / 1e6,
    })
}

fn config(dir: &Path) -> anyhow::Result<Config> {
    let mut c = Config { data_dir: dir.join("data"), ..Config::default() };
    c.arena.dir = dir.join("arena");
    c.arena.bytes = ByteSize::gib(1);
    c.nvme.bytes = ByteSize::gib(4);
    c.nvme.keep_free_bytes = ByteSize::mib(64);
    Ok(c.resolve()?)
}

async fn run(dir: PathBuf, time: Duration) -> anyhow::Result<()> {
    let config = config(&dir)?;
    let (store, background) = tokio::task::spawn_blocking(move || Store::open(config)).await??;
    store.start(background);
    let registered = store.register_namespace(CALLER, "example".into(), format(), "weights".into(), false).await?;
    let handle = registered.namespace.handle();
    for n in 0..CHAIN {
        put(&store, handle, n, &[n as u8; SMALL_BYTES], Class::Durable).await?;
    }
    let mut number = 0;
    for (what, setting) in [
        ("alone", Setting::Alone),
        ("with 64 token ids each", Setting::Tokens),
        ("beside durable writes of 1 MiB", Setting::BesideWrites),
    ] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            number += 1;
            rounds.push(round(&store, handle, setting, time, number).await?);
            store.sweep_sessions().await;
        }
        rounds.sort_by(|a, b| a.appends_s.total_cmp(&b.appends_s));
        let (least, most) = (rounds[0].appends_s, rounds[ROUNDS - 1].appends_s);
        let m = &rounds[ROUNDS / 2];
        println!(
            "{what}: {:.0} appends/s ({least:.0} to {most:.0}), p50 {:.1} ms, p99 {:.1} ms, L3 written {:.0} MB/s",
            m.appends_s, m.p50_ms, m.p99_ms, m.written_mb_s
        );
    }
    store.close().await;
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir: PathBuf = args.next().context("which folder? On the device that is to be measured.")?.into();
    let time = Duration::from_secs(args.next().map_or(Ok(5), |n| n.parse())?);
    std::fs::create_dir_all(&dir)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(dir, time))
}
