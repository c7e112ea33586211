//! Who was promised that which positions stay readable, until when.
//!
//! A lease is named by (instance, request id): a second one of the same name extends the first to the union. The table
//! knows positions by their index in the directory, which counts leases per position; it is used through
//! [`Directory`](crate::directory::Directory) only.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use hashbrown::HashTable;

use crate::directory::entry::EntryId;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Handle, InstanceId, Instant, LeaseId, RequestId};

/// Bounds of leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseLimits {
    /// Most leases of one engine instance.
    pub leases_per_instance: u32,
    /// Most leased positions of one engine instance; one in two leases counts twice.
    pub positions_per_instance: u32,
    /// Most engine instances that hold leases.
    pub instances: u32,
    /// Longest time a lease is granted or renewed for.
    pub ttl_max: Duration,
    /// However often it is renewed, a lease ends this long after it began.
    pub life_max: Duration,
}

impl Default for LeaseLimits {
    fn default() -> Self {
        Self {
            leases_per_instance: 10_000,
            positions_per_instance: 1024 * 1024,
            instances: 4096,
            ttl_max: Duration::from_secs(60),
            life_max: Duration::from_secs(3600),
        }
    }
}

/// When a bound on what an instance holds may have lifted: leases come and go with requests.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// A wish for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseAsk {
    /// Who asks.
    pub instance: InstanceId,
    /// For what; empty: a lease of its own each time.
    pub request: RequestId,
    /// The id to give if the lease is new: drawn at random by the caller.
    pub fresh: LeaseId,
    /// Of the positions.
    pub handle: Handle,
    /// How long from now; cut to [`LeaseLimits::ttl_max`].
    pub ttl: Duration,
}

/// A lease as an administrator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Its id.
    pub id: LeaseId,
    /// Who holds it.
    pub instance: InstanceId,
    /// For what.
    pub request: RequestId,
    /// Of the positions it was taken over first.
    pub handle: Handle,
    /// Positions held.
    pub positions: u32,
    /// When it began.
    pub begun: Instant,
    /// When it ends unless renewed.
    pub ends: Instant,
}

/// Positions of one lease: a set without order.
#[derive(Default)]
pub(crate) struct Positions(HashTable<EntryId>);

/// Spreads an index over all bits (the golden ratio times 2^64); the table takes its tag from the highest.
fn spread(id: EntryId) -> u64 {
    u64::from(id.0).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(32)
}

impl Positions {
    fn insert(&mut self, id: EntryId) {
        self.0.insert_unique(spread(id), id, |id| spread(*id));
    }

    pub(crate) fn contains(&self, id: EntryId) -> bool {
        self.0.find(spread(id), |other| *other == id).is_some()
    }

    fn remove(&mut self, id: EntryId) -> bool {
        self.0.find_entry(spread(id), |other| *other == id).map(|found| found.remove()).is_ok()
    }

    pub(crate) fn len(&self) -> u32 {
        self.0.len() as u32
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = EntryId> + '_ {
        self.0.iter().copied()
    }

    pub(crate) fn into_parting(self) -> Parting {
        self.0.into_iter()
    }
}

/// Positions of a lease that has ended, on their way out of the counts.
pub(crate) type Parting = hashbrown::hash_table::IntoIter<EntryId>;

/// One lease.
pub(crate) struct Lease {
    instance: InstanceId,
    request: RequestId,
    handle: Handle,
    begun: Instant,
    ends: Instant,
    pub(crate) positions: Positions,
}

impl Lease {
    fn info(&self, id: LeaseId) -> LeaseInfo {
        LeaseInfo {
            id,
            instance: self.instance,
            request: self.request.clone(),
            handle: self.handle,
            positions: self.positions.len(),
            begun: self.begun,
            ends: self.ends,
        }
    }
}

/// What one instance holds.
#[derive(Default)]
struct Holding {
    leases: BTreeSet<LeaseId>,
    positions: u32,
}

/// All leases.
pub(crate) struct LeaseTable {
    limits: LeaseLimits,
    by_id: HashMap<LeaseId, Lease>,
    by_name: HashMap<(InstanceId, RequestId), LeaseId>,
    ends: BTreeSet<(Instant, LeaseId)>,
    holdings: HashMap<InstanceId, Holding>,
}

