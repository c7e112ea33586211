//! The store of one node: the walk of a block through the tiers.
//!
//! ```text
//! reserve -> write -> commit -> DRAM slot published -> directory -> (write-behind) NVMe -> directory
//! match -> lease -> get: DRAM slot, or NVMe -> slot (promoted) -> out
//! room: evict ahead of demand, demote what is on NVMe, drop what may be dropped
//! ```
//! Read in this order: [`put`] -> `write` -> [`get`] -> [`lookup`] -> `room` -> `behind` -> [`open`].
//! Decisions are made by `kvkeep_core::directory`, behind one lock that is never held across an await nor for more than
//! [`SLICE_KEYS`] keys; bytes are moved by `kvkeep_tiers`, outside of it.

mod background;
mod behind;
pub mod clock;
pub mod get;
pub mod inflight;
pub mod inspect;
pub mod journal;
mod learned;
pub mod load;
pub mod lookup;
mod mapped;
pub mod namespaces;
pub mod open;
pub mod put;
mod rates;
mod regions;
pub mod requests;
pub mod reservations;
mod room;
pub mod sessions;
mod warm;
pub mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use kvkeep_core::catalogue::{Command, Namespace, Outcome};
use kvkeep_core::directory::{Directory, Located, PositionView, RemovedPart};
use kvkeep_core::{
    BlockId, Class, Digest, DigestKey, Error, ErrorKind, Format, Handle, InstanceId, MissReason, Result, TenantId,
    Tier, Version,
};
use kvkeep_tiers::dram::Arena;
use kvkeep_tiers::nvme::{BlockCopy, IndexEntry, NvmeStore};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::auth::{Identity, Tokens};
use crate::catalogue::Registry;
use crate::config::Config;
use crate::connection::{Instances, Via};
use crate::consensus::Consensus;
use crate::counters::Counters;
use crate::machine::cores;
use clock::Clock;
use get::PartRead;
use journal::{Journal, Moved, Subject};
use put::Caller;
use rates::Rates;
use reservations::{ReservationId, Reservations};

/// Keys handled per hold of the directory's lock.
pub const SLICE_KEYS: usize = 256;
/// Prefetch reads under way at a time.
const PREFETCH_READS_MAX: usize = 16;
/// Parts of one get into regions that wait for the device at a time.
const READS_AHEAD_MAX: usize = 64;

/// One node's store.
pub struct Store {
    /// As resolved at start.
    pub config: Config,
    /// Changes with every start.
    pub epoch: u64,
    /// Both clocks.
    pub clock: Clock,
    /// What is counted.
    pub counters: Counters,
    /// Namespaces as the hot paths see them.
    pub views: Arc<namespaces::Views>,
    /// History and events.
    pub journal: Journal,
    /// What recent requests missed.
    pub requests: requests::Requests,
    /// Connections and engine instances.
    pub instances: Arc<Instances>,
    /// Where else this node is reached, once its listeners are bound.
    pub ways: std::sync::OnceLock<Ways>,
    /// How fast tiers have been.
    pub rates: Rates,
    /// Findings at start, and what an operator should know.
    pub report: open::Report,
    secret: DigestKey,
    tokens: Tokens,
    catalogue: Registry,
    sessions: sessions::SessionStore,
    /// Stopped after everything that changes something through it.
    consensus: Arc<Consensus>,
    directory: Mutex<Directory>,
    reservations: Mutex<Reservations>,
    arena: Arena,
    nvme: Option<NvmeStore>,
    flights: inflight::Flights,
    mapped: mapped::Mapped,
    regions: regions::Regions,
    behind: behind::Behind,
    /// Told when memory was freed, or may have been.
    room: Notify,
    nvme_room: room::NvmeRoom,
    /// Told when memory was taken, or when what kept DRAM from its watermark has ended.
    pressure: Notify,
    /// DRAM is below its watermark and what should leave cannot yet.
    short: AtomicBool,
    /// Told when a large lease has ended.
    parting: Notify,
    scrubber: background::Scrubber,
    prefetch_queue: Arc<Semaphore>,
    prefetch_turns: Semaphore,
    watchers: AtomicU32,
    first_hit_ms: AtomicU64,
    stopping: CancellationToken,
    tasks: tokio_util::task::TaskTracker,
    /// Held for as long as the store is open: two nodes on one data folder are refused.
    _lock: std::fs::File,
}

/// Where the block protocol is spoken; told in every hello.
#[derive(Clone, Debug, Default)]
pub struct Ways {
    /// TCP; 0: nowhere.
    pub block_port: u16,
    /// Absolute path; empty: nowhere.
    pub unix_socket: String,
}

