//! [`Arena`]: the door. Takes the lock, asks the allocator, hands out slots; payload never moves under the lock.

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind as IoErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvkeep_core::checksum::SUM_CHUNK_BYTES;
use kvkeep_core::ids::{BlockId, TenantId};
use kvkeep_core::{BlockMeta, ChunkSums, Error, ErrorKind, Result, SlotRef};
use parking_lot::{Condvar, Mutex};

use super::adopt::{self, AdoptionReport};
use super::file::{Cell, Extent};
use super::grow::{self, FixedRegion, FolderLock, Registrar};
use super::layout::{decode_entry, encode_entry, entry_names, slot_units};
use super::memory::{Reading, UNIT_BYTES, Writing};
use super::slot::{PinGauge, Pinned, Purpose, Reserved, Site, SlotAt, SlotEnd};
use super::state::{Place, State};
use super::usage::{self, ArenaUsage};
use super::{ArenaConfig, NoRoom, pages, reclaim};

/// How long closing waits for a file that is being made: many times what 1 GiB takes.
const CLOSE_WAIT: Duration = Duration::from_secs(20);

/// What the arena, its slots and its grower share.
pub(super) struct Shared {
    pub(super) config: ArenaConfig,
    pub(super) state: Mutex<State>,
    /// The grower may have something to do, or shall stop.
    pub(super) wake: Condvar,
    /// The grower has nothing to do.
    pub(super) settled: Condvar,
    /// Held while files are registered and installed, so that none is missed. Taken before `state`.
    pub(super) registrar: Mutex<Option<Arc<dyn Registrar>>>,
    pub(super) gauge: Arc<PinGauge>,
    pub(super) lock: Arc<FolderLock>,
}

impl Shared {
    /// A slot's last holder is gone.
    pub(super) fn release(&self, end: &SlotEnd) {
        let now = Instant::now();
        let grow = self.state.lock().release(end.at, end.tenant, end.purpose, end.len, now);
        if grow {
            self.wake.notify_one();
        }
    }

    /// Writes the entry of a slot whose payload is complete and makes it readable.
    pub(super) fn publish(&self, memory: Reading<SlotEnd>, meta: &BlockMeta) -> Result<SlotRef> {
        let end = memory.end();
        let (at, tenant, purpose, slot_bytes) = (end.at, end.tenant, end.purpose, end.slot_bytes);
        let entry = encode_entry(meta, end.nonce, at.unit, at.generation);
        let mut state = self.state.lock();
        let Some((extent, slot)) = state.file_mut(at.file).and_then(|f| f.slot_mut(at.unit)) else {
            drop(state);
            return Err(Error::new(ErrorKind::Corrupt, "a reserved slot is in no extent").with("slot", at.pack().raw()));
        };
        extent.publish_entry(slot, &entry);
        extent.cells[slot as usize] = Cell::Published(memory);
        state.in_flight[purpose.index()] -= slot_bytes;
        if let Some(domain) = state.domains.get_mut(&tenant) {
            domain.blocks += 1;
        }
        Ok(at.pack())
    }

    /// Reads a slot's entry back. Right for as long as somebody holds the slot, freed or not.
    pub(super) fn meta(&self, end: &SlotEnd) -> Option<BlockMeta> {
        let entry = self.with_entry(end, <[u8]>::to_vec)?;
        let (generation, meta) = decode_entry(&entry, end.nonce, end.at.unit, end.slot_bytes)?;
        (generation == end.at.generation).then_some(meta)
    }

    /// Whether a slot's entry is of this block and key.
    pub(super) fn names(&self, end: &SlotEnd, id: &BlockId, key: &[u8]) -> bool {
        self.with_entry(end, |entry| entry_names(entry, id, key)).unwrap_or(false)
    }

    /// Where a slot and its entry lie in their file.
    pub(super) fn site(&self, end: &SlotEnd) -> Option<Site> {
        let state = self.state.lock();
        let (extent, slot) = state.file(end.at.file)?.slot(end.at.unit)?;
        Some(site_of(extent, slot, end))
    }

    fn with_entry<T>(&self, end: &SlotEnd, read: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let state = self.state.lock();
        let (extent, slot) = state.file(end.at.file)?.slot(end.at.unit)?;
        Some(read(extent.entry(slot)))
    }
}

fn site_of(extent: &Extent, slot: u32, end: &SlotEnd) -> Site {
    let entry = extent.shape.start as usize * UNIT_BYTES + slot as usize * extent.shape.entry_bytes();
    Site {
        file: end.nonce,
        offset: u64::from(end.at.unit) * UNIT_BYTES as u64,
        entry: entry as u64,
        generation: end.at.generation,
    }
}

