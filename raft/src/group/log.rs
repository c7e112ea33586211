//! [`GroupLog`]: one group's part of the store, as raft reads it.
//!
//! Writing has a delay: changes go into the turn's task, and raft must be able to read them back at once. So the newest
//! entries are kept in memory until the store has them and the state machine is durably past them; older ones are read from
//! the store.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::error::{Error, ErrorKind, Result};
use crate::format::records::{Applied, LogStart, check_members, decode_hard_state, encode_hard_state};
use crate::format::{self, entry, seal, snapshot};
use crate::ids::GroupId;
use crate::machine::{self, StateMachine};
use crate::settings::{SNAPSHOT_BYTES_MAX, Settings};
use crate::store::{Change, LogStore, Table};

pub(crate) struct GroupLog {
    group: GroupId,
    store: Arc<dyn LogStore>,
    hard: HardState,
    start: LogStart,
    applied: Applied,
    last: u64,
    /// The newest entries, up to `last`.
    tail: VecDeque<Entry>,
    /// Of applied entries since the log was opened or cut.
    applied_bytes: u64,
    entries_max: u64,
    bytes_max: u64,
    /// Why a read failed. Raft panics on it and forgets the reason.
    failure: RefCell<Option<Error>>,
}

fn missing(what: &'static str, group: GroupId) -> Error {
    Error::new(ErrorKind::Corrupt, "a record of the group is missing").with("record", what).with("group", group)
}

impl GroupLog {
    /// # Errors
    /// `UnknownGroup`, `Corrupt`, `NewerVersion`, `Io`.
    pub fn open(store: Arc<dyn LogStore>, group: GroupId, settings: &Settings) -> Result<Self> {
        let key = format::hard_state_key(group);
        let hard = store
            .get(Table::Meta, &key)?
            .ok_or_else(|| Error::new(ErrorKind::UnknownGroup, "no such group here").with("group", group))?;
        let hard = decode_hard_state(&key, &hard)?;
        let key = format::log_start_key(group);
        let start = store.get(Table::Meta, &key)?.ok_or_else(|| missing("start", group))?;
        let start = LogStart::decode(&key, &start)?;
        let key = format::applied_key(group);
        let applied = store.get(Table::State, &key)?.ok_or_else(|| missing("applied", group))?;
        let applied = Applied::decode(&key, &applied)?;
        let tail: VecDeque<_> = read(&*store, group, applied.index + 1, u64::MAX, u64::MAX)?.into();
        let last = tail.back().map_or(applied.index, |e| e.index);
        if !(start.index <= applied.index && applied.index <= hard.commit && hard.commit <= last) {
            return Err(Error::new(ErrorKind::Corrupt, "the records of the group contradict each other")
                .with("group", group)
                .with("start", start.index)
                .with("applied", applied.index)
                .with("commit", hard.commit)
                .with("last", last));
        }
        Ok(Self {
            group,
            store,
            hard,
            start,
            applied,
            last,
            tail,
            applied_bytes: 0,
            entries_max: settings.log_entries_max,
            bytes_max: settings.log_bytes_max,
            failure: RefCell::default(),
        })
    }

    /// Gives the state machine the state that stands in the store.
    pub fn load(&self, machine: &mut dyn StateMachine) -> Result<()> {
        machine.clear();
        self.pairs(|key, value| machine.load(key, value).map_err(|r| refused(self.group, &r)))?;
        machine.loaded().map_err(|r| refused(self.group, &r))
    }

