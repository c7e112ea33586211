//! The report: rows of paths and comparisons, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::bars::{self, Bar, By, Ratio};
use super::path::{BLOCK_BYTES, Entry, Kind, PathId, Sample, WORKING_SET_BYTES, Way};
use super::processor::Machine;
use super::references::{copy::MEMCPY, tcp::RAW_TCP};
use super::rounds::Rounds;
use crate::measure::{gb_per_s, median};

/// Something that was not measured, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

/// The report: `kvkeep.bench.peers` version 1.
#[derive(Debug, Serialize)]
pub struct PeersReport {
    /// Names what this is.
    pub schema: &'static str,
    /// Grows when a field changes its meaning or goes.
    pub version: u32,
    /// Short windows, few rounds, no peers.
    pub quick: bool,
    /// Bytes of every block.
    pub block_bytes: usize,
    /// Bytes that every path goes through before it comes back to where it began.
    pub working_set_bytes: usize,
    /// Of each path in each round.
    pub window_ms: u64,
    /// What the orders were drawn from.
    pub seed: u64,
    /// Which rounds do not count.
    pub discard_rule: &'static str,
    /// What it ran on.
    pub machine: Machine,
    /// Over 1, 5 and 15 minutes, before and after.
    pub load_averages: [[f64; 3]; 2],
    /// Of the peers.
    pub versions: BTreeMap<String, String>,
    /// Not installed, not built, or failed.
    pub skipped: Vec<Skipped>,
    /// One row per path.
    pub paths: Vec<Row>,
    /// One row per comparison whose sides were both measured.
    pub bars: Vec<BarRow>,
    /// The rounds, all of them.
    pub rounds: Vec<RoundRow>,
}

/// One path over all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    #[serde(flatten)]
    pub id: PathId,
    /// What it is.
    pub what: String,
    /// Whose it is.
    pub kind: Kind,
    /// Median over the windows; null for a call without blocks.
    pub gb_per_s: Option<f64>,
    /// Least and most.
    pub gb_per_s_range: Option<[f64; 2]>,
    /// Ratio of throughput to memcpy's, median of the pairs.
    pub over_memcpy: Option<f64>,
    /// The same to raw TCP of the same way, over as many connections where that was measured, else over one.
    pub over_raw_tcp: Option<f64>,
    /// CPU seconds of client and server per GB, median over the windows.
    pub cpu_s_per_gb: Option<f64>,
    /// Of all calls.
    pub p50_us: f64,
    /// Of all calls.
    pub p99_us: f64,
    /// Windows.
    pub samples: usize,
    /// Calls in them.
    pub calls: usize,
    /// Ratio of throughput to each path of a peer that goes the same way, median of the pairs.
    pub over_peers: BTreeMap<String, f64>,
    /// By round; null: it had failed.
    pub windows: Vec<Option<Window>>,
}

/// One window.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Window {
    /// Null for a call without blocks.
    pub gb_per_s: Option<f64>,
    /// CPU seconds of client and server.
    pub cpu_seconds: f64,
    /// Of its calls.
    pub p50_us: f64,
    /// Of its calls.
    pub p99_us: f64,
    /// How many.
    pub calls: usize,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct BarRow {
    /// The dividend.
    pub of: String,
    /// The divisor.
    pub over: String,
    /// What was divided.
    pub by: By,
    /// The ratio.
    #[serde(flatten)]
    pub ratio: Ratio,
}

/// One round.
#[derive(Clone, Debug, Serialize)]
pub struct RoundRow {
    /// Over one minute, at its beginning.
    pub load_average: f64,
    /// The paths in the order in which they were measured.
    pub order: Vec<String>,
}

/// The value below which this share of `times` lies; zero of none.
pub fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn throughput(sample: &Sample) -> Option<f64> {
    (sample.bytes > 0).then(|| gb_per_s(sample.bytes, sample.elapsed))
}

fn median_of(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| median(values))
}

