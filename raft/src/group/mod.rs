//! [`Group`]: one raft group on this node, without threads and clocks. `log` is what raft reads; `waiting` is who must be answered.
//!
//! The order of a turn, which everything rests on:
//!
//! ```text
//! take in proposals, reads, messages, ticks
//! while raft has something ready:
//!     messages of a leader go out at once               (it may replicate what it has not persisted itself)
//!     snapshot, entries, hard state -> the turn's batch, and readable in memory before raft is told to go on
//!     committed entries -> state machine; its writes, how far it is and a commit not behind it -> the same batch
//!     who proposed is answered: what is committed was persisted before
//! the batch is written and synced, with those of other groups and turns
//! persisted: raft is told; messages of a follower go out; a snapshot counts as applied
//! ```

pub(crate) mod log;
#[cfg(test)]
mod tests;
pub(crate) mod waiting;

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use prost_for_raft::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType, Message, Snapshot};
use raft::{RawNode, StateRole};

use self::log::{GroupLog, refused};
use self::waiting::{Answer, Asker, Waiting};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{entry, snapshot};
use crate::ids::GroupId;
use crate::journal::Journal;
use crate::logger::logger;
use crate::machine::{Committed, Reply, StateMachine, Writes};
use crate::settings::Settings;
use crate::store::Change;

/// What handles and driver share of a group.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Taken and not answered.
    pub requests: Arc<AtomicUsize>,
    pub failed: OnceLock<Error>,
    pub leads: AtomicBool,
    pub applied: AtomicU64,
}

/// What a group adds to a turn. Kept apart from the other groups' until it is whole.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    pub changes: Vec<Change>,
    pub sync: bool,
    /// Of the last ready; 0 if there was none.
    pub number: u64,
    /// To be sent at once.
    pub now: Vec<Message>,
    /// To be sent once the batch is durable.
    pub after: Vec<Message>,
}

/// A snapshot that is in the batch: raft counts it as applied only when it has been persisted, and panics before.
#[derive(Clone, Copy, Debug)]
struct Installing {
    number: u64,
    index: u64,
}

/// One group.
pub struct Group {
    id: GroupId,
    node: RawNode<GroupLog>,
    machine: Box<dyn StateMachine>,
    waiting: Waiting,
    installing: Option<Installing>,
    shared: Arc<Shared>,
    settings: Settings,
}

impl Group {
    /// Opens a group of the journal's store, and brings its state machine to where it was when that was last written.
    ///
    /// # Errors
    /// `UnknownGroup`, `Corrupt`, `NewerVersion`, `Machine`, `Io`.
    pub(crate) fn open(
        journal: &Journal,
        settings: &Settings,
        id: GroupId,
        mut machine: Box<dyn StateMachine>,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let log = GroupLog::open(Arc::clone(journal.store()), id, settings)?;
        log.load(&mut *machine)?;
        let applied = log.applied().index;
        shared.applied.store(applied, Ordering::Release);
        let members = log.applied().members.clone();
        let node = RawNode::new(&settings.raft(applied), log, &logger(id)).map_err(|e| broken("open", id, &e))?;
        let mut group = Self {
            id,
            node,
            machine,
            waiting: Waiting::default(),
            installing: None,
            shared,
            settings: settings.clone(),
        };
        // Who votes alone need not wait for the silence of others.
        if members.voters == [settings.node.number()] && members.voters_outgoing.is_empty() {
            group.node.campaign().map_err(|e| broken("campaign", id, &e))?;
        }
        Ok(group)
    }

    pub(crate) fn id(&self) -> GroupId {
        self.id
    }