    /// The state machine's keys and values as the store has them, and how far they are: of one moment.
    fn pairs(&self, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<Applied> {
        let (mut applied, mut failed) = (None, None);
        let applied_key = format::applied_key(self.group);
        let mut visit = |key: &[u8], value: &[u8]| -> Result<bool> {
            if key == applied_key {
                applied = Some(Applied::decode(key, value)?);
                return Ok(true);
            }
            let Some(own) = format::machine_key(self.group, key) else { return Ok(false) };
            each(own, seal::open(key, value)?.1)?;
            Ok(true)
        };
        self.store.scan(Table::State, &applied_key, &mut |key, value| match visit(key, value) {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) => ControlFlow::Break(()),
            Err(e) => {
                failed = Some(e);
                ControlFlow::Break(())
            }
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        applied.ok_or_else(|| missing("applied", self.group))
    }

    pub fn applied(&self) -> &Applied {
        &self.applied
    }

    pub fn take_failure(&self) -> Option<Error> {
        self.failure.borrow_mut().take()
    }

    /// Takes entries in; those they take the place of go.
    pub fn append(&mut self, entries: Vec<Entry>, changes: &mut Vec<Change>) {
        let (Some(first), Some(new_last)) = (entries.first().map(|e| e.index), entries.last().map(|e| e.index)) else {
            return;
        };
        let old_last = self.last;
        while self.last >= first {
            // Above what is applied, so it is in memory.
            self.tail.pop_back();
            self.last -= 1;
        }
        if old_last > new_last {
            let (from, to) = (format::entry_key(self.group, new_last + 1), format::entry_key(self.group, old_last + 1));
            changes.push(Change::DeleteRange(Table::Log, from, to));
        }
        for e in &entries {
            let key = format::entry_key(self.group, e.index);
            let value = entry::encode(&key, e);
            changes.push(Change::Put(Table::Log, key, value));
        }
        self.tail.extend(entries);
        self.last = new_last;
    }

    pub fn set_hard(&mut self, hard: HardState, changes: &mut Vec<Change>) {
        self.hard = hard;
        let key = format::hard_state_key(self.group);
        let value = encode_hard_state(&key, &self.hard);
        changes.push(Change::Put(Table::Meta, key, value));
    }

    /// One more entry was applied; `clock_ms` is the group's clock after it.
    pub fn entry_applied(&mut self, entry: &Entry, clock_ms: u64) {
        self.applied.index = entry.index;
        self.applied.term = entry.term;
        self.applied.clock_ms = clock_ms;
        self.applied_bytes += entry.data.len() as u64;
    }

    pub fn set_members(&mut self, members: ConfState) -> Result<()> {
        check_members(&members)?;
        self.applied.members = members;
        Ok(())
    }

    /// Writes down how far the state machine is, in the batch of what it wrote itself, with a commit that is not behind it,
    /// and cuts the log where it is too long.
    pub fn write_applied(&mut self, changes: &mut Vec<Change>) -> Result<()> {
        let key = format::applied_key(self.group);
        let value = self.applied.encode(&key);
        changes.push(Change::Put(Table::State, key, value));
        let commit = self.hard.commit.max(self.applied.index);
        self.set_hard(HardState { commit, ..self.hard.clone() }, changes);
        self.cut(changes)
    }

    fn cut(&mut self, changes: &mut Vec<Change>) -> Result<()> {
        let kept = self.applied.index - self.start.index;
        let to = if self.applied_bytes > self.bytes_max {
            self.applied.index
        } else if kept > self.entries_max {
            self.applied.index - self.entries_max / 2
        } else {
            return Ok(());
        };
        let term = self.term_of(to)?;
        let (from, end) = (format::entry_key(self.group, self.start.index), format::entry_key(self.group, to + 1));
        changes.push(Change::DeleteRange(Table::Log, from, end));
        self.set_start(LogStart { index: to, term }, changes);
        self.applied_bytes = 0;
        Ok(())
    }

    fn set_start(&mut self, start: LogStart, changes: &mut Vec<Change>) {
        self.start = start;
        let key = format::log_start_key(self.group);
        let value = start.encode(&key);
        changes.push(Change::Put(Table::Meta, key, value));
    }

    /// Puts a snapshot in the place of everything: log and state.
    pub fn install(
        &mut self,
        meta: &SnapshotMetadata,
        clock_ms: u64,
        pairs: &snapshot::Pairs,
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        for table in [Table::Log, Table::State] {
            changes.push(Change::DeleteRange(table, format::group_from(self.group), format::group_to(self.group)));
        }
        changes.extend(pairs.iter().map(|(key, value)| machine::put(self.group, key, value)));
        self.tail.clear();
        self.last = meta.index;
        let members = meta.conf_state.clone().unwrap_or_default();
        check_members(&members)?;
        self.applied = Applied { index: meta.index, term: meta.term, clock_ms, members };
        self.applied_bytes = 0;
        self.set_start(LogStart { index: meta.index, term: meta.term }, changes);
        self.write_applied(changes)
    }

    /// The store has everything up to a turn after which the state machine was at `applied`.
    pub fn trim(&mut self, applied: u64) {
        while self.tail.front().is_some_and(|e| e.index <= applied) {
            self.tail.pop_front();
        }
    }

    #[cfg(test)]
    pub fn tail_len(&self) -> usize {
        self.tail.len()
    }

    fn tail_from(&self) -> u64 {
        self.last + 1 - self.tail.len() as u64
    }

    fn term_of(&self, index: u64) -> Result<u64> {
        if index == self.start.index {
            return Ok(self.start.term);
        }
        if let Some(at) = index.checked_sub(self.tail_from()) {
            return self.tail.get(at as usize).map(|e| e.term).ok_or_else(|| missing("entry", self.group));
        }
        let entries = read(&*self.store, self.group, index, index + 1, u64::MAX)?;
        entries.first().map(|e| e.term).ok_or_else(|| missing("entry", self.group))
    }

    fn range(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>> {
        let from_memory = self.tail_from().max(low);
        let mut entries = Vec::new();
        if low < from_memory {
            let to = high.min(from_memory);
            entries = read(&*self.store, self.group, low, to, bytes_max)?;
            if (entries.len() as u64) < to - low {
                return Ok(entries);
            }
        }
        let mut bytes: u64 = entries.iter().map(bytes_of).sum();
        for index in from_memory..high {
            let at = (index - self.tail_from()) as usize;
            let e = self.tail.get(at).ok_or_else(|| missing("entry", self.group))?;
            bytes += bytes_of(e);
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(e.clone());
        }
        Ok(entries)
    }

    fn make_snapshot(&self) -> Result<Snapshot> {
        let mut writer = snapshot::Writer::new();
        let applied = self.pairs(|key, value| {
            if writer.bytes() + key.len() + value.len() > SNAPSHOT_BYTES_MAX {
                return Err(Error::new(ErrorKind::Broken, "the state is too large for a snapshot in a message"));
            }
            writer.add(key, value);
            Ok(())
        })?;
        // The clock of that moment, not of this one: members that got here by entries have the same.
        let data = writer.finish(applied.clock_ms);
        let metadata = SnapshotMetadata { conf_state: Some(applied.members), index: applied.index, term: applied.term };
        Ok(Snapshot { data, metadata: Some(metadata) })
    }

    fn failed(&self, error: Error) -> raft::Error {
        self.failure.replace(Some(error.clone()));
        raft::Error::Store(StorageError::Other(Box::new(error)))
    }
}

pub(crate) fn refused(group: GroupId, refusal: &machine::Refusal) -> Error {
    Error::new(ErrorKind::Machine, "the state machine cannot go on").with("group", group).with("why", &refusal.0)
}

fn bytes_of(entry: &Entry) -> u64 {
    // What stands beside the data in a message is less than this.
    entry.data.len() as u64 + 32
}

/// Entries from `low` up to and without `high`, as many as there are and as fit, but one at least. A gap is damage.
fn read(store: &dyn LogStore, group: GroupId, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>> {
    let (mut entries, mut bytes, mut failed) = (Vec::new(), 0, None);
    store.scan(Table::Log, &format::entry_key(group, low), &mut |key, value| {
        let Some(index) = format::entry_index(group, key).filter(|i| *i < high) else { return ControlFlow::Break(()) };
        match entry::decode(key, index, value) {
            Ok(_) if index != low + entries.len() as u64 => failed = Some(missing("entry", group).with("index", index)),
            Ok(e) => {
                bytes += bytes_of(&e);
                if bytes <= bytes_max || entries.is_empty() {
                    entries.push(e);
                    return ControlFlow::Continue(());
                }
            }
            Err(e) => failed = Some(e),
        }
        ControlFlow::Break(())
    })?;
    failed.map_or(Ok(entries), Err)
}

impl Storage for GroupLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: self.applied.members.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.start.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        self.range(low, high, max_size.into().unwrap_or(u64::MAX)).map_err(|e| self.failed(e))
    }

    fn term(&self, idx: u64) -> raft::Result<u64> {
        if idx < self.start.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if idx > self.last {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        self.term_of(idx).map_err(|e| self.failed(e))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.start.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last)
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let made = self.make_snapshot().map_err(|e| self.failed(e))?;
        // The store lags behind by the turns that are being written.
        if made.get_metadata().index < request_index {
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(made)
    }
}
