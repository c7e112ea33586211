//! A program that forks with an open engine, as Python does: from one of its threads, while others are inside the engine.
//! `tests/node/engine.rs` starts it, reads what both processes say, and kills the parent.
//!
//! ```text
//! engine_fork ENDPOINT
//! parent: store chain 1, lease it ─ fork ─> go on, byte for byte ─> "parent ok PID" ─> wait to be killed
//! child:                               └──> everything anew, byte for byte ─> "child ok PID" ─> wait for the end of stdin
//!                                           ─> once more ─> "child done"
//! ```
//! Whatever is not as it must be panics, and that is seen by its words not coming.

#![expect(clippy::unwrap_used, reason = "a test: an unwrap is an assertion")]

use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_client::engine::{Engine, EngineConfig, Outcome};
use kvkeep_client::{Call, ClientConfig, Geometry, GetItem, MatchQuery, Put, PutPosition, Region};
use kvkeep_core::RequestId;
use kvkeep_tests::{formats, payload};

const BYTES: usize = 64 << 10;
/// Blocks of a chain.
const CHAIN: usize = 8;
/// Threads that use the engine while it is forked.
const THREADS: usize = 3;
/// Long enough for any machine; the tests have tighter bounds.
const READY_MAX: Duration = Duration::from_secs(60);

/// Blocks of both processes in one memory: each has its own half.
struct Memory {
    region: Region,
    geometry: Geometry,
}

impl Memory {
    fn new() -> Self {
        let blocks = 4 * CHAIN;
        let region = Region::new(blocks * BYTES).unwrap();
        // SAFETY: `put` and `got` give each block to one call at a time, and the processes have different ones.
        let geometry = unsafe { Geometry::new([(region.place(0, BYTES), BYTES as u64)], blocks as u32).unwrap() };
        Self { region, geometry }
    }

    /// Stores a chain out of the blocks from `first` on.
    fn put(&self, engine: &Engine, chain: u64, first: usize) {
        let keys = keys(chain);
        for (n, key) in keys.iter().enumerate() {
            self.region.write((first + n) * BYTES, &payload::block(key, BYTES));
        }
        let place = |n| self.geometry.place((first + n) as u32).unwrap();
        let positions = keys.into_iter().enumerate().map(|(n, key)| PutPosition::of(key, place(n))).collect();
        let outcomes = engine.put(Put { positions, ..Put::default() }, &call(b"put")).unwrap();
        assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    }

    /// Reads a chain into the blocks from `first` on, through a queue, and compares every byte.
    fn got(&self, engine: &Engine, chain: u64, first: usize) {
        (first..first + CHAIN).for_each(|n| self.region.write(n * BYTES, &[0; BYTES]));
        let items = keys(chain).into_iter().map(GetItem::of).collect();
        let places = self.geometry.places(&(first as u32..(first + CHAIN) as u32).collect::<Vec<_>>()).unwrap();
        let ticket = engine.submit_get(0, items, places, None, call(b"get")).unwrap().ticket().unwrap();
        let done = engine.wait(0, 8, READY_MAX).unwrap();
        assert!(done.len() == 1 && done[0].ticket == ticket, "{done:?}");
        let Outcome::Got(got) = &done[0].outcome else { panic!("a get was submitted") };
        assert!(got.iter().all(|g| g.is_hit()), "{got:?}");
        for (n, key) in keys(chain).iter().enumerate() {
            let mut bytes = vec![0; BYTES];
            self.region.read((first + n) * BYTES, &mut bytes);
            assert!(bytes[..] == payload::block(key, BYTES)[..], "block {n} of chain {chain}");
        }
    }
}

fn keys(chain: u64) -> Vec<Bytes> {
    payload::chain(chain, CHAIN as u64)
}

fn call(request: &[u8]) -> Call {
    Call::of(RequestId::new(request).unwrap()).within(READY_MAX)
}

