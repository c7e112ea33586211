//! Appends a second over gRPC: many sessions, each with one append of one position in flight; the position is in the store.
//!
//! Three kinds: to a session of class `cache`; to one of class `durable` whose blocks are durable already; and the same where
//! the append has to raise the block. Each alone, and beside clients that put durable blocks as fast as the node takes them.
//! Floor: one call, one share of a log sync; where a block is raised, its payload over the device and a share of its flush.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvkeep_client::sessions::Append;
use kvkeep_client::{Call, Namespace, OpenSession, Put};
use kvkeep_core::Class;
use serde::Serialize;
use tokio::task::{JoinHandle, JoinSet};

use super::{Lab, SessionsCommand, format_of, key, position, put_chain};
use crate::measure::{Latencies, LatencySummary, load_average, median};

/// DRAM of the node.
const ARENA_BYTES: u64 = 1 << 30;
/// NVMe of the node beside what the sessions take.
const ROOM_BYTES: u64 = 4 << 30;
/// Connections of the client that appends.
const CONNECTIONS: usize = 8;
/// Chains that are put at a time.
const PUTTERS: usize = 8;
/// A writer's put.
const WRITE_POSITIONS: u64 = 8;
/// Bytes of each of its positions.
const WRITE_BYTES: u64 = 1 << 20;
/// Puts of one writer that stay; older ones are removed.
const WRITES_KEPT: usize = 16;
/// Pause of a writer after the node refused.
const WRITE_PAUSE: Duration = Duration::from_millis(20);
/// How long writers run before appends are measured beside them.
const WRITE_LEAD: Duration = Duration::from_secs(1);
/// Where the ids of writers begin.
const WRITE_IDS: u64 = 1 << 48;

/// What is appended: its name, the session's class, whether the append raises the block.
const KINDS: [(&str, Class, bool); 3] = [
    ("cache", Class::Cache, false),
    ("durable", Class::Durable, false),
    ("durable, raised by the append", Class::Durable, true),
];

/// One kind, alone or beside writers; medians over rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    kind: &'static str,
    beside: &'static str,
    appends: u64,
    appends_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    /// Bytes that writers had acknowledged durable meanwhile, MB (10^6) per second.
    put_mb_per_s: f64,
    load_average: f64,
}

/// Of the report.
#[derive(Clone, Debug, Serialize)]
pub struct AppendsReport {
    in_flight: u32,
    appends_each: u32,
    block_bytes: u64,
    writers: u32,
    rounds: u32,
    /// Puts of writers that the node refused for the moment.
    writes_refused: u64,
    rows: Vec<Row>,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Round {
    kind: usize,
    beside: bool,
    per_s: f64,
    latency: LatencySummary,
    put_mb_per_s: f64,
    load_average: f64,
}

struct Bench<'a> {
    command: &'a SessionsCommand,
    namespace: Namespace,
    writers: Vec<Namespace>,
    /// Ids of chains that are put for one round each.
    fresh: u64,
    windows: u64,
    write_ids: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
}

/// Measures all of it.
pub(super) async fn measure(command: &SessionsCommand) -> anyhow::Result<AppendsReport> {
    let per_round = u64::from(command.sessions) * u64::from(command.appends);
    let raised = per_round * command.block_bytes.0 * (2 * u64::from(command.rounds) + 1);
    let lab = Lab::start(command, "appends", "", ARENA_BYTES, 0, ROOM_BYTES + 2 * raised).await?;
    let mut writers = Vec::new();
    for _ in 0..command.writers {
        writers.push(lab.open(&format_of(WRITE_BYTES), 1).await?);
    }
    let mut bench = Bench {
        command,
        namespace: lab.open(&format_of(WRITE_BYTES), CONNECTIONS).await?,
        writers,
        fresh: per_round,
        windows: 0,
        write_ids: Arc::new(AtomicU64::new(WRITE_IDS)),
        refused: Arc::default(),
    };
    bench.put_chains(0, Class::Durable).await?;
    let mut rounds = Vec::new();
    for number in 0..command.rounds {
        for step in 0..KINDS.len() * 2 {
            let turn = (step + number as usize) % (KINDS.len() * 2);
            let round = bench.round(turn / 2, turn % 2 == 1).await?;
            eprintln!(
                "appends: round {} {}{}: {:.0} a second, p50 {:.1} ms, p99 {:.1} ms",
                number + 1,
                KINDS[round.kind].0,
                if round.beside { ", beside durable puts" } else { "" },
                round.per_s,
                round.latency.p50 as f64 / 1e3,
                round.latency.p99 as f64 / 1e3
            );
            rounds.push(round);
        }
    }
    let writes_refused = bench.refused.load(Ordering::Relaxed);
    drop(bench);
    lab.stop().await?;
    Ok(AppendsReport {
        in_flight: command.sessions,
        appends_each: command.appends,
        block_bytes: command.block_bytes.0,
        writers: command.writers,
        rounds: command.rounds,
        writes_refused,
        rows: rows(&rounds),
    })
}

