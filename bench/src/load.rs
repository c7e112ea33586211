//! `load`: gets and puts of mixed sizes. Closed loop: each client sends when its last call has ended. Open loop (`--rate`):
//! calls are due at times drawn beforehand, and a latency counts from the time a call was due, so that a slow answer cannot
//! hide the calls it held up.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::Args;
use kvkeep_client::{Call, Client, GetItem, Namespace, PartOutcome, Put, PutPosition};
use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_core::{Class, Format, Group, GroupId, Rule, ShardId, SizeRule, Topology};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;

use crate::block_bytes::{self, Seed};
use crate::keys::PrefixId;
use crate::measure::{Latencies, LatencySummary, gb_per_s, load_average};
use crate::replay::plan::{ClassArg, ServerArgs};
use crate::replay::report::write_json;
use crate::units::{SizeMix, parse_share};

/// Most clients: calls in flight.
const CLIENTS_MAX: u32 = 4096;
/// Most blocks stored before the load begins.
const POPULATION_MAX: u64 = 1 << 24;
/// Longest load, seconds.
const SECONDS_MAX: u64 = 86_400;

/// Flags of `kvkeep-bench load`.
#[derive(Args, Debug)]
pub struct LoadCommand {
    #[command(flatten)]
    server: ServerArgs,
    /// Calls in flight at most
    #[arg(long, default_value_t = 8)]
    clients: u32,
    /// Calls per second, due at times of their own (open loop); none: closed loop
    #[arg(long)]
    rate: Option<f64>,
    /// Seconds of load
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Block sizes and weights
    #[arg(long, default_value = "64KiB:0.5,1MiB:0.5")]
    mix: SizeMix,
    /// Share of gets; the rest are puts of new blocks
    #[arg(long, default_value_t = 0.8, value_parser = parse_share)]
    get_share: f64,
    /// Blocks stored before the load begins; gets choose among them
    #[arg(long, default_value_t = 512)]
    population: u64,
    /// Class of the puts
    #[arg(long, value_enum, default_value = "cache")]
    class: ClassArg,
    /// Of sizes, choices and times
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One direction of a load.
#[derive(Default)]
struct Way {
    latency: Latencies,
    bytes: u64,
    misses: u64,
    failed: u64,
}

#[derive(Default)]
struct Counts {
    get: Way,
    put: Way,
    bytes_verified: u64,
    bytes_wrong: u64,
    errors: BTreeMap<String, u64>,
}

/// When the next call is due.
enum Arrivals {
    Closed,
    Open(Box<Poisson>),
}

/// Independent arrivals: the time of the next one, and what the gaps are drawn from.
struct Poisson {
    next: Mutex<(Instant, StdRng)>,
    mean: Duration,
}

struct Shared {
    namespace: Namespace,
    command: LoadCommand,
    next_id: AtomicU64,
    arrivals: Arrivals,
    ends: Instant,
}

/// The report: `kvkeep.bench.load` version 1.
#[derive(Serialize)]
struct LoadReport {
    schema: &'static str,
    version: u32,
    mode: &'static str,
    mix: String,
    clients: u32,
    rate_asked: Option<f64>,
    calls_per_s: f64,
    seconds: f64,
    get: WayReport,
    put: WayReport,
    bytes_verified: u64,
    bytes_wrong: u64,
    errors: BTreeMap<String, u64>,
    load_average: f64,
}

#[derive(Serialize)]
struct WayReport {
    bytes: u64,
    gb_per_s: f64,
    misses: u64,
    failed: u64,
    latency_us: LatencySummary,
}

/// Runs `kvkeep-bench load`; answers whether every byte was right.
pub async fn command(command: LoadCommand) -> anyhow::Result<bool> {
    ensure!((1..=CLIENTS_MAX).contains(&command.clients), "--clients is 1 to {CLIENTS_MAX}");
    ensure!((1..=POPULATION_MAX).contains(&command.population), "--population is 1 to {POPULATION_MAX}");
    ensure!((1..=SECONDS_MAX).contains(&command.seconds), "--seconds is 1 to {SECONDS_MAX}");
    ensure!(command.rate.is_none_or(|r| r.is_finite() && (0.001..=1e7).contains(&r)), "--rate is 0.001 to 10000000");
    let largest = command.mix.largest().0;
    ensure!(largest <= BLOCK_BYTES_MAX, "a block has at most {BLOCK_BYTES_MAX} bytes");
    let client = Client::connect(command.server.client_config()).await.context("connect")?;
    let format = any_size_format(largest);
    let name = format!("load-{}-{}", command.mix, command.seed);
    let namespace = client.register_namespace(&name, &format, "generated").await.context("namespace")?;
    populate(&namespace, &command).await?;

    let began = Instant::now();
    let arrivals = match command.rate {
        None => Arrivals::Closed,
        Some(rate) => Arrivals::Open(Box::new(Poisson {
            next: Mutex::new((began, StdRng::seed_from_u64(!command.seed))),
            mean: Duration::from_secs_f64(1.0 / rate),
        })),
    };
    let next_id = AtomicU64::new(command.population + (u64::from(rand::random::<u32>()) << 28));
    let ends = began + Duration::from_secs(command.seconds);
    let shared = Arc::new(Shared { namespace, command, next_id, arrivals, ends });
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..shared.command.clients {
        clients.spawn(client_loop(Arc::clone(&shared), number));
    }
    let mut sum = Counts::default();
    while let Some(one) = clients.join_next().await {
        sum.add(&one.context("a client panicked")?);
    }
    let report = LoadReport::new(&shared.command, &sum, began.elapsed());
    eprintln!("{}", report.table());
    write_json(&report, shared.command.json.as_deref())?;
    Ok(sum.bytes_wrong == 0)
}

/// A format of one group whose blocks have any size up to `largest`.
pub fn any_size_format(largest: u64) -> Format {
    Format {
        model: "kvkeep-bench".into(),
        dtype: "bf16".into(),
        layout: "generated".into(),
        hash_algorithm: "siphash128x2".into(),
        hash_seed: "0".into(),
        tokens_per_key: 16,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 1,
            replicated: true,
            size: SizeRule::UpTo(largest.max(kvkeep_core::format::BLOCK_BYTES_MIN)),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

/// The size of a block follows from its id, so that a reader knows what to expect.
fn size_of(mix: &SizeMix, id: u64, seed: u64) -> usize {
    let mut rng = StdRng::seed_from_u64(id ^ seed.rotate_left(32));
    mix.pick(rng.random()).0 as usize
}

fn block(id: u64, len: usize) -> (Bytes, Bytes) {
    let key = PrefixId(id).key();
    let data = block_bytes::block(Seed::of(&key, GroupId(0), ShardId(0)), len);
    (Bytes::copy_from_slice(key.as_bytes()), data)
}

fn put_of(command: &LoadCommand, ids: impl Iterator<Item = u64>) -> Put {
    let positions = ids.map(|id| {
        let (key, data) = block(id, size_of(&command.mix, id, command.seed));
        PutPosition::of(key, data)
    });
    let class = match command.class {
        ClassArg::Cache => Class::Cache,
        ClassArg::Durable => Class::Durable,
    };
    Put { positions: positions.collect(), unordered: true, class: Some(class), ..Put::default() }
}

async fn populate(namespace: &Namespace, command: &LoadCommand) -> anyhow::Result<()> {
    // Few megabytes per call, one call at a time: this is preparation, not load.
    let step = (8 << 20) / command.mix.largest().0.max(1) + 1;
    let mut from = 0;
    while from < command.population {
        let to = command.population.min(from + step);
        let outcomes = namespace.put(&put_of(command, from..to), &Call::default()).await.context("populate")?;
        for outcome in outcomes {
            if let PartOutcome::Refused(e) = outcome {
                return Err(anyhow::Error::new(e).context("populate"));
            }
        }
        from = to;
    }
    Ok(())
}

async fn client_loop(shared: Arc<Shared>, number: u32) -> Counts {
    let mut counts = Counts::default();
    let mut rng = StdRng::seed_from_u64(shared.command.seed ^ (u64::from(number) << 32));
    while let Some(due) = shared.due().await {
        if rng.random::<f64>() < shared.command.get_share {
            let id = rng.random_range(0..shared.command.population);
            shared.get(id, due, &mut counts).await;
        } else {
            let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
            shared.put(id, due, &mut counts).await;
        }
    }
    counts
}

impl Shared {
    /// Waits until the next call is due; `None` when the load is over.
    async fn due(&self) -> Option<Instant> {
        let due = match &self.arrivals {
            Arrivals::Closed => Instant::now(),
            Arrivals::Open(poisson) => {
                let mut next = poisson.next.lock();
                let due = next.0;
                let gap = poisson.mean.mul_f64(-(1.0 - next.1.random::<f64>()).ln());
                next.0 += gap;
                due
            }
        };
        if due >= self.ends {
            return None;
        }
        tokio::time::sleep_until(due.into()).await;
        Some(due)
    }

    async fn get(&self, id: u64, due: Instant, counts: &mut Counts) {
        let key = PrefixId(id).key();
        let item = GetItem::of(Bytes::copy_from_slice(key.as_bytes()));
        match self.namespace.get(&[item], None, &Call::default()).await {
            Ok(parts) => {
                counts.get.latency.note(due.elapsed());
                for part in parts {
                    if !part.is_hit() {
                        counts.get.misses += 1;
                        continue;
                    }
                    let wanted = size_of(&self.command.mix, id, self.command.seed);
                    counts.get.bytes += part.data.len() as u64;
                    counts.bytes_verified += part.data.len() as u64;
                    counts.bytes_wrong += block_bytes::wrong_bytes(Seed::of(&key, GroupId(0), ShardId(0)), &part.data)
                        + wanted.abs_diff(part.data.len()) as u64;
                }
            }
            Err(e) => {
                counts.get.failed += 1;
                *counts.errors.entry(format!("get.{}", e.kind().word())).or_default() += 1;
            }
        }
    }

    async fn put(&self, id: u64, due: Instant, counts: &mut Counts) {
        let put = put_of(&self.command, std::iter::once(id));
        let bytes = put.positions.iter().flat_map(|p| &p.parts).map(|p| p.data.len() as u64).sum::<u64>();
        let outcome = self.namespace.put(&put, &Call::default()).await.map(|mut outcomes| outcomes.pop());
        match outcome {
            Ok(Some(PartOutcome::Refused(e))) | Err(e) => {
                counts.put.failed += 1;
                *counts.errors.entry(format!("put.{}", e.kind().word())).or_default() += 1;
            }
            Ok(_) => {
                counts.put.latency.note(due.elapsed());
                counts.put.bytes += bytes;
            }
        }
    }
}

impl Counts {
    fn add(&mut self, other: &Self) {
        for (mine, theirs) in [(&mut self.get, &other.get), (&mut self.put, &other.put)] {
            mine.latency.add(&theirs.latency);
            mine.bytes += theirs.bytes;
            mine.misses += theirs.misses;
            mine.failed += theirs.failed;
        }
        self.bytes_verified += other.bytes_verified;
        self.bytes_wrong += other.bytes_wrong;
        for (name, n) in &other.errors {
            *self.errors.entry(name.clone()).or_default() += n;
        }
    }
}

impl LoadReport {
    fn new(command: &LoadCommand, counts: &Counts, took: Duration) -> Self {
        let way = |w: &Way| WayReport {
            bytes: w.bytes,
            gb_per_s: gb_per_s(w.bytes, took),
            misses: w.misses,
            failed: w.failed,
            latency_us: w.latency.summary(),
        };
        let (get, put) = (way(&counts.get), way(&counts.put));
        Self {
            schema: "kvkeep.bench.load",
            version: 1,
            mode: if command.rate.is_some() { "open" } else { "closed" },
            mix: command.mix.to_string(),
            clients: command.clients,
            rate_asked: command.rate,
            calls_per_s: (get.latency_us.count + put.latency_us.count) as f64 / took.as_secs_f64().max(1e-9),
            seconds: took.as_secs_f64(),
            get,
            put,
            bytes_verified: counts.bytes_verified,
            bytes_wrong: counts.bytes_wrong,
            errors: counts.errors.clone(),
            load_average: load_average(),
        }
    }

    fn table(&self) -> String {
        let mut out = format!(
            "  {} loop, {} clients, {:.0} calls/s over {:.1} s, sizes {}\n",
            self.mode, self.clients, self.calls_per_s, self.seconds, self.mix
        );
        for (name, way) in [("get", &self.get), ("put", &self.put)] {
            let l = &way.latency_us;
            out.push_str(&format!(
                "  {name}  {:.2} GB/s  {} calls  p50 {:.2} ms  p99 {:.2} ms  p99.9 {:.2} ms  max {:.2} ms  misses {}  failed {}\n",
                way.gb_per_s,
                l.count,
                l.p50 as f64 / 1e3,
                l.p99 as f64 / 1e3,
                l.p999 as f64 / 1e3,
                l.max as f64 / 1e3,
                way.misses,
                way.failed
            ));
        }
        out.push_str(&format!("  bytes verified {}, wrong {}\n", self.bytes_verified, self.bytes_wrong));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_same_size_each_time_and_the_mix_is_kept() {
        let mix: SizeMix = "4KiB:1,8KiB:1".parse().unwrap();
        let small = (0..1000).filter(|id| size_of(&mix, *id, 1) == 4096).count();
        assert!((400..600).contains(&small), "{small}");
        assert!((0..100).all(|id| size_of(&mix, id, 1) == size_of(&mix, id, 1)));
    }

    #[test]
    fn the_format_of_any_size_is_valid() {
        any_size_format(1).validate().unwrap();
        any_size_format(BLOCK_BYTES_MAX).validate().unwrap();
    }
}
