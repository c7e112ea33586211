//! `restore`: a session on its way up to a tier.

use std::time::Duration;

use kvkeep_core::ids::LeaseId;
use kvkeep_core::{MissReason, Tier};
use kvkeep_proto::v1;

use crate::call::Call;
use crate::client::Safety;
use crate::connection::sessions;
use crate::convert;
use crate::error::{Error, ErrorKind, Result};
use crate::sessions::Sessions;

const VERB: &str = "restore_session";
/// How long after its deadline a restore's last message is waited for: the server ends it there with what it has.
const GRACE: Duration = Duration::from_secs(2);

/// What to bring up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restore {
    /// How far.
    pub tier: Tier,
    /// Lease it for so long (zero: the server's default); `None`: no lease.
    pub lease: Option<Duration>,
}

impl Default for Restore {
    fn default() -> Self {
        Self { tier: Tier::Dram, lease: None }
    }
}

/// How far a restore is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// In the tier now.
    pub positions: u64,
    /// Of the session.
    pub total_positions: u64,
    /// In the tier now.
    pub bytes: u64,
    /// That there are to have.
    pub total_bytes: u64,
}

/// How a restore ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// What is in the tier.
    pub progress: Progress,
    /// Positions up to the largest boundary that is valid under the rules of all groups.
    pub usable_positions: u64,
    /// The engine computes from here on.
    pub compute_from_token: u64,
    /// Whose ids are kept.
    pub tokens: u64,
    /// Runs of positions that are not here; at most 1,024.
    pub missing: Vec<MissingRun>,
    /// `false`: of other weights.
    pub revision_matches: bool,
    /// The deadline passed first.
    pub late: bool,
    /// Held, where a lease was asked for and there was something to hold.
    pub lease: Option<LeaseId>,
}

impl Restored {
    /// Whether the whole session is in the tier.
    pub fn is_whole(&self) -> bool {
        self.revision_matches && self.missing.is_empty() && self.progress.positions == self.progress.total_positions
    }
}

/// Positions in a row that are not here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingRun {
    /// The first.
    pub first_position: u64,
    /// How many.
    pub count: u64,
    /// Why.
    pub reason: Option<MissReason>,
    /// The same as a sentence, of the first.
    pub why: String,
}

/// A restore under way. Dropping it ends the watching; what is on its way still arrives.
pub struct Restoring {
    messages: tonic::Streaming<v1::RestoreProgress>,
    until: tokio::time::Instant,
    last: Option<Restored>,
}

impl Sessions {
    /// Brings a session up to a tier. At the call's deadline it ends with what is there.
    pub async fn restore(&self, id: &str, restore: &Restore, call: &Call) -> Result<Restoring> {
        let shared = &self.ns.client.shared;
        let mut tries = shared.begin(call);
        loop {
            let opened = async {
                let line = shared.line(tries.left(VERB)?).await?;
                let left = tries.left(VERB)?;
                // No grpc-timeout: it would cut off the last message, which comes at the deadline.
                let request = v1::RestoreSessionRequest {
                    ctx: Some(call.to_proto(left)),
                    name: self.name(id),
                    tier: convert::tier_to_proto(restore.tier),
                    lease: restore.lease.map(|ttl| v1::LeaseWish { ttl_ms: convert::millis_to_proto(ttl) }),
                };
                match tokio::time::timeout(left, sessions(line.wire.clone()).restore(request)).await {
                    Ok(Ok(reply)) => Ok(Restoring {
                        messages: reply.into_inner(),
                        until: tokio::time::Instant::from_std(tries.deadline) + GRACE,
                        last: None,
                    }),
                    Ok(Err(status)) => Err(line.judge(VERB, status)),
                    Err(_) => Err(Error::late(VERB)),
                }
            };
            match opened.await {
                Ok(restoring) => return Ok(restoring),
                Err(e) => tries.again(e, Safety::Repeatable).await?,
            }
        }
    }
}

impl Restoring {
    /// How far it is by now; `None` when it ended: then [`Self::finish`] says how.
    pub async fn progress(&mut self) -> Result<Option<Progress>> {
        if self.last.is_some() {
            return Ok(None);
        }
        let next = tokio::time::timeout_at(self.until, self.messages.message()).await;
        let next = next.map_err(|_| Error::late(VERB))?.map_err(|s| Error::from_status(VERB, s))?;
        let Some(message) = next else {
            return Err(Error::new(ErrorKind::Unreachable, "the server ended a restore without its verdict"));
        };
        let progress = Progress {
            positions: message.positions,
            total_positions: message.total_positions,
            bytes: message.bytes,
            total_bytes: message.total_bytes,
        };
        if message.done {
            self.last = Some(restored(progress, message));
            // As behind every stream: one that is dropped before its trailers is reset.
            let _ = tokio::time::timeout_at(self.until, self.messages.message()).await;
            return Ok(None);
        }
        Ok(Some(progress))
    }

    /// Waits for the end.
    pub async fn finish(mut self) -> Result<Restored> {
        loop {
            match self.last.take() {
                Some(restored) => return Ok(restored),
                None => drop(self.progress().await?),
            }
        }
    }
}

fn restored(progress: Progress, last: v1::RestoreProgress) -> Restored {
    let run = |run: v1::MissingRun| MissingRun {
        first_position: run.first_position,
        count: run.count,
        reason: convert::reason_opt_from_proto(run.reason),
        why: run.why,
    };
    Restored {
        progress,
        usable_positions: last.usable_positions,
        compute_from_token: last.compute_from_token,
        tokens: last.tokens,
        missing: last.missing.into_iter().map(run).collect(),
        revision_matches: last.revision_matches,
        late: last.late,
        lease: convert::lease_from_proto(last.lease_id),
    }
}
