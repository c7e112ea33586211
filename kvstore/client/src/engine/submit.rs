//! Calls that do not wait: submitted into a queue, taken back, polled.

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvkeep_core::ids::LeaseId;
use kvkeep_core::{Error as CoreError, ErrorKind as CoreKind, MissReason, RequestId};

use super::Engine;
use super::io::Io;
use super::life::Life;
use super::losses::Miss;
use super::queue::{Completion, Flight, Outcome, Queue, Submission, Ticket};
use crate::call::Call;
use crate::client::count;
use crate::error::{Error, Result};
use crate::get::GetItem;
use crate::matching::MatchQuery;
use crate::put::{PartOutcome, Put};
use crate::region::Place;

/// What a submission has to be answered with, whatever happens.
enum Shape {
    /// Items of a get.
    Get(usize),
    /// Parts of a put.
    Put(usize),
    /// Per query of a match, the keys whose statuses were asked for.
    Match(Vec<usize>),
}

impl Shape {
    fn missed(&self, miss: Miss, in_doubt: bool) -> Outcome {
        match self {
            Self::Get(items) => Outcome::Got(vec![miss.got(in_doubt); *items]),
            Self::Put(parts) => Outcome::Put(vec![PartOutcome::Refused(miss.refusal()); *parts]),
            Self::Match(queries) => Outcome::Matched(queries.iter().map(|keys| Ok(miss.matched(*keys))).collect()),
        }
    }
}

/// A call on its way to its completion, of which there is exactly one: where the call does not come to its end (a bug that
/// panics, the end of the engine), dropping this is the end.
struct Landing {
    io: Arc<Io>,
    queue: Arc<Queue>,
    flight: Arc<Flight>,
    shape: Shape,
    landed: bool,
}

impl Landing {
    fn new(io: &Arc<Io>, queue: Arc<Queue>, flight: Arc<Flight>, shape: Shape) -> Self {
        io.flying.fetch_add(1, Ordering::AcqRel);
        Self { io: Arc::clone(io), queue, flight, shape, landed: false }
    }

    fn land(mut self, outcome: Outcome) {
        self.end(outcome);
    }

    fn end(&mut self, outcome: Outcome) {
        self.landed = true;
        let cancelled = self.flight.is_taken_back() && was_cancelled(&outcome);
        count(&self.io.counts.completed, 1);
        count(&self.io.counts.cancelled, u64::from(cancelled));
        self.io.flying.fetch_sub(1, Ordering::AcqRel);
        self.queue.land(&self.flight, cancelled, outcome);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.landed {
            count(&self.io.counts.lost, 1);
            let in_doubt = self.flight.named_memory.load(Ordering::Acquire);
            let outcome = self.shape.missed(Miss::of(MissReason::Unreachable), in_doubt);
            self.end(outcome);
        }
    }
}

/// Whether being taken back is what ended it: a call may have been done before that was heard of.
fn was_cancelled(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Got(got) => got.iter().any(|g| g.reason == Some(MissReason::Cancelled)),
        Outcome::Put(outcomes) => outcomes
            .iter()
            .any(|o| matches!(o, PartOutcome::Refused(e) if e.kind() == crate::error::ErrorKind::Cancelled)),
        Outcome::Matched(found) => found.iter().flatten().any(|m| m.reason == Some(MissReason::Cancelled)),
        Outcome::Wrong(_) => false,
    }
}

impl Engine {
    /// Reads parts into regions; see [`Namespace::get_into_region`](crate::Namespace::get_into_region). Returns at once. Until
    /// the completion is polled the places are the call's.
    ///
    /// # Errors
    /// `invalid_argument` where there is not one place per item, or no such queue.
    pub fn submit_get(
        &self,
        queue: usize,
        items: Vec<GetItem>,
        places: Vec<Place>,
        lease: Option<LeaseId>,
        call: Call,
    ) -> Result<Submission> {
        one_place_each(&items, &places)?;
        let (life, until) = (self.life()?, self.until(&call));
        life.note(places.iter().flat_map(Place::regions));
        let shape = Shape::Get(items.len());
        self.submit(life, queue, call.request_id.clone(), shape, move |io, flight| async move {
            io.get(items, places, lease, &call, until, &flight).await.map(Outcome::Got)
        })
    }

    /// Stores positions out of regions; see [`Namespace::put_from`](crate::Namespace::put_from). Returns at once. Until the
    /// completion is polled nobody may write to the places.
    ///
    /// # Errors
    /// `invalid_argument` where there is no such queue.
    pub fn submit_put(&self, queue: usize, put: Put<Place>, call: Call) -> Result<Submission> {
        let (life, until) = (self.life()?, self.until(&call));
        let parts = || put.positions.iter().flat_map(|p| &p.parts);
        life.note(parts().flat_map(|p| p.data.regions()));
        let shape = Shape::Put(parts().count());
        self.submit(life, queue, call.request_id.clone(), shape, move |io, flight| async move {
            io.put(put, &call, until, &flight).await.map(Outcome::Put)
        })
    }

