//! `demo`: a node of its own, a small session put durably, `kill -9`, and the same bytes again.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_client::{Call, Client, ClientConfig, GetItem, Lost, MatchQuery, Namespace, PartOutcome, Put, PutPosition};
use kvkeep_core::{Class, Format, Group, Rule, SizeRule, Tier, Topology};
use serde_json::json;

use crate::args::DemoArgs;
use crate::failure::{Failure, Outcome};
use crate::kvkeepd::{self, Kvkeepd};
use crate::output::Output;
use crate::units;

/// Bytes of one block: what 16 tokens of a small model take.
const BLOCK_BYTES: usize = 256 * 1024;
/// Tokens of one block.
const TOKENS: u32 = 16;

/// tmpfs on every Linux.
const ARENA_PARENT: &str = "/dev/shm";
/// Enough for the largest session that can be asked for, as `kvkeepd` reads it.
const ARENA_BYTES: &str = "256MiB";

/// What one look at the session found.
struct Seen {
    matched: u32,
    tokens: u64,
    hits: usize,
    dram: usize,
    nvme: usize,
    bytes: u64,
    wrong: u64,
    took: Duration,
}

/// `demo`
pub async fn run(args: &DemoArgs, out: &Output) -> Outcome {
    // An interrupted demo leaves nothing behind: dropping it kills the server and removes the folder.
    tokio::select! {
        done = demo(args, out) => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::failed("interrupted")),
    }
}

async fn demo(args: &DemoArgs, out: &Output) -> Outcome {
    let began = Instant::now();
    let program = kvkeepd::find(args.kvkeepd.as_deref())?;
    let home = tempfile::Builder::new().prefix("kvkeep-demo-").tempdir()?;
    // The arena has a folder of its own too, so that a killed server leaves none behind.
    let arena = tempfile::Builder::new().prefix("kvkeep-demo-").tempdir_in(ARENA_PARENT)?;
    let log = home.path().join("kvkeepd.log");
    let server_args = |listen: &str| {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (data, arena) = (text(&home.path().join("data")), text(arena.path()));
        ["--data-dir", &data, "--listen", listen, "--arena-dir", &arena, "--arena-bytes", ARENA_BYTES]
            .map(str::to_owned)
            .to_vec()
    };
    let keys: Vec<Bytes> = (0..args.positions).map(|i| Bytes::from(format!("demo-session/{i:04}"))).collect();

    let server = Kvkeepd::start(&program, &server_args(&free_port()?), &log).await?;
    let listen = server.listen.clone();
    say(out, "kvkeepd", &format!("serves on {listen} after {} (pid {})", seconds(began.elapsed()), server.pid))?;

    let client = Client::connect(ClientConfig { lost: Lost::Errors, ..ClientConfig::to(listen.as_str()) }).await?;
    let ns = client.register_namespace("demo", &format(), "demo-weights-1").await?;
    let put_began = Instant::now();
    let stored = put(&ns, &keys).await?;
    say(
        out,
        "put",
        &format!(
            "{} blocks of {} stored as durable in {}: flushed to disk, index synced",
            stored,
            units::bytes(BLOCK_BYTES as u64),
            seconds(put_began.elapsed())
        ),
    )?;
    let before = look(&ns, &keys).await?;
    say_seen(out, &before)?;

    let pid = server.pid;
    let killed = Instant::now();
    server.kill().await?;
    say(out, "kill -9", &format!("pid {pid} is gone"))?;
    let server = Kvkeepd::start(&program, &server_args(&listen), &log).await?;
    let restart = killed.elapsed();
    say(out, "kvkeepd", &format!("serves again after {} (pid {})", seconds(restart), server.pid))?;

    // The client is the one of before: it finds its new server, and says hello again, by itself.
    let after = look(&ns, &keys).await?;
    let kill_to_hits = killed.elapsed();
    say_seen(out, &after)?;
    server.kill().await?;
    let total = began.elapsed();
    say(
        out,
        "done",
        &format!(
            "every byte was there again {} after kill -9; the whole demo took {}",
            seconds(kill_to_hits),
            seconds(total)
        ),
    )?;
    if out.is_json() {
        let seen = |s: &Seen| {
            json!({
                "matched_positions": s.matched, "matched_tokens": s.tokens, "hits": s.hits,
                "hits_dram": s.dram, "hits_nvme": s.nvme, "bytes_verified": s.bytes, "bytes_wrong": s.wrong,
                "us": s.took.as_micros() as u64,
            })
        };
        let fields = json!({
            "stored_blocks": stored,
            "before_kill": seen(&before),
            "after_kill": seen(&after),
            "restart_ms": restart.as_millis() as u64,
            "kill_to_hits_ms": kill_to_hits.as_millis() as u64,
            "total_ms": total.as_millis() as u64,
        });
        out.answer("demo", fields, String::new)?;
    }
    for seen in [&before, &after] {
        if seen.hits != keys.len() || seen.wrong != 0 {
            return Err(Failure::failed(format!(
                "{} of {} blocks came back, {} bytes of them wrong",
                seen.hits,
                keys.len(),
                seen.wrong
            )));
        }
    }
    Ok(())
}

