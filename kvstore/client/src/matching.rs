//! `match`: how much of a prompt is here.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ids::LeaseId;
use kvkeep_core::{MissReason, PartStatus, RequestId, Tier};
use kvkeep_proto::v1;

use crate::call::Call;
use crate::connection::blocks;
use crate::convert;
use crate::error::{Error, Result};
use crate::namespace::{Lease, Namespace};

/// One chain to look up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MatchQuery {
    /// The chain from its start, in order.
    pub keys: Vec<Bytes>,
    /// Names the lease; empty: the call's request id.
    pub request_id: RequestId,
    /// Lease what matched for so long (zero: the server's default); `None`: no lease.
    pub lease: Option<Duration>,
    /// Start bringing what matched up to DRAM.
    pub promote: bool,
    /// Answer per position, not only the boundary.
    pub statuses: bool,
    /// End this lease first: whoever reads one batch after the other saves a call per batch.
    pub release: Option<LeaseId>,
}

impl MatchQuery {
    /// Looks only.
    pub fn of(keys: Vec<Bytes>) -> Self {
        Self { keys, ..Self::default() }
    }

    /// Keys whose statuses are asked for.
    pub(crate) fn statuses_asked(&self) -> usize {
        if self.statuses { self.keys.len() } else { 0 }
    }

    /// And leases what matched.
    #[must_use]
    pub fn leased(mut self, ttl: Duration) -> Self {
        self.lease = Some(ttl);
        self
    }
}

/// What the server advises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Loading is faster.
    Load,
    /// Computing again is faster.
    Recompute,
}

/// How much of a chain is here.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// Keys covered by the largest boundary valid under the rules of all groups.
    pub boundary_positions: u32,
    /// The same in tokens.
    pub boundary_tokens: u64,
    /// Taken where it was asked for and something matched.
    pub lease: Option<Lease>,
    /// Per key, where they were asked for.
    pub statuses: Vec<PartStatus>,
    /// Slowest tier per key, where they were asked for.
    pub tiers: Vec<Option<Tier>>,
    /// Bytes and time that loading up to the boundary takes.
    pub estimate: v1::LoadEstimate,
    /// Why the boundary is not larger; `None` when every key matched.
    pub reason: Option<MissReason>,
}

impl Match {
    /// The lease's name, as [`Namespace::get`] takes it.
    pub fn lease_id(&self) -> Option<LeaseId> {
        self.lease.map(|l| l.id)
    }

    /// What the server advises; `None`: nothing known.
    pub fn verdict(&self) -> Option<Verdict> {
        match self.estimate.verdict() {
            v1::load_estimate::Verdict::Load => Some(Verdict::Load),
            v1::load_estimate::Verdict::Recompute => Some(Verdict::Recompute),
            v1::load_estimate::Verdict::Unspecified => None,
        }
    }

    /// What a lost server answers. `keys`: of which statuses were asked for.
    pub(crate) fn missed(keys: usize, reason: MissReason) -> Self {
        Self {
            boundary_positions: 0,
            boundary_tokens: 0,
            lease: None,
            statuses: vec![PartStatus::Miss; keys],
            tiers: vec![None; keys],
            estimate: v1::LoadEstimate::default(),
            reason: Some(reason),
        }
    }

    pub(crate) fn from_proto(result: v1::MatchResult, query: &MatchQuery) -> Result<Self> {
        if let Some(detail) = result.error {
            return Err(Error::from_detail(detail));
        }
        let keys = query.keys.len();
        let fits = |n: usize| n == keys || n == 0;
        if result.boundary_positions as usize > keys || !fits(result.statuses.len()) || !fits(result.tiers.len()) {
            return Err(Error::protocol("a match answers for other keys than were asked").with("keys", keys));
        }
        Ok(Self {
            boundary_positions: result.boundary_positions,
            boundary_tokens: result.boundary_tokens,
            lease: result.lease.and_then(Lease::from_proto),
            statuses: convert::statuses_from_proto(&result.statuses),
            tiers: convert::tiers_from_proto(&result.tiers),
            estimate: result.estimate.unwrap_or_default(),
            reason: convert::reason_opt_from_proto(result.reason),
        })
    }
}

impl Namespace {
    /// Looks one chain up. A lost server is a boundary of 0, unless [`crate::config::Lost::Errors`] is configured.
    pub async fn match_chain(&self, query: &MatchQuery, call: &Call) -> Result<Match> {
        let mut results = self.match_many(std::slice::from_ref(query), call).await?;
        results.pop().unwrap_or_else(|| Err(Error::protocol("a match has no answer")))
    }

    /// Looks many chains up, in as few calls as the server's limits allow. Answers in order; one query may fail alone.
    pub async fn match_many(&self, queries: &[MatchQuery], call: &Call) -> Result<Vec<Result<Match>>> {
        let mut results = Vec::with_capacity(queries.len());
        for queries in self.split(queries) {
            let shared = &self.client.shared;
            let reply = shared
                .hot(
                    "match",
                    call,
                    |ctx| v1::MatchRequest {
                        ctx: Some(ctx),
                        queries: queries.iter().map(|q| self.query_to_proto(q, call)).collect(),
                    },
                    |wire, r| async move { blocks(wire).r#match(r).await },
                )
                .await;
            let reply = match reply {
                Ok(reply) => reply,
                Err(e) => {
                    let reason = shared.miss(e)?;
                    results.extend(queries.iter().map(|q| Ok(Match::missed(q.statuses_asked(), reason))));
                    continue;
                }
            };
            if reply.results.len() != queries.len() {
                return Err(Error::protocol("a match has another number of answers than queries")
                    .with("queries", queries.len())
                    .with("answers", reply.results.len()));
            }
            results.extend(reply.results.into_iter().zip(queries).map(|(r, q)| Match::from_proto(r, q)));
        }
        Ok(results)
    }

    pub(crate) fn query_to_proto(&self, query: &MatchQuery, call: &Call) -> v1::MatchQuery {
        let request_id = if query.request_id.as_bytes().is_empty() { &call.request_id } else { &query.request_id };
        v1::MatchQuery {
            request_id: Bytes::copy_from_slice(request_id.as_bytes()),
            handle: self.wire_handle(),
            keys: query.keys.clone(),
            lease: query.lease.map(|ttl| v1::LeaseWish { ttl_ms: convert::millis_to_proto(ttl) }),
            promote: query.promote,
            want_statuses: query.statuses,
            fidelity: v1::Fidelity::Exact as i32,
            map: false,
            release_lease_id: convert::lease_to_proto(query.release),
        }
    }

    /// Cuts a list of queries by both limits: queries and keys of one call. A single query over the limit goes alone; the
    /// server names the limit.
    fn split<'q>(&self, queries: &'q [MatchQuery]) -> impl Iterator<Item = &'q [MatchQuery]> + use<'q> {
        let limits = self.client.hello().limits;
        let mut rest = queries;
        std::iter::from_fn(move || {
            let mut keys = 0;
            let fit = rest
                .iter()
                .take(limits.match_queries_max.max(1))
                .take_while(|q| {
                    keys += q.keys.len();
                    keys <= limits.batch_keys_max
                })
                .count();
            let (head, tail) = rest.split_at(fit.max(1).min(rest.len()));
            rest = tail;
            (!head.is_empty()).then_some(head)
        })
    }
}