    /// Looks chains up, for a scheduler that may never wait: it submits in one step and polls in the next.
    ///
    /// # Errors
    /// `invalid_argument` where there is no such queue.
    pub fn submit_match(&self, queue: usize, queries: Vec<MatchQuery>, call: Call) -> Result<Submission> {
        let (life, until) = (self.life()?, self.until(&call));
        let keys: Vec<_> = queries.iter().map(MatchQuery::statuses_asked).collect();
        let shape = Shape::Match(keys.clone());
        self.submit(life, queue, call.request_id.clone(), shape, move |io, flight| async move {
            tokio::select! {
                biased;
                found = io.match_many(queries, &call, until) => found.map(Outcome::Matched),
                () = flight.cancel.notified() => Ok(Shape::Match(keys).missed(Miss::of(MissReason::Cancelled), false)),
            }
        })
    }

    fn submit<F>(
        &self,
        life: &Life,
        queue: usize,
        request_id: RequestId,
        shape: Shape,
        fly: impl FnOnce(Arc<Io>, Arc<Flight>) -> F + Send + 'static,
    ) -> Result<Submission>
    where
        F: Future<Output = Result<Outcome>> + Send + 'static,
    {
        let queue = self.queue_of(life, queue)?;
        let Some(flight) = queue.admit(request_id) else {
            count(&life.io.counts.busy, 1);
            return Ok(Submission::Busy);
        };
        count(&life.io.counts.submitted, 1);
        let ticket = flight.ticket;
        let landing = Landing::new(&life.io, Arc::clone(queue), Arc::clone(&flight), shape);
        // Where nobody is there to do it, the job is dropped, and the landing with it: that is its completion.
        life.post(Box::new(move |io| {
            let flying = fly(Arc::clone(io), flight);
            tokio::spawn(async move {
                let outcome = flying.await.unwrap_or_else(Outcome::Wrong);
                landing.land(outcome);
            });
        }));
        Ok(Submission::Accepted(ticket))
    }

    /// The oldest completions of a queue, at most `max`. Never waits.
    ///
    /// # Errors
    /// `invalid_argument` where there is no such queue.
    pub fn poll(&self, queue: usize, max: usize) -> Result<Vec<Completion>> {
        Ok(self.queue_of(self.life()?, queue)?.poll(max))
    }

    /// The same, waiting for the first completion, at most so long; empty where none came.
    ///
    /// # Errors
    /// `invalid_argument` where there is no such queue.
    pub fn wait(&self, queue: usize, max: usize, within: Duration) -> Result<Vec<Completion>> {
        Ok(self.queue_of(self.life()?, queue)?.wait(max, within.min(super::WAIT_MAX)))
    }

    /// A descriptor (an eventfd) that is readable while completions of this queue wait. It need not be read: polling the queue
    /// empty makes it unreadable. In a forked child it is another one.
    ///
    /// # Errors
    /// `invalid_argument` where there is no such queue.
    pub fn event_fd(&self, queue: usize) -> Result<BorrowedFd<'_>> {
        Ok(self.queue_of(self.life()?, queue)?.event())
    }

    /// Takes a call back. Its completion comes all the same and at once: misses with reason `cancelled`, unless it was done
    /// before. Places of a get are the caller's again with the completion, but for parts that are
    /// [in doubt](crate::GotInto::in_doubt): see [`Self::settle`]. Answers whether it was under way.
    ///
    /// # Errors
    /// `invalid_argument` for a ticket that this process did not get from this engine.
    pub fn cancel(&self, ticket: Ticket) -> Result<bool> {
        let life = self.life()?;
        let known = (ticket.generation() == life.generation).then(|| life.queues.get(ticket.queue())).flatten();
        let flight = known.and_then(|queue| queue.flight(ticket).ok()).ok_or_else(|| {
            Error::from(CoreError::new(CoreKind::InvalidArgument, "this process has no such ticket"))
                .with("ticket", ticket.to_bits())
        })?;
        Ok(take_back(life, flight.into_iter().collect()) > 0)
    }

    /// Takes back all calls that were submitted for a request; answers how many were under way.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn cancel_request(&self, request_id: &RequestId) -> Result<usize> {
        let life = self.life()?;
        let flights = life.queues.iter().flat_map(|queue| queue.flights(Some(request_id)));
        Ok(take_back(life, flights.collect()))
    }

    fn queue_of<'a>(&self, life: &'a Life, queue: usize) -> Result<&'a Arc<Queue>> {
        life.queues.get(queue).ok_or_else(|| {
            CoreError::new(CoreKind::InvalidArgument, "there is no such queue")
                .with("queue", queue)
                .with("queues", life.queues.len())
                .into()
        })
    }

    pub(super) fn until(&self, call: &Call) -> Instant {
        Instant::now() + self.within(call)
    }
}

fn take_back(life: &Life, flights: Vec<Arc<Flight>>) -> usize {
    let taken: Vec<_> = flights.into_iter().filter(|f| f.take_back()).collect();
    let n = taken.len();
    if n > 0 {
        // Waking a task is the I/O thread's business: see `jobs`.
        life.post(Box::new(move |_| taken.iter().for_each(|f| f.cancel.notify_one())));
    }
    n
}

pub(super) fn one_place_each(items: &[GetItem], places: &[Place]) -> Result<()> {
    if items.len() == places.len() {
        return Ok(());
    }
    Err(CoreError::new(CoreKind::InvalidArgument, "a get takes one place per item")
        .with("items", items.len())
        .with("places", places.len())
        .into())
}
