//! A node without threads, whose power fails where the test says: the engine turned by hand over a store that forgets what was
//! not synced.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvkeep_raft::error::Result;
use kvkeep_raft::store::Visit;
use kvkeep_raft::{
    Alone, Answer, Change, Engine, Error, ErrorKind, GroupHandle, GroupId, Journal, LogStore, MemLog, NodeId, Pending,
    Proposed, RocksLog, Settings, Table, Task,
};
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::sequence::{Item, Sequence, View, command, position};

/// A disk that can lose its power: a store, and a way to be cut and opened again.
pub trait Device {
    fn store(&self) -> Arc<dyn LogStore>;
    /// Of what was written since the last sync, some part is kept: all of it if `kept` is `u32::MAX`.
    fn cut(&mut self, kept: u32);
}

#[derive(Default)]
pub struct Mem(Arc<MemLog>);

impl Device for Mem {
    fn store(&self) -> Arc<dyn LogStore> {
        self.0.clone()
    }
    fn cut(&mut self, kept: u32) {
        let kept = if kept == u32::MAX { usize::MAX } else { kept as usize % (self.0.unsynced() + 1) };
        self.0.cut(kept);
    }
}

/// A cut leaves the write-ahead log as long as it was at the last sync, or a part of what came after.
pub struct Rocks {
    dir: TempDir,
    store: Option<Arc<Synced>>,
}

impl Rocks {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let store = Some(Arc::new(Synced::open(dir.path())));
        Self { dir, store }
    }
}

impl Device for Rocks {
    fn store(&self) -> Arc<dyn LogStore> {
        self.store.clone().unwrap()
    }
    fn cut(&mut self, kept: u32) {
        let store = Arc::into_inner(self.store.take().unwrap()).expect("the node has ended");
        let wal_at_sync = store.wal_at_sync.into_inner();
        // Closing writes nothing more: what is in the log stays there.
        drop(store.log);
        for (log, len) in logs(self.dir.path()) {
            let synced = wal_at_sync.get(&log).copied().unwrap_or(0);
            let keep = if kept == u32::MAX { len } else { synced + u64::from(kept) % (len - synced + 1) };
            fs::File::options().write(true).open(self.dir.path().join(log)).unwrap().set_len(keep).unwrap();
        }
        self.store = Some(Arc::new(Synced::open(self.dir.path())));
    }
}

/// RocksDB, and how long its log was at the last sync.
struct Synced {
    log: RocksLog,
    dir: PathBuf,
    wal_at_sync: Mutex<BTreeMap<PathBuf, u64>>,
}

impl Synced {
    fn open(dir: &Path) -> Self {
        let log = RocksLog::open(dir).unwrap();
        log.sync().unwrap();
        Self { log, dir: dir.to_owned(), wal_at_sync: Mutex::new(logs(dir)) }
    }
}

fn logs(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let logs = fs::read_dir(dir).unwrap().map(|f| f.unwrap());
    logs.filter(|f| f.path().extension().is_some_and(|e| e == "log"))
        // RocksDB removes old logs behind our back.
        .filter_map(|f| Some((f.file_name().into(), f.metadata().ok()?.len())))
        .collect()
}

impl LogStore for Synced {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.log.get(table, key)
    }
    fn write(&self, changes: &[Change]) -> Result<()> {
        self.log.write(changes)
    }
    fn sync(&self) -> Result<()> {
        self.log.sync()?;
        *self.wal_at_sync.lock() = logs(&self.dir);
        Ok(())
    }
    fn scan(&self, table: Table, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.log.scan(table, from, visit)
    }
}

/// A store whose next write or sync is the moment the power fails.
struct Failing {
    store: Arc<dyn LogStore>,
    at_write: AtomicBool,
    at_sync: AtomicBool,
}

fn power() -> Error {
    Error::new(ErrorKind::Io, "the power fails")
}

impl LogStore for Failing {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.store.get(table, key)
    }
    fn write(&self, changes: &[Change]) -> Result<()> {
        if self.at_write.load(Ordering::Relaxed) { Err(power()) } else { self.store.write(changes) }
    }
    fn sync(&self) -> Result<()> {
        if self.at_sync.load(Ordering::Relaxed) { Err(power()) } else { self.store.sync() }
    }
    fn scan(&self, table: Table, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.store.scan(table, from, visit)
    }
}

/// Where the power fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    BetweenTurns,
    BeforeWrite,
    BetweenWriteAndSync,
    BetweenSyncAndReport,
}

