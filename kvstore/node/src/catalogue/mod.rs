//! The catalogue of a node: raft group 0. Reads look at the state; changes go through the log.
//!
//! ```text
//! apply -> does it change anything? no:  answered from the state, nothing is logged
//!                                   yes: proposed -> synced -> `machine` applies it, sets the views -> answered
//! ```
//! Read in this order: [`machine`] (commands, keys and values) -> this -> [`old_file`] (where it was before, and how it moves).

pub mod machine;
pub mod old_file;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use kvkeep_core::catalogue::{Catalogue, Command, Outcome};
use kvkeep_core::{DigestKey, Error, ErrorKind, Result};
use kvkeep_raft::GroupId;

use crate::consensus::{Consensus, FirstState, Group};
use crate::store::namespaces::Views;
use machine::{Machine, Shared, encode_command, first_state};
use old_file::OldFile;

/// The group of the catalogue.
pub const GROUP: GroupId = GroupId::ZERO;

/// The catalogue, to those who read and change it.
pub struct Registry {
    group: Group,
    shared: Arc<Shared>,
}

impl Registry {
    /// Opens group 0 and fills the views. A store that has none begins with what the old file holds, or, where nothing was ever
    /// stored, with a fresh secret. Blocks.
    ///
    /// # Errors
    /// `Corrupt` if there are blocks and nothing that names them, or if what there is is damaged; `Io`.
    pub fn open(consensus: &Consensus, data_dir: &Path, views: Arc<Views>) -> Result<Self> {
        let file = OldFile::new(data_dir);
        let first =
            if consensus.holds(GROUP)? { FirstState::new() } else { first_state(&found_or_new(&file, data_dir)?) };
        let shared = Arc::new(Shared::new(views));
        let group = consensus.group(GROUP, Box::new(Machine::new(Arc::clone(&shared))), || first)?;
        // Only now: until the group is durable the file is all there is.
        file.retire()?;
        Ok(Self { group, shared })
    }

    /// What keys the store's digests.
    pub fn digest_key(&self) -> DigestKey {
        self.shared.catalogue.read().digest_key()
    }

    /// Changes the catalogue; durable, and in the views, when this returns. What changes nothing is answered at once, and what
    /// the rules refuse is refused at once, without a word in the log: engines may register as often as they like. With one
    /// voter what is applied here is all that was ever acknowledged.
    ///
    /// # Errors
    /// What the rules say; `Throttled`, `Unavailable`, `Io` as [`Group::propose`].
    pub async fn apply(&self, command: Command) -> Result<Outcome> {
        match self.answer(&command)? {
            Some(outcome) => Ok(outcome),
            None => self.group.propose::<Result<Outcome>>(encode_command(&command)).await?,
        }
    }

    /// [`Self::apply`] on a thread that may block.
    ///
    /// # Errors
    /// The same.
    pub fn apply_blocking(&self, command: &Command) -> Result<Outcome> {
        match self.answer(command)? {
            Some(outcome) => Ok(outcome),
            None => self.group.propose_blocking::<Result<Outcome>>(encode_command(command))?,
        }
    }

    fn answer(&self, command: &Command) -> Result<Option<Outcome>> {
        self.shared.catalogue.read().answer(command)
    }

    /// Why it takes no changes any more, if that is so. Reads go on.
    pub fn failure(&self) -> Option<Error> {
        self.group.failure()
    }
}

fn found_or_new(file: &OldFile, data_dir: &Path) -> Result<Catalogue> {
    match file.load()? {
        Some(parts) => Catalogue::from_parts(parts).map_err(|e| file.damaged(e)),
        None if holds_blocks(data_dir) => Err(lost(data_dir)),
        None => Ok(Catalogue::new(DigestKey::from_bytes(rand::random()))),
    }
}

/// Refuses a folder that has blocks and neither a raft log nor an old file, before anything is made in it: a backup is best
/// put where nothing is.
///
/// # Errors
/// `Corrupt`; it says what to restore.
pub fn refuse_orphans(data_dir: &Path) -> Result<()> {
    let nameless = !Consensus::folder(data_dir).exists() && !OldFile::new(data_dir).exists();
    if nameless && holds_blocks(data_dir) { Err(lost(data_dir)) } else { Ok(()) }
}

fn holds_blocks(data_dir: &Path) -> bool {
    data_dir.join("nvme").exists()
}

fn lost(data_dir: &Path) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        "the data folder has blocks and no catalogue: restore the folder `raft`, or move the data folder away to start empty",
    )
    .with("path", data_dir.display())
}
