//! The order against a naive one, the counts against recounts, and what was learned against what happened.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::ages::BUCKETS;
use super::cells::Ranks;
use super::classes::{CLASSES, ClassId, HISTORY, Sort};
use super::*;
use crate::directory::entry::{Entry, Parts};
use crate::directory::testing::{HANDLE, digest, plain};
use crate::words::{Priority, RequestInfo, RequestKind};

/// Positions of the universe: chains of four.
const POSITIONS: u32 = 40;
const CHAIN: u32 = 4;

/// A policy over entries that nobody else looks after.
struct World {
    sage: Sage,
    slab: Slab,
    now: u64,
    /// Of positions that left: last access, class, uses.
    ghosts: BTreeMap<u32, (u64, u8, u8)>,
    used: BTreeMap<(u8, usize), f64>,
}

impl World {
    fn new() -> Self {
        Self { sage: Sage::new(1 << 16), slab: Slab::new(), now: 1000, ghosts: BTreeMap::new(), used: BTreeMap::new() }
    }

    fn find(&self, n: u32) -> Option<EntryId> {
        self.slab.find(&digest(n))
    }

    /// Uses a position and those before it in its chain, the deepest first; what is not here comes in.
    fn request(&mut self, n: u32, info: &RequestInfo) {
        let first = n / CHAIN * CHAIN;
        let known: Vec<u32> = (first..=n).take_while(|n| self.find(*n).is_some()).collect();
        for n in known.iter().rev() {
            let id = self.find(*n).expect("known");
            let last = self.slab[id].last_access;
            self.note(self.slab[id].class, last.0);
            self.slab[id].last_access = Instant(self.now);
            self.tell(id, info, Some(last));
        }
        for n in first + known.len() as u32..=n {
            let parent = n.checked_sub(1).filter(|_| n > first).and_then(|p| self.find(p));
            let mut entry = entry(n, n - first, self.now);
            entry.parent = parent.unwrap_or(EntryId::NONE);
            entry.set_resident(Level::Dram, true);
            let id = self.slab.insert(entry);
            if let Some(parent) = parent {
                self.slab[parent].resident_children[0] += 1;
                self.slab[parent].children += 1;
            }
            if let Some((last, class, _)) = self.ghosts.remove(&n) {
                self.note(class, last);
            }
            self.sage.enter(&mut self.slab, id, Level::Dram);
            self.tell(id, info, None);
        }
    }

    fn note(&mut self, class: u8, last: u64) {
        let gap = self.sage.ages.bucket(Duration::from_millis(self.now - last));
        *self.used.entry((class, gap)).or_default() += 1.0;
    }

    fn tell(&mut self, id: EntryId, info: &RequestInfo, last: Option<Instant>) {
        let weight = info.priority.map(|priority| Weight::new(None, priority));
        let access = Access { info, now: Instant(self.now), last, tail: false, weight };
        self.sage.access(&mut self.slab, id, &access);
    }

    fn leaves(&self) -> Vec<(u32, EntryId)> {
        (0..POSITIONS)
            .filter_map(|n| self.find(n).map(|id| (n, id)))
            .filter(|(_, id)| self.slab[*id].resident_children[0] == 0)
            .collect()
    }

    /// The index that a leaf's class and age have.
    fn index(&self, id: EntryId) -> (f32, usize) {
        let e = &self.slab[id];
        let bucket = usize::from(e.seat[0]) - 1;
        let index = self.sage.hazards.index()[usize::from(e.class)][bucket];
        (index * e.weight().factor(), BUCKETS - bucket)
    }