impl Bench<'_> {
    /// One chain for each session, from an id on.
    async fn put_chains(&self, base: u64, class: Class) -> anyhow::Result<()> {
        let each = u64::from(self.command.appends);
        let mut chains = (0..u64::from(self.command.sessions)).map(|n| base + n * each);
        let mut putting = JoinSet::new();
        loop {
            while putting.len() < PUTTERS
                && let Some(first) = chains.next()
            {
                let (namespace, bytes) = (self.namespace.clone(), self.command.block_bytes.0);
                putting.spawn(async move { put_chain(&namespace, first..first + each, bytes, class).await });
            }
            match putting.join_next().await {
                Some(done) => done.context("a put panicked")??,
                None => return Ok(()),
            }
        }
    }

    async fn round(&mut self, kind: usize, beside: bool) -> anyhow::Result<Round> {
        let (_, class, raises) = KINDS[kind];
        let mut base = 0;
        if raises {
            base = self.fresh;
            self.fresh += u64::from(self.command.sessions) * u64::from(self.command.appends);
            self.put_chains(base, Class::Cache).await?;
        }
        self.windows += 1;
        let ids: Vec<String> = (0..self.command.sessions).map(|n| format!("window-{}/{n}", self.windows)).collect();
        let sessions = self.namespace.sessions();
        let wish = OpenSession { class: Some(class), ..OpenSession::default() };
        for id in &ids {
            sessions.open(id, &wish, &Call::default()).await.context("open")?;
        }
        let writing = beside.then(|| self.write());
        if writing.is_some() {
            tokio::time::sleep(WRITE_LEAD).await;
        }
        let put_before = writing.as_ref().map_or(0, Writing::bytes);
        let began = Instant::now();
        let mut appending = JoinSet::new();
        let each = u64::from(self.command.appends);
        for (n, id) in (0u64..).zip(ids) {
            appending.spawn(append_all(self.namespace.clone(), id, base + n * each, each));
        }
        let mut latencies = Latencies::default();
        while let Some(done) = appending.join_next().await {
            latencies.add(&done.context("an appending task panicked")??);
        }
        let took = began.elapsed().as_secs_f64();
        let put = writing.as_ref().map_or(0, Writing::bytes) - put_before;
        if let Some(writing) = writing {
            writing.stop().await?;
        }
        let latency = latencies.summary();
        Ok(Round {
            kind,
            beside,
            per_s: latency.count as f64 / took,
            latency,
            put_mb_per_s: put as f64 / 1e6 / took,
            load_average: load_average(),
        })
    }

    /// Starts the writers.
    fn write(&self) -> Writing {
        let (stop, bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tasks = self.writers.iter().map(|namespace| {
            let writer = Writer {
                namespace: namespace.clone(),
                ids: Arc::clone(&self.write_ids),
                refused: Arc::clone(&self.refused),
                stop: Arc::clone(&stop),
                bytes: Arc::clone(&bytes),
            };
            tokio::spawn(writer.run())
        });
        Writing { tasks: tasks.collect(), stop, bytes }
    }
}

/// Appends a chain to a session, one position after the other.
async fn append_all(namespace: Namespace, id: String, first: u64, count: u64) -> anyhow::Result<Latencies> {
    let sessions = namespace.sessions();
    let mut latencies = Latencies::default();
    for n in 0..count {
        let append = Append { from_position: n, keys: vec![key(first + n)], ..Append::default() };
        let began = Instant::now();
        sessions.append(&id, &append, &Call::default()).await.with_context(|| format!("append to {id}"))?;
        latencies.note(began.elapsed());
    }
    Ok(latencies)
}

