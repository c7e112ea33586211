//! The directory against a naive model: maps and brute force, under random operations.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::block::{NvmePlace, SlotRef};
use crate::error::ErrorKind;
use crate::format::{Format, Rule};
use crate::ids::{BlockId, Digest, GroupId, InstanceId, Instant, LeaseId, RequestId, ShardId, Version};
use crate::lease::LeaseLimits;
use crate::words::{Class, Fidelity, MissReason, PartStatus, PolicyKind, RequestInfo, Tier};

use super::testing::{ask, audit, digest, format, meta, place, slot, small_leases};
use super::{Directory, DirectoryLimits, Dropped, Inserted, Matcher, Placed, Victim};

/// Positions of the universe.
const NODES: usize = 14;

fn formats() -> Vec<Format> {
    let window = |tokens| Rule::Window { tokens };
    vec![
        format(&[(Rule::All, 1, 1)]),
        format(&[(Rule::All, 2, 2)]),
        format(&[(Rule::All, 1, 1), (Rule::State, 2, 1)]),
        format(&[(Rule::All, 1, 2), (window(3), 1, 1)]),
        format(&[(window(2), 1, 1)]),
        format(&[(Rule::All, 2, 1), (window(3), 1, 1), (Rule::State, 1, 2)]),
        format(&[(window(4), 2, 1), (Rule::State, 2, 1)]),
    ]
}

fn kinds() -> impl Strategy<Value = PolicyKind> {
    prop::sample::select(PolicyKind::ALL)
}

#[derive(Clone, Copy, Debug)]
struct MPart {
    version: u64,
    class: Class,
    fidelity: Fidelity,
    len: u32,
    slot: Option<SlotRef>,
    place: Option<NvmePlace>,
}

impl MPart {
    fn on(&self, tier: Tier) -> bool {
        if tier == Tier::Dram { self.slot.is_some() } else { self.place.is_some() }
    }
}

#[derive(Debug)]
struct MLease {
    id: LeaseId,
    instance: u8,
    nodes: BTreeSet<usize>,
    ends: u64,
}

/// Everything is a map, every question a loop.
struct Model {
    format: Format,
    /// Of each node the one before it in its chain.
    parents: Vec<Option<usize>>,
    depth: Vec<u32>,
    parts: BTreeMap<(usize, u16, u16), MPart>,
    /// By (instance, request).
    leases: BTreeMap<(u8, u8), MLease>,
    limits: LeaseLimits,
}

impl Model {
    fn new(format: Format, choices: &[usize]) -> Self {
        let mut parents = vec![None];
        let mut depth = vec![0];
        for (i, choice) in choices.iter().enumerate() {
            // Mostly long chains: the last node, or any.
            let parent = if choice % 4 > 0 { i } else { (choice / 4) % (i + 1) };
            parents.push(Some(parent));
            depth.push(depth[parent] + 1);
        }
        Self { format, parents, depth, parts: BTreeMap::new(), leases: BTreeMap::new(), limits: small_leases() }
    }

    /// The nearest node before `n` that has parts in this format.
    fn parent_with_parts(&self, n: usize) -> Option<usize> {
        let mut at = self.parents[n];
        while let Some(p) = at
            && self.format.parts_at(self.depth[p]).count() == 0
        {
            at = self.parents[p];
        }
        at
    }

    fn path(&self, n: usize) -> Vec<usize> {
        let mut path = vec![n];
        while let Some(p) = self.parents[path[path.len() - 1]] {
            path.push(p);
        }
        path.reverse();
        path
    }

    fn of(&self, n: usize) -> Vec<((u16, u16), MPart)> {
        self.parts.range((n, 0, 0)..(n + 1, 0, 0)).map(|((_, g, s), p)| ((*g, *s), *p)).collect()
    }

    fn resident(&self, n: usize, tier: Tier) -> bool {
        self.of(n).iter().any(|(_, p)| p.on(tier))
    }

    fn is_leaf(&self, n: usize, tier: Tier) -> bool {
        !(0..NODES).any(|c| self.parent_with_parts(c) == Some(n) && self.resident(c, tier))
    }

    fn durable(&self, n: usize) -> bool {
        self.of(n).iter().any(|(_, p)| p.class == Class::Durable)
    }

    fn saved(&self, n: usize) -> bool {
        self.of(n).iter().all(|(_, p)| p.slot.is_none() || p.place.is_some())
    }