    /// Lets the next victim go, which must be one that no leaf is worth less than.
    fn evict(&mut self) -> Option<u32> {
        let id = self.sage.victim(&mut self.slab, Level::Dram, Instant(self.now), Leased::PassOver);
        let leaves = self.leaves();
        let Some(id) = id else {
            assert!(leaves.is_empty(), "a leaf and no victim");
            return None;
        };
        assert_eq!(self.slab[id].resident_children[0], 0, "no leaf");
        for (n, leaf) in &leaves {
            let e = &self.slab[*leaf];
            let listed = usize::from(e.seat[0]) - 1;
            // The cell is the age's, but for the time between two looks, and for those that came in behind a younger one.
            let age = self.now - e.last_access.0;
            let late = self.sage.ages.width_ms(listed) * 5 / 4 + 1;
            assert!(age >= self.sage.ages.start_ms(listed), "{n} is younger than its cell");
            assert!(self.sage.ages.end_ms(listed).is_none_or(|end| age < end + late), "{n} has outgrown its cell");
            let (victim, other) = (self.index(id), self.index(*leaf));
            // Among equals of one weight the older goes first.
            let smaller = if self.slab[id].weight() == e.weight() { victim <= other } else { victim.0 <= other.0 };
            assert!(smaller, "{n} is worth less than the victim");
        }
        let n = (0..POSITIONS).find(|n| self.find(*n) == Some(id)).expect("of this universe");
        self.drop_it(n, true);
        Some(n)
    }

    fn drop_it(&mut self, n: u32, evicted: bool) {
        let id = self.find(n).expect("here");
        self.slab[id].set_resident(Level::Dram, false);
        self.sage.leave(&mut self.slab, id, Level::Dram);
        if evicted {
            let e = &self.slab[id];
            self.ghosts.insert(n, (e.last_access.0, e.class, e.uses));
        }
        self.sage.gone(&mut self.slab, id, evicted);
        let parent = self.slab[id].parent.some();
        self.slab.remove(id);
        if let Some(parent) = parent {
            self.slab[parent].children -= 1;
            self.slab[parent].resident_children[0] -= 1;
            if self.slab[parent].resident_children[0] == 0 {
                self.sage.freed(&mut self.slab, parent, Level::Dram);
            }
        }
    }

    /// Everything that is kept twice agrees.
    fn check(&self) {
        let seats = self.leaves().len();
        assert_eq!(self.sage.orders[0].len(), seats, "leaves and nobody else have a seat");
        let mut open = [0u32; CLASSES];
        let here = (0..POSITIONS).filter_map(|n| self.find(n));
        here.for_each(|id| open[usize::from(self.slab[id].class)] += 1);
        self.ghosts.values().for_each(|(_, class, _)| open[usize::from(*class)] += 1);
        for (class, open) in open.iter().enumerate() {
            let mut counted = 0;
            self.sage.calendar.visit(ClassId(class as u8), |_, count| counted += count);
            assert_eq!(counted, *open, "open positions of class {class}");
        }
        assert!(self.sage.ghosts.len() >= self.ghosts.len());
    }
}

fn entry(n: u32, position: u32, now: u64) -> Entry {
    // Any home does: the policy does not look at it.
    let mut homes = crate::directory::home::Homes::default();
    let home = homes.intern(HANDLE, &plain());
    let mut entry = Entry::new(digest(n), home, position, Instant(now));
    entry.parts = Parts::None;
    entry
}

