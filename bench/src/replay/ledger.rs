//! What the store has promised: every block acknowledged `durable`, by name and version, to be asked for again at the end.

use std::collections::HashMap;

use kvkeep_core::{GroupId, ShardId, Version};
use parking_lot::Mutex;

use crate::keys::PrefixId;

/// Blocks remembered; about 48 bytes each. Acknowledgements beyond are counted and not checked.
pub const LEDGER_BLOCKS_MAX: usize = 4 << 20;

/// One block of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockName {
    /// Its position.
    pub id: PrefixId,
    /// Which group.
    pub group: GroupId,
    /// Which shard.
    pub shard: ShardId,
}

/// The promises, shared by all engines.
#[derive(Default)]
pub struct Ledger {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    blocks: HashMap<BlockName, Option<Version>>,
    untracked: u64,
}

impl Ledger {
    /// Notes an acknowledgement. The version is unknown where the block was there before and the server did not say.
    pub fn note(&self, block: BlockName, version: Option<Version>) {
        let mut state = self.state.lock();
        if let Some(known) = state.blocks.get_mut(&block) {
            *known = version.or(*known);
        } else if state.blocks.len() < LEDGER_BLOCKS_MAX {
            state.blocks.insert(block, version);
        } else {
            state.untracked += 1;
        }
    }

    /// Different blocks acknowledged and remembered.
    pub fn len(&self) -> usize {
        self.state.lock().blocks.len()
    }

    /// Whether nothing was acknowledged.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Acknowledgements beyond [`LEDGER_BLOCKS_MAX`].
    pub fn untracked(&self) -> u64 {
        self.state.lock().untracked
    }

    /// All promises, in order of their names.
    pub fn promises(&self) -> Vec<(BlockName, Option<Version>)> {
        let mut all: Vec<_> = self.state.lock().blocks.iter().map(|(b, v)| (*b, *v)).collect();
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_known_version_stands() {
        let ledger = Ledger::default();
        let block = BlockName { id: PrefixId(1), group: GroupId(0), shard: ShardId(0) };
        ledger.note(block, Some(Version(7)));
        ledger.note(block, None);
        ledger.note(BlockName { shard: ShardId(1), ..block }, None);
        assert_eq!(ledger.len(), 2);
        assert_eq!(ledger.promises()[0], (block, Some(Version(7))));
    }
}
