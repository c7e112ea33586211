//! The block protocol: frames on the Unix socket and on the block port.
//!
//! Read in this order: [`frame`] (what a frame is) -> [`stream`] (what it travels on) -> [`reader`] (frames out of a
//! stream). The server uses these three as well.

pub mod frame;
pub mod reader;
pub mod stream;
