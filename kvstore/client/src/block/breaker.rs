//! The circuit breaker: a server that gave no sign of life is not asked again for a moment, so that nobody waits for it.
//!
//! ```text
//! Closed ── a call was lost ──> Open (5 ms, doubling to 500 ms) ── its time is over ──> one call tries, the others do not
//!    ^                           ^                                                              │
//!    └───────────── it was answered ────────────────────────────────────────────────────────────┤
//!                                └────────────── lost again ────────────────────────────────────┘
//! ```

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// First pause after a loss.
const PAUSE_FIRST: Duration = Duration::from_millis(5);
/// Longest pause: a server that is back is found within it.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Whether calls may go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// They may.
    Closed,
    /// They are lost without asking.
    Open,
    /// One is trying.
    HalfOpen,
}

/// The breaker of one client.
#[derive(Debug, Default)]
pub(crate) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Until when nobody asks; `None`: closed.
    open: Option<(Instant, Duration)>,
    /// Somebody tries since then.
    trying: Option<Instant>,
    opened: u64,
    refused: u64,
}

impl Breaker {
    /// Whether a call may go out at `now`. One that tries a server that was lost must report, or gives its place up after
    /// the longest pause.
    pub(crate) fn may(&self, now: Instant) -> bool {
        let mut state = self.0.lock();
        let may = match state.open {
            None => true,
            Some((until, _)) => now >= until && state.trying.is_none_or(|since| now.duration_since(since) >= PAUSE_MAX),
        };
        if !may {
            state.refused += 1;
        } else if state.open.is_some() {
            state.trying = Some(now);
        }
        may
    }

    /// A call was answered.
    pub(crate) fn answered(&self) {
        let mut state = self.0.lock();
        if state.open.is_some() {
            (state.open, state.trying) = (None, None);
        }
    }

    /// A call was lost at `now`.
    pub(crate) fn lost(&self, now: Instant) {
        let mut state = self.0.lock();
        let pause = match state.open {
            None => {
                state.opened += 1;
                PAUSE_FIRST
            }
            // Calls that were under way when it opened say nothing new.
            Some((until, pause)) if now < until => pause,
            Some((_, pause)) => (pause * 2).min(PAUSE_MAX),
        };
        state.open = Some((now + pause, pause));
        state.trying = None;
    }

    pub(crate) fn state(&self) -> BreakerState {
        let state = self.0.lock();
        match (state.open, state.trying) {
            (None, _) => BreakerState::Closed,
            (Some(_), None) => BreakerState::Open,
            (Some(_), Some(_)) => BreakerState::HalfOpen,
        }
    }

    /// How often it opened, and how many calls it did not let out.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let state = self.0.lock();
        (state.opened, state.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_server_is_asked_by_one_call_per_pause_and_found_within_the_longest() {
        let (breaker, start) = (Breaker::default(), Instant::now());
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert!(breaker.may(start));
        breaker.lost(start);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert!(!breaker.may(at(4)));
        assert!(breaker.may(at(5)) && !breaker.may(at(6)));
        breaker.lost(at(7));
        assert!(!breaker.may(at(16)) && breaker.may(at(17)));
        let mut now = 17;
        for _ in 0..20 {
            breaker.lost(at(now));
            let next = (now..=now + 500).find(|ms| breaker.may(at(*ms)));
            now = next.expect("it is asked again within the longest pause");
        }
        breaker.answered();
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert!(breaker.may(at(now)) && breaker.may(at(now)));
        assert_eq!(breaker.counts().0, 1);
    }

    /// The call that tried was dropped without a word: another one takes its place.
    #[test]
    fn a_try_that_never_reports_does_not_keep_it_open_for_ever() {
        let (breaker, start) = (Breaker::default(), Instant::now());
        breaker.lost(start);
        assert!(breaker.may(start + PAUSE_FIRST));
        assert!(!breaker.may(start + PAUSE_FIRST + PAUSE_MAX / 2));
        assert!(breaker.may(start + PAUSE_FIRST + PAUSE_MAX));
    }
}
