//! What a failed call means to an engine: a miss, unless the call itself is wrong.

use std::time::Duration;

use kvkeep_core::{ErrorKind as CoreKind, MissReason, PartStatus};

use crate::error::{Error, ErrorKind};
use crate::get::GotInto;
use crate::matching::Match;

/// Why a call came to nothing, though it was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Miss {
    pub(super) status: PartStatus,
    pub(super) reason: Option<MissReason>,
    pub(super) retry_after: Option<Duration>,
    /// The server does not know the namespace (any more).
    pub(super) stranger: bool,
}

impl Miss {
    pub(super) fn of(reason: MissReason) -> Self {
        Self { status: PartStatus::Miss, reason: Some(reason), retry_after: None, stranger: false }
    }

    /// What an error is to an engine.
    ///
    /// # Errors
    /// The error, where the call itself is wrong: asked again, it would be wrong again.
    pub(super) fn from_error(error: Error) -> Result<Self, Error> {
        let reason = match error.kind() {
            ErrorKind::Refused(kind) => match kind {
                CoreKind::InvalidArgument
                | CoreKind::WrongSize
                | CoreKind::TooLarge
                | CoreKind::FormatMismatch
                | CoreKind::UnknownSession
                | CoreKind::Config => return Err(error),
                CoreKind::Throttled | CoreKind::Full => {
                    let retry_after = error.retry_after();
                    return Ok(Self { status: PartStatus::Throttled, reason: None, retry_after, stranger: false });
                }
                CoreKind::UnknownNamespace => return Ok(Self { stranger: true, ..Self::of(MissReason::NeverStored) }),
                CoreKind::StaleRevision => MissReason::Revision,
                CoreKind::Expired => MissReason::Expired,
                CoreKind::Checksum | CoreKind::Corrupt => MissReason::Quarantined,
                CoreKind::Io => MissReason::Io,
                CoreKind::Conflict | CoreKind::Unavailable | CoreKind::Denied => MissReason::Unreachable,
            },
            ErrorKind::Late => MissReason::Late,
            ErrorKind::Cancelled => MissReason::Cancelled,
            ErrorKind::HelloRequired | ErrorKind::Unreachable | ErrorKind::Protocol | ErrorKind::Version => {
                MissReason::Unreachable
            }
        };
        Ok(Self::of(reason))
    }

    pub(super) fn got(self, in_doubt: bool) -> GotInto {
        let missed = GotInto::missed(self.reason.unwrap_or(MissReason::Unreachable));
        GotInto { status: self.status, reason: self.reason, retry_after: self.retry_after, in_doubt, ..missed }
    }

    /// `statuses`: keys whose statuses were asked for.
    pub(super) fn matched(self, statuses: usize) -> Match {
        Match { reason: self.reason, ..Match::missed(statuses, MissReason::Unreachable) }
    }

    /// As what a put's parts are refused with.
    pub(super) fn refusal(self) -> Error {
        match self.reason {
            Some(MissReason::Cancelled) => {
                Error::new(ErrorKind::Cancelled, "the put was taken back before it was done").may_be_done()
            }
            Some(MissReason::Late) => Error::late("put_from"),
            reason => {
                let why = reason.map_or("throttled", MissReason::word);
                Error::new(ErrorKind::Unreachable, "the store is not there, or not ours").with("reason", why)
            }
        }
    }
}
