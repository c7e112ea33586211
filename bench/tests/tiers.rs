//! Two tiers: the simulation on the traces that the bars are stated for (skipped, and said so, where they are not), and a
//! small replay through a real node (skipped where `kvkeepd` has not been built beside the bench).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Parser;
use kvkeep_bench::tiers::{TiersCommand, TiersReport, measure};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    tiers: TiersCommand,
}

async fn run(trace: &Path, flags: &[&str]) -> TiersReport {
    let trace = trace.display().to_string();
    let all = ["tiers", "--trace", &trace].into_iter().chain(flags.iter().copied());
    measure(&Flags::parse_from(all).tiers).await.expect("the trace replays")
}

fn trace(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let told = std::env::var_os("KVKEEP_TRACES").map(PathBuf::from);
    let found = told
        .into_iter()
        .chain([root.join("shared/traces"), root.join("../shared/traces")])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: {name} is not here; set KVKEEP_TRACES to its folder");
    }
    found
}

/// Simulated: DRAM serves so many times LRU's share, and the total is no lower.
async fn reaches(name: &str, dram: &str, nvme: &str, times: f64, lru_dram: f64) {
    let Some(trace) = trace(name) else { return };
    let report = run(&trace, &["--simulate-only", "--dram-pct", dram, "--nvme-pct", nvme]).await;
    let over = report.simulated_over_lru.expect("both were asked for");
    assert!(over.dram >= times, "{over:?}");
    assert!(over.total_points >= -0.05, "{over:?}");
    // Measured by another program: the method is the same.
    let lru = report.rows.iter().find(|row| row.policy == "lru").expect("it was asked for").simulated;
    assert!((lru.dram - lru_dram).abs() < 0.5, "{lru:?}");
}

#[tokio::test]
async fn chat_reaches_its_bar_simulated() {
    reaches("mooncake_chat.jsonl.zst", "2", "20", 1.75, 8.5).await;
}

#[tokio::test]
async fn agents_reach_their_bar_simulated() {
    reaches("agentic_coding.jsonl.zst", "1", "5", 1.5, 29.0).await;
}

/// Sessions of 4 blocks that come back, the lower numbers more often: as many requests as asked.
fn small_trace(folder: &Path, requests: u64) -> PathBuf {
    let mut text = String::new();
    for n in 0..requests {
        let draw = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        let session = (draw % 50) * (draw / 50 % 50) / 50;
        let blocks: Vec<_> = (0..4).map(|i| session * 4 + i + 1).collect();
        writeln!(
            text,
            r#"{{"timestamp":{},"session":{session},"turn":1,"type":"chat","input_length":2048,"output_length":10,"hash_ids":{blocks:?}}}"#,
            n * 700
        )
        .expect("memory takes it");
    }
    let path = folder.join("small.jsonl");
    std::fs::write(&path, text).expect("a file");
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_serves_what_the_simulation_says() {
    let kvkeepd = Path::new(env!("CARGO_BIN_EXE_kvkeep-bench")).with_file_name("kvkeepd");
    if !kvkeepd.is_file() {
        eprintln!("SKIPPED: there is no {}: build kvkeep-node first", kvkeepd.display());
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = small_trace(folder.path(), 250);
    let kvkeepd = kvkeepd.display().to_string();
    let data = folder.path().join("data").display().to_string();
    let flags = ["--dram-pct", "12", "--nvme-pct", "100", "--block-bytes", "1MiB", "--kvkeepd", &kvkeepd];
    let report = run(&trace, &[&flags[..], &["--data-dir", &data]].concat()).await;
    for row in &report.rows {
        let (live, run) = (row.live.expect("a node ran"), row.run.as_ref().expect("a node ran"));
        assert_eq!((run.bytes_wrong, run.node.not_written), (0, 0), "{run:?}");
        assert!(run.bytes_verified > 0 && live.dram > 0.0 && live.nvme > 0.0, "{row:?}");
        // Tiers of a few blocks: one more or less is percents of them.
        let off = row.difference.expect("a node ran");
        assert!(off.total.abs() < 8.0 && off.dram.abs() < 12.0, "{row:?}");
    }
}
