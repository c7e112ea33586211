//! The command line of `kvkeep-bench`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    Replay(kvkeep_bench::replay::ReplayCommand),
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Replay(c) => kvkeep_bench::replay::command(c).await,
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