/// A port that was free a moment ago.
fn free_port() -> Outcome<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

fn format() -> Format {
    Format {
        model: "demo".into(),
        dtype: "bf16".into(),
        layout: "demo".into(),
        hash_algorithm: "none".into(),
        hash_seed: String::new(),
        tokens_per_key: TOKENS,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: TOKENS,
            shards: 1,
            replicated: false,
            size: SizeRule::Exact(BLOCK_BYTES as u64),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

/// The bytes that stand under a key: a stream of xorshift64* that begins with the key's hash, so that reading can check
/// every one of them.
fn content(key: &[u8]) -> Bytes {
    let mut x = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    while bytes.len() < BLOCK_BYTES {
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        bytes.extend_from_slice(&x.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.into()
}

async fn put(ns: &Namespace, keys: &[Bytes]) -> Outcome<usize> {
    let positions = keys.iter().map(|k| PutPosition::of(k.clone(), content(k))).collect();
    let put = Put { positions, class: Some(Class::Durable), ..Put::default() };
    let outcomes = ns.put(&put, &Call::default()).await?;
    for outcome in &outcomes {
        match outcome {
            PartOutcome::Stored { class: Class::Durable, .. } => {}
            PartOutcome::Refused(e) => return Err(e.clone().into()),
            other => return Err(Failure::failed(format!("a block was not stored as durable: {other:?}"))),
        }
    }
    Ok(outcomes.len())
}

async fn look(ns: &Namespace, keys: &[Bytes]) -> Outcome<Seen> {
    let call = Call::default();
    let began = Instant::now();
    let found = ns.match_chain(&MatchQuery::of(keys.to_vec()).leased(Duration::from_secs(10)), &call).await?;
    let items: Vec<_> = keys.iter().cloned().map(GetItem::of).collect();
    let parts = ns.get(&items, found.lease_id(), &call).await?;
    let took = began.elapsed();
    let hits: Vec<_> = parts.iter().zip(keys).filter(|(p, _)| p.is_hit()).collect();
    let of = |tier| hits.iter().filter(|(p, _)| p.tier == Some(tier)).count();
    let wrong = |(p, key): &(&kvkeep_client::GotPart, &Bytes)| {
        let want = content(key);
        want.iter().zip(p.data.iter()).filter(|(a, b)| a != b).count() + want.len().abs_diff(p.data.len())
    };
    ns.release(found.lease_id().as_slice(), &[], &call).await?;
    Ok(Seen {
        matched: found.boundary_positions,
        tokens: found.boundary_tokens,
        hits: hits.len(),
        dram: of(Tier::Dram),
        nvme: of(Tier::Nvme),
        bytes: hits.iter().map(|(p, _)| p.data.len() as u64).sum(),
        wrong: hits.iter().map(wrong).sum::<usize>() as u64,
        took,
    })
}

fn say(out: &Output, what: &str, text: &str) -> Outcome {
    Ok(out.say(&format!("{what:<8} {text}"))?)
}

fn say_seen(out: &Output, seen: &Seen) -> Outcome {
    say(out, "match", &format!("{} positions, {} tokens", seen.matched, seen.tokens))?;
    say(
        out,
        "get",
        &format!(
            "{} hits ({} from DRAM, {} from NVMe), {} compared with what was put, {} bytes wrong, in {}",
            seen.hits,
            seen.dram,
            seen.nvme,
            units::bytes(seen.bytes),
            seen.wrong,
            seconds(seen.took)
        ),
    )
}

fn seconds(d: Duration) -> String {
    format!("{:.2} s", d.as_secs_f64())
}
