//! Match, lease, touch, prefetch, list, explain: everything that moves no bytes.
//!
//! Floor of a match of n keys: n keyed hashes of the keys, n look-ups in the table; no I/O, no wait. The directory's lock
//! is held for at most [`SLICE_KEYS`] keys at a time, so a batch of any size does not keep others out.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::catalogue::Namespace;
use kvkeep_core::directory::{MatchOutcome, Matcher};
use kvkeep_core::{
    BlockId, Digest, Error, ErrorKind, Fidelity, Handle, Key, LeaseAsk, LeaseId, MissReason, PartStatus, RequestId,
    RequestInfo, Result,
};
use kvkeep_tiers::dram::Purpose;

use super::put::{Caller, ReserveWish};
use super::{SLICE_KEYS, Store};

/// A lease, and how long it runs from now.
pub type Held = (LeaseId, Duration);

/// One chain to be matched.
#[derive(Clone, Debug)]
pub struct MatchWish {
    /// Names the lease.
    pub request_id: RequestId,
    /// Namespace and revision.
    pub handle: Handle,
    /// Digests of the chain from its start.
    pub digests: Vec<Digest>,
    /// Take a lease for so long.
    pub lease: Option<Duration>,
    /// Start bringing it up to DRAM.
    pub promote: bool,
    /// A status and a tier per key.
    pub statuses: bool,
    /// Least that is accepted.
    pub fidelity: Fidelity,
}

/// Its answer.
#[derive(Debug)]
pub struct Matched {
    /// Boundary, statuses, bytes by tier.
    pub outcome: MatchOutcome,
    /// Tokens up to the boundary.
    pub boundary_tokens: u64,
    /// What was taken.
    pub lease: Option<Held>,
    /// Declared cost of computing those tokens, microseconds; 0: not declared.
    pub recompute_us: u64,
    /// Estimated time to load them, microseconds.
    pub load_us: u64,
}

impl Store {
    /// The namespace behind a handle, and whether the handle is at its current revision.
    pub fn namespace_of(&self, caller: Caller, handle: Handle) -> Result<(Arc<Namespace>, bool)> {
        let namespace = self.views.of_client(caller.tenant, handle.namespace)?;
        let current = namespace.revision == handle.revision;
        Ok((namespace, current))
    }

