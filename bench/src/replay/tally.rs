//! What a replay counts: each engine for itself, added up at the end; and the few numbers that are watched while it runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvkeep_client::Error;
use kvkeep_core::Tier;
use parking_lot::Mutex;

use crate::measure::Latencies;

/// Tiers that a replay over the network can hit, in the order of [`Tally::tier_tokens`].
pub const TIERS: [Tier; 3] = [Tier::Dram, Tier::Nvme, Tier::Remote];

/// One engine's counts.
#[derive(Default)]
pub struct Tally {
    /// Requests finished.
    pub requests: u64,
    /// Tokens of their inputs.
    pub input_tokens: u64,
    /// Of these, tokens whose blocks came back and were right.
    pub hit_tokens: u64,
    /// Hit tokens by the slowest tier of their position.
    pub tier_tokens: [u64; TIERS.len()],
    /// Payload bytes that came back.
    pub bytes_read: u64,
    /// Of these, compared.
    pub bytes_verified: u64,
    /// Of these, different from what was put.
    pub bytes_wrong: u64,
    /// Parts with at least one wrong byte.
    pub parts_wrong: u64,
    /// Parts that matched and did not come, by reason.
    pub parts_lost: BTreeMap<String, u64>,
    /// Payload bytes acknowledged as stored.
    pub bytes_written: u64,
    /// Parts stored by us.
    pub parts_stored: u64,
    /// Parts that somebody had stored before.
    pub parts_present: u64,
    /// Parts that somebody else was writing.
    pub parts_in_progress: u64,
    /// Acknowledgements that stand on fewer copies than their class asks.
    pub acknowledged_degraded: u64,
    /// Failures by `verb.kind`.
    pub errors: BTreeMap<String, u64>,
    /// Latency of match calls.
    pub match_latency: Latencies,
    /// Latency of get calls, each of up to `--get-batch-bytes`.
    pub get_latency: Latencies,
    /// Latency of put calls, each of up to `--put-batch-bytes`.
    pub put_latency: Latencies,
}

impl Tally {
    /// Notes a failure.
    pub fn error(&mut self, verb: &str, error: &Error) {
        *self.errors.entry(format!("{verb}.{}", error.kind().word())).or_default() += 1;
    }

    /// Notes a part that matched and did not come.
    pub fn lost(&mut self, reason: &str) {
        *self.parts_lost.entry(reason.to_owned()).or_default() += 1;
    }

    /// Notes hit tokens of one position.
    pub fn hit(&mut self, tokens: u64, tier: Option<Tier>) {
        self.hit_tokens += tokens;
        if let Some(i) = TIERS.iter().position(|t| Some(*t) == tier) {
            self.tier_tokens[i] += tokens;
        }
    }

    /// Takes in those of a check: part of what was verified, but its reads are no hits and its time is not the workload's.
    pub fn add_check(&mut self, check: &Self) {
        self.bytes_verified += check.bytes_verified;
        self.bytes_wrong += check.bytes_wrong;
        self.parts_wrong += check.parts_wrong;
    }

    /// Takes in another engine's.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.input_tokens += other.input_tokens;
        self.hit_tokens += other.hit_tokens;
        for (mine, theirs) in self.tier_tokens.iter_mut().zip(other.tier_tokens) {
            *mine += theirs;
        }
        self.bytes_read += other.bytes_read;
        self.bytes_verified += other.bytes_verified;
        self.bytes_wrong += other.bytes_wrong;
        self.parts_wrong += other.parts_wrong;
        self.bytes_written += other.bytes_written;
        self.parts_stored += other.parts_stored;
        self.parts_present += other.parts_present;
        self.parts_in_progress += other.parts_in_progress;
        self.acknowledged_degraded += other.acknowledged_degraded;
        for (mine, theirs) in [(&mut self.errors, &other.errors), (&mut self.parts_lost, &other.parts_lost)] {
            for (name, n) in theirs {
                *mine.entry(name.clone()).or_default() += n;
            }
        }
        self.match_latency.add(&other.match_latency);
        self.get_latency.add(&other.get_latency);
        self.put_latency.add(&other.put_latency);
    }
}

/// What is watched while a replay runs.
#[derive(Default)]
pub struct Live {
    /// Requests finished.
    pub requests: AtomicU64,
    /// Their input tokens.
    pub input_tokens: AtomicU64,
    /// Their hit tokens.
    pub hit_tokens: AtomicU64,
    /// Payload bytes, both ways.
    pub bytes: AtomicU64,
    /// Wrong bytes.
    pub bytes_wrong: AtomicU64,
    first_hit: Mutex<FirstHit>,
}

#[derive(Default)]
struct FirstHit {
    armed: Option<Instant>,
    took: Option<Duration>,
}

impl Live {
    /// Adds to one of the numbers.
    pub fn count(number: &AtomicU64, n: u64) {
        number.fetch_add(n, Ordering::Relaxed);
    }

    /// One of the numbers.
    pub fn get(number: &AtomicU64) -> u64 {
        number.load(Ordering::Relaxed)
    }

    /// From now on the first hit is waited for.
    pub fn arm_first_hit(&self) {
        *self.first_hit.lock() = FirstHit { armed: Some(Instant::now()), took: None };
    }

    /// Notes a hit of a get that began then.
    pub fn note_hit(&self, began: Instant) {
        let mut first = self.first_hit.lock();
        if let (Some(armed), None) = (first.armed, first.took)
            && began >= armed
        {
            first.took = Some(armed.elapsed());
        }
    }

    /// From arming to the first hit.
    pub fn first_hit(&self) -> Option<Duration> {
        self.first_hit.lock().took
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_add_up() {
        let mut sum = Tally::default();
        for tier in [Tier::Dram, Tier::Nvme, Tier::Nvme] {
            let mut one = Tally { requests: 1, input_tokens: 10, ..Tally::default() };
            one.hit(3, Some(tier));
            one.lost("late");
            one.get_latency.note(Duration::from_millis(1));
            sum.add(&one);
        }
        assert_eq!((sum.requests, sum.hit_tokens, sum.tier_tokens), (3, 9, [3, 6, 0]));
        assert_eq!(sum.parts_lost["late"], 3);
        assert_eq!(sum.get_latency.summary().count, 3);
    }

    #[test]
    fn a_hit_begun_before_arming_is_not_the_first() {
        let live = Live::default();
        live.arm_first_hit();
        let before = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        live.note_hit(before);
        assert_eq!(live.first_hit(), None);
        live.note_hit(Instant::now());
        assert!(live.first_hit().is_some());
    }
}