    fn lease_count(&self, n: usize) -> usize {
        self.leases.values().filter(|l| l.nodes.contains(&n)).count()
    }

    /// May go from `tier` in its turn, leases aside.
    fn evictable(&self, n: usize, tier: Tier) -> bool {
        let kept = if tier == Tier::Nvme { self.durable(n) } else { self.durable(n) && !self.saved(n) };
        self.resident(n, tier) && self.is_leaf(n, tier) && !kept
    }

    /// The block of group `g` that ends at path index `i` is whole and of the fidelity.
    fn has_block(&self, path: &[usize], i: usize, g: usize, accept: Fidelity) -> bool {
        (0..self.format.groups[g].shards).all(|s| {
            let part = self.parts.get(&(path[i], g as u16, s));
            part.is_some_and(|p| p.fidelity == Fidelity::Exact || accept == Fidelity::Near)
        })
    }

    /// Path indices of the blocks of group `g` that a boundary after `n` positions needs; `None`: no boundary there.
    fn blocks_needed(&self, n: usize, g: usize) -> Option<Vec<usize>> {
        let group = &self.format.groups[g];
        let k = group.tokens_per_block as usize;
        if !n.is_multiple_of(k) {
            return None;
        }
        let ends: Vec<usize> = (1..=n / k).map(|b| b * k - 1).collect();
        let last = match group.rule {
            Rule::All => ends.len(),
            Rule::Window { tokens } => tokens.div_ceil(group.tokens_per_block) as usize,
            Rule::State => 1,
        };
        Some(ends[ends.len().saturating_sub(last)..].to_vec())
    }

    fn valid(&self, path: &[usize], n: usize, accept: Fidelity, groups: impl Fn(usize) -> bool) -> bool {
        (0..self.format.groups.len()).all(|g| match self.blocks_needed(n, g) {
            None => false,
            Some(blocks) => !groups(g) || blocks.iter().all(|i| self.has_block(path, *i, g, accept)),
        })
    }

    fn boundary(&self, path: &[usize], accept: Fidelity) -> usize {
        (1..=path.len()).rev().find(|n| self.valid(path, *n, accept, |_| true)).unwrap_or(0)
    }

    /// Path indices at which a boundary needs a part.
    fn positions_needed(&self, n: usize) -> BTreeSet<usize> {
        (0..self.format.groups.len()).flat_map(|g| self.blocks_needed(n, g).unwrap_or_default()).collect()
    }
}

struct World {
    dir: Directory,
    model: Model,
    now: u64,
    next: u64,
    /// Digests by node.
    digests: Vec<Digest>,
}

impl World {
    fn new(kind: PolicyKind, which: usize, choices: &[usize]) -> Self {
        let model = Model::new(formats()[which].clone(), choices);
        let limits = DirectoryLimits { leases: model.limits, ghosts_max: 16, ..DirectoryLimits::default() };
        let dir = Directory::new(limits, kind);
        Self { dir, model, now: 1, next: 1, digests: (0..NODES as u32).map(digest).collect() }
    }

