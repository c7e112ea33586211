//! When it is time to learn, and learning apart from the lock that guards the directory.
//!
//! A fit takes milliseconds. Whoever has nothing else to do meanwhile (a simulation, a test) lets the policy fit within the
//! call that finds it due. A node says once that it fits elsewhere: then a call that finds it due only notes that, the node
//! takes a copy of what was observed under the lock ([`Fits::begin`]), learns without it ([`Fit::run`]), and brings the
//! new order back under it.

use std::sync::Arc;
use std::time::Duration;

use crate::ids::Instant;

use super::ages::Ages;
use super::cells::Ranks;
use super::hazards::{Index, Seen};

/// Between two fits.
const FIT_EVERY: Duration = Duration::from_secs(60);
/// Between two fits while little is known.
const FIT_EVERY_AT_FIRST: Duration = Duration::from_secs(20);
/// How long little is known.
const AT_FIRST: Duration = Duration::from_secs(600);

/// A copy of what was observed until now.
pub struct Fit {
    pub(super) ages: Arc<Ages>,
    pub(super) seen: Seen,
}

/// What was learned from it.
pub struct Fitted {
    pub(super) index: Index,
    pub(super) ranks: Ranks,
}

impl Fit {
    /// Learns. Milliseconds of computing.
    #[must_use]
    pub fn run(self) -> Fitted {
        let index = self.seen.learn(&self.ages);
        Fitted { ranks: Ranks::new(&index), index }
    }
}

/// Where a fit that is made elsewhere stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Elsewhere {
    /// Fits are made here.
    #[default]
    No,
    /// None is due.
    Idle,
    /// Nobody has begun it yet.
    Due,
    /// Somebody is at it.
    Begun,
}

/// The times of fits.
#[derive(Default)]
pub(super) struct Fits {
    /// The first time that was told, and when the next fit is.
    times: Option<(Instant, Instant)>,
    elsewhere: Elsewhere,
}

impl Fits {
    /// Time goes on; `true`: the caller fits now.
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        let (began, next) = *self.times.get_or_insert((now, now.after(FIT_EVERY_AT_FIRST)));
        if now < next {
            return false;
        }
        let every = if now.since(began) < AT_FIRST { FIT_EVERY_AT_FIRST } else { FIT_EVERY };
        self.times = Some((began, now.after(every)));
        match self.elsewhere {
            // The last one is still waited for: whoever should have made it does not come.
            Elsewhere::No | Elsewhere::Due => true,
            Elsewhere::Idle => {
                self.elsewhere = Elsewhere::Due;
                false
            }
            Elsewhere::Begun => false,
        }
    }

    /// From now on somebody asks for fits that are due.
    pub(super) fn elsewhere(&mut self) {
        if self.elsewhere == Elsewhere::No {
            self.elsewhere = Elsewhere::Idle;
        }
    }

    /// Whether one is due; then it has begun.
    pub(super) fn begin(&mut self) -> bool {
        let due = self.elsewhere == Elsewhere::Due;
        if due {
            self.elsewhere = Elsewhere::Begun;
        }
        due
    }

    /// A fit was made, here or elsewhere; whether one had begun elsewhere.
    pub(super) fn done(&mut self) -> bool {
        let begun = self.elsewhere == Elsewhere::Begun;
        if self.elsewhere != Elsewhere::No {
            self.elsewhere = Elsewhere::Idle;
        }
        begun
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant(seconds * 1000)
    }

    #[test]
    fn fits_are_made_here_unless_somebody_asks_for_them() {
        let mut fits = Fits::default();
        assert!(
            !fits.tick(at(0)) && !fits.tick(at(19)) && fits.tick(at(20)) && !fits.tick(at(39)) && fits.tick(at(40))
        );
        assert!(!fits.begin());
        fits.elsewhere();
        assert!(!fits.tick(at(60)) && fits.begin() && !fits.begin() && fits.done() && !fits.done());
        // One that nobody begins is made here with the next; one that has begun is waited for.
        assert!(!fits.tick(at(80)) && fits.tick(at(100)));
        fits.done();
        assert!(!fits.tick(at(120)) && fits.begin() && !fits.tick(at(140)) && fits.done());
        assert!(!fits.tick(at(700)) && !fits.tick(at(759)) && fits.tick(at(760)), "once a minute, later");
    }
}
