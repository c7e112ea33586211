//! What the Rust side of `python/tests/bench.py` does: windows of gets and matches through an [`Engine`], one for each line of its
//! input (`get` or `match`), and a line with what came of it (GB/s, or p50 and p99 in milliseconds).
//!
//! `engine_speed ENDPOINT NAMESPACE WINDOW_MS`; the namespace and its blocks are those that `bench.py` has put.

use std::io::BufRead as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_client::{Call, ClientConfig, Engine, EngineConfig, GetItem, MatchQuery, Region};
use kvkeep_core::{Format, Group, Rule, SizeRule, Topology};

const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 64;
const KEYS: usize = 4096;

fn format() -> Format {
    let size = SizeRule::Exact(BLOCK_BYTES as u64);
    Format {
        model: "bench".into(),
        dtype: "bf16".into(),
        layout: "bench".into(),
        hash_algorithm: "counter".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group { rule: Rule::All, tokens_per_block: 16, shards: 1, replicated: false, size }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

/// The keys of `bench.py`.
fn keys(n: usize) -> Vec<Bytes> {
    (0..n).map(|i| Bytes::from(format!("{i:032}"))).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, endpoint, namespace, window_ms] = &arguments[..] else {
        return Err("engine_speed ENDPOINT NAMESPACE WINDOW_MS".into());
    };
    let window = Duration::from_millis(window_ms.parse()?);
    let client = ClientConfig { patience: Duration::from_secs(5), ..ClientConfig::to(endpoint) };
    let engine = Engine::open(EngineConfig { client, ..EngineConfig::new(namespace, format(), "weights") })?;
    if !engine.ready(Duration::from_secs(10))? {
        return Err(engine.describe()?.to_string().into());
    }
    let (region, call) = (Region::new(BLOCKS * BLOCK_BYTES)?, Call::default());
    engine.register(&region, Duration::from_secs(10))?;
    for line in std::io::stdin().lock().lines() {
        let (began, mut rounds, mut took) = (Instant::now(), 0, Vec::new());
        if line? == "get" {
            while began.elapsed() < window {
                let items = keys(BLOCKS).into_iter().map(GetItem::of).collect();
                // SAFETY: one call at a time has them, and nobody looks.
                let places = (0..BLOCKS).map(|n| unsafe { region.place(n * BLOCK_BYTES, BLOCK_BYTES) }).collect();
                let got = engine.get(items, places, None, &call)?;
                assert!(got.iter().all(kvkeep_client::GotInto::is_hit), "{}", engine.describe()?);
                rounds += 1;
            }
            println!("{}", (rounds * BLOCKS * BLOCK_BYTES) as f64 / began.elapsed().as_secs_f64() / 1e9);
            continue;
        }
        while began.elapsed() < window {
            let keys = keys(KEYS);
            let one = Instant::now();
            let found = engine.match_chain(MatchQuery::of(keys), &call)?;
            took.push(one.elapsed());
            assert_eq!(found.boundary_positions as usize, BLOCKS, "{}", engine.describe()?);
        }
        took.sort_unstable();
        let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)].as_secs_f64() * 1e3;
        println!("{} {}", at(50), at(99));
    }
    Ok(())
}
