//! How calls reach the I/O thread, and how answers come back to a thread that waits.
//!
//! Locks here are of the standard library, each a word of its own: one that is fresh in a forked child is free, whatever the
//! parent was doing. `parking_lot` (and so tokio) keeps all waiting threads of a process in one table, which a fork may
//! leave locked for ever; so nothing of those is ever waited for by two threads: the I/O thread alone uses the async client.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// What the I/O thread does next. It must not block; most spawn a task.
pub(super) type Job<I> = Box<dyn FnOnce(&Arc<I>) + Send>;

/// The way to the I/O thread. Bounded by who posts: a call that waits posts one, and those that do not wait are counted.
pub(super) struct Jobs<I>(Mutex<Inner<I>>);

struct Inner<I> {
    jobs: VecDeque<Job<I>>,
    waker: Option<Waker>,
    stop: bool,
    closed: bool,
}

/// Nothing that is locked here is left half done by a panic.
pub(super) fn alone<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<I> Default for Jobs<I> {
    fn default() -> Self {
        Self(Mutex::new(Inner { jobs: VecDeque::new(), waker: None, stop: false, closed: false }))
    }
}

impl<I> Jobs<I> {
    /// Hands a job over; `false`: nobody is there to do it.
    pub(super) fn post(&self, job: Job<I>) -> bool {
        let waker = {
            let mut inner = alone(&self.0);
            if inner.stop || inner.closed {
                return false;
            }
            inner.jobs.push_back(job);
            inner.waker.take()
        };
        // Outside of the lock: it wakes a thread that takes it first.
        waker.into_iter().for_each(Waker::wake);
        true
    }

    /// The I/O thread ends when it has done what was posted.
    pub(super) fn stop(&self) {
        let waker = {
            let mut inner = alone(&self.0);
            inner.stop = true;
            inner.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    /// The I/O thread is gone, whatever ended it: what nobody will do is dropped, and whoever waits for it is told.
    pub(super) fn close(&self) {
        let jobs = {
            let mut inner = alone(&self.0);
            inner.closed = true;
            std::mem::take(&mut inner.jobs)
        };
        drop(jobs);
    }

    /// On the I/O thread: does what was posted; ready once it is told to stop.
    pub(super) fn poll(&self, cx: &mut Context<'_>, io: &Arc<I>) -> Poll<()> {
        loop {
            let jobs = {
                let mut inner = alone(&self.0);
                if inner.jobs.is_empty() {
                    if inner.stop {
                        return Poll::Ready(());
                    }
                    inner.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                std::mem::take(&mut inner.jobs)
            };
            jobs.into_iter().for_each(|job| job(io));
        }
    }
}

/// Where a thread waits for an answer.
pub(super) struct Answer<T>(Arc<Shared<T>>);

/// Who gives it. Dropped without having given one, it says that none will come.
pub(super) struct Asked<T>(Option<Arc<Shared<T>>>);

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

enum State<T> {
    Waiting,
    Given(T),
    Never,
}

/// Both ends of one answer.
pub(super) fn answer<T>() -> (Asked<T>, Answer<T>) {
    let shared = Arc::new(Shared { state: Mutex::new(State::Waiting), changed: Condvar::new() });
    (Asked(Some(Arc::clone(&shared))), Answer(shared))
}

impl<T> Asked<T> {
    pub(super) fn give(mut self, value: T) {
        self.end(State::Given(value));
    }

    fn end(&mut self, state: State<T>) {
        if let Some(shared) = self.0.take() {
            *alone(&shared.state) = state;
            shared.changed.notify_one();
        }
    }
}

impl<T> Drop for Asked<T> {
    fn drop(&mut self) {
        self.end(State::Never);
    }
}

impl<T> Answer<T> {
    /// Nobody will give it.
    pub(super) fn is_hopeless(&self) -> bool {
        matches!(*alone(&self.0.state), State::Never)
    }

    /// Waits for the answer, at most so long; `None`: there is none yet, or never.
    pub(super) fn wait(&self, within: Duration) -> Option<T> {
        let until = Instant::now() + within;
        let mut state = alone(&self.0.state);
        loop {
            match std::mem::replace(&mut *state, State::Waiting) {
                State::Given(value) => return Some(value),
                State::Never => {
                    *state = State::Never;
                    return None;
                }
                State::Waiting => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_waited_for_no_longer_than_asked_and_not_at_all_where_none_will_come() {
        let (asked, answer) = answer();
        assert_eq!(answer.wait(Duration::from_millis(1)), None);
        let giver = std::thread::spawn(move || asked.give(5));
        assert_eq!(answer.wait(Duration::from_secs(60)), Some(5));
        giver.join().unwrap();
        let (asked, answer) = super::answer::<u8>();
        assert!(!answer.is_hopeless());
        drop(asked);
        assert_eq!(answer.wait(Duration::from_secs(60)), None);
        assert!(answer.is_hopeless());
    }

    #[test]
    fn jobs_are_done_in_order_and_dropped_when_nobody_does_them() {
        let (jobs, io) = (Jobs::<Mutex<Vec<u8>>>::default(), Arc::new(Mutex::new(Vec::new())));
        for n in 0..3 {
            assert!(jobs.post(Box::new(move |io| alone(io).push(n))));
        }
        let mut cx = Context::from_waker(Waker::noop());
        assert!(jobs.poll(&mut cx, &io).is_pending());
        assert_eq!(*alone(&io), [0, 1, 2]);
        let (asked, answer) = answer::<u8>();
        assert!(jobs.post(Box::new(move |_| drop(asked))));
        jobs.close();
        assert_eq!(answer.wait(Duration::from_secs(60)), None);
        assert!(!jobs.post(Box::new(|_| {})));
        jobs.stop();
        assert!(jobs.poll(&mut cx, &io).is_ready());
    }
}
