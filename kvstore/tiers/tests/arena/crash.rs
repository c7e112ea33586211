//! A real SIGKILL: a child process stores blocks until it is killed at a random moment; what it reported as published is
//! there and right, and nothing else is wrong.

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use kvkeep_core::ids::TenantId;
use kvkeep_tiers::dram::{Arena, ArenaConfig};
use rand::{Rng as _, SeedableRng as _};

use crate::common::{KIB, MIB, assert_adds_up, assert_holds, folder, meta, payload, put};

/// Names the folder to the child; this very test binary runs again as the child.
const CHILD_DIR: &str = "KVKEEP_TEST_ARENA_CHILD_DIR";
const ROUNDS: u64 = 12;
const SIZES: [usize; 4] = [700, 30_000, 131_072, 262_144];

fn config(dir: &std::path::Path) -> ArenaConfig {
    ArenaConfig::new(dir.join("arena"), 16 * MIB, 512 * KIB)
}

fn block(n: u64) -> (TenantId, usize) {
    (TenantId(n as u32 % 2), SIZES[n as usize % SIZES.len()])
}

/// Not a test of its own: what the child does. Without the variable it has nothing to do.
#[test]
fn child_that_stores_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let mut next = 0;
    let mut live = std::collections::VecDeque::new();
    let arena = Arena::open(config(dir.as_ref()), &mut |meta, slot| {
        next = next.max(meta.version.0);
        live.push_back((slot, meta.version.0 - 1));
        true
    })
    .unwrap();
    let mut out = std::io::stdout().lock();
    for n in next.. {
        let (tenant, len) = block(n);
        let slot = loop {
            match put(&arena, tenant, n, len) {
                Ok(slot) => break slot,
                Err(_) => {
                    let (slot, old) = live.pop_front().expect("an empty arena has room");
                    writeln!(out, "- {old}").unwrap();
                    out.flush().unwrap();
                    arena.free(slot);
                }
            }
        };
        live.push_back((slot, n));
        writeln!(out, "+ {n}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn what_was_published_before_a_sigkill_is_adopted_right() {
    let seed = std::env::var("KVKEEP_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("KVKEEP_TEST_SEED={seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = folder();
    let mut live = std::collections::BTreeSet::new();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["crash::child_that_stores_until_it_is_killed", "--exact", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let killer = Duration::from_millis(rng.random_range(5..150));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(killer);
            child.kill().unwrap();
            child.wait().unwrap();
        });
        for line in lines.lines().map_while(Result::ok) {
            match line.split_once(' ') {
                Some(("+", n)) => _ = n.parse::<u64>().map(|n| live.insert(n)),
                Some(("-", n)) => _ = n.parse::<u64>().map(|n| live.remove(&n)),
                _ => {}
            }
        }
        killer.join().unwrap();
        let mut offered = std::collections::BTreeMap::new();
        let arena = Arena::open(config(dir.path()), &mut |facts, slot| {
            let n = facts.version.0 - 1;
            let (tenant, len) = block(n);
            assert_eq!(*facts, meta(n, tenant, &payload(n, len)), "round {round}");
            assert!(offered.insert(n, slot).is_none(), "block {n} twice");
            true
        })
        .unwrap();
        let report = arena.adoption().clone();
        assert_eq!((report.torn, report.damaged), (0, 0), "stores of one process are seen in order: {report:?}");
        for n in &live {
            assert!(offered.contains_key(n), "round {round}: block {n} was reported and is gone");
        }
        for (n, slot) in &offered {
            let (tenant, len) = block(*n);
            assert_holds(&arena, *slot, tenant, *n, len);
        }
        assert_adds_up(&arena);
        live = offered.into_keys().collect();
    }
    assert!(!live.is_empty(), "the children stored something");
}
