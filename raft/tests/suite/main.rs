//! The crate from outside: a property suite over both stores (`model`, on the simulation in `sim`), the threads (`host`), and a
//! process that is killed (`kill`).
//!
//! Seeds: every random test runs from a fixed seed. `KVKEEP_SEED=n` gives another, `KVKEEP_ROUNDS=n` more cases; a failure
//! prints the line that shows it again.

#![expect(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod host;
mod kill;
mod model;
mod sequence;
mod sim;
