//! [`Engine`]: the groups of a node, turn by turn, without threads. The host runs one in a thread of its own; simulations turn it
//! by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use raft::eraftpb::Message;

use crate::error::{Error, ErrorKind, Result};
use crate::group::waiting::{Answer, Asker};
use crate::group::{Group, Shared, Staged};
use crate::handle::{GroupHandle, Intake};
use crate::ids::GroupId;
use crate::journal::{Done, Journal, Task};
use crate::machine::StateMachine;
use crate::settings::{GROUPS_MAX, Settings, TURN_JOBS_MAX};
use crate::transport::Transport;

/// What the groups are asked, in the order it came.
pub(crate) enum Job {
    Propose { group: GroupId, command: Vec<u8>, asker: Asker<Answer> },
    Read { group: GroupId, asker: Asker<u64> },
    Add(Box<Group>),
    Persisted(Vec<Done>),
    Poisoned(Error),
    Stop,
}

/// All groups of a node.
pub struct Engine {
    journal: Arc<Journal>,
    settings: Settings,
    transport: Box<dyn Transport>,
    intake: Arc<Intake>,
    jobs: Receiver<Job>,
    groups: BTreeMap<GroupId, Group>,
    /// Those that something happened to since the last turn.
    touched: BTreeSet<GroupId>,
    stopping: bool,
}

impl Engine {
    /// Without groups.
    pub fn new(journal: Arc<Journal>, settings: Settings, transport: Box<dyn Transport>) -> Self {
        let (sender, jobs) = channel();
        Self {
            journal,
            settings,
            transport,
            intake: Arc::new(Intake::new(sender)),
            jobs,
            groups: BTreeMap::new(),
            touched: BTreeSet::new(),
            stopping: false,
        }
    }

    pub(crate) fn intake(&self) -> &Arc<Intake> {
        &self.intake
    }

    pub(crate) fn sender(&self) -> Sender<Job> {
        self.intake.sender()
    }

    /// Opens a group of the store.
    ///
    /// # Errors
    /// `UnknownGroup`, `Conflict` if it is open, `Corrupt`, `NewerVersion`, `Machine`, `Io`.
    pub fn open(&mut self, id: GroupId, machine: Box<dyn StateMachine>) -> Result<GroupHandle> {
        let (group, handle) = open(&self.journal, &self.settings, &self.intake, id, machine)?;
        self.add(group);
        Ok(handle)
    }

    fn add(&mut self, group: Group) {
        self.touched.insert(group.id());
        self.groups.insert(group.id(), group);
    }

    /// Whether no group owes anybody an answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.touched.is_empty() && self.groups.values().all(|g| !g.waits())
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Takes in what has come. `true` if there was anything.
    pub fn take_in(&mut self) -> bool {
        self.take_in_within(Duration::ZERO)
    }

