//! The gRPC services: they check what came in, call the [`crate::store`], and spell the answer.
//!
//! [`call`] (who calls, until when) -> [`blocks`] (every verb) -> [`admin`] (what operators ask).

pub mod admin;
pub mod blocks;
pub mod call;
mod events;
mod streams;
