//! Engines that never wait: queues, losses, forks, over a real server.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::BorrowedFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_client::engine::{Completion, Engine, EngineConfig, Outcome, Submission};
use kvkeep_client::{
    Call, ClientConfig, Fault, Geometry, GetItem, GotInto, MatchQuery, PartOutcome, Put, PutPosition, Region, WayWish,
    Wire,
};
use kvkeep_core::{Class, MissReason, RequestId};
use kvkeep_tests::{Node, Options, formats, leaks, payload};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Bytes of a block: two areas of [`LAYERS`] runs.
const BYTES: usize = 2 * LAYERS * RUN;
const LAYERS: usize = 8;
const RUN: usize = 8192;
/// Blocks of one chain.
const CHAIN: usize = 6;
/// The promise is 100 ms without a sign of life; a machine that runs other tests meanwhile gets this much more.
const SLACK: Duration = Duration::from_millis(900);
/// Hits again this soon after the server is back; with the same slack.
const BACK_WITHIN: Duration = Duration::from_secs(2);
/// What must come, comes; a test that waits longer has failed.
const COMES: Duration = Duration::from_secs(60);
/// A busy machine is no lost server, where a test is not about lost ones.
const PATIENCE: Duration = Duration::from_secs(10);

/// An engine as most tests want it.
fn open(endpoint: String, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let mut config = EngineConfig::new("test", formats::plain(BYTES as u64), "weights-1");
    config.client = ClientConfig::to(endpoint);
    config.client.patience = PATIENCE;
    change(&mut config);
    Engine::open(config).unwrap()
}

fn ready(engine: &Engine) {
    let ready = engine.ready(COMES).unwrap();
    assert!(ready, "{}", engine.describe().unwrap());
}

/// Where the server answers whatever becomes of its ports.
fn socket(node: &Node) -> String {
    format!("unix:{}", node.data_dir().join("kvkeepd.sock").display())
}

/// An engine's KV memory: keys and values apart, a run per layer, blocks side by side in each.
struct Kv {
    region: Region,
    geometry: Geometry,
    blocks: usize,
}

impl Kv {
    fn new(blocks: usize) -> Self {
        let half = LAYERS * blocks * RUN;
        let region = Region::new(2 * half).unwrap();
        // SAFETY: each test gives a block to one call at a time and looks at it when that has ended.
        let geometry = unsafe {
            let area = |at| (region.strided(at, RUN, blocks * RUN, LAYERS as u32), RUN as u64);
            Geometry::new([area(0), area(half)], blocks as u32).unwrap()
        };
        Self { region, geometry, blocks }
    }

    /// Where run `n` of a block begins.
    fn run(&self, block: usize, n: usize) -> usize {
        (n * self.blocks + block) * RUN
    }

    fn write(&self, block: usize, bytes: &[u8]) {
        bytes.chunks(RUN).enumerate().for_each(|(n, run)| self.region.write(self.run(block, n), run));
    }

    fn read(&self, block: usize) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        bytes.chunks_mut(RUN).enumerate().for_each(|(n, run)| self.region.read(self.run(block, n), run));
        bytes
    }

    /// A put of a chain out of the blocks from `first` on, which are filled.
    fn put(&self, keys: &[Bytes], first: usize) -> Put<kvkeep_client::Place> {
        let position = |(n, key): (usize, &Bytes)| {
            self.write(first + n, &payload::block(key, BYTES));
            PutPosition::of(key.clone(), self.geometry.place((first + n) as u32).unwrap())
        };
        Put { positions: keys.iter().enumerate().map(position).collect(), ..Put::default() }
    }

    fn submit_get(&self, engine: &Engine, queue: usize, keys: &[Bytes], first: usize, call: Call) -> Submission {
        let blocks: Vec<_> = (first as u32..(first + keys.len()) as u32).collect();
        let places = self.geometry.places(&blocks).unwrap();
        engine.submit_get(queue, keys.iter().cloned().map(GetItem::of).collect(), places, None, call).unwrap()
    }

    fn get(&self, engine: &Engine, keys: &[Bytes], first: usize) -> Vec<GotInto> {
        let blocks: Vec<_> = (first as u32..(first + keys.len()) as u32).collect();
        let items = keys.iter().cloned().map(GetItem::of).collect();
        engine.get(items, self.geometry.places(&blocks).unwrap(), None, &Call::default()).unwrap()
    }

    fn holds(&self, keys: &[Bytes], first: usize) {
        for (n, key) in keys.iter().enumerate() {
            assert!(self.read(first + n)[..] == payload::block(key, BYTES)[..], "block {n}");
        }
    }
}

