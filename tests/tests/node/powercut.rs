//! Power cuts of the real binary, RocksDB included: the shim takes away what was not flushed.

use std::time::Duration;

use kvkeep_tests::ledger::Account;
use kvkeep_tests::powercut::{Cut, PowerCut};
use kvkeep_tests::workload::Workload;
use kvkeep_tests::{Node, Options};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::kill_loop::{check, nothing_leaked, work};

/// Clients at a time.
const CLIENTS: u64 = 2;
/// Cuts of one run, unless `KVKEEP_ROUNDS` says otherwise.
const ROUNDS: u64 = 8;

fn options() -> Options {
    Options { arena_bytes: 64 << 20, nvme_bytes: 96 << 20, ..Options::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_durable_and_returns_nothing_wrong() {
    let seed = kvkeep_tests::seed("a_power_cut_loses");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut node = Node::new(options());
    let power = match PowerCut::under(&mut node) {
        Ok(power) => power,
        Err(why) => return kvkeep_tests::skipped("a_power_cut_loses_nothing_durable", why),
    };
    node.restart();
    let engine = node.client().await.admin().status(&Default::default()).await.unwrap().io_engine;
    assert!(engine.contains("pread"), "what goes around libc is not seen by the shim: {engine}");
    let mut clients: Vec<_> = (0..CLIENTS).map(|n| Workload::new(seed, n)).collect();
    let mut total = Account::default();
    let mut at_risk = 0;
    for round in 0..kvkeep_tests::rounds(ROUNDS) {
        let (time, cut) = (Duration::from_millis(rng.random_range(50..900)), Cut::Seeded(rng.random()));
        let mut lost = None;
        work(&mut node, &mut clients, time, |node| lost = Some(power.cut(node, cut))).await;
        let lost = lost.expect("the power was cut");
        at_risk += lost.changes_at_risk + lost.names_at_risk;
        node.restart();
        let account = check(&node, &mut clients).await;
        let log = node.log();
        assert_eq!((account.durable_lost, account.wrong), (0, 0), "round {round}: {account:?}, {lost:?}\n{log}");
        println!("round {round}: {account:?}, {lost:?}");
        total += account;
    }
    nothing_leaked(&mut node, &mut clients).await;
    assert!(total.durable > 100 && at_risk > 0, "the rounds were too short to say anything: {total:?}, {at_risk}");
}

/// Does the test above have teeth? With any one flush taken out, a cut that loses everything it may shows: durable blocks
/// are missing, or the server finds its files damaged and says so. Even then no byte is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_one_flush_a_power_cut_shows() {
    const TRIES: u64 = 6;
    let seed = kvkeep_tests::seed("without_any_one_flush");
    // Each flush that stands between a durable block and its acknowledgement.
    let flushes = [
        ("bytes of segments", "/segments/"),
        ("names of segments", "/segments$"),
        ("log of the index", "/index/*.log$"),
        ("manifest of the index", "/index/MANIFEST"),
        ("pointer to the manifest", "/index/*.dbtmp$"),
        ("names in the index", "/index$"),
        ("names in the folder of the device", "/nvme$"),
        ("raft log", "/raft/*.log$"),
        ("manifest of the raft log", "/raft/MANIFEST"),
        ("pointer to that manifest", "/raft/*.dbtmp$"),
        ("names in the folder of the raft log", "/raft$"),
        ("names in the data folder", "/data$"),
    ];
    for (flush, paths) in [("nothing", "")].into_iter().chain(flushes) {
        let mut shown = None;
        for attempt in 0..TRIES {
            let mut node = Node::new(options());
            let power = match PowerCut::under(&mut node) {
                Ok(power) => power,
                Err(why) => return kvkeep_tests::skipped("without_any_one_flush_a_power_cut_shows", why),
            };
            power.ignore_flushes_of(&mut node, paths);
            node.restart();
            let mut clients = vec![Workload::new(seed, attempt)];
            let time = Duration::from_millis(200 + 200 * attempt);
            work(&mut node, &mut clients, time, |node| _ = power.cut(node, Cut::Everything)).await;
            if let Err(said) = node.try_restart() {
                shown = Some(format!("the server says: {}", said.lines().rev().nth(1).unwrap_or_default()));
                break;
            }
            let account = check(&node, &mut clients).await;
            assert_eq!(account.wrong, 0, "a lying device brings misses, not other bytes: {account:?}");
            if account.durable_lost > 0 {
                shown = Some(format!("{account:?}"));
                break;
            }
        }
        println!("without the flush of the {flush}: {shown:?}");
        // And with every flush in place the very same cuts show nothing.
        assert_eq!(shown.is_some(), !paths.is_empty(), "without the flush of the {flush} ({paths}): {shown:?}");
    }
}
