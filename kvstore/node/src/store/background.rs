//! What runs beside the calls: expiry, room, write-behind, lazy reclaim, scrubs, the warm set, what the policy learned, metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvkeep_core::words::Happening;
use kvkeep_core::{MissReason, SlotRef, Tier};
use kvkeep_tiers::nvme::{ScrubFault, ScrubReport};
use tokio::sync::oneshot;

use super::open::Background;
use super::{SLICE_KEYS, Store};

/// Leases, reservations and instances are looked at so often.
const TICK: Duration = Duration::from_millis(50);
/// Metrics are told so often.
const METRICS_EVERY: Duration = Duration::from_secs(1);
/// Leases ended per tick.
const LEASES_PER_TICK: usize = 1024;
/// Positions looked at per tick for stale revisions.
const SWEEP_POSITIONS: u32 = 1024;
/// Expired positions taken per tick.
const EXPIRE_POSITIONS: usize = 1024;
/// Blocks a scrub checks between two pauses.
const SCRUB_BLOCKS: usize = 16;
/// How far a scrub's thread stands behind those that serve, for the system's scheduler.
const SCRUB_NICE: i32 = 19;
/// How long a clean stop waits for queued writes.
const DRAIN_MAX: Duration = Duration::from_secs(60);

/// Slots to be checked, for whom, and who waits for how many bytes they had.
type ScrubJob = (Arc<Store>, Vec<SlotRef>, oneshot::Sender<u64>);

/// The thread that compares slots with their sums, from the first scrub on. It ends with its last sender.
pub(super) type Scrubber = std::sync::OnceLock<std::sync::mpsc::Sender<ScrubJob>>;

fn scrubber() -> std::sync::mpsc::Sender<ScrubJob> {
    let (jobs, queue) = std::sync::mpsc::channel::<ScrubJob>();
    let check = move || {
        // Where this is refused, the scrub has its fair share and no more.
        let _ = rustix::process::nice(SCRUB_NICE);
        for (store, slots, done) in queue {
            // Nobody waits any more: the node stops.
            let _ = done.send(store.scrub_slots(&slots));
        }
    };
    if let Err(error) = std::thread::Builder::new().name("kvkeep-scrub".into()).spawn(check) {
        tracing::error!(%error, "the thread that scrubs DRAM could not be started");
    }
    jobs
}

impl Store {
    /// Starts the background work.
    pub fn start(self: &Arc<Self>, background: Background) {
        // Whoever looks before the first tick finds every series.
        self.publish_metrics();
        self.tasks.spawn(Arc::clone(self).write_queued(background.jobs));
        let store = Arc::clone(self);
        self.tasks.spawn(async move { store.free_places(&background.refused).await });
        self.tasks.spawn(Arc::clone(self).keep_dram_free());
        self.tasks.spawn(Arc::clone(self).tick());
        self.tasks.spawn(Arc::clone(self).part_released());
        self.tasks.spawn(Arc::clone(self).free_what_is_over());
        self.tasks.spawn(Arc::clone(self).load_warm_set());
        self.tasks.spawn(Arc::clone(self).learn());
        self.tasks.spawn(Arc::clone(self).keep_learned());
        self.tasks.spawn(Arc::clone(self).scrub_dram());
        self.tasks.spawn(Arc::clone(self).scrub_nvme());
        self.tasks.spawn(Arc::clone(self).queue_adopted());
        self.tasks.spawn(Arc::clone(self).keep_sessions());
    }

