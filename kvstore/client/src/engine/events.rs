//! What is stored and removed, as it happens, for threads that wait for it in steps.
//!
//! The stream stays with the I/O thread: each batch is asked of it, and one that comes when nobody waits any more is kept for the
//! next who does. Ahead of the reader there is one batch; behind it flow control holds the server back, which tells a reader
//! that is too slow of the gap.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvkeep_proto::v1;
use tokio::sync::Notify;

use super::Engine;
use super::io::Io;
use super::jobs::{Answer, Jobs, alone, answer};
use crate::call::Call;
use crate::error::Result;
use crate::events::{EventStream, Watch};
use crate::process::PerProcess;

/// A stream of events, of the process that opened it. Shared by threads; each batch is told to one of them. Dropping it ends it.
pub struct Events(PerProcess<Reader>);

/// What was told within a wait.
#[derive(Debug)]
pub enum Told {
    /// Events; or, in a batch with `gap`, that some were lost: open a new stream with a snapshot.
    Batch(v1::EventBatch),
    /// Nothing within this time.
    Nothing,
    /// The stream has ended: the server said so, it or its engine was closed, or this is a forked child.
    End,
}

type Next = Option<Result<v1::EventBatch>>;

struct Reader {
    jobs: Arc<Jobs<Io>>,
    state: Mutex<State>,
    closed: AtomicBool,
    cancel: Arc<Notify>,
}

enum State {
    Idle(Box<EventStream>),
    /// The I/O thread waits for a batch.
    Asked(Answer<(Box<EventStream>, Next)>),
    Ended,
}

impl Engine {
    /// Follows what is stored and removed: in this namespace, or in all of the tenant's. `snapshot`: first what is here.
    /// `after_sequence`: go on after this event; not with a snapshot. The call's deadline covers the opening.
    ///
    /// # Errors
    /// As [`Self::with_namespace`]; `throttled` where as many are watching as may.
    pub fn watch_events(
        &self,
        all_namespaces: bool,
        snapshot: bool,
        after_sequence: u64,
        call: &Call,
    ) -> Result<Events> {
        let stream = self.with_namespace(call, move |ns, call| async move {
            let watch = Watch { handle: (!all_namespaces).then_some(ns.handle), snapshot, after_sequence };
            ns.client.watch_events(&watch, &call).await
        })?;
        Ok(Events(PerProcess::of(Reader {
            jobs: Arc::clone(&self.life()?.jobs),
            state: Mutex::new(State::Idle(Box::new(stream))),
            closed: AtomicBool::new(false),
            cancel: Arc::default(),
        })))
    }
}

impl Events {
    /// The next batch, waited for at most so long. Where several threads wait, one after the other does.
    ///
    /// # Errors
    /// How the stream was lost (`unreachable` where the server was). It has ended then.
    pub fn next_batch(&self, within: Duration) -> Result<Told> {
        let Some(reader) = self.0.get() else { return Ok(Told::End) };
        let mut state = alone(&reader.state);
        if reader.closed.load(Ordering::Acquire) {
            reader.end(&mut state);
        }
        let asked = match std::mem::replace(&mut *state, State::Ended) {
            State::Idle(stream) => reader.ask(stream),
            State::Asked(asked) => asked,
            State::Ended => return Ok(Told::End),
        };
        match asked.wait(within.min(super::WAIT_MAX)) {
            Some((stream, Some(Ok(batch)))) => {
                *state = State::Idle(stream);
                Ok(Told::Batch(batch))
            }
            Some((stream, over)) => {
                reader.end(&mut State::Idle(stream));
                over.map_or(Ok(Told::End), |lost| lost.map(Told::Batch))
            }
            None if asked.is_hopeless() => Ok(Told::End),
            None => {
                *state = State::Asked(asked);
                Ok(Told::Nothing)
            }
        }
    }

    /// Ends it, also for a thread that waits for a batch. Idempotent.
    pub fn close(&self) {
        if let Some(reader) = self.0.get() {
            reader.close();
        }
    }

    /// Whether nothing will be told any more. `false` while a thread waits.
    pub fn is_ended(&self) -> bool {
        let Some(reader) = self.0.get() else { return true };
        let ended = || reader.state.try_lock().is_ok_and(|state| matches!(*state, State::Ended));
        reader.closed.load(Ordering::Acquire) || ended()
    }
}

impl Reader {
    fn ask(&self, mut stream: Box<EventStream>) -> Answer<(Box<EventStream>, Next)> {
        let (asked, answer) = answer();
        let cancel = Arc::clone(&self.cancel);
        let job = move |_: &Arc<Io>| {
            tokio::spawn(async move {
                let next = tokio::select! {
                    next = stream.next_batch() => next,
                    () = cancel.notified() => return,
                };
                asked.give((stream, next));
            });
        };
        // Where the I/O thread is gone the job is dropped, and waiting ends at once.
        self.jobs.post(Box::new(job));
        answer
    }

    /// The I/O thread lets go of the stream, for it alone uses the async client.
    fn end(&self, state: &mut State) {
        let (cancel, old) = (Arc::clone(&self.cancel), std::mem::replace(state, State::Ended));
        self.jobs.post(Box::new(move |_| {
            cancel.notify_one();
            drop(old);
        }));
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        match self.state.try_lock() {
            Ok(mut state) => self.end(&mut state),
            // Somebody waits: is told that nothing will come.
            Err(_) => self.end(&mut State::Ended),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("ended", &self.is_ended()).finish()
    }
}
