//! The bars of eviction, on the traces they are stated for. Skipped, and said so, where the traces are not: they are looked
//! for in `KVKEEP_TRACES`, then in `shared/traces` in or beside the repository.

use std::path::{Path, PathBuf};

use clap::Parser;
use kvkeep_bench::policy::{PolicyCommand, PolicyReport, measure};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    policy: PolicyCommand,
}

fn run(trace: &Path, flags: &[&str]) -> PolicyReport {
    let trace = trace.display().to_string();
    let all = ["policy", "--trace", &trace].into_iter().chain(flags.iter().copied());
    measure(&Flags::parse_from(all).policy).expect("the trace replays")
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

fn hit(report: &PolicyReport, policy: &str, capacity: f64) -> f64 {
    report.rows.iter().find(|r| r.policy == policy && r.capacity_pct == capacity).expect("it was asked for").token_hit
}

fn never_above_belady(report: &PolicyReport) {
    for row in &report.rows {
        assert!(row.share_of_belady <= 100.0 + 1e-9, "{row:?}");
    }
}

#[test]
fn chat_reaches_the_bar_and_lru_is_where_it_was_measured() {
    let Some(trace) = trace("mooncake_chat.jsonl.zst") else { return };
    let report = run(&trace, &[]);
    never_above_belady(&report);
    assert!(report.score["sage"] >= 66.0, "{:?}", report.score);
    // Measured by another program, with another cache: the method is the same.
    assert!((report.score["lru"] - 54.4).abs() < 0.5, "{:?}", report.score);
    for capacity in [1.0, 2.0, 5.0, 10.0, 20.0, 50.0] {
        let (sage, lru) = (hit(&report, "sage", capacity), hit(&report, "lru", capacity));
        assert!(sage >= lru - 0.5, "{capacity} %: {sage} to LRU's {lru}");
    }
    let belady = [24.9, 31.7, 38.0, 38.1, 38.1, 38.1];
    for (capacity, expected) in [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().zip(belady) {
        assert!((hit(&report, "belady", capacity) - expected).abs() < 0.1, "{capacity} %");
    }
}

#[test]
fn agents_reach_the_bar_where_room_is_scarce() {
    let Some(trace) = trace("agentic_coding.jsonl.zst") else { return };
    let report = run(&trace, &["--capacities", "1"]);
    never_above_belady(&report);
    let (sage, lru) = (hit(&report, "sage", 1.0), hit(&report, "lru", 1.0));
    assert!(sage >= 45.5, "{sage}");
    assert!((lru - 29.0).abs() < 0.3, "{lru}");
}

#[test]
fn hints_close_the_gap_on_chat_and_bad_ones_do_not_hurt() {
    let Some(trace) = trace("mooncake_chat.jsonl.zst") else { return };
    let at = |capacities, hints| run(&trace, &["--policies", "sage", "--capacities", capacities, "--hints", hints]);
    let with = |hints| at("1,2,5,10,20", hints);
    let none = with("none");
    let closed = |report: &PolicyReport| {
        never_above_belady(report);
        (report.score["sage"] - none.score["sage"]) / (100.0 - none.score["sage"]) * 100.0
    };
    let all = closed(&with("end,due:2"));
    assert!(all >= 80.0, "{all}");
    let half = closed(&with("end,due:2,half"));
    assert!(half >= 40.0, "{half}");
    for bad in ["due:10", "end,due:2,false-ends:5%", "end,due:1000,false-ends:50%"] {
        // Where the contest is.
        let report = at("1,5", bad);
        never_above_belady(&report);
        for row in &report.rows {
            let free = hit(&none, "sage", row.capacity_pct);
            assert!(row.token_hit >= free - 0.3, "{bad}, {} %: {} without {free}", row.capacity_pct, row.token_hit);
        }
    }
}

/// Sessions that are named without a hint change nothing.
#[test]
fn without_hints_results_are_those_of_no_hints() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sessions.jsonl");
    let files = trace("mooncake_chat.jsonl.zst").into_iter().chain([file]);
    for trace in files {
        let flags = ["--policies", "sage,lru", "--capacities", "2,10"];
        let free = run(&trace, &flags);
        let named = run(&trace, &[&flags[..], &["--hints", "half"]].concat());
        let hits = |r: &PolicyReport| r.rows.iter().map(|r| r.token_hit).collect::<Vec<_>>();
        assert_eq!(hits(&free), hits(&named));
    }
}
