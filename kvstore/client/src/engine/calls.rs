//! Calls that wait: each for its deadline at most, and for a server that is gone no longer than patience.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ids::LeaseId;
use kvkeep_core::{MissReason, PartStatus, RequestId};

use super::Engine;
use super::io::{GRACE, Io};
use super::life::Life;
use super::losses::Miss;
use super::queue::Flight;
use super::submit::one_place_each;
use crate::call::Call;
use crate::client::count;
use crate::error::{ErrorKind, Result};
use crate::get::{GetItem, GotInto};
use crate::matching::{Match, MatchQuery};
use crate::namespace::Lease;
use crate::put::{PartOutcome, Put};
use crate::region::Place;
use crate::region::mapped::MappedMatch;

/// Where the I/O thread itself does not run (the machine is that busy), a call that waits gives up so long after its deadline.
const STALL_MAX: Duration = Duration::from_millis(100);

/// A call that moves blocks and has not ended, on the side of who waits for it.
struct Moving<'a> {
    life: &'a Life,
    flight: Arc<Flight>,
}

/// Counts such a call as long as its task lives.
struct Counted(Arc<Io>);

impl Counted {
    fn new(io: &Arc<Io>) -> Self {
        io.flying.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(io))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.flying.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Engine {
    /// How much of a chain is here; see [`Namespace::match_chain`](crate::Namespace::match_chain). With
    /// [`MatchQuery::leased`] what matched stays readable, and [`Self::release`] lets it go.
    ///
    /// # Errors
    /// Where the query is wrong.
    pub fn match_chain(&self, query: MatchQuery, call: &Call) -> Result<Match> {
        let missed = query.statuses_asked();
        let found = self.match_many(vec![query], call)?.pop();
        found.unwrap_or_else(|| Ok(Miss::of(MissReason::Unreachable).matched(missed)))
    }

    /// The same for many chains in one call. One query may be wrong alone.
    ///
    /// # Errors
    /// Where all of it is wrong.
    pub fn match_many(&self, queries: Vec<MatchQuery>, call: &Call) -> Result<Vec<Result<Match>>> {
        let missed: Vec<_> = queries.iter().map(MatchQuery::statuses_asked).collect();
        let until = self.until(call);
        let answer =
            self.ask(call, |call| move |io: Arc<Io>| async move { io.match_many(queries, &call, until).await })?;
        answer.unwrap_or_else(|| Ok(missed.into_iter().map(|keys| Ok(late().matched(keys))).collect()))
    }

    /// The same for one chain, and where its blocks lie in the server's memory, to be read in place; see
    /// [`Namespace::match_mapped`](crate::Namespace::match_mapped). Without parts where the server is lost, where this process
    /// cannot read in place, and where the query asks for no lease. In a forked child what its parent matched is gone:
    /// [`MappedMatch::after_fork`].
    ///
    /// # Errors
    /// Where the query is wrong; `config` where the server's memory cannot be mapped.
    pub fn match_mapped(&self, query: MatchQuery, call: &Call) -> Result<MappedMatch> {
        let (missed, until) = (query.statuses_asked(), self.until(call));
        let answer =
            self.ask(call, |call| move |io: Arc<Io>| async move { io.match_mapped(query, &call, until).await })?;
        answer.unwrap_or_else(|| Ok(MappedMatch { found: late().matched(missed), parts: Vec::new() }))
    }

    /// Takes a lease; see [`Namespace::lease`](crate::Namespace::lease).
    ///
    /// # Errors
    /// Where the call itself is wrong.
    pub fn lease(
        &self,
        keys: Vec<Bytes>,
        ttl: Option<Duration>,
        call: &Call,
    ) -> Result<(Option<Lease>, Vec<PartStatus>)> {
        let (missed, until) = (keys.len(), self.until(call));
        let answer =
            self.ask(call, |call| move |io: Arc<Io>| async move { io.lease(keys, ttl, &call, until).await })?;
        answer.unwrap_or_else(|| Ok((None, vec![PartStatus::Miss; missed])))
    }

    /// Renews a lease; `None`: it has ended, or the server was lost.
    ///
    /// # Errors
    /// Where the call itself is wrong.
    pub fn renew(&self, lease: LeaseId, ttl: Option<Duration>, call: &Call) -> Result<Option<Lease>> {
        let until = self.until(call);
        let answer =
            self.ask(call, |call| move |io: Arc<Io>| async move { io.renew(lease, ttl, &call, until).await })?;
        answer.unwrap_or(Ok(None))
    }

    /// Counts as an access; answers how many of the positions are here.
    ///
    /// # Errors
    /// Where the call itself is wrong.
    pub fn touch(&self, keys: Vec<Bytes>, call: &Call) -> Result<u32> {
        let until = self.until(call);
        let answer = self.ask(call, |call| move |io: Arc<Io>| async move { io.touch(keys, &call, until).await })?;
        answer.unwrap_or(Ok(0))
    }

    /// Ends leases, by id or by the request that took them, soon and without waiting. Where the server is lost, or more wait to
    /// be released than is reasonable (64 Ki), they end by themselves.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn release(&self, leases: Vec<LeaseId>, requests: Vec<RequestId>) -> Result<()> {
        let life = self.life()?;
        let n = leases.len() + requests.len();
        if n > 0 && !life.release(leases, requests) {
            count(&life.io.counts.releases_dropped, n as u64);
        }
        Ok(())
    }