pub const CUTS: [Cut; 4] = [Cut::BetweenTurns, Cut::BeforeWrite, Cut::BetweenWriteAndSync, Cut::BetweenSyncAndReport];

struct Life {
    journal: Arc<Journal>,
    failing: Arc<Failing>,
    engine: Engine,
    handles: Vec<GroupHandle>,
    views: Vec<View>,
    /// Turns that were not persisted yet.
    tasks: VecDeque<Task>,
    asked: Vec<(usize, u64, Pending<Answer>)>,
    reads: Vec<(usize, usize, Pending<u64>)>,
}

/// What is known of one group whatever happens.
#[derive(Default)]
struct Known {
    next_id: u64,
    /// Everything that was ever seen applied: applied is durable.
    applied: Vec<Item>,
    acknowledged: Vec<(usize, u64)>,
}

/// A node with some groups.
pub struct Sim<D: Device> {
    device: D,
    entries_max: u64,
    clock: Arc<AtomicU64>,
    known: Vec<Known>,
    life: Option<Life>,
    pub acknowledged: usize,
    pub reads_answered: usize,
}

fn id(group: usize) -> GroupId {
    GroupId::new(group as u64).unwrap()
}

impl<D: Device> Sim<D> {
    pub fn new(device: D, groups: usize, entries_max: u64) -> Self {
        let mut sim = Self {
            device,
            entries_max,
            clock: Arc::new(AtomicU64::new(1000)),
            known: (0..groups).map(|_| Known::default()).collect(),
            life: None,
            acknowledged: 0,
            reads_answered: 0,
        };
        let journal = Journal::open(sim.device.store(), NodeId::ALONE).unwrap();
        for group in 0..groups {
            journal.create(id(group), &[NodeId::ALONE], &Vec::new()).unwrap();
        }
        drop(journal);
        sim.start();
        sim
    }

    fn start(&mut self) {
        let failing = Arc::new(Failing {
            store: self.device.store(),
            at_write: AtomicBool::new(false),
            at_sync: AtomicBool::new(false),
        });
        let journal = Arc::new(Journal::open(failing.clone(), NodeId::ALONE).unwrap());
        assert_eq!(journal.groups().unwrap().len(), self.known.len());
        let clock = Arc::clone(&self.clock);
        let settings = Settings {
            log_entries_max: self.entries_max,
            ..Settings::new(NodeId::ALONE, Arc::new(move || clock.load(Ordering::Relaxed)))
        };
        let mut engine = Engine::new(Arc::clone(&journal), settings, Box::new(Alone));
        let views: Vec<View> = self.known.iter().map(|_| View::default()).collect();
        let handles = views.iter().enumerate();
        let handles = handles.map(|(n, v)| engine.open(id(n), Box::new(Sequence(v.clone()))).unwrap()).collect();
        let (tasks, asked, reads) = (VecDeque::new(), Vec::new(), Vec::new());
        self.life = Some(Life { journal, failing, engine, handles, views, tasks, asked, reads });
    }

    fn life(&mut self) -> &mut Life {
        self.life.as_mut().unwrap()
    }

    /// The leader's wall clock jumps, back as well.
    pub fn set_clock(&mut self, ms: u64) {
        self.clock.store(ms, Ordering::Relaxed);
    }

    pub fn propose(&mut self, group: usize, count: usize) {
        let group = group % self.known.len();
        for _ in 0..count {
            let id = self.known[group].next_id;
            self.known[group].next_id += 1;
            let life = self.life();
            match life.handles[group].propose(command(id)).unwrap() {
                Proposed::Queued(pending) => life.asked.push((group, id, pending)),
                Proposed::Overloaded { .. } => panic!("this is no load"),
            }
        }
    }

    /// A read must see what was acknowledged before it was asked for.
    pub fn read(&mut self, group: usize) {
        let group = group % self.known.len();
        let acknowledged = self.known[group].acknowledged.len();
        let life = self.life();
        let pending = life.handles[group].read_barrier().unwrap().queued().unwrap();
        life.reads.push((group, acknowledged, pending));
    }

    pub fn tick(&mut self) {
        self.life().engine.tick();
        self.turn();
    }

    /// `true` if anything happened.
    pub fn turn(&mut self) -> bool {
        let life = self.life();
        let came = life.engine.take_in();
        let task = life.engine.turn();
        let turned = task.is_some();
        life.tasks.extend(task);
        self.look();
        came || turned
    }

