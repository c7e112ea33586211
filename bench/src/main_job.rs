//! `main`, what `make run` runs: a node, a multi-turn workload through it, `kill -9` half-way, a restart, the rest of the
//! workload, every promise asked for, and the account. A quarter of the conversations is kept as durable sessions: each one
//! acknowledged before the kill is restored and compared after it, beside the workload, and each one once more at the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use serde::Serialize;

use crate::node::{DataDir, Node, Recipe};
use crate::replay::engine::{Engine, Shared};
use crate::replay::plan::{ReplayArgs, ServerArgs, WayArg};
use crate::replay::report::{ReplayReport, write_json};
use crate::replay::sessions::check::SessionCheck;
use crate::replay::tally::Live;
use crate::replay::{open, run};
use crate::units::ByteSize;

/// Requests of a trace that are replayed where no `--limit` is given: a minute or two on a small machine.
const TRACE_LIMIT: u64 = 2_000;
/// Between two looks at how far the replay is.
const LOOK_PERIOD: Duration = Duration::from_millis(10);

/// Flags of `kvkeep-bench main`.
#[derive(Args, Debug)]
#[command(mut_arg("durable_share", |a| a.default_value("0.25")), mut_arg("sessions", |a| a.default_value("1200")), mut_arg("session_share", |a| a.default_value("0.25")))]
pub struct MainCommand {
    #[command(flatten)]
    replay: ReplayArgs,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// The node's data, kept [default: a new folder, removed at the end]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// DRAM of the node: small, so that NVMe is used
    #[arg(long, default_value = "256MiB")]
    arena_bytes: ByteSize,
    /// NVMe of the node
    #[arg(long, default_value = "6GiB")]
    nvme_bytes: ByteSize,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The report: `kvkeep.bench.main` version 1.
#[derive(Serialize)]
struct MainReport {
    schema: &'static str,
    version: u32,
    replay: ReplayReport,
    kill: Killed,
    cpu_s_per_gb: CpuPerGb,
    arena_bytes: u64,
    nvme_bytes: u64,
    /// The first start, over an empty folder, seconds.
    first_start_s: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct CpuPerGb {
    server: f64,
    client: f64,
    total: f64,
}

/// What the kill and the restart looked like.
#[derive(Clone, Copy, Debug, Serialize)]
struct Killed {
    after_requests: u64,
    of_requests: u64,
    /// From starting the process again to its readiness, seconds.
    restart_to_ready_s: f64,
    /// From starting the process again to the first block that came back right, seconds; absent: there was none.
    restart_to_first_hit_s: Option<f64>,
    /// Sessions acknowledged before the kill, as they were after it, while the workload went on.
    sessions: SessionCheck,
}

/// Runs `kvkeep-bench main`; answers whether every byte was right and every promise kept.
pub async fn command(mut command: MainCommand) -> anyhow::Result<bool> {
    let args = &mut command.replay;
    let mut workload = args.workload()?;
    if args.trace.is_some() {
        let limit = *args.limit.get_or_insert(TRACE_LIMIT);
        // The middle has to be known before it is reached; a trace is read once more for it.
        workload.total = Some(args.workload()?.requests.take(limit as usize).count() as u64);
    }
    let total = workload.total.unwrap_or(u64::MAX).min(args.limit.unwrap_or(u64::MAX));
    ensure!(total >= 2, "a workload of {total} requests has no middle");
    let plan = args.plan(workload.source.tokens_per_block)?;

    let data = DataDir::open(command.data_dir.as_deref())?;
    let more = ["--arena-bytes", &command.arena_bytes.to_string(), "--nvme-bytes", &command.nvme_bytes.to_string()]
        .map(str::to_owned);
    let recipe = Recipe::kvkeepd(command.kvkeepd.as_deref(), &data, &more)?;
    let node = recipe.start("127.0.0.1:0").await?;
    let first_start_s = node.start_took.as_secs_f64();
    eprintln!(
        "node {} is up after {first_start_s:.2} s: arena {}, NVMe {}, data in {}",
        node.listen,
        command.arena_bytes,
        command.nvme_bytes,
        data.path().display()
    );
    eprintln!(
        "replaying {} ({total} requests, blocks of {}, {} engines); the node is killed half-way",
        workload.source.name, plan.args.block_bytes, plan.args.engines
    );
    let server = ServerArgs {
        endpoint: node.endpoint(),
        token: None,
        ca: None,
        connections: 2,
        deadline_ms: 20_000,
        way: WayArg::default(),
    };
    let shared = open(plan, server.client_config()).await?;

    let over = AtomicBool::new(false);
    let killing = kill_half_way(node, &recipe, &shared, total, &over);
    let replaying = async {
        let outcome = run(&shared, workload).await;
        over.store(true, Ordering::Release);
        outcome
    };
    let (outcome, killed) = tokio::join!(replaying, killing);
    let outcome = outcome?;
    let (node, mut killed, cpu_before) = killed?.context("the replay ended before the node was killed")?;
    killed.restart_to_first_hit_s = shared.live.first_hit().map(|d| d.as_secs_f64());
    let server_cpu = cpu_before + node.cpu_seconds();
    node.stop().await?;

    let mut replay = ReplayReport::new(&shared.plan, &outcome);
    replay.bytes_verified += killed.sessions.bytes_compared;
    replay.bytes_wrong += killed.sessions.bytes_wrong;
    // The final check reads too, and both sides' CPU time holds it.
    let gb = (replay.bytes_verified + replay.bytes_written()) as f64 / 1e9;
    let per_gb = |seconds: f64| if gb > 0.0 { seconds / gb } else { 0.0 };
    let cpu_s_per_gb = CpuPerGb {
        server: per_gb(server_cpu),
        client: per_gb(outcome.cpu_seconds),
        total: per_gb(server_cpu + outcome.cpu_seconds),
    };
    let report = MainReport {
        schema: "kvkeep.bench.main",
        version: 1,
        replay,
        kill: killed,
        cpu_s_per_gb,
        arena_bytes: command.arena_bytes.0,
        nvme_bytes: command.nvme_bytes.0,
        first_start_s,
    };
    eprintln!("{}", report.table());
    write_json(&report, command.json.as_deref())?;
    Ok(report.replay.is_right() && report.kill.sessions.is_right())
}

/// Waits for the middle of the workload, kills the node and starts it again at the same address. `None` where the replay was
/// over first. The CPU seconds are those of the killed process.
async fn kill_half_way(
    node: Node,
    recipe: &Recipe,
    shared: &Arc<Shared>,
    total: u64,
    over: &AtomicBool,
) -> anyhow::Result<Option<(Node, Killed, f64)>> {
    let half = (total / 2).max(1);
    while Live::get(&shared.live.requests) < half {
        if over.load(Ordering::Acquire) {
            return Ok(None);
        }
        tokio::time::sleep(LOOK_PERIOD).await;
    }
    let after_requests = Live::get(&shared.live.requests);
    // What is acknowledged from here on may be cut off by the kill or not.
    let promises = shared.sessions.promises();
    let cpu = node.cpu_seconds();
    let listen = node.listen.clone();
    node.kill().await?;
    eprintln!("kill -9 after {after_requests} of {total} requests");
    shared.live.arm_first_hit();
    let began = Instant::now();
    let node = recipe.start(&listen).await?;
    eprintln!("the node is up again after {:.2} s", began.elapsed().as_secs_f64());
    let sessions = Engine::new(Arc::clone(shared)).check_sessions(&promises, false).await?;
    eprintln!("acknowledged before the kill: {}", sessions.line());
    let killed = Killed {
        after_requests,
        of_requests: total,
        restart_to_ready_s: node.start_took.as_secs_f64(),
        restart_to_first_hit_s: None,
        sessions,
    };
    Ok(Some((node, killed, cpu)))
}

impl MainReport {
    fn table(&self) -> String {
        let mut out = self.replay.table();
        let mut row = |name: &str, value: String| out.push_str(&format!("  {name:<34} {value}\n"));
        row("killed with SIGKILL", format!("after {} of {} requests", self.kill.after_requests, self.kill.of_requests));
        let first = self.kill.restart_to_first_hit_s.map_or("none".to_owned(), |s| format!("{s:.2} s"));
        row("start to ready, to first hit", format!("{:.2} s, {first}", self.kill.restart_to_ready_s));
        row(
            "  sessions durable, whole after it",
            format!("{}, {}", self.kill.sessions.sessions, self.kill.sessions.whole),
        );
        row(
            "    bytes compared, wrong",
            format!("{}, {}", self.kill.sessions.bytes_compared, self.kill.sessions.bytes_wrong),
        );
        row(
            "    restored beside the workload",
            format!(
                "{:.2} GB at {:.2} GB/s",
                self.kill.sessions.restored_bytes as f64 / 1e9,
                self.kill.sessions.restore_gb_per_s
            ),
        );
        row(
            "CPU s per GB (server, bench)",
            format!(
                "{:.2} ({:.2}, {:.2})",
                self.cpu_s_per_gb.total, self.cpu_s_per_gb.server, self.cpu_s_per_gb.client
            ),
        );
        out
    }
}
