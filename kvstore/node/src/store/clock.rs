//! The two clocks of a node: time for promises (leases, deadlines) and time for the policy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvkeep_core::Instant;

use crate::config::PolicyClock;

/// Reads both clocks. Nothing in `kvkeep-core` reads any.
#[derive(Debug)]
pub struct Clock {
    start: std::time::Instant,
    source: PolicyClock,
    /// Largest `policy_clock_ms` seen.
    told: AtomicU64,
}

impl Clock {
    /// Starts at 0 ms.
    pub fn new(source: PolicyClock) -> Self {
        Self { start: std::time::Instant::now(), source, told: AtomicU64::new(0) }
    }

    /// Milliseconds since the node started; for leases and deadlines.
    pub fn monotonic(&self) -> Instant {
        Instant(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// The policy's time: [`Clock::monotonic`], or the largest time a request has told.
    pub fn policy(&self) -> Instant {
        match self.source {
            PolicyClock::Monotonic => self.monotonic(),
            PolicyClock::Request => Instant(self.told.load(Ordering::Relaxed)),
        }
    }

    /// A request tells the policy's time; ignored unless the node was started with `--policy-clock=request`.
    pub fn tell(&self, policy_clock_ms: u64) {
        if self.source == PolicyClock::Request {
            self.told.fetch_max(policy_clock_ms, Ordering::Relaxed);
        }
    }

    /// Since the node started.
    pub fn uptime(&self) -> Duration {
        self.start.elapsed()
    }

    /// Milliseconds since 1970 on this host's wall clock: shown to people, never compared.
    pub fn unix_ms() -> u64 {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }
}
