//! The arena from outside: a model under random operations, files of a previous life, room and who gets it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adoption;
mod common;
mod crash;
mod model;
mod room;
