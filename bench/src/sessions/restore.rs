//! `restore` of one session that is on NVMe only, into DRAM, beside fio on the same segment files.
//!
//! The session is put durable and appended, and some more behind it, so that its segment files are full. For every restore
//! the node is started anew: nothing is in its DRAM, and what it reads goes past the page cache. fio reads the same files from
//! end to end while the node rests, with as many reads in flight. Floor: see the node's restore.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kvkeep_client::sessions::{Append, Restore};
use kvkeep_client::{Call, GetItem, Namespace, OpenSession};
use kvkeep_core::{Class, Tier};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;

use super::{Lab, PUT_BYTES, SessionsCommand, TOKENS_PER_POSITION, format_of, key, put_chain, seed};
use crate::block_bytes;
use crate::fio;
use crate::measure::{gb_per_s, load_average, median};
use crate::replay::sessions::token_ids;
use crate::trace::SessionId;

/// Its name.
const SESSION: &str = "restored";
/// Reads that the node keeps in flight for a restore: so many, or so many bytes.
const READS_IN_FLIGHT: u64 = 32;
const READ_BYTES_IN_FLIGHT: u64 = 128 << 20;
/// Sizes of a segment file.
const SEGMENT_BYTES: (u64, u64) = (16 << 20, 1 << 30);
/// Longest restore.
const RESTORE_MAX: Duration = Duration::from_secs(100);
/// Where the ids behind the session begin.
const BEHIND_IDS: u64 = 1 << 32;

/// A restore and a run of fio.
#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    ours_gb_per_s: f64,
    /// Absent where fio is.
    fio_gb_per_s: Option<f64>,
    ratio: Option<f64>,
    load_average: f64,
}

/// Of the report.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    positions: u64,
    position_bytes: u64,
    tokens: u64,
    bytes: u64,
    segment_bytes: u64,
    reads_in_flight: u64,
    /// Its version; absent where it is not installed.
    fio: Option<String>,
    ours_gb_per_s_median: f64,
    fio_gb_per_s_median: Option<f64>,
    ratio_median: Option<f64>,
    ratio_min: Option<f64>,
    ratio_max: Option<f64>,
    /// Bytes read back after the restores and compared.
    bytes_compared: u64,
    bytes_wrong: u64,
    pairs: Vec<Pair>,
}

/// Memory that a node populates in a second, bytes, at least.
const POPULATED_PER_S: f64 = 1e9;

struct Bench<'a> {
    command: &'a SessionsCommand,
    lab: Lab,
    namespace: Namespace,
    /// Memory that the node populates after a start, bytes.
    ready: u64,
    compared: u64,
    wrong: u64,
}

