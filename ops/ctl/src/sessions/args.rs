//! What can be typed behind `session`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use kvkeep_client::{SessionHint, SessionState};
use kvkeep_core::Class;

use crate::args::{NamespaceArg, TierArg};

#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// Sessions by id; of every namespace where none is named
    List(ListArgs),
    /// One: what it is, and in which tiers its positions are
    Show(SessionArg),
    /// Brings one up to a tier, and says what is missing and from which token on an engine computes
    Restore(RestoreArgs),
    /// Keeps what it has, and what will be appended, from being evicted from a tier
    Pin {
        #[command(flatten)]
        session: SessionArg,
        /// Which
        #[arg(long, default_value = "nvme")]
        tier: TierArg,
    },
    /// Ends a pin
    Unpin(SessionArg),
    /// Makes a new session that begins with the positions of another
    Fork {
        #[command(flatten)]
        session: SessionArg,
        /// The new one's id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        new: String,
        /// Only with so many of its positions
        #[arg(long, value_name = "POSITIONS")]
        at: Option<u64>,
    },
    /// Drops what is behind a position
    Truncate {
        #[command(flatten)]
        session: SessionArg,
        /// That stay; with 0 it begins anew under the namespace's present weights
        positions: u64,
        /// Token ids stay whole
        #[arg(long)]
        keep_tokens: bool,
    },
    /// Says what is known of its future
    Hint(HintArgs),
    /// Lets nothing be appended until it is opened again
    Close(SessionArg),
    /// Deletes it, and with it what only it kept
    Delete {
        #[command(flatten)]
        session: SessionArg,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Writes one into a file: what it is, its token ids, and every block that is here
    Export {
        #[command(flatten)]
        session: SessionArg,
        /// To write
        file: PathBuf,
        /// Fail where anything is missing
        #[arg(long)]
        complete: bool,
        /// Replace a file that is there
        #[arg(long)]
        overwrite: bool,
    },
    /// Reads one from a file; all of it is checked before anything is changed
    Import(ImportArgs),
    /// Where its positions are, or why they are not, run by run
    Explain(SessionArg),
}

/// Which session.
#[derive(Debug, Args)]
pub struct SessionArg {
    #[command(flatten)]
    pub namespace: NamespaceArg,
    /// The session's id
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub namespace: NamespaceArg,
    /// Only ids that begin with this
    #[arg(long)]
    pub prefix: Option<String>,
    /// Only of this class
    #[arg(long)]
    pub class: Option<ClassArg>,
    /// Only in this state
    #[arg(long)]
    pub state: Option<StateArg>,
    /// Only with this attribute; may be given more than once
    #[arg(long, value_name = "NAME=VALUE", value_parser = attribute)]
    pub attribute: Vec<(String, String)>,
    /// At most so many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub limit: u32,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    pub session: SessionArg,
    /// Up to here
    #[arg(long, default_value = "dram")]
    pub tier: TierArg,
    /// At most so many seconds
    #[arg(long, default_value_t = 600, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub wait_s: u32,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).multiple(true))]
pub struct HintArgs {
    #[command(flatten)]
    pub session: SessionArg,
    /// It will not come back
    #[arg(long, group = "what", conflicts_with_all = ["paused", "due_in_s"])]
    pub finished: bool,
    /// It waits, nobody knows how long
    #[arg(long, group = "what", conflicts_with = "due_in_s")]
    pub paused: bool,
    /// It is expected back in so many seconds
    #[arg(long, group = "what", value_name = "S")]
    pub due_in_s: Option<u32>,
    /// Higher stays longer
    #[arg(long, group = "what", allow_negative_numbers = true)]
    pub priority: Option<i32>,
}

impl HintArgs {
    /// The same in the words of the SDK.
    pub fn hints(&self) -> Vec<SessionHint> {
        let finished = self.finished.then_some(SessionHint::Finished);
        let paused = self.paused.then_some(SessionHint::Paused);
        let due = self.due_in_s.map(|s| SessionHint::DueIn(Duration::from_secs(u64::from(s))));
        [finished, paused, due, self.priority.map(SessionHint::Priority)].into_iter().flatten().collect()
    }
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Written by `session export`
    pub file: PathBuf,
    /// Where it goes: a name, tenant/name, or a number; by default the name in the file
    #[arg(long, short)]
    pub namespace: Option<String>,
    /// The session's id here; by default the file's
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    pub id: Option<String>,
    /// Make the namespace, as the file describes it, where there is none of its name
    #[arg(long)]
    pub register: bool,
    /// Only its token ids: into a namespace of another format or of other weights
    #[arg(long, conflicts_with = "register")]
    pub tokens_only: bool,
}

/// The class of a session's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClassArg {
    /// May be evicted
    Cache,
    /// On more than one node when it was acknowledged
    Replicated,
    /// On disk until it is deleted
    Durable,
}

impl From<ClassArg> for Class {
    fn from(class: ClassArg) -> Self {
        match class {
            ClassArg::Cache => Self::Cache,
            ClassArg::Replicated => Self::Replicated,
            ClassArg::Durable => Self::Durable,
        }
    }
}

/// Whether a session takes appends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    /// It does
    Open,
    /// Not until it is opened again
    Closed,
}

impl From<StateArg> for SessionState {
    fn from(state: StateArg) -> Self {
        match state {
            StateArg::Open => Self::Open,
            StateArg::Closed => Self::Closed,
        }
    }
}

fn attribute(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("an attribute is NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser as _;

    fn hint(args: &[&str]) -> Option<Vec<SessionHint>> {
        let args = [&["kvkeepctl", "session", "hint", "a"], args].concat();
        match Args::try_parse_from(args).ok()?.command {
            Command::Session(SessionCommand::Hint(hint)) => Some(hint.hints()),
            _ => None,
        }
    }

    #[test]
    fn a_hint_says_something_that_goes_together() {
        assert_eq!(hint(&[]), None);
        assert_eq!(hint(&["--finished", "--due-in-s", "3"]), None);
        assert_eq!(hint(&["--priority", "-3"]), Some(vec![SessionHint::Priority(-3)]));
        let due = SessionHint::DueIn(Duration::from_secs(3));
        assert_eq!(hint(&["--due-in-s", "3", "--priority", "1"]), Some(vec![due, SessionHint::Priority(1)]));
    }

    #[test]
    fn an_attribute_has_a_name_and_a_value() {
        assert_eq!(attribute("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(attribute("a="), Ok(("a".to_owned(), String::new())));
        assert!(attribute("a").is_err() && attribute("=b").is_err());
    }
}