    /// The same, after waiting for it.
    pub(crate) fn take_in_within(&mut self, patience: Duration) -> bool {
        let first = match self.jobs.recv_timeout(patience) {
            Ok(job) => job,
            // The engine itself holds a sender.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return false,
        };
        self.take(first);
        for _ in 1..TURN_JOBS_MAX {
            match self.jobs.try_recv() {
                Ok(job) => self.take(job),
                Err(_) => break,
            }
        }
        true
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Propose { group, command, asker } => {
                if self.groups.contains_key(&group) {
                    self.guarded(group, |g| g.propose(&command, asker));
                } else {
                    asker.tell(Err(self.gone(group)));
                }
            }
            Job::Read { group, asker } => {
                if self.groups.contains_key(&group) {
                    self.guarded(group, |g| {
                        g.read(asker);
                        Ok(())
                    });
                } else {
                    asker.tell(Err(self.gone(group)));
                }
            }
            Job::Add(group) => self.add(*group),
            Job::Persisted(done) => self.persisted(done),
            Job::Poisoned(error) => self.poisoned(&error),
            Job::Stop => self.stopping = true,
        }
    }

    fn gone(&self, group: GroupId) -> Error {
        Error::new(ErrorKind::UnknownGroup, "the group has failed; the log of the node says why").with("group", group)
    }

    /// A message of another member.
    pub fn receive(&mut self, group: GroupId, message: Message) {
        self.guarded(group, |g| g.receive(message));
    }

    /// One tick of raft's time, for all groups.
    pub fn tick(&mut self) {
        for id in self.groups.keys().copied().collect::<Vec<_>>() {
            self.guarded(id, |g| {
                g.tick();
                Ok(())
            });
        }
    }

    /// Runs what is ready in the groups that something happened to. What comes back must be given to
    /// [`Journal::persist`], in this order, and the outcome to [`Engine::persisted`] or [`Engine::poisoned`].
    pub fn turn(&mut self) -> Option<Task> {
        let mut task = Task::default();
        for id in std::mem::take(&mut self.touched) {
            let mut staged = Staged::default();
            self.guarded(id, |g| g.ready(&mut staged));
            self.touched.remove(&id);
            // One that failed within adds nothing: half a change is none.
            let Some(group) = self.groups.get(&id) else { continue };
            if !staged.now.is_empty() {
                self.transport.send(id, staged.now);
            }
            if staged.number > 0 {
                task.changes.append(&mut staged.changes);
                task.sync |= staged.sync;
                task.done.push(Done {
                    group: id,
                    number: staged.number,
                    applied: group.applied(),
                    messages: staged.after,
                });
            }
        }
        (!task.done.is_empty()).then_some(task)
    }

    /// These turns are durable.
    pub fn persisted(&mut self, done: Vec<Done>) {
        for d in done {
            self.guarded(d.group, |g| {
                g.persisted(d.number, d.applied);
                Ok(())
            });
            if !d.messages.is_empty() && self.groups.contains_key(&d.group) {
                self.transport.send(d.group, d.messages);
            }
        }
    }

    /// The journal failed: no group can go on.
    pub fn poisoned(&mut self, error: &Error) {
        self.touched.clear();
        for group in std::mem::take(&mut self.groups).into_values() {
            group.fail(error.clone());
        }
    }

    /// Raft panics where a rule of its is broken, and where its storage fails: that ends this group, and no other.
    fn guarded(&mut self, id: GroupId, run: impl FnOnce(&mut Group) -> Result<()>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        // Nothing of the group is used after a panic: it is taken out and told to fail.
        let error = match catch_unwind(AssertUnwindSafe(|| run(group))) {
            Ok(Ok(())) => {
                self.touched.insert(id);
                return;
            }
            Ok(Err(error)) => error,
            Err(panic) => {
                Error::new(ErrorKind::Broken, "raft panicked").with("group", id).with("panic", words(&*panic))
            }
        };
        self.touched.remove(&id);
        if let Some(group) = self.groups.remove(&id) {
            group.fail(error);
        }
    }
}

#[cfg(test)]
impl Engine {
    pub(crate) fn group(&mut self, id: GroupId) -> &mut Group {
        self.touched.insert(id);
        self.groups.get_mut(&id).expect("a group that is open and has not failed")
    }

    pub(crate) fn with_group(&mut self, id: GroupId, run: impl FnOnce(&mut Group) -> Result<()>) {
        self.guarded(id, run);
    }
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words").to_owned()
}

/// Opens a group, and makes the handle to it. The group is to be given to the engine.
pub(crate) fn open(
    journal: &Journal,
    settings: &Settings,
    intake: &Arc<Intake>,
    id: GroupId,
    machine: Box<dyn StateMachine>,
) -> Result<(Group, GroupHandle)> {
    intake.claim(id, GROUPS_MAX)?;
    let shared = Arc::new(Shared::default());
    match Group::open(journal, settings, id, machine, Arc::clone(&shared)) {
        Ok(group) => Ok((group, GroupHandle::new(id, shared, Arc::clone(intake)))),
        Err(e) => {
            intake.give_up(id);
            Err(e)
        }
    }
}