/// Stops the grower when the last [`Arena`] goes.
struct Inner {
    shared: Arc<Shared>,
    grower: Option<JoinHandle<()>>,
    adoption: AdoptionReport,
    on_tmpfs: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.wake.notify_all();
        if let Some(grower) = self.grower.take() {
            // It has logged what went wrong, if anything; its folder is ours until it ended.
            let _ = grower.join();
        }
    }
}

/// Host memory for blocks. Cheap to clone; the files stay behind when the last clone is dropped (see [`Arena::close`]).
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

impl Arena {
    /// Opens the folder and takes over what a previous life left there. Every published slot whose entry is right in every
    /// bit is offered to `adopt`, after its payload was read in full and matched its sums; `false` frees it. Files that do
    /// not belong (another layout version, wrong size, over the capacity) are removed before memory is allocated. Returns
    /// with at least one file ready.
    ///
    /// # Errors
    /// `Config` where the fields disagree; `Conflict` where another process, or this one, has the folder open; `Denied`
    /// where the folder is another user's; `Io` where the file system refuses.
    pub fn open(config: ArenaConfig, adopt: &mut dyn FnMut(&BlockMeta, SlotRef) -> bool) -> Result<Self> {
        config.validate()?;
        let lock = Arc::new(FolderLock::take(&config.dir)?);
        let on_tmpfs = super::memory::is_on_tmpfs(&config.dir)
            .map_err(|e| grow::io_error("cannot look at the arena's file system", &config.dir, &e))?;
        if !on_tmpfs {
            tracing::warn!(dir = %config.dir.display(), "the arena's folder is not on tmpfs: the kernel will write its pages to a disk");
        }
        let shared = Arc::new(Shared {
            config,
            state: Mutex::new(State::new(Instant::now())),
            wake: Condvar::new(),
            settled: Condvar::new(),
            registrar: Mutex::new(None),
            gauge: Arc::new(PinGauge::default()),
            lock,
        });
        let adoption = adopt::adopt(&shared, adopt)?;
        if adoption.files_adopted == 0 {
            grow::first_file(&shared)?;
        }
        let grower = grow::spawn(Arc::clone(&shared))?;
        Ok(Self(Arc::new(Inner { shared, grower: Some(grower), adoption, on_tmpfs })))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    /// The configuration it runs with.
    pub fn config(&self) -> &ArenaConfig {
        &self.shared().config
    }

    /// What was found at the start.
    pub fn adoption(&self) -> &AdoptionReport {
        &self.0.adoption
    }

    /// Whether the folder is on tmpfs. Elsewhere the arena works, and the kernel writes its pages to a disk.
    pub fn is_on_tmpfs(&self) -> bool {
        self.0.on_tmpfs
    }

    /// A slot for `len` bytes in the domain of `tenant`. Never blocks and never evicts.
    ///
    /// # Errors
    /// [`NoRoom`] says why and what would help: an ordinary outcome.
    pub fn reserve(&self, tenant: TenantId, len: u32, purpose: Purpose) -> Result<Reserved, NoRoom> {
        let shared = self.shared();
        let now = Instant::now();
        let mut state = shared.state.lock();
        let spares = state.spares.len();
        let granted = state.allocate(&shared.config, tenant, len, purpose, now);
        let grow = state.spares.len() != spares || !state.doomed.is_empty();
        let file = granted.as_ref().ok().and_then(|g| state.file(g.at.file));
        let file = file.map(|f| (Arc::clone(&f.mapping), f.nonce));
        drop(state);
        if grow {
            shared.wake.notify_one();
        }
        let granted = granted?;
        let (mapping, nonce) = file.expect("the allocator granted a slot of a file that it has");
        let taken = mapping
            .take(granted.at.unit, slot_units(u64::from(len)))
            .expect("a slot goes to the free list after the last hold on its memory has ended, and is handed out once");
        let end = SlotEnd {
            shared: Arc::downgrade(shared),
            gauge: Arc::clone(&shared.gauge),
            at: granted.at,
            tenant,
            purpose,
            len,
            slot_bytes: granted.slot_bytes,
            nonce,
            pins: AtomicU32::new(0),
        };
        Ok(Reserved::new(Writing::new(taken, end)))
    }

    /// Holds a published slot's bytes. `None` when it was freed or quarantined, whatever lies there now.
    pub fn pin(&self, slot: SlotRef) -> Option<Pinned> {
        let at = SlotAt::unpack(slot);
        let mut state = self.shared().state.lock();
        let window = state.window;
        let (extent, number) = state.file_mut(at.file)?.slot_mut(at.unit)?;
        let memory = match &extent.cells[number as usize] {
            Cell::Published(memory) if memory.end().at == at => memory.clone(),
            _ => return None,
        };
        extent.touched = window;
        drop(state);
        Some(Pinned::new(memory))
    }

    /// [`Self::pin`] for a slot that must hold this block under this key, and where it lies for a process that mapped its
    /// file: all that a map of many blocks needs, under one hold of the lock. `None` where the slot is gone or another's.
    pub fn pin_mapped<'a>(
        &self,
        wanted: impl Iterator<Item = (SlotRef, &'a BlockId, &'a [u8])>,
    ) -> Vec<Option<(Pinned, Site)>> {
        let mut state = self.shared().state.lock();
        let window = state.window;
        let mut pin = |(slot, id, key): (SlotRef, &BlockId, &[u8])| {
            let at = SlotAt::unpack(slot);
            let (extent, number) = state.file_mut(at.file)?.slot_mut(at.unit)?;
            let memory = match &extent.cells[number as usize] {
                Cell::Published(memory) if memory.end().at == at => memory.clone(),
                _ => return None,
            };
            if !entry_names(extent.entry(number), id, key) {
                return None;
            }
            extent.touched = window;
            let site = site_of(extent, number, memory.end());
            Some((memory, site))
        };
        let found: Vec<_> = wanted.map(&mut pin).collect();
        drop(state);
        found.into_iter().map(|found| found.map(|(memory, site)| (Pinned::new(memory), site))).collect()
    }

