//! Opening and closing a store.
//!
//! ```text
//! lock the data folder -> raft log -> catalogue (group 0), sessions (group 1) -> NVMe index into the directory
//! -> arena files of the last life: adopted slot by slot -> warm set in the background -> serving
//! ```
//! NVMe first: a slot found in an old arena file is believed only where the index agrees on the version, or knows nothing.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

use kvkeep_core::catalogue::{Command, DEFAULT_TENANT, Outcome};
use kvkeep_core::directory::{Directory, DirectoryLimits, Inserted, Placed};
use kvkeep_core::{
    BlockMeta, Error, ErrorKind, Instant, LeaseLimits, MissReason, RequestInfo, Result, SlotRef, TenantId,
};
use kvkeep_tiers::dram::{Arena, ArenaConfig, FixedRegion, Registrar, Reserves};
use kvkeep_tiers::io::{Disk, DiskOptions, EngineChoice, FlushCoordinator, Registration, probe};
use kvkeep_tiers::nvme::{
    BlockCopy, Keep, NvmeConfig, NvmeStore, RocksIndex, index_dir, make_dir, make_dirs, segments_dir,
};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::clock::Clock;
use super::journal::Journal;
use super::load::Loader;
use super::namespaces::Views;
use super::reservations::Reservations;
use super::{PREFETCH_READS_MAX, Store, behind::Behind, learned};
use crate::auth::Tokens;
use crate::catalogue::{Registry, refuse_orphans};
use crate::config::Config;
use crate::connection::Instances;
use crate::consensus::Consensus;

/// What opening found.
#[derive(Debug, Default)]
pub struct Report {
    /// Tenants by name.
    pub tenants: HashMap<String, TenantId>,
    /// What an operator should know.
    pub warnings: Vec<String>,
    /// What runs the I/O of L3.
    pub io_engine: String,
    /// Page size of the arena as smaps shows it, bytes.
    pub arena_page_bytes: u64,
    /// Slots of the last life that are served again.
    pub adopted_slots: u64,
    /// Entries the NVMe index held.
    pub index_entries: u64,
    /// How long reading them took, ms.
    pub index_open_ms: u64,
}

impl Store {
    /// Opens a store; its background work starts with [`Store::start`].
    pub fn open(config: Config) -> Result<(Arc<Self>, Background)> {
        let data_dir = config.data_dir.clone();
        let io = |what: &'static str, e: std::io::Error| {
            Error::new(ErrorKind::Config, what).with("path", data_dir.display()).with("cause", e)
        };
        make_dir(&data_dir).map_err(|e| io("the data folder cannot be made", e))?;
        private(&data_dir).map_err(|e| io("the data folder cannot be made private (mode 0700)", e))?;
        let lock = lock(&data_dir)?;
        let tokens = config.auth.tokens_file.as_deref().map(Tokens::from_file).transpose()?.unwrap_or_default();
        let mut report = Report::default();
        refuse_orphans(&data_dir)?;
        let consensus = Arc::new(Consensus::open(&data_dir)?);
        let views = Arc::new(Views::default());
        let catalogue = Registry::open(&consensus, &data_dir, Arc::clone(&views))?;
        report.tenants = ensure_tenants(&catalogue, &tokens)?;
        let sessions = super::sessions::SessionStore::open(&consensus)?;
        let clock = Clock::new(config.policy_clock);
        let directory = Directory::new(limits(&config), config.policy);
        let (mut directory, nvme) = if config.nvme.off {
            (directory, None)
        } else {
            let (directory, nvme) = open_nvme(&config, &views, directory, &mut report)?;
            (directory, Some(nvme))
        };
        let arena = open_arena(&config, &data_dir, &views, &mut directory, &mut report)?;
        learned::load(&data_dir, &mut directory);
        directory.fit_elsewhere();
        let mut refused = Vec::new();
        let nvme = nvme.map(|nvme| {
            arena.set_registrar(Arc::new(DiskRegistrar(nvme.disk)));
            refused = nvme.refused;
            nvme.store
        });
        let limits = &config.limits;
        let (behind, jobs) = Behind::new(config.arena.dirty_bytes_max.0);
        let store = Arc::new(Self {
            epoch: rand::random(),
            clock,
            counters: Default::default(),
            journal: Journal::new(limits.history_max as usize, limits.events_max as usize),
            requests: Default::default(),
            instances: Instances::new(config.listen.connections_max, config.instance_grace()),
            rates: Default::default(),
            report,
            secret: catalogue.digest_key(),
            tokens,
            catalogue,
            sessions,
            consensus,
            directory: Mutex::new(directory),
            reservations: Mutex::new(Reservations::new(limits.reserved_bytes_max.0)),
            arena,
            nvme,
            flights: Default::default(),
            mapped: Default::default(),
            regions: Default::default(),
            ways: Default::default(),
            behind,
            room: Notify::new(),
            nvme_room: Default::default(),
            pressure: Notify::new(),
            short: AtomicBool::new(false),
            parting: Notify::new(),
            scrubber: std::sync::OnceLock::new(),
            prefetch_queue: Arc::new(Semaphore::new(limits.prefetch_queue_max as usize)),
            prefetch_turns: Semaphore::new(PREFETCH_READS_MAX),
            watchers: AtomicU32::new(0),
            first_hit_ms: AtomicU64::new(0),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            views,
            config,
            _lock: lock,
        });
        Ok((store, Background { jobs, refused }))
    }

    /// Stops cleanly: what is queued is written, the warm set noted, files closed. Call after the last client has gone.
    pub async fn close(self: &Arc<Self>) {
        self.drain_writes().await;
        self.save_warm_set();
        self.save_learned();
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        if let Some(nvme) = &self.nvme
            && let Err(error) = nvme.close().await
        {
            tracing::error!(%error, "the NVMe store did not close cleanly");
        }
        // With an NVMe tier the warm set brings DRAM back; without one the files are all there is.
        self.arena.close(self.nvme.is_some());
        // Last: nobody is left who could change anything.
        let consensus = Arc::clone(&self.consensus);
        match tokio::task::spawn_blocking(move || consensus.stop()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the raft log did not close cleanly"),
            Err(error) => tracing::error!(%error, "the raft log was not closed"),
        }
    }
}