fn info(kind: u8, input: u32, output: u32) -> RequestInfo {
    let kind = RequestKind::from_code(kind % 6).expect("six kinds");
    RequestInfo { kind, input_tokens: input, output_tokens: output, ..RequestInfo::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Requests, pauses, priorities and victims in any order: the victim is a leaf of the lowest index times weight, counts
    /// agree, and every gap that happened was observed.
    #[test]
    fn the_victim_is_a_leaf_that_no_other_is_worth_less_than(
        steps in prop::collection::vec((0u8..8, 0..POSITIONS, 0u32..24, any::<u16>()), 1..120),
    ) {
        let mut world = World::new();
        for (op, n, pause, sizes) in steps {
            world.now += 1 << pause.min(22);
            match op {
                0..=3 => {
                    let priority = Priority::from_code((sizes % 4) as u8);
                    let info = info(op, u32::from(sizes) * 2, u32::from(sizes) % 400);
                    world.request(n, &RequestInfo { priority, ..info });
                }
                4 if world.find(n).is_some_and(|id| world.slab[id].resident_children[0] == 0) => {
                    world.drop_it(n, false);
                    world.ghosts.remove(&n);
                }
                _ => assert!(world.evict().is_none_or(|n| n < POSITIONS)),
            }
            world.check();
        }
        // Before anything fades.
        world.sage.hazards.used.iter().flatten().for_each(|seen| assert!(seen.is_finite() && *seen >= 0.0));
        let (mut hottest, now) = (Vec::new(), Instant(world.now));
        world.sage.hottest(&world.slab, Level::Dram, &mut |id| {
            // Of two of a cell either may go first: they are worth the same.
            hottest.push(world.index(id).0);
            true
        });
        prop_assert!(hottest.is_sorted_by(|a, b| a >= b), "the hottest come first: {hottest:?} at {now:?}");
        prop_assert_eq!(hottest.len(), world.leaves().len());
        while world.evict().is_some() {}
        prop_assert_eq!(world.slab.len(), 0);
    }

    /// Without a fit in between nothing fades, and the observations are exactly what happened.
    #[test]
    fn every_gap_is_observed_once(steps in prop::collection::vec((any::<bool>(), 0..POSITIONS, 0u64..400), 1..60)) {
        let mut world = World::new();
        for (evict, n, pause) in steps {
            // Sixty pauses of 0.3 s stay under the time of the first fit.
            world.now += pause.min(300);
            if evict {
                world.evict();
            } else {
                world.request(n, &info(1, 100, 100));
            }
        }
        for class in 0..CLASSES {
            for bucket in 0..BUCKETS {
                let seen = world.sage.hazards.used[class][bucket];
                let happened = world.used.get(&(class as u8, bucket)).copied().unwrap_or(0.0);
                prop_assert_eq!(seen, happened, "class {} bucket {}", class, bucket);
            }
        }
    }
}

/// Two kinds of positions, one used again after a minute and one never: the learned order keeps the first kind, although
/// the second was used more recently.
#[test]
fn what_comes_back_is_kept_and_what_does_not_goes_first() {
    let mut world = World::new();
    let (living, dead) = (info(1, 1000, 100), info(1, 100_000, 100));
    let step = 60_000;
    for round in 0..400u32 {
        world.now += step;
        // Position 0 is used each minute; another one is used once and leaves in its turn.
        world.request(0, &living);
        world.now += 1000;
        let once = CHAIN + (round % 8) * CHAIN;
        world.request(once, &dead);
        if world.leaves().len() > 2 {
            let gone = world.evict();
            if round > 20 {
                assert_ne!(gone, Some(0), "round {round}: what comes back each minute went for what does not");
            }
        }
        // A new universe of the dead each time: their ghosts do not come back.
        world.ghosts.clear();
        if round % 8 == 7 {
            for n in CHAIN..POSITIONS {
                let _ = world.sage.ghosts.take(&digest(n));
            }
        }
    }
}

#[test]
fn with_nothing_learned_the_longest_unused_goes_first() {
    let mut world = World::new();
    for n in 0..POSITIONS / CHAIN {
        world.now += 1500;
        world.request(n * CHAIN, &info((n % 6) as u8, n * 9000, n * 50));
    }
    world.now += 200;
    for n in 0..POSITIONS / CHAIN {
        assert_eq!(world.evict(), Some(n * CHAIN));
    }
}

#[test]
fn every_class_is_what_it_was_made_of() {
    let mut seen = std::collections::BTreeSet::new();
    for class in 0..CLASSES {
        match ClassId(class as u8).sort() {
            Sort::History { coarse } => assert!(class < HISTORY && coarse < classes::COARSE),
            Sort::Ended { trust } => {
                let uses = [1, 2, 3, 5, 9, 17];
                assert!(uses.iter().any(|uses| ClassId::ended(trust, *uses).index() == class));
            }
            Sort::Due { noise, due } => assert_eq!(ClassId::due(noise, due).index(), class),
        }
        seen.insert(format!("{:?}", ClassId(class as u8)));
    }
    assert_eq!(seen.len(), CLASSES);
    let hazards = Hazards::new(&Ages::new());
    drop(Ranks::new(hazards.index()));
}

fn said(session: u64, hint: Option<Hint>) -> RequestInfo {
    RequestInfo { session, hint, client: 1, ..info(1, 1000, 100) }
}

/// Everything that a run of steps did: who left when, in order.
fn run(steps: &[(bool, u32, u32)], info: impl Fn(u32) -> RequestInfo) -> Vec<Option<u32>> {
    let mut world = World::new();
    steps
        .iter()
        .map(|(evict, n, pause)| {
            world.now += 1 << pause.min(&20);
            if *evict {
                return world.evict();
            }
            world.request(*n, &info(n / CHAIN));
            None
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Naming sessions and clients without a hint changes nothing.
    #[test]
    fn without_hints_the_order_is_that_of_history(
        steps in prop::collection::vec((any::<bool>(), 0..POSITIONS, 0u32..21), 1..100),
    ) {
        let free = run(&steps, |_| info(1, 1000, 100));
        let named = run(&steps, |chain| said(u64::from(chain) + 1, None));
        prop_assert_eq!(free, named);
    }

    /// What was saved begins the next life with the same order.
    #[test]
    fn a_later_life_begins_with_what_was_learned(
        steps in prop::collection::vec((any::<bool>(), 0..POSITIONS, 0u32..21), 1..100),
    ) {
        let mut world = World::new();
        for (evict, n, pause) in steps {
            world.now += 1 << pause.min(20);
            if evict {
                world.evict();
            } else {
                world.request(n, &info(1, 1000, 100));
            }
        }
        world.sage.fit();
        let bytes = world.sage.save();
        let mut next = Sage::new(16);
        let fresh = next.save();
        prop_assert!(!next.load(&bytes[..bytes.len() - 1]));
        prop_assert_eq!(&next.save(), &fresh, "bad bytes change nothing");
        prop_assert!(next.load(&bytes));
        for class in 0..CLASSES {
            for bucket in 0..BUCKETS {
                let (a, b) = (world.sage.hazards.index()[class][bucket], next.hazards.index()[class][bucket]);
                prop_assert!((a - b).abs() <= a.abs() * 1e-4, "class {class} bucket {bucket}: {a} became {b}");
            }
        }
    }
}

#[test]
fn what_ended_goes_before_what_may_come_back_and_what_is_due_soon_goes_last() {
    let mut world = World::new();
    world.request(0, &said(1, Some(Hint::DueIn(60_000))));
    world.now += 500;
    world.request(CHAIN, &said(2, None));
    world.now += 500;
    world.request(2 * CHAIN, &said(3, Some(Hint::Ends)));
    world.now += 45_000;
    assert_eq!((world.evict(), world.evict(), world.evict()), (Some(2 * CHAIN), Some(CHAIN), Some(0)));
}

#[test]
fn what_several_sessions_use_does_not_end_with_one() {
    let mut world = World::new();
    world.request(0, &said(1, None));
    world.now += 1000;
    world.request(0, &said(2, Some(Hint::Ends)));
    let id = world.find(0).unwrap();
    assert!(matches!(ClassId(world.slab[id].class).sort(), Sort::History { .. }));
    // The same after it was away.
    world.evict();
    world.request(0, &said(2, Some(Hint::Ends)));
    let id = world.find(0).unwrap();
    assert!(matches!(ClassId(world.slab[id].class).sort(), Sort::History { .. }));
}

/// An engine that names no session: a chain is one until another branches off it, from where on there are two.
#[test]
fn a_chain_is_a_session_where_none_is_named_and_a_branch_begins_another() {
    let ended = |world: &World, n: u32| {
        matches!(ClassId(world.slab[world.find(n).expect("here")].class).sort(), Sort::Ended { .. })
    };
    let mut world = World::new();
    world.request(2, &said(0, Some(Hint::Ends)));
    assert!((0..3).all(|n| ended(&world, n)));

    // It gets a name with the first that comes.
    for (session, shared) in [(7, false), (7, false), (8, true)] {
        let id = world.find(2).unwrap();
        world.sage.hint(&mut world.slab, id, &said(session, None), None, Instant(world.now));
        assert_eq!(world.slab[id].has(Entry::SHARED), shared);
    }

    // 4, 5, 6 and, behind 5, another one: what both have is shared.
    world.request(6, &said(0, None));
    let parent = world.find(5).unwrap();
    let mut other = entry(9, 2, world.now);
    other.parent = parent;
    other.set_resident(Level::Dram, true);
    let id = world.slab.insert(other);
    world.slab[parent].children += 1;
    world.slab[parent].resident_children[0] += 1;
    world.sage.enter(&mut world.slab, id, Level::Dram);
    world.tell(id, &said(0, Some(Hint::Ends)), None);
    world.now += 1000;
    world.request(6, &said(0, Some(Hint::Ends)));
    assert!(ended(&world, 6) && ended(&world, 9) && !ended(&world, 4) && !ended(&world, 5));
    assert_ne!(world.slab[id].session, world.slab[parent].session);
}

/// The end of a prompt that does not fill its block is no branch: the next prompt of the session fills it.
#[test]
fn a_prompt_that_ends_within_a_block_does_not_share_what_lies_before() {
    let mut world = World::new();
    world.request(1, &said(0, None));
    let parent = world.find(0).unwrap();
    let mut tail = entry(9, 1, world.now);
    tail.parent = parent;
    world.slab[parent].children += 1;
    let id = world.slab.insert(tail);
    owners::note(&mut world.slab, id, &said(0, None), true);
    assert!(!world.slab[parent].has(Entry::SHARED));
    assert_eq!(world.slab[id].session, world.slab[parent].session);
}

/// Used alike, they go by priority; a shared one keeps the best that was said of it.
#[test]
fn of_positions_that_are_used_alike_the_lower_priority_goes_first() {
    let mut world = World::new();
    let with = |session, priority| RequestInfo { priority, ..said(session, None) };
    world.request(0, &with(1, Some(Priority::High)));
    world.request(CHAIN, &with(2, None));
    world.request(2 * CHAIN, &with(3, Some(Priority::Low)));
    world.request(3 * CHAIN, &with(4, Some(Priority::High)));
    world.request(3 * CHAIN, &with(5, Some(Priority::Low)));
    assert_eq!((world.evict(), world.evict()), (Some(2 * CHAIN), Some(CHAIN)));
    // Said between two requests.
    let id = world.find(0).unwrap();
    let value = |world: &World| world.sage.value(&world.slab, id, Instant(world.now)).unwrap();
    let high = value(&world);
    let weight = Some(Weight::new(None, Priority::Normal));
    world.sage.hint(&mut world.slab, id, &with(1, Some(Priority::Normal)), weight, Instant(world.now));
    assert_eq!(value(&world), high / 4.0);
    world.check();
    assert_eq!((world.evict(), world.evict()), (Some(0), Some(3 * CHAIN)));
}

/// What has ended is offered before room is needed, as long as the client's word was never wrong and nothing keeps it.
#[test]
fn ended_sessions_are_offered_early_and_living_ones_are_not() {
    let mut world = World::new();
    world.request(1, &said(1, Some(Hint::Ends)));
    world.request(CHAIN, &said(2, None));
    let offered = |world: &World| world.sage.finished(&world.slab, Level::Dram, &|_| true);
    assert_eq!(offered(&world), world.find(1), "leaf first");
    assert_eq!(world.sage.finished(&world.slab, Level::Dram, &|_| false), None);
    assert_eq!(world.sage.finished(&world.slab, Level::Nvme, &|_| true), None);
    let leaf = world.find(1).unwrap();
    world.slab[leaf].leases = 1;
    assert_eq!(offered(&world), None, "leased");
    world.slab[leaf].leases = 0;
    world.drop_it(1, false);
    world.drop_it(0, false);
    assert_eq!(offered(&world), None);
}

/// A hint between two requests counts for the order at once, and as no access.
#[test]
fn a_hint_may_come_between_two_requests() {
    let mut world = World::new();
    for n in [0, 1, 2] {
        world.request(n * CHAIN, &said(u64::from(n) + 1, None));
        world.now += 1000;
    }
    let id = world.find(2 * CHAIN).unwrap();
    let (uses, last) = (world.slab[id].uses, world.slab[id].last_access);
    let hint = said(3, Some(Hint::Ends));
    world.sage.hint(&mut world.slab, id, &hint, None, Instant(world.now));
    assert_eq!((world.slab[id].uses, world.slab[id].last_access), (uses, last));
    world.check();
    assert_eq!(world.evict(), Some(2 * CHAIN));
    // Announced for later than others have ever been waited for: counted from its last access.
    let id = world.find(0).unwrap();
    world.sage.hint(&mut world.slab, id, &said(1, Some(Hint::DueIn(30_000))), None, Instant(world.now));
    let due = ClassId(world.slab[id].class).sort();
    let waited = world.now - world.slab[id].last_access.0;
    assert_eq!(due, Sort::Due { noise: 0, due: world.sage.ages.bucket(Duration::from_millis(waited + 30_000)) });
    world.check();
}
