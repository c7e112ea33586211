//! The replicated state of a node: raft groups over one log in `DATA/raft`. One voter today, the same code and the same log
//! later.
//!
//! ```text
//! group 0   the catalogue: tenants, formats, namespaces
//! group 1   sessions
//! ```
//! What a command comes to is an answer of its state machine; errors here mean that nobody knows, or that nothing was taken.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvkeep_core::{Error, ErrorKind, Result};
use kvkeep_raft::{
    Alone, GroupHandle, GroupId, Host, Journal, LogStore, NodeId, Proposed, RocksLog, Settings, StateMachine, Stats,
};
use kvkeep_tiers::nvme::make_dir;

/// First state of a group: keys and values of its state machine.
pub type FirstState = Vec<(Vec<u8>, Vec<u8>)>;

/// The groups of this node.
pub struct Consensus {
    host: Host,
    journal: Arc<Journal>,
    folder: PathBuf,
}

impl Consensus {
    /// The folder of the log.
    pub fn folder(data_dir: &Path) -> PathBuf {
        data_dir.join("raft")
    }

    /// Opens the log below `data_dir`, or makes it.
    ///
    /// # Errors
    /// `Config` if another process has it open, `Corrupt`, `Io`.
    pub fn open(data_dir: &Path) -> Result<Self> {
        let folder = Self::folder(data_dir);
        // RocksDB flushes what is in the folder, not its name.
        make_dir(&folder).map_err(|e| {
            Error::new(ErrorKind::Io, "the folder of the raft log cannot be made")
                .with("path", folder.display())
                .with("cause", e)
        })?;
        let log = RocksLog::open(&folder).map_err(|e| unusable(&e, &folder))?;
        Self::over(Arc::new(log), folder)
    }

    /// Over a log that is open; `folder` is what errors name.
    pub(crate) fn over(log: Arc<dyn LogStore>, folder: PathBuf) -> Result<Self> {
        let journal = Journal::open(log, NodeId::ALONE).map(Arc::new).map_err(|e| unusable(&e, &folder))?;
        let settings = Settings::new(NodeId::ALONE, Arc::new(unix_ms));
        let host = Host::start(Arc::clone(&journal), settings, Box::new(Alone)).map_err(|e| raft_error(&e))?;
        Ok(Self { host, journal, folder })
    }

    /// Whether the log has this group.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub fn holds(&self, group: GroupId) -> Result<bool> {
        self.journal.holds(group).map_err(|e| unusable(&e, &self.folder))
    }

    /// Opens a group; one that the log does not have begins with `first`. Blocks.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub fn group(
        &self,
        id: GroupId,
        machine: Box<dyn StateMachine>,
        first: impl FnOnce() -> FirstState,
    ) -> Result<Group> {
        if !self.holds(id)? {
            self.journal.create(id, &[NodeId::ALONE], &first()).map_err(|e| unusable(&e, &self.folder))?;
        }
        let handle = self.host.open(id, machine).map_err(|e| unusable(&e, &self.folder).with("group", id))?;
        let group = Group { handle };
        // Until a leader has committed in its term, what was committed before may not be applied yet.
        group.barrier_blocking()?;
        Ok(group)
    }

    /// What was written so far.
    pub fn stats(&self) -> Stats {
        self.host.stats()
    }

    /// Ends it: what was taken is finished first. Blocks.
    pub fn stop(&self) -> Result<()> {
        self.host.stop().map_err(|e| raft_error(&e))
    }
}

/// One group, to those who change it.
#[derive(Clone)]
pub struct Group {
    handle: GroupHandle,
}

