//! Appends through one-voter groups: how many a second, how long each waits, how many fsyncs they share.
//!
//! `cargo run --release -p kvkeep-raft --example appends -- [--groups 1] [--in-flight 256] [--bytes 256] [--seconds 5] [--rounds 3]
//! [--dir DIR]`. The store lies in a folder of its own below DIR (default: the current folder), which must be on a disk that a
//! sync reaches: on tmpfs a sync costs nothing and the figure means nothing.
//!
//! The floor of an append is its share of one sync: with n in flight and a sync of t, no more than n / t appends a second (256
//! and 2 ms: 128,000), and the median waits for the rest of the sync that is running and the whole of the next: 1.5 t. Below that
//! bound an append costs CPU: proposal, entry, batch, RocksDB's log and memtable, the copy that is applied, the answer;
//! predicted: 20 us over two threads, 50,000 a second on two cores that have nothing else to do. The bar is 20,000. Syncs per append:
//! between 1 / n and 2 / n.
//!
//! The sync alone is measured first, by the same store: a batch of as many bytes, then a sync, nothing else.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use hdrhistogram::Histogram;
use kvkeep_raft::{
    Alone, Answer, Change, Committed, GroupHandle, GroupId, Host, Journal, LogStore, NodeId, Pending, Proposed,
    Refusal, Reply, RocksLog, Settings, StateMachine, Table, Writes,
};

#[derive(Parser)]
struct Args {
    /// Groups that the appends are dealt to.
    #[arg(long, default_value_t = 1)]
    groups: u64,
    /// Appends that wait for their answer, all groups together.
    #[arg(long, default_value_t = 256)]
    in_flight: usize,
    /// Bytes of a command.
    #[arg(long, default_value_t = 256)]
    bytes: usize,
    /// Length of a round.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A folder on a real disk.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// Counts, durably.
#[derive(Default)]
struct Count(u64);

impl StateMachine for Count {
    fn clear(&mut self) {
        self.0 = 0;
    }
    fn load(&mut self, _: &[u8], value: &[u8]) -> Result<(), Refusal> {
        self.0 = u64::from_le_bytes(value.try_into().map_err(|_| Refusal("eight bytes".into()))?);
        Ok(())
    }
    fn loaded(&mut self) -> Result<(), Refusal> {
        Ok(())
    }
    fn apply(&mut self, _: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal> {
        self.0 += 1;
        writes.put(b"n", &self.0.to_le_bytes());
        Ok(Box::new(()))
    }
}

fn sync_cost(store: &RocksLog, bytes: usize) -> Result<Duration> {
    let mut times = Vec::new();
    for n in 0..200u32 {
        let key = [b"bench".as_slice(), &n.to_be_bytes()].concat();
        store.write(&[Change::Put(Table::Meta, key, vec![0x5a; bytes])])?;
        let start = Instant::now();
        store.sync()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

struct Flight {
    asked: Instant,
    pending: Pending<Answer>,
}

fn round(groups: &[GroupHandle], args: &Args, latencies: &mut Histogram<u64>) -> Result<(u64, Duration)> {
    let mut flights: VecDeque<Flight> = VecDeque::new();
    let (mut answered, mut next) = (0u64, 0usize);
    let start = Instant::now();
    let end = start + Duration::from_secs(args.seconds);
    loop {
        while flights.len() < args.in_flight && Instant::now() < end {
            let group = &groups[next % groups.len()];
            next += 1;
            match group.propose(vec![0x5a; args.bytes])? {
                Proposed::Queued(pending) => flights.push_back(Flight { asked: Instant::now(), pending }),
                Proposed::Overloaded { retry_after } => std::thread::sleep(retry_after),
            }
        }
        // Groups answer in turns of their own; the oldest is soon the next.
        let Some(first) = flights.pop_front() else { break };
        first.pending.wait()?;
        latencies.record(first.asked.elapsed().as_micros() as u64)?;
        answered += 1;
    }
    Ok((answered, start.elapsed()))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let dir = tempfile::Builder::new().prefix("kvkeep-raft-appends-").tempdir_in(&args.dir)?;
    let store = Arc::new(RocksLog::open(dir.path())?);
    let sync = sync_cost(&store, args.bytes)?;
    println!("sync of one batch of {} B: {:.0} us (median of 200)", args.bytes, sync.as_secs_f64() * 1e6);
    println!(
        "floor: {:.0} appends/s, p50 {:.2} ms",
        args.in_flight as f64 / sync.as_secs_f64(),
        sync.as_secs_f64() * 1.5e3
    );

    let journal = Arc::new(Journal::open(store, NodeId::ALONE)?);
    let clock = std::time::UNIX_EPOCH;
    let stamp = move || clock.elapsed().map_or(0, |d| d.as_millis() as u64);
    let host = Host::start(Arc::clone(&journal), Settings::new(NodeId::ALONE, Arc::new(stamp)), Box::new(Alone))?;
    let groups: Vec<_> = (0..args.groups)
        .map(|n| {
            let id = GroupId::new(n)?;
            journal.create(id, &[NodeId::ALONE], &Vec::new())?;
            host.open(id, Box::<Count>::default())
        })
        .collect::<Result<_, _>>()?;
    ensure!(!groups.is_empty(), "no group to append to");
    for group in &groups {
        group.read_barrier()?.queued().context("overloaded before it began")?.wait()?;
    }
    for n in 0..args.rounds {
        let before = host.stats();
        let mut latencies = Histogram::<u64>::new(3)?;
        let (appends, took) = round(&groups, &args, &mut latencies)?;
        let syncs = host.stats().syncs - before.syncs;
        println!(
            "round {n}: {:>8.0} appends/s  p50 {:.2} ms  p99 {:.2} ms  {:.4} fsyncs/append ({syncs} in {:.1} s)  groups {}  in flight {}",
            appends as f64 / took.as_secs_f64(),
            latencies.value_at_quantile(0.5) as f64 / 1e3,
            latencies.value_at_quantile(0.99) as f64 / 1e3,
            syncs as f64 / appends as f64,
            took.as_secs_f64(),
            args.groups,
            args.in_flight,
        );
    }
    host.stop()?;
    Ok(())
}