fn readable(event: BorrowedFd<'_>, within: Duration) -> bool {
    let mut poll = [PollFd::new(&event, PollFlags::IN)];
    let within = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: within.subsec_nanos().into() };
    rustix::event::poll(&mut poll, Some(&within)).unwrap() == 1
}

/// The completions of one queue, by its event and by polling, never by waiting inside.
fn completions(engine: &Engine, queue: usize, n: usize) -> Vec<Completion> {
    let (until, mut done) = (Instant::now() + COMES, Vec::new());
    while done.len() < n {
        let left = until.saturating_duration_since(Instant::now());
        assert!(readable(engine.event_fd(queue).unwrap(), left), "{} of {n} completions came", done.len());
        let some = engine.poll(queue, 2).unwrap();
        assert!(!some.is_empty(), "the event is readable and nothing waits");
        done.extend(some);
    }
    assert!(!readable(engine.event_fd(queue).unwrap(), Duration::ZERO), "nothing waits, and the event is readable");
    done
}

fn got(done: &Completion) -> &[GotInto] {
    match &done.outcome {
        Outcome::Got(got) => got,
        other => panic!("a get was submitted: {other:?}"),
    }
}

fn kept(outcomes: &[PartOutcome]) -> bool {
    !outcomes.is_empty() && outcomes.iter().all(PartOutcome::is_kept)
}

/// Blocks are put and got through queues on every way, their memory is compared byte by byte, and a miss touches nothing.
#[tokio::test(flavor = "multi_thread")]
async fn completions_bring_every_byte_on_every_way() {
    let node = Node::start(Options::default());
    for (chain, wire) in [(1, Wire::Socket), (2, Wire::Port), (3, Wire::Grpc)] {
        let engine = open(node.endpoint(), |c| (c.client.way, c.queues) = (WayWish::Only(wire), 2));
        ready(&engine);
        assert_eq!(engine.describe().unwrap().way.unwrap().wire, wire);
        let (keys, kv) = (payload::chain(chain, CHAIN as u64), Kv::new(2 * CHAIN + 1));
        let call = Call::of(RequestId::new(b"request").unwrap());
        let ticket = engine.submit_put(1, kv.put(&keys, 0), call.clone()).unwrap().ticket().unwrap();
        let done = completions(&engine, 1, 1);
        assert!(done[0].ticket == ticket && done[0].request_id == call.request_id && !done[0].cancelled);
        assert!(matches!(&done[0].outcome, Outcome::Put(outcomes) if outcomes.len() == CHAIN && kept(outcomes)));
        let queries = vec![MatchQuery::of(keys.clone()), MatchQuery::of(payload::chain(99, 2))];
        assert!(engine.submit_match(1, queries, call.clone()).unwrap().ticket().is_some());
        let mut asked = keys.clone();
        asked.push(payload::key(99, 99));
        assert!(kv.submit_get(&engine, 0, &asked, CHAIN, call.clone()).ticket().is_some());
        match &completions(&engine, 1, 1)[0].outcome {
            Outcome::Matched(found) => {
                let boundary = |n: usize| found[n].as_ref().unwrap().boundary_positions as usize;
                assert_eq!((found.len(), boundary(0), boundary(1)), (2, CHAIN, 0));
            }
            other => panic!("a match was submitted: {other:?}"),
        }
        let done = completions(&engine, 0, 1);
        let got = got(&done[0]);
        assert!(got[..CHAIN].iter().all(|g| g.is_hit() && g.len == BYTES && !g.in_doubt), "{got:?}");
        assert!(!got[CHAIN].is_hit() && kv.read(2 * CHAIN).iter().all(|b| *b == 0), "a miss touches nothing");
        kv.holds(&keys, CHAIN);
        assert!(kv.get(&engine, &keys, CHAIN).iter().all(GotInto::is_hit));
        let said = engine.describe().unwrap();
        assert_eq!((said.counters.submitted, said.counters.completed, said.counters.lost), (3, 3, 0), "{said}");
        let registered = said.regions.iter().filter(|r| r.registered.is_some()).count();
        assert_eq!((said.regions.len(), registered), (1, usize::from(wire == Wire::Socket)), "{said}");
        let query = MatchQuery::of(keys.clone()).leased(COMES);
        let lease = engine.match_chain(query, &call).unwrap().lease.unwrap();
        assert!(engine.renew(lease.id, Some(COMES), &call).unwrap().is_some());
        assert_eq!(engine.touch(keys.clone(), &call).unwrap() as usize, CHAIN);
        engine.release(vec![lease.id], vec![]).unwrap();
    }
    leaks::nothing_is_held(&node.client().await).await;
}