/// One client that puts durable blocks, and removes what it put before.
struct Writer {
    namespace: Namespace,
    ids: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
}

/// Writers under way.
struct Writing {
    tasks: Vec<JoinHandle<anyhow::Result<()>>>,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
}

impl Writing {
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.context("a writer panicked")??;
        }
        Ok(())
    }
}

impl Writer {
    async fn run(self) -> anyhow::Result<()> {
        let mut kept: VecDeque<Vec<bytes::Bytes>> = VecDeque::new();
        while !self.stop.load(Ordering::Relaxed) {
            let first = self.ids.fetch_add(WRITE_POSITIONS, Ordering::Relaxed);
            let ids = first..first + WRITE_POSITIONS;
            let positions = ids.clone().map(|id| position(id, WRITE_BYTES)).collect();
            let put = Put { positions, class: Some(Class::Durable), unordered: true, ..Put::default() };
            let outcomes = self.namespace.put(&put, &Call::default()).await.context("a writer's put")?;
            let taken = outcomes.iter().filter(|outcome| outcome.is_kept()).count() as u64;
            self.bytes.fetch_add(taken * WRITE_BYTES, Ordering::Relaxed);
            kept.push_back(ids.map(key).collect());
            if taken < WRITE_POSITIONS {
                self.refused.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(WRITE_PAUSE).await;
            }
            if kept.len() > WRITES_KEPT
                && let Some(oldest) = kept.pop_front()
            {
                self.namespace.remove(&oldest, &Call::default()).await.context("a writer's remove")?;
            }
        }
        for keys in kept {
            self.namespace.remove(&keys, &Call::default()).await.context("a writer's remove")?;
        }
        Ok(())
    }
}

fn rows(rounds: &[Round]) -> Vec<Row> {
    let row = |kind: usize, beside: bool| {
        let of: Vec<&Round> = rounds.iter().filter(|r| (r.kind, r.beside) == (kind, beside)).collect();
        let middle = |value: fn(&Round) -> f64| median(&of.iter().map(|r| value(r)).collect::<Vec<_>>());
        Row {
            kind: KINDS[kind].0,
            beside: if beside { "durable puts" } else { "nothing" },
            appends: of.iter().map(|r| r.latency.count).sum(),
            appends_per_s: middle(|r| r.per_s),
            p50_us: middle(|r| r.latency.p50 as f64),
            p99_us: middle(|r| r.latency.p99 as f64),
            put_mb_per_s: middle(|r| r.put_mb_per_s),
            load_average: middle(|r| r.load_average),
        }
    };
    (0..KINDS.len()).flat_map(|kind| [row(kind, false), row(kind, true)]).collect()
}

impl AppendsReport {
    pub(super) fn table(&self) -> String {
        let mut out =
            format!("appends of one position, {} in flight (medians of {} rounds)\n", self.in_flight, self.rounds);
        for row in &self.rows {
            let _ = writeln!(
                out,
                "  {:<30} beside {:<12} {:>7.0} a second  p50 {:>7.2} ms  p99 {:>7.2} ms  puts {:>4.0} MB/s",
                row.kind,
                row.beside,
                row.appends_per_s,
                row.p50_us / 1e3,
                row.p99_us / 1e3,
                row.put_mb_per_s
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_medians_of_their_kind_and_company() {
        let round = |kind, beside, per_s: f64| Round {
            kind,
            beside,
            per_s,
            latency: LatencySummary {
                count: 10,
                p50: per_s as u64 / 10,
                p99: per_s as u64,
                ..LatencySummary::default()
            },
            put_mb_per_s: if beside { 300.0 } else { 0.0 },
            load_average: 2.0,
        };
        let rounds = [
            round(0, false, 1000.0),
            round(0, true, 500.0),
            round(0, false, 3000.0),
            round(0, false, 2000.0),
            round(2, true, 50.0),
        ];
        let rows = rows(&rounds);
        assert_eq!(rows.len(), 6);
        assert_eq!(
            (rows[0].appends_per_s, rows[0].p50_us, rows[0].p99_us, rows[0].appends),
            (2000.0, 200.0, 2000.0, 30)
        );
        assert_eq!((rows[1].beside, rows[1].appends_per_s, rows[1].put_mb_per_s), ("durable puts", 500.0, 300.0));
        assert_eq!((rows[5].kind, rows[5].appends_per_s), ("durable, raised by the append", 50.0));
    }
}
