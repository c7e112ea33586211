//! [`MemIndex`]: an index in memory that forgets what was not synced, for tests and simulations.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use kvkeep_core::error::{Error, ErrorKind, Result};
use parking_lot::{Condvar, Mutex};

use super::index::{Change, Index, Visit};

/// What the next call of a kind shall do instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemFault {
    /// The next sync fails. What it should have made durable may or may not be.
    Sync,
    /// The next write fails and changes nothing.
    Write,
    /// The next get fails.
    Get,
}

/// A map with a durable and a volatile part. Outlives the store on it, as a device outlives a process.
#[derive(Debug, Default)]
pub struct MemIndex {
    state: Mutex<State>,
    /// Syncs may go on.
    free: Condvar,
}

#[derive(Debug, Default)]
struct State {
    durable: BTreeMap<Vec<u8>, Vec<u8>>,
    current: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Batches since the last sync, oldest first. Tests are its only users, and sync: not bounded otherwise.
    log: Vec<Vec<Change>>,
    syncs: u64,
    held: bool,
    fault: Option<MemFault>,
}

impl MemIndex {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The power fails: of the batches written since the last sync only the first `kept` are there afterwards.
    pub fn cut(&self, kept: usize) {
        let mut s = self.state.lock();
        let log = std::mem::take(&mut s.log);
        for batch in log.iter().take(kept) {
            apply(&mut s.durable, batch);
        }
        s.current = s.durable.clone();
    }

    /// Batches written since the last sync.
    pub fn unsynced(&self) -> usize {
        self.state.lock().log.len()
    }

    /// Makes the next call of that kind fail.
    pub fn fail_next(&self, fault: MemFault) {
        self.state.lock().fault = Some(fault);
    }

    /// From now on syncs wait, or no longer: what a slow device does.
    pub fn hold_syncs(&self, hold: bool) {
        self.state.lock().held = hold;
        self.free.notify_all();
    }

    /// How many syncs were asked for so far.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Changes a value behind the store's back: what a flipped bit or a bug would leave.
    pub fn tamper(&self, key: &[u8], value: Option<Vec<u8>>) {
        let mut s = self.state.lock();
        let change = match value {
            Some(value) => Change::Put(key.to_vec(), value),
            None => Change::Delete(key.to_vec()),
        };
        apply(&mut s.durable, std::slice::from_ref(&change));
        apply(&mut s.current, &[change]);
    }

    fn take_fault(s: &mut State, fault: MemFault) -> Result<()> {
        if s.fault.take_if(|f| *f == fault).is_some() {
            return Err(Error::new(ErrorKind::Io, "index fault injected by a test"));
        }
        Ok(())
    }
}

fn apply(map: &mut BTreeMap<Vec<u8>, Vec<u8>>, batch: &[Change]) {
    for change in batch {
        match change {
            Change::Put(key, value) => map.insert(key.clone(), value.clone()),
            Change::Delete(key) => map.remove(key),
        };
    }
}

impl Index for MemIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut s = self.state.lock();
        Self::take_fault(&mut s, MemFault::Get)?;
        Ok(s.current.get(key).cloned())
    }

    fn write(&self, batch: &[Change]) -> Result<()> {
        let mut s = self.state.lock();
        Self::take_fault(&mut s, MemFault::Write)?;
        apply(&mut s.current, batch);
        s.log.push(batch.to_vec());
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut s = self.state.lock();
        self.free.wait_while(&mut s, |s| s.held);
        Self::take_fault(&mut s, MemFault::Sync)?;
        s.syncs += 1;
        for batch in std::mem::take(&mut s.log) {
            apply(&mut s.durable, &batch);
        }
        Ok(())
    }

    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        // In slices, so that the visitor may call back into the index.
        let mut from = Bound::Included(from.to_vec());
        loop {
            let slice: Vec<_> = {
                let s = self.state.lock();
                s.current.range((from, Bound::Unbounded)).take(1024).map(|(k, v)| (k.clone(), v.clone())).collect()
            };
            for (key, value) in &slice {
                if visit(key, value) == ControlFlow::Break(()) {
                    return Ok(());
                }
            }
            let Some((last, _)) = slice.into_iter().next_back() else { return Ok(()) };
            from = Bound::Excluded(last);
        }
    }
}