impl PeersReport {
    /// Makes rows out of rounds. What failed is added to what was skipped.
    pub fn of(entries: &[Entry], rounds: &Rounds) -> Self {
        let measured = |number: usize| rounds.rounds.iter().map(move |round| round.samples[number].as_ref());
        let find = |id: &PathId| entries.iter().position(|entry| entry.id == *id);
        let ratio = |of: usize, over: Option<usize>, by| bars::ratio(measured(of).zip(measured(over?)), by);
        let over = |of: usize, over: Option<usize>| Some(ratio(of, over, By::Throughput)?.median);
        let row = |(number, entry): (usize, &Entry)| {
            let raw = PathId::single(RAW_TCP, entry.id.way);
            let raw = find(&raw.clone().over(entry.id.connections)).or_else(|| find(&raw));
            let peers = entries.iter().enumerate().filter(|(n, peer)| {
                *n != number && peer.kind == Kind::Peer && peer.id.way == entry.id.way && peer.group == entry.group
            });
            Row {
                id: entry.id.clone(),
                what: entry.what.clone(),
                kind: entry.kind,
                over_memcpy: over(number, find(&PathId::single(MEMCPY, Way::Copy))),
                over_raw_tcp: over(number, raw),
                over_peers: peers.filter_map(|(n, peer)| Some((peer.id.to_string(), over(number, Some(n))?))).collect(),
                ..Row::of_samples(measured(number))
            }
        };
        let bar = |Bar { of, over, by }: Bar| {
            Some(BarRow { of: of.to_string(), over: over.to_string(), by, ratio: ratio(find(&of)?, find(&over), by)? })
        };
        let skipped = entries.iter().zip(&rounds.failures).filter_map(|(entry, why)| {
            Some(Skipped { what: entry.id.to_string(), why: format!("failed: {}", why.as_ref()?) })
        });
        Self {
            schema: "kvkeep.bench.peers",
            version: 1,
            quick: false,
            block_bytes: BLOCK_BYTES,
            working_set_bytes: WORKING_SET_BYTES,
            window_ms: 0,
            seed: 0,
            discard_rule: "none: every round counts; one unrecorded window of every path first",
            machine: Machine::this(),
            load_averages: [[0.0; 3]; 2],
            versions: BTreeMap::new(),
            skipped: skipped.collect(),
            paths: entries.iter().enumerate().map(row).collect(),
            bars: bars::all().into_iter().filter_map(bar).collect(),
            rounds: rounds
                .rounds
                .iter()
                .map(|round| RoundRow {
                    load_average: round.load_average,
                    order: round.order.iter().map(|number| entries[*number].id.to_string()).collect(),
                })
                .collect(),
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let number = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
        // Writing into a string cannot fail.
        let _ = writeln!(
            out,
            "{:<36} {:>7} {:>15} {:>7} {:>8} {:>9} {:>9} {:>8}",
            "path (1 MiB)", "GB/s", "least..most", "/memcpy", "/raw tcp", "p50 us", "p99 us", "CPU s/GB"
        );
        for row in &self.paths {
            let range = row.gb_per_s_range.map_or("-".to_owned(), |[min, max]| format!("{min:.2}..{max:.2}"));
            let _ = writeln!(
                out,
                "{:<36} {:>7} {range:>15} {:>7} {:>8} {:>9.1} {:>9.1} {:>8}",
                row.id.to_string(),
                number(row.gb_per_s, 2),
                number(row.over_memcpy, 2),
                number(row.over_raw_tcp, 2),
                row.p50_us,
                row.p99_us,
                number(row.cpu_s_per_gb, 3),
            );
        }
        if !self.bars.is_empty() {
            let _ = writeln!(out, "\nratio, median (least..most) of the pairs; better in");
        }
        for bar in &self.bars {
            let r = &bar.ratio;
            let by = match bar.by {
                By::Throughput => "throughput",
                By::Time => "time",
            };
            let range = format!("({:.2}..{:.2})", r.min, r.max);
            let names = format!("{} / {}", bar.of, bar.over);
            let _ = writeln!(out, "{names:<64} {by:<10} {:>6.2} {range:<16} {}/{}", r.median, r.better, r.pairs.len());
        }
        for skipped in &self.skipped {
            let _ = writeln!(out, "SKIPPED {}: {}", skipped.what, skipped.why);
        }
        let [before, after] = self.load_averages;
        let _ = write!(
            out,
            "{} rounds of {} ms windows, seed {}; load average {:.1} before, {:.1} after; {} x {}",
            self.rounds.len(),
            self.window_ms,
            self.seed,
            before[0],
            after[0],
            self.machine.cpus,
            self.machine.cpu
        );
        out
    }
}

impl Row {
    fn of_samples<'a>(samples: impl Iterator<Item = Option<&'a Sample>> + Clone) -> Self {
        let there: Vec<_> = samples.clone().flatten().collect();
        let speeds: Vec<_> = there.iter().filter_map(|s| throughput(s)).collect();
        let costs: Vec<_> =
            there.iter().filter(|s| s.bytes > 0).map(|s| s.cpu_seconds / (s.bytes as f64 / 1e9)).collect();
        let latencies = there.iter().flat_map(|s| &s.latencies).copied().collect::<Vec<_>>();
        let least_and_most = || {
            let min = speeds.iter().copied().fold(f64::INFINITY, f64::min);
            [min, speeds.iter().copied().fold(0.0, f64::max)]
        };
        let window = |s: &Sample| Window {
            gb_per_s: throughput(s),
            cpu_seconds: s.cpu_seconds,
            p50_us: us(quantile(&s.latencies, 0.5)),
            p99_us: us(quantile(&s.latencies, 0.99)),
            calls: s.latencies.len(),
        };
        Self {
            id: PathId::single("", Way::Call),
            what: String::new(),
            kind: Kind::Reference,
            gb_per_s: median_of(&speeds),
            gb_per_s_range: (!speeds.is_empty()).then(least_and_most),
            over_memcpy: None,
            over_raw_tcp: None,
            cpu_s_per_gb: median_of(&costs),
            p50_us: us(quantile(&latencies, 0.5)),
            p99_us: us(quantile(&latencies, 0.99)),
            samples: there.len(),
            calls: latencies.len(),
            over_peers: BTreeMap::new(),
            windows: samples.map(|s| s.map(window)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::path::{Group, Measuring, Path};
    use crate::peers::rounds::Round;

    struct Never;

    impl Path for Never {
        fn measure(&mut self, _: Duration) -> Measuring<'_> {
            Box::pin(std::future::pending())
        }
    }

    fn entry(id: PathId, kind: Kind) -> Entry {
        Entry { id, what: "a path".to_owned(), kind, group: Group::Network, path: Box::new(Never) }
    }

    fn sample(bytes: u64, ms: u64) -> Sample {
        let elapsed = Duration::from_millis(ms);
        Sample { bytes, elapsed, cpu_seconds: 0.5, latencies: vec![elapsed] }
    }

    #[test]
    fn quantiles_of_few_and_none() {
        let times: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&times, 0.0), Duration::from_millis(1));
        assert_eq!(quantile(&times, 1.0), Duration::from_millis(100));
        assert_eq!(quantile(&times[..1], 0.99), Duration::from_millis(100));
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
    }

