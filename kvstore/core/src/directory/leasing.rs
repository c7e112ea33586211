//! Leases over positions: the table knows who and until when, the entries count how many.

use std::time::Duration;

use crate::error::Result;
use crate::ids::{Digest, InstanceId, Instant, LeaseId, RequestId};
use crate::lease::{LeaseAsk, LeaseInfo};
use crate::words::RequestInfo;

use super::Directory;
use super::entry::{EntryId, Level};

impl Directory {
    /// Leases those of `digests` that are here (at least one part), in the lease that `ask` names; each position newly
    /// in it counts as accessed. `now` is on the clock of leases, `accessed` on the policy's. Returns the lease (`None`:
    /// nothing was here and no such lease was) and, per digest, whether it is held now.
    ///
    /// # Errors
    /// `Throttled` or `TooLarge` naming the bound, with nothing taken; `Expired` for a lease at the end of its life.
    pub fn lease(
        &mut self,
        ask: &LeaseAsk,
        digests: &[Digest],
        info: &RequestInfo,
        now: Instant,
        accessed: Instant,
    ) -> Result<(Option<LeaseId>, Vec<bool>)> {
        self.lease_beside(ask, digests, info, now, accessed, None)
    }

    /// The same beside another lease of the same request: what that one holds was counted as accessed when it was taken.
    ///
    /// # Errors
    /// As [`Directory::lease`].
    pub fn lease_beside(
        &mut self,
        ask: &LeaseAsk,
        digests: &[Digest],
        info: &RequestInfo,
        now: Instant,
        accessed: Instant,
        counted: Option<LeaseId>,
    ) -> Result<(Option<LeaseId>, Vec<bool>)> {
        let (lease, new) = self.open_lease(ask, now)?;
        let here = digests.iter().map(|d| self.slab.find(d).filter(|id| !self.slab[*id].parts.is_empty()));
        let here: Vec<Option<EntryId>> = here.collect();
        let mut fresh = Vec::new();
        if let Err(e) = self.hold(lease, here.iter().flatten().copied(), &mut fresh) {
            self.unhold(lease, fresh);
            self.end_if_empty(lease, new);
            return Err(e);
        }
        // The deepest first, so that a parent is never older than its child.
        for id in fresh.into_iter().rev() {
            let holds = |other: LeaseId| self.leases.get(other).is_some_and(|lease| lease.positions.contains(id));
            if !counted.is_some_and(holds) {
                self.access_entry(id, info, accessed);
            }
        }
        let empty = self.end_if_empty(lease, new);
        Ok(((!empty).then_some(lease), here.iter().map(Option::is_some).collect()))
    }

    /// Moves the end of a lease to `ttl` from now, within its longest life, and returns the end.
    ///
    /// # Errors
    /// `Expired` when it has ended.
    pub fn renew_lease(&mut self, id: LeaseId, ttl: Duration, now: Instant) -> Result<Instant> {
        self.leases.renew(id, ttl, now)
    }

    /// Ends a lease. `false`: it had ended before. The positions of a large one are let go in slices, by
    /// [`Directory::part`].
    pub fn release(&mut self, id: LeaseId) -> bool {
        let Some(lease) = self.leases.end(id) else { return false };
        if lease.positions.len() as usize <= super::matching::SLICE {
            for position in lease.positions.iter() {
                self.uncount(position);
            }
        } else {
            self.parting.push_back(lease.positions.into_parting());
        }
        true
    }

    /// Lets go of at most `max` positions of leases that have ended. `true`: there are more.
    pub fn part(&mut self, max: usize) -> bool {
        for _ in 0..max {
            let Some(lease) = self.parting.front_mut() else { return false };
            match lease.next() {
                Some(position) => self.uncount(position),
                None => drop(self.parting.pop_front()),
            }
        }
        !self.parting.is_empty()
    }

    /// Whether there is anything for [`Directory::part`] to do.
    pub fn is_parting(&self) -> bool {
        !self.parting.is_empty()
    }

    /// The lease of a request, if it has one.
    pub fn lease_of_request(&self, instance: InstanceId, request: &RequestId) -> Option<LeaseId> {
        self.leases.of_request(instance, request)
    }

    /// Ends at most `max` leases of an instance. `true`: there may be more.
    pub fn end_instance(&mut self, instance: InstanceId, max: usize) -> bool {
        for _ in 0..max {
            match self.leases.any_of(instance) {
                Some(id) => self.release(id),
                None => return false,
            };
        }
        true
    }

    /// Ends at most `max` leases whose time has come. Returns how many.
    pub fn expire_leases(&mut self, now: Instant, max: usize) -> usize {
        let mut ended = 0;
        while ended < max
            && let Some(id) = self.leases.due(now)
        {
            self.release(id);
            ended += 1;
        }
        ended
    }

    /// The lease, if it has not ended.
    pub fn lease_info(&self, id: LeaseId) -> Option<LeaseInfo> {
        self.leases.info(id)
    }

    /// Whether a lease holds a position: then a get under it is not another access.
    pub fn lease_holds(&self, id: LeaseId, digest: &Digest) -> bool {
        self.leases.get(id).zip(self.slab.find(digest)).is_some_and(|(lease, entry)| lease.positions.contains(entry))
    }

    /// At most `most` leases, those that end soonest first.
    pub fn leases(&self, most: usize) -> Vec<LeaseInfo> {
        self.leases.list(most)
    }

    /// How many leases there are.
    pub fn lease_count(&self) -> usize {
        self.leases.len()
    }

    /// Positions with at least one lease.
    pub fn leased_positions(&self) -> u32 {
        self.leased
    }

    pub(super) fn open_lease(&mut self, ask: &LeaseAsk, now: Instant) -> Result<(LeaseId, bool)> {
        // One whose time has come but that nobody has ended yet is no more.
        if let Some(old) = self.leases.of_request(ask.instance, &ask.request)
            && self.leases.info(old).is_some_and(|lease| lease.ends <= now)
        {
            self.release(old);
        }
        self.leases.open(ask, now)
    }

    /// Adds positions to a lease; those that were not in it are added to `fresh`, also where a bound ends it with an error.
    pub(super) fn hold(
        &mut self,
        lease: LeaseId,
        positions: impl Iterator<Item = EntryId>,
        fresh: &mut Vec<EntryId>,
    ) -> Result<()> {
        let before = fresh.len();
        let done = self.leases.add(lease, positions, |id| fresh.push(id));
        for id in &fresh[before..] {
            let e = &mut self.slab[*id];
            e.leases += 1;
            if e.leases == 1 {
                self.leased += 1;
                self.refresh_spare(*id);
            }
        }
        done
    }

    /// Takes positions out of a lease, if that still is and has them.
    pub(super) fn unhold(&mut self, lease: LeaseId, positions: impl IntoIterator<Item = EntryId>) {
        for id in positions {
            if self.leases.drop_position(lease, id) {
                self.uncount(id);
            }
        }
    }

    /// Ends a lease that was opened for nothing.
    pub(super) fn end_if_empty(&mut self, lease: LeaseId, new: bool) -> bool {
        new && self.leases.get(lease).is_some_and(|l| l.positions.len() == 0) && self.release(lease)
    }

    fn uncount(&mut self, id: EntryId) {
        let e = &mut self.slab[id];
        e.leases -= 1;
        if e.leases > 0 {
            return;
        }
        self.leased -= 1;
        if self.slab[id].parts.is_empty() {
            self.release_entry(id);
            return;
        }
        self.refresh_spare(id);
        for level in Level::BOTH {
            if self.slab[id].resident(level) {
                self.policy.freed(&mut self.slab, id, level);
            }
        }
    }
}
