//! The write budget of a device: a token bucket of bytes.

use std::time::Duration;

/// A day, in seconds.
const DAY_S: u64 = 24 * 60 * 60;
/// A quiet device saves up this part of a day's budget, so that a burst after a quiet hour is not refused.
const BURST_PART_OF_DAY: u64 = 24;

/// Fills evenly over the day and holds one hour's worth. Durable writes are charged although they are never refused: they
/// wear the device like any other, so they leave less to the rest.
#[derive(Debug)]
pub(crate) struct Budget {
    bytes_per_day: u64,
    /// Bytes that may be written now; below zero after durable writes, never below minus one day.
    left: i128,
    /// What `left` owes to rounding: byte-seconds below a whole byte, times the seconds of a day.
    rest: u128,
    last: Duration,
}

impl Budget {
    pub fn new(bytes_per_day: u64, now: Duration) -> Self {
        Self { bytes_per_day, left: i128::from(bytes_per_day / BURST_PART_OF_DAY), rest: 0, last: now }
    }

    /// Bytes that may be written now.
    pub fn left(&mut self, now: Duration) -> u64 {
        let passed = now.saturating_sub(self.last).as_nanos();
        self.last = self.last.max(now);
        let whole = u128::from(DAY_S) * 1_000_000_000;
        let grown = self.rest + passed.saturating_mul(u128::from(self.bytes_per_day));
        self.rest = grown % whole;
        let burst = i128::from(self.bytes_per_day / BURST_PART_OF_DAY);
        self.left = self.left.saturating_add(i128::try_from(grown / whole).unwrap_or(i128::MAX)).min(burst);
        u64::try_from(self.left).unwrap_or(0)
    }

    /// A write is admitted as long as anything is left: a block larger than the bucket must get through at some time.
    pub fn admits(&mut self, now: Duration) -> bool {
        self.left(now) > 0
    }

    /// Counts a write.
    pub fn charge(&mut self, bytes: u64) {
        self.left = (self.left - i128::from(bytes)).max(-i128::from(self.bytes_per_day));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h(hours: u64) -> Duration {
        Duration::from_secs(hours * 3600)
    }

    #[test]
    fn a_day_of_writes_is_one_days_budget_and_one_burst() {
        let mut b = Budget::new(24_000, h(0));
        let mut written = 0;
        for second in 0..=DAY_S {
            while b.admits(Duration::from_secs(second)) {
                b.charge(1);
                written += 1;
            }
        }
        assert_eq!(written, 24_000 + 1_000);
    }

    #[test]
    fn durable_bytes_are_paid_back_before_others_are_admitted() {
        let mut b = Budget::new(24_000, h(0));
        b.charge(4_000);
        assert!(!b.admits(h(2)));
        assert!(b.admits(h(4)));
        b.charge(u64::MAX);
        assert!(!b.admits(h(23)));
        assert!(b.admits(h(30)), "the debt is bounded by a day");
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let mut b = Budget::new(24_000, h(5));
        b.charge(1_000);
        assert_eq!((b.left(h(5)), b.left(h(1)), b.left(h(5))), (0, 0, 0));
        assert_eq!(b.left(h(100)), 1_000);
    }
}
