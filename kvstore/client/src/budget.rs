//! How often a client may try again: a token bucket fed by calls, so that a store in trouble is never asked much more
//! than it is asked in health, and the pauses between tries.

use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng as _;

/// Bounds on trying again. Only steps that can be repeated without harm are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// Retries earned by one call: 0.1 lets retries be a tenth of the calls in the long run.
    pub ratio: f64,
    /// Most retries saved up; also what a new client starts with.
    pub burst: u32,
    /// Most tries of one call, the first included.
    pub attempts_max: u32,
    /// Pause before the first retry; doubles with each further one.
    pub backoff_first: Duration,
    /// Longest pause between two tries, except where the server named a longer one.
    pub backoff_max: Duration,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            ratio: 0.1,
            burst: 10,
            attempts_max: 4,
            backoff_first: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
        }
    }
}

impl RetryBudget {
    /// Pause before try number `attempt + 1` (`attempt` tries were made): exponential, drawn between half of it and all
    /// of it so that clients that failed together do not come back together.
    pub(crate) fn pause(&self, attempt: u32) -> Duration {
        let doubled = self.backoff_first.saturating_mul(1 << attempt.saturating_sub(1).min(20));
        doubled.min(self.backoff_max).mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

/// The bucket; shared by all calls of a client.
#[derive(Debug)]
pub(crate) struct Bucket {
    budget: RetryBudget,
    tokens: Mutex<f64>,
}

impl Bucket {
    pub(crate) fn new(budget: RetryBudget) -> Self {
        Self { budget, tokens: Mutex::new(f64::from(budget.burst)) }
    }

    pub(crate) fn budget(&self) -> &RetryBudget {
        &self.budget
    }

    /// A call began.
    pub(crate) fn earn(&self) {
        let mut tokens = self.tokens.lock();
        *tokens = (*tokens + self.budget.ratio).min(f64::from(self.budget.burst));
    }

    /// Takes one retry if one is left.
    pub(crate) fn spend(&self) -> bool {
        let mut tokens = self.tokens.lock();
        let enough = *tokens >= 1.0;
        if enough {
            *tokens -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn retries_stay_a_tenth_of_the_calls_once_the_burst_is_spent() {
        let bucket = Bucket::new(RetryBudget::default());
        let burst = (0..100).filter(|_| bucket.spend()).count();
        assert_eq!(burst, 10);
        let retries = (0..1000)
            .map(|_| {
                bucket.earn();
                usize::from(bucket.spend())
            })
            .sum::<usize>();
        assert!((99..=100).contains(&retries), "{retries}");
    }

    #[test]
    fn an_idle_client_saves_no_more_than_the_burst() {
        let bucket = Bucket::new(RetryBudget { burst: 3, ..RetryBudget::default() });
        (0..10_000).for_each(|_| bucket.earn());
        assert_eq!((0..100).filter(|_| bucket.spend()).count(), 3);
    }

    proptest! {
        #[test]
        fn a_pause_lies_between_half_its_step_and_the_bound(attempt in 1u32..1000) {
            let budget = RetryBudget::default();
            let step = budget.backoff_first.saturating_mul(1 << (attempt - 1).min(20)).min(budget.backoff_max);
            let pause = budget.pause(attempt);
            prop_assert!(pause <= step && pause >= step / 2, "{pause:?} of {step:?}");
        }
    }
}
