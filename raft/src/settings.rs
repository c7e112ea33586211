//! What is chosen, and every bound of this crate that is not a format's.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::ids::NodeId;

/// Groups of one process.
pub const GROUPS_MAX: usize = 4096;
/// Commands of one group that were taken and not answered yet.
pub const PROPOSALS_MAX: usize = 4096;
/// Bytes of all such commands of a process.
pub const PROPOSAL_BYTES_MAX: usize = 64 << 20;
/// Bytes of one command. Bulk never enters a log; this leaves room for an append of a long prompt's digests.
pub const COMMAND_BYTES_MAX: usize = 4 << 20;
/// Reads of one group that wait for their index.
pub const READS_MAX: usize = 4096;
/// What an overloaded caller waits before it tries again: a few batches.
pub const OVERLOAD_RETRY: Duration = Duration::from_millis(20);
/// Requests that one turn takes in before it writes.
pub const TURN_JOBS_MAX: usize = 4096;
/// Turns that share a batch and a sync.
pub const MERGE_TASKS_MAX: usize = 256;
/// How long a stop waits for commands that were taken.
pub const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Applied entries that a group keeps for members that lag; half of them stay when it is cut.
pub const LOG_ENTRIES_MAX: u64 = 8192;
/// Bytes of them, about: counted since the group was opened or cut.
pub const LOG_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a snapshot that travels in one message. A larger state waits for the way past the messages.
pub const SNAPSHOT_BYTES_MAX: usize = 256 << 20;

/// Bytes of entries in one message to another member.
pub(crate) const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// Messages under way to one member.
pub(crate) const MESSAGES_IN_FLIGHT_MAX: usize = 256;
/// Bytes of entries not committed yet. Above [`PROPOSAL_BYTES_MAX`], so that ours is the bound that is met.
pub(crate) const UNCOMMITTED_BYTES_MAX: u64 = 2 * PROPOSAL_BYTES_MAX as u64;
/// Bytes of entries that are applied in one go.
pub(crate) const COMMITTED_BYTES_PER_READY_MAX: u64 = 4 << 20;
/// Ticks between two heartbeats.
pub(crate) const HEARTBEAT_TICKS: usize = 2;
/// Ticks without a leader before an election, at least; at most twice as many.
pub(crate) const ELECTION_TICKS: usize = 10;

/// Milliseconds of wall clock, for stamps of entries: read by leaders when they propose, never while applying.
pub type StampClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Of one process.
#[derive(Clone)]
pub struct Settings {
    /// This node.
    pub node: NodeId,
    /// Time of one tick: 50 to 100 ms.
    pub tick: Duration,
    /// Stamps entries.
    pub clock: StampClock,
    /// [`LOG_ENTRIES_MAX`] unless a test wants less.
    pub log_entries_max: u64,
    /// [`LOG_BYTES_MAX`] unless a test wants less.
    pub log_bytes_max: u64,
}

impl Settings {
    /// The usual ones.
    pub fn new(node: NodeId, clock: StampClock) -> Self {
        Self {
            node,
            tick: Duration::from_millis(100),
            clock,
            log_entries_max: LOG_ENTRIES_MAX,
            log_bytes_max: LOG_BYTES_MAX,
        }
    }

    /// Raft's own settings for a group whose state machine has applied up to `applied`.
    pub(crate) fn raft(&self, applied: u64) -> raft::Config {
        raft::Config {
            id: self.node.number(),
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: MESSAGES_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            read_only_option: raft::ReadOnlyOption::Safe,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_PER_READY_MAX,
            ..raft::Config::default()
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings").field("node", &self.node).field("tick", &self.tick).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Traps 10 and 11 of embedding raft: its defaults are one entry a message, and no bound on what is not committed and
    /// on what is applied at once.
    #[test]
    fn what_raft_leaves_open_is_set() {
        let raft = Settings::new(NodeId::ALONE, Arc::new(|| 0)).raft(7);
        raft.validate().unwrap();
        assert_eq!(raft.applied, 7);
        assert!(raft.max_size_per_msg > 0);
        assert!(raft.max_uncommitted_size < raft::NO_LIMIT && raft.max_committed_size_per_ready < raft::NO_LIMIT);
        assert!(raft.pre_vote && raft.check_quorum);
        assert!(raft.max_uncommitted_size > PROPOSAL_BYTES_MAX as u64, "ours must be met first");
    }
}
