//! Consensus for the metadata of a node: many raft groups in one process over one log. Knows nothing of KV.
//!
//! Read in this order: [`ids`], [`error`], [`settings`] (every bound) -> [`machine`] (what a group is for) -> [`mod@format`] (what
//! stands on the disk) -> [`store`] (the seam to it) -> [`journal`] (many groups, one batch, one sync) -> [`group`] (one group,
//! and the order of its steps) -> [`engine`] (all of them, turn by turn, without threads) -> [`handle`] (how callers reach
//! one) -> [`host`] (the threads) -> [`transport`] (the seam to other nodes).
//!
//! What a proposer that was answered `Ok` may believe: its command is in the log of a majority of the voters, synced, and the
//! state machine here has applied it; no crash and no power cut of this node takes that back.
//!
//! One node runs all this with one voter per group. Transport and changes of members come with the cluster; log, snapshots and
//! the loop are what they will be.
//!
//! ```
//! use std::sync::Arc;
//! use kvkeep_raft::*;
//!
//! /// Remembers the last command.
//! #[derive(Default)]
//! struct Last(Vec<u8>);
//!
//! impl StateMachine for Last {
//!     fn clear(&mut self) {
//!         self.0.clear();
//!     }
//!     fn load(&mut self, _: &[u8], value: &[u8]) -> Result<(), Refusal> {
//!         self.0 = value.to_vec();
//!         Ok(())
//!     }
//!     fn loaded(&mut self) -> Result<(), Refusal> {
//!         Ok(())
//!     }
//!     fn apply(&mut self, committed: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal> {
//!         writes.put(b"last", committed.command);
//!         Ok(Box::new(std::mem::replace(&mut self.0, committed.command.to_vec())))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let journal = Arc::new(Journal::open(Arc::new(MemLog::new()), NodeId::ALONE)?);
//! journal.create(GroupId::ZERO, &[NodeId::ALONE], &vec![(b"last".to_vec(), b"first".to_vec())])?;
//! let host = Host::start(journal, Settings::new(NodeId::ALONE, Arc::new(|| 0)), Box::new(Alone))?;
//! let group = host.open(GroupId::ZERO, Box::new(Last::default()))?;
//! match group.propose(b"second".to_vec())? {
//!     Proposed::Queued(pending) => assert_eq!(pending.wait()?.take::<Vec<u8>>()?, b"first"),
//!     Proposed::Overloaded { retry_after } => println!("again in {retry_after:?}"),
//! }
//! host.stop()?;
//! # Ok(())
//! # }
//! ```

pub mod engine;
pub mod error;
pub mod format;
pub mod group;
pub mod handle;
pub mod host;
pub mod ids;
pub mod journal;
mod logger;
pub mod machine;
pub mod settings;
pub mod store;
pub mod transport;

pub use engine::Engine;
pub use error::{Error, ErrorKind};
pub use group::waiting::Answer;
pub use handle::{GroupHandle, Pending, Proposed};
pub use host::Host;
pub use ids::{GroupId, NodeId};
pub use journal::{Journal, Stats, Task};
pub use machine::{Committed, Refusal, Reply, StateMachine, Writes};
pub use raft::eraftpb::Message;
pub use settings::Settings;
pub use store::mem::{MemFault, MemLog};
pub use store::rocks::RocksLog;
pub use store::{Change, LogStore, Table};
pub use transport::{Alone, Transport};
