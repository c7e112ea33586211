//! What sessions ask of the directory: whether a position can be named by a manifest, which durable blocks no manifest
//! names, and what is pinned.

use crate::ids::{BlockId, Digest};
use crate::words::{Class, Keeper, Tier};

use super::Directory;
use super::entry::{Entry, EntryId, Level, Part};
use super::home::Need;

/// A part of a position that a manifest is about to name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Which.
    pub id: BlockId,
    /// Its class.
    pub class: Class,
    /// On whose word it stays.
    pub keeper: Keeper,
}

/// One slice of a sweep for blocks that only sessions keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionSlice {
    /// Durable blocks of the slice, whoever keeps them.
    pub durable_blocks: u64,
    /// Positions that only sessions keep, that no manifest names and nobody leases, with the bytes of their blocks.
    pub unnamed: Vec<(Digest, u32, u64)>,
    /// Where the next slice begins; `None`: that was all.
    pub next: Option<u32>,
}

impl Directory {
    /// The parts of a position, if it is whole: all shards of its groups with the rule `all`, or any part where it has none
    /// of those. `None`: a manifest cannot name it.
    pub fn standing(&self, digest: &Digest) -> Option<impl Iterator<Item = Standing> + '_> {
        let e = &self.slab[self.slab.find(digest)?];
        let parts = e.parts.as_slice();
        let whole = self.homes.get(e.home).shape.whole(e.position, parts, |need| need == Need::All);
        let standing = |p: &Part| Standing {
            id: BlockId { digest: e.digest, group: p.group(), shard: p.shard() },
            class: p.class(),
            keeper: p.keeper(),
        };
        (whole && !parts.is_empty()).then(|| parts.iter().map(standing))
    }

    /// Looks at `count` entries from `cursor` (0 at first) for durable blocks that only sessions keep and that `named` does
    /// not know. A position of which a caller keeps a part stays whole.
    pub fn unnamed(&self, named: impl Fn(&Digest) -> bool, cursor: u32, count: u32) -> SessionSlice {
        let end = cursor.saturating_add(count).min(self.slab.end());
        let mut slice = SessionSlice { next: (end < self.slab.end()).then_some(end), ..SessionSlice::default() };
        let durable = |p: &&Part| p.class() == Class::Durable;
        for e in (cursor..end).filter_map(|id| self.slab.live(id)).filter(|e| e.has(Entry::DURABLE)) {
            let parts = || e.parts.as_slice().iter().filter(durable);
            slice.durable_blocks += parts().count() as u64;
            if e.leases == 0 && parts().all(|p| p.keeper() == Keeper::Sessions) && !named(&e.digest) {
                slice.unnamed.push((e.digest, parts().count() as u32, parts().map(|p| u64::from(p.len)).sum()));
            }
        }
        slice
    }

    /// One more session wants this position in `tier`: it is not evicted from there, whenever it comes, until as many ask
    /// for its release. Nothing happens for other tiers.
    pub fn pin(&mut self, digest: &Digest, tier: Tier) {
        let Some(level) = Level::of(tier) else { return };
        let pins = self.pins.entry(*digest).or_default();
        pins[level as usize] += 1;
        if let Some(id) = self.slab.find(digest) {
            self.slab[id].set(Entry::PINNED[level as usize], true);
        }
    }

    /// One session less wants it there.
    pub fn unpin(&mut self, digest: &Digest, tier: Tier) {
        let Some(level) = Level::of(tier) else { return };
        let Some(pins) = self.pins.get_mut(digest) else { return };
        let Some(left) = pins[level as usize].checked_sub(1) else { return };
        pins[level as usize] = left;
        if *pins == [0; 2] {
            self.pins.remove(digest);
        }
        if left > 0 {
            return;
        }
        if let Some(id) = self.slab.find(digest) {
            self.slab[id].set(Entry::PINNED[level as usize], false);
            if self.slab[id].resident(level) {
                self.policy.freed(&mut self.slab, id, level);
            }
        }
    }

    /// Positions that are pinned somewhere, those included that are not here.
    pub fn pinned(&self) -> usize {
        self.pins.len()
    }

    /// An entry was made: it may have been wanted before it came.
    pub(super) fn note_pins(&mut self, id: EntryId) {
        if self.pins.is_empty() {
            return;
        }
        if let Some(pins) = self.pins.get(&self.slab[id].digest) {
            for level in Level::BOTH {
                self.slab[id].set(Entry::PINNED[level as usize], pins[level as usize] > 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{HANDLE, audit, block, digest, directory, meta, place, plain, put_chain, slot};
    use super::super::{Dropped, Placed};
    use super::*;
    use crate::ids::{Instant, Version};
    use crate::words::{MissReason, RequestInfo};

    /// A pinned leaf keeps its place while others go, wherever it was when it was pinned; released, it goes like any other.
    #[test]
    fn a_pinned_position_stays_until_as_many_let_it_go() {
        let (mut dir, f) = (directory(), plain());
        assert_eq!(dir.usage(HANDLE).positions, 0);
        dir.pin(&digest(1), Tier::Dram);
        put_chain(&mut dir, &f, 2, false);
        dir.pin(&digest(1), Tier::Dram);
        audit(&dir);
        assert!(dir.victim(Tier::Dram, Instant(9)).is_none(), "the only leaf is pinned");
        dir.unpin(&digest(1), Tier::Dram);
        assert!(dir.victim(Tier::Dram, Instant(9)).is_none());
        dir.unpin(&digest(1), Tier::Dram);
        dir.unpin(&digest(1), Tier::Dram);
        assert_eq!(dir.victim(Tier::Dram, Instant(9)).map(|v| v.digest), Some(digest(1)));
        assert_eq!(dir.pinned(), 0);
        audit(&dir);
    }

    #[test]
    fn what_is_pinned_on_one_tier_may_leave_the_other() {
        let (mut dir, f) = (directory(), plain());
        put_chain(&mut dir, &f, 1, true);
        dir.pin(&digest(0), Tier::Nvme);
        assert!(dir.victim(Tier::Nvme, Instant(9)).is_none());
        assert_eq!(dir.victim(Tier::Dram, Instant(9)).map(|v| v.digest), Some(digest(0)));
        assert_eq!(dir.drop_slot(&block(0, 0, 0), slot(0), MissReason::Evicted), Dropped::StillOnNvme);
        audit(&dir);
    }

    /// A sweep sees what only sessions keep, and nothing that a caller asked to keep.
    #[test]
    fn a_sweep_sees_what_only_sessions_keep() {
        let (mut dir, f) = (directory(), plain());
        for n in 0..3 {
            let m = meta(block(n, 0, 0), n, None);
            dir.insert(&m, &f, Placed::Nvme(place(n.into())), &RequestInfo::NONE, Instant(1)).unwrap();
        }
        assert!(dir.raise_class(&block(0, 0, 0), Version(1), Class::Durable, Keeper::Sessions));
        assert!(dir.raise_class(&block(1, 0, 0), Version(1), Class::Durable, Keeper::Caller));
        let slice = dir.unnamed(|_| false, 0, 100);
        assert_eq!((slice.durable_blocks, slice.next), (2, None));
        assert_eq!(slice.unnamed.iter().map(|u| u.0).collect::<Vec<_>>(), [digest(0)]);
        assert!(dir.unnamed(|d| *d == digest(0), 0, 100).unnamed.is_empty());
        // A caller wants it for itself after all; what sessions want no longer counts.
        assert!(dir.raise_class(&block(0, 0, 0), Version(1), Class::Durable, Keeper::Caller));
        assert!(dir.raise_class(&block(0, 0, 0), Version(1), Class::Durable, Keeper::Sessions));
        assert!(dir.unnamed(|_| false, 0, 100).unnamed.is_empty());
        audit(&dir);
    }
}
