//! `kvkeep-bench sessions`, and a replay that keeps sessions over a `kill -9`, from outside, as small as they go. Skipped, and
//! said so, where the node's program was not built.

use std::path::Path;
use std::process::{Command, Output};

/// The program under test, if the node's is beside it.
fn bench() -> Option<Command> {
    let program = Path::new(env!("CARGO_BIN_EXE_kvkeep-bench"));
    if !program.with_file_name("kvkeepd").is_file() {
        eprintln!("SKIPPED: kvkeepd is not built; cargo build -p kvkeep-node --bins");
        return None;
    }
    Some(Command::new(program))
}

fn run(args: &[&str]) -> Option<(Output, serde_json::Value)> {
    let out = bench()?.args(args).args(["--json", "-"]).output().expect("the program starts");
    let told = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{told}");
    let report = serde_json::from_slice(&out.stdout).expect("a report");
    Some((out, report))
}

#[test]
fn appends_and_a_restore_are_measured_and_reported() {
    let args =
        "sessions --sessions 8 --appends 3 --rounds 1 --writers 1 --positions 40 --position-bytes 64KiB --pairs 1";
    let Some((out, report)) = run(&args.split(' ').collect::<Vec<_>>()) else { return };
    assert_eq!((&report["schema"], &report["version"]), (&"kvkeep.bench.sessions".into(), &1.into()));
    let rows = report["appends"]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for row in rows {
        assert_eq!(row["appends"], 24, "{row}");
        for field in ["appends_per_s", "p50_us", "p99_us"] {
            assert!(row[field].as_f64().is_some_and(|n| n > 0.0), "{field} of {row}");
        }
    }
    let restore = &report["restore"];
    assert_eq!((&restore["tokens"], &restore["bytes"]), (&640.into(), &(40 << 16).into()));
    assert_eq!(restore["bytes_wrong"], 0);
    assert!(restore["bytes_compared"].as_u64().unwrap() > 40 << 16);
    assert_eq!(restore["pairs"].as_array().unwrap().len(), 1);
    let told = String::from_utf8_lossy(&out.stderr);
    assert_eq!(restore["fio"].is_null(), told.contains("SKIPPED fio"), "{told}");
}

#[test]
fn every_durable_session_of_the_main_job_is_whole_after_the_kill_and_at_the_end() {
    let args = "main --sessions 40 --block-bytes 16KiB --session-share 0.5 --arena-bytes 64MiB --nvme-bytes 512MiB";
    let Some((_, report)) = run(&args.split(' ').collect::<Vec<_>>()) else { return };
    for sessions in [&report["replay"]["sessions"], &report["kill"]["sessions"]] {
        let number = |field: &str| sessions[field].as_u64().unwrap_or_else(|| panic!("{field} of {sessions}"));
        assert!(number("sessions") > 0);
        assert_eq!(number("whole"), number("sessions"), "{sessions}");
        assert_eq!(number("token_ids_equal"), number("sessions"));
        assert_eq!(number("bytes_compared"), number("positions") * (16 << 10));
        assert_eq!(number("bytes_wrong") + number("keys_wrong") + number("blocks_lost"), 0);
    }
}
