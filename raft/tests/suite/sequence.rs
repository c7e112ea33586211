//! A state machine that remembers everything it was given, in order, and checks what it is given back.

use std::sync::Arc;

use kvkeep_raft::{Answer, Committed, Refusal, Reply, StateMachine, Writes};
use parking_lot::Mutex;

/// One applied command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// What was proposed.
    pub id: u64,
    /// Where it stood.
    pub index: u64,
    /// The group's clock then.
    pub clock_ms: u64,
}

/// What the test sees of it.
pub type View = Arc<Mutex<Vec<Item>>>;

/// The machine. The answer to a command is its position.
pub struct Sequence(pub View);

/// A command.
pub fn command(id: u64) -> Vec<u8> {
    id.to_le_bytes().to_vec()
}

/// The position in an answer.
pub fn position(answer: Answer) -> usize {
    answer.take().unwrap()
}

fn number(bytes: &[u8]) -> Result<u64, Refusal> {
    bytes.try_into().map(u64::from_le_bytes).map_err(|_| Refusal("not a number".into()))
}

impl StateMachine for Sequence {
    fn clear(&mut self) {
        self.0.lock().clear();
    }

    fn load(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let mut items = self.0.lock();
        if key != (items.len() as u64).to_be_bytes() || value.len() != 24 {
            return Err(Refusal(format!("{key:?} after {} items", items.len())));
        }
        let (id, index, clock_ms) = (number(&value[..8])?, number(&value[8..16])?, number(&value[16..])?);
        items.push(Item { id, index, clock_ms });
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn apply(&mut self, committed: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal> {
        let item = Item { id: number(committed.command)?, index: committed.index, clock_ms: committed.clock_ms };
        let mut items = self.0.lock();
        let position = items.len() as u64;
        let value = [item.id, item.index, item.clock_ms].map(u64::to_le_bytes).concat();
        writes.put(&position.to_be_bytes(), &value);
        items.push(item);
        Ok(Box::new(position as usize))
    }
}
