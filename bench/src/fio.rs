//! fio over the segment files of a node: what the device gives to a program that does nothing but read.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

/// Its version, if it is installed.
pub fn version() -> Option<String> {
    let said = Command::new("fio").arg("--version").output().ok()?;
    said.status.success().then(|| String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

/// GB/s of reads of `block_bytes`, `depth` in flight, past the page cache and into registered buffers; `more` says in which
/// order and for how long.
pub fn read(segments: &[PathBuf], block_bytes: u64, depth: usize, more: &[String]) -> anyhow::Result<f64> {
    ensure!(!segments.is_empty(), "the node has filled no segment file");
    let names: Vec<_> = segments.iter().map(|path| path.display().to_string().replace(':', "\\:")).collect();
    let said = Command::new("fio")
        .args(["--name=read", "--ioengine=io_uring", "--direct=1", "--fixedbufs", "--registerfiles", "--readonly"])
        .arg("--output-format=json")
        .arg(format!("--filename={}", names.join(":")))
        .arg(format!("--bs={block_bytes}"))
        .arg(format!("--iodepth={depth}"))
        .args(more)
        .output()
        .context("fio did not start")?;
    ensure!(said.status.success(), "fio failed: {}", String::from_utf8_lossy(&said.stderr));
    let report: Value = serde_json::from_slice(&said.stdout).context("fio did not answer in JSON")?;
    let bytes = report["jobs"][0]["read"]["bw_bytes"].as_f64().context("fio's report has no bw_bytes")?;
    Ok(bytes / 1e9)
}

/// Segment files under a node's data that were written whole: the filesystem answers for the others without the device.
pub fn whole_segments(data: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut segments = Vec::new();
    find_segments(data, &mut segments)?;
    segments.sort();
    // The last one is not full.
    segments.pop();
    Ok(segments)
}

fn find_segments(folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("folder {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_segments(&entry.path(), found)?;
        } else if entry.file_name().to_string_lossy().starts_with("segment-") {
            found.push(entry.path());
        }
    }
    Ok(())
}