/// Measures it.
pub(super) async fn measure(command: &SessionsCommand) -> anyhow::Result<RestoreReport> {
    let (positions, each) = (u64::from(command.positions), command.position_bytes.0);
    let bytes = positions * each;
    let segment = (bytes / 8).next_multiple_of(1 << 20).clamp(SEGMENT_BYTES.0.max(2 * each), SEGMENT_BYTES.1);
    let fio = fio::version();
    if fio.is_none() {
        eprintln!("SKIPPED fio: it is not installed; restores are measured alone");
    }
    let room = 2 * bytes + 8 * segment;
    let nvme = format!("segment_bytes = {segment}\n");
    // Beside the session, what the node keeps free (`arena.high_watermark_percent`).
    let arena = bytes / 4 * 5 + (256 << 20);
    let ready = if command.cold_memory { 0 } else { arena };
    let lab = Lab::start(command, "restore", &nvme, arena, ready, room).await?;
    let namespace = lab.open(&format_of(each), 1).await?;
    let mut bench = Bench { command, lab, namespace, ready, compared: 0, wrong: 0 };
    bench.fill(2 * segment).await?;
    let in_flight = (READ_BYTES_IN_FLIGHT / each).clamp(2, READS_IN_FLIGHT);
    let mut rng = StdRng::seed_from_u64(command.seed);
    let mut pairs = Vec::new();
    for number in 0..=command.pairs {
        bench.restart().await?;
        let first = rng.random::<bool>();
        let fio = |data: &Path| fio.is_some().then(|| read_through(data, each, in_flight)).transpose();
        let before = if first { None } else { fio(bench.lab.data.path())? };
        let ours = bench.restore(number == command.pairs).await?;
        let beside = if first { fio(bench.lab.data.path())? } else { before };
        let pair = Pair {
            ours_gb_per_s: ours,
            fio_gb_per_s: beside,
            ratio: beside.map(|fio| ours / fio),
            load_average: load_average(),
        };
        let said = match (pair.fio_gb_per_s, pair.ratio) {
            (Some(fio), Some(ratio)) => format!("fio {fio:.2} GB/s, {ratio:.2} of it"),
            _ => "no fio".to_owned(),
        };
        // The first is not recorded: pages of both programs, and the device's own caches.
        let name = if number == 0 { "not recorded".to_owned() } else { format!("pair {number}") };
        eprintln!("restore: {name}: ours {ours:.2} GB/s, {said}");
        if number > 0 {
            pairs.push(pair);
        }
    }
    let (compared, wrong) = (bench.compared, bench.wrong);
    bench.lab.stop().await?;
    let ratios: Vec<f64> = pairs.iter().filter_map(|p| p.ratio).collect();
    let fios: Vec<f64> = pairs.iter().filter_map(|p| p.fio_gb_per_s).collect();
    Ok(RestoreReport {
        positions,
        position_bytes: each,
        tokens: positions * TOKENS_PER_POSITION,
        bytes,
        segment_bytes: segment,
        reads_in_flight: in_flight,
        fio,
        ours_gb_per_s_median: median(&pairs.iter().map(|p| p.ours_gb_per_s).collect::<Vec<_>>()),
        fio_gb_per_s_median: (!fios.is_empty()).then(|| median(&fios)),
        ratio_median: (!ratios.is_empty()).then(|| median(&ratios)),
        ratio_min: ratios.iter().copied().reduce(f64::min),
        ratio_max: ratios.iter().copied().reduce(f64::max),
        bytes_compared: compared,
        bytes_wrong: wrong,
        pairs,
    })
}

impl Bench<'_> {
    /// Puts the session and appends it; then `behind` more bytes.
    async fn fill(&self, behind: u64) -> anyhow::Result<()> {
        let (positions, each) = (u64::from(self.command.positions), self.command.position_bytes.0);
        eprintln!("restore: storing {positions} positions of {}, durable", self.command.position_bytes);
        put_chain(&self.namespace, 0..positions, each, Class::Durable).await?;
        let sessions = self.namespace.sessions();
        let call = Call::default();
        let wish = OpenSession { class: Some(Class::Durable), ..OpenSession::default() };
        sessions.open(SESSION, &wish, &call).await?;
        let append = Append {
            keys: (0..positions).map(key).collect(),
            token_ids: token_ids(SessionId(0), 0..positions * TOKENS_PER_POSITION),
            ..Append::default()
        };
        sessions.append(SESSION, &append, &call).await?;
        let more = behind.div_ceil(each);
        put_chain(&self.namespace, BEHIND_IDS..BEHIND_IDS + more, each, Class::Durable).await
    }

    /// Starts the node anew, with nothing in DRAM.
    async fn restart(&mut self) -> anyhow::Result<()> {
        self.lab.restart().await?;
        self.namespace = self.lab.open(&format_of(self.command.position_bytes.0), 1).await?;
        let manifest = self.namespace.sessions().manifest_all(SESSION, &Call::default()).await?;
        ensure!(manifest.len() == self.command.positions as usize, "the session has {} positions", manifest.len());
        let elsewhere = manifest.iter().filter(|p| !p.is_here() || p.tier != Some(Tier::Nvme)).count();
        ensure!(elsewhere == 0, "{elsewhere} positions are not on NVMe alone before the restore");
        // fio has its memory before its clock starts, too.
        tokio::time::sleep(Duration::from_secs_f64(self.ready as f64 / POPULATED_PER_S)).await;
        Ok(())
    }

    /// GB/s of one restore. Reads back some of it, or `all`, and compares.
    async fn restore(&mut self, all: bool) -> anyhow::Result<f64> {
        let (positions, each) = (u64::from(self.command.positions), self.command.position_bytes.0);
        let sessions = self.namespace.sessions();
        let began = Instant::now();
        let call = Call::default().within(RESTORE_MAX);
        let restored = sessions.restore(SESSION, &Restore::default(), &call).await?.finish().await?;
        let took = began.elapsed();
        ensure!(restored.is_whole() && restored.usable_positions == positions, "not restored whole: {restored:?}");
        ensure!(restored.progress.bytes == positions * each, "{} bytes were restored", restored.progress.bytes);
        let step = if all { 1 } else { positions.div_ceil(16) };
        let ids: Vec<u64> = (0..positions).step_by(step as usize).collect();
        for some in ids.chunks((PUT_BYTES / each).max(1) as usize) {
            let items: Vec<_> = some.iter().map(|id| GetItem::of(key(*id))).collect();
            let parts = self.namespace.get(&items, None, &Call::default()).await.context("get")?;
            for (id, part) in some.iter().zip(parts) {
                ensure!(
                    part.is_hit() && part.tier == Some(Tier::Dram),
                    "position {id} is not in DRAM: {:?}",
                    part.status
                );
                self.compared += part.data.len() as u64;
                self.wrong += block_bytes::wrong_bytes(seed(*id), &part.data) + each.abs_diff(part.data.len() as u64);
            }
        }
        if all {
            let tokens = sessions.tokens_all(SESSION, &Call::default()).await?;
            ensure!(tokens.ids == token_ids(SessionId(0), 0..positions * TOKENS_PER_POSITION), "other token ids");
        }
        Ok(gb_per_s(positions * each, took))
    }
}

