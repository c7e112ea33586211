//! SIGKILL, again and again, in the middle of work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvkeep_tests::ledger::Account;
use kvkeep_tests::workload::{self, Workload};
use kvkeep_tests::{Node, Options, leaks};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Clients at a time.
const CLIENTS: u64 = 2;
/// Rounds, unless `KVKEEP_ROUNDS` says otherwise.
const ROUNDS: u64 = 50;

/// Lets every client work for a while, then does `end` to the node and waits until all have noticed.
pub async fn work(node: &mut Node, clients: &mut Vec<Workload>, time: Duration, end: impl FnOnce(&mut Node)) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut working = Vec::new();
    for mut workload in clients.drain(..) {
        let client = node.client_with(|c| c.retry.attempts_max = 1).await;
        let stop = Arc::clone(&stop);
        working.push(tokio::spawn(async move {
            workload.run(&client, stop).await;
            workload
        }));
    }
    tokio::time::sleep(time).await;
    end(node);
    stop.store(true, Ordering::Relaxed);
    for one in working {
        clients.push(one.await.expect("no client saw what it must not see"));
    }
}

/// Reads everything that any client ever tried to store.
pub async fn check(node: &Node, clients: &mut [Workload]) -> Account {
    let client = node.client().await;
    let ns = client.register_namespace(workload::NAMESPACE, &workload::format(), "weights-1").await.unwrap();
    let mut account = Account::default();
    for workload in clients {
        account += workload.ledger.check(&ns).await;
    }
    account
}

/// In the end nothing is held; after everything was removed nothing is left, in memory, on the device, or in the folder.
pub async fn nothing_leaked(node: &mut Node, clients: &mut [Workload]) {
    let client = node.client().await;
    let ns = client.register_namespace(workload::NAMESPACE, &workload::format(), "weights-1").await.unwrap();
    leaks::nothing_is_held(&client).await;
    for workload in clients {
        workload.remove_everything(&ns).await;
    }
    leaks::nothing_is_left(&client).await;
    node.terminate().await;
    leaks::no_stray_files(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_kills_lose_nothing_durable_return_nothing_wrong_and_leak_nothing() {
    let seed = kvkeep_tests::seed("fifty_kills");
    let mut rng = StdRng::seed_from_u64(seed);
    // Small tiers: blocks are evicted, promoted, and their extents used again all the time.
    let options = Options { arena_bytes: 64 << 20, nvme_bytes: 96 << 20, ..Options::default() };
    let mut node = Node::start(options);
    let mut clients: Vec<_> = (0..CLIENTS).map(|n| Workload::new(seed, n)).collect();
    let (mut total, since) = (Account::default(), Instant::now());
    for round in 0..kvkeep_tests::rounds(ROUNDS) {
        let time = Duration::from_millis(rng.random_range(20..400));
        work(&mut node, &mut clients, time, Node::kill).await;
        if rng.random_bool(0.3) {
            super::restart::forget_memory(&node);
        }
        node.restart();
        let account = check(&node, &mut clients).await;
        assert_eq!((account.durable_lost, account.wrong), (0, 0), "round {round}: {account:?}\n{}", node.log());
        total += account;
    }
    nothing_leaked(&mut node, &mut clients).await;
    let done: Vec<_> = clients.iter().map(|c| c.done).collect();
    println!("{total:?} in {:?}; {done:?}", since.elapsed());
    assert!(total.durable > 1000, "the rounds were too short to say anything: {total:?}");
}
