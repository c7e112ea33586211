//! What tests of the real binary need. The tests themselves lie in `tests/`.
//!
//! The map: [`node`] starts, kills, stops and restarts a `kvkeepd`; [`formats`] and [`payload`] make namespaces and bytes
//! that can be checked without being remembered; [`raw`] and [`raw_block`] speak the wires by hand, for what the SDK refuses to say;
//! [`ledger`] remembers what was acknowledged; [`workload`] is a seeded client that puts, reads and removes and checks
//! every byte; [`sessions`] the same for sessions; [`leaks`] is what must be true of a node that nobody uses any more; [`powercut`] plays the loss of power.
//!
//! A test that draws anything at random takes its seed from [`seed`], prints it, and can be run again with it.

pub mod formats;
pub mod leaks;
pub mod ledger;
pub mod node;
pub mod payload;
pub mod powercut;
pub mod raw;
pub mod raw_block;
pub mod sessions;
pub mod workload;

pub use node::{Node, Options, address_to_keep};

/// Fixes the seed of a test run.
pub const SEED_VARIABLE: &str = "KVKEEP_SEED";
/// Sets how many rounds the crash tests play.
pub const ROUNDS_VARIABLE: &str = "KVKEEP_ROUNDS";

/// The seed of this run: from [`SEED_VARIABLE`], or drawn. Prints how to run `test` again with it; cargo shows that when
/// the test fails.
///
/// # Panics
/// If the variable is no number.
pub fn seed(test: &str) -> u64 {
    let seed = number(SEED_VARIABLE).unwrap_or_else(rand::random);
    println!("seed {seed}; again: {SEED_VARIABLE}={seed} cargo test -p kvkeep-tests --test node -- {test}");
    seed
}

/// Rounds to play: from [`ROUNDS_VARIABLE`], or `default`.
///
/// # Panics
/// If the variable is no number.
pub fn rounds(default: u64) -> u64 {
    number(ROUNDS_VARIABLE).unwrap_or(default)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {text:?}")))
}

/// Says on the terminal that a test did not run and why. `print!` would be swallowed for a test that passes; writing to
/// the stream is not.
pub fn skipped(test: &str, why: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "\nSKIPPED {test}: {why}"); // nowhere to say it: nothing more can be done
}
