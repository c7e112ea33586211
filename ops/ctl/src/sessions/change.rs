//! `session pin`, `unpin`, `fork`, `truncate`, `hint`, `close`, `delete`.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use kvkeep_client::{SessionInfo, wire};
use kvkeep_core::Tier;
use serde_json::json;

use crate::args::TierArg;
use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::sessions::args::{HintArgs, SessionArg};
use crate::sessions::words;

/// `session pin` and, with no tier, `session unpin`
pub async fn pin(contact: &Contact, session: &SessionArg, tier: Option<TierArg>, out: &Output) -> Outcome {
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    let info = match tier {
        Some(tier) => sessions.pin(&session.id, Tier::from(tier), &contact.call).await?,
        None => sessions.unpin(&session.id, &contact.call).await?,
    };
    answer(&info, &namespace, out)
}

/// `session fork`
pub async fn fork(contact: &Contact, session: &SessionArg, new: &str, at: Option<u64>, out: &Output) -> Outcome {
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    let (info, _) = sessions.fork(&session.id, new, at, &contact.call).await?;
    answer(&info, &namespace, out)
}

/// `session truncate`
pub async fn truncate(
    contact: &Contact,
    session: &SessionArg,
    positions: u64,
    keep_tokens: bool,
    out: &Output,
) -> Outcome {
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    let info = sessions.truncate(&session.id, positions, keep_tokens, &contact.call).await?;
    answer(&info, &namespace, out)
}

/// `session hint`
pub async fn hint(contact: &Contact, args: &HintArgs, out: &Output) -> Outcome {
    let (_, sessions) = contact.sessions(args.session.namespace.name()).await?;
    let positions = sessions.hint(&args.session.id, &args.hints(), &contact.call).await?;
    let fields = json!({ "session_id": args.session.id, "positions": positions });
    out.answer("session_hint", fields, || format!("the policy knows it of {positions} positions"))?;
    Ok(())
}

/// `session close`
pub async fn close(contact: &Contact, session: &SessionArg, out: &Output) -> Outcome {
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    let info = sessions.close(&session.id, &contact.call).await?;
    answer(&info, &namespace, out)
}

/// `session delete`
pub async fn delete(contact: &Contact, session: &SessionArg, yes: bool, out: &Output) -> Outcome {
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    if !yes {
        let info = sessions.get(&session.id, &contact.call).await?;
        confirm(&format!(
            "delete session {} of {} ({}, {} positions, {} tokens)? [y/N] ",
            info.id,
            words::label(&namespace),
            info.class.word(),
            info.positions,
            info.tokens
        ))?;
    }
    let deleted = sessions.delete(&session.id, &contact.call).await?;
    let fields = json!({ "session_id": session.id, "namespace_id": namespace.namespace_id, "deleted": deleted });
    out.answer("session_delete", fields, || {
        let done = if deleted { "deleted" } else { "there was none" };
        format!("{}: {done}", session.id)
    })?;
    Ok(())
}

/// Asks on the terminal; without one the answer is no.
fn confirm(question: &str) -> Outcome {
    let (stdin, mut stderr) = (std::io::stdin(), std::io::stderr());
    if !stdin.is_terminal() || !stderr.is_terminal() {
        return Err(Failure::usage("deleting a session asks first, and there is no terminal to ask on")
            .advise("say --yes to delete it without being asked"));
    }
    write!(stderr, "{question}")?;
    stderr.flush()?;
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    if is_yes(&line) { Ok(()) } else { Err(Failure::failed("not deleted")) }
}

fn is_yes(line: &str) -> bool {
    ["y", "yes"].contains(&line.trim().to_lowercase().as_str())
}

fn answer(info: &SessionInfo, namespace: &wire::NamespaceInfo, out: &Output) -> Outcome {
    out.answer("session", words::session_json(info), || words::session_text(info, namespace))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_is_yes() {
        assert!(is_yes("y\n") && is_yes("YES\n"));
        assert!(!is_yes("") && !is_yes("\n") && !is_yes("no\n") && !is_yes("yesterday\n"));
    }
}
