//! `peers`: KVKeep beside other stores and plain references, all in one run.
//!
//! ```text
//!  ours          a node of this run ─┐
//!  references    our own few lines  ─┼─> rounds: every path once a round, in random order ─> ratios within rounds
//!  installed     peers, by Python   ─┘
//! ```
//! [`path`] (what a path is, what a window yields) -> [`ours`], [`references`], [`installed`] over [`script`] (who has
//! paths) -> [`rounds`] (order and repetition) -> [`bars`] (who is held against whom) -> [`report`]. [`memory`] has what is
//! `unsafe`, [`processor`] CPU clocks and the machine.

pub mod bars;
pub mod installed;
pub mod memory;
pub mod ours;
pub mod path;
pub mod processor;
pub mod references;
pub mod report;
pub mod rounds;
pub mod script;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use clap::Args;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::replay::report::write_json;
use installed::Installed;
use path::Kind;
use processor::load_averages;
use references::Memory;
use report::{PeersReport, Skipped};
use rounds::Plan;

/// Fewest rounds outside of `--quick`.
const ROUNDS_MIN: u32 = 9;
/// Most rounds.
const ROUNDS_MAX: u32 = 1000;
/// Rounds of `--quick`.
const QUICK_ROUNDS: u32 = 3;
/// Milliseconds of a window.
const WINDOW_MS: u64 = 500;
/// The same of `--quick`.
const QUICK_WINDOW_MS: u64 = 300;
/// With `--quick` no round begins later than this; one takes less than 10 s.
const QUICK_TIME: Duration = Duration::from_secs(28);

/// Flags of `kvkeep-bench peers`.
#[derive(Args, Debug)]
pub struct PeersCommand {
    /// Ours and the references only, three short rounds, under 40 s
    #[arg(long)]
    quick: bool,
    /// Rounds: every path is measured once in each [default: 9; 3 with --quick]
    #[arg(long)]
    rounds: Option<u32>,
    /// Milliseconds of one window [default: 500; 300 with --quick]
    #[arg(long)]
    window_ms: Option<u64>,
    /// Whose paths to measure, separated by commas: ours, reference, peer [default: all; ours,reference with --quick]
    #[arg(long, value_delimiter = ',')]
    only: Vec<Kind>,
    /// Which paths to measure, by name, separated by commas, as in `region_get,mapped_get` [default: all]
    #[arg(long, value_delimiter = ',')]
    paths: Vec<String>,
    /// A Python interpreter with client libraries of peers; may be given several times, each peer takes the first that has
    /// its library [default: that of $VIRTUAL_ENV, else python3]
    #[arg(long)]
    python: Vec<PathBuf>,
    /// What the orders are drawn from [default: random, and reported]
    #[arg(long)]
    seed: Option<u64>,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Runs `kvkeep-bench peers`.
pub async fn command(command: PeersCommand) -> anyhow::Result<bool> {
    let began = Instant::now();
    let quick = command.quick;
    let (rounds, window_ms) = if quick { (QUICK_ROUNDS, QUICK_WINDOW_MS) } else { (ROUNDS_MIN, WINDOW_MS) };
    let rounds = command.rounds.unwrap_or(rounds);
    let window_ms = command.window_ms.unwrap_or(window_ms);
    ensure!(quick || rounds >= ROUNDS_MIN, "--rounds is at least {ROUNDS_MIN} without --quick");
    ensure!((1..=ROUNDS_MAX).contains(&rounds), "--rounds is 1 to {ROUNDS_MAX}");
    ensure!((1..=10_000).contains(&window_ms), "--window-ms is 1 to 10000");
    let seed = command.seed.unwrap_or_else(rand::random);
    let wanted = |kind| match command.only.as_slice() {
        [] => !(quick && kind == Kind::Peer),
        only => only.contains(&kind),
    };
    let load_before = load_averages();

    let memory = Memory::new();
    let mut skipped = Vec::new();
    let mut entries = Vec::new();
    for kind in Kind::ALL {
        if !wanted(kind) {
            skipped.push(Skipped { what: kind.to_string(), why: "not asked for".to_owned() });
        }
    }
    if wanted(Kind::Ours) {
        match ours::start(command.kvkeepd.as_deref(), &memory).await {
            Ok(ours) => entries.extend(ours),
            // Whoever names a program wants it measured.
            Err(why) if command.kvkeepd.is_some() => return Err(why),
            Err(why) => skipped.push(Skipped { what: Kind::Ours.to_string(), why: format!("{why:#}") }),
        }
    }
    if wanted(Kind::Reference) {
        entries.extend(references::all(&memory).await?);
    }
    // Holds the peers' files until the run is over.
    let mut installed = Installed::default();
    if wanted(Kind::Peer) {
        installed = installed::start(&installed::pythons(&command.python)).await?;
        entries.append(&mut installed.entries);
        skipped.append(&mut installed.skipped);
    }
    for skipped in &skipped {
        eprintln!("SKIPPED {}: {}", skipped.what, skipped.why);
    }
    let named = |path: &str| command.paths.iter().any(|name| name == path);
    if let Some(unknown) = command.paths.iter().find(|name| !entries.iter().any(|entry| entry.id.path == **name)) {
        let mut names: Vec<_> = entries.iter().map(|entry| entry.id.path.as_str()).collect();
        names.dedup();
        bail!("--paths names {unknown:?}, which is not there; there are {}", names.join(", "));
    }
    entries.retain(|entry| command.paths.is_empty() || named(&entry.id.path));
    ensure!(!entries.is_empty(), "there is nothing to measure");

    let plan = Plan { rounds, window: Duration::from_millis(window_ms), until: quick.then(|| began + QUICK_TIME) };
    let measured = rounds::run(&mut entries, plan, &mut StdRng::seed_from_u64(seed)).await;
    let mut report = PeersReport::of(&entries, &measured);
    report.quick = quick;
    report.window_ms = window_ms;
    report.seed = seed;
    report.load_averages = [load_before, load_averages()];
    report.versions = installed.versions;
    skipped.append(&mut report.skipped);
    report.skipped = skipped;
    eprintln!("{}", report.table());
    write_json(&report, command.json.as_deref())?;
    let broken: Vec<_> = entries
        .iter()
        .zip(&measured.failures)
        .filter(|(entry, failure)| entry.kind != Kind::Peer && failure.is_some())
        .map(|(entry, _)| entry.id.to_string())
        .collect();
    ensure!(broken.is_empty(), "not measured to the end: {}", broken.join("; "));
    Ok(true)
}
