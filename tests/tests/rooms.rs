//! The rooms of the house and which may know which (`docs/ARCHITECTURE.md`), asserted by `cargo tree` over the crates that
//! exist. A room that comes later stands in the table already; a room that is not in the table fails the test.

use std::collections::BTreeSet;
use std::process::Command;

/// Each room and the rooms it may name in its `Cargo.toml`.
const ARROWS: &[(&str, &[&str])] = &[
    ("kvkeep-core", &[]),
    ("kvkeep-proto", &[]),
    ("kvkeep-rocks", &[]),
    ("kvkeep-tiers", &["kvkeep-core", "kvkeep-rocks"]),
    ("kvkeep-raft", &["kvkeep-proto", "kvkeep-rocks"]),
    ("kvkeep-client", &["kvkeep-core", "kvkeep-proto"]),
    ("kvkeep-node", &["kvkeep-tiers", "kvkeep-raft", "kvkeep-client", "kvkeep-core", "kvkeep-proto"]),
    ("kvkeep-agent", &["kvkeep-client", "kvkeep-core", "kvkeep-proto"]),
    ("kvkeep-bench", &["kvkeep-client", "kvkeep-core", "kvkeep-tiers"]),
    // The words of core are part of the client's interface: who uses the client spells them.
    ("kvkeep-ctl", &["kvkeep-client", "kvkeep-core"]),
    ("kvkeep-python", &["kvkeep-client", "kvkeep-core"]),
];

/// What crosses crates may know them all.
const TESTS: &str = "kvkeep-tests";

/// Crates that a room must not pull in, however far away.
const NEVER: &[(&str, &[&str])] = &[
    ("kvkeep-core", &["tokio", "rocksdb", "librocksdb-sys", "tonic", "prost", "io-uring", "cudarc", "hyper"]),
    ("kvkeep-proto", &["rocksdb", "librocksdb-sys"]),
    ("kvkeep-rocks", &["tokio", "tonic", "prost"]),
    ("kvkeep-raft", &["kvkeep-core", "tonic", "hyper", "io-uring"]),
    ("kvkeep-client", &["rocksdb", "librocksdb-sys", "io-uring"]),
    ("kvkeep-ctl", &["rocksdb", "librocksdb-sys"]),
    ("kvkeep-agent", &["rocksdb", "librocksdb-sys"]),
    ("kvkeep-python", &["rocksdb", "librocksdb-sys"]),
];

/// Names of the crates that `cargo tree` prints with these arguments.
fn tree(args: &[&str]) -> BTreeSet<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| env!("CARGO").to_owned());
    let output = Command::new(cargo)
        .args(["tree", "--offline", "--prefix", "none", "--format", "{p}"])
        .args(args)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs: it started this test");
    assert!(output.status.success(), "cargo tree {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    text.lines().filter_map(|line| line.split(' ').next()).filter(|n| !n.is_empty()).map(str::to_owned).collect()
}

fn rooms() -> BTreeSet<String> {
    tree(&["--workspace", "--depth", "0"])
}

#[test]
fn every_room_stands_in_the_plan() {
    for room in rooms() {
        assert!(room == TESTS || ARROWS.iter().any(|(name, _)| *name == room), "{room} is not in the table of arrows");
    }
}

#[test]
fn arrows_point_one_way() {
    let rooms = rooms();
    for (room, allowed) in ARROWS.iter().filter(|(room, _)| rooms.contains(*room)) {
        // Build scripts count: generated code is code. Tests of a room may know more than the room.
        let knows = tree(&["--package", room, "--edges", "normal,build", "--depth", "1"]);
        for other in knows.intersection(&rooms).filter(|other| other != room) {
            assert!(allowed.contains(&other.as_str()), "{room} knows {other}; it may know {allowed:?}");
        }
    }
}

#[test]
fn rooms_stay_light() {
    let rooms = rooms();
    for (room, never) in NEVER.iter().filter(|(room, _)| rooms.contains(*room)) {
        let pulls = tree(&["--package", room, "--edges", "normal"]);
        assert!(pulls.contains(*room), "cargo tree did not list {room} itself");
        for unwanted in *never {
            assert!(!pulls.contains(*unwanted), "{room} pulls in {unwanted}");
        }
    }
}
