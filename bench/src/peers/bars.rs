//! Comparisons: which path is held against which, paired within each round.

use serde::Serialize;

use super::path::{BATCH, PathId, Sample, Way};
use super::report::quantile;
use crate::measure::median;

/// What is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Bytes per second: more is better.
    Throughput,
    /// The median time of a call: less is better.
    Time,
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Bar {
    /// The dividend.
    pub of: PathId,
    /// The divisor.
    pub over: PathId,
    /// What of them.
    pub by: By,
}

/// The names of our paths, which the table below holds against references and peers.
pub mod ours {
    /// Out of the store into a registered region.
    pub const REGION_GET: &str = "region_get";
    /// Out of a registered region into the store.
    pub const REGION_PUT: &str = "region_put";
    /// Match, lease, map, release; nothing is copied.
    pub const MAPPED_GET: &str = "mapped_get";
    /// An empty call on the socket of the above.
    pub const EMPTY_CALL: &str = "empty_call";
    /// A look-up without a hit.
    pub const MISSED_MATCH: &str = "missed_match";
    /// Over the block port.
    pub const PORT_GET: &str = "port_get";
    /// Over the block port.
    pub const PORT_PUT: &str = "port_put";
    /// The same with TLS.
    pub const PORT_GET_TLS: &str = "port_get_tls";
    /// The same with TLS.
    pub const PORT_PUT_TLS: &str = "port_put_tls";
    /// Over gRPC.
    pub const GRPC_GET: &str = "grpc_get";
    /// Over gRPC.
    pub const GRPC_PUT: &str = "grpc_put";
}

use super::references::CONNECTIONS;
use super::references::copy::{MEMCPY, MEMCPY_STREAM};
use super::references::place::SHM_PLACE;
use super::references::tcp::RAW_TCP;

/// Mooncake over shared memory, as its program calls itself.
const AGENT: &str = "mooncake_shm_agent";
/// Mooncake over TCP.
const MOONCAKE_TCP: &str = "mooncake_tcp";

/// All comparisons, ours first.
pub fn all() -> Vec<Bar> {
    use Way::{Copy, Get, Put};
    let single = PathId::single;
    let bar = |of: PathId, over: PathId, by| Bar { of, over, by };
    let mut bars = vec![
        bar(single(ours::REGION_GET, Get).batched(), single(AGENT, Get).batched(), By::Throughput),
        bar(single(ours::REGION_GET, Get), single(SHM_PLACE, Get), By::Time),
        bar(single(ours::REGION_GET, Get), single(AGENT, Get), By::Throughput),
        bar(single(ours::MAPPED_GET, Get).batched(), single(ours::EMPTY_CALL, Way::Call), By::Time),
        bar(single(ours::REGION_PUT, Put).batched(), single(AGENT, Put).batched(), By::Throughput),
        bar(single(ours::REGION_PUT, Put), single(AGENT, Put), By::Throughput),
    ];
    for (way, plain, tls, grpc) in [
        (Get, ours::PORT_GET, ours::PORT_GET_TLS, ours::GRPC_GET),
        (Put, ours::PORT_PUT, ours::PORT_PUT_TLS, ours::GRPC_PUT),
    ] {
        for connections in CONNECTIONS {
            let port = single(plain, way).over(connections);
            let raw = single(RAW_TCP, way).over(connections);
            bars.push(bar(port.clone(), raw.clone(), By::Throughput));
            bars.push(bar(port.clone().batched(), raw.clone(), By::Throughput));
            bars.push(bar(port.clone(), single(MOONCAKE_TCP, way), By::Throughput));
            bars.push(bar(port.batched(), single(MOONCAKE_TCP, way).batched(), By::Throughput));
            bars.push(bar(single(tls, way).over(connections), raw, By::Throughput));
        }
        bars.push(bar(single(tls, way), single(plain, way), By::Throughput));
        bars.push(bar(single(grpc, way), single(RAW_TCP, way), By::Throughput));
        bars.push(bar(single(grpc, way).batched(), single(MOONCAKE_TCP, way).batched(), By::Throughput));
    }
    // What peers reach of the references, so that a ratio to a peer can be judged.
    bars.push(bar(single(MEMCPY_STREAM, Copy), single(MEMCPY, Copy), By::Throughput));
    for way in [Get, Put] {
        bars.push(bar(single(AGENT, way).batched(), single(MEMCPY, Copy), By::Throughput));
        bars.push(bar(single(RAW_TCP, way), single(MOONCAKE_TCP, way), By::Throughput));
        bars.push(bar(single(RAW_TCP, way), single(MOONCAKE_TCP, way).batched(), By::Throughput));
        bars.push(bar(single(RAW_TCP, way).over(4), single(MOONCAKE_TCP, way).batched(), By::Throughput));
        bars.push(bar(single(RAW_TCP, way), single("redis", way), By::Throughput));
        bars.push(bar(single(RAW_TCP, way), single("lmcache", way), By::Throughput));
    }
    bars.push(bar(single(SHM_PLACE, Get), single(AGENT, Get), By::Time));
    bars.push(bar(single(SHM_PLACE, Get), single(AGENT, Get).batched(), By::Throughput));
    debug_assert_eq!(BATCH, single(AGENT, Get).batched().batch);
    bars
}

