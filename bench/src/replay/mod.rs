//! `replay`: a workload through the real API, every byte that comes back compared.
//!
//! [`plan`] has the flags and what follows from them -> [`dispatch`] hands requests to engines -> [`engine`] serves one:
//! match, get, compare, put -> [`sessions`] appends to those that are kept -> [`ledger`] keeps what was promised -> [`tally`]
//! counts -> [`report`] says it.

pub mod dispatch;
pub mod engine;
pub mod ledger;
pub mod plan;
pub mod report;
pub mod sessions;
pub mod tally;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use kvkeep_client::{Client, ClientConfig, Namespace};

use crate::progress;
use crate::trace::{Source, Workload};
use dispatch::Dispatcher;
use engine::{Checked, Engine, Shared};
use ledger::Ledger;
use plan::{Plan, ReplayArgs, ServerArgs};
use report::ReplayReport;
use sessions::check::SessionCheck;
use sessions::ledger::SessionLedger;
use tally::{Live, Tally};

/// Flags of `kvkeep-bench replay`.
#[derive(Args, Debug)]
pub struct ReplayCommand {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    replay: ReplayArgs,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What a replay found.
pub struct Outcome {
    /// Of all engines.
    pub tally: Tally,
    /// From the first request to the last.
    pub took: Duration,
    /// The workload.
    pub source: Source,
    /// Different blocks acknowledged durable.
    pub acknowledged: u64,
    /// What became of them; `None` where nothing was promised.
    pub checked: Option<Checked>,
    /// Acknowledged appends to kept sessions, and turns that did not go on from what was acknowledged.
    pub appends: (u64, u64),
    /// What became of kept sessions; `None` where none was kept.
    pub sessions: Option<SessionCheck>,
    /// CPU seconds of this process, the check of what was promised included.
    pub cpu_seconds: f64,
}

/// Runs `kvkeep-bench replay`; answers whether every byte was right and every promise kept.
pub async fn command(command: ReplayCommand) -> anyhow::Result<bool> {
    let workload = command.replay.workload()?;
    let plan = command.replay.plan(workload.source.tokens_per_block)?;
    let shared = open(plan, command.server.client_config()).await?;
    let outcome = run(&shared, workload).await?;
    let report = ReplayReport::new(&shared.plan, &outcome);
    eprintln!("{}", report.table());
    report::write_json(&report, command.json.as_deref())?;
    Ok(report.is_right())
}

/// Connects and registers the namespace.
pub async fn open(plan: Plan, config: ClientConfig) -> anyhow::Result<Arc<Shared>> {
    let endpoint = config.endpoint.clone();
    let client = Client::connect(config).await.with_context(|| format!("no server at {endpoint}"))?;
    let namespace = register(&client, &plan).await?;
    Ok(Arc::new(Shared {
        plan,
        namespace,
        ledger: Ledger::default(),
        sessions: SessionLedger::default(),
        live: Live::default(),
        began: Instant::now(),
    }))
}

async fn register(client: &Client, plan: &Plan) -> anyhow::Result<Namespace> {
    client
        .register_namespace(&plan.namespace, &plan.format, "generated")
        .await
        .with_context(|| format!("namespace {}", plan.namespace))
}

/// Replays a workload, then asks for everything that was promised.
pub async fn run(shared: &Arc<Shared>, workload: Workload) -> anyhow::Result<Outcome> {
    let limit = shared.plan.args.limit.unwrap_or(u64::MAX);
    let total = workload.total.map(|t| t.min(limit)).or(shared.plan.args.limit);
    let cpu = crate::measure::own_cpu_seconds();
    let dispatcher = Dispatcher::new(workload.requests, limit);
    let bar = progress::watch(Arc::clone(shared), total);
    let began = Instant::now();
    let mut engines = tokio::task::JoinSet::new();
    for _ in 0..shared.plan.args.engines {
        let (shared, dispatcher) = (Arc::clone(shared), Arc::clone(&dispatcher));
        engines.spawn(async move {
            let mut engine = Engine::new(shared);
            let served = serve_all(&mut engine, &dispatcher).await;
            if served.is_err() {
                dispatcher.stop();
            }
            served.map(|()| engine.tally)
        });
    }
    let mut tally = Tally::default();
    let mut failed = None;
    while let Some(ended) = engines.join_next().await {
        match ended.context("an engine panicked")? {
            Ok(one) => tally.add(&one),
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    let took = began.elapsed();
    bar.end().await;
    if let Some(e) = failed {
        return Err(e);
    }
    let acknowledged = shared.ledger.len() as u64;
    let checked = if acknowledged == 0 {
        None
    } else {
        let mut checker = Engine::new(Arc::clone(shared));
        let checked = checker.check_promises().await?;
        tally.add_check(&checker.tally);
        Some(checked)
    };
    let promises = shared.sessions.promises();
    let sessions = if promises.is_empty() {
        None
    } else {
        let mut checker = Engine::new(Arc::clone(shared));
        let check = checker.check_sessions(&promises, true).await?;
        tally.add_check(&checker.tally);
        Some(check)
    };
    let cpu_seconds = crate::measure::own_cpu_seconds() - cpu;
    let appends = shared.sessions.appends_and_diverged();
    Ok(Outcome { tally, took, source: workload.source, acknowledged, checked, appends, sessions, cpu_seconds })
}

async fn serve_all(engine: &mut Engine, dispatcher: &Arc<Dispatcher>) -> anyhow::Result<()> {
    while let Some(work) = dispatcher.next().await? {
        engine.serve(&work.request).await.with_context(|| format!("request {}", work.request.number))?;
    }
    Ok(())
}
