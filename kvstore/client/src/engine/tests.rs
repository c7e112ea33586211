//! An engine without a server, with one that says nothing, and with faults injected. With a real one: the tests of the node.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_core::{Format, Group, LeaseId, MissReason, PartStatus, RequestId, Rule, SizeRule, Topology};

use super::*;
use crate::{ClientConfig, ErrorKind, GetItem, MatchQuery, PartOutcome, Place, Put, PutPosition, Region};

const BYTES: usize = 4096;
/// What a busy machine may add to any wait.
const SLACK: Duration = Duration::from_secs(2);

fn format() -> Format {
    let size = SizeRule::Exact(BYTES as u64);
    Format {
        model: "m".into(),
        dtype: "bf16".into(),
        layout: "l".into(),
        hash_algorithm: "h".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group { rule: Rule::All, tokens_per_block: 16, shards: 1, replicated: false, size }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

fn config(endpoint: &str, change: impl FnOnce(&mut EngineConfig)) -> EngineConfig {
    let mut config = EngineConfig::new("test", format(), "weights");
    config.client = ClientConfig::to(endpoint);
    change(&mut config);
    config
}

/// Nobody listens there.
fn nowhere() -> String {
    format!("unix:/nonexistent/kvkeep-{}.sock", rand::random::<u32>())
}

/// A socket on which connections are made and nothing is ever said, as that of a server that is stopped.
struct Silent {
    path: PathBuf,
    _listener: UnixListener,
}

impl Silent {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("kvkeep-engine-{}.sock", rand::random::<u32>()));
        Self { _listener: UnixListener::bind(&path).unwrap(), path }
    }

    fn endpoint(&self) -> String {
        format!("unix:{}", self.path.display())
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn keys(n: usize) -> Vec<Bytes> {
    (0..n).map(|i| Bytes::from(format!("key {i}"))).collect()
}

fn items(n: usize) -> Vec<GetItem> {
    keys(n).into_iter().map(GetItem::of).collect()
}

fn places(n: usize) -> Vec<Place> {
    let region = Region::new(n * BYTES).unwrap();
    // SAFETY: each is given to one call.
    (0..n).map(|i| unsafe { region.place(i * BYTES, BYTES) }).collect()
}

fn put(n: usize) -> Put<Place> {
    let positions = keys(n).into_iter().zip(places(n)).map(|(key, place)| PutPosition::of(key, place)).collect();
    Put { positions, ..Put::default() }
}

fn call(id: &[u8]) -> Call {
    Call::of(RequestId::new(id).unwrap()).within(Duration::from_secs(30))
}

fn all(engine: &Engine, queue: usize, n: usize) -> Vec<Completion> {
    let until = Instant::now() + Duration::from_secs(60);
    let mut done = Vec::new();
    while done.len() < n {
        done.extend(engine.wait(queue, 64, until - Instant::now()).unwrap());
        assert!(Instant::now() < until, "{} of {n} came", done.len());
    }
    done
}

/// Each refusal is asked for its kind; what is right opens.
#[test]
fn only_a_wrong_configuration_does_not_open() {
    assert!(Engine::open(config(&nowhere(), |_| {})).is_ok());
    let wrong: [fn(&mut EngineConfig); 7] = [
        |c| c.queues = 0,
        |c| c.queues = QUEUES_MAX + 1,
        |c| c.in_flight_max = 0,
        |c| c.in_flight_max = IN_FLIGHT_MAX + 1,
        |c| c.namespace.clear(),
        |c| c.format.groups.clear(),
        |c| c.client.endpoint = "ftp://host".into(),
    ];
    for change in wrong {
        assert!(matches!(Engine::open(config(&nowhere(), change)).unwrap_err().kind(), ErrorKind::Refused(_)));
    }
}

/// Every verb is called and its answer looked at; the counters and the description say why.
#[test]
fn a_server_that_is_down_is_misses_for_every_verb() {
    let engine = Engine::open(config(&nowhere(), |c| c.queues = 2)).unwrap();
    assert!(!engine.ready(Duration::from_millis(100)).unwrap());
    let call = call(b"r");
    let found = engine.match_chain(MatchQuery { statuses: true, ..MatchQuery::of(keys(3)) }, &call).unwrap();
    assert_eq!((found.boundary_positions, found.reason), (0, Some(MissReason::Unreachable)));
    assert_eq!(found.statuses, [PartStatus::Miss; 3]);
    assert_eq!(engine.match_many(vec![MatchQuery::of(keys(1)); 3], &call).unwrap().len(), 3);
    assert_eq!(engine.lease(keys(2), None, &call).unwrap(), (None, vec![PartStatus::Miss; 2]));
    assert_eq!(engine.renew(LeaseId(1), None, &call).unwrap(), None);
    assert_eq!(engine.touch(keys(2), &call).unwrap(), 0);
    engine.release(vec![LeaseId(1)], vec![]).unwrap();
    let got = engine.get(items(3), places(3), None, &call).unwrap();
    assert!(got.len() == 3 && got.iter().all(|g| !g.is_hit() && !g.in_doubt), "{got:?}");
    let outcomes = engine.put(put(2), &call).unwrap();
    assert!(matches!(&outcomes[..], [PartOutcome::Refused(_), PartOutcome::Refused(_)]), "{outcomes:?}");
    assert!(!engine.advance_revision("others", &call).unwrap());
    assert!(engine.settle(Duration::from_secs(1)).unwrap());
    assert!(!engine.register(&Region::new(4096).unwrap(), Duration::from_millis(50)).unwrap());
    // What is no hot verb fails instead, and says why.
    let brief = call.clone().within(Duration::from_millis(200));
    let error =
        engine.with_namespace(&brief, |ns, call| async move { ns.sessions().get("s", &call).await }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    assert!(error.to_string().contains("Unix socket"), "{error}");
    assert!(engine.submit_get(0, items(3), places(3), None, call.clone()).unwrap().ticket().is_some());
    assert!(engine.submit_put(1, put(2), call.clone()).unwrap().ticket().is_some());
    assert!(engine.submit_match(1, vec![MatchQuery::of(keys(2)); 2], call).unwrap().ticket().is_some());
    assert!(matches!(&all(&engine, 0, 1)[0].outcome, Outcome::Got(got) if got.len() == 3 && !got[0].is_hit()));
    for done in all(&engine, 1, 2) {
        match done.outcome {
            Outcome::Put(outcomes) => assert!(outcomes.len() == 2 && !outcomes[0].is_kept()),
            Outcome::Matched(found) => assert!(found.len() == 2 && found[0].as_ref().unwrap().boundary_positions == 0),
            other => panic!("{other:?}"),
        }
    }
    let said = engine.describe().unwrap();
    assert_eq!(said.standing, "lost");
    assert!(said.why.as_ref().unwrap().contains("Unix socket"), "{said}");
    let c = said.counters;
    assert_eq!((c.submitted, c.completed, c.busy_refused, c.cancelled, c.forks), (3, 3, 0, 0, 0));
    assert!(c.lost >= 10, "{said}");
}

/// A wrong argument is told at once, server or not.
#[test]
fn wrong_arguments_are_errors() {
    let engine = Engine::open(config(&nowhere(), |_| {})).unwrap();
    assert!(engine.get(items(3), places(2), None, &call(b"")).is_err());
    assert!(engine.submit_get(0, items(3), places(2), None, call(b"")).is_err());
    assert!(engine.submit_put(1, put(1), call(b"")).is_err());
    assert!(engine.poll(1, 1).is_err() && engine.event_fd(1).is_err());
    for bits in [0, 1, u64::MAX] {
        assert!(engine.cancel(Ticket::from_bits(bits)).unwrap_err().to_string().contains("no such ticket"));
    }
}

/// The clock says how long each call took: the first waits for patience, the others do not wait at all.
#[test]
fn a_silent_server_is_waited_for_once() {
    let silent = Silent::new();
    let engine = Engine::open(config(&silent.endpoint(), |_| {})).unwrap();
    let timed = || {
        let began = Instant::now();
        let found = engine.match_chain(MatchQuery::of(keys(3)), &call(b"")).unwrap();
        assert_eq!(found.reason, Some(MissReason::Unreachable));
        began.elapsed()
    };
    let first = timed();
    assert!(first >= crate::config::PATIENCE / 2 && first < crate::config::PATIENCE + SLACK, "{first:?}");
    let mut later: Vec<_> = (0..200).map(|_| timed()).collect();
    later.sort_unstable();
    assert!(later[later.len() / 2] < crate::config::PATIENCE / 2, "{later:?}");
}

/// Of six calls to a server that keeps them waiting four are taken; when they have been polled, four more are.
#[test]
fn a_queue_takes_as_many_calls_as_it_may_and_no_more() {
    let silent = Silent::new();
    let engine = Engine::open(config(&silent.endpoint(), |c| {
        (c.in_flight_max, c.queues) = (4, 2);
        c.client.patience = Duration::from_secs(3);
    }))
    .unwrap();
    for _ in 0..2 {
        let taken: Vec<_> =
            (0..6).map(|_| engine.submit_get(0, items(1), places(1), None, call(b"")).unwrap().ticket()).collect();
        assert!(taken[..4].iter().all(Option::is_some) && taken[4..].iter().all(Option::is_none), "{taken:?}");
        assert!(
            engine.submit_get(1, items(1), places(1), None, call(b"")).unwrap().ticket().is_some(),
            "another queue"
        );
        let tickets: Vec<_> = all(&engine, 0, 4).iter().map(|done| Some(done.ticket)).collect();
        assert!(taken[..4].iter().all(|t| tickets.contains(t)));
        assert_eq!(all(&engine, 1, 1).len(), 1);
    }
    let c = engine.counters().unwrap();
    assert_eq!((c.submitted, c.completed, c.busy_refused), (10, 10, 4));
}

/// Calls of two requests wait for a server that says nothing; those that are taken back end long before patience does.
#[test]
fn a_call_that_is_taken_back_has_its_completion_at_once() {
    let silent = Silent::new();
    let engine = Engine::open(config(&silent.endpoint(), |c| c.client.patience = Duration::from_secs(600))).unwrap();
    let began = Instant::now();
    let get = |id: &[u8]| engine.submit_get(0, items(2), places(2), None, call(id)).unwrap().ticket().unwrap();
    let tickets: Vec<_> = (0..4).map(|_| get(b"one")).collect();
    let other = get(b"two");
    assert!(engine.submit_put(0, put(2), call(b"one")).unwrap().ticket().is_some());
    assert!(engine.submit_match(0, vec![MatchQuery::of(keys(2))], call(b"one")).unwrap().ticket().is_some());
    assert!(engine.cancel(tickets[0]).unwrap());
    assert!(!engine.cancel(tickets[0]).unwrap(), "it has been taken back already");
    assert_eq!(engine.cancel_request(&RequestId::new(b"one").unwrap()).unwrap(), 5);
    for done in all(&engine, 0, 6) {
        assert!(done.cancelled && done.request_id.as_bytes() == b"one" && done.ticket != other, "{done:?}");
        match done.outcome {
            Outcome::Got(got) => {
                assert_eq!(got.len(), 2);
                assert!(got.iter().all(|g| g.reason == Some(MissReason::Cancelled) && !g.in_doubt), "{got:?}");
            }
            Outcome::Put(outcomes) => {
                assert!(
                    outcomes.iter().all(|o| matches!(o, PartOutcome::Refused(e) if e.kind() == ErrorKind::Cancelled))
                );
            }
            Outcome::Matched(found) => assert_eq!(found[0].as_ref().unwrap().reason, Some(MissReason::Cancelled)),
            Outcome::Wrong(e) => panic!("{e}"),
        }
    }
    assert!(!engine.cancel(tickets[1]).unwrap(), "it has ended");
    assert!(engine.poll(0, 8).unwrap().is_empty());
    assert_eq!(engine.counters().unwrap().cancelled, 6);
    // The last one is taken back by the end of the engine, which is not waited for either.
    drop(engine);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

/// A deadline ends a call that waits and one that was submitted, long before patience does.
#[test]
fn a_deadline_is_kept() {
    let silent = Silent::new();
    let engine = Engine::open(config(&silent.endpoint(), |c| c.client.patience = Duration::from_secs(600))).unwrap();
    let brief = call(b"").within(Duration::from_millis(50));
    let began = Instant::now();
    assert!(engine.submit_get(0, items(1), places(1), None, brief.clone()).unwrap().ticket().is_some());
    let found = engine.match_chain(MatchQuery::of(keys(1)), &brief).unwrap();
    assert_eq!(found.reason, Some(MissReason::Late));
    let got = engine.get(items(1), places(1), None, &brief).unwrap();
    assert_eq!(got[0].reason, Some(MissReason::Late));
    let Outcome::Got(got) = &all(&engine, 0, 1)[0].outcome else { panic!("a get was submitted") };
    assert_eq!(got[0].reason, Some(MissReason::Late));
    assert!(began.elapsed() < Duration::from_millis(200) + SLACK, "{:?}", began.elapsed());
}

/// Engines are dropped before their first call, within a runtime, and with calls in flight; none is waited for long.
#[test]
fn an_engine_ends_whatever_it_was_doing() {
    let silent = Silent::new();
    let open = || Engine::open(config(&silent.endpoint(), |c| c.client.patience = Duration::from_secs(600))).unwrap();
    let began = Instant::now();
    drop(open());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        drop(open());
        let engine = open();
        assert!(engine.submit_get(0, items(1), places(1), None, call(b"")).unwrap().ticket().is_some());
        assert!(engine.match_chain(MatchQuery::of(keys(1)), &call(b"").within(Duration::from_millis(1))).is_ok());
    });
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// The engine as a child finds it whose parent had used it: everything of the parent's lies there and nothing of it is used.
/// (The fork itself is played by the tests of the node, in a process of their own.)
#[test]
fn what_was_inherited_is_not_used() {
    let engine = Engine::open(config(&nowhere(), |_| {})).unwrap();
    let life = engine.life().unwrap();
    assert_eq!(life.generation, 0);
    let child = Life::begin(&engine.config, Some(life)).unwrap();
    assert_eq!(child.generation, 1);
    assert_ne!(child.io.client.config().instance, life.io.client.config().instance);
    use std::os::fd::AsRawFd as _;
    assert_ne!(child.queues[0].event().as_raw_fd(), life.queues[0].event().as_raw_fd());
}