/// What [`Store::start`] needs and nobody else may have.
pub struct Background {
    /// Blocks of the index that the directory did not take.
    pub(super) refused: Vec<BlockCopy>,
    pub(super) jobs: tokio::sync::mpsc::UnboundedReceiver<super::behind::Job>,
}

fn private(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

fn lock(data_dir: &Path) -> Result<File> {
    let path = data_dir.join("lock");
    let failed = |e: std::io::Error| {
        Error::new(ErrorKind::Config, "the lock file cannot be made").with("path", path.display()).with("cause", e)
    };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::new(ErrorKind::Config, "another kvkeepd has this data folder open; stop it, or use another --data-dir")
            .with("path", data_dir.display())
    })?;
    Ok(file)
}

/// Ids of the tenants that may come.
fn ensure_tenants(catalogue: &Registry, tokens: &Tokens) -> Result<HashMap<String, TenantId>> {
    let mut tenants = HashMap::new();
    for name in tokens.tenants().chain([DEFAULT_TENANT]) {
        if let Outcome::Tenant(id) = catalogue.apply_blocking(&Command::EnsureTenant { name: name.to_string() })? {
            tenants.insert(name.to_string(), id);
        }
    }
    Ok(tenants)
}

fn limits(config: &Config) -> DirectoryLimits {
    let l = &config.limits;
    DirectoryLimits {
        positions_max: l.positions_max,
        ghosts_max: l.ghosts_max,
        leases: LeaseLimits {
            leases_per_instance: l.leases_per_instance_max,
            positions_per_instance: l.leased_positions_per_instance_max,
            instances: config.listen.connections_max,
            ttl_max: Duration::from_millis(u64::from(l.lease_ttl_ms_max)),
            life_max: Duration::from_millis(u64::from(l.lease_life_ms_max)),
        },
    }
}

/// The NVMe tier of a node that is opening.
struct OpenNvme {
    store: NvmeStore,
    disk: Arc<dyn Disk>,
    /// Blocks that the directory did not take.
    refused: Vec<BlockCopy>,
}

/// Registers arena files with the device's engine, so that reads and writes need not pin their pages each time.
struct DiskRegistrar(Arc<dyn Disk>);

impl Registrar for DiskRegistrar {
    fn register(&self, region: &FixedRegion) -> bool {
        self.0.register(region.index(), region.region()) == Registration::Fixed
    }

    fn unregister(&self, index: u16) {
        self.0.unregister(index);
    }
}

