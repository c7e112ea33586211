//! Slots promised to writers that have not committed yet.
//!
//! ```text
//! reserve --> Idle <--take/give back--> Writing (its bytes are with one Write call)
//!               |                          |
//!               +--commit: removed         +--deadline, release, end of instance: removed when given back
//! ```
//! One reservation a block: a second writer hears `in progress elsewhere`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::checksum::RunningSums;
use kvkeep_core::ids::BlockId;
use kvkeep_core::{BlockMeta, Class, Error, ErrorKind, InstanceId, Instant, Priority, Result, TenantId};
use kvkeep_tiers::dram::Reserved;

/// A name a client cannot guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReservationId(pub u64);

/// Everything the commit will need. `S` is the memory; a test puts its own there.
#[derive(Debug)]
pub struct Reservation<S = Reserved> {
    /// Whose it is.
    pub instance: InstanceId,
    /// What will be stored; version and sums are filled in at commit.
    pub meta: BlockMeta,
    /// Class to acknowledge at.
    pub class: Class,
    /// Back-pressure wins over dropping.
    pub keep: bool,
    /// Time to live after commit.
    pub ttl: Option<Duration>,
    /// How much the position counts to the policy; `None`: nobody said.
    pub priority: Option<Priority>,
    /// The engine's key of the position before; for watchers.
    pub parent_key: Option<Arc<[u8]>>,
    /// Tokens of the position; for watchers.
    pub token_ids: Arc<[u32]>,
    /// The memory; `None` for an upgrade, which brings no bytes.
    pub slot: Option<S>,
    /// Bytes landed, all from offset 0 on.
    pub written: u32,
    /// Their sums.
    pub sums: RunningSums,
}

#[derive(Debug)]
enum State<S> {
    Idle(Box<Reservation<S>>),
    Writing,
    /// Ended while its bytes were with a Write call.
    Ended,
}

#[derive(Debug)]
struct Entry<S> {
    state: State<S>,
    instance: InstanceId,
    tenant: TenantId,
    block: BlockId,
    len: u32,
    ends: Instant,
}

/// All reservations of a node.
#[derive(Debug)]
pub struct Reservations<S = Reserved> {
    entries: HashMap<ReservationId, Entry<S>>,
    by_block: HashMap<BlockId, ReservationId>,
    by_end: BTreeSet<(Instant, ReservationId)>,
    bytes: u64,
    bytes_max: u64,
}

impl<S> Reservations<S> {
    /// `bytes_max`: reserved and not yet committed, all clients together.
    pub fn new(bytes_max: u64) -> Self {
        Self { entries: HashMap::new(), by_block: HashMap::new(), by_end: BTreeSet::new(), bytes: 0, bytes_max }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Bytes they hold.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether `len` more bytes fit under the bound.
    pub fn has_room(&self, len: u64) -> bool {
        self.bytes.saturating_add(len) <= self.bytes_max
    }

    /// Until when the block is being written by somebody, if it is.
    pub fn in_progress(&self, block: &BlockId) -> Option<Instant> {
        self.by_block.get(block).and_then(|id| self.entries.get(id)).map(|e| e.ends)
    }

    /// Adds one; `false` (and nothing is kept) where the block is reserved already or the bound is reached.
    pub fn add(&mut self, id: ReservationId, reservation: Reservation<S>, ends: Instant) -> bool {
        let len = if reservation.slot.is_some() { reservation.meta.len } else { 0 };
        let block = reservation.meta.id;
        if self.by_block.contains_key(&block) || self.entries.contains_key(&id) || !self.has_room(u64::from(len)) {
            return false;
        }
        let (instance, tenant) = (reservation.instance, reservation.meta.tenant);
        self.by_block.insert(block, id);
        self.by_end.insert((ends, id));
        self.bytes += u64::from(len);
        self.entries
            .insert(id, Entry { state: State::Idle(Box::new(reservation)), instance, tenant, block, len, ends });
        true
    }

    fn forget(&mut self, id: ReservationId) -> Option<Entry<S>> {
        let entry = self.entries.remove(&id)?;
        self.by_block.remove(&entry.block);
        self.by_end.remove(&(entry.ends, id));
        self.bytes -= u64::from(entry.len);
        Some(entry)
    }

    fn find(&mut self, id: ReservationId, tenant: TenantId) -> Result<&mut Entry<S>> {
        self.entries.get_mut(&id).filter(|e| e.tenant == tenant).ok_or_else(|| {
            Error::new(
                ErrorKind::Expired,
                "no such reservation: committed, abandoned or past its deadline; reserve again",
            )
            .with("reservation_id", id.0)
        })
    }

    /// Takes the bytes out to be written by one call; they come back by [`Reservations::give_back`].
    pub fn take(&mut self, id: ReservationId, tenant: TenantId) -> Result<Box<Reservation<S>>> {
        let entry = self.find(id, tenant)?;
        match std::mem::replace(&mut entry.state, State::Writing) {
            State::Idle(reservation) => Ok(reservation),
            other => {
                entry.state = other;
                Err(Error::new(ErrorKind::Conflict, "the reservation is being written by another call")
                    .with("reservation_id", id.0))
            }
        }
    }

    /// Returns what [`Reservations::take`] gave. Dropped instead, with its slot, where the reservation ended meanwhile.
    pub fn give_back(&mut self, id: ReservationId, reservation: Box<Reservation<S>>) {
        match self.entries.get_mut(&id) {
            Some(entry) if matches!(entry.state, State::Writing) => entry.state = State::Idle(reservation),
            Some(_) => drop(self.forget(id)),
            None => {}
        }
    }

    /// Ends a reservation that [`Reservations::take`] gave out, without giving it back.
    pub fn finish(&mut self, id: ReservationId) {
        self.forget(id);
    }

    fn end(&mut self, id: ReservationId) {
        match self.entries.get_mut(&id) {
            Some(Entry { state: state @ State::Writing, .. }) => *state = State::Ended,
            Some(Entry { state: State::Ended, .. }) | None => {}
            Some(Entry { state: State::Idle(_), .. }) => drop(self.forget(id)),
        }
    }

    /// Abandons one of this tenant's reservations; `false` where there is none.
    pub fn abandon(&mut self, id: ReservationId, tenant: TenantId) -> bool {
        let ours = self.find(id, tenant).is_ok();
        if ours {
            self.end(id);
        }
        ours
    }

    /// Abandons all of an instance.
    pub fn end_instance(&mut self, instance: InstanceId) -> usize {
        let ids: Vec<_> = self.entries.iter().filter(|(_, e)| e.instance == instance).map(|(id, _)| *id).collect();
        ids.iter().for_each(|id| self.end(*id));
        ids.len()
    }

    /// Abandons those past their deadline.
    pub fn expire(&mut self, now: Instant) -> usize {
        let mut n = 0;
        while let Some((_, id)) = self.by_end.first().copied().filter(|(ends, _)| *ends <= now) {
            // One whose bytes are with a Write call leaves the queue now and its memory when the call gives it back.
            self.by_end.pop_first();
            self.end(id);
            n += 1;
        }
        n
    }
}

#[cfg(test)]
mod tests;
