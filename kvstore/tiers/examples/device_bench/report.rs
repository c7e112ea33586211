//! Medians, the table, the JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Args, Cell, Run, Side};

/// Of fio's throughput, at least.
const BAR_THROUGHPUT: f64 = 0.9;
/// Times fio's p99, at most.
const BAR_P99: f64 = 2.0;
/// Times fio's CPU seconds per GB, at most, without checksum.
const BAR_CPU: f64 = 1.3;

/// The runs of one cell; the `n`-th of each side make the `n`-th pair.
pub(super) struct Row {
    cell: Cell,
    fio: Vec<Run>,
    ours: Vec<Run>,
    summed: Vec<Run>,
    load: Vec<f64>,
}

struct Figures {
    throughput: f64,
    p99: f64,
    cpu: f64,
    /// What the checksum adds: throughput with it over without, and CPU seconds per GB.
    summed_throughput: f64,
    checksum_cpu: f64,
}

impl Row {
    pub(super) fn new(cell: Cell) -> Self {
        Self { cell, fio: Vec::new(), ours: Vec::new(), summed: Vec::new(), load: Vec::new() }
    }

    pub(super) fn add(&mut self, side: Side, run: Run) {
        match side {
            Side::Fio => self.fio.push(run),
            Side::Ours => self.ours.push(run),
            Side::OursSummed => self.summed.push(run),
        }
        self.load.extend(load_average());
    }

    fn figures(&self) -> Figures {
        let paired = |a: &[Run], b: &[Run], f: fn(&Run) -> f64| median(a.iter().zip(b).map(|(a, b)| f(a) / f(b)));
        Figures {
            throughput: paired(&self.ours, &self.fio, |r| r.bytes_per_second),
            p99: paired(&self.ours, &self.fio, |r| r.p99_us),
            cpu: paired(&self.ours, &self.fio, |r| r.cpu_seconds_per_gb),
            summed_throughput: paired(&self.summed, &self.fio, |r| r.bytes_per_second),
            checksum_cpu: median(
                self.summed.iter().zip(&self.ours).map(|(s, o)| s.cpu_seconds_per_gb - o.cpu_seconds_per_gb),
            ),
        }
    }

    /// The row for people.
    pub(super) fn line(&self) -> String {
        let of = |runs: &[Run], f: fn(&Run) -> f64| median(runs.iter().map(f));
        let f = self.figures();
        let mark = |met: bool| if met { ' ' } else { '!' };
        format!(
            "{:5} {:5} KiB {:3} | {:5.2} {:5.2} {:5.2}{} | {:7.0} {:7.0} {:5.2}{} | {:6.4} {:6.4} {:5.2}{} | {:5.2} {:7.4} | {:4.1}",
            if self.cell.write { "write" } else { "read" },
            self.cell.block_bytes >> 10,
            self.cell.depth,
            of(&self.fio, |r| r.bytes_per_second) / 1e9,
            of(&self.ours, |r| r.bytes_per_second) / 1e9,
            f.throughput,
            mark(f.throughput >= BAR_THROUGHPUT),
            of(&self.fio, |r| r.p99_us),
            of(&self.ours, |r| r.p99_us),
            f.p99,
            mark(f.p99 <= BAR_P99),
            of(&self.fio, |r| r.cpu_seconds_per_gb),
            of(&self.ours, |r| r.cpu_seconds_per_gb),
            f.cpu,
            mark(f.cpu <= BAR_CPU),
            f.summed_throughput,
            f.checksum_cpu,
            median(self.load.iter().copied()),
        )
    }

    fn json(&self) -> Value {
        let runs = |runs: &[Run]| -> Vec<Value> {
            runs.iter()
                .map(|r| {
                    json!({
                        "bytes_per_second": r.bytes_per_second,
                        "p50_us": r.p50_us,
                        "p99_us": r.p99_us,
                        "cpu_seconds_per_gb": r.cpu_seconds_per_gb,
                    })
                })
                .collect()
        };
        let f = self.figures();
        json!({
            "op": if self.cell.write { "write" } else { "read" },
            "block_bytes": self.cell.block_bytes,
            "depth": self.cell.depth,
            "throughput_ratio": f.throughput,
            "p99_ratio": f.p99,
            "cpu_ratio": f.cpu,
            "throughput_ratio_with_checksum": f.summed_throughput,
            "checksum_cpu_seconds_per_gb": f.checksum_cpu,
            "load_average": self.load,
            "fio": runs(&self.fio),
            "ours": runs(&self.ours),
            "ours_with_checksum": runs(&self.summed),
        })
    }
}

pub(super) struct Report<'a> {
    pub(super) args: &'a Args,
    pub(super) engine: &'a str,
    pub(super) fio: &'a str,
    pub(super) rows: &'a [Row],
}

impl Report<'_> {
    pub(super) fn table(&self) -> String {
        let mut table = format!(
            "ours: {}\n{}; {} pairs of {} s, seed {}; medians; '!' misses a bar (>= {BAR_THROUGHPUT}, <= {BAR_P99}, <= {BAR_CPU})\n\
             cell                | GB/s fio, ours, ratio | p99 us fio, ours, ratio | CPU s/GB fio, ours, ratio | crc: ratio, s/GB | load\n",
            self.engine, self.fio, self.args.pairs, self.args.seconds, self.args.seed,
        );
        for row in self.rows {
            let _ = writeln!(table, "{}", row.line());
        }
        table
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "schema": "kvkeep.device-bench",
            "version": 1,
            "engine": self.engine,
            "fio": self.fio,
            "pairs": self.args.pairs,
            "seconds": self.args.seconds,
            "seed": self.args.seed,
            "file_bytes": self.args.file_gib << 30,
            "bars": { "throughput_ratio": BAR_THROUGHPUT, "p99_ratio": BAR_P99, "cpu_ratio": BAR_CPU },
            "cells": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}
