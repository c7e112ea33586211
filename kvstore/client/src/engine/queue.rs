//! Queues of submitted calls: bounded, polled, and watched through an event descriptor.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use kvkeep_core::RequestId;
use rustix::event::EventfdFlags;

use super::jobs::alone;
use crate::error::{Error, Result};
use crate::get::GotInto;
use crate::matching::Match;
use crate::put::PartOutcome;

/// Bits of a ticket that number the calls of a queue; above them 4 for the queue and 16 for the process.
const NUMBER_BITS: u32 = 44;
/// Bits that number queues: [`super::QUEUES_MAX`].
const QUEUE_BITS: u32 = 4;

/// Names one submitted call, in the process that submitted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

impl Ticket {
    fn new(generation: u16, queue: usize, number: u64) -> Self {
        let queue = (queue as u64) << NUMBER_BITS;
        let generation = u64::from(generation) << (NUMBER_BITS + QUEUE_BITS);
        Self(generation | queue | (number % (1 << NUMBER_BITS)))
    }

    /// As a number, for languages that have no types like this.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// Back from [`Self::to_bits`].
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(super) fn generation(self) -> u16 {
        (self.0 >> (NUMBER_BITS + QUEUE_BITS)) as u16
    }

    pub(super) fn queue(self) -> usize {
        (self.0 >> NUMBER_BITS) as usize % (1 << QUEUE_BITS)
    }
}

/// What became of a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a busy queue has not taken the call"]
pub enum Submission {
    /// It is under way; exactly one completion will name the ticket.
    Accepted(Ticket),
    /// The queue has as many calls as it may: poll it first. Nothing was done.
    Busy,
}

impl Submission {
    /// The ticket, unless the queue was busy.
    pub fn ticket(self) -> Option<Ticket> {
        match self {
            Self::Accepted(ticket) => Some(ticket),
            Self::Busy => None,
        }
    }
}

/// A submitted call that has ended.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Which one.
    pub ticket: Ticket,
    /// The request it was submitted for.
    pub request_id: RequestId,
    /// It was taken back before it was done.
    pub cancelled: bool,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a submitted call. A lost server and a cancelled call are misses, never [`Outcome::Wrong`].
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Of a get: one per item, in order.
    Got(Vec<GotInto>),
    /// Of a put: one per part, in the order of positions and their parts.
    Put(Vec<PartOutcome>),
    /// Of a match: one per query, in order; a query that is itself wrong is an error.
    Matched(Vec<Result<Match>>),
    /// The call itself was wrong.
    Wrong(Error),
}

/// A submitted call that has not ended.
pub(super) struct Flight {
    pub(super) ticket: Ticket,
    request_id: RequestId,
    /// Somebody takes it back.
    cancelled: AtomicBool,
    /// Wakes the call; touched on the I/O thread only.
    pub(super) cancel: tokio::sync::Notify,
    /// A server may know of its memory.
    pub(super) named_memory: AtomicBool,
}

impl Flight {
    fn of(ticket: Ticket, request_id: RequestId) -> Self {
        Self {
            ticket,
            request_id,
            cancelled: AtomicBool::new(false),
            cancel: tokio::sync::Notify::new(),
            named_memory: AtomicBool::new(false),
        }
    }

    /// A call that no queue knows: somebody waits for it.
    pub(super) fn waited_for(request_id: RequestId) -> Arc<Self> {
        Arc::new(Self::of(Ticket(0), request_id))
    }

    /// Somebody takes it back; `false`: somebody has already. The caller wakes it.
    pub(super) fn take_back(&self) -> bool {
        !self.cancelled.swap(true, Ordering::AcqRel)
    }

    pub(super) fn is_taken_back(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// One queue.
pub(super) struct Queue {
    generation: u16,
    index: usize,
    bound: usize,
    state: Mutex<State>,
    landed: Condvar,
    event: OwnedFd,
}

#[derive(Default)]
struct State {
    submitted: u64,
    flying: HashMap<Ticket, Arc<Flight>>,
    landed: VecDeque<Completion>,
}

impl Queue {
    pub(super) fn new(generation: u16, index: usize, bound: usize) -> Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::config("no descriptor is to be had for a queue").caused_by(std::io::Error::from(e)))?;
        Ok(Self { generation, index, bound, state: Mutex::default(), landed: Condvar::new(), event })
    }

    /// A place for one more call; `None`: busy. What waits to be polled has its place still, so that a queue that nobody polls
    /// does not grow.
    pub(super) fn admit(&self, request_id: RequestId) -> Option<Arc<Flight>> {
        let mut state = alone(&self.state);
        if state.flying.len() + state.landed.len() >= self.bound {
            return None;
        }
        state.submitted += 1;
        let flight = Arc::new(Flight::of(Ticket::new(self.generation, self.index, state.submitted), request_id));
        state.flying.insert(flight.ticket, Arc::clone(&flight));
        Some(flight)
    }