impl Group {
    /// Proposes a command and waits for what its state machine answers: it is in the synced log then, and applied.
    ///
    /// # Errors
    /// `Throttled` where too much waits already (nothing was taken), `Unavailable` where the group has failed or stops.
    pub async fn propose<T: 'static>(&self, command: Vec<u8>) -> Result<T> {
        match self.handle.propose(command).map_err(|e| raft_error(&e))? {
            Proposed::Queued(pending) => {
                let answer = pending.await.map_err(|e| raft_error(&e))?;
                answer.take::<T>().map_err(|e| raft_error(&e))
            }
            Proposed::Overloaded { retry_after } => Err(Error::new(
                ErrorKind::Throttled,
                "as many changes of sessions and namespaces wait as may wait; nothing was done",
            )
            .retry_after(retry_after)),
        }
    }

    /// [`Self::propose`] on a thread that may block.
    ///
    /// # Errors
    /// The same.
    pub fn propose_blocking<T: 'static>(&self, command: Vec<u8>) -> Result<T> {
        let proposed = self.handle.propose(command).map_err(|e| raft_error(&e))?;
        let answer = proposed.queued().ok_or_else(busy)?.wait().map_err(|e| raft_error(&e))?;
        answer.take::<T>().map_err(|e| raft_error(&e))
    }

    /// Index of the last entry that is applied.
    pub fn applied(&self) -> u64 {
        self.handle.applied()
    }

    /// Why the group takes no changes any more, if that is so.
    pub fn failure(&self) -> Option<Error> {
        self.handle.failure().map(|e| raft_error(&e))
    }

    /// Waits until everything that was acknowledged before is applied here.
    pub(crate) fn barrier_blocking(&self) -> Result<()> {
        let asked = self.handle.read_barrier().map_err(|e| raft_error(&e))?;
        asked.queued().ok_or_else(busy)?.wait().map_err(|e| raft_error(&e))?;
        Ok(())
    }
}

fn busy() -> Error {
    Error::new(ErrorKind::Throttled, "the raft group is overloaded; nothing was done")
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// A log that a node cannot start on.
fn unusable(e: &kvkeep_raft::Error, folder: &Path) -> Error {
    use kvkeep_raft::ErrorKind as Raft;
    let (kind, message) = match e.kind() {
        Raft::Corrupt | Raft::Broken => (
            ErrorKind::Corrupt,
            "the raft log is damaged: without it no block can be told from another. Restore the folder from a backup, or \
             move the data folder away to start empty",
        ),
        Raft::NewerVersion => (ErrorKind::Corrupt, "the raft log was written by a newer version: start that one"),
        Raft::Machine => (
            ErrorKind::Corrupt,
            "what the raft log holds is not understood: start the version that wrote it, or restore the folder from a backup",
        ),
        // What RocksDB calls a failed read is as often a file that somebody has removed.
        Raft::Io => (
            ErrorKind::Io,
            "the raft log cannot be read or written: look at the disk, or restore the folder from a backup",
        ),
        _ => return raft_error(e).with("path", folder.display()),
    };
    Error::new(kind, message).with("path", folder.display()).with("cause", e)
}

/// A failure of raft in the words of the node.
pub(crate) fn raft_error(e: &kvkeep_raft::Error) -> Error {
    use kvkeep_raft::ErrorKind as Raft;
    let (kind, message) = match e.kind() {
        Raft::InvalidArgument => (ErrorKind::TooLarge, "the change is larger than one change may be; split it"),
        Raft::Conflict => (ErrorKind::Config, "the raft log is open elsewhere, or another node's"),
        Raft::Corrupt | Raft::NewerVersion | Raft::UnknownGroup | Raft::Machine | Raft::Broken => {
            (ErrorKind::Corrupt, "the raft log cannot be read as it is")
        }
        Raft::Io | Raft::Poisoned => {
            (ErrorKind::Io, "the raft log failed a write; it takes nothing more until the node is started again")
        }
        Raft::NotLeader | Raft::Superseded | Raft::Stopped => {
            (ErrorKind::Unavailable, "the change was not taken; try again")
        }
        Raft::Unknown => (ErrorKind::Unavailable, "the end of the change was not seen: it is made, or not"),
    };
    Error::new(kind, message).with("cause", e)
}
