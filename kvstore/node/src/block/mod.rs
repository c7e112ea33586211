//! The block protocol: the hot verbs on the Unix socket and on the block port, with the same checks, bounds and errors as
//! gRPC, for both stand on [`crate::verbs`].
//!
//! Read in this order: `peer` (one connection as its calls see it) -> `connection` (frames in, calls started) ->
//! `payload` (bytes that travel) -> `regions` of the store, `into` and `from` (bytes that do not) -> `accept`
//! (ports, TLS, and which of the two protocols a Unix peer speaks).
//!
//! ```text
//! accept ─> connection: reads frames ─┬─ hello, cancel, release, touch, lease, short matches, payload: at once
//!                                     └─ everything that may wait: a task per call, at most limits.calls_per_connection_max
//!                                            └─> peer.send: one frame at a time; a heartbeat every 40 ms while calls run
//! ```
//! What a byte stream brings is behind one seam, [`kvkeep_client::block::stream`]: another transport (RDMA) is another
//! variant of its two halves, and `get_into` and `put_from` over registered memory is how it will move blocks.

pub mod accept;
mod connection;
mod from;
mod into;
mod payload;
mod peer;
mod scatter;

use std::time::Duration;

/// A connection says hello within this time, or is closed.
const HELLO_WAIT: Duration = Duration::from_secs(2);
/// Bytes of an envelope before hello.
const HELLO_BYTES_MAX: usize = 16 << 10;
/// Hellos of one connection; one more closes it.
const HELLOS_MAX: u32 = 16;
/// A frame that has begun goes on within this time, or its connection is closed.
const FRAME_PATIENCE: Duration = Duration::from_secs(10);
/// A peer that takes nothing of a frame for so long has gone.
const SEND_PATIENCE: Duration = Duration::from_secs(10);
/// A connection with calls in flight hears something at least so often; the protocol promises 50 ms.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(40);
/// Connections that are being told apart, or shake hands, at a time.
const GREETING_MAX: usize = 256;
