//! SIGKILL and power cuts, again and again, in the middle of work on sessions, while sweeps go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvkeep_client::{Call, Client};
use kvkeep_proto::v1;
use kvkeep_tests::powercut::{Cut, PowerCut};
use kvkeep_tests::sessions::{Done, Seen, SessionWork, namespace};
use kvkeep_tests::{Node, Options, leaks};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Clients at a time.
const CLIENTS: u64 = 3;
/// Kills of one run, unless `KVKEEP_ROUNDS` says otherwise.
const KILLS: u64 = 10;
/// Power cuts of one run, unless `KVKEEP_ROUNDS` says otherwise.
const CUTS: u64 = 4;

/// Small tiers: blocks of no durable session are evicted all the time.
fn options() -> Options {
    Options { arena_bytes: 64 << 20, nvme_bytes: 128 << 20, ..Options::default() }
}

/// Lets every client work for a while, with sweeps in between, then does `end` to the node and waits until all have
/// noticed. How many sweeps there were.
async fn work(node: &mut Node, clients: &mut Vec<SessionWork>, time: Duration, end: impl FnOnce(&mut Node)) -> u64 {
    let stop = Arc::new(AtomicBool::new(false));
    let mut working = Vec::new();
    for mut one in clients.drain(..) {
        let client = node.client_with(|c| c.retry.attempts_max = 1).await;
        let stop = Arc::clone(&stop);
        working.push(tokio::spawn(async move {
            one.run(&client, stop).await;
            one
        }));
    }
    let sweeper = node.client_with(|c| c.retry.attempts_max = 1).await;
    let sweeping = tokio::spawn(sweep(sweeper, Arc::clone(&stop)));
    tokio::time::sleep(time).await;
    end(node);
    stop.store(true, Ordering::Relaxed);
    for one in working {
        clients.push(one.await.expect("no client saw what it must not see"));
    }
    sweeping.await.expect("no sweep saw what it must not see")
}