    /// The first `count` turns that wait are persisted, and the engine told.
    pub fn persist(&mut self, count: usize) {
        let life = self.life();
        let tasks: Vec<_> = life.tasks.drain(..count.min(life.tasks.len())).collect();
        let done = life.journal.persist(tasks).unwrap();
        life.engine.persisted(done);
        self.look();
    }

    /// Hears answers, and compares what the machines have with what is known.
    fn look(&mut self) {
        let Self { life: Some(life), known, acknowledged, .. } = self else { return };
        for (known, view) in known.iter_mut().zip(&life.views) {
            let now = view.lock();
            assert!(now.starts_with(&known.applied), "{:?} was applied, and is not in {now:?}", known.applied);
            known.applied.clone_from(&now);
        }
        life.asked.retain_mut(|(group, id, pending)| {
            let Some(answer) = pending.try_take() else { return true };
            let answer = answer.unwrap();
            let index = answer.index;
            let at = position(answer);
            let item = known[*group].applied[at];
            assert_eq!((item.id, item.index), (*id, index));
            known[*group].acknowledged.push((at, *id));
            *acknowledged += 1;
            false
        });
        self.hear_reads();
    }

    fn hear_reads(&mut self) {
        let Self { life: Some(life), known, reads_answered, .. } = self else { return };
        life.reads.retain_mut(|(group, before, pending)| {
            let Some(answer) = pending.try_take() else { return true };
            let applied = answer.unwrap();
            let known = &known[*group];
            for (at, _) in &known.acknowledged[..*before] {
                assert!(known.applied[*at].index <= applied, "a read at {applied} is too early");
            }
            *reads_answered += 1;
            false
        });
    }

    /// The power fails while the first `count` turns are being persisted. Then the node starts again.
    pub fn cut(&mut self, cut: Cut, count: usize, kept: u32) {
        let life = self.life();
        life.failing.at_write.store(cut == Cut::BeforeWrite, Ordering::Relaxed);
        life.failing.at_sync.store(cut == Cut::BetweenWriteAndSync, Ordering::Relaxed);
        if cut != Cut::BetweenTurns {
            let tasks: Vec<_> = life.tasks.drain(..count.min(life.tasks.len())).collect();
            match life.journal.persist(tasks) {
                // Nobody is told.
                Ok(_) => {}
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Poisoned);
                    let again = life.journal.persist([]).err().or_else(|| life.journal.sync().err());
                    assert_eq!(again.map(|e| e.kind()), Some(ErrorKind::Poisoned), "poison must stick");
                }
            }
        }
        self.life = None;
        self.device.cut(kept);
        self.start();
        self.look_back();
    }

    /// What a start found on the disk, before anything is replayed: a prefix of what is known, or more of it.
    fn look_back(&mut self) {
        let Self { life: Some(life), known, .. } = self else { return };
        for (known, view) in known.iter().zip(&life.views) {
            let found = view.lock();
            let common = found.len().min(known.applied.len());
            assert_eq!(found[..common], known.applied[..common], "the disk has another order");
        }
    }

    /// Everything that can happen has happened; then everything must be right.
    pub fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 1000, "it does not come to rest");
            let busy = self.turn_quietly();
            self.hear_reads();
            let waits = !self.life().reads.is_empty();
            if waits {
                self.life().engine.tick();
            }
            if !busy && !waits {
                break;
            }
        }
        self.look();
        let life = self.life.as_ref().unwrap();
        assert!(life.asked.is_empty(), "a proposal was not answered");
        for (known, handle) in self.known.iter().zip(&life.handles) {
            assert!(handle.leads());
            for (at, id) in &known.acknowledged {
                assert_eq!(known.applied[*at].id, *id, "acknowledged, and not there");
            }
            let order = |f: fn(&[Item]) -> bool| known.applied.windows(2).all(f);
            assert!(order(|w| w[0].id < w[1].id), "out of order, or twice: {:?}", known.applied);
            assert!(order(|w| w[0].index < w[1].index), "{:?}", known.applied);
            assert!(order(|w| w[0].clock_ms <= w[1].clock_ms), "the clock went back: {:?}", known.applied);
        }
    }

    /// After a start the machines are behind what is known until the log is replayed: not looked at meanwhile.
    fn turn_quietly(&mut self) -> bool {
        let life = self.life();
        let came = life.engine.take_in();
        life.tasks.extend(life.engine.turn());
        let tasks: Vec<_> = life.tasks.drain(..).collect();
        let wrote = !tasks.is_empty();
        let done = life.journal.persist(tasks).unwrap();
        life.engine.persisted(done);
        came || wrote
    }
}