impl LeaseTable {
    pub(crate) fn new(limits: LeaseLimits) -> Self {
        Self { limits, by_id: HashMap::new(), by_name: HashMap::new(), ends: BTreeSet::new(), holdings: HashMap::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.by_id.get(&id)
    }

    pub(crate) fn info(&self, id: LeaseId) -> Option<LeaseInfo> {
        self.by_id.get(&id).map(|lease| lease.info(id))
    }

    /// The first `most` leases, those that end soonest first.
    pub(crate) fn list(&self, most: usize) -> Vec<LeaseInfo> {
        self.ends.iter().take(most).filter_map(|(_, id)| self.info(*id)).collect()
    }

    /// The lease of that name, extended, or a new one; and whether it is new.
    pub(crate) fn open(&mut self, ask: &LeaseAsk, now: Instant) -> Result<(LeaseId, bool)> {
        let name = (ask.instance, ask.request.clone());
        let named = !ask.request.as_bytes().is_empty();
        if named && let Some(id) = self.by_name.get(&name).copied() {
            self.renew(id, ask.ttl, now)?;
            return Ok((id, false));
        }
        if self.by_id.contains_key(&ask.fresh) {
            return Err(Error::new(ErrorKind::Conflict, "the lease id that was drawn is in use; draw another"));
        }
        let throttled = |what: &'static str| Error::new(ErrorKind::Throttled, what).retry_after(RETRY_AFTER);
        match self.holdings.get(&ask.instance) {
            Some(h) if h.leases.len() >= self.limits.leases_per_instance as usize => {
                return Err(throttled("the instance holds as many leases as it may; release some")
                    .with("leases_per_instance", self.limits.leases_per_instance));
            }
            None if self.holdings.len() >= self.limits.instances as usize => {
                return Err(
                    throttled("as many instances hold leases as may").with("lease_instances", self.limits.instances)
                );
            }
            Some(_) | None => {}
        }
        let id = ask.fresh;
        let ends = now.after(ask.ttl.min(self.limits.ttl_max).min(self.limits.life_max));
        let lease = Lease {
            instance: ask.instance,
            request: ask.request.clone(),
            handle: ask.handle,
            begun: now,
            ends,
            positions: Positions::default(),
        };
        self.by_id.insert(id, lease);
        if named {
            self.by_name.insert(name, id);
        }
        self.ends.insert((ends, id));
        self.holdings.entry(ask.instance).or_default().leases.insert(id);
        Ok((id, true))
    }

    /// Adds positions in order and tells which were not in it. At a bound it stops: those told of stay.
    pub(crate) fn add(
        &mut self,
        id: LeaseId,
        positions: impl Iterator<Item = EntryId>,
        mut added: impl FnMut(EntryId),
    ) -> Result<()> {
        let lease = self.by_id.get_mut(&id).ok_or_else(ended)?;
        let holding = self.holdings.get_mut(&lease.instance).expect("an instance with a lease has a holding");
        let limit = self.limits.positions_per_instance;
        for position in positions {
            if lease.positions.contains(position) {
                continue;
            }
            if holding.positions >= limit {
                // Alone at the bound, waiting for others does not help.
                let e = if lease.positions.len() >= limit {
                    Error::new(ErrorKind::TooLarge, "the lease has more positions than an instance may hold")
                } else {
                    Error::new(ErrorKind::Throttled, "the instance holds as many leased positions as it may")
                        .retry_after(RETRY_AFTER)
                };
                return Err(e.with("leased_positions_per_instance", limit));
            }
            holding.positions += 1;
            lease.positions.insert(position);
            added(position);
        }
        Ok(())
    }

    /// Takes one position out. `false`: the lease has ended or does not have it.
    pub(crate) fn drop_position(&mut self, id: LeaseId, position: EntryId) -> bool {
        let Some(lease) = self.by_id.get_mut(&id) else { return false };
        if !lease.positions.remove(position) {
            return false;
        }
        self.holdings.get_mut(&lease.instance).expect("an instance with a lease has a holding").positions -= 1;
        true
    }

    /// Moves the end to `ttl` from now, never nearer, never beyond the longest life. Returns the new end.
    pub(crate) fn renew(&mut self, id: LeaseId, ttl: Duration, now: Instant) -> Result<Instant> {
        let limits = self.limits;
        let lease = self.by_id.get_mut(&id).filter(|lease| lease.ends > now).ok_or_else(ended)?;
        let asked = now.after(ttl.min(limits.ttl_max)).min(lease.begun.after(limits.life_max));
        if asked > lease.ends {
            self.ends.remove(&(lease.ends, id));
            lease.ends = asked;
            self.ends.insert((asked, id));
        }
        Ok(lease.ends)
    }

    /// Ends a lease and gives back what it held.
    pub(crate) fn end(&mut self, id: LeaseId) -> Option<Lease> {
        let lease = self.by_id.remove(&id)?;
        self.ends.remove(&(lease.ends, id));
        let name = (lease.instance, lease.request.clone());
        if self.by_name.get(&name) == Some(&id) {
            self.by_name.remove(&name);
        }
        if let Some(holding) = self.holdings.get_mut(&lease.instance) {
            holding.leases.remove(&id);
            holding.positions -= lease.positions.len();
            if holding.leases.is_empty() {
                self.holdings.remove(&lease.instance);
            }
        }
        Some(lease)
    }

    pub(crate) fn of_request(&self, instance: InstanceId, request: &RequestId) -> Option<LeaseId> {
        self.by_name.get(&(instance, request.clone())).copied()
    }

    pub(crate) fn any_of(&self, instance: InstanceId) -> Option<LeaseId> {
        self.holdings.get(&instance).and_then(|h| h.leases.first().copied())
    }

    /// A lease whose time has come.
    pub(crate) fn due(&self, now: Instant) -> Option<LeaseId> {
        self.ends.first().filter(|(ends, _)| *ends <= now).map(|(_, id)| *id)
    }
}

/// The error of every use of a lease that is no more.
pub(crate) fn ended() -> Error {
    Error::new(ErrorKind::Expired, "the lease has ended; match again")
}