/// The server is stopped, so that nothing ends: four calls are taken, the fifth is busy; then all four hit.
#[test]
fn a_queue_takes_what_it_may_while_the_server_says_nothing() {
    let node = Node::start(Options::default());
    let engine = open(node.endpoint(), |c| (c.in_flight_max, c.queues) = (4, 2));
    ready(&engine);
    let (keys, kv) = (payload::chain(1, 4), Kv::new(16));
    assert!(kept(&engine.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    node.pause();
    let submit = |n: usize| kv.submit_get(&engine, 0, &keys[n % 4..][..1], 4 + n, Call::default()).ticket();
    let tickets: Vec<_> = (0..8).map(submit).collect();
    assert!(tickets[..4].iter().all(Option::is_some) && tickets[4..].iter().all(Option::is_none), "{tickets:?}");
    let counters = engine.counters().unwrap();
    assert_eq!((counters.submitted, counters.completed, counters.busy_refused), (4, 0, 4));
    node.resume();
    for done in completions(&engine, 0, 4) {
        assert!(tickets.contains(&Some(done.ticket)) && got(&done)[0].is_hit(), "{done:?}");
    }
    kv.holds(&keys, 4);
    assert!(kv.read(8).iter().all(|b| *b == 0), "a busy queue does nothing");
    assert!(submit(4).is_some(), "there is room again");
    completions(&engine, 0, 1);
}

/// Calls to a server that is stopped are taken back, by ticket and by request: all end, and nothing is written when it wakes up.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_back_ends_and_its_memory_stays_the_callers() {
    let node = Node::start(Options::default());
    let engine = open(node.endpoint(), |_| {});
    ready(&engine);
    let (keys, kv) = (payload::chain(1, CHAIN as u64), Kv::new(8 * CHAIN));
    assert!(kept(&engine.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    node.pause();
    let began = Instant::now();
    let submit = |n: usize, request: &[u8]| {
        let call = Call::of(RequestId::new(request).unwrap());
        kv.submit_get(&engine, 0, &keys, n * CHAIN, call).ticket().unwrap()
    };
    let (a, b, c, d) = (submit(1, b"a"), submit(2, b"b"), submit(3, b"b"), submit(4, b"d"));
    let stored = payload::chain(2, CHAIN as u64);
    let put = engine.submit_put(0, kv.put(&stored, 5 * CHAIN), Call::of(RequestId::new(b"b").unwrap())).unwrap();
    // They reach the server's socket, most of them.
    std::thread::sleep(Duration::from_millis(50));
    assert!(engine.cancel(a).unwrap());
    assert_eq!(engine.cancel_request(&RequestId::new(b"b").unwrap()).unwrap(), 3);
    let done = completions(&engine, 0, 4);
    assert!(began.elapsed() < PATIENCE / 2, "they were waited for: {:?}", began.elapsed());
    for done in &done {
        assert!(done.cancelled && done.ticket != d, "{done:?}");
        match &done.outcome {
            Outcome::Put(outcomes) => {
                assert!(Some(done.ticket) == put.ticket() && outcomes.len() == CHAIN && !kept(outcomes));
            }
            _ => {
                assert!([a, b, c].contains(&done.ticket));
                let misses = |g: &GotInto| g.reason == Some(MissReason::Cancelled) && !g.in_doubt;
                assert!(got(done).len() == CHAIN && got(done).iter().all(misses), "{done:?}");
            }
        }
    }
    // The memory is ours again: what is written there now must stay, also when the server goes on with what it was sent.
    (CHAIN..4 * CHAIN).for_each(|n| kv.write(n, &[7; BYTES]));
    (5 * CHAIN..6 * CHAIN).for_each(|n| kv.write(n, &[8; BYTES]));
    node.resume();
    let done = completions(&engine, 0, 1);
    assert!(done[0].ticket == d && got(&done[0]).iter().all(GotInto::is_hit), "{done:?}");
    kv.holds(&keys, 4 * CHAIN);
    assert!(kv.get(&engine, &keys, 6 * CHAIN).iter().all(GotInto::is_hit));
    let client = node.client().await;
    leaks::nothing_is_held(&client).await;
    assert!((CHAIN..4 * CHAIN).all(|n| kv.read(n) == [7; BYTES]), "a call that was taken back was written to");
    for (n, got) in kv.get(&engine, &stored, 6 * CHAIN).iter().enumerate() {
        // Bytes of before, or none; never what lies there now.
        assert!(!got.is_hit() || kv.read(6 * CHAIN + n)[..] == payload::block(&stored[n], BYTES)[..], "block {n}");
    }
    assert!(!engine.cancel(a).unwrap() && engine.counters().unwrap().cancelled == 4);
}

/// Eight threads ask all the time while the server is stopped and goes on. The clock of each call tells how long it waited, and
/// the first hit after the server went on when it was found again.
#[test]
fn nobody_waits_for_a_server_that_is_stopped() {
    let node = Node::start(Options::default());
    let engine = open(node.endpoint(), |c| {
        c.client.patience = kvkeep_client::config::PATIENCE;
        c.queues = 8;
    });
    ready(&engine);
    let (keys, kv) = (payload::chain(1, CHAIN as u64), Kv::new(9 * CHAIN));
    assert!(kept(&engine.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    let (stopped, end) = (AtomicBool::new(false), AtomicBool::new(false));
    let outage = Mutex::new(Vec::new());
    let back = std::thread::scope(|scope| {
        for thread in 0..8 {
            let (engine, kv, keys, stopped, end, outage) = (&engine, &kv, &keys, &stopped, &end, &outage);
            scope.spawn(move || {
                let mut took = Vec::new();
                while !end.load(Ordering::Relaxed) {
                    // An answer that was under way at the stop counts for neither side.
                    let was_stopped = stopped.load(Ordering::Relaxed);
                    let began = Instant::now();
                    let hit = match thread % 2 {
                        0 => {
                            engine.match_chain(MatchQuery::of(keys.clone()), &Call::default()).unwrap().reason.is_none()
                        }
                        _ => kv.get(engine, keys, (1 + thread) * CHAIN).iter().all(GotInto::is_hit),
                    };
                    if was_stopped && stopped.load(Ordering::Relaxed) {
                        assert!(!hit, "a stopped server cannot have answered");
                        took.push(began.elapsed());
                    }
                    let submitted = kv.submit_get(engine, thread, keys, (1 + thread) * CHAIN, Call::default());
                    assert!(submitted.ticket().is_some(), "it is polled each time");
                    let done = engine.wait(thread, 1, COMES).unwrap();
                    let again = Instant::now();
                    assert!(got(&done[0]).iter().all(|g| !g.in_doubt || !g.is_hit()));
                    assert!(engine.poll(thread, 8).unwrap().is_empty() && again.elapsed() < SLACK, "polling waits");
                    std::thread::sleep(Duration::from_millis(1));
                }
                outage.lock().unwrap().extend(took);
            });
        }
        std::thread::sleep(Duration::from_millis(300));
        node.pause();
        stopped.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1500));
        stopped.store(false, Ordering::Relaxed);
        node.resume();
        let since = Instant::now();
        while engine.match_chain(MatchQuery::of(keys.clone()), &Call::default()).unwrap().reason.is_some() {
            assert!(since.elapsed() < COMES, "{}", engine.describe().unwrap());
            std::thread::sleep(Duration::from_millis(1));
        }
        let back = since.elapsed();
        end.store(true, Ordering::Relaxed);
        back
    });
    assert!(back < BACK_WITHIN + SLACK, "hits again only after {back:?}");
    let mut took = outage.into_inner().unwrap();
    took.sort_unstable();
    let (calls, longest, middle) = (took.len(), took[took.len() - 1], took[took.len() / 2]);
    assert!(longest < kvkeep_client::config::PATIENCE + SLACK, "a call waited {longest:?}");
    assert!(calls > 100 && middle < kvkeep_client::config::PATIENCE / 2, "{calls} calls, most waited {middle:?}");
    assert!(kv.get(&engine, &keys, CHAIN).iter().all(GotInto::is_hit));
    kv.holds(&keys, CHAIN);
}

/// The server is killed and started again, over its folders and over empty ones: durable blocks hit again in one case, blocks
/// put anew in the other, through the same engine.
#[test]
fn a_server_that_comes_back_is_found_whoever_it_is_now() {
    let mut node = Node::start(Options::default());
    let engine = open(socket(&node), |c| c.client.patience = kvkeep_client::config::PATIENCE);
    ready(&engine);
    let (keys, kv) = (payload::chain(1, CHAIN as u64), Kv::new(2 * CHAIN));
    let durable = || Put { class: Some(Class::Durable), ..kv.put(&keys, 0) };
    assert!(kept(&engine.put(durable(), &Call::default()).unwrap()));
    for life in 1..=3 {
        node.kill();
        let began = Instant::now();
        for _ in 0..20 {
            assert!(!kv.get(&engine, &keys, CHAIN).iter().any(GotInto::is_hit));
            assert!(engine.put(kv.put(&keys, 0), &Call::default()).unwrap().iter().all(|o| !o.is_kept()));
        }
        assert!(began.elapsed() < Duration::from_secs(2) + SLACK, "calls waited for a dead server");
        if life == 3 {
            // Another server, in which our namespace's number is another namespace's, or nobody's.
            std::fs::remove_dir_all(node.data_dir()).unwrap();
            for name in leaks::names(node.arena_dir()) {
                std::fs::remove_dir_all(node.arena_dir().join(name)).unwrap();
            }
        }
        node.restart();
        let since = Instant::now();
        ready(&engine);
        assert!(since.elapsed() < BACK_WITHIN + SLACK, "found again only after {:?}", since.elapsed());
        if life == 3 {
            assert!(!kv.get(&engine, &keys, CHAIN).iter().any(GotInto::is_hit), "it has nothing");
            assert!(kept(&engine.put(durable(), &Call::default()).unwrap()));
        }
        let got = kv.get(&engine, &keys, CHAIN);
        assert!(got.iter().all(GotInto::is_hit), "life {life}: {got:?}\n{}", engine.describe().unwrap());
        kv.holds(&keys, CHAIN);
    }
    assert_eq!(engine.counters().unwrap().restarts, 3);
}

/// Each fault is switched on and off: misses and nothing else while it is on, hits again soon after.
#[test]
fn faults_are_played_and_end() {
    let node = Node::start(Options::default());
    let engine = open(node.endpoint(), |c| c.client.patience = kvkeep_client::config::PATIENCE);
    ready(&engine);
    let (keys, kv) = (payload::chain(1, CHAIN as u64), Kv::new(2 * CHAIN));
    assert!(kept(&engine.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    for fault in [Fault::Refused, Fault::Silent, Fault::Miss] {
        engine.inject(fault).unwrap();
        for _ in 0..10 {
            assert!(!kv.get(&engine, &keys, CHAIN).iter().any(GotInto::is_hit), "{fault:?}");
            assert!(engine.match_chain(MatchQuery::of(keys.clone()), &Call::default()).unwrap().reason.is_some());
        }
        engine.inject(Fault::None).unwrap();
        let since = Instant::now();
        ready(&engine);
        assert!(since.elapsed() < BACK_WITHIN + SLACK, "found again only after {:?}", since.elapsed());
        assert!(kv.get(&engine, &keys, CHAIN).iter().all(GotInto::is_hit), "{fault:?}");
        kv.holds(&keys, CHAIN);
    }
}

/// The engine is opened, and used, before there is a server; then there is one.
#[test]
fn an_engine_may_be_there_before_its_server() {
    let mut node = Node::new(Options::default());
    let engine = open(socket(&node), |c| c.client.patience = kvkeep_client::config::PATIENCE);
    let (keys, kv) = (payload::chain(1, CHAIN as u64), Kv::new(2 * CHAIN));
    assert!(!kv.get(&engine, &keys, CHAIN).iter().any(GotInto::is_hit));
    assert!(!engine.ready(Duration::from_millis(50)).unwrap());
    node.restart();
    ready(&engine);
    assert!(kept(&engine.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    assert!(kv.get(&engine, &keys, CHAIN).iter().all(GotInto::is_hit));
    kv.holds(&keys, CHAIN);
}

/// Another format and other weights are refused by name, and all misses until the weights are said to have changed.
#[test]
fn a_store_of_other_weights_is_not_read() {
    let node = Node::start(Options::default());
    let (keys, kv) = (payload::chain(1, CHAIN as u64), Kv::new(2 * CHAIN));
    let first = open(node.endpoint(), |_| {});
    ready(&first);
    assert!(kept(&first.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    let other = open(node.endpoint(), |c| c.format = formats::plain(4096));
    assert!(other.ready(COMES).unwrap_err().to_string().contains("format_mismatch"));
    let newer = open(node.endpoint(), |c| c.revision = "weights-2".into());
    assert!(newer.ready(COMES).unwrap_err().to_string().contains("stale_revision"));
    assert!(!kv.get(&newer, &keys, CHAIN).iter().any(GotInto::is_hit));
    assert!(!kept(&newer.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    assert!(newer.advance_revision("weights-2", &Call::default()).unwrap());
    assert!(!kv.get(&newer, &keys, CHAIN).iter().any(GotInto::is_hit), "KV of the old weights");
    assert!(!kv.get(&first, &keys, CHAIN).iter().any(GotInto::is_hit), "its revision is over");
    assert!(kept(&newer.put(kv.put(&keys, 0), &Call::default()).unwrap()));
    assert!(kv.get(&newer, &keys, CHAIN).iter().all(GotInto::is_hit));
    assert!(!kept(&first.put(kv.put(&payload::chain(2, 1), 0), &Call::default()).unwrap()));
}

/// Eight threads submit into four queues and poll what they find; every ticket has one completion, every byte is right.
#[test]
fn eight_threads_submit_at_once() {
    const ROUNDS: usize = 30;
    let node = Node::start(Options::default());
    let engine = open(node.endpoint(), |c| (c.queues, c.in_flight_max) = (4, 64));
    ready(&engine);
    let seen = Mutex::new(std::collections::HashSet::new());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (engine, seen) = (&engine, &seen);
            scope.spawn(move || {
                let (keys, kv) = (payload::chain(thread as u64, CHAIN as u64), Kv::new(2 * CHAIN));
                assert!(kept(&engine.put(kv.put(&keys, 0), &Call::default()).unwrap()));
                for _ in 0..ROUNDS {
                    let mine = kv.submit_get(engine, thread % 4, &keys, CHAIN, Call::default()).ticket().unwrap();
                    let until = Instant::now() + COMES;
                    // Two threads share each queue: one may poll what the other waits for.
                    while !seen.lock().unwrap().contains(&mine) {
                        assert!(Instant::now() < until, "a completion is missing");
                        for done in engine.wait(thread % 4, 4, Duration::from_millis(5)).unwrap() {
                            assert!(got(&done).iter().all(GotInto::is_hit), "{done:?}");
                            assert!(seen.lock().unwrap().insert(done.ticket), "two completions for one ticket");
                        }
                    }
                    kv.holds(&keys, CHAIN);
                    (CHAIN..2 * CHAIN).for_each(|n| kv.write(n, &[0; BYTES]));
                }
            });
        }
    });
    assert_eq!(seen.into_inner().unwrap().len(), 8 * ROUNDS);
    let counters = engine.counters().unwrap();
    assert_eq!((counters.completed, counters.busy_refused, counters.lost), (8 * ROUNDS as u64, 0, 0));
}

/// What `engine_fork` says; ends with its process.
struct Forking {
    parent: std::process::Child,
    words: mpsc::Receiver<String>,
    child: Option<Pid>,
}

impl Forking {
    fn start(endpoint: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine_fork"));
        let mut parent = command.arg(endpoint).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = parent.stdout.take().unwrap();
        let (said, words) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = said.send(line);
            }
        });
        Self { parent, words, child: None }
    }

    /// The next line, which both processes write to.
    fn next(&mut self) -> String {
        let line = self.words.recv_timeout(COMES).expect("engine_fork says what it was told to say");
        if let Some(pid) = line.strip_prefix("child ok ") {
            self.child = Pid::from_raw(pid.parse().unwrap());
        }
        line
    }
}

impl Drop for Forking {
    fn drop(&mut self) {
        let _ = self.parent.kill();
        let _ = self.parent.wait();
        if let Some(child) = self.child {
            let _ = kill_process(child, Signal::KILL); // it has ended, unless the test failed
        }
    }
}

/// A program forks with an open engine: both processes compare every byte themselves. Then the parent is killed, and its lease
/// ends with its instance although the child lives on, which still has its own lease and still hits.
#[tokio::test]
async fn a_forked_child_begins_anew_and_does_not_keep_its_parent_alive() {
    let node = Node::start(Options { limits: "instance_grace_ms = 300".into(), ..Options::default() });
    let client = node.client().await;
    for endpoint in [socket(&node), format!("http://{}", node.endpoint())] {
        let mut forking = Forking::start(&endpoint);
        let said = [forking.next(), forking.next()];
        assert!(said.iter().any(|s| s.starts_with("child ok")) && said.iter().any(|s| s.starts_with("parent ok")));
        let child = forking.child.unwrap();
        leaks::eventually(&client, "both have a lease", |s| s.leases == 2).await;
        let mut end = forking.parent.stdin.take().unwrap();
        forking.parent.kill().unwrap();
        forking.parent.wait().unwrap();
        leaks::eventually(&client, "the parent's lease ends with its instance", |s| s.leases == 1).await;
        test_kill_process(child).expect("the child lives");
        end.write_all(b"go on").unwrap();
        drop(end);
        assert_eq!(forking.next(), "child done");
        leaks::nothing_is_held(&client).await;
        forking.child = None;
    }
}
