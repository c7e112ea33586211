//! `session`: sessions as an operator sees them.
//!
//! The map: `args` says what can be typed; `read` shows, `explain` says why, `change` changes; `restore` brings one up, `file`
//! takes one out and in; `words` puts sessions into tables and JSON, `bar` shows how far something is.

pub mod args;
mod bar;
mod change;
mod explain;
mod file;
mod read;
mod restore;
pub mod words;

use crate::contact::Contact;
use crate::failure::Outcome;
use crate::output::Output;
use args::SessionCommand;

/// `session`
pub async fn run(contact: &Contact, command: &SessionCommand, out: &Output) -> Outcome {
    match command {
        SessionCommand::List(args) => read::list(contact, args, out).await,
        SessionCommand::Show(session) => read::show(contact, session, out).await,
        SessionCommand::Restore(args) => restore::run(contact, args, out).await,
        SessionCommand::Pin { session, tier } => change::pin(contact, session, Some(*tier), out).await,
        SessionCommand::Unpin(session) => change::pin(contact, session, None, out).await,
        SessionCommand::Fork { session, new, at } => change::fork(contact, session, new, *at, out).await,
        SessionCommand::Truncate { session, positions, keep_tokens } => {
            change::truncate(contact, session, *positions, *keep_tokens, out).await
        }
        SessionCommand::Hint(args) => change::hint(contact, args, out).await,
        SessionCommand::Close(session) => change::close(contact, session, out).await,
        SessionCommand::Delete { session, yes } => change::delete(contact, session, *yes, out).await,
        SessionCommand::Export { session, file, complete, overwrite } => {
            file::export(contact, session, file, *complete, *overwrite, out).await
        }
        SessionCommand::Import(args) => file::import(contact, args, out).await,
        SessionCommand::Explain(session) => explain::run(contact, session, out).await,
    }
}
