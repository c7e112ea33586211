//! [`Journal`]: the one way to write a store. Turns of many groups become one batch and one sync; the first failure ends all
//! writing.
//!
//! After a failed fsync the kernel takes the lost pages for clean, and the next fsync succeeds without having saved them. So
//! a failure is not retried: the journal is **poisoned** until the store is opened again.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use raft::eraftpb::{ConfState, HardState, Message};

use crate::error::{Error, ErrorKind, Result};
use crate::format::records::{Applied, LogStart, StoreRecord, check_members, encode_hard_state};
use crate::format::{self, STORE_KEY, snapshot::Pairs};
use crate::ids::{GroupId, NodeId};
use crate::machine;
use crate::store::{Change, LogStore, Table};

/// Index and term that every group begins at: nothing was proposed before, and every member begins with a state and the
/// same members.
pub(crate) const FIRST_INDEX: u64 = 1;
const FIRST_TERM: u64 = 1;

/// What a group waits for.
#[derive(Debug)]
pub struct Done {
    pub(crate) group: GroupId,
    /// Number of the group's last ready in the turn; 0 if there was none.
    pub(crate) number: u64,
    /// How far the group's state machine is once this is written.
    pub(crate) applied: u64,
    /// Promises to other members that hold only once this is durable.
    pub(crate) messages: Vec<Message>,
}

/// What one turn of all groups wants written. To be persisted in the order of the turns, empty ones too: a report of one is a
/// report of all before it.
#[derive(Debug, Default)]
pub struct Task {
    pub(crate) changes: Vec<Change>,
    /// A group waits for its durability.
    pub(crate) sync: bool,
    pub(crate) done: Vec<Done>,
}

impl Task {
    /// Whether a group waits until this is durable.
    pub fn must_sync(&self) -> bool {
        self.sync
    }

    /// What would be written.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

/// Counted since the journal was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Batches written.
    pub batches: u64,
    /// Syncs of the log.
    pub syncs: u64,
}

/// The store, its counts, and whether it failed.
pub struct Journal {
    store: Arc<dyn LogStore>,
    poison: OnceLock<Error>,
    batches: AtomicU64,
    syncs: AtomicU64,
}

impl Journal {
    /// Takes a store over. An empty one becomes this node's.
    ///
    /// # Errors
    /// `Conflict` if it is another node's, `NewerVersion`, `Corrupt`, `Io`.
    pub fn open(store: Arc<dyn LogStore>, node: NodeId) -> Result<Self> {
        let journal =
            Self { store, poison: OnceLock::new(), batches: AtomicU64::default(), syncs: AtomicU64::default() };
        match journal.store.get(Table::Meta, STORE_KEY)? {
            Some(value) => {
                let found = StoreRecord::decode(&value)?;
                if found.node != node {
                    return Err(Error::new(ErrorKind::Conflict, "this raft log is another node's")
                        .with("node", node)
                        .with("log_of", found.node));
                }
            }
            None => {
                let record = StoreRecord { node }.encode();
                journal.write(&[Change::Put(Table::Meta, STORE_KEY.to_vec(), record)], true)?;
            }
        }
        Ok(journal)
    }

    /// Makes a group that begins with this state and these voters; durable when this returns. `state` is in any order.
    ///
    /// All its first members must be given the same.
    ///
    /// # Errors
    /// `Conflict` if the group is there, `Poisoned`, `Io`.
    pub fn create(&self, group: GroupId, voters: &[NodeId], state: &Pairs) -> Result<()> {
        if self.holds(group)? {
            return Err(Error::new(ErrorKind::Conflict, "the group is there already").with("group", group));
        }
        let members = ConfState { voters: voters.iter().map(|v| v.number()).collect(), ..ConfState::default() };
        check_members(&members)?;
        let (hard, start, applied) =
            (format::hard_state_key(group), format::log_start_key(group), format::applied_key(group));
        let hs = HardState { term: FIRST_TERM, vote: 0, commit: FIRST_INDEX };
        let log_start = LogStart { index: FIRST_INDEX, term: FIRST_TERM };
        let first = Applied { index: FIRST_INDEX, term: FIRST_TERM, clock_ms: 0, members };
        let mut changes = vec![
            Change::Put(Table::Meta, hard.clone(), encode_hard_state(&hard, &hs)),
            Change::Put(Table::Meta, start.clone(), log_start.encode(&start)),
            Change::Put(Table::State, applied.clone(), first.encode(&applied)),
        ];
        changes.extend(state.iter().map(|(key, value)| machine::put(group, key, value)));
        self.write(&changes, true)
    }

    /// Whether the store has this group.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    pub fn holds(&self, group: GroupId) -> Result<bool> {
        Ok(self.store.get(Table::Meta, &format::hard_state_key(group))?.is_some())
    }

    /// All groups of the store, by number.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    pub fn groups(&self) -> Result<Vec<GroupId>> {
        let mut groups = Vec::new();
        self.store.scan(Table::Meta, format::GROUPS_FROM, &mut |key, _| {
            if !key.starts_with(format::GROUPS_FROM) {
                return ControlFlow::Break(());
            }
            groups.extend(format::group_of_hard_state(key));
            ControlFlow::Continue(())
        })?;
        Ok(groups)
    }

    /// Persists turns in their order, with one batch and at most one sync, and says what they waited for.
    ///
    /// # Errors
    /// `Poisoned`; then nobody may be told anything.
    pub fn persist(&self, tasks: impl IntoIterator<Item = Task>) -> Result<Vec<Done>> {
        let mut whole = Task::default();
        for task in tasks {
            whole.changes.extend(task.changes);
            whole.sync |= task.sync;
            whole.done.extend(task.done);
        }
        self.write(&whole.changes, whole.sync)?;
        Ok(whole.done)
    }

    /// Makes durable what was written so far.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn sync(&self) -> Result<()> {
        self.check()?;
        self.store.sync().map_err(|e| self.poisoned("sync", &e))?;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The last call of a life: the next start finds everything in its place, and damage of it.
    ///
    /// # Errors
    /// `Poisoned`.
    pub fn close(&self) -> Result<()> {
        self.check()?;
        self.store.close().map_err(|e| self.poisoned("close", &e))
    }

    fn write(&self, changes: &[Change], sync: bool) -> Result<()> {
        self.check()?;
        if !changes.is_empty() {
            self.store.write(changes).map_err(|e| self.poisoned("write", &e))?;
            self.batches.fetch_add(1, Ordering::Relaxed);
        }
        if sync { self.sync() } else { Ok(()) }
    }

    fn check(&self) -> Result<()> {
        self.poison.get().cloned().map_or(Ok(()), Err)
    }

    fn poisoned(&self, doing: &'static str, cause: &Error) -> Error {
        let error = Error::new(
            ErrorKind::Poisoned,
            "the raft log failed and takes nothing more until the next start: look at the disk",
        )
        .with("doing", doing)
        .with("cause", cause);
        tracing::error!(%error, "raft log poisoned");
        self.poison.get_or_init(|| error).clone()
    }

    pub(crate) fn store(&self) -> &Arc<dyn LogStore> {
        &self.store
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        Stats { batches: self.batches.load(Ordering::Relaxed), syncs: self.syncs.load(Ordering::Relaxed) }
    }
}
