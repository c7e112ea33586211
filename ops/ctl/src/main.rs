//! `kvkeepctl`: what an operator asks of KVKeep.
//!
//! The map: `args` says what can be typed; `session` holds one run's connection and choices; `show` puts wire messages into
//! tables and JSON; `namespaces`, `blocks`, `node` and `events` are the commands; `demo` and `doctor` (with `checks`) stand
//! alone. `output` writes, `failure` knows the exit codes, `key` and `units` read and write what people type and see.

mod args;
mod blocks;
mod checks;
mod demo;
mod doctor;
mod events;
mod failure;
mod key;
mod kvkeepd;
mod namespaces;
mod node;
mod output;
mod session;
mod show;
mod units;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Args, BlockCommand, Command, LeaseCommand, NamespaceCommand, TierCommand};
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::session::Session;

fn main() -> ExitCode {
    let args = Args::parse();
    let output = Output::new(args.json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return output.failed(&Failure::failed(format!("no runtime: {e}"))),
    };
    match runtime.block_on(run(args, &output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => output.failed(&failure),
    }
}

async fn run(args: Args, out: &Output) -> Outcome {
    // These two decide themselves whether they need a server.
    match &args.command {
        Command::Demo(demo) => return demo::run(demo, out).await,
        Command::Doctor(doctor) => return doctor::run(doctor, &args.connection, out).await,
        _ => {}
    }
    let session = Session::open(&args.connection).await?;
    match &args.command {
        Command::Status => node::status(&session, out).await,
        Command::Namespace(NamespaceCommand::List) => namespaces::list(&session, out).await,
        Command::Namespace(NamespaceCommand::Show { name }) => namespaces::show(&session, name, out).await,
        Command::Block(BlockCommand::List { namespace, prefix, limit }) => {
            blocks::list(&session, namespace.name(), prefix.as_ref(), *limit, out).await
        }
        Command::Block(BlockCommand::Show { namespace, key }) => {
            blocks::show(&session, namespace.name(), key, out).await
        }
        Command::Tier(TierCommand::List) => node::tiers(&session, None, out).await,
        Command::Tier(TierCommand::Show { tier }) => node::tiers(&session, Some(*tier), out).await,
        Command::Lease(LeaseCommand::List { limit }) => node::leases(&session, *limit, out).await,
        Command::Explain { namespace, key } => blocks::explain(&session, namespace.name(), key, out).await,
        Command::Events(events) => events::run(&session, events, out).await,
        Command::Scrub { tier, wait_s } => node::scrub(&session, *tier, *wait_s, out).await,
        Command::Demo(_) | Command::Doctor(_) => Ok(()), // done above
    }
}