/// Takes a lease on a chain that outlasts the test.
fn lease(engine: &Engine, chain: u64) {
    let query = MatchQuery::of(keys(chain)).leased(Duration::from_secs(300));
    let found = engine.match_chain(query, &call(b"lease")).unwrap();
    assert!(found.lease.is_some() && found.boundary_positions as usize == CHAIN, "{found:?}");
}

/// Says a line in one write: in a child, the lock of the standard library's output may be a thread's that is not there.
fn say(words: &str) {
    let line = format!("{words}\n");
    assert_eq!(rustix::io::write(rustix::stdio::stdout(), line.as_bytes()).unwrap(), line.len());
}

fn child(engine: &Engine, memory: &Memory, parents: &Parents) {
    assert!(engine.ready(READY_MAX).unwrap(), "{:?}", engine.describe());
    assert_ne!(engine.instance().unwrap(), parents.instance);
    assert_ne!(engine.event_fd(0).unwrap().as_raw_fd(), parents.event_fd);
    assert!(engine.cancel(parents.ticket).is_err(), "a ticket of the parent");
    assert!(engine.poll(0, 8).unwrap().is_empty(), "completions of the parent");
    memory.got(engine, 1, 2 * CHAIN);
    memory.put(engine, 2, 3 * CHAIN);
    lease(engine, 2);
    let counters = engine.counters().unwrap();
    assert_eq!((counters.forks, counters.submitted, counters.lost), (1, 1, 0));
    say(&format!("child ok {}", std::process::id()));
    let mut end = std::fs::File::from(rustix::io::dup(rustix::stdio::stdin()).unwrap());
    while end.read(&mut [0; 64]).unwrap() > 0 {}
    memory.got(engine, 1, 2 * CHAIN);
    memory.got(engine, 2, 2 * CHAIN);
    say("child done");
}

struct Parents {
    instance: kvkeep_core::InstanceId,
    event_fd: i32,
    ticket: kvkeep_client::engine::Ticket,
}

fn main() {
    let endpoint = std::env::args().nth(1).expect("engine_fork ENDPOINT");
    let mut config = EngineConfig::new("fork", formats::plain(BYTES as u64), "weights");
    config.client = ClientConfig::to(endpoint);
    // A busy machine is no lost server.
    config.client.patience = Duration::from_secs(10);
    let engine = Engine::open(config).unwrap();
    let memory = Memory::new();
    assert!(engine.ready(READY_MAX).unwrap(), "{:?}", engine.describe());
    memory.put(&engine, 1, 0);
    memory.got(&engine, 1, CHAIN);
    lease(&engine, 1);
    let ticket = engine.submit_match(0, vec![MatchQuery::of(keys(1))], call(b"match")).unwrap().ticket().unwrap();
    let parents =
        Parents { instance: engine.instance().unwrap(), event_fd: engine.event_fd(0).unwrap().as_raw_fd(), ticket };
    let (stop, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let found = engine.match_chain(MatchQuery::of(keys(1)), &call(b"")).unwrap();
                    assert_eq!(found.boundary_positions as usize, CHAIN);
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let began = Instant::now();
        while calls.load(Ordering::Relaxed) < 100 {
            assert!(began.elapsed() < READY_MAX);
            std::thread::yield_now();
        }
        // SAFETY: the child is this thread alone. It uses the engine (which is made for that), memory from malloc (which glibc
        // makes usable in children), and system calls; it takes no lock that another thread of the parent may hold, and it
        // ends without running anything of the parent's.
        match unsafe { libc::fork() } {
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            0 => {
                let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| child(&engine, &memory, &parents)));
                // SAFETY: ends the process at once; the parent's threads and destructors are not this process's.
                unsafe { libc::_exit(if ran.is_ok() { 0 } else { 1 }) }
            }
            _ => {}
        }
        // The completion that was under way comes here, and only here.
        let done = engine.wait(0, 8, READY_MAX).unwrap();
        assert!(done.len() == 1 && done[0].ticket == parents.ticket, "{done:?}");
        memory.got(&engine, 1, CHAIN);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(engine.counters().unwrap().forks, 0);
    say(&format!("parent ok {}", std::process::id()));
    loop {
        std::thread::sleep(READY_MAX);
    }
}