    /// A call has ended.
    pub(super) fn land(&self, flight: &Flight, cancelled: bool, outcome: Outcome) {
        let mut state = alone(&self.state);
        state.flying.remove(&flight.ticket);
        let request_id = flight.request_id.clone();
        state.landed.push_back(Completion { ticket: flight.ticket, request_id, cancelled, outcome });
        if state.landed.len() == 1 {
            self.signal();
        }
        self.landed.notify_one();
    }

    /// The oldest completions, at most `max`.
    pub(super) fn poll(&self, max: usize) -> Vec<Completion> {
        self.take(&mut alone(&self.state), max)
    }

    /// The same, waiting for the first one at most so long.
    pub(super) fn wait(&self, max: usize, within: Duration) -> Vec<Completion> {
        let until = Instant::now() + within;
        let mut state = alone(&self.state);
        while state.landed.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.landed.wait_timeout(state, left);
            state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
        self.take(&mut state, max)
    }

    fn take(&self, state: &mut State, max: usize) -> Vec<Completion> {
        let n = state.landed.len().min(max);
        let taken: Vec<_> = state.landed.drain(..n).collect();
        if state.landed.is_empty() {
            // Readable no more. Nothing to read means that whoever watches has read it already.
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        } else {
            // Whoever watches may have read it, and completions wait still; and so may another thread.
            self.signal();
            self.landed.notify_one();
        }
        taken
    }

    /// Makes the event readable.
    fn signal(&self) {
        // It fails only where the count is at its end, far beyond what anybody can reach, and then it is readable anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The call of a ticket, while it is under way. `Err`: this queue has never given it out.
    pub(super) fn flight(&self, ticket: Ticket) -> Result<Option<Arc<Flight>>, ()> {
        let state = alone(&self.state);
        let number = ticket.0 % (1 << NUMBER_BITS);
        if number == 0 || number > state.submitted {
            return Err(());
        }
        Ok(state.flying.get(&ticket).cloned())
    }

    /// All calls under way that were submitted for a request; `None`: for any.
    pub(super) fn flights(&self, request: Option<&RequestId>) -> Vec<Arc<Flight>> {
        let state = alone(&self.state);
        let of_request = |f: &&Arc<Flight>| request.is_none_or(|r| f.request_id == *r);
        state.flying.values().filter(of_request).cloned().collect()
    }

    /// Calls under way, and completions that wait.
    pub(super) fn lengths(&self) -> (usize, usize) {
        let state = alone(&self.state);
        (state.flying.len(), state.landed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec};

    fn readable(queue: &Queue) -> bool {
        let event = queue.event();
        let mut poll = [PollFd::new(&event, PollFlags::IN)];
        rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    fn land(queue: &Queue, flight: &Flight) {
        queue.land(flight, false, Outcome::Got(Vec::new()));
    }

    #[test]
    fn a_queue_is_busy_at_its_bound_until_completions_are_polled() {
        let queue = Queue::new(3, 2, 2).unwrap();
        let flights: Vec<_> = (0..2).map(|_| queue.admit(RequestId::default()).unwrap()).collect();
        assert!(queue.admit(RequestId::default()).is_none());
        land(&queue, &flights[0]);
        assert!(queue.admit(RequestId::default()).is_none(), "a completion that waits has its place still");
        assert_eq!(queue.poll(8)[0].ticket, flights[0].ticket);
        assert!(queue.admit(RequestId::default()).is_some());
        assert_eq!(queue.lengths(), (2, 0));
    }

    #[test]
    fn the_event_is_readable_exactly_while_completions_wait_also_when_its_watcher_reads_it() {
        let queue = Queue::new(0, 0, 8).unwrap();
        let flights: Vec<_> = (0..4).map(|_| queue.admit(RequestId::default()).unwrap()).collect();
        assert!(!readable(&queue));
        flights.iter().for_each(|f| land(&queue, f));
        assert!(readable(&queue));
        assert_eq!(queue.poll(1).len(), 1);
        assert!(readable(&queue));
        rustix::io::read(queue.event(), &mut [0; 8]).unwrap();
        assert_eq!(queue.poll(1).len(), 1);
        assert!(readable(&queue), "two wait still");
        assert_eq!(queue.wait(8, Duration::from_secs(60)).len(), 2);
        assert!(!readable(&queue));
        assert!(queue.wait(8, Duration::from_millis(1)).is_empty());
    }

    #[test]
    fn a_ticket_says_where_it_came_from() {
        let queue = Queue::new(u16::MAX, 15, 2).unwrap();
        let flight = queue.admit(RequestId::new(b"r").unwrap()).unwrap();
        let ticket = Ticket::from_bits(flight.ticket.to_bits());
        assert_eq!((ticket.generation(), ticket.queue()), (u16::MAX, 15));
        assert!(queue.flight(ticket).unwrap().is_some());
        assert_eq!(queue.flights(Some(&RequestId::new(b"r").unwrap())).len(), 1);
        assert!(queue.flights(Some(&RequestId::new(b"s").unwrap())).is_empty());
        land(&queue, &flight);
        assert!(queue.flight(ticket).unwrap().is_none(), "it has ended");
        assert!(queue.flight(Ticket::new(u16::MAX, 15, 2)).is_err(), "it was never given out");
    }
}
