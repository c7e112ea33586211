//! What changes sessions, and what that answers.

use serde::{Deserialize, Serialize};

use super::{Declared, SessionId, SessionName, Text};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Digest, Revision, TenantId};
use crate::words::Tier;

/// Version of the encoding: the first byte. The rest is [postcard](https://postcard.jamesmunns.com/wire-format).
const VERSION: u8 = 1;

/// A change. What a caller may do to whom is checked before it is proposed; here is what the state alone can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Makes the session unless it is there; opens it again where it was closed.
    Open {
        /// Which.
        name: SessionName,
        /// Whose it becomes.
        tenant: TenantId,
        /// Of the caller's weights; of a new session.
        revision: Revision,
        /// Of a new session; never 0.
        uid: u64,
        /// As the caller says it.
        declared: Declared,
        /// A new session begins with the first positions of this one, and with what was declared of it.
        from: Option<(SessionId, Cut)>,
    },
    /// Adds to the end.
    Append {
        /// Which.
        name: SessionName,
        /// Of the session that the proposer saw. One of the same name made since may be of another class.
        uid: u64,
        /// Of the caller's weights.
        revision: Revision,
        /// Positions that it has now.
        from_position: u64,
        /// The positions after those.
        digests: Vec<Digest>,
        /// Token ids, if the caller gave any: from the token on that the session has now.
        text: Option<Text>,
    },
    /// Keeps the first positions.
    Truncate {
        /// Which.
        name: SessionName,
        /// Of the caller's weights; another than the session's only with 0 positions.
        revision: Revision,
        /// What stays.
        cut: Cut,
    },
    /// Changes what is said of it.
    Set {
        /// Which.
        name: SessionName,
        /// What.
        change: Change,
    },
    /// Takes it away.
    Delete {
        /// Which.
        name: SessionName,
    },
    /// Takes away those whose time has come, at most so many.
    Expire {
        /// At most so many.
        most: u32,
    },
}

/// The beginning of a session. What it has less of, it keeps whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Positions; `None`: all.
    pub positions: Option<u64>,
    /// Token ids at most.
    pub tokens: u64,
}

impl Cut {
    /// Everything.
    pub const NONE: Self = Self { positions: None, tokens: u64::MAX };
}

/// One thing that is said of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Takes appends, or not.
    Open(bool),
    /// Not evicted from this tier.
    Pinned {
        /// `None`: ends it.
        tier: Option<Tier>,
        /// The proposer's bound on pinned positions of the tenant.
        positions_max: u64,
    },
    /// Has ended, as far as its engine knows.
    Finished(bool),
    /// How much it matters.
    Priority(i32),
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// To [`Command::Open`]: whether it is new.
    Opened {
        /// It is new.
        created: bool,
    },
    /// To [`Command::Append`].
    Appended {
        /// Positions now.
        positions: u64,
        /// Token ids now.
        tokens: u64,
        /// It was there already.
        repeated: bool,
    },
    /// To [`Command::Truncate`] and [`Command::Set`].
    Changed,
    /// To [`Command::Delete`]: whether there was one.
    Deleted(bool),
    /// To [`Command::Expire`].
    Expired(Vec<SessionName>),
}

impl Command {
    /// As it stands in the log.
    pub fn encode(&self) -> Vec<u8> {
        // Only a type that cannot be spelled fails, and these can.
        postcard::to_extend(self, vec![VERSION]).unwrap_or_default()
    }

    /// From the log.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are no command of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let bad = |why: &'static str| Error::new(ErrorKind::Corrupt, "no command of sessions").with("why", why);
        match bytes.split_first() {
            Some((&VERSION, rest)) => match postcard::take_from_bytes(rest) {
                Ok((command, [])) => Ok(command),
                Ok(_) => Err(bad("bytes are left over")),
                Err(_) => Err(bad("it cannot be read")),
            },
            Some(_) => Err(bad("it is of another version")),
            None => Err(bad("it is empty")),
        }
    }
}
