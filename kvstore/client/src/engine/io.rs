//! The I/O thread's side of every verb: the async client's, within a bound, and with losses made into misses.
//!
//! Only tasks of the I/O thread come here.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_core::ids::LeaseId;
use kvkeep_core::{MissReason, PartStatus, RequestId};
use tokio::sync::Semaphore;

use super::config::EngineConfig;
use super::contact::{Contact, Ready};
use super::losses::Miss;
use super::queue::Flight;
use crate::call::Call;
use crate::client::{Client, count};
use crate::error::{Error, Result};
use crate::get::{GetItem, GotInto};
use crate::matching::{Match, MatchQuery};
use crate::namespace::{Lease, Namespace};
use crate::put::{PartOutcome, Put};
use crate::region::Place;
use crate::region::mapped::MappedMatch;

/// A call that keeps to its deadline has ended so long after it; one that does not is dropped then.
pub(super) const GRACE: Duration = Duration::from_millis(20);
/// After a call was dropped, a copy that was under way is waited for so long before its memory is called in doubt.
const COPY_END_WAIT: Duration = Duration::from_millis(10);

/// What tasks of the I/O thread share.
pub(super) struct Io {
    pub(super) client: Client,
    pub(super) config: Arc<EngineConfig>,
    pub(super) contact: Arc<Contact>,
    /// Calls that move blocks take one each: some connections are left for those that only ask, which must not wait for
    /// blocks.
    moving: Semaphore,
    /// Calls that name memory and have not ended.
    pub(super) flying: AtomicUsize,
    pub(super) counts: Counts,
}

/// What an engine counts beside its client.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) submitted: AtomicU64,
    pub(super) completed: AtomicU64,
    pub(super) busy: AtomicU64,
    pub(super) cancelled: AtomicU64,
    /// Calls answered with misses here; the client counts those that it answers.
    pub(super) lost: AtomicU64,
    pub(super) in_doubt: AtomicU64,
    pub(super) releases_dropped: AtomicU64,
}

/// Why a call that names memory was ended from outside.
enum Cut {
    TakenBack,
    Late,
}

impl Io {
    pub(super) fn new(client: Client, config: Arc<EngineConfig>) -> Self {
        let connections = config.client.block_connections;
        let left_for_questions = (connections / 4).max(1);
        Self {
            client,
            config,
            contact: Arc::default(),
            moving: Semaphore::new(connections.saturating_sub(left_for_questions).max(1)),
            flying: AtomicUsize::new(0),
            counts: Counts::default(),
        }
    }

    async fn ready(&self, until: Instant) -> Result<Ready, Miss> {
        let ready = self.contact.ready(&self.client, &self.config, until).await;
        ready.map_err(|reason| {
            count(&self.counts.lost, 1);
            Miss::of(reason)
        })
    }

    /// Runs a call on the namespace within its bound. `Ok(Err)`: it came to nothing.
    async fn run<T, F>(
        &self,
        call: &Call,
        until: Instant,
        verb: impl FnOnce(Namespace, Call) -> F,
    ) -> Result<Result<T, Miss>>
    where
        F: Future<Output = Result<T>>,
    {
        let ready = match self.ready(until).await {
            Ok(ready) => ready,
            Err(miss) => return Ok(Err(miss)),
        };
        let left = until.saturating_duration_since(Instant::now());
        let calling = verb(ready.namespace, call.clone().within(left));
        let answer = match tokio::time::timeout_at((until + GRACE).into(), calling).await {
            Ok(answer) => answer,
            Err(_) => {
                count(&self.counts.lost, 1);
                Err(Error::late("engine"))
            }
        };
        self.judge(answer, ready.epoch)
    }

    /// What an answer is worth, and whether the server has to be looked for.
    fn judge<T>(&self, answer: Result<T>, epoch: u64) -> Result<Result<T, Miss>> {
        let miss = match answer {
            // The handle was another life's: there it may name something else, or nothing.
            Ok(_) if self.client.server_epoch() != epoch => Miss::of(MissReason::Restart),
            Ok(answer) => return Ok(Ok(answer)),
            Err(e) => Miss::from_error(e)?,
        };
        if miss.stranger {
            self.contact.forget(&self.client, &self.config);
        } else if matches!(miss.reason, Some(MissReason::Late | MissReason::Unreachable | MissReason::Restart)) {
            self.contact.keep(&self.client, &self.config);
        }
        Ok(Err(miss))
    }

    /// A miss among the answers may tell of a loss that the client made into misses.
    fn watch(&self, reason: Option<MissReason>) {
        if matches!(reason, Some(MissReason::Late | MissReason::Unreachable)) {
            self.contact.keep(&self.client, &self.config);
        }
    }

    pub(super) async fn match_many(
        &self,
        queries: Vec<MatchQuery>,
        call: &Call,
        until: Instant,
    ) -> Result<Vec<Result<Match>>> {
        let asked = queries.as_slice();
        let verb = |ns: Namespace, call: Call| async move { ns.match_many(asked, &call).await };
        let results = match self.run(call, until, verb).await? {
            Err(miss) => return Ok(queries.iter().map(|q| Ok(miss.matched(q.statuses_asked()))).collect()),
            Ok(results) => results,
        };
        self.watch(results.iter().find_map(|r| r.as_ref().ok()).and_then(|m| m.reason));
        let soften = |(result, query): (Result<Match>, &MatchQuery)| {
            result.or_else(|e| {
                let miss = Miss::from_error(e)?;
                if miss.stranger {
                    self.contact.forget(&self.client, &self.config);
                }
                Ok(miss.matched(query.statuses_asked()))
            })
        };
        Ok(results.into_iter().zip(&queries).map(soften).collect())
    }