/// Answer to a registration.
pub struct Registered {
    /// As it is now.
    pub namespace: Arc<Namespace>,
    /// It is new.
    pub created: bool,
    /// The caller computes with its current weights.
    pub revision_matches: bool,
}

impl Store {
    /// Who holds this token on this way in.
    pub fn identify(&self, via: Via, token: &str) -> Result<Identity> {
        if self.tokens.is_empty() && matches!(via, Via::Tcp(_)) {
            return Ok(Identity::default_admin());
        }
        if let Some(identity) = self.tokens.identify(token.as_bytes()) {
            return Ok(identity.clone());
        }
        match via {
            // The socket's peers are known by their uid; a token is theirs to use, not to need.
            Via::Unix { uid, .. } if token.is_empty() => {
                let own = uid == 0 || uid == rustix::process::getuid().as_raw();
                Ok(Identity { admin: own, ..Identity::default_admin() })
            }
            _ => Err(Error::new(ErrorKind::Denied, "no token, or not one of this server's: set KVKEEP_TOKEN")),
        }
    }

    /// Id of a tenant that has been seen before or is named in the tokens file.
    pub fn tenant(&self, name: &str) -> Result<TenantId> {
        self.report
            .tenants
            .get(name)
            .copied()
            .ok_or_else(|| Error::new(ErrorKind::Denied, "no such tenant").with("tenant", name))
    }

    /// Registers a namespace, or finds it.
    pub async fn register_namespace(
        &self,
        caller: Caller,
        name: String,
        format: Format,
        revision_digest: String,
        require_full: bool,
    ) -> Result<Registered> {
        let command = Command::RegisterNamespace { tenant: caller.tenant, name, format, revision_digest, require_full };
        match self.catalogue.apply(command).await? {
            Outcome::Registered(r) => Ok(Registered {
                namespace: self.views.get(caller.tenant, r.handle.namespace)?,
                created: r.created,
                revision_matches: r.revision_matches,
            }),
            _ => Err(Error::new(ErrorKind::Conflict, "the catalogue answered something else")),
        }
    }

    /// The weights changed.
    pub async fn advance_revision(&self, caller: Caller, from: Handle, revision_digest: String) -> Result<Handle> {
        self.views.of_client(caller.tenant, from.namespace)?;
        let command = Command::AdvanceRevision { tenant: caller.tenant, from, revision_digest };
        match self.catalogue.apply(command).await? {
            Outcome::Advanced(handle) => Ok(handle),
            _ => Err(Error::new(ErrorKind::Conflict, "the catalogue answered something else")),
        }
    }

    /// Copies that an acknowledgement of this class asks for.
    pub fn copies_wanted(&self, class: Class) -> u32 {
        match class {
            Class::Cache => 1,
            Class::Replicated | Class::Durable => 2,
        }
    }

    fn new_version(&self) -> Version {
        Version(rand::random::<u64>().max(1))
    }

    fn reservation_term(&self) -> Duration {
        Duration::from_millis(u64::from(self.config.limits.reservation_ms))
    }

    /// Abandons reservations; how many there were.
    pub fn abandon(&self, caller: Caller, ids: impl Iterator<Item = ReservationId>) -> u32 {
        let mut reservations = self.reservations.lock();
        let n = ids.filter(|id| reservations.abandon(*id, caller.tenant)).count();
        drop(reservations);
        self.counters.reservations_abandoned.add(n as u64);
        self.room.notify_waiters();
        n as u32
    }

    fn end_instance(&self, instance: InstanceId) {
        while self.directory.lock().end_instance(instance, SLICE_KEYS) {}
        self.mapped.end_instance(instance);
        self.end_regions(instance);
        let reservations = self.reservations.lock().end_instance(instance);
        self.counters.reservations_abandoned.add(reservations as u64);
        tracing::debug!(%instance, reservations, "instance ended");
        self.room.notify_waiters();
    }

    /// How many parts of a get may be fetched at a time within `limits.get_read_ahead_bytes`.
    pub fn parts_ahead(&self, reads: &[PartRead]) -> usize {
        let largest = {
            let directory = self.directory.lock();
            reads
                .iter()
                .take(SLICE_KEYS)
                .filter_map(|r| directory.locate(&r.id.digest, r.id.group, r.id.shard))
                .map(|l| u64::from(l.len))
                .max()
                .unwrap_or(1)
        };
        (self.config.limits.get_read_ahead_bytes.0 / largest.max(1)) as usize
    }

