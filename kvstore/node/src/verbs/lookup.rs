//! Match, lease, release, touch, prefetch: what moves no bytes.

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::{Error, ErrorKind, Key, LeaseId, RequestId, Tier};
use kvkeep_proto::v1;

use super::{Answer, Batch, Call, Refusal, Verbs, within};
use crate::failpoint;
use crate::store::clock::Clock;
use crate::store::lookup::{MatchWish, Matched};
use crate::store::requests::Missed;
use crate::store::reservations::ReservationId;

/// A match of more keys than this (some 200 us of work) runs beside the runtime's threads: short calls do not queue behind
/// it, and the system's scheduler lets them in first.
const INLINE_KEYS_MAX: usize = 1024;

impl Verbs {
    /// Largest usable boundary of each chain. `may_map`: the connection may be told where parts lie.
    pub async fn r#match(&self, call: Call, queries: Vec<v1::MatchQuery>, may_map: bool) -> Answer<v1::MatchReply> {
        within("limits.match_queries_max", queries.len(), self.store.config.limits.match_queries_max)?;
        let keys = queries.iter().map(|q| q.keys.len()).sum();
        self.keys_within(keys)?;
        let verbs = self.clone();
        let answer = move || {
            let answer = |query| {
                verbs.match_one(&call, query, may_map).unwrap_or_else(|e| v1::MatchResult {
                    error: Some(convert::error_to_proto(&e)),
                    ..Default::default()
                })
            };
            queries.into_iter().map(answer).collect()
        };
        let results = if keys <= INLINE_KEYS_MAX {
            answer()
        } else {
            tokio::task::spawn_blocking(answer).await.map_err(|_| Refusal::Cut("the match was cut short"))?
        };
        failpoint::at("match.answered");
        Ok(v1::MatchReply { results })
    }

    fn match_one(&self, call: &Call, query: v1::MatchQuery, may_map: bool) -> Result<v1::MatchResult, Error> {
        if let Some(lease) = convert::lease_from_proto(query.release_lease_id) {
            failpoint::at("release.asked");
            self.store.release(call.caller, &[lease], &[]);
        }
        for key in &query.keys {
            if !(1..=kvkeep_core::ids::KEY_BYTES_MAX).contains(&key.len()) {
                Key::new(key)?;
            }
        }
        let handle = convert::handle_from_proto(query.handle)?;
        let request_id = if query.request_id.is_empty() {
            call.context.request_id.clone()
        } else {
            RequestId::new(&query.request_id)?
        };
        if query.map && !(may_map && query.lease.is_some()) {
            return Err(Error::new(
                ErrorKind::Denied,
                "map needs a lease, and the Unix socket as a user that may map: auth.map_uids",
            ));
        }
        let wish = MatchWish {
            request_id,
            handle,
            digests: self.store.digests(call.caller, handle, query.keys.iter().map(|k| &k[..])),
            lease: query.lease.map(|l| self.lease_term(l.ttl_ms)),
            promote: query.promote,
            statuses: query.want_statuses,
            fidelity: convert::fidelity_from_proto(query.fidelity)?,
        };
        let matched = self.store.match_chain(call.caller, &call.context.info, &wish)?;
        if let Some((reason, key)) =
            matched.outcome.reason.zip(query.keys.get(matched.outcome.boundary_positions as usize))
        {
            self.store.requests.missed(Missed {
                tenant: call.caller.tenant,
                request: wish.request_id.clone(),
                verb: "match",
                handle,
                keys: query.keys.len() as u32,
                hits: matched.outcome.boundary_positions,
                key: Key::new(key)?,
                reason,
                unix_ms: Clock::unix_ms(),
            });
        }
        let mapped = match matched.lease.filter(|_| query.map) {
            None => None,
            Some((lease, _)) => {
                let boundary = matched.outcome.boundary_positions as usize;
                Some(self.store.map_positions(call.caller, lease, &wish.digests[..boundary], &query.keys)?)
            }
        };
        Ok(v1::MatchResult { mapped, ..spell_match(matched) })
    }

    /// Takes a lease, or renews one.
    pub fn lease(&self, call: &Call, wish: v1::LeaseRequest) -> Answer<v1::LeaseReply> {
        let ttl = self.lease_term(wish.ttl_ms);
        if let Some(id) = convert::lease_from_proto(wish.lease_id) {
            let left = self.store.renew(call.caller, id, ttl)?;
            let lease = v1::GrantedLease { lease_id: id.0, ttl_ms: convert::millis_to_proto(left), positions: 0 };
            return Ok(v1::LeaseReply { lease: Some(lease), statuses: Bytes::new() });
        }
        let Batch { handle, current, digests } = self.batch(call, wish.handle, &wish.keys)?;
        let digests = if current { digests } else { Vec::new() };
        let request_id = call.context.request_id.clone();
        let (lease, statuses) = self.store.lease(call.caller, request_id, handle, &digests, ttl, &call.context.info)?;
        failpoint::at("lease.taken");
        let positions = statuses.iter().filter(|s| **s == kvkeep_core::PartStatus::Hit).count() as u32;
        Ok(v1::LeaseReply {
            lease: lease.map(|(id, left)| v1::GrantedLease {
                lease_id: id.0,
                ttl_ms: convert::millis_to_proto(left),
                positions,
            }),
            statuses: convert::statuses_to_proto(&statuses),
        })
    }

    /// Ends leases and abandons reservations.
    pub fn release(&self, call: &Call, wish: v1::ReleaseRequest) -> Answer<v1::ReleaseReply> {
        failpoint::at("release.asked");
        self.keys_within(wish.lease_ids.len() + wish.reservation_ids.len() + wish.request_ids.len())?;
        let requests: Vec<_> = wish.request_ids.iter().map(|r| RequestId::new(r)).collect::<Result<_, _>>()?;
        let leases: Vec<_> = wish.lease_ids.into_iter().map(LeaseId).collect();
        let mut released = self.store.release(call.caller, &leases, &requests);
        released += self.store.abandon(call.caller, wish.reservation_ids.into_iter().map(ReservationId));
        Ok(v1::ReleaseReply { released })
    }

    /// Counts accesses.
    pub fn touch(&self, call: &Call, wish: v1::TouchRequest) -> Answer<v1::TouchReply> {
        failpoint::at("touch.asked");
        let batch = self.batch(call, wish.handle, &wish.keys)?;
        let (request, info) = (&call.context.request_id, &call.context.info);
        Ok(v1::TouchReply { touched: self.store.touch(call.caller, request, None, info, &batch.digests) })
    }

    /// Asks for promotion.
    pub fn prefetch(&self, call: &Call, wish: v1::PrefetchRequest) -> Answer<v1::PrefetchReply> {
        if wish.to != 0 && convert::tier_from_proto(wish.to)? != Tier::Dram {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "a storage node prefetches into dram and nowhere else").into()
            );
        }
        let batch = self.batch(call, wish.handle, &wish.keys)?;
        let (started, already, refused) = self.store.prefetch(call.caller, batch.handle, &batch.digests);
        Ok(v1::PrefetchReply { started, already, refused })
    }
}

