//! The face of this SDK for engines: synchronous, thread-safe, fork-safe. What engines in other languages stand on; every verb
//! is the async [`Client`](crate::Client)'s, run by one thread.
//!
//! A store must never be worse than no store, so: no method panics, none waits beyond its bound, and a server that is down,
//! stopped or started anew is misses. An error means that the call itself is wrong (or that this process can have no
//! descriptors). The first call connects; while the server stays away calls are misses at once, and it is found again in the
//! background, within a second. On the Unix socket and the block port a loss is noticed after
//! [`ClientConfig::patience`](crate::ClientConfig::patience) (100 ms) of silence; gRPC has no sign of life, so there the call's
//! deadline is the bound.
//!
//! ```no_run
//! # fn f(format: kvkeep_core::Format, keys: Vec<bytes::Bytes>) -> kvkeep_client::Result<()> {
//! use kvkeep_client::engine::{Engine, EngineConfig, Outcome};
//! use kvkeep_client::{Call, Geometry, GetItem, MatchQuery, Region};
//! let engine = Engine::open(EngineConfig::new("my-model", format, "digest of the weights"))?;
//! let region = Region::new(1000 * 65536)?; // or the engine's own: Region::from_descriptor
//! // SAFETY: a block is given to one call at a time, and looked at when that call has ended.
//! let blocks = unsafe { Geometry::new([(region.place(0, 65536), 65536)], 1000)? };
//! let call = Call::of(kvkeep_core::RequestId::new(b"request 1")?);
//! let found = engine.match_chain(MatchQuery::of(keys.clone()).leased(std::time::Duration::from_secs(30)), &call)?;
//! let hits = found.boundary_positions as usize;
//! let items: Vec<_> = keys[..hits].iter().cloned().map(GetItem::of).collect();
//! let places = blocks.places(&(0..hits as u32).collect::<Vec<_>>())?;
//! let ticket = engine.submit_get(0, items, places, found.lease_id(), call)?.ticket(); // None: busy, compute instead
//! for done in engine.poll(0, 64)? { // or when engine.event_fd(0)? is readable
//!     if let (Outcome::Got(parts), true) = (&done.outcome, Some(done.ticket) == ticket) {
//!         let _usable = parts.iter().take_while(|part| part.is_hit()).count();
//!     }
//! }
//! engine.release(found.lease_id().into_iter().collect(), vec![])?;
//! # Ok(()) }
//! ```
//!
//! **Threads.** All I/O is one thread's, `kvkeep-engine`, started by the first call and ended with the engine. Callers hand it
//! a future and wait, or poll. Submitted calls are bounded per queue ([`EngineConfig::in_flight_max`]); one too many is
//! [`Submission::Busy`].
//!
//! **Forks.** Every entry looks first whether it is in a child of the process that it knows (one load, see `process`). In a
//! child what the parent had is neither used nor dropped: the runtime, its thread, its locks lie there as they lay. Only the
//! child's copies of the sockets are closed, by numbers that the client keeps for this purpose; a server would otherwise
//! take the parent for alive as long as its child. Then everything begins anew, with a fresh instance id. Regions go on
//! being usable, and are registered again. Tickets, completions and event descriptors of the parent stay the parent's. A child
//! that does not use the engine calls [`Engine::after_fork`] (from Python: `os.register_at_fork`), or keeps the sockets
//! open.
//!
//! The map: [`config`](EngineConfig) -> `life` (what a process has: thread, client, queues) -> `jobs` (the way to the thread
//! and back) -> `contact` (is the server there?) -> `io` (the verbs on the thread) -> `calls` and `submit` (the verbs of
//! callers), `queue`, `losses` (errors made into misses), `others` (sessions, and whatever else is no hot verb), `events`,
//! `describe`.

mod calls;
mod config;
mod contact;
mod describe;
mod events;
mod io;
mod jobs;
mod life;
mod losses;
mod others;
mod queue;
mod submit;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

pub use config::{EngineConfig, IN_FLIGHT_MAX, QUEUES_MAX};
pub use describe::{Description, EngineCounters, QueueLengths, RegionState};
pub use events::{Events, Told};
pub use queue::{Completion, Outcome, Submission, Ticket};

use crate::block::faults::Fault;
use crate::call::Call;
use crate::error::Result;
use crate::process::PerProcess;
use life::Life;

/// Longest deadline of a call; a longer one is taken for this.
pub const DEADLINE_MAX: Duration = Duration::from_secs(600);
/// Longest wait of the methods that wait for something of their own; a longer one is taken for this.
pub const WAIT_MAX: Duration = Duration::from_secs(3600);

/// An engine's store. Shared by all its threads (`&Engine`, or an `Arc`).
pub struct Engine {
    config: Arc<EngineConfig>,
    life: PerProcess<Life>,
}

impl Engine {
    /// Checks the configuration. Nothing is connected and no thread is started: the first call does that.
    ///
    /// # Errors
    /// `config` where the configuration is wrong, or where this process can have no more descriptors.
    pub fn open(config: EngineConfig) -> Result<Self> {
        config.validate()?;
        let config = Arc::new(config);
        let life = PerProcess::of(Life::begin(&config, None)?);
        Ok(Self { config, life })
    }

    /// How it was opened.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Names this process to servers; another one in every forked child.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn instance(&self) -> Result<kvkeep_core::InstanceId> {
        Ok(self.life()?.io.client.config().instance)
    }

    /// In a forked child: closes the copies of the parent's sockets, now and not with the first call. Elsewhere it does nothing.
    pub fn after_fork(&self) {
        if let Some(parents) = self.life.inherited() {
            parents.close_in_child();
        }
    }

    /// Plays a lost server, for tests of programs that use this. Not inherited by forked children.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn inject(&self, fault: Fault) -> Result<()> {
        self.life()?.io.client.inject(fault);
        Ok(())
    }

    /// What this process has, begun anew in a forked child.
    fn life(&self) -> Result<&Life> {
        self.life.get_or_try(|parents| {
            // First, and again never: what is dialled below gets numbers of its own.
            parents.into_iter().for_each(Life::close_in_child);
            Life::begin(&self.config, parents)
        })
    }

    fn within(&self, call: &Call) -> Duration {
        call.deadline.unwrap_or(self.config.client.deadline).min(DEADLINE_MAX)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // In a child that never used it. Its own life, if any, ends itself.
        self.after_fork();
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("config", &self.config).finish_non_exhaustive()
    }
}