/// Sweeps until it is told to stop or the server is gone; nothing is ever missing.
async fn sweep(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut sweeps = 0;
    while !stop.load(Ordering::Relaxed) {
        let Ok(found) = client.admin().fsck(true, &Call::default()).await else { break };
        whole(&found);
        sweeps += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sweeps
}

fn whole(found: &v1::FsckReply) {
    assert_eq!((found.missing_positions, found.missing_token_blocks), (0, 0), "{found:?}");
}

/// Everything that was acknowledged is there, and nothing that was deleted.
async fn check(node: &Node, clients: &mut [SessionWork]) -> Seen {
    let client = node.client().await;
    let ns = namespace(&client).await.unwrap();
    let mut seen = Seen::default();
    for one in clients {
        seen += one.check(&ns).await;
    }
    whole(&client.admin().fsck(false, &Call::default()).await.unwrap());
    seen
}

/// Two sweeps leave no block that nobody names; with the sessions gone, two more leave what callers put as durable.
async fn nothing_leaked(node: &mut Node, clients: &mut [SessionWork]) {
    let client = node.client().await;
    let (admin, call) = (client.admin(), Call::default());
    leaks::nothing_is_held(&client).await;
    admin.fsck(true, &call).await.unwrap();
    let found = admin.fsck(true, &call).await.unwrap();
    whole(&found);
    assert_eq!((found.unreferenced_blocks, found.overdue_blocks), (0, 0), "{found:?}");
    let sessions = namespace(&client).await.unwrap().sessions();
    let (mut least, mut most) = (0, 0);
    for one in clients {
        let (at_least, at_most) = one.delete_everything(&sessions).await;
        least += at_least;
        most += at_most;
    }
    admin.fsck(true, &call).await.unwrap();
    let found = admin.fsck(true, &call).await.unwrap();
    assert_eq!((found.sessions, found.unreferenced_blocks, found.overdue_blocks), (0, 0, 0), "{found:?}");
    let kept = found.durable_blocks;
    assert!((least..=most).contains(&kept), "{kept} durable blocks are left, callers put {least} to {most}");
    node.terminate().await;
    leaks::no_stray_files(node);
}

fn done(clients: &[SessionWork]) -> Done {
    clients.iter().fold(Done::default(), |all, one| Done {
        appends: all.appends + one.done.appends,
        appends_refused: all.appends_refused + one.done.appends_refused,
        forks: all.forks + one.done.forks,
        truncates: all.truncates + one.done.truncates,
        deletes: all.deletes + one.done.deletes,
        blocks_refused: all.blocks_refused + one.done.blocks_refused,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_lose_no_acknowledged_append_and_bring_no_deleted_session_back() {
    let seed = kvkeep_tests::seed("kills_lose_no_acknowledged_append");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut node = Node::start(options());
    let mut clients: Vec<_> = (0..CLIENTS).map(|n| SessionWork::new(seed, n)).collect();
    let (mut total, mut sweeps, since) = (Seen::default(), 0, Instant::now());
    for _ in 0..kvkeep_tests::rounds(KILLS) {
        let time = Duration::from_millis(rng.random_range(50..900));
        sweeps += work(&mut node, &mut clients, time, Node::kill).await;
        if rng.random_bool(0.3) {
            super::restart::forget_memory(&node);
        }
        node.restart();
        total += check(&node, &mut clients).await;
    }
    nothing_leaked(&mut node, &mut clients).await;
    let done = done(&clients);
    println!("{total:?}, {done:?}, {sweeps} sweeps in {:?}", since.elapsed());
    let enough = total.durable_positions > 100 && done.appends > 20 && done.deletes > 0 && done.forks > 0 && sweeps > 0;
    assert!(enough, "the rounds were too short to say anything: {total:?}, {done:?}, {sweeps}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_cuts_lose_no_acknowledged_append_and_bring_no_deleted_session_back() {
    let seed = kvkeep_tests::seed("power_cuts_lose_no_acknowledged_append");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut node = Node::new(options());
    let power = match PowerCut::under(&mut node) {
        Ok(power) => power,
        Err(why) => return kvkeep_tests::skipped("power_cuts_lose_no_acknowledged_append", why),
    };
    node.restart();
    let mut clients: Vec<_> = (0..CLIENTS).map(|n| SessionWork::new(seed, n)).collect();
    let (mut total, mut sweeps, mut at_risk, since) = (Seen::default(), 0, 0, Instant::now());
    for _ in 0..kvkeep_tests::rounds(CUTS) {
        let (time, cut) = (Duration::from_millis(rng.random_range(100..1500)), Cut::Seeded(rng.random()));
        let mut lost = None;
        sweeps += work(&mut node, &mut clients, time, |node| lost = Some(power.cut(node, cut))).await;
        let lost = lost.expect("the power was cut");
        at_risk += lost.changes_at_risk + lost.names_at_risk;
        node.restart();
        total += check(&node, &mut clients).await;
    }
    nothing_leaked(&mut node, &mut clients).await;
    let done = done(&clients);
    println!("{total:?}, {done:?}, {sweeps} sweeps, {at_risk} changes at risk in {:?}", since.elapsed());
    let enough = total.durable_positions > 50 && done.appends > 10 && sweeps > 0 && at_risk > 0;
    assert!(enough, "the rounds were too short to say anything: {total:?}, {done:?}, {sweeps}, {at_risk}");
}

/// Do the tests above have teeth? A raft log whose flushes keep nothing loses acknowledged appends, and the check says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_flush_of_the_raft_log_a_power_cut_shows() {
    let seed = kvkeep_tests::seed("without_the_flush_of_the_raft_log");
    let mut node = Node::new(options());
    let power = match PowerCut::under(&mut node) {
        Ok(power) => power,
        Err(why) => return kvkeep_tests::skipped("without_the_flush_of_the_raft_log", why),
    };
    node.restart();
    let mut clients = vec![SessionWork::new(seed, 0)];
    work(&mut node, &mut clients, Duration::from_millis(500), |node| _ = power.cut(node, Cut::Everything)).await;
    power.ignore_flushes_of(&mut node, "/raft/*.log$");
    node.restart();
    check(&node, &mut clients).await;
    work(&mut node, &mut clients, Duration::from_millis(2000), |node| _ = power.cut(node, Cut::Everything)).await;
    let shown = match node.try_restart() {
        Err(said) => format!("the server says: {}", said.lines().rev().nth(1).unwrap_or_default()),
        Ok(()) => {
            let checked = tokio::spawn(async move { check(&node, &mut clients).await }).await;
            format!("the check ends with {}", checked.expect_err("acknowledged appends are lost, and it sees it"))
        }
    };
    println!("without the flush of the raft log: {shown}");
}
