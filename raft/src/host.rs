//! [`Host`]: the groups of a node at work. Two threads, and no disk I/O on the one that ticks:
//!
//! ```text
//! handles --jobs--> kvkeep-raft: take in, tick, turn --tasks--> kvkeep-raft-log: merge, one batch, one sync
//!                        ^                                            |
//!                        +------------------persisted-----------------+
//! ```
//! While one sync runs, turns pile up behind it and share the next: the more callers, the fewer syncs an append.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::engine::{Engine, Job, open};
use crate::error::{Error, ErrorKind, Result};
use crate::handle::{GroupHandle, Intake};
use crate::ids::GroupId;
use crate::journal::{Journal, Stats, Task};
use crate::machine::StateMachine;
use crate::settings::{MERGE_TASKS_MAX, STOP_PATIENCE, Settings};
use crate::transport::Transport;

/// Runs the groups of a node. Dropping it is a crash without the mess: what was acknowledged is safe, the rest unknown;
/// [`Host::stop`] ends it properly.
pub struct Host {
    journal: Arc<Journal>,
    settings: Settings,
    intake: Arc<Intake>,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    driver: JoinHandle<()>,
    persister: JoinHandle<()>,
}

impl Host {
    /// Starts the threads. Groups come with [`Host::open`].
    ///
    /// # Errors
    /// `Io` if a thread cannot be started.
    pub fn start(journal: Arc<Journal>, settings: Settings, transport: Box<dyn Transport>) -> Result<Self> {
        let engine = Engine::new(Arc::clone(&journal), settings.clone(), transport);
        let intake = Arc::clone(engine.intake());
        // As many turns ahead as a merge takes: a disk that stands still stops the turns, not the memory.
        let (tasks, turns) = sync_channel(MERGE_TASKS_MAX);
        let (log, back, tick) = (Arc::clone(&journal), engine.sender(), settings.tick);
        let persister = spawn("kvkeep-raft-log", move || persist(&log, &turns, &back))?;
        let driver = spawn("kvkeep-raft", move || drive(engine, tick, &tasks))?;
        Ok(Self { journal, settings, intake, threads: Mutex::new(Some(Threads { driver, persister })) })
    }

    /// Opens a group of the store on the caller's thread, which reads its state, and lets it run.
    ///
    /// # Errors
    /// `UnknownGroup` (see [`Journal::create`]), `Conflict` if it is open, `Corrupt`, `NewerVersion`, `Machine`, `Io`,
    /// `Stopped`.
    pub fn open(&self, id: GroupId, machine: Box<dyn StateMachine>) -> Result<GroupHandle> {
        let (group, handle) = open(&self.journal, &self.settings, &self.intake, id, machine)?;
        let stopped = |_| Error::new(ErrorKind::Stopped, "the raft host has stopped");
        self.intake.sender().send(Job::Add(Box::new(group))).map_err(stopped)?;
        Ok(handle)
    }

    /// The log below.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.journal.stats()
    }

    /// Takes nothing more, waits for what was taken (at most [`STOP_PATIENCE`]), and closes the log, so that the next start
    /// replays nothing. Blocks. A second call does nothing.
    ///
    /// # Errors
    /// `Poisoned` if the log failed, now or before; `Broken` if a thread panicked.
    pub fn stop(&self) -> Result<()> {
        if self.join()? { self.journal.close() } else { Ok(()) }
    }

    /// `true` for the caller that joined the threads.
    fn join(&self) -> Result<bool> {
        self.intake.close();
        let Some(threads) = self.threads.lock().take() else { return Ok(false) };
        // If the driver is gone its thread says why.
        let _ = self.intake.sender().send(Job::Stop);
        // The persister ends when the driver has dropped its end of the turns.
        let joined = threads.driver.join().and(threads.persister.join());
        joined.map(|()| true).map_err(|_| Error::new(ErrorKind::Broken, "a raft thread panicked"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // So that the store can be opened again at once.
        if let Err(error) = self.join() {
            tracing::error!(%error, "raft host");
        }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("node", &self.settings.node).finish_non_exhaustive()
    }
}

fn spawn(name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let failed = |e: std::io::Error| Error::new(ErrorKind::Io, "cannot start a raft thread").with("cause", e);
    thread::Builder::new().name(name.into()).spawn(run).map_err(failed)
}

fn drive(mut engine: Engine, tick: Duration, tasks: &SyncSender<Task>) {
    let mut next_tick = Instant::now() + tick;
    let mut stop_at = None;
    loop {
        engine.take_in_within(next_tick.saturating_duration_since(Instant::now()));
        if Instant::now() >= next_tick {
            engine.tick();
            // Ticks that were missed are not made up for: raft's time may stand still, not jump.
            next_tick = Instant::now() + tick;
        }
        if let Some(task) = engine.turn()
            && tasks.send(task).is_err()
        {
            // The persister ends before this only by a panic of its own.
            engine.poisoned(&Error::new(ErrorKind::Broken, "the thread of the raft log has ended"));
        }
        if engine.is_stopping() {
            let patience = *stop_at.get_or_insert_with(|| Instant::now() + STOP_PATIENCE);
            if engine.is_idle() || Instant::now() >= patience {
                return;
            }
        }
    }
}

fn persist(journal: &Journal, turns: &Receiver<Task>, back: &Sender<Job>) {
    while let Ok(first) = turns.recv() {
        let rest = std::iter::from_fn(|| turns.try_recv().ok()).take(MERGE_TASKS_MAX - 1);
        let job = match journal.persist(std::iter::once(first).chain(rest)) {
            Ok(done) => Job::Persisted(done),
            // The journal stays poisoned: every later turn gets the same answer.
            Err(e) => Job::Poisoned(e),
        };
        // A driver that has ended needs no answer; what it left is written all the same.
        let _ = back.send(job);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::MemLog;
    use crate::ids::NodeId;
    use crate::store::{Change, LogStore as _, Table};

    /// A clean stop: the driver has handed over its last turns and is gone before the log has written the one before.
    #[test]
    fn turns_of_a_driver_that_has_ended_are_written() {
        let store = Arc::new(MemLog::new());
        let journal = Journal::open(store.clone(), NodeId::ALONE).unwrap();
        let turns = 2 * MERGE_TASKS_MAX + 1;
        let (task, tasks) = mpsc::sync_channel(turns);
        let (back, answers) = mpsc::channel();
        drop(answers);
        for n in 0..turns as u64 {
            let change = Change::Put(Table::State, n.to_be_bytes().to_vec(), vec![1]);
            task.send(Task { changes: vec![change], ..Task::default() }).unwrap();
        }
        drop(task);
        persist(&journal, &tasks, &back);
        for n in 0..turns as u64 {
            assert!(store.get(Table::State, &n.to_be_bytes()).unwrap().is_some(), "turn {n} of {turns} was dropped");
        }
    }
}