    /// Reads parts into regions and waits for them; see [`Self::submit_get`].
    ///
    /// # Errors
    /// Where the call itself is wrong.
    pub fn get(
        &self,
        items: Vec<GetItem>,
        places: Vec<Place>,
        lease: Option<LeaseId>,
        call: &Call,
    ) -> Result<Vec<GotInto>> {
        one_place_each(&items, &places)?;
        let (life, until, missed) = (self.life()?, self.until(call), items.len());
        life.note(places.iter().flat_map(Place::regions));
        let moving = Moving { life, flight: Flight::waited_for(call.request_id.clone()) };
        let (flight, call, counted) = (Arc::clone(&moving.flight), call.clone(), Counted::new(&life.io));
        let answer = life.ask(self.patience(&call), move |io| async move {
            let _counted = counted;
            io.get(items, places, lease, &call, until, &flight).await
        });
        answer.unwrap_or_else(|| {
            moving.give_up();
            Ok(vec![late().got(true); missed])
        })
    }

    /// Stores positions out of regions and waits for that; see [`Self::submit_put`]. When its deadline passes, the memory is taken
    /// back first, which is waited for in any case: the caller may overwrite it then, and what a server still read would be
    /// stored. That takes as long as the I/O thread needs to be run once.
    ///
    /// # Errors
    /// Where the call itself is wrong.
    pub fn put(&self, put: Put<Place>, call: &Call) -> Result<Vec<PartOutcome>> {
        let (life, until) = (self.life()?, self.until(call));
        let parts = || put.positions.iter().flat_map(|p| &p.parts);
        life.note(parts().flat_map(|p| p.data.regions()));
        let missed = parts().count();
        let moving = Moving { life, flight: Flight::waited_for(call.request_id.clone()) };
        let (flight, call, counted) = (Arc::clone(&moving.flight), call.clone(), Counted::new(&life.io));
        let patience = self.patience(&call);
        let answer = life.begin_asking(move |io| async move {
            let _counted = counted;
            io.put(put, &call, until, &flight).await
        });
        answer
            .wait(patience)
            .or_else(|| {
                moving.give_up();
                answer.wait(super::WAIT_MAX)
            })
            // Nobody is there to do it, and nobody will.
            .unwrap_or_else(|| Ok(vec![PartOutcome::Refused(late().refusal()); missed]))
    }

    /// Waits until no memory of calls that were taken back or lost is in doubt any more, at most so long; whether none is.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn settle(&self, within: Duration) -> Result<bool> {
        let life = self.life()?;
        let within = within.min(super::WAIT_MAX);
        Ok(life.ask(within + STALL_MAX, move |io| async move { io.client.settle(within).await }).unwrap_or(false))
    }

    /// Waits until the server is there and the namespace registered, at most so long: for a program that would rather start a
    /// little later than begin with misses. Nothing else ever waits for it beyond the first call.
    ///
    /// # Errors
    /// Why the server will not have us: another format under this name (`format_mismatch`), KV of other weights
    /// (`stale_revision`), no credentials (`denied`). All verbs are misses meanwhile.
    pub fn ready(&self, within: Duration) -> Result<bool> {
        let life = self.life()?;
        let within = within.min(super::WAIT_MAX);
        let answer = life
            .ask(within + STALL_MAX, move |io| async move { io.contact.reached(&io.client, &io.config, within).await });
        answer.unwrap_or(Ok(false))
    }

    /// The weights changed: the namespace holds KV of `revision` from now on, and nothing of before; what others computed with
    /// the old weights is missed by them, too. `false`: the server is lost, nothing was done. This process alone goes on with
    /// the new revision; others open their engines anew.
    ///
    /// # Errors
    /// Where the server refuses: somebody else advanced it first (`stale_revision`).
    pub fn advance_revision(&self, revision: &str, call: &Call) -> Result<bool> {
        let (revision, until) = (revision.to_owned(), self.until(call));
        let answer = self.ask(call, |call| {
            move |io: Arc<Io>| async move { io.contact.advance(&io.client, &io.config, &revision, &call, until).await }
        })?;
        match answer.unwrap_or(Ok(false)) {
            Err(e) if e.is_loss() || e.kind() == ErrorKind::Late => Ok(false),
            other => other,
        }
    }

    /// Asks the I/O thread, which keeps to the call's deadline itself.
    fn ask<T, F, W>(&self, call: &Call, work: impl FnOnce(Call) -> W) -> Result<Option<Result<T>>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
        W: FnOnce(Arc<Io>) -> F + Send + 'static,
    {
        let life = self.life()?;
        let answer = life.ask(self.patience(call), work(call.clone()));
        count(&life.io.counts.lost, u64::from(answer.is_none()));
        Ok(answer)
    }

    /// How long a thread waits for a call.
    fn patience(&self, call: &Call) -> Duration {
        self.within(call) + GRACE * 3 + STALL_MAX
    }
}

impl Moving<'_> {
    /// The I/O thread does not come to it: the memory stays in doubt until it does.
    fn give_up(self) {
        count(&self.life.io.counts.lost, 1);
        let flight = self.flight;
        if flight.take_back() {
            self.life.post(Box::new(move |_| flight.cancel.notify_one()));
        }
    }
}

fn late() -> Miss {
    Miss::of(MissReason::Late)
}
