//! Restore: brings a session up to DRAM before a deadline, and says what of it is usable.
//!
//! Floor of a session on NVMe: one read of header and payload per block, DMA into its slot, one pass for the sums. Blocks are
//! read `READS_MAX` at a time, so that device and processors both have work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use kvkeep_core::catalogue::Namespace;
use kvkeep_core::session::Session;
use kvkeep_core::{BlockId, Fidelity, LeaseId, MissReason, RequestId, RequestInfo, Result};
use kvkeep_tiers::dram::Purpose;
use tokio::sync::mpsc;

use super::super::inflight::Flight;
use super::super::lookup::MatchWish;
use super::super::put::Caller;
use super::super::{SLICE_KEYS, Store};
use super::manifest::sentence;

/// Blocks that are read at a time.
const READS_MAX: usize = 32;
/// Bytes that are read at a time, if blocks are large.
const READ_BYTES_MAX: u64 = 128 << 20;
/// Between two words on how far it is.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Runs of missing positions that are named.
const RUNS_MAX: usize = 1024;

/// A restore.
#[derive(Clone, Debug)]
pub struct RestoreWish {
    /// Names the lease.
    pub request: RequestId,
    /// Of the lease that is taken over what is usable; `None`: none.
    pub lease: Option<Duration>,
    /// For the policy.
    pub info: RequestInfo,
    /// When it ends with what is there.
    pub deadline: tokio::time::Instant,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// In DRAM now.
    pub positions: u64,
    /// Of the session.
    pub total_positions: u64,
    /// In DRAM now.
    pub bytes: u64,
    /// Of what is usable.
    pub total_bytes: u64,
}

/// Positions in a row that are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingRun {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Of the first.
    pub reason: MissReason,
    /// The same as a sentence.
    pub why: &'static str,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Restored {
    /// At the end.
    pub progress: Progress,
    /// Up to the largest boundary that is valid under the rules of all groups.
    pub usable_positions: u64,
    /// The engine computes from here on.
    pub compute_from_token: u64,
    /// At most 1,024 runs.
    pub missing: Vec<MissingRun>,
    /// The session is of the namespace's weights.
    pub revision_matches: bool,
    /// Not all of it was brought up: the deadline passed, or DRAM has no more room.
    pub late: bool,
    /// Over what is usable.
    pub lease: Option<LeaseId>,
}

impl Store {
    /// Brings a session up to DRAM. How far it is goes to `tell`; nobody needs to listen.
    ///
    /// # Errors
    /// Of the lease, where one is asked for.
    pub async fn restore_session(
        self: &Arc<Self>,
        caller: Caller,
        namespace: &Namespace,
        session: &Session,
        wish: RestoreWish,
        tell: mpsc::Sender<Progress>,
    ) -> Result<Restored> {
        let mut restored = Restored {
            progress: Progress { total_positions: session.positions(), ..Progress::default() },
            usable_positions: 0,
            compute_from_token: 0,
            missing: Vec::new(),
            revision_matches: session.revision == namespace.revision,
            late: false,
            lease: None,
        };
        if !restored.revision_matches {
            restored.missing = run(0, session.positions(), MissReason::Revision).into_iter().collect();
            return Ok(restored);
        }
        let handle = session.handle(namespace.id);
        let digests: Vec<_> = session.manifest.iter().collect();
        let matching = MatchWish {
            request_id: wish.request.clone(),
            handle,
            digests,
            lease: wish.lease,
            promote: false,
            statuses: false,
            fidelity: Fidelity::Exact,
        };
        let matched = self.match_chain(caller, &wish.info, &matching)?;
        let usable = matched.outcome.boundary_positions as usize;
        restored.usable_positions = usable as u64;
        restored.compute_from_token = matched.boundary_tokens;
        restored.lease = matched.lease.map(|(id, _)| id);
        restored.missing = self.missing(&matching.digests);
        restored.progress.total_bytes = matched.outcome.dram_bytes + matched.outcome.nvme_bytes;
        if wish.lease.is_none() {
            // It is used again, whatever was said of it. The deepest first, as a lease does.
            let deepest_first = matching.digests[..usable].iter().rev();
            self.touch(caller, &wish.request, None, &wish.info, deepest_first);
        }
        self.bring_up(caller, handle, &matching.digests[..usable], &wish, &tell, &mut restored).await;
        self.counters.session_restores.one();
        Ok(restored)
    }

    /// Runs of positions that are not here.
    fn missing(&self, digests: &[kvkeep_core::Digest]) -> Vec<MissingRun> {
        let mut runs: Vec<MissingRun> = Vec::new();
        for (n, slice) in digests.chunks(SLICE_KEYS).enumerate() {
            let here: Vec<bool> = {
                let directory = self.directory.lock();
                slice.iter().map(|d| directory.standing(d).is_some()).collect()
            };
            for (i, digest) in slice.iter().enumerate().filter(|(i, _)| !here[*i]) {
                let at = (n * SLICE_KEYS + i) as u64;
                if let Some(run) = runs.last_mut().filter(|run| run.first + run.count == at) {
                    run.count += 1;
                } else if runs.len() == RUNS_MAX {
                    return runs;
                } else {
                    let reason = self.placing(*digest, None, false).reason;
                    runs.extend(run(at, 1, reason.unwrap_or(MissReason::Evicted)));
                }
            }
        }
        runs
    }

