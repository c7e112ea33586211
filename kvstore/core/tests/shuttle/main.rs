//! Interleavings, explored by `shuttle`: the real steps of [`kvkeep_core::call_word`], [`kvkeep_core::slot_entry`] and
//! [`kvkeep_core::holds`], over words, locks and threads of its scheduler. What lies around them (memory, the allocator
//! of slots, the directory of leases) is modelled, in the smallest form that can go wrong.
//!
//! Every check has a broken twin beside it that must be caught: a check that cannot fail says nothing. Shuttle explores
//! sequentially consistent interleavings only; why the orderings are enough stands with the code.
//!
//! A failure prints its schedule: `shuttle::replay(scenario, "<that schedule>")` in place of the `explore` call runs it
//! again, and again, under a debugger if need be.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod call_word;
mod explore;
mod holds;
mod slot_entry;