fn spell_match(matched: Matched) -> v1::MatchResult {
    let outcome = matched.outcome;
    let verdict = match (matched.recompute_us, outcome.boundary_positions) {
        (_, 0) | (0, _) => v1::load_estimate::Verdict::Unspecified,
        (recompute, _) if matched.load_us <= recompute => v1::load_estimate::Verdict::Load,
        _ => v1::load_estimate::Verdict::Recompute,
    };
    v1::MatchResult {
        boundary_positions: outcome.boundary_positions,
        boundary_tokens: matched.boundary_tokens,
        lease: matched.lease.map(|(id, left)| v1::GrantedLease {
            lease_id: id.0,
            ttl_ms: convert::millis_to_proto(left),
            positions: outcome.leased_positions,
        }),
        estimate: Some(v1::LoadEstimate {
            bytes: outcome.dram_bytes + outcome.nvme_bytes,
            dram_bytes: outcome.dram_bytes,
            nvme_bytes: outcome.nvme_bytes,
            remote_bytes: 0,
            load_us: matched.load_us,
            recompute_us: matched.recompute_us,
            verdict: verdict as i32,
        }),
        reason: convert::reason_opt_to_proto(outcome.reason),
        statuses: Bytes::from(outcome.statuses),
        tiers: Bytes::from(outcome.tiers),
        error: None,
        mapped: None,
    }
}
