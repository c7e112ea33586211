//! [`GroupHandle`]: how callers reach a group, from any thread. Never blocks: what cannot be taken is said at once.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::engine::Job;
use crate::error::{Error, ErrorKind, Result};
use crate::group::Shared;
use crate::group::waiting::{Answer, Asker, Permit};
use crate::ids::GroupId;
use crate::settings::{COMMAND_BYTES_MAX, OVERLOAD_RETRY, PROPOSAL_BYTES_MAX, PROPOSALS_MAX};

/// The way into an engine, and what bounds it.
pub(crate) struct Intake {
    jobs: Sender<Job>,
    bytes: Arc<AtomicUsize>,
    closed: AtomicBool,
    open: Mutex<BTreeSet<GroupId>>,
}

impl Intake {
    pub fn new(jobs: Sender<Job>) -> Self {
        Self { jobs, bytes: Arc::default(), closed: AtomicBool::new(false), open: Mutex::default() }
    }

    pub fn sender(&self) -> Sender<Job> {
        self.jobs.clone()
    }

    /// Nothing more is taken.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// A group is opened once.
    pub fn claim(&self, id: GroupId, groups_max: usize) -> Result<()> {
        let mut open = self.open.lock();
        if open.len() >= groups_max {
            return Err(Error::new(ErrorKind::InvalidArgument, "the node has as many groups as it may have")
                .with("groups_max", groups_max));
        }
        if !open.insert(id) {
            return Err(Error::new(ErrorKind::Conflict, "the group is open already").with("group", id));
        }
        Ok(())
    }

    /// It was not opened after all.
    pub fn give_up(&self, id: GroupId) {
        self.open.lock().remove(&id);
    }
}

/// Whether a request was taken. Full is a value: it says when to come again, and nothing was done.
#[derive(Debug)]
pub enum Proposed<T> {
    /// Its end will be told.
    Queued(Pending<T>),
    /// As much is waiting as may wait; try again, unchanged, after this.
    Overloaded {
        /// A few batches.
        retry_after: Duration,
    },
}

impl<T> Proposed<T> {
    /// The pending answer, unless the group was overloaded.
    pub fn queued(self) -> Option<Pending<T>> {
        match self {
            Self::Queued(pending) => Some(pending),
            Self::Overloaded { .. } => None,
        }
    }
}

/// The end of a request that was taken. Dropping it takes nothing back.
#[derive(Debug)]
pub struct Pending<T>(oneshot::Receiver<Result<T>>);

fn unseen() -> Error {
    Error::new(ErrorKind::Unknown, "the host stopped before the end was seen: it may be applied or not")
}

impl<T> Pending<T> {
    /// Waits, on a thread that may block.
    ///
    /// # Errors
    /// As the future.
    pub fn wait(self) -> Result<T> {
        self.0.blocking_recv().unwrap_or_else(|_| Err(unseen()))
    }

    /// The answer if it is there.
    pub fn try_take(&mut self) -> Option<Result<T>> {
        match self.0.try_recv() {
            Ok(answer) => Some(answer),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => Some(Err(unseen())),
        }
    }
}

impl<T> Future for Pending<T> {
    /// Errors: `NotLeader`, `Superseded`: not applied. `Unknown`: perhaps. Others: the group has failed.
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|answer| answer.unwrap_or_else(|_| Err(unseen())))
    }
}

/// A group, to those who use it.
#[derive(Clone)]
pub struct GroupHandle {
    id: GroupId,
    shared: Arc<Shared>,
    intake: Arc<Intake>,
}

impl GroupHandle {
    pub(crate) fn new(id: GroupId, shared: Arc<Shared>, intake: Arc<Intake>) -> Self {
        Self { id, shared, intake }
    }

    /// Which group.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// Whether this node leads it, as of its last turn.
    pub fn leads(&self) -> bool {
        self.shared.leads.load(Ordering::Acquire)
    }

    /// Index of the last entry that its state machine has applied here.
    pub fn applied(&self) -> u64 {
        self.shared.applied.load(Ordering::Acquire)
    }

    /// Why the group takes nothing more, if it has failed.
    pub fn failure(&self) -> Option<Error> {
        self.shared.failed.get().cloned()
    }

    /// Proposes a command. The answer comes when it is committed and applied: it is durable then.
    ///
    /// # Errors
    /// `InvalidArgument` if it is larger than [`COMMAND_BYTES_MAX`], `Stopped`; or why the group has failed.
    pub fn propose(&self, command: Vec<u8>) -> Result<Proposed<Answer>> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(Error::new(ErrorKind::InvalidArgument, "a command is larger than it may be")
                .with("bytes", command.len())
                .with("command_bytes_max", COMMAND_BYTES_MAX));
        }
        let bytes = command.len();
        self.ask(bytes, |asker| Job::Propose { group: self.id, command, asker })
    }

    /// Waits until the state machine here has applied everything that was acknowledged before this call: what is read from
    /// it then is linearizable. The answer is the index it has applied. While there is no leader it waits; the caller has the
    /// deadline.
    ///
    /// # Errors
    /// `Stopped`; or why the group has failed.
    pub fn read_barrier(&self) -> Result<Proposed<u64>> {
        self.ask(0, |asker| Job::Read { group: self.id, asker })
    }

    fn ask<T>(&self, bytes: usize, job: impl FnOnce(Asker<T>) -> Job) -> Result<Proposed<T>> {
        let stopped = || Error::new(ErrorKind::Stopped, "the raft host is stopping; nothing was taken");
        if let Some(error) = self.shared.failed.get() {
            return Err(error.clone());
        }
        if self.intake.closed.load(Ordering::Acquire) {
            return Err(stopped());
        }
        let permit = Permit::take(&self.shared.requests, PROPOSALS_MAX, &self.intake.bytes, PROPOSAL_BYTES_MAX, bytes);
        let Some(permit) = permit else {
            return Ok(Proposed::Overloaded { retry_after: OVERLOAD_RETRY });
        };
        let (answer, pending) = oneshot::channel();
        self.intake.jobs.send(job(Asker { answer, permit })).map_err(|_| stopped())?;
        Ok(Proposed::Queued(Pending(pending)))
    }
}

impl fmt::Debug for GroupHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupHandle").field("id", &self.id).finish_non_exhaustive()
    }
}