fn open_nvme(
    config: &Config,
    views: &Views,
    directory: Directory,
    report: &mut Report,
) -> Result<(Directory, OpenNvme)> {
    let start = std::time::Instant::now();
    let folder = config.data_dir.join("nvme");
    let segments = segments_dir(&folder);
    make_dirs(&folder)?;
    let choice = if config.nvme.no_io_uring { EngineChoice::Pread } else { EngineChoice::Auto };
    let opened = probe::open(&segments, choice, DiskOptions { queue_depth: config.nvme.queue_depth_max })?;
    report.warnings.extend(opened.disk.engine().notes.iter().map(|n| format!("nvme: {n}")));
    report.io_engine = opened.said;
    let disk: Arc<dyn Disk> = Arc::new(FlushCoordinator::new(opened.disk));
    let index = Arc::new(RocksIndex::open(&index_dir(&folder))?);
    let nvme_config = NvmeConfig {
        keep_free_bytes: config.nvme.keep_free_bytes.0,
        segment_bytes: config.nvme.segment_bytes.0,
        write_budget_bytes_per_day: Some(config.nvme.write_budget_bytes_per_day.0).filter(|n| *n != 0),
        ..NvmeConfig::new(Some(folder), config.nvme.bytes.0)
    };
    let mut loader = Loader::start(directory)?;
    let (store, opened) = NvmeStore::open(nvme_config, Arc::clone(&disk), index, &mut |entry| {
        // Bytes of an older revision are unreachable; dropping them here is the lazy reclaim at its laziest.
        match views.any(entry.handle.namespace).filter(|n| n.revision == entry.handle.revision) {
            Some(namespace) => {
                loader.add(entry, &namespace);
                Keep::Yes
            }
            None => Keep::Drop,
        }
    })?;
    let (mut directory, refused) = loader.finish()?;
    for copy in &opened.retracted {
        directory.drop_place(&copy.id, copy.place, MissReason::Quarantined);
    }
    report.index_entries = opened.entries;
    report.index_open_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let lost = opened.dropped_out_of_range + opened.dropped_overlapping + opened.dropped_damaged;
    if lost > 0 {
        report.warnings.push(format!(
            "nvme: {lost} blocks are gone: {} pointed outside of the segments, {} overlapped newer ones, {} were damaged",
            opened.dropped_out_of_range, opened.dropped_overlapping, opened.dropped_damaged
        ));
    }
    Ok((directory, OpenNvme { store, disk, refused }))
}

fn open_arena(
    config: &Config,
    data_dir: &Path,
    views: &Views,
    directory: &mut Directory,
    report: &mut Report,
) -> Result<Arena> {
    let absolute = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_path_buf());
    // One folder per data folder and user: two nodes on one host never meet.
    let name = format!(
        "kvkeep-{}-{:08x}",
        rustix::process::getuid().as_raw(),
        crc32fast::hash(absolute.as_os_str().as_encoded_bytes())
    );
    let arena_config = ArenaConfig {
        dir: config.arena.dir.join(name),
        capacity_bytes: config.arena.bytes.0,
        reserves: Reserves { l3_reads: config.arena.l3_read_reserve_bytes.0, ..Reserves::default() },
        huge_pages: config.arena.huge_pages,
        slot_bytes_max: config.limits.block_bytes_max.0,
        ready_bytes: config.arena.ready_bytes.0,
    };
    let info = RequestInfo::default();
    let arena = Arena::open(arena_config, &mut |meta: &BlockMeta, slot: SlotRef| {
        let Some(namespace) = views.any(meta.handle.namespace) else { return false };
        if namespace.revision != meta.handle.revision || namespace.tenant != meta.tenant {
            return false;
        }
        match directory.locate(&meta.id.digest, meta.id.group, meta.id.shard) {
            Some(found) => found.version == meta.version && directory.set_slot(&meta.id, meta.version, slot),
            None => {
                // A durable block that the index does not know was never acknowledged, or was deleted.
                meta.class != kvkeep_core::Class::Durable
                    && matches!(
                        directory.insert(meta, &namespace.format, Placed::Dram(slot), &info, Instant(0)),
                        Ok(Inserted::Stored)
                    )
            }
        }
    })?;
    report.adopted_slots = arena.adoption().adopted;
    report.arena_page_bytes = arena.page_bytes().unwrap_or(0);
    Ok(arena)
}