    pub(super) async fn match_mapped(&self, query: MatchQuery, call: &Call, until: Instant) -> Result<MappedMatch> {
        let asked = &query;
        let verb = |ns: Namespace, call: Call| async move { ns.match_mapped(asked, &call).await };
        match self.run(call, until, verb).await? {
            Err(miss) => Ok(MappedMatch { found: miss.matched(query.statuses_asked()), parts: Vec::new() }),
            Ok(mapped) => {
                self.watch(mapped.found.reason);
                Ok(mapped)
            }
        }
    }

    pub(super) async fn lease(
        &self,
        keys: Vec<Bytes>,
        ttl: Option<Duration>,
        call: &Call,
        until: Instant,
    ) -> Result<(Option<Lease>, Vec<PartStatus>)> {
        let asked = keys.as_slice();
        let verb = |ns: Namespace, call: Call| async move { ns.lease(asked, ttl, &call).await };
        Ok(self.run(call, until, verb).await?.unwrap_or_else(|miss| (None, vec![miss.status; keys.len()])))
    }

    pub(super) async fn renew(
        &self,
        lease: LeaseId,
        ttl: Option<Duration>,
        call: &Call,
        until: Instant,
    ) -> Result<Option<Lease>> {
        let verb = |ns: Namespace, call: Call| async move { ns.renew(lease, ttl, &call).await };
        Ok(self.run(call, until, verb).await?.unwrap_or_default())
    }

    pub(super) async fn touch(&self, keys: Vec<Bytes>, call: &Call, until: Instant) -> Result<u32> {
        let verb = |ns: Namespace, call: Call| async move { ns.touch(&keys, &call).await };
        Ok(self.run(call, until, verb).await?.unwrap_or_default())
    }

    /// Ends leases, as many as one call may name. Where the server is lost they end by themselves.
    pub(super) async fn release(&self, leases: Vec<LeaseId>, requests: Vec<RequestId>) {
        let call = Call::default();
        let until = Instant::now() + self.config.client.patience * 2;
        let verb = |ns: Namespace, call: Call| async move { ns.release(&leases, &requests, &call).await };
        let _ = self.run(&call, until, verb).await; // nobody waits for it
    }

    pub(super) async fn get(
        &self,
        items: Vec<GetItem>,
        places: Vec<Place>,
        lease: Option<LeaseId>,
        call: &Call,
        until: Instant,
        flight: &Flight,
    ) -> Result<Vec<GotInto>> {
        let (asked, places) = (items.as_slice(), places.as_slice());
        let verb = |ns: Namespace, call: Call| async move {
            flight.named_memory.store(true, Ordering::Release);
            ns.get_into_region(asked, places, lease, &call).await
        };
        let (answer, in_doubt) = self.fly(flight, until, self.run(call, until, verb)).await;
        let got = match answer {
            Ok(Ok(got)) => {
                self.watch(got.last().and_then(|g| g.reason));
                got
            }
            Ok(Err(miss)) => items.iter().map(|_| miss.got(in_doubt)).collect(),
            Err(e) => return Err(e),
        };
        count(&self.counts.in_doubt, got.iter().filter(|g| g.in_doubt).count() as u64);
        Ok(got)
    }

    pub(super) async fn put(
        &self,
        put: Put<Place>,
        call: &Call,
        until: Instant,
        flight: &Flight,
    ) -> Result<Vec<PartOutcome>> {
        let asked = &put;
        let verb = |ns: Namespace, call: Call| async move {
            flight.named_memory.store(true, Ordering::Release);
            ns.put_from(asked, &call).await
        };
        // Memory that is only read: what a copy under way still reads does not count, so nothing is in doubt.
        match self.fly(flight, until, self.run(call, until, verb)).await.0? {
            Ok(outcomes) => {
                let lost = outcomes.iter().any(|o| matches!(o, PartOutcome::Refused(e) if e.is_loss()));
                self.watch(lost.then_some(MissReason::Unreachable));
                Ok(outcomes)
            }
            Err(miss) => {
                let parts = put.positions.iter().map(|p| p.parts.len()).sum();
                Ok(vec![PartOutcome::Refused(miss.refusal()); parts])
            }
        }
    }

    /// Runs a call that names memory until it ends, is taken back, or is past its time. Dropping it takes its memory back
    /// (the call word says so to the server); answers whether a copy was under way at that very moment, as far as the client
    /// can tell calls apart: another call's doubt counts as well.
    async fn fly<T>(
        &self,
        flight: &Flight,
        until: Instant,
        call: impl Future<Output = Result<Result<T, Miss>>>,
    ) -> (Result<Result<T, Miss>>, bool) {
        let ended = {
            let call = async {
                // Closed never: the permit is had, or the call is cut.
                let _moving = self.moving.acquire().await;
                call.await
            };
            tokio::select! {
                biased;
                answer = call => Ok(answer),
                () = flight.cancel.notified() => Err(Cut::TakenBack),
                () = tokio::time::sleep_until((until + GRACE * 2).into()) => Err(Cut::Late),
            }
        };
        let ended = match ended {
            // Answered: each part says itself what it is.
            Ok(answer @ (Ok(Ok(_)) | Err(_))) => return (answer, false),
            other => other,
        };
        let in_doubt = flight.named_memory.load(Ordering::Acquire) && !self.client.settle(COPY_END_WAIT).await;
        let reason = match ended {
            Ok(came_to_nothing) => return (came_to_nothing, in_doubt),
            Err(Cut::TakenBack) => MissReason::Cancelled,
            Err(Cut::Late) => {
                count(&self.counts.lost, 1);
                self.watch(Some(MissReason::Late));
                MissReason::Late
            }
        };
        (Ok(Err(Miss::of(reason))), in_doubt)
    }
}
