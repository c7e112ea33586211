//! [`MemLog`]: a store in memory with a durable and a volatile part, for tests and simulations.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use parking_lot::Mutex;

use super::{Change, LogStore, Table, Visit};
use crate::error::{Error, ErrorKind, Result};

/// What the next call of a kind shall do instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemFault {
    /// The next sync fails. What it should have made durable may or may not be.
    Sync,
    /// The next write fails and changes nothing.
    Write,
    /// The next get or scan fails.
    Read,
}

type Map = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

/// Outlives the host on it, as a disk outlives a process.
#[derive(Debug, Default)]
pub struct MemLog(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    durable: Map,
    current: Map,
    /// Batches since the last sync, oldest first. Tests are its only users, and sync: not bounded otherwise.
    volatile: Vec<Vec<Change>>,
    syncs: u64,
    fault: Option<MemFault>,
}

impl MemLog {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The power fails: of the batches written since the last sync only the first `kept` are there afterwards.
    pub fn cut(&self, kept: usize) {
        let mut s = self.0.lock();
        let volatile = std::mem::take(&mut s.volatile);
        for batch in volatile.iter().take(kept) {
            apply(&mut s.durable, batch);
        }
        s.current = s.durable.clone();
    }

    /// Batches written since the last sync.
    pub fn unsynced(&self) -> usize {
        self.0.lock().volatile.len()
    }

    /// Makes the next call of that kind fail.
    pub fn fail_next(&self, fault: MemFault) {
        self.0.lock().fault = Some(fault);
    }

    /// How many syncs there were.
    pub fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }

    /// Changes the store behind everybody's back: what a flipped bit or a bug would leave.
    pub fn tamper(&self, change: Change) {
        let mut s = self.0.lock();
        apply(&mut s.durable, std::slice::from_ref(&change));
        apply(&mut s.current, &[change]);
    }
}

fn take_fault(s: &mut State, fault: MemFault) -> Result<()> {
    if s.fault.take_if(|f| *f == fault).is_some() {
        return Err(Error::new(ErrorKind::Io, "a fault injected by a test"));
    }
    Ok(())
}

fn apply(map: &mut Map, batch: &[Change]) {
    for change in batch {
        match change {
            Change::Put(table, key, value) => {
                map.insert((*table, key.clone()), value.clone());
            }
            Change::Delete(table, key) => {
                map.remove(&(*table, key.clone()));
            }
            Change::DeleteRange(table, from, to) => {
                map.retain(|(t, key), _| t != table || key < from || key >= to);
            }
        }
    }
}

impl LogStore for MemLog {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut s = self.0.lock();
        take_fault(&mut s, MemFault::Read)?;
        Ok(s.current.get(&(table, key.to_vec())).cloned())
    }

    fn write(&self, changes: &[Change]) -> Result<()> {
        let mut s = self.0.lock();
        take_fault(&mut s, MemFault::Write)?;
        apply(&mut s.current, changes);
        s.volatile.push(changes.to_vec());
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut s = self.0.lock();
        take_fault(&mut s, MemFault::Sync)?;
        s.syncs += 1;
        for batch in std::mem::take(&mut s.volatile) {
            apply(&mut s.durable, &batch);
        }
        Ok(())
    }

    fn scan(&self, table: Table, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let mut s = self.0.lock();
        take_fault(&mut s, MemFault::Read)?;
        for ((t, key), value) in s.current.range((table, from.to_vec())..) {
            if *t != table || visit(key, value) == ControlFlow::Break(()) {
                break;
            }
        }
        Ok(())
    }
}