    /// Digests of keys under a handle.
    pub fn digests<'a>(&self, caller: Caller, handle: Handle, keys: impl IntoIterator<Item = &'a [u8]>) -> Vec<Digest> {
        super::namespaces::digests(self.secret, caller.tenant, handle, keys)
    }

    /// Answers one chain. Never waits for I/O; the directory is locked for a slice at a time.
    pub fn match_chain(self: &Arc<Self>, caller: Caller, info: &RequestInfo, wish: &MatchWish) -> Result<Matched> {
        let (namespace, current) = self.namespace_of(caller, wish.handle)?;
        self.counters.match_queries.one();
        self.counters.match_keys.add(wish.digests.len() as u64);
        if !current {
            self.counters.missed(MissReason::Revision);
            return Ok(Matched::revision(wish));
        }
        let now = self.clock.monotonic();
        let ask = wish.lease.map(|ttl| self.ask(caller, wish.request_id.clone(), wish.handle, ttl));
        let mut matcher = Matcher::new(&namespace.format, wish.digests.len(), wish.fidelity, wish.statuses, ask);
        for slice in wish.digests.chunks(SLICE_KEYS) {
            matcher.feed(&mut self.directory.lock(), slice, now)?;
            if !matcher.wants_more() {
                break;
            }
        }
        while matcher.settle(&mut self.directory.lock(), info, self.clock.policy()) {}
        let outcome = matcher.finish(|digest| self.journal.why_absent(digest));
        let boundary = outcome.boundary_positions as usize;
        self.counters.match_hit_keys.add(boundary as u64);
        if let Some(reason) = outcome.reason {
            self.counters.missed(reason);
        }
        if wish.promote && outcome.nvme_bytes > 0 {
            self.prefetch(caller, wish.handle, &wish.digests[..boundary]);
        }
        let boundary_tokens = boundary as u64 * u64::from(namespace.format.tokens_per_key);
        Ok(Matched {
            boundary_tokens,
            lease: outcome.lease.and_then(|id| Some((id, self.left_of(id)?))),
            recompute_us: namespace.format.prefill_us(boundary_tokens),
            load_us: self.rates.load_us(outcome.dram_bytes, outcome.nvme_bytes, self.flights.under_way() as u64),
            outcome,
        })
    }

    fn ask(&self, caller: Caller, request: RequestId, handle: Handle, ttl: Duration) -> LeaseAsk {
        LeaseAsk { instance: caller.instance, request, fresh: LeaseId(rand::random::<u64>().max(1)), handle, ttl }
    }

    /// How long a lease still runs.
    fn left_of(&self, id: LeaseId) -> Option<Duration> {
        let ends = self.directory.lock().lease_info(id)?.ends;
        Some(ends.since(self.clock.monotonic()))
    }

    /// Takes or extends a lease over what is here of these positions; a status per position.
    pub fn lease(
        &self,
        caller: Caller,
        request: RequestId,
        handle: Handle,
        digests: &[Digest],
        ttl: Duration,
        info: &RequestInfo,
    ) -> Result<(Option<Held>, Vec<PartStatus>)> {
        let ask = self.ask(caller, request, handle, ttl);
        let mut granted = None;
        let mut statuses = Vec::with_capacity(digests.len());
        for slice in digests.chunks(SLICE_KEYS) {
            let mut directory = self.directory.lock();
            let (lease, held) = directory.lease(&ask, slice, info, self.clock.monotonic(), self.clock.policy())?;
            granted = lease.or(granted);
            statuses.extend(held.into_iter().map(|held| if held { PartStatus::Hit } else { PartStatus::Miss }));
        }
        Ok((granted.and_then(|id| Some((id, self.left_of(id)?))), statuses))
    }

    /// Holds what a reserve found present until the append it serves is answered. An access, unless the request's own lease
    /// holds it: then it was counted.
    pub(super) fn lease_present(&self, caller: Caller, wish: &ReserveWish, digests: &[Digest]) -> Option<LeaseId> {
        if digests.is_empty() {
            return None;
        }
        // Of its own, not the request's: it ends with the append, not with the request. A client over its bounds still
        // gets its answer; it just holds nothing.
        let ask = self.ask(caller, RequestId::default(), wish.handle, self.reservation_term());
        let mut granted = None;
        for slice in digests.chunks(SLICE_KEYS) {
            let mut directory = self.directory.lock();
            let counted = directory.lease_of_request(caller.instance, &wish.request);
            let (now, accessed) = (self.clock.monotonic(), self.clock.policy());
            let (lease, _) = directory.lease_beside(&ask, slice, &wish.info, now, accessed, counted).ok()?;
            granted = lease.or(granted);
        }
        granted
    }

    /// Renews a lease of this instance; how long it runs from now.
    pub fn renew(&self, caller: Caller, id: LeaseId, ttl: Duration) -> Result<Duration> {
        self.check_lease(caller, id)?;
        let now = self.clock.monotonic();
        Ok(self.directory.lock().renew_lease(id, ttl, now)?.since(now))
    }

    /// Ends leases; how many there were.
    pub fn release(&self, caller: Caller, leases: &[LeaseId], requests: &[RequestId]) -> u32 {
        let mut released = 0;
        for id in leases {
            let mut directory = self.directory.lock();
            let ours = directory.lease_info(*id).is_some_and(|l| l.instance == caller.instance);
            released += u32::from(ours && directory.release(*id));
            drop(directory);
            // Held for this instance alone, so another's lease is not touched; one that ended by itself is given back too.
            self.mapped.release(caller.instance, *id);
        }
        for request in requests {
            let lease = self.directory.lock().lease_of_request(caller.instance, request);
            if let Some(id) = lease {
                released += u32::from(self.directory.lock().release(id));
                self.mapped.release(caller.instance, id);
            }
        }
        if self.directory.lock().is_parting() {
            self.parting.notify_one();
        }
        self.may_leave();
        released
    }

    /// Fails where a lease that a call leans on has ended, or is another instance's.
    pub fn check_lease(&self, caller: Caller, id: LeaseId) -> Result<()> {
        if self.directory.lock().lease_info(id).is_some_and(|l| l.instance == caller.instance) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Expired, "the lease has ended: match again")
            .with("lease_id", format!("{:016x}", id.0)))
    }

    /// Counts an access of each position, once per request: what a lease of the request holds, or the `lease` that the call
    /// names, was counted when that was taken. How many are here.
    pub fn touch<'a>(
        &self,
        caller: Caller,
        request: &RequestId,
        lease: Option<LeaseId>,
        info: &RequestInfo,
        digests: impl IntoIterator<Item = &'a Digest>,
    ) -> u32 {
        let now = self.clock.policy();
        let mut digests = digests.into_iter().peekable();
        let mut here = 0;
        while digests.peek().is_some() {
            let mut directory = self.directory.lock();
            let leases = [lease, directory.lease_of_request(caller.instance, request)];
            for digest in digests.by_ref().take(SLICE_KEYS) {
                let counted = leases.iter().flatten().any(|id| directory.lease_holds(*id, digest));
                here += u32::from(counted || directory.access(digest, info, now));
            }
        }
        here
    }

    /// Starts bringing parts up to DRAM in the background: (started, already there, refused).
    pub fn prefetch(self: &Arc<Self>, caller: Caller, handle: Handle, digests: &[Digest]) -> (u32, u32, u32) {
        let (mut started, mut already, mut refused) = (0, 0, 0);
        for slice in digests.chunks(SLICE_KEYS) {
            for (id, located) in slice.iter().flat_map(|d| self.located(d)) {
                if located.slot.is_some() {
                    already += 1;
                    continue;
                }
                let Ok(place) = Arc::clone(&self.prefetch_queue).try_acquire_owned() else {
                    refused += 1;
                    self.counters.prefetch_refused.one();
                    continue;
                };
                started += 1;
                let store = Arc::clone(self);
                tokio::spawn(async move {
                    let Ok(_turn) = store.prefetch_turns.acquire().await else { return };
                    store.read_up(caller, &id, handle, None, &located, Purpose::Promote).await;
                    drop(place);
                });
            }
        }
        (started, already, refused)
    }

    /// The keys of some positions, from whichever part has them; `None` for one that has gone.
    pub async fn keys_of(&self, positions: &[(Digest, Handle)]) -> Vec<Option<Key>> {
        let mut keys: Vec<Option<Key>> = Vec::with_capacity(positions.len());
        let mut on_nvme = Vec::new();
        for (i, (digest, handle)) in positions.iter().enumerate() {
            let parts = self.located(digest);
            let slot = parts.iter().find_map(|(_, found)| self.arena.pin(found.slot?)?.meta().ok());
            if slot.is_none()
                && let Some((id, _)) = parts.first()
            {
                on_nvme.push((i, (*handle, *id)));
            }
            keys.push(slot.map(|meta| meta.key));
        }
        let entries = self.index_entries(on_nvme.iter().map(|(_, block)| *block).collect()).await;
        let mut by_block: HashMap<BlockId, Key> = entries.into_iter().map(|e| (e.id, e.key)).collect();
        for (i, (_, id)) in on_nvme {
            keys[i] = by_block.remove(&id);
        }
        keys
    }
}

impl Matched {
    /// The answer to a handle whose revision is over.
    fn revision(wish: &MatchWish) -> Self {
        let per_key = if wish.statuses { wish.digests.len() } else { 0 };
        Self {
            outcome: MatchOutcome {
                boundary_positions: 0,
                statuses: vec![PartStatus::Miss.code(); per_key],
                tiers: vec![0; per_key],
                dram_bytes: 0,
                nvme_bytes: 0,
                reason: Some(MissReason::Revision),
                lease: None,
                leased_positions: 0,
            },
            boundary_tokens: 0,
            lease: None,
            recompute_us: 0,
            load_us: 0,
        }
    }
}
