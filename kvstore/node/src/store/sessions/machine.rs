//! The state machine of group 1: `kvkeep_core::session::Sessions`, as raft drives it.

use std::collections::HashSet;

use kvkeep_core::Digest;
use kvkeep_core::session::{Command, Outcome, Sessions, Write};
use kvkeep_raft::{Committed, Refusal, Reply, StateMachine, Writes};
use parking_lot::{Mutex, RwLock};

/// What the machine and those who read share.
#[derive(Default)]
pub(super) struct Shared {
    /// As applied. Changed by the machine alone.
    pub state: RwLock<Sessions>,
    /// While a sweep is under way: what came to be named since it began.
    pub marks: Mutex<Option<HashSet<Digest>>>,
}

/// Applies commands of group 1.
pub(super) struct Machine {
    shared: std::sync::Arc<Shared>,
    /// What is being loaded. The state that is served stays until it is whole.
    loading: Sessions,
    writes: Vec<Write>,
}

impl Machine {
    pub(super) fn new(shared: std::sync::Arc<Shared>) -> Self {
        Self { shared, loading: Sessions::default(), writes: Vec::new() }
    }
}

impl StateMachine for Machine {
    fn clear(&mut self) {
        self.loading = Sessions::default();
    }

    fn load(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        self.loading.load(key, value).map_err(|e| Refusal(e.to_string()))
    }

    fn loaded(&mut self) -> Result<(), Refusal> {
        self.loading.loaded().map_err(|e| Refusal(e.to_string()))?;
        *self.shared.state.write() = std::mem::take(&mut self.loading);
        Ok(())
    }

    fn apply(&mut self, committed: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal> {
        let command = Command::decode(committed.command).map_err(|e| Refusal(e.to_string()))?;
        self.writes.clear();
        // Held over the change: a sweep begins before it, and is told, or behind it, and sees it. Forks tell nothing: what they
        // name their parents named.
        let mut marks = self.shared.marks.lock();
        let named = match (&command, marks.as_ref()) {
            (Command::Append { digests, text, .. }, Some(_)) => {
                digests.iter().copied().chain(text.map(|t| t.digest)).collect()
            }
            _ => Vec::new(),
        };
        let outcome: kvkeep_core::Result<Outcome> =
            self.shared.state.write().apply(command, committed.clock_ms, &mut self.writes);
        if let Some(marks) = marks.as_mut() {
            marks.extend(named);
        }
        drop(marks);
        for write in self.writes.drain(..) {
            match write {
                Write::Put(key, value) => writes.put(&key, &value),
                Write::Delete(key) => writes.delete(&key),
            }
        }
        Ok(Box::new(outcome))
    }
}
