//! Ages and gaps in buckets: four per octave, the first one half a second wide.

use std::time::Duration;

use crate::ids::Instant;

/// Buckets. The last one has no end; it begins at five days.
pub(crate) const BUCKETS: usize = 80;
/// Upper end of the first bucket, milliseconds.
const FIRST_MS: f64 = 500.0;
/// Buckets per octave.
pub(crate) const PER_OCTAVE: f64 = 4.0;

/// The edges of the buckets: bucket `k` holds the ages from `edges[k - 1]` to below `edges[k]`.
pub(crate) struct Ages {
    /// Milliseconds, rising; one less than there are buckets.
    edges: [u64; BUCKETS - 1],
}

impl Ages {
    pub(crate) fn new() -> Self {
        Self { edges: std::array::from_fn(|k| (FIRST_MS * (k as f64 / PER_OCTAVE).exp2()).round() as u64) }
    }

    /// The bucket of an age.
    pub(crate) fn bucket(&self, age: Duration) -> usize {
        let ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        self.edges.partition_point(|edge| *edge <= ms)
    }

    /// The bucket of the time from `earlier` to `now`.
    pub(crate) fn since(&self, now: Instant, earlier: Instant) -> usize {
        self.edges.partition_point(|edge| *edge <= now.0.saturating_sub(earlier.0))
    }

    /// Where bucket `k` ends, milliseconds; `None`: nowhere.
    pub(crate) fn end_ms(&self, k: usize) -> Option<u64> {
        self.edges.get(k).copied()
    }

    /// Where bucket `k` begins, milliseconds.
    pub(crate) fn start_ms(&self, k: usize) -> u64 {
        k.checked_sub(1).map_or(0, |k| self.edges[k])
    }

    /// How wide bucket `k` is, milliseconds. The last one counts as wide as its place among the others would make it.
    pub(crate) fn width_ms(&self, k: usize) -> u64 {
        let start = self.start_ms(k);
        self.end_ms(k).unwrap_or(start + start / 5) - start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_age_has_the_bucket_whose_edges_are_around_it() {
        let ages = Ages::new();
        let mut before = 0;
        for k in 0..BUCKETS {
            let start = ages.start_ms(k);
            assert_eq!(ages.bucket(Duration::from_millis(start)), k);
            assert!(ages.width_ms(k) > 0);
            if k > 0 {
                assert!(start > before, "edges rise");
                assert_eq!(ages.bucket(Duration::from_millis(start - 1)), k - 1);
            }
            before = start;
        }
        assert_eq!(ages.bucket(Duration::MAX), BUCKETS - 1);
        assert_eq!(ages.since(Instant(5), Instant(9)), 0, "a clock that went back is no age");
        // Four per octave: 500 ms, then 1 s four buckets on.
        assert_eq!(ages.start_ms(5), 1000);
    }
}
