//! Times to live, stale revisions, views for people, totals.

use crate::ids::{Digest, GroupId, Handle, Instant, ShardId, Version};
use crate::words::{Class, Fidelity, MissReason};

use super::Directory;
use super::entry::{Entry, Part};
use super::home::Usage;

/// A position as `list` and `explain` show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PositionView {
    /// The position.
    pub digest: Digest,
    /// Its namespace and revision.
    pub handle: Handle,
    /// The position before it, where known.
    pub parent: Option<Digest>,
    /// Its index in its chain.
    pub position: u32,
    /// The strongest class among its parts.
    pub class: Class,
    /// Leases over it.
    pub leases: u32,
    /// Accesses since it is tracked.
    pub accesses: u32,
    /// The last one.
    pub last_access: Instant,
    /// In (group, shard) order; empty: nothing of it is readable.
    pub parts: Vec<PartView>,
    /// Without parts: why the last one went, if that is known.
    pub gone: Option<MissReason>,
}

/// A part as `list` and `explain` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartView {
    /// Of its group.
    pub group: GroupId,
    /// Of its shard.
    pub shard: ShardId,
    /// Raw bytes.
    pub len: u32,
    /// Of the put that made the bytes.
    pub version: Version,
    /// Reached so far.
    pub class: Class,
    /// Of the bytes.
    pub fidelity: Fidelity,
    /// Readable from DRAM.
    pub dram: bool,
    /// Readable from NVMe.
    pub nvme: bool,
}

impl From<&Part> for PartView {
    fn from(p: &Part) -> Self {
        Self {
            group: p.group(),
            shard: p.shard(),
            len: p.len,
            version: p.version,
            class: p.class(),
            fidelity: p.fidelity(),
            dram: p.slot.is_some(),
            nvme: p.place.is_some(),
        }
    }
}

/// One slice of a sweep for stale revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleSlice {
    /// Positions of revisions that are not current; the caller removes them.
    pub stale: Vec<Digest>,
    /// Where the next slice begins; `None`: the sweep has seen everything.
    pub next: Option<u32>,
}

impl Directory {
    /// Sets or lifts the time after which a position may not be read. `false`: it is not here.
    pub fn set_expiry(&mut self, digest: &Digest, at: Option<Instant>) -> bool {
        let Some(id) = self.slab.find(digest).filter(|id| !self.slab[*id].parts.is_empty()) else { return false };
        self.forget_expiry(digest);
        self.slab[id].set(Entry::EXPIRES, at.is_some());
        if let Some(at) = at {
            self.expiry.insert((at, *digest));
            self.expiry_of.insert(*digest, at);
        }
        true
    }

    pub(super) fn forget_expiry(&mut self, digest: &Digest) {
        if let Some(at) = self.expiry_of.remove(digest) {
            self.expiry.remove(&(at, *digest));
        }
    }

    /// At most `max` positions whose time has come, the longest overdue first. Each is given once; the caller removes
    /// it with [`MissReason::Expired`].
    pub fn expire(&mut self, now: Instant, max: usize) -> Vec<Digest> {
        let due: Vec<Digest> = self.expiry.iter().take_while(|(at, _)| *at <= now).map(|(_, d)| *d).take(max).collect();
        for digest in &due {
            self.forget_expiry(digest);
            if let Some(id) = self.slab.find(digest) {
                self.slab[id].set(Entry::EXPIRES, false);
            }
        }
        due
    }

    /// Looks at `count` entries from `cursor` (0 at first) for positions whose handle is not current, so that old
    /// revisions can be reclaimed in slices.
    pub fn sweep_stale(&self, is_current: impl Fn(Handle) -> bool, cursor: u32, count: u32) -> StaleSlice {
        let end = cursor.saturating_add(count).min(self.slab.end());
        // Neighbours mostly share a handle.
        let mut known: Option<(Handle, bool)> = None;
        let mut stale = Vec::new();
        for e in (cursor..end).filter_map(|id| self.slab.live(id)).filter(|e| !e.parts.is_empty()) {
            let handle = self.homes.get(e.home).handle;
            let current = match known {
                Some((h, current)) if h == handle => current,
                _ => is_current(handle),
            };
            known = Some((handle, current));
            if !current {
                stale.push(e.digest);
            }
        }
        StaleSlice { stale, next: (end < self.slab.end()).then_some(end) }
    }

    /// Brings what is known of these positions into the processor's cache and says how many are here. Before a batch of
    /// inserts (of an index being opened, with the parents' digests) it lets look-ups that would wait for memory one after
    /// the other wait together.
    pub fn warm<'a>(&self, digests: impl Iterator<Item = &'a Digest>) -> usize {
        digests.filter(|d| self.slab.find(d).is_some()).count()
    }

    /// Handles with tracked positions, and what they hold.
    pub fn usages(&self) -> Vec<(Handle, Usage)> {
        self.homes.iter().map(|h| (h.handle, h.usage)).collect()
    }

    /// What the positions of one handle hold.
    pub fn usage(&self, handle: Handle) -> Usage {
        self.homes.find(handle).map_or_else(Usage::default, |h| h.usage)
    }

    /// What all positions hold.
    pub fn totals(&self) -> Usage {
        self.homes.iter().fold(Usage::default(), |a, h| Usage {
            positions: a.positions + h.usage.positions,
            parts: a.parts + h.usage.parts,
            dram_bytes: a.dram_bytes + h.usage.dram_bytes,
            nvme_bytes: a.nvme_bytes + h.usage.nvme_bytes,
        })
    }

    /// Entries in use: positions, and those that stand for their children or leases only.
    pub fn entries(&self) -> u32 {
        self.slab.len()
    }

    /// Everything known of a position; `None`: nothing is.
    pub fn view(&self, digest: &Digest) -> Option<PositionView> {
        self.slab.find(digest).map(|id| self.view_of(&self.slab[id]))
    }

    /// Readable positions of at most `count` entries from `cursor` (0 at first), and where the next slice begins; `None`:
    /// that was all. What comes and goes in between may be missed or seen.
    pub fn scan(&self, cursor: u32, count: u32) -> (Vec<PositionView>, Option<u32>) {
        let end = cursor.saturating_add(count).min(self.slab.end());
        let live = (cursor..end).filter_map(|id| self.slab.live(id)).filter(|e| !e.parts.is_empty());
        (live.map(|e| self.view_of(e)).collect(), (end < self.slab.end()).then_some(end))
    }

    fn view_of(&self, e: &Entry) -> PositionView {
        PositionView {
            digest: e.digest,
            handle: self.homes.get(e.home).handle,
            parent: e.parent.some().map(|p| self.slab[p].digest),
            position: e.position,
            class: e.class(),
            leases: e.leases,
            accesses: e.accesses,
            last_access: e.last_access,
            parts: e.parts.as_slice().iter().map(PartView::from).collect(),
            gone: e.gone_for(),
        }
    }
}