/// GB/s of fio from end to end of the node's full segment files.
fn read_through(data: &Path, block_bytes: u64, in_flight: u64) -> anyhow::Result<f64> {
    let more = ["--rw=read", "--file_service_type=sequential"].map(str::to_owned);
    fio::read(&fio::whole_segments(data)?, block_bytes, in_flight as usize, &more)
}

impl RestoreReport {
    pub(super) fn is_right(&self) -> bool {
        self.bytes_wrong == 0
    }

    pub(super) fn table(&self) -> String {
        let mut out = format!(
            "restore of {} tokens, {} positions of {} bytes, from NVMe into DRAM (medians of {} pairs)\n",
            self.tokens,
            self.positions,
            self.position_bytes,
            self.pairs.len()
        );
        let beside = match (self.fio_gb_per_s_median, self.ratio_median, self.ratio_min, self.ratio_max) {
            (Some(fio), Some(ratio), Some(min), Some(max)) => {
                format!("fio {fio:.2} GB/s, {ratio:.2} of it ({min:.2} to {max:.2})")
            }
            _ => "fio SKIPPED: it is not installed".to_owned(),
        };
        let _ = writeln!(out, "  ours {:.2} GB/s, {beside}", self.ours_gb_per_s_median);
        let _ = writeln!(out, "  bytes compared, wrong: {}, {}", self.bytes_compared, self.bytes_wrong);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_fio_the_table_says_so_and_wrong_bytes_fail() {
        let report = RestoreReport {
            positions: 2048,
            position_bytes: 2 << 20,
            tokens: 32 << 10,
            bytes: 4 << 30,
            segment_bytes: 512 << 20,
            reads_in_flight: 32,
            fio: None,
            ours_gb_per_s_median: 0.5,
            fio_gb_per_s_median: None,
            ratio_median: None,
            ratio_min: None,
            ratio_max: None,
            bytes_compared: 10,
            bytes_wrong: 0,
            pairs: Vec::new(),
        };
        assert!(report.is_right() && report.table().contains("fio SKIPPED"), "{}", report.table());
        let paired = RestoreReport {
            fio_gb_per_s_median: Some(0.625),
            ratio_median: Some(0.8),
            ratio_min: Some(0.7),
            ratio_max: Some(0.9),
            bytes_wrong: 1,
            ..report
        };
        assert!(!paired.is_right() && paired.table().contains("0.80 of it (0.70 to 0.90)"), "{}", paired.table());
    }
}
