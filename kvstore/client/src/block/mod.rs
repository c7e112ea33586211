//! The block protocol: frames on the Unix socket and on the block port.
//!
//! Read in this order: [`frame`] (what a frame is) -> [`stream`] (what it travels on) -> [`reader`] (frames out of a
//! stream). The server uses these three as well, and [`table`] (where mapped parts lie). Then `conn` (a connection and its calls) -> [`pool`] (connections, and
//! which way they go) -> [`breaker`] (a server that is gone is not asked) -> [`faults`] (playing that). `sockets` is for forked
//! children.

pub mod breaker;
pub(crate) mod conn;
pub mod faults;
pub mod frame;
pub mod pool;
pub mod reader;
pub(crate) mod sockets;
pub mod stream;
pub mod table;
