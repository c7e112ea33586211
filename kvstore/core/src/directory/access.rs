//! Accesses, victims, heat.

use std::collections::HashSet;

use crate::block::{NvmePlace, SlotRef};
use crate::ids::{Digest, GroupId, Handle, Instant, ShardId, Version};
use crate::policy::sage::fit::{Fit, Fitted};
use crate::policy::weight::Weight;
use crate::policy::{Access, Leased};
use crate::words::{Class, Priority, RequestInfo, Tier};

use super::Directory;
use super::entry::{Entry, EntryId, Level, Part};
use super::home::Need;

/// What should leave a tier next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// The position.
    pub digest: Digest,
    /// Its namespace and revision.
    pub handle: Handle,
    /// The strongest class among its parts.
    pub class: Class,
    /// Somebody holds a lease over it (DRAM only, as a last resort; every part is on NVMe).
    pub leased: bool,
    /// Only parts behind the last usable boundary of their chain; others of the position stay.
    pub spare: bool,
    /// The parts to drop, all of them in the tier asked for.
    pub parts: Vec<VictimPart>,
}

/// One part of a [`Victim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VictimPart {
    /// Of its group.
    pub group: GroupId,
    /// Of its shard.
    pub shard: ShardId,
    /// Of the put that made the bytes.
    pub version: Version,
    /// Raw bytes.
    pub len: u32,
    /// Its class.
    pub class: Class,
    /// Its copy in DRAM.
    pub slot: Option<SlotRef>,
    /// Its copy on NVMe.
    pub place: Option<NvmePlace>,
}

impl Directory {
    /// Counts an access: one per (request, position), at lease, get or touch. `false`: not here.
    pub fn access(&mut self, digest: &Digest, info: &RequestInfo, now: Instant) -> bool {
        match self.slab.find(digest).filter(|id| !self.slab[*id].parts.is_empty()) {
            Some(id) => {
                self.access_entry(id, info, now);
                true
            }
            None => false,
        }
    }

    pub(super) fn access_entry(&mut self, id: EntryId, info: &RequestInfo, now: Instant) {
        let e = &mut self.slab[id];
        let last = e.last_access;
        e.accesses = e.accesses.saturating_add(1);
        e.last_access = last.max(now);
        self.tell_access(id, info, Some(last), now);
    }

    /// Tells the policy of an access that the entry knows of already.
    pub(super) fn tell_access(&mut self, id: EntryId, info: &RequestInfo, last: Option<Instant>, now: Instant) {
        let e = &self.slab[id];
        let tail = self.homes.get(e.home).shape.ends_within(info.input_tokens, e.position);
        let weight = info.priority.map(|priority| self.weight_of(id, priority));
        self.policy.access(&mut self.slab, id, &Access { info, now, last, tail, weight });
    }

    /// The weight of an entry by its cost and a priority.
    pub(super) fn weight_of(&self, id: EntryId, priority: Priority) -> Weight {
        let e = &self.slab[id];
        Weight::new(self.homes.get(e.home).shape.cost(e.position), priority)
    }

    /// What a client says of a session ([`RequestInfo::hint`] and priority, with its session and client), between accesses of
    /// its positions. Nothing counts as accessed. `false`: the position is not here.
    pub fn hint(&mut self, digest: &Digest, info: &RequestInfo, now: Instant) -> bool {
        let Some(id) = self.slab.find(digest).filter(|id| !self.slab[*id].parts.is_empty()) else { return false };
        let weight = info.priority.map(|priority| self.weight_of(id, priority));
        self.policy.hint(&mut self.slab, id, info, weight, now);
        true
    }

    /// What the policy has learned, as bytes for [`Directory::load_learned`] in a later life; empty where it learns nothing.
    pub fn learned(&self) -> Vec<u8> {
        self.policy.save()
    }

    /// Begins with what an earlier life learned. `false`: the bytes are not readable (cut off, damaged, of another version
    /// or policy), and the policy goes on with what it has: at first, with nothing.
    pub fn load_learned(&mut self, bytes: &[u8]) -> bool {
        self.policy.load(bytes)
    }

    /// From now on the caller asks [`Directory::begin_fit`] now and then, so that no other call learns, which takes
    /// milliseconds. Who says so and does not ask has the policy learn late, in whichever call comes then.
    pub fn fit_elsewhere(&mut self) {
        self.policy.fit_elsewhere();
    }

    /// What the policy should learn from, where it is time to: [`Fit::run`] needs no lock, and its outcome goes to
    /// [`Directory::end_fit`].
    pub fn begin_fit(&mut self) -> Option<Fit> {
        self.policy.begin_fit()
    }