    fn draw(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn node(&self, digest: &Digest) -> usize {
        self.digests.iter().position(|d| d == digest).expect("of this universe")
    }

    /// Some part that node `n` may have.
    fn part(&self, n: usize, pick: u8) -> Option<BlockId> {
        let all: Vec<_> = self.model.format.parts_at(self.model.depth[n]).collect();
        let (group, shard) = *all.get(usize::from(pick) % all.len().max(1))?;
        Some(BlockId { digest: self.digests[n], group, shard })
    }

    fn insert(&mut self, n: usize, pick: u8, how: u8) {
        let Some(id) = self.part(n, pick) else { return };
        let copy = self.draw();
        let (version, len) = (self.draw(), 1 + u32::from(how));
        let class = if how.is_multiple_of(7) { Class::Durable } else { Class::Cache };
        let fidelity = if how.is_multiple_of(5) { Fidelity::Near } else { Fidelity::Exact };
        let mut m = meta(id, self.model.depth[n], self.model.parent_with_parts(n).map(|p| p as u32));
        (m.version, m.class, m.fidelity, m.len) = (Version(version), class, fidelity, len);
        let at = if how.is_multiple_of(2) { Placed::Dram(slot(copy)) } else { Placed::Nvme(place(copy)) };
        let got = self
            .dir
            .insert(&m, &self.model.format, at, &RequestInfo::default(), Instant(self.now))
            .expect("fits the format");
        let key = (n, id.group.0, id.shard.0);
        let known = self.model.parts.get(&key).copied();
        match known {
            Some(old) if !(old.fidelity == Fidelity::Near && fidelity == Fidelity::Exact) => {
                assert_eq!(got, Inserted::Exists { version: Version(old.version), class: old.class });
                return;
            }
            Some(old) => match got {
                Inserted::Superseded(r) => {
                    assert_eq!((r.version, r.slot, r.place), (Version(old.version), old.slot, old.place));
                }
                other => panic!("{other:?}"),
            },
            None => assert_eq!(got, Inserted::Stored),
        }
        let (slot, place) = match at {
            Placed::Dram(s) => (Some(s), None),
            Placed::Nvme(p) => (None, Some(p)),
        };
        self.model.parts.insert(key, MPart { version, class, fidelity, len, slot, place });
    }

    /// Adds the copy that is missing, or tries one that must be refused.
    fn copy(&mut self, n: usize, pick: u8, nvme: bool, stale: bool) {
        let Some(id) = self.part(n, pick) else { return };
        let fresh = self.draw();
        let known = self.model.parts.get_mut(&(n, id.group.0, id.shard.0));
        let version = Version(known.as_ref().filter(|_| !stale).map_or(u64::MAX, |p| p.version));
        let (got, expected) = if nvme {
            let expected =
                known.filter(|p| p.place.is_none() && !stale).map(|p| p.place = Some(place(fresh))).is_some();
            (self.dir.set_nvme(&id, version, place(fresh)), expected)
        } else {
            let expected = known.filter(|p| p.slot.is_none() && !stale).map(|p| p.slot = Some(slot(fresh))).is_some();
            (self.dir.set_slot(&id, version, slot(fresh)), expected)
        };
        assert_eq!(got, expected);
    }

    fn drop_copy(&mut self, id: &BlockId, nvme: bool) {
        let n = self.node(&id.digest);
        let key = (n, id.group.0, id.shard.0);
        let Some(part) = self.model.parts.get_mut(&key) else { return };
        let got = if nvme {
            let Some(place) = part.place.take() else { return };
            self.dir.drop_place(id, place, MissReason::Evicted)
        } else {
            let Some(slot) = part.slot.take() else { return };
            self.dir.drop_slot(id, slot, MissReason::Evicted)
        };
        let expected = match (part.slot, part.place) {
            (Some(_), _) => Dropped::StillInDram,
            (None, Some(_)) => Dropped::StillOnNvme,
            (None, None) => {
                self.model.parts.remove(&key);
                if self.model.of(n).is_empty() { Dropped::PositionGone } else { Dropped::PartGone }
            }
        };
        assert_eq!(got, expected);
    }

    fn raise(&mut self, n: usize, pick: u8) {
        let Some(id) = self.part(n, pick) else { return };
        if let Some(p) = self.model.parts.get_mut(&(n, id.group.0, id.shard.0)) {
            p.class = Class::Durable;
            assert!(self.dir.raise_class(&id, Version(p.version), Class::Durable, crate::words::Keeper::Caller));
        }
    }

    fn remove(&mut self, n: usize) {
        let known = self.model.of(n);
        let got = self.dir.remove(&self.digests[n], MissReason::Removed);
        assert_eq!(got.is_some(), !known.is_empty());
        for (r, ((g, s), p)) in got.unwrap_or_default().iter().zip(known) {
            assert_eq!((r.group, r.shard, r.version), (GroupId(g), ShardId(s), Version(p.version)));
            assert_eq!((r.slot, r.place, r.len), (p.slot, p.place, p.len));
            self.model.parts.remove(&(n, g, s));
        }
    }

    /// Asks for a victim, checks that it may go, and lets it go or defers it. Returns it if it went.
    fn evict(&mut self, tier: Tier, defer: bool) -> Option<Victim> {
        let found = self.dir.victim(tier, Instant(self.now));
        assert_eq!(found, self.dir.victim(tier, Instant(self.now)), "asking twice changes nothing");
        let m = &self.model;
        let unleased: Vec<usize> = (0..NODES).filter(|n| m.evictable(*n, tier) && m.lease_count(*n) == 0).collect();
        let Some(victim) = found else {
            assert!(unleased.is_empty(), "{unleased:?} may go from {tier}");
            let last: Vec<usize> =
                (0..NODES).filter(|n| tier == Tier::Dram && m.evictable(*n, tier) && m.saved(*n)).collect();
            assert!(last.is_empty(), "{last:?} may go as a last resort");
            return None;
        };
        let n = self.node(&victim.digest);
        assert_eq!(victim.leased, m.lease_count(n) > 0);
        assert!(victim.parts.iter().all(|p| if tier == Tier::Dram { p.slot.is_some() } else { p.place.is_some() }));
        assert!(!victim.parts.is_empty());
        if victim.spare {
            assert!(!victim.leased);
            assert!(tier != Tier::Nvme || !m.durable(n));
            assert!(!m.durable(n) || m.saved(n));
            assert!(victim.parts.iter().all(|p| m.format.groups[usize::from(p.group.0)].rule != Rule::All));
        } else {
            assert!(m.evictable(n, tier), "{n} is no leaf of {tier}, or must stay");
            assert_eq!(victim.parts.len(), m.of(n).iter().filter(|(_, p)| p.on(tier)).count());
            if victim.leased {
                assert_eq!((tier, unleased), (Tier::Dram, vec![]), "a leased one goes last, and from DRAM only");
                assert!(m.saved(n));
            }
        }
        if defer {
            self.dir.defer(&victim.digest, tier);
            return None;
        }
        for p in &victim.parts {
            let id = BlockId { digest: victim.digest, group: p.group, shard: p.shard };
            self.drop_copy(&id, tier == Tier::Nvme);
        }
        Some(victim)
    }

    fn due(&mut self) {
        let due: Vec<_> = self.model.leases.iter().filter(|(_, l)| l.ends <= self.now).map(|(k, _)| *k).collect();
        assert_eq!(self.dir.expire_leases(Instant(self.now), usize::MAX), due.len());
        due.iter().for_each(|k| drop(self.model.leases.remove(k)));
    }

    /// Takes a lease as the model would: all or nothing, within the bounds.
    fn lease_in_model(&mut self, name: (u8, u8), fresh: LeaseId, nodes: &BTreeSet<usize>) -> Result<(), ErrorKind> {
        let limits = self.model.limits;
        let of_instance = |l: &&MLease| l.instance == name.0;
        let held: usize = self.model.leases.values().filter(of_instance).map(|l| l.nodes.len()).sum();
        let count = self.model.leases.values().filter(of_instance).count();
        let instances: BTreeSet<u8> = self.model.leases.values().map(|l| l.instance).collect();
        let new = !self.model.leases.contains_key(&name);
        if new
            && (count >= limits.leases_per_instance as usize
                || (count == 0 && instances.len() >= limits.instances as usize))
        {
            return Err(ErrorKind::Throttled);
        }
        let ends = self.now + 10_000;
        // A lease that is refused more positions is renewed all the same.
        if let Some(lease) = self.model.leases.get_mut(&name) {
            lease.ends = lease.ends.max(ends);
        }
        let had = self.model.leases.get(&name).map(|l| l.nodes.clone()).unwrap_or_default();
        if held + nodes.difference(&had).count() > limits.positions_per_instance as usize {
            let alone = held == had.len();
            return Err(if alone { ErrorKind::TooLarge } else { ErrorKind::Throttled });
        }
        if new && nodes.is_empty() {
            return Ok(());
        }
        let lease = self.model.leases.entry(name).or_insert(MLease {
            id: fresh,
            instance: name.0,
            nodes: BTreeSet::new(),
            ends,
        });
        lease.nodes.extend(nodes);
        Ok(())
    }

    fn take_lease(&mut self, name: (u8, u8), nodes: BTreeSet<usize>) {
        self.due();
        let fresh = self.draw();
        let digests: Vec<Digest> = nodes.iter().map(|n| self.digests[*n]).collect();
        let got = self.dir.lease(
            &ask(name.0, &[name.1], fresh),
            &digests,
            &RequestInfo::default(),
            Instant(self.now),
            Instant(self.now),
        );
        let here: BTreeSet<usize> = nodes.into_iter().filter(|n| !self.model.of(*n).is_empty()).collect();
        let expected = self.lease_in_model(name, LeaseId(fresh), &here);
        match (got, expected) {
            (Ok((id, held)), Ok(())) => {
                assert_eq!(held.iter().filter(|h| **h).count(), here.len());
                assert_eq!(id, self.model.leases.get(&name).map(|l| l.id));
            }
            (Err(e), Err(kind)) => assert_eq!(e.kind(), kind),
            (got, expected) => panic!("{got:?}, expected {expected:?}"),
        }
    }

    fn matches(&mut self, n: usize, accept: Fidelity, lease: Option<(u8, u8)>, slice: usize) {
        self.due();
        let path = self.model.path(n);
        let digests: Vec<Digest> = path.iter().map(|n| self.digests[*n]).collect();
        let fresh = self.draw();
        let wish = lease.map(|name| ask(name.0, &[name.1], fresh));
        let mut matcher = Matcher::new(&self.model.format, path.len(), accept, true, wish);
        let now = Instant(self.now);
        for slice in digests.chunks(slice) {
            if let Err(e) = matcher.feed(&mut self.dir, slice, now) {
                // The bound may be met on the way although the boundary needs less; nothing must be left behind, and the
                // audit after every step sees to that.
                assert!(matches!(e.kind(), ErrorKind::Throttled | ErrorKind::TooLarge), "{e}");
                if let Some(known) = lease.and_then(|name| self.model.leases.get_mut(&name)) {
                    known.ends = self.dir.lease_info(known.id).expect("it was there before").ends.0;
                }
                return;
            }
        }
        while matcher.settle(&mut self.dir, &RequestInfo::default(), now) {}
        let outcome = matcher.finish(|_| None);
        let m = &self.model;
        let boundary = m.boundary(&path, accept);
        assert_eq!(outcome.boundary_positions as usize, boundary, "boundary of {path:?}");
        let mut bytes = (0, 0);
        for g in 0..m.format.groups.len() {
            for i in m.blocks_needed(boundary, g).unwrap_or_default() {
                for ((group, _), p) in m.of(path[i]).iter().filter(|((group, _), _)| usize::from(*group) == g) {
                    assert_eq!(usize::from(*group), g);
                    let len = u64::from(p.len);
                    if p.slot.is_some() { bytes.0 += len } else { bytes.1 += len }
                }
            }
        }
        assert_eq!((outcome.dram_bytes, outcome.nvme_bytes), bytes);
        assert!(outcome.reason.is_none() || boundary < path.len());
        for (i, node) in path.iter().enumerate() {
            let parts = m.of(*node);
            let whole = !parts.is_empty()
                && m.format.parts_at(m.depth[*node]).all(|(g, _)| m.has_block(&path, i, usize::from(g.0), accept));
            let hit = i < boundary || whole;
            assert_eq!(outcome.statuses[i] == PartStatus::Hit.code(), hit, "status of {i} in {path:?}");
            let slowest = parts.iter().map(|(_, p)| if p.slot.is_some() { Tier::Dram } else { Tier::Nvme }).max();
            assert_eq!(outcome.tiers[i], slowest.map_or(0, Tier::code));
        }
        let Some(name) = lease else {
            assert_eq!(outcome.lease, None);
            return;
        };
        let needed: BTreeSet<usize> = m.positions_needed(boundary).iter().map(|i| path[*i]).collect();
        // What was seen is leased before it is known whether it is needed, so a lease that exists is extended by a hit.
        let touched = path.iter().any(|n| !m.of(*n).is_empty());
        if needed.is_empty() && (!touched || outcome.lease.is_none()) {
            return;
        }
        self.lease_in_model(name, LeaseId(fresh), &needed).expect("the directory granted it");
        if let Some(lease) = self.model.leases.get_mut(&name) {
            lease.ends = self.dir.lease_info(lease.id).expect("granted").ends.0;
        }
        assert_eq!(outcome.lease, self.model.leases.get(&name).map(|l| l.id));
    }

    /// Everything that can be asked agrees with the model.
    fn check(&self) {
        audit(&self.dir);
        let m = &self.model;
        for n in 0..NODES {
            let view = self.dir.view(&self.digests[n]);
            assert_eq!(view.as_ref().map_or(0, |v| v.parts.len()), m.of(n).len());
            assert_eq!(view.map_or(0, |v| v.leases as usize), m.lease_count(n), "leases of {n}");
        }
        for ((n, g, s), p) in &m.parts {
            let l = self.dir.locate(&self.digests[*n], GroupId(*g), ShardId(*s)).expect("the model has it");
            assert_eq!((l.version.0, l.len, l.class, l.fidelity), (p.version, p.len, p.class, p.fidelity));
            assert_eq!((l.slot, l.place, l.leased), (p.slot, p.place, m.lease_count(*n) > 0));
        }
        let totals = self.dir.totals();
        let bytes = |tier| m.parts.values().filter(|p| p.on(tier)).map(|p| u64::from(p.len)).sum::<u64>();
        assert_eq!((totals.dram_bytes, totals.nvme_bytes), (bytes(Tier::Dram), bytes(Tier::Nvme)));
        assert_eq!(totals.parts as usize, m.parts.len());
        assert_eq!(totals.positions as usize, (0..NODES).filter(|n| !m.of(*n).is_empty()).count());
        assert_eq!(self.dir.lease_count(), m.leases.len());
    }

    fn step(&mut self, (op, a, b, c): (u8, u8, u8, u8)) {
        self.now += u64::from(c % 3);
        let n = usize::from(a) % NODES;
        let name = (b % 4, c % 4);
        match op % 16 {
            0..=4 => self.insert(n, b, c),
            5 => self.copy(n, b, true, c == 0),
            6 => self.copy(n, b, false, c == 0),
            7 => drop(self.part(n, b).map(|id| self.drop_copy(&id, c % 2 == 0))),
            8 => self.remove(n),
            9 => {
                let here = !self.model.of(n).is_empty();
                assert_eq!(self.dir.access(&self.digests[n], &RequestInfo::default(), Instant(self.now)), here);
            }
            10 => drop(self.evict(if c % 2 == 0 { Tier::Dram } else { Tier::Nvme }, b % 4 == 0)),
            11 => self.take_lease(name, self.model.path(n).into_iter().collect()),
            12 => {
                let known = self.model.leases.remove(&name).is_some();
                let request = RequestId::new(&[name.1]).expect("one byte");
                let lease = self.dir.lease_of_request(InstanceId([name.0; 16]), &request);
                assert_eq!(lease.is_some_and(|id| self.dir.release(id)), known);
            }
            13 if c % 4 == 0 => {
                self.dir.end_instance(InstanceId([b % 4; 16]), usize::MAX);
                self.model.leases.retain(|(i, _), _| *i != b % 4);
            }
            13 => {
                self.now += u64::from(c) * 100;
                self.due();
            }
            14 => self.raise(n, b),
            _ => {
                let accept = if c % 2 == 0 { Fidelity::Exact } else { Fidelity::Near };
                self.matches(n, accept, (c % 3 == 0).then_some(name), 1 + usize::from(b) % 5);
            }
        }
    }

    /// Takes everything away; nothing may be left.
    fn empty(mut self) {
        for i in 0..4 {
            assert!(!self.dir.end_instance(InstanceId([i; 16]), usize::MAX));
        }
        self.model.leases.clear();
        (0..NODES).for_each(|n| self.remove(n));
        self.check();
        assert_eq!((self.dir.entries(), self.dir.leased_positions(), self.dir.usages().len()), (0, 0, 0));
    }
}

fn choices() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..64, NODES - 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Under any operations the directory answers as the model does, keeps its books in order, never offers what must
    /// stay, always offers what may go, and is empty when everything has left.
    #[test]
    fn the_directory_agrees_with_the_model(
        kind in kinds(),
        which in 0..formats().len(),
        choices in choices(),
        ops in prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..120),
    ) {
        let mut world = World::new(kind, which, &choices);
        for op in ops {
            world.step(op);
            world.check();
        }
        world.empty();
    }

    /// When whole chains come in order and only victims leave, what is resident in a tier stays closed under "parent
    /// of" for groups that need every block, until nothing is left.
    #[test]
    fn only_victims_leaving_keeps_a_tier_closed_under_parent_of(
        kind in kinds(),
        which in 0..formats().len(),
        choices in choices(),
        ops in prop::collection::vec(any::<(u8, u8)>(), 1..60),
    ) {
        let mut world = World::new(kind, which, &choices);
        for (op, a) in ops {
            let n = usize::from(a) % NODES;
            match op % 4 {
                // A request's chain, from the start: what is missing comes into both tiers.
                0 | 1 => for n in world.model.path(n) {
                    for pick in 0..world.model.format.parts_at(world.model.depth[n]).count() {
                        world.insert(n, pick as u8, 8);
                        world.copy(n, pick as u8, true, false);
                        world.copy(n, pick as u8, false, false);
                    }
                },
                2 => drop(world.evict(Tier::Dram, false)),
                _ => drop(world.evict(Tier::Nvme, false)),
            }
            for tier in [Tier::Dram, Tier::Nvme] {
                let m = &world.model;
                for n in (0..NODES).filter(|n| m.resident(*n, tier)) {
                    let parent = m.parent_with_parts(n);
                    prop_assert!(parent.is_none_or(|p| m.resident(p, tier) || all_spare(m, p)), "{n} hangs in {tier}");
                }
            }
            world.check();
        }
        for tier in [Tier::Dram, Tier::Nvme] {
            while world.evict(tier, false).is_some() {}
        }
        prop_assert!(world.model.parts.is_empty());
        world.empty();
    }

    /// Whatever parents and chain indices clients claim: no cycle, and everything can be evicted.
    #[test]
    fn whatever_parents_are_claimed_everything_can_go(
        puts in prop::collection::vec((0u32..12, prop::option::of(0u32..12), 0u32..6, any::<bool>()), 1..40),
        kind in kinds(),
        which in 0..formats().len(),
    ) {
        let format = &formats()[which];
        let mut dir = Directory::new(DirectoryLimits::default(), kind);
        for (n, parent, position, remove) in puts {
            if let Some((group, shard)) = format.parts_at(position).next() {
                let m = meta(BlockId { digest: digest(n), group, shard }, position, parent);
                let at = Placed::Dram(slot(u64::from(n)));
                dir.insert(&m, format, at, &RequestInfo::default(), Instant(1)).expect("fits the format");
            }
            if remove {
                dir.remove(&digest(n), MissReason::Removed);
            }
            audit(&dir);
        }
        while let Some(v) = dir.victim(Tier::Dram, Instant(1)) {
            for p in v.parts {
                let id = BlockId { digest: v.digest, group: p.group, shard: p.shard };
                dir.drop_slot(&id, p.slot.expect("in DRAM"), MissReason::Evicted);
            }
            audit(&dir);
        }
        prop_assert_eq!(dir.entries(), 0);
    }

    /// Spare parts cost nobody a hit: whatever the ends of chains could use last, they can use after every spare
    /// victim has gone.
    #[test]
    fn spare_parts_cost_no_end_its_last_boundary(
        kind in kinds(),
        which in 2..formats().len(),
        choices in choices(),
        chains in prop::collection::vec((0..NODES, any::<u16>()), 1..10),
    ) {
        let mut world = World::new(kind, which, &choices);
        for (n, absent) in chains {
            let path = world.model.path(n);
            for (i, n) in path.iter().enumerate() {
                let groups: Vec<_> = world.model.format.parts_at(world.model.depth[*n]).map(|(g, _)| g).collect();
                for (pick, group) in groups.iter().enumerate() {
                    // Engines store windows and states here and there only, but every position has its first group: the
                    // directory learns from it what comes after what.
                    let early = world.model.format.groups[usize::from(group.0)].rule != Rule::All;
                    if !(early && *group != groups[0] && absent >> (i % 16) & 1 == 1) {
                        world.insert(*n, pick as u8, 8);
                    }
                }
            }
            let ends = ends(&world);
            let usable = |m: &Model| -> Vec<usize> {
                ends.iter().map(|n| m.boundary(&m.path(*n), Fidelity::Exact)).collect()
            };
            let before = usable(&world.model);
            while let Some(v) = world.dir.victim(Tier::Dram, Instant(1)).filter(|v| v.spare) {
                prop_assert_eq!(world.evict(Tier::Dram, false), Some(v));
                prop_assert_eq!(usable(&world.model), before.clone());
            }
        }
    }
}

/// Whether position `n` has no group that needs every block: it may have lost all parts as spare ones.
fn all_spare(m: &Model, n: usize) -> bool {
    m.format.parts_at(m.depth[n]).all(|(g, _)| m.format.groups[usize::from(g.0)].rule != Rule::All)
}

/// Leaves and forks of what is tracked, as far as it has parts.
fn ends(world: &World) -> Vec<usize> {
    let views: Vec<_> = world.digests.iter().map(|d| world.dir.view(d)).collect();
    let children = |n: usize| views.iter().flatten().filter(|v| v.parent == Some(world.digests[n])).count();
    (0..NODES).filter(|n| !world.model.of(*n).is_empty() && children(*n) != 1).collect()
}