    /// How many parts of a get into regions to work on at a time: one per processor where all are in DRAM, as many as
    /// `limits.get_read_ahead_bytes` lets wait for the device where one is not.
    pub fn reads_ahead(&self, reads: &[PartRead]) -> usize {
        let below = {
            let directory = self.directory.lock();
            reads
                .iter()
                .take(SLICE_KEYS)
                .any(|r| directory.locate(&r.id.digest, r.id.group, r.id.shard).is_some_and(|l| l.slot.is_none()))
        };
        if below { self.parts_ahead(reads).clamp(cores(), READS_AHEAD_MAX) } else { cores() }
    }

    fn first_hit(&self) {
        if self.first_hit_ms.load(Ordering::Relaxed) == 0 {
            let ms = u64::try_from(self.clock.uptime().as_millis()).unwrap_or(u64::MAX).max(1);
            let _ = self.first_hit_ms.compare_exchange(0, ms, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Takes positions out of the directory and frees their copies, a slice at a time with one sync of the index each;
    /// how many were here.
    pub(super) async fn let_go(&self, digests: &[Digest], reason: MissReason) -> usize {
        let mut count = 0;
        for slice in digests.chunks(SLICE_KEYS) {
            let gone: Vec<_> = {
                let mut directory = self.directory.lock();
                let mut take = |digest: &Digest| {
                    let handle = directory.view(digest)?.handle;
                    Some((handle, *digest, directory.remove(digest, reason)?))
                };
                slice.iter().filter_map(&mut take).collect()
            };
            count += gone.len();
            self.bury(&gone, reason).await;
        }
        count
    }

    /// Frees the copies of parts that the directory has let go of.
    async fn bury(&self, gone: &[(Handle, Digest, Vec<RemovedPart>)], reason: MissReason) {
        let mut copies = Vec::new();
        let mut unnamed = Vec::new();
        for (handle, digest, parts) in gone {
            for part in parts {
                let (handle, id) = (*handle, BlockId { digest: *digest, group: part.group, shard: part.shard });
                match part.slot.and_then(|slot| self.arena.pin(slot)).and_then(|p| p.meta().ok()) {
                    Some(meta) => self.journal.moved(&Subject::of(&meta), Moved::Gone(reason), Tier::Dram, None),
                    None => unnamed.push((handle, id)),
                }
                if let Some(slot) = part.slot {
                    self.arena.free(slot);
                }
                copies.extend(part.place.map(|place| BlockCopy { handle, id, place }));
            }
        }
        for entry in self.index_entries(unnamed).await {
            self.journal.moved(&Subject::of_entry(&entry), Moved::Gone(reason), Tier::Nvme, None);
        }
        self.free_places(&copies).await;
        self.room.notify_waiters();
    }
}

impl Store {
    /// Cancelled when the node stops.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Watchers now.
    pub fn watchers(&self) -> &AtomicU32 {
        &self.watchers
    }

    /// The readable positions of a handle among the next `count` (at most [`SLICE_KEYS`]), and where the next slice begins.
    pub fn scan(&self, handle: Handle, cursor: u32, count: usize) -> (Vec<PositionView>, Option<u32>) {
        let (mut views, next) = self.directory.lock().scan(cursor, count.min(SLICE_KEYS) as u32);
        views.retain(|v| v.handle == handle);
        (views, next)
    }
}

impl Store {
    /// Frees copies on NVMe that nobody is told of any more. A failure poisons the device, which says so itself; the
    /// copies then stay until the device is opened again.
    async fn free_places(&self, copies: &[BlockCopy]) {
        if let (Some(nvme), false) = (&self.nvme, copies.is_empty())
            && let Err(error) = nvme.free(copies).await
        {
            tracing::warn!(copies = copies.len(), %error, "copies could not be freed");
        }
    }

    /// What the NVMe index says of some blocks; those it does not know are left out. RocksDB may read a disk: not on a
    /// runtime thread.
    async fn index_entries(&self, blocks: Vec<(Handle, BlockId)>) -> Vec<IndexEntry> {
        let (Some(nvme), false) = (self.nvme.clone(), blocks.is_empty()) else { return Vec::new() };
        let read =
            move || blocks.into_iter().filter_map(|(handle, id)| nvme.entry(handle, id).ok().flatten()).collect();
        tokio::task::spawn_blocking(read).await.unwrap_or_default()
    }

    /// Parts of a position with where they are.
    fn located(&self, digest: &Digest) -> Vec<(BlockId, Located)> {
        let directory = self.directory.lock();
        let Some(view) = directory.view(digest) else { return Vec::new() };
        view.parts
            .iter()
            .filter_map(|p| {
                let id = BlockId { digest: *digest, group: p.group, shard: p.shard };
                Some((id, directory.locate(digest, p.group, p.shard)?))
            })
            .collect()
    }
}