    /// The policy goes by what was learned from now on.
    pub fn end_fit(&mut self, fitted: Fitted) {
        self.policy.end_fit(fitted);
    }

    /// Positions that the policy remembers although they left.
    pub fn ghosts(&self) -> usize {
        self.policy.ghosts()
    }

    /// What should leave `tier` next; `None`: nothing may (or it is no tier of a storage node). It stays until the
    /// caller drops its copies or defers it: asked again before that, the answer is the same.
    ///
    /// Spare parts go first, then the policy's leaves. A durable position never leaves NVMe, nor DRAM before it is on
    /// NVMe; a leased one never leaves NVMe, and DRAM only when nothing else is left and NVMe has every part.
    pub fn victim(&mut self, tier: Tier, now: Instant) -> Option<Victim> {
        self.next_victim(tier, now, Leased::PassOver)
    }

    /// The same for a caller that need not evict now: `None` as well where the position whose turn it is is leased. What
    /// would go in its place is worth more.
    pub fn victim_in_turn(&mut self, tier: Tier, now: Instant) -> Option<Victim> {
        self.next_victim(tier, now, Leased::WaitFor)
    }

    /// A position that may leave DRAM before anybody wants its room: its session has ended, as a client says that was never
    /// wrong, and NVMe has it. It stays until the caller drops its copies; leases and pins keep it.
    pub fn finished_victim(&self) -> Option<Victim> {
        let id = self.policy.finished(&self.slab, Level::Dram, &|id| self.slab[id].saved())?;
        Some(self.as_victim(id, Level::Dram, false))
    }

    /// What keeping a position is worth by the policy, times its weight: the victim has the smallest. Hits per second of one
    /// position's room; `None`: it is not here, or the policy has no such measure.
    pub fn index_value(&self, digest: &Digest, now: Instant) -> Option<f32> {
        let id = self.slab.find(digest).filter(|id| !self.slab[*id].parts.is_empty())?;
        self.policy.value(&self.slab, id, now)
    }

    fn next_victim(&mut self, tier: Tier, now: Instant, leased: Leased) -> Option<Victim> {
        let level = Level::of(tier)?;
        let (id, spare) = match self.spare_victim(level) {
            Some(id) => (id, true),
            None => (self.policy.victim(&mut self.slab, level, now, leased)?, false),
        };
        Some(self.as_victim(id, level, spare))
    }

    fn as_victim(&self, id: EntryId, level: Level, spare: bool) -> Victim {
        let e = &self.slab[id];
        let home = self.homes.get(e.home);
        let goes = |p: &&Part| p.on(level) && !(spare && home.shape.groups[usize::from(p.group().0)].need == Need::All);
        let part = |p: &Part| VictimPart {
            group: p.group(),
            shard: p.shard(),
            version: p.version,
            len: p.len,
            class: p.class(),
            slot: p.slot,
            place: p.place,
        };
        Victim {
            digest: e.digest,
            handle: home.handle,
            class: e.class(),
            leased: e.leases > 0,
            spare,
            parts: e.parts.as_slice().iter().filter(goes).map(part).collect(),
        }
    }

    /// Not this victim now (it is pinned, or on its way to NVMe): others first.
    pub fn defer(&mut self, digest: &Digest, tier: Tier) {
        let Some((level, id)) = Level::of(tier).zip(self.slab.find(digest)) else { return };
        // Spare parts then wait for the turn of their position, or for the next change of it.
        if self.slab[id].has(Entry::SPARE_LISTED[level as usize]) {
            self.leave_spare(id, level);
        } else if self.slab[id].resident(level) {
            self.policy.defer(&mut self.slab, id, level);
        }
    }

    /// At most `most` positions of `tier`, hottest first, parents always before their children: the warm set in the
    /// order in which it should come back.
    pub fn hottest(&self, tier: Tier, most: usize) -> Vec<Digest> {
        let Some(level) = Level::of(tier) else { return Vec::new() };
        let mut out = Vec::new();
        let mut seen = HashSet::new();
        let mut chain = Vec::new();
        self.policy.hottest(&self.slab, level, &mut |id| {
            let mut next = Some(id);
            while let Some(id) = next.filter(|id| seen.insert(*id)) {
                chain.push(id);
                next = self.slab[id].parent.some();
            }
            let resident = chain.drain(..).rev().map(|id| &self.slab[id]).filter(|e| e.resident(level));
            out.extend(resident.map(|e| e.digest).take(most - out.len()));
            out.len() < most
        });
        out
    }
}
