//! The command line of `kvkeep-bench`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvkeep_bench::{grpc, load, main_job, matching, replay};

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
    /// The bare service that `grpc` compares with
    #[command(hide = true)]
    BareServer(grpc::bare::BareCommand),
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Replay(c) => replay::command(c).await,
        Command::Main(c) => main_job::command(c).await,
        Command::Load(c) => load::command(c).await,
        Command::Grpc(c) => grpc::command(c).await,
        Command::Match(c) => matching::command(c).await,
        Command::BareServer(c) => grpc::bare::command(c).await,
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
