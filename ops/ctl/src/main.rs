//! `kvkeepctl`: what an operator asks of KVKeep.
//!
//! The map: `args` says what can be typed; `contact` holds one run's connection and choices; `show` puts wire messages into
//! tables and JSON; `namespaces`, `blocks`, `sessions`, `fsck`, `node` and `events` are the commands; `demo` and `doctor`
//! (with `checks`) stand alone. `output` writes, `failure` knows the exit codes, `key` and `units` read and write what people
//! type and see.

mod args;
mod blocks;
mod checks;
mod contact;
mod demo;
mod doctor;
mod events;
mod failure;
mod fsck;
mod key;
mod kvkeepd;
mod namespaces;
mod node;
mod output;
mod sessions;
mod show;
mod units;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Args, BlockCommand, Command, LeaseCommand, NamespaceCommand, TierCommand};
use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::Output;

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
    let contact = Contact::open(&args.connection).await?;
    match &args.command {
        Command::Status => node::status(&contact, out).await,
        Command::Namespace(NamespaceCommand::List) => namespaces::list(&contact, out).await,
        Command::Namespace(NamespaceCommand::Show { name }) => namespaces::show(&contact, name, out).await,
        Command::Block(BlockCommand::List { namespace, prefix, limit }) => {
            blocks::list(&contact, namespace.name(), prefix.as_ref(), *limit, out).await
        }
        Command::Block(BlockCommand::Show { namespace, key }) => {
            blocks::show(&contact, namespace.name(), key, out).await
        }
        Command::Session(command) => sessions::run(&contact, command, out).await,
        Command::Tier(TierCommand::List) => node::tiers(&contact, None, out).await,
        Command::Tier(TierCommand::Show { tier }) => node::tiers(&contact, Some(*tier), out).await,
        Command::Lease(LeaseCommand::List { limit }) => node::leases(&contact, *limit, out).await,
        Command::Explain { request: Some(id), .. } => blocks::explain_request(&contact, id, out).await,
        Command::Explain { namespace, key, request: None } => {
            let key = key.as_ref().ok_or_else(|| Failure::usage("explain what? A key, or --request ID"))?;
            blocks::explain(&contact, namespace.name(), key, out).await
        }
        Command::Events(events) => events::run(&contact, events, out).await,
        Command::Scrub { tier, wait_s } => node::scrub(&contact, *tier, *wait_s, out).await,
        Command::Fsck { sweep, wait_s } => fsck::run(&contact, *sweep, *wait_s, out).await,
        Command::Demo(_) | Command::Doctor(_) => Ok(()), // done above
    }
}
