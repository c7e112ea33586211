//! The command line of `kvkeep-bench`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvkeep_bench::{background, device, grpc, load, main_job, matching, peers, policy, replay, sessions, tiers};
use tokio::signal::unix::{SignalKind, signal};

/// Load, replay and comparisons for KVKeep.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Replay a trace or a seeded workload through a server; every byte read back is compared
    Replay(replay::ReplayCommand),
    /// Start a node, replay through it, kill -9 it half-way, finish, and give the account
    Main(main_job::MainCommand),
    /// Gets and puts of mixed sizes, closed or open loop
    Load(load::LoadCommand),
    /// Stock gRPC clients on KVKeep and on a bare service, in pairs
    Grpc(grpc::GrpcCommand),
    /// What looking up long chains costs, and whether others feel it
    Match(matching::MatchCommand),
    /// Blocks from NVMe into a client's region, beside fio on the same files
    Device(device::DeviceCommand),
    /// Ours beside other stores and plain references, in one run of random order
    Peers(peers::PeersCommand),
    /// What eviction policies would keep of a trace, beside the best possible; no node needed
    Policy(policy::PolicyCommand),
    /// What DRAM and NVMe of a node serve of a trace, simulated and live
    Tiers(tiers::TiersCommand),
    /// What sessions cost: appends a second, and a restore from NVMe beside fio
    Sessions(sessions::SessionsCommand),
    /// What gets from DRAM feel of scrubs and of writing behind
    Background(background::BackgroundCommand),
    /// The bare service that `grpc` compares with
    #[command(hide = true)]
    BareServer(grpc::bare::BareCommand),
    /// The server of the references of `peers`
    #[command(hide = true)]
    PeersReference(peers::references::server::ReferenceCommand),
}

async fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Replay(c) => replay::command(c).await,
        Command::Main(c) => main_job::command(c).await,
        Command::Load(c) => load::command(c).await,
        Command::Grpc(c) => grpc::command(c).await,
        Command::Match(c) => matching::command(c).await,
        Command::Device(c) => device::command(c).await,
        Command::Peers(c) => peers::command(c).await,
        Command::Policy(c) => policy::command(c).await,
        Command::Tiers(c) => tiers::command(c).await,
        Command::Sessions(c) => sessions::command(c).await,
        Command::Background(c) => background::command(c).await,
        Command::PeersReference(c) => peers::references::server::command(c).await,
        Command::BareServer(c) => grpc::bare::command(c).await,
    }
}

/// Returns at SIGTERM.
async fn terminated() {
    match signal(SignalKind::terminate()) {
        Ok(mut term) => drop(term.recv().await),
        // Then SIGTERM ends the program as it always does.
        Err(_) => std::future::pending().await,
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    // Dropping a command's future ends the processes that it started and removes their folders.
    let result = tokio::select! {
        result = run(Cli::parse().command) => result,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        () = terminated() => Err(anyhow::anyhow!("terminated")),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("kvkeep-bench: wrong bytes or lost blocks, see above");
            ExitCode::from(2)
        }
        Err(e) => {
            eprintln!("kvkeep-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}