impl By {
    /// Of one window; `None` where it has none: a call without blocks has no throughput.
    fn of(self, sample: &Sample) -> Option<f64> {
        let value = match self {
            Self::Throughput => sample.bytes as f64 / sample.elapsed.as_secs_f64(),
            Self::Time => quantile(&sample.latencies, 0.5).as_secs_f64(),
        };
        (value.is_finite() && value > 0.0).then_some(value)
    }

    fn is_better(self, ratio: f64) -> bool {
        match self {
            Self::Throughput => ratio > 1.0,
            Self::Time => ratio < 1.0,
        }
    }
}

/// A ratio over the rounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Ratio {
    /// The median of the pairs.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
    /// Pairs in which the dividend was better.
    pub better: usize,
    /// Every pair, in the order of the rounds.
    pub pairs: Vec<f64>,
}

/// Pairs up what was measured in the same round; rounds in which one of the two is missing give no pair.
pub fn ratio<'a>(pairs: impl IntoIterator<Item = (Option<&'a Sample>, Option<&'a Sample>)>, by: By) -> Option<Ratio> {
    let pair = |(of, over): (Option<&Sample>, Option<&Sample>)| Some(by.of(of?)? / by.of(over?)?);
    let pairs: Vec<f64> = pairs.into_iter().filter_map(pair).collect();
    if pairs.is_empty() {
        return None;
    }
    Some(Ratio {
        median: median(&pairs),
        min: pairs.iter().copied().fold(f64::INFINITY, f64::min),
        max: pairs.iter().copied().fold(0.0, f64::max),
        better: pairs.iter().filter(|ratio| by.is_better(**ratio)).count(),
        pairs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn sample(bytes: u64, ms: u64) -> Sample {
        let elapsed = Duration::from_millis(ms);
        Sample { bytes, elapsed, cpu_seconds: 0.0, latencies: vec![elapsed] }
    }

    #[test]
    fn ratios_are_formed_within_a_round_and_not_of_medians() {
        // The divisor is slow in the second round, and both are in the third.
        let of = [sample(200, 100), sample(200, 100), sample(20, 100)];
        let over = [sample(100, 100), sample(10, 100), sample(10, 100)];
        let pairs = || of.iter().map(Some).zip(over.iter().map(Some));
        let by_throughput = ratio(pairs(), By::Throughput).unwrap();
        assert_eq!((by_throughput.median, by_throughput.min, by_throughput.max), (2.0, 2.0, 20.0));
        assert_eq!((by_throughput.better, by_throughput.pairs.len()), (3, 3));
        let by_time = ratio(pairs(), By::Time).unwrap();
        assert_eq!((by_time.median, by_time.better), (1.0, 0));
    }

    #[test]
    fn a_round_without_one_of_the_two_gives_no_pair() {
        let (a, b) = (sample(30, 10), sample(10, 10));
        let pairs = [(Some(&a), Some(&b)), (Some(&a), None), (None, Some(&b))];
        assert_eq!(ratio(pairs, By::Throughput).unwrap().pairs, [3.0]);
        assert_eq!(ratio([(Some(&a), None)], By::Throughput), None);
        let empty = sample(0, 10);
        assert_eq!(ratio([(Some(&a), Some(&empty))], By::Throughput), None, "an empty call has no throughput");
    }

    #[test]
    fn no_comparison_is_listed_twice_and_none_holds_a_path_against_itself() {
        let bars = all();
        for (n, bar) in bars.iter().enumerate() {
            assert_ne!(bar.of, bar.over);
            let same = |other: &&Bar| (&other.of, &other.over, other.by) == (&bar.of, &bar.over, bar.by);
            assert_eq!(bars.iter().filter(same).count(), 1, "{n}: {} over {}", bar.of, bar.over);
        }
    }
}