    async fn tick(self: Arc<Self>) {
        let mut every = tokio::time::interval(TICK);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = Instant::now();
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                _ = every.tick() => {}
            }
            let now = self.clock.monotonic();
            let ended = self.directory.lock().expire_leases(now, LEASES_PER_TICK);
            self.part_leases().await;
            let abandoned = self.reservations.lock().expire(now);
            self.counters.reservations_abandoned.add(abandoned as u64);
            if ended + abandoned > 0 {
                self.room.notify_waiters();
            }
            for instance in self.instances.take_ended(Instant::now()) {
                self.end_instance(instance);
            }
            self.mapped.bury();
            if told.elapsed() >= METRICS_EVERY {
                told = Instant::now();
                self.publish_metrics();
            }
        }
    }

    /// Lets go of what ended leases held, a slice per hold of the lock.
    pub(super) async fn part_leases(&self) {
        while self.directory.lock().part(SLICE_KEYS) {
            tokio::task::yield_now().await;
        }
        self.may_leave();
    }

    /// The same as soon as a large lease was released: what it held need not wait for a tick.
    async fn part_released(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.parting.notified() => self.part_leases().await,
            }
        }
    }

    /// Frees what is over: it waits for the device, which the ticks must not.
    async fn free_what_is_over(self: Arc<Self>) {
        let mut every = tokio::time::interval(TICK);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut sweep = 0;
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                _ = every.tick() => {}
            }
            self.expire_positions(self.clock.monotonic()).await;
            self.sweep_stale(&mut sweep).await;
        }
    }

    async fn expire_positions(self: &Arc<Self>, now: kvkeep_core::Instant) {
        let expired = self.directory.lock().expire(now, EXPIRE_POSITIONS);
        self.let_go(&expired, MissReason::Expired).await;
    }

    /// Reclaims a slice of what belongs to older revisions.
    async fn sweep_stale(self: &Arc<Self>, cursor: &mut u32) {
        let slice = self.directory.lock().sweep_stale(|handle| self.views.is_current(handle), *cursor, SWEEP_POSITIONS);
        *cursor = slice.next.unwrap_or(0);
        self.let_go(&slice.stale, MissReason::Revision).await;
    }

    /// Waits until nothing is queued for NVMe, as a clean stop does.
    pub(super) async fn drain_writes(&self) {
        let until = Instant::now() + DRAIN_MAX;
        while self.behind.dirty_bytes() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if self.behind.dirty_bytes() > 0 {
            tracing::warn!(bytes = self.behind.dirty_bytes(), "stopping with blocks that are not on NVMe");
        }
    }

    /// Blocks adopted from an arena of the last life that NVMe does not have are queued like new ones.
    async fn queue_adopted(self: Arc<Self>) {
        if self.nvme.is_none() || self.report.adopted_slots == 0 {
            return;
        }
        for slot in self.arena.slots() {
            if self.stopping.is_cancelled() {
                return;
            }
            let Some(meta) = self.arena.pin(slot).and_then(|p| p.meta().ok()) else { continue };
            let found = self.directory.lock().locate(&meta.id.digest, meta.id.group, meta.id.shard);
            if found.is_some_and(|f| f.slot == Some(slot) && f.place.is_none()) {
                self.write_behind(&meta, slot, true).await;
            }
        }
    }

    async fn pause_for(&self, bytes: u64, bytes_per_s: u64) -> bool {
        let pause = Duration::from_secs_f64(bytes as f64 / bytes_per_s.max(1) as f64).max(Duration::from_millis(20));
        tokio::select! {
            () = self.stopping.cancelled() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }

    /// Checks DRAM copies against their sums, slowly, for ever.
    async fn scrub_dram(self: Arc<Self>) {
        let rate = self.config.arena.scrub_bytes_per_s.0;
        if rate == 0 {
            return;
        }
        loop {
            if !self.pause_for(rate, rate).await {
                return;
            }
            let slots: Vec<_> = self.arena.slots().collect();
            for slice in slots.chunks(SCRUB_BLOCKS) {
                let bytes = self.scrub_aside(slice).await;
                if !self.pause_for(bytes, rate).await {
                    return;
                }
            }
        }
    }

    /// Checks some slots on a thread of its own that yields to those that serve; how many bytes they had.
    pub(super) async fn scrub_aside(self: &Arc<Self>, slots: &[SlotRef]) -> u64 {
        let (done, bytes) = oneshot::channel();
        // It cannot be started or has ended only where the machine is out of threads; then nothing was checked.
        let _ = self.scrubber.get_or_init(scrubber).send((Arc::clone(self), slots.to_vec(), done));
        bytes.await.unwrap_or_default()
    }

    fn scrub_slots(&self, slots: &[SlotRef]) -> u64 {
        let mut bytes = 0;
        for slot in slots {
            let Some(part) = self.arena.pin(*slot) else { continue };
            bytes += part.len() as u64;
            self.counters.scrubbed_copies.one();
            if self.arena.verify(*slot, std::thread::yield_now) == Some(false) {
                match part.meta() {
                    Ok(meta) => self.drop_bad_copy(&meta.id, *slot),
                    Err(error) => {
                        // Not even its entry says what it was, or somebody was first.
                        if self.arena.quarantine(*slot) {
                            tracing::error!(%error, "a DRAM copy and its entry failed their checks: quarantined");
                            self.counters.corrupt_copies.one();
                        }
                    }
                }
            }
        }
        bytes
    }

    /// Checks NVMe copies against their sums, slowly, for ever.
    async fn scrub_nvme(self: Arc<Self>) {
        let rate = self.config.nvme.scrub_bytes_per_s.0;
        let Some(nvme) = self.nvme.clone().filter(|_| rate != 0) else { return };
        let mut cursor = None;
        loop {
            let bytes = match nvme.scrub(cursor, SCRUB_BLOCKS).await {
                Ok(report) => {
                    self.take_scrub(&report);
                    cursor = report.next;
                    // A pass over an empty or small device pauses for a second at least.
                    if cursor.is_none() { report.bytes.max(rate) } else { report.bytes }
                }
                Err(error) => {
                    tracing::warn!(%error, "scrub: the index could not be read");
                    rate.saturating_mul(60)
                }
            };
            if !self.pause_for(bytes, rate).await {
                return;
            }
        }
    }

    /// Tells the directory what a scrub of NVMe found; how many blocks were bad.
    pub(super) fn take_scrub(&self, report: &ScrubReport) -> u64 {
        self.counters.scrubbed_copies.add(report.checked);
        let mut bad = 0;
        for (copy, fault) in &report.faults {
            match fault {
                ScrubFault::Corrupt(doubt) => {
                    bad += 1;
                    tracing::error!(block = ?copy.id, ?doubt, "scrub: an NVMe copy is not what was put: quarantined");
                    self.counters.corrupt_copies.one();
                    let (digest, reason) = (&copy.id.digest, MissReason::Quarantined);
                    self.directory.lock().drop_place(&copy.id, copy.place, reason);
                    self.journal.note(digest, Happening::Quarantined, Tier::Nvme, Some(reason));
                }
                // Freed while the scrub was on its way, mostly; where somebody still names it, no longer.
                ScrubFault::Stale => {
                    tracing::debug!(block = ?copy.id, "scrub: an NVMe copy has gone");
                    self.directory.lock().drop_place(&copy.id, copy.place, MissReason::Evicted);
                }
                ScrubFault::Io => {}
            }
        }
        bad
    }

    fn publish_metrics(&self) {
        self.counters.publish();
        let stats = self.stats();
        for tier in &stats.tiers {
            let name = kvkeep_client::convert::tier_opt_from_proto(tier.tier).map_or("none", Tier::word);
            metrics::gauge!("kvkeep_tier_capacity_bytes", "tier" => name).set(tier.capacity_bytes as f64);
            metrics::gauge!("kvkeep_tier_used_bytes", "tier" => name).set(tier.used_bytes as f64);
            metrics::gauge!("kvkeep_tier_free_bytes", "tier" => name).set(tier.free_bytes as f64);
        }
        metrics::gauge!("kvkeep_arena_stranded_bytes").set(self.arena.usage().stranded.total() as f64);
        metrics::gauge!("kvkeep_positions").set(stats.positions as f64);
        metrics::gauge!("kvkeep_policy_ghosts").set(self.directory.lock().ghosts() as f64);
        let (sessions, positions, pinned) = self.session_usage();
        metrics::gauge!("kvkeep_sessions").set(sessions as f64);
        metrics::gauge!("kvkeep_session_positions").set(positions as f64);
        metrics::gauge!("kvkeep_pinned_positions").set(pinned as f64);
        metrics::gauge!("kvkeep_leases").set(f64::from(stats.leases));
        metrics::gauge!("kvkeep_leased_positions").set(f64::from(stats.leased_positions));
        metrics::gauge!("kvkeep_reservations").set(f64::from(stats.reservations));
        metrics::gauge!("kvkeep_reserved_bytes").set(stats.reserved_bytes as f64);
        metrics::gauge!("kvkeep_dirty_bytes").set(self.behind.dirty_bytes() as f64);
        metrics::gauge!("kvkeep_nvme_reads_in_flight").set(self.flights.under_way() as f64);
        metrics::gauge!("kvkeep_connections").set(f64::from(self.instances.open()));
        let (mapped, (regions, region_bytes)) = (self.mapped_usage(), self.region_usage());
        metrics::gauge!("kvkeep_mapped_slots").set(mapped.slots as f64);
        metrics::gauge!("kvkeep_mapped_bytes").set(mapped.bytes as f64);
        metrics::gauge!("kvkeep_mapped_orphaned_bytes").set(mapped.orphaned_bytes as f64);
        metrics::gauge!("kvkeep_regions").set(regions as f64);
        metrics::gauge!("kvkeep_region_bytes").set(region_bytes as f64);
        metrics::gauge!("kvkeep_watchers").set(f64::from(self.watchers.load(Ordering::Relaxed)));
    }
}