    async fn bring_up(
        self: &Arc<Self>,
        caller: Caller,
        handle: kvkeep_core::Handle,
        digests: &[kvkeep_core::Digest],
        wish: &RestoreWish,
        tell: &mpsc::Sender<Progress>,
        restored: &mut Restored,
    ) {
        let (positions, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        let stopped = Arc::new(AtomicBool::new(false));
        let all = digests.len();
        let digests = &digests[..self.make_way(digests).await];
        let largest = digests.first().map_or(1, |d| self.located(d).iter().map(|(_, l)| u64::from(l.len)).sum());
        let at_a_time = (READ_BYTES_MAX / largest.max(1)).clamp(2, READS_MAX as u64) as usize;
        let mut reads = stream::iter(digests.to_vec())
            .map(|digest| {
                let (store, stopped) = (Arc::clone(self), Arc::clone(&stopped));
                async move {
                    if stopped.load(Ordering::Relaxed) {
                        return None;
                    }
                    let mut up = 0;
                    for (id, found) in store.located(&digest) {
                        if !store.bring_up_part(caller, handle, id, &found).await {
                            // Without room, or with a bad copy, what comes behind it is of no use.
                            stopped.store(true, Ordering::Relaxed);
                            return None;
                        }
                        up += u64::from(found.len);
                    }
                    Some(up)
                }
            })
            .buffered(at_a_time);
        let progress = |restored: &Restored| Progress {
            positions: positions.load(Ordering::Relaxed),
            bytes: bytes.load(Ordering::Relaxed),
            ..restored.progress
        };
        let mut told = tokio::time::interval(TELL_EVERY);
        told.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                read = reads.next() => match read {
                    Some(Some(up)) => {
                        positions.fetch_add(1, Ordering::Relaxed);
                        bytes.fetch_add(up, Ordering::Relaxed);
                    }
                    Some(None) => {}
                    None => break,
                },
                () = tokio::time::sleep_until(wish.deadline) => break,
                () = self.stopping.cancelled() => break,
                _ = told.tick() => {
                    // A listener that is slow is told the next time.
                    let _ = tell.try_send(progress(restored));
                }
            }
        }
        drop(reads);
        // What came first may have had to go again: of a session larger than DRAM only a part is there.
        let (positions, bytes) = self.in_dram(digests).await;
        restored.progress = Progress { positions, bytes, ..restored.progress };
        restored.late = restored.progress.positions < all as u64;
    }

    /// How many of these positions DRAM can hold beside what is kept free. Of a session that is larger the tail gives its room to
    /// the head: an engine begins with the head.
    async fn make_way(&self, digests: &[kvkeep_core::Digest]) -> usize {
        let room = self.arena.usage().capacity_bytes / 100 * u64::from(100 - self.config.arena.high_watermark_percent);
        let (mut fits, mut bytes) = (0, 0);
        for slice in digests.chunks(SLICE_KEYS) {
            for digest in slice {
                let parts = self.located(digest);
                bytes += parts.iter().map(|(_, part)| u64::from(part.len)).sum::<u64>();
                if bytes <= room {
                    fits += 1;
                    continue;
                }
                for (id, part) in parts.iter().filter(|(_, part)| part.place.is_some()) {
                    if let Some(slot) = part.slot.filter(|slot| !self.arena.is_pinned(*slot)) {
                        self.drop_dram(id, slot);
                    }
                }
            }
            tokio::task::yield_now().await;
        }
        fits
    }

    /// Positions that are in DRAM with all their parts, and their bytes.
    async fn in_dram(&self, digests: &[kvkeep_core::Digest]) -> (u64, u64) {
        let (mut positions, mut bytes) = (0, 0);
        for slice in digests.chunks(SLICE_KEYS) {
            for parts in slice.iter().map(|digest| self.located(digest)) {
                if !parts.is_empty() && parts.iter().all(|(_, part)| part.slot.is_some()) {
                    positions += 1;
                    bytes += parts.iter().map(|(_, part)| u64::from(part.len)).sum::<u64>();
                }
            }
            tokio::task::yield_now().await;
        }
        (positions, bytes)
    }

    async fn bring_up_part(
        self: &Arc<Self>,
        caller: Caller,
        handle: kvkeep_core::Handle,
        id: BlockId,
        found: &kvkeep_core::directory::Located,
    ) -> bool {
        found.slot.is_some()
            || matches!(self.read_up(caller, &id, handle, None, found, Purpose::Promote).await, Flight::Ready(_))
    }
}

fn run(first: u64, count: u64, reason: MissReason) -> Option<MissingRun> {
    (count > 0).then_some(MissingRun { first, count, reason, why: sentence(reason) })
}
