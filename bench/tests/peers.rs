//! `kvkeep-bench peers` from outside: the references are measured, the report has its shape, nothing is left behind.

use std::process::Command;

fn run(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_kvkeep-bench")).arg("peers").args(args).output().expect("the program starts")
}

#[test]
fn the_references_are_measured_and_reported() {
    let out =
        run(&["--quick", "--only", "reference", "--rounds", "2", "--window-ms", "20", "--seed", "7", "--json", "-"]);
    let told = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{told}");
    assert!(told.contains("SKIPPED ours: not asked for") && told.contains("SKIPPED peers: not asked for"), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["schema"], "kvkeep.bench.peers");
    assert_eq!((&report["version"], &report["seed"]), (&1.into(), &7.into()));
    let rows = report["paths"].as_array().unwrap();
    for (path, way, connections) in [
        ("memcpy", "copy", 1),
        ("shm_place", "get", 1),
        ("raw_tcp", "get", 1),
        ("raw_tcp", "get", 4),
        ("raw_tcp", "put", 1),
        ("raw_tcp", "put", 4),
    ] {
        let named = |row: &&serde_json::Value| {
            (&row["path"], &row["way"], &row["connections"]) == (&path.into(), &way.into(), &connections.into())
        };
        let row = rows.iter().find(named).unwrap_or_else(|| panic!("no row {path} {way} {connections}"));
        for field in ["gb_per_s", "over_memcpy", "p50_us", "p99_us"] {
            assert!(row[field].as_f64().is_some_and(|n| n > 0.0), "{field} of {row}");
        }
        assert!(row["cpu_s_per_gb"].is_number());
        assert_eq!(row["samples"], 2);
        assert_eq!(row["over_raw_tcp"].is_number(), way != "copy");
    }
    assert_eq!(report["rounds"].as_array().unwrap().len(), 2);
    assert_eq!(report["rounds"][0]["order"].as_array().unwrap().len(), rows.len());
}

#[test]
fn too_few_rounds_for_a_full_run_are_refused() {
    let out = run(&["--rounds", "8"]);
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("at least 9"));
}
