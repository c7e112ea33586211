//! The one thread that changes the index. Everything that asks for a change queues here, so that what is read before it is
//! changed cannot change in between, and so that many changes share one batch and one log sync.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;

use kvkeep_core::block::NvmePlace;
use kvkeep_core::error::{Error, ErrorKind, Result};
use kvkeep_core::ids::{BlockId, Handle};
use kvkeep_core::words::{Class, Keeper};
use tokio::sync::{mpsc, oneshot};

use super::config::SyncPoint;
use super::entry::{Heat, IndexEntry, IndexKey, index_key};
use super::index::Change;
use super::place::{Extent, Sequence};
use super::records::{self, DeviceRecord};
use super::shared::Shared;

/// Requests that wait for the thread at most; more wait in their own futures.
const QUEUE_MAX: usize = 4096;
/// Requests of one batch at most.
const GROUP_MAX: usize = 1024;
/// Sequences reserved at a time, so that the mark is synced once in so many puts.
pub(crate) const MARK_STEP: u64 = 1 << 20;

type Done<T> = oneshot::Sender<Result<T>>;

/// One stored copy: a block where the caller believes it to be. Changes apply to exactly this copy, or to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Namespace and revision.
    pub handle: Handle,
    /// The block.
    pub id: BlockId,
    /// Where it lies.
    pub place: NvmePlace,
}

/// What became of an insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// The index names the new copy.
    Yes,
    /// Nothing was done: it would take the place of a durable copy, so it must be flushed first.
    FlushFirst,
}

/// A change of the index.
pub(crate) enum Op {
    Insert {
        entry: Box<IndexEntry>,
        durable: bool,
        done: Done<Inserted>,
    },
    Free {
        copies: Vec<BlockCopy>,
        done: Done<u64>,
    },
    Raise {
        copies: Vec<BlockCopy>,
        class: Class,
        keeper: Keeper,
        done: Done<u64>,
    },
    Heat {
        heats: Vec<(BlockCopy, Heat)>,
        done: Done<u64>,
    },
    Quarantine {
        copy: BlockCopy,
        done: Done<bool>,
    },
    Pardon {
        extents: Vec<Extent>,
        done: Done<()>,
    },
    Mark {
        need: Sequence,
        done: Done<()>,
    },
    /// Everything before it becomes durable; `clean` also writes down that all data is.
    Sync {
        clean: bool,
        done: Done<()>,
    },
}

/// The thread, and the way to it. Dropping it waits for the requests that are queued.
pub(crate) struct Writer {
    queue: Option<mpsc::Sender<Op>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    pub fn start(shared: Arc<Shared>) -> Result<Self> {
        let (queue, requests) = mpsc::channel(QUEUE_MAX);
        let thread = thread::Builder::new()
            .name("kvkeep-nvme-idx".into())
            .spawn(move || run(&shared, requests))
            .map_err(|e| Error::new(ErrorKind::Io, "cannot start the index thread").with("cause", e))?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Queues a request and waits for its answer. Once it is queued it is done, even if the caller goes away.
    pub async fn ask<T>(&self, op: impl FnOnce(Done<T>) -> Op) -> Result<T> {
        let (done, answer) = oneshot::channel();
        let gone = || Error::new(ErrorKind::Unavailable, "the nvme store is closed");
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        queue.send(op(done)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue = None;
        // So that index and lock file are closed when the last handle of a store is gone, and it can be opened again.
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the index thread of an nvme store panicked");
        }
    }
}

fn run(shared: &Shared, mut queue: mpsc::Receiver<Op>) {
    while let Some(op) = queue.blocking_recv() {
        let mut group = Group::new(shared);
        group.take(op);
        while group.ops < GROUP_MAX {
            match queue.try_recv() {
                Ok(op) => group.take(op),
                Err(_) => break,
            }
        }
        group.finish();
    }
}

/// Requests that share a batch and a sync.
struct Group<'a> {
    shared: &'a Shared,
    ops: usize,
    batch: Vec<Change>,
    /// Keys that `batch` changes: reading one of them means writing the batch first.
    touched: HashSet<IndexKey>,
    /// Done to the free list and the counts once the batch is written.
    written: Vec<Effect>,
    /// Once it is synced.
    synced: Vec<Effect>,
    needs_sync: bool,
    /// Answers that wait for the write, and those that wait for the sync.
    on_write: Vec<Answer>,
    on_sync: Vec<Answer>,
}

