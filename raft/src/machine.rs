//! [`StateMachine`]: what a group is for. This crate knows its commands, keys and values as bytes.

use std::any::Any;

use crate::format::{seal, state_key};
use crate::ids::GroupId;
use crate::store::{Change, Table};

/// A committed command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed<'a> {
    /// Its place in the log: unique within the group, and never goes back.
    pub index: u64,
    /// Of the leader that proposed it.
    pub term: u64,
    /// Milliseconds by the leaders' clocks: the largest stamp of this command and all before it. It never goes back, and
    /// is the only clock that [`StateMachine::apply`] may look at.
    pub clock_ms: u64,
    /// As it was proposed.
    pub command: &'a [u8],
}

/// What a state machine makes durable while it applies: keys and values of its own, written in one batch with the mark of
/// how far it has applied.
#[derive(Debug)]
pub struct Writes<'a> {
    group: GroupId,
    changes: &'a mut Vec<Change>,
}

impl<'a> Writes<'a> {
    pub(crate) fn new(group: GroupId, changes: &'a mut Vec<Change>) -> Self {
        Self { group, changes }
    }

    /// Sets a value. It comes back in [`StateMachine::load`].
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        self.changes.push(put(self.group, key, value));
    }

    /// Removes a key; not an error where there is none.
    pub fn delete(&mut self, key: &[u8]) {
        self.changes.push(Change::Delete(Table::State, state_key(self.group, key)));
    }
}

/// A key of a state machine, as stored.
pub(crate) fn put(group: GroupId, key: &[u8], value: &[u8]) -> Change {
    let key = state_key(group, key);
    let value = seal::sealed(&key, value);
    Change::Put(Table::State, key, value)
}

/// What a proposer is answered: whatever state machine and proposer agree on. It never travels, for only the leader takes
/// proposals, and applies them itself.
pub type Reply = Box<dyn Any + Send>;

/// Why a state machine cannot go on: a command or a value that it does not understand. The group stands still then, for a
/// member that skips what the others apply has another state than they.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

/// Deterministic: the same commands in the same order make the same state, the same answers and the same writes on every
/// member and after every restart. It reads no clock, draws no random number, and waits for nobody.
///
/// Its durable state is what it put into [`Writes`], as of some index; after a start it is given that back, then the
/// committed commands behind it.
pub trait StateMachine: Send {
    /// Forgets everything: a state follows, from the disk or from another member.
    fn clear(&mut self);

    /// One key of that state, in order of the keys.
    ///
    /// # Errors
    /// If it cannot be understood.
    fn load(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal>;

    /// That was all of it. Checks it as a whole.
    ///
    /// # Errors
    /// If it contradicts itself.
    fn loaded(&mut self) -> Result<(), Refusal>;

    /// Applies one command and says what its proposer is answered. A command that is refused by the rules of the state is
    /// an answer; it is as deterministic as any.
    ///
    /// # Errors
    /// If the command cannot be understood.
    fn apply(&mut self, committed: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal>;
}