    /// Whether somebody reads a published slot now.
    pub fn is_pinned(&self, slot: SlotRef) -> bool {
        let at = SlotAt::unpack(slot);
        let state = self.shared().state.lock();
        let cell =
            state.file(at.file).and_then(|f| f.slot(at.unit)).map(|(extent, number)| &extent.cells[number as usize]);
        matches!(cell, Some(Cell::Published(memory)) if memory.end().at == at && memory.end().pins.load(Ordering::Relaxed) > 0)
    }

    /// Unpublishes a slot: gone for new pins now, its memory reused when the last pin and I/O buffer are. `false` where it
    /// was gone already.
    pub fn free(&self, slot: SlotRef) -> bool {
        self.take_out(slot, false)
    }

    /// As [`Self::free`], but its memory gave back other bytes than were put: it is not used again in this life. `false`
    /// where the slot was gone already.
    pub fn quarantine(&self, slot: SlotRef) -> bool {
        self.take_out(slot, true)
    }

    fn take_out(&self, slot: SlotRef, condemned: bool) -> bool {
        let at = SlotAt::unpack(slot);
        let mut state = self.shared().state.lock();
        let Some((extent, number)) = state.file_mut(at.file).and_then(|f| f.slot_mut(at.unit)) else { return false };
        let cell = &mut extent.cells[number as usize];
        if !matches!(cell, Cell::Published(memory) if memory.end().at == at) {
            return false;
        }
        let Cell::Published(memory) = std::mem::replace(cell, Cell::Leaving { condemned }) else { return false };
        extent.clear_entry(number);
        if let Some(domain) = state.domains.get_mut(&memory.end().tenant) {
            domain.blocks -= 1;
        }
        drop(state);
        // Outside of the lock: where this is the last hold, its end takes the lock.
        drop(memory);
        true
    }

    /// Whether a slot's bytes still match their sums; `None` where it is gone. `between` is called before each chunk of 64
    /// KiB: whoever is in no hurry lets others go first there.
    pub fn verify(&self, slot: SlotRef, between: impl Fn()) -> Option<bool> {
        let pinned = self.pin(slot)?;
        let Ok(meta) = pinned.meta() else { return Some(false) };
        let as_long = meta.sums.as_slice().len() == ChunkSums::count_for(pinned.len());
        let chunks = pinned.chunks(SUM_CHUNK_BYTES).enumerate();
        let mut good = chunks.map(|(n, chunk)| {
            between();
            meta.sums.first_mismatch(n, chunk).is_none()
        });
        Some(as_long && good.all(|good| good))
    }

    /// The published slots, an extent at a time: what a scrub walks. Slots that come or go meanwhile may be missing or
    /// gone.
    pub fn slots(&self) -> Slots {
        Slots { arena: self.clone(), next: Some((0, 0)), batch: VecDeque::new() }
    }