type Answer = Box<dyn FnOnce(Result<()>)>;

enum Effect {
    Added(IndexEntry),
    Gone(IndexEntry),
    Release(Extent),
    Quarantine(Extent),
    Pardon(Extent),
    Mark(Sequence),
}

impl<'a> Group<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            ops: 0,
            batch: Vec::new(),
            touched: HashSet::new(),
            written: Vec::new(),
            synced: Vec::new(),
            needs_sync: false,
            on_write: Vec::new(),
            on_sync: Vec::new(),
        }
    }

    fn take(&mut self, op: Op) {
        self.ops += 1;
        match op {
            Op::Insert { entry, durable, done } => {
                let result = self.insert(*entry, durable);
                self.answer(result, done, durable);
            }
            Op::Free { copies, done } => {
                let result = self.each(&copies, Self::free);
                self.answer(result, done, true);
            }
            Op::Raise { copies, class, keeper, done } => {
                let result = self.each(&copies, |group, entry| group.raise(entry, class, keeper));
                self.answer(result, done, class == Class::Durable);
            }
            Op::Heat { heats, done } => {
                let result = heats.iter().try_fold(0, |n, (copy, heat)| {
                    Ok(n + self.each(std::slice::from_ref(copy), |group, entry| {
                        group.put(&IndexEntry { heat: *heat, ..entry });
                        true
                    })?)
                });
                self.answer(result, done, false);
            }
            Op::Quarantine { copy, done } => {
                let result = self.each(&[copy], Self::quarantine).map(|n| n == 1);
                self.answer(result, done, false);
            }
            Op::Pardon { extents, done } => {
                self.batch.extend(extents.iter().map(|&e| records::pardon(e)));
                self.synced.extend(extents.into_iter().map(Effect::Pardon));
                self.sync_for(SyncPoint::FreeSync);
                self.answer(Ok(()), done, true);
            }
            Op::Mark { need, done } => {
                if need > self.shared.mark() {
                    let mark = Sequence(need.0 + MARK_STEP);
                    self.batch.push(DeviceRecord { mark, flushed: self.shared.flushed }.to_change());
                    self.synced.push(Effect::Mark(mark));
                    self.sync_for(SyncPoint::MarkSync);
                }
                self.answer(Ok(()), done, true);
            }
            Op::Sync { clean, done } => {
                if clean {
                    // Nobody puts any more: the mark need not stand ahead of what was used.
                    let last = self.shared.last_sequence();
                    self.batch.push(DeviceRecord { mark: last, flushed: last }.to_change());
                }
                self.sync_for(SyncPoint::AllSync);
                self.answer(Ok(()), done, true);
            }
        }
    }

    fn sync_for(&mut self, point: SyncPoint) {
        self.needs_sync |= self.shared.config.sync_plan.runs(point);
    }

    fn answer<T: 'static>(&mut self, result: Result<T>, done: Done<T>, after_sync: bool) {
        match result {
            // A caller that has gone does not need an answer: what it asked for is done all the same.
            Err(e) => drop(done.send(Err(e))),
            Ok(value) => {
                let answer: Answer = Box::new(move |result| drop(done.send(result.map(|()| value))));
                if after_sync { self.on_sync.push(answer) } else { self.on_write.push(answer) }
            }
        }
    }

    fn put(&mut self, entry: &IndexEntry) {
        let key = entry.index_key();
        self.touched.insert(key);
        self.batch.push(Change::Put(key.to_vec(), entry.encode()));
    }

    fn delete(&mut self, entry: &IndexEntry) {
        let key = entry.index_key();
        self.touched.insert(key);
        self.batch.push(Change::Delete(key.to_vec()));
    }

    /// The entry as the changes so far leave it. One that cannot be read back is as good as none: its extent was not
    /// taken over at open.
    fn entry(&mut self, handle: Handle, id: BlockId) -> Result<Option<IndexEntry>> {
        self.shared.check_writable()?;
        let key = index_key(handle, id);
        if self.touched.contains(&key) {
            self.write()?;
        }
        let value = self.shared.index.get(&key)?;
        Ok(value.and_then(|v| IndexEntry::decode(&key, &v).ok()))
    }

    /// Applies `change` to the copies that are where the caller believes them to be, and counts those it did something to.
    fn each(&mut self, copies: &[BlockCopy], mut change: impl FnMut(&mut Self, IndexEntry) -> bool) -> Result<u64> {
        let mut changed = 0;
        for copy in copies {
            if let Some(entry) = self.entry(copy.handle, copy.id)?.filter(|e| e.place == copy.place) {
                changed += u64::from(change(self, entry));
            }
        }
        Ok(changed)
    }

    fn insert(&mut self, mut entry: IndexEntry, durable: bool) -> Result<Inserted> {
        if let Some(old) = self.entry(entry.handle, entry.id)?
            && old.place != entry.place
        {
            if old.class == Class::Durable && !durable {
                return Ok(Inserted::FlushFirst);
            }
            (entry.class, entry.keeper) = (entry.class, entry.keeper).max((old.class, old.keeper));
            // The old copy must be gone for good before its extent is written again.
            self.synced.push(Effect::Release(old.extent()));
            self.written.push(Effect::Gone(old));
            self.sync_for(SyncPoint::SupersedeSync);
        }
        if durable {
            self.sync_for(SyncPoint::PutSync);
        }
        self.put(&entry);
        self.written.push(Effect::Added(entry));
        Ok(Inserted::Yes)
    }

    fn free(&mut self, entry: IndexEntry) -> bool {
        self.delete(&entry);
        self.synced.push(Effect::Release(entry.extent()));
        self.written.push(Effect::Gone(entry));
        self.sync_for(SyncPoint::FreeSync);
        true
    }

    fn raise(&mut self, entry: IndexEntry, class: Class, keeper: Keeper) -> bool {
        if class == Class::Durable {
            self.sync_for(SyncPoint::ClassSync);
        }
        let rises = (entry.class, entry.keeper) < (class, keeper);
        if rises {
            self.put(&IndexEntry { class: class.max(entry.class), keeper, ..entry });
        }
        rises
    }

    fn quarantine(&mut self, entry: IndexEntry) -> bool {
        let extent = entry.extent();
        self.delete(&entry);
        self.batch.push(records::quarantine(extent));
        self.written.push(Effect::Gone(entry));
        self.written.push(Effect::Quarantine(extent));
        true
    }

    fn write(&mut self) -> Result<()> {
        self.shared.check_writable()?;
        self.touched.clear();
        if !self.batch.is_empty() {
            self.shared
                .index
                .write(&std::mem::take(&mut self.batch))
                .inspect_err(|e| self.shared.poison("index write", e))?;
        }
        self.apply(|group| &mut group.written);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        if self.needs_sync {
            self.shared.index.sync().inspect_err(|e| self.shared.poison("index log sync", e))?;
        }
        self.apply(|group| &mut group.synced);
        Ok(())
    }

    fn apply(&mut self, effects: impl Fn(&mut Self) -> &mut Vec<Effect>) {
        let effects = std::mem::take(effects(self));
        let mut space = self.shared.space.lock();
        for effect in effects {
            match effect {
                Effect::Added(entry) => space.blocks.add(&entry),
                Effect::Gone(entry) => space.blocks.remove(&entry),
                Effect::Release(extent) => space.extents.release(extent),
                Effect::Quarantine(extent) => space.extents.quarantine(extent),
                Effect::Pardon(extent) => space.extents.pardon(extent),
                Effect::Mark(mark) => self.shared.set_mark(mark),
            }
        }
    }

    fn finish(mut self) {
        let result = self.write();
        let answers = std::mem::take(&mut self.on_write);
        answers.into_iter().for_each(|answer| answer(result.clone()));
        let result = result.and_then(|()| self.sync());
        let answers = std::mem::take(&mut self.on_sync);
        answers.into_iter().for_each(|answer| answer(result.clone()));
    }
}
