//! What every command measures with: latency histograms, CPU time of processes, the load of the machine.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latencies of one kind of call, 1 us to an hour, three digits.
pub struct Latencies(Histogram<u64>);

/// Longest latency told apart, microseconds; a longer one counts as this.
const LATENCY_US_MAX: u64 = 3_600_000_000;

impl Default for Latencies {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("bounds and digits are constants in range"))
    }
}

impl Latencies {
    /// Notes one call.
    pub fn note(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(LATENCY_US_MAX);
        self.0.saturating_record(us.max(1));
    }

    /// Takes in another engine's.
    pub fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("all histograms have the same bounds");
    }

    /// For a report.
    pub fn summary(&self) -> LatencySummary {
        let at = |q| self.0.value_at_quantile(q);
        LatencySummary {
            count: self.0.len(),
            mean: self.0.mean(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.0.max(),
        }
    }
}

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct LatencySummary {
    /// Calls noted.
    pub count: u64,
    /// Mean, microseconds.
    pub mean: f64,
    /// Median, microseconds.
    pub p50: u64,
    /// 90 %, microseconds.
    pub p90: u64,
    /// 99 %, microseconds.
    pub p99: u64,
    /// 99.9 %, microseconds.
    pub p999: u64,
    /// Largest, microseconds.
    pub max: u64,
}

/// CPU seconds (user and system, all threads) that a process has used so far; `None` when it is gone.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces and brackets: fields count from behind its last bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// CPU seconds of this process.
pub fn own_cpu_seconds() -> f64 {
    cpu_seconds(std::process::id()).unwrap_or_default()
}

/// The one-minute load average; every comparison reports it.
pub fn load_average() -> f64 {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or_default()
}

/// The middle of `values`, the mean of the two middle ones where they are even in number; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// `part / whole`, 0 where the whole is 0.
pub fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Gigabytes (10^9) per second; 0 where no time passed.
pub fn gb_per_s(bytes: u64, over: Duration) -> f64 {
    if over.is_zero() { 0.0 } else { bytes as f64 / 1e9 / over.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_beyond_the_scale_counts_as_the_largest() {
        let mut l = Latencies::default();
        l.note(Duration::from_secs(100_000));
        l.note(Duration::ZERO);
        let s = l.summary();
        assert_eq!(s.count, 2);
        assert!(s.max >= LATENCY_US_MAX * 999 / 1000);
        assert_eq!(s.p50, 1);
    }

    #[test]
    fn the_own_process_has_cpu_time_and_a_gone_one_has_none() {
        assert!(cpu_seconds(std::process::id()).is_some());
        assert!(cpu_seconds(u32::MAX).is_none());
    }

    #[test]
    fn medians_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