    /// The blocks that stand in the way of slots for `len` bytes of this tenant: those of the extents, or the file, that
    /// cost the fewest bytes to empty. Their free slots are not handed out for [`PROMISE_SECONDS`](super::PROMISE_SECONDS)
    /// and the emptied place is kept that long for this size, so that freeing the blocks does help. Empty where every other
    /// size and tenant is at its floor of one extent: then the blocks are served from the tiers below. An answer that is
    /// empty because nothing lived there means: reserve again.
    pub fn reclaim_candidates(&self, tenant: TenantId, len: u32) -> Vec<(SlotRef, BlockId)> {
        let mut state = self.shared().state.lock();
        let victims = reclaim::candidates(&mut state, tenant, slot_units(u64::from(len)), Instant::now());
        let grow = !state.doomed.is_empty();
        drop(state);
        if grow {
            self.shared().wake.notify_one();
        }
        victims
    }

    /// A file of this tenant, open for reading only, and its length in bytes: what a process that may map the arena is given.
    /// The file belongs to the tenant as long as it exists.
    ///
    /// # Errors
    /// `InvalidArgument` where the tenant has no such file (any more); `Io` where it cannot be opened.
    pub fn open_file(&self, tenant: TenantId, nonce: u64) -> Result<(std::fs::File, u64)> {
        let found = {
            let state = self.shared().state.lock();
            let mut files = state.all_files();
            files.find(|f| f.nonce == nonce && f.tenant == Some(tenant)).map(|f| (f.path.clone(), f.bytes()))
        };
        let (path, bytes) =
            found.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "the arena has no such file of this tenant"))?;
        let file = std::fs::File::open(&path)
            .map_err(|e| grow::io_error("cannot open an arena file for a reader", &path, &e))?;
        Ok((file, bytes))
    }

    /// Figures of this moment.
    pub fn usage(&self) -> ArenaUsage {
        usage::usage(self.shared(), Instant::now())
    }

    /// The mapped files, for an engine that registers them by itself.
    pub fn fixed_buffers(&self) -> Vec<FixedRegion> {
        self.shared().state.lock().all_files().map(|f| FixedRegion::new(&f.mapping)).collect()
    }

    /// Tells an engine of the files that are there and, from the grower's thread, of each that comes or goes. Buffers name
    /// their index once the engine has said that it registered the file.
    pub fn set_registrar(&self, registrar: Arc<dyn Registrar>) {
        grow::set_registrar(self.shared(), registrar);
    }

    /// Waits until the grower has made what it can for now; `false` where it took longer. For tests and for a start that
    /// wants its spares ready.
    pub fn wait_settled(&self, timeout: Duration) -> bool {
        grow::wait_settled(self.shared(), timeout)
    }

    /// Bytes of the pages behind the arena, as `/proc/self/smaps` shows them: the smallest of any file.
    ///
    /// # Errors
    /// `Io` where smaps cannot be read.
    pub fn page_bytes(&self) -> Result<u64> {
        pages::page_bytes(&self.fixed_buffers())
    }

    /// Reserves nothing from now on. With `remove_files` the next life finds nothing; what is pinned stays readable. Waits
    /// for a file that is being made or removed just now.
    pub fn close(&self, remove_files: bool) {
        let mut state = self.shared().state.lock();
        state.closed = true;
        self.shared().wake.notify_all();
        while state.files.iter().any(|place| matches!(place, Place::Building)) {
            if self.shared().settled.wait_for(&mut state, CLOSE_WAIT).timed_out() {
                break;
            }
        }
        let paths: Vec<_> = if remove_files { state.all_files().map(|f| f.path.clone()).collect() } else { Vec::new() };
        drop(state);
        for path in paths {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != IoErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove an arena file");
            }
        }
        if remove_files {
            grow::remove_folder(&self.config().dir);
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("config", self.config()).finish_non_exhaustive()
    }
}

/// Walks the published slots. See [`Arena::slots`].
pub struct Slots {
    arena: Arena,
    /// File and first unit to look at next.
    next: Option<(u16, u32)>,
    batch: VecDeque<SlotRef>,
}

impl Iterator for Slots {
    type Item = SlotRef;

    fn next(&mut self) -> Option<SlotRef> {
        while self.batch.is_empty() {
            let (index, unit) = self.next?;
            let state = self.arena.shared().state.lock();
            let extent = state.file(index).and_then(|f| f.extents.range(unit..).next());
            self.next = match extent {
                Some((start, extent)) => {
                    self.batch.extend(extent.cells.iter().filter_map(|cell| match cell {
                        Cell::Published(memory) => Some(memory.end().at.pack()),
                        _ => None,
                    }));
                    Some((index, start + 1))
                }
                None if usize::from(index) + 1 < state.files.len() => Some((index + 1, 0)),
                None => None,
            };
        }
        self.batch.pop_front()
    }
}