    #[test]
    fn rows_hold_ratios_within_rounds_and_what_failed_is_named() {
        let entries = [
            entry(PathId::single(MEMCPY, Way::Copy), Kind::Reference),
            entry(PathId::single(RAW_TCP, Way::Get), Kind::Reference),
            entry(PathId::single(RAW_TCP, Way::Get).over(4), Kind::Reference),
            entry(PathId::single("redis", Way::Get), Kind::Peer),
            entry(PathId::single(bars::ours::PORT_GET, Way::Get).over(4), Kind::Ours),
            entry(PathId::single(bars::ours::EMPTY_CALL, Way::Call), Kind::Ours),
        ];
        let gb = 1_000_000_000;
        let samples = vec![
            Some(sample(8 * gb, 1000)),
            Some(sample(2 * gb, 1000)),
            Some(sample(4 * gb, 1000)),
            None,
            Some(sample(3 * gb, 1000)),
            Some(sample(0, 1)),
        ];
        let mut failures = vec![None; 6];
        failures[3] = Some("gone".to_owned());
        let round = Round { load_average: 1.5, order: vec![2, 0, 1, 3, 4, 5], samples };
        let report = PeersReport::of(&entries, &Rounds { rounds: vec![round; 3], failures });
        let port = &report.paths[4];
        assert_eq!((port.gb_per_s, port.over_memcpy, port.over_raw_tcp), (Some(3.0), Some(0.375), Some(0.75)));
        assert_eq!((port.samples, port.calls, port.p50_us), (3, 3, 1e6));
        assert!(port.over_peers.is_empty(), "a peer that failed gives no ratio");
        assert_eq!(report.paths[0].over_raw_tcp, None, "no raw TCP goes the way of a copy");
        let empty = &report.paths[5];
        assert_eq!((empty.gb_per_s, empty.cpu_s_per_gb, empty.p50_us), (None, None, 1000.0));
        assert_eq!(report.skipped, [Skipped { what: "redis get".into(), why: "failed: gone".into() }]);
        let bar = report.bars.iter().find(|b| b.of == port.id.to_string()).unwrap();
        assert_eq!((bar.over.as_str(), bar.ratio.median), ("raw_tcp get, 4 connections", 0.75));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["paths"][4]["path"], "port_get");
        assert_eq!(json["paths"][4]["connections"], 4);
        assert_eq!(json["bars"][0]["pairs"].as_array().unwrap().len(), 3);
        assert_eq!(json["rounds"][0]["order"][0], "raw_tcp get, 4 connections");
        let table = report.table();
        assert!(table.contains("SKIPPED redis get: failed: gone") && table.contains("port_get, 4 connections"));
    }
}
