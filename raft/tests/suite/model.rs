//! The property suite, the same over both stores: what was acknowledged is there after a cut; what was applied stays applied, in
//! one order; clocks of groups never go back; reads are not early.

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

use crate::sim::{CUTS, Cut, Device, Mem, Rocks, Sim};

#[derive(Clone, Debug)]
enum Step {
    Propose { group: usize, count: usize },
    Read { group: usize },
    Turn,
    Persist { count: usize },
    Tick,
    Clock { ms: u64 },
    Settle,
    Cut { cut: Cut, count: usize, kept: u32 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kept = prop_oneof![2 => any::<u32>(), 1 => Just(u32::MAX)];
    let step = prop_oneof![
        8 => (0..3usize, 1..6usize).prop_map(|(group, count)| Step::Propose { group, count }),
        2 => (0..3usize).prop_map(|group| Step::Read { group }),
        8 => Just(Step::Turn),
        6 => (1..4usize).prop_map(|count| Step::Persist { count }),
        1 => Just(Step::Tick),
        1 => (0..3000u64).prop_map(|ms| Step::Clock { ms }),
        1 => Just(Step::Settle),
        2 => (prop::sample::select(&CUTS[..]), 0..4usize, kept)
            .prop_map(|(cut, count, kept)| Step::Cut { cut, count, kept }),
    ];
    prop::collection::vec(step, 1..60)
}

/// What the cases had in them, all together: a suite that tests nothing must not pass.
#[derive(Default)]
struct Seen {
    acknowledged: usize,
    reads: usize,
    cuts: usize,
}

fn holds<D: Device>(device: D, groups: usize, entries_max: u64, steps: Vec<Step>, seen: &mut Seen) {
    let mut sim = Sim::new(device, groups, entries_max);
    for step in steps {
        match step {
            Step::Propose { group, count } => sim.propose(group, count),
            Step::Read { group } => sim.read(group),
            Step::Turn => drop(sim.turn()),
            Step::Persist { count } => sim.persist(count),
            Step::Tick => sim.tick(),
            Step::Clock { ms } => sim.set_clock(ms),
            Step::Settle => sim.settle(),
            Step::Cut { cut, count, kept } => {
                sim.cut(cut, count, kept);
                // The log is replayed; only then is everything there again.
                sim.settle();
                seen.cuts += 1;
            }
        }
    }
    sim.settle();
    seen.acknowledged += sim.acknowledged;
    seen.reads += sim.reads_answered;
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn suite<D: Device>(test: &str, cases: u32, device: impl Fn() -> D) {
    let seed = from_env("KVKEEP_SEED").unwrap_or(1);
    let config = ProptestConfig {
        cases: from_env("KVKEEP_ROUNDS").map_or(cases, |n| n as u32),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let seen = std::cell::RefCell::new(Seen::default());
    // A log of so few entries is cut all the time.
    let strategy = (1..4usize, prop_oneof![2..12u64, Just(8192)], steps());
    let result = TestRunner::new(config).run(&strategy, |(groups, entries_max, steps)| {
        holds(device(), groups, entries_max, steps, &mut seen.borrow_mut());
        Ok(())
    });
    if let Err(e) = result {
        panic!("{e}\n\nagain: KVKEEP_SEED={seed} cargo test -p kvkeep-raft --test suite {test}");
    }
    let seen = seen.into_inner();
    assert!(seen.acknowledged > 0 && seen.reads > 0 && seen.cuts > 0);
}

#[test]
fn the_log_in_memory_loses_nothing_that_was_acknowledged() {
    suite("the_log_in_memory", 400, Mem::default);
}

#[test]
fn rocksdb_loses_nothing_that_was_acknowledged() {
    suite("rocksdb_loses_nothing", 16, Rocks::new);
}

/// Every step of the loop, with every number of batches kept.
#[test]
fn a_cut_at_every_step() {
    fn through<D: Device>(device: impl Fn() -> D, turns: &[usize], kept: &[u32]) {
        for cut in CUTS {
            for &turns_before in turns {
                for &kept in kept {
                    let mut sim = Sim::new(device(), 2, 3);
                    for turn in 0..5 {
                        sim.propose(0, 2);
                        sim.propose(1, 1);
                        sim.turn();
                        if turn < turns_before {
                            sim.persist(1);
                        }
                    }
                    sim.cut(cut, 2, kept);
                    sim.settle();
                    sim.propose(0, 1);
                    sim.settle();
                }
            }
        }
    }
    through(Mem::default, &[0, 1, 2, 3], &[0, 1, 2, 3, u32::MAX]);
    through(Rocks::new, &[0, 2], &[77, u32::MAX]);
}
