//! `kvkeepd`: one storage node of KVKeep.
//!
//! Read in this order: [`config`] -> [`store`] (the walk of a block through the tiers) -> [`verbs`] (what may be asked) ->
//! [`service`] (over gRPC) and [`block`] (over the block protocol) -> [`server`] (listeners, drain). [`connection`] knows who is there, [`auth`] who is who, [`counters`] what is
//! counted.
//! What must survive any crash in one order goes through [`consensus`]: [`catalogue`].

pub mod address;
pub mod auth;
pub mod block;
pub mod catalogue;
pub mod cli;
pub mod config;
pub mod connection;
pub mod consensus;
pub mod counters;
mod detach;
pub mod failpoint;
pub mod idle;
pub mod listener;
pub mod machine;
pub mod server;
pub mod service;
pub mod store;
pub mod verbs;

pub use kvkeep_core::size;