    pub(crate) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) fn propose(&mut self, command: &[u8], asker: Asker<Answer>) -> Result<()> {
        // Raft would forward it to the leader, and the answer would be lost on the way.
        if self.node.raft.state != StateRole::Leader {
            asker.tell(Err(self.not_leader("this node does not lead the group")));
            return Ok(());
        }
        let data = entry::stamped((self.settings.clock)(), command);
        match self.node.propose(Vec::new(), data) {
            // Only where it stands. What becomes of it is known when an entry at this place is applied.
            Ok(()) => self.waiting.proposed(self.node.raft.raft_log.last_index(), self.node.raft.term, asker),
            Err(raft::Error::ProposalDropped) => {
                asker.tell(Err(self.not_leader("the group takes no proposals at this moment")));
            }
            Err(e) => {
                asker.tell(Err(broken("propose", self.id, &e)));
                return Err(broken("propose", self.id, &e));
            }
        }
        Ok(())
    }

    fn not_leader(&self, message: &'static str) -> Error {
        let error = Error::new(ErrorKind::NotLeader, message).with("group", self.id);
        match self.node.raft.leader_id {
            0 => error,
            leader => error.with("leader", leader),
        }
    }

    pub(crate) fn read(&mut self, asker: Asker<u64>) {
        let id = self.waiting.read(asker);
        self.node.read_index(id.to_be_bytes().to_vec());
    }

    pub(crate) fn receive(&mut self, message: Message) -> Result<()> {
        match self.node.step(message) {
            // From one that is no member any more, or not yet.
            Ok(()) | Err(raft::Error::StepPeerNotFound | raft::Error::StepLocalMsg) => Ok(()),
            Err(e) => Err(broken("take a message", self.id, &e)),
        }
    }

    pub(crate) fn tick(&mut self) {
        self.node.tick();
        self.ask_for_reads();
    }

    fn ask_for_reads(&mut self) {
        for id in self.waiting.reads_without_index() {
            self.node.read_index(id.to_be_bytes().to_vec());
        }
    }

    /// Everything that is ready, into the turn.
    pub(crate) fn ready(&mut self, staged: &mut Staged) -> Result<()> {
        while self.node.has_ready() {
            let mut rd = self.node.ready();
            staged.number = rd.number();
            staged.sync |= rd.must_sync();
            staged.now.extend(rd.take_messages());
            for read in rd.take_read_states() {
                if let Ok(id) = <[u8; 8]>::try_from(&read.request_ctx[..]) {
                    self.waiting.read_index(u64::from_be_bytes(id), read.index);
                }
            }
            if !rd.snapshot().is_empty() {
                self.install(rd.number(), rd.snapshot(), &mut staged.changes)?;
            }
            let entries = rd.take_entries();
            self.node.mut_store().append(entries, &mut staged.changes);
            if let Some(hs) = rd.hs() {
                self.node.mut_store().set_hard(hs.clone(), &mut staged.changes);
            }
            staged.after.extend(rd.take_persisted_messages());
            let committed = rd.take_committed_entries();
            self.node.advance_append_async(rd);
            self.apply(committed, &mut staged.changes)?;
        }
        self.waiting.answer_reads(self.node.store().applied().index);
        self.shared.leads.store(self.node.raft.state == StateRole::Leader, Ordering::Release);
        Ok(())
    }

    fn install(&mut self, number: u64, snapshot: &Snapshot, changes: &mut Vec<Change>) -> Result<()> {
        let (clock_ms, pairs) = snapshot::decode(&snapshot.data)?;
        let meta = snapshot.get_metadata();
        self.machine.clear();
        for (key, value) in &pairs {
            self.machine.load(key, value).map_err(|r| refused(self.id, &r))?;
        }
        self.machine.loaded().map_err(|r| refused(self.id, &r))?;
        self.node.mut_store().install(meta, clock_ms, &pairs, changes)?;
        self.waiting.skipped(meta.index);
        self.installing = Some(Installing { number, index: meta.index });
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>, changes: &mut Vec<Change>) -> Result<()> {
        let Some(last) = entries.last().map(|e| e.index) else { return Ok(()) };
        for e in entries {
            let mut clock_ms = self.node.store().applied().clock_ms;
            let mut reply: Reply = Box::new(());
            // The type first: leaving a joint configuration is a change of members without data.
            match e.get_entry_type() {
                EntryType::EntryConfChange => {
                    let change = ConfChange::decode(&e.data[..]).map_err(|err| unreadable(self.id, &e, &err))?;
                    let members =
                        self.node.apply_conf_change(&change).map_err(|e| broken("change members", self.id, &e))?;
                    self.node.mut_store().set_members(members)?;
                }
                EntryType::EntryConfChangeV2 => {
                    let change = ConfChangeV2::decode(&e.data[..]).map_err(|err| unreadable(self.id, &e, &err))?;
                    let members =
                        self.node.apply_conf_change(&change).map_err(|e| broken("change members", self.id, &e))?;
                    self.node.mut_store().set_members(members)?;
                }
                // The first entry of a leader's term.
                EntryType::EntryNormal if e.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let (stamp_ms, command) = entry::unstamped(&e.data)?;
                    clock_ms = clock_ms.max(stamp_ms);
                    let committed = Committed { index: e.index, term: e.term, clock_ms, command };
                    reply = self
                        .machine
                        .apply(committed, &mut Writes::new(self.id, changes))
                        .map_err(|r| refused(self.id, &r).with("index", e.index))?;
                }
            }
            self.node.mut_store().entry_applied(&e, clock_ms);
            self.waiting.applied(e.index, e.term, reply);
        }
        self.node.mut_store().write_applied(changes)?;
        self.node.advance_apply_to(last);
        self.shared.applied.store(last, Ordering::Release);
        // What raft dropped because nothing was committed in this term it may take now.
        self.ask_for_reads();
        Ok(())
    }

    /// How far the state machine is.
    pub(crate) fn applied(&self) -> u64 {
        self.node.store().applied().index
    }

    /// Every turn up to the one with this ready is durable, and with it the state as of `applied`.
    pub(crate) fn persisted(&mut self, number: u64, applied: u64) {
        if number > 0 {
            self.node.on_persist_ready(number);
        }
        if let Some(installed) = self.installing.take_if(|i| i.number <= number) {
            self.node.advance_apply_to(installed.index);
            self.shared.applied.store(installed.index, Ordering::Release);
        }
        self.node.mut_store().trim(applied);
    }

    /// The group ends here; others go on.
    pub(crate) fn fail(mut self, error: Error) {
        tracing::error!(group = %self.id, %error, "raft group failed");
        let error = self.node.store().take_failure().unwrap_or(error);
        let error = self.shared.failed.get_or_init(|| error).clone();
        self.shared.leads.store(false, Ordering::Release);
        self.waiting.fail(&error);
    }
}

fn broken(doing: &'static str, group: GroupId, cause: &raft::Error) -> Error {
    Error::new(ErrorKind::Broken, "raft refused").with("group", group).with("doing", doing).with("cause", cause)
}

fn unreadable(group: GroupId, entry: &Entry, cause: &prost_for_raft::DecodeError) -> Error {
    Error::new(ErrorKind::Corrupt, "a committed change of members cannot be read")
        .with("group", group)
        .with("index", entry.index)
        .with("cause", cause)
}
