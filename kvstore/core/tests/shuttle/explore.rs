//! How far each scenario is explored.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};

/// Schedules are drawn from it: the same ones every time.
const SEED: u64 = 0x4b56_4b65_6570;
/// Preemptions in the right places that a schedule of [`random`] has up to: what most known bugs need.
const PCT_DEPTH: usize = 3;

fn run(what: &str, scheduler: impl Scheduler + 'static, scenario: fn()) -> usize {
    let explored = catch_unwind(AssertUnwindSafe(|| Runner::new(scheduler, Config::default()).run(scenario)));
    explored.unwrap_or_else(|panic| {
        eprintln!("{what} failed; `shuttle::replay` runs the schedule above again");
        resume_unwind(panic)
    })
}

/// Every interleaving there is. How many there were.
pub fn every(scenario: fn()) -> usize {
    let n = run("an exhaustive search", DfsScheduler::new(None, false), scenario);
    println!("{n} interleavings");
    n
}

/// So many interleavings, half of them uniformly random, half with few preemptions in unlikely places.
pub fn random(iterations: usize, scenario: fn()) {
    let half = iterations / 2;
    run(&format!("random, seed {SEED:#x}"), RandomScheduler::new_from_seed(SEED, half), scenario);
    let pct = PctScheduler::new_from_seed(SEED, PCT_DEPTH, half);
    run(&format!("PCT of depth {PCT_DEPTH}, seed {SEED:#x}"), pct, scenario);
}

/// A broken variant must fail, for the reason that it was broken for.
pub fn catches<T>(because: &str, explore: impl FnOnce() -> T) {
    let explored = catch_unwind(AssertUnwindSafe(explore));
    let panic = explored.err().expect("a broken variant was not caught");
    let said = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_default();
    assert!(said.contains(because), "caught for another reason: {said}");
}
