//! The other side: fio, with everything we use and no thread in between.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use super::memory::Memory;
use super::{Cell, FILE, FLUSH_EVERY_BYTES, Run};

pub(super) fn version() -> anyhow::Result<String> {
    let said = Command::new("fio").arg("--version").output().context("fio is needed to compare with: install it")?;
    Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

pub(super) fn run(
    folder: &Path,
    memory: &Memory,
    cell: Cell,
    window: Duration,
    file_bytes: u64,
    seed: u64,
) -> anyhow::Result<Run> {
    let mut fio = Command::new("fio");
    fio.args(["--name=cell", "--ioengine=io_uring", "--direct=1", "--fixedbufs", "--registerfiles", "--norandommap"]);
    fio.args(["--time_based", "--clat_percentiles=0", "--lat_percentiles=1", "--percentile_list=50:99"]);
    fio.args(["--output-format=json", "--randrepeat=0", "--scramble_buffers=0"]);
    fio.arg(format!("--iomem=mmapshared:{}", memory.path().display()));
    fio.arg(format!("--filename={}", folder.join(FILE).display()));
    fio.arg(format!("--size={file_bytes}"));
    fio.arg(format!("--rw={}", if cell.write { "randwrite" } else { "randread" }));
    fio.arg(format!("--bs={}", cell.block_bytes));
    fio.arg(format!("--iodepth={}", cell.depth));
    fio.arg(format!("--runtime={}ms", window.as_millis()));
    fio.arg(format!("--randseed={}", seed >> 1));
    if cell.write {
        fio.arg(format!("--fdatasync={}", (FLUSH_EVERY_BYTES / cell.block_bytes).max(1)));
    }
    let said = fio.output().context("fio did not start")?;
    anyhow::ensure!(said.status.success(), "fio failed: {}", String::from_utf8_lossy(&said.stderr));
    let report: Value = serde_json::from_slice(&said.stdout).context("fio did not answer in JSON")?;
    let job = &report["jobs"][0];
    let side = &job[if cell.write { "write" } else { "read" }];
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio's report has no {what}"));
    let percentile = |p: &str| number(&side["lat_ns"]["percentile"][p], p).map(|ns| ns / 1e3);
    let cpu_share = (number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?) / 100.0;
    let bytes_per_second = number(&side["bw_bytes"], "bw_bytes")?;
    Ok(Run {
        bytes_per_second,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        cpu_seconds_per_gb: cpu_share / (bytes_per_second / 1e9),
    })
}
