//! Which units of which segment are free: the allocator. Memory only; rebuilt from the index at every open.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::place::{Extent, SegmentNo};

/// Size groups: extents of one group differ less than fourfold in size.
const GROUPS: usize = 9;
/// The group of segments that are empty and belong to none.
const UNBOUND: usize = GROUPS;

/// # How fragmentation is met
///
/// Blocks are freed one by one and nothing moves live data, so the allocator must keep holes usable:
///
/// * A run of free units is merged with its neighbours when it grows, and the **best fit** is taken: blocks of one
///   namespace are mostly of one size, so the hole one leaves is exactly what the next one needs.
/// * A segment takes extents of one **size group** (units differ less than fourfold) from its first extent until it is
///   empty again: small blocks cannot riddle the room of large ones, and a few freed neighbours always make room for one
///   more of the group.
/// * Only when its group, the empty segments and new segments have no room does an extent go to a foreign group's
///   segment: a small device is never refused what would fit.
///
/// What is left is reported (`largest_free`): an extent that fits nowhere is `Full`, and the policy evicts.
///
/// # States of a unit
///
/// ```text
///  free --alloc--> used --release, nobody reads--> free
///                   |  \--release, somebody reads--> leaving --last reader gone--> free
///                   \--quarantine--> quarantined
/// ```
#[derive(Debug)]
pub(crate) struct Extents {
    segments: BTreeMap<SegmentNo, Segment>,
    /// Free runs as (units, segment, first unit): one set per size group, and one for unbound segments.
    by_size: [BTreeSet<(u32, SegmentNo, u32)>; GROUPS + 1],
    /// Extents being read, by first unit. Only those: bounded by the reads in flight.
    reads: HashMap<(SegmentNo, u32), Reads>,
    counts: UnitCounts,
}

/// How the units of all segments are spent. `free + used + leaving + quarantined == total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnitCounts {
    pub total: u64,
    pub free: u64,
    pub used: u64,
    pub leaving: u64,
    pub quarantined: u64,
}

#[derive(Debug)]
struct Segment {
    group: usize,
    units: u32,
    /// Units that are not free.
    busy: u32,
    /// Free runs: first unit -> units. Disjoint, never adjacent.
    runs: BTreeMap<u32, u32>,
    taken: Bits,
    /// First units of used extents: what may be read and released.
    starts: Bits,
}

#[derive(Clone, Copy, Debug, Default)]
struct Reads {
    readers: u32,
    /// Set when the extent was released meanwhile: its units, to be freed by the last reader.
    leaving: Option<u32>,
}

/// Why an extent of the index cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misfit {
    /// Its segment is missing, or ends before it.
    OutOfRange,
    /// Another extent already has some of its units.
    Overlap,
}

fn group_of(units: u32) -> usize {
    ((units.max(1).ilog2() / 2) as usize).min(GROUPS - 1)
}

impl Extents {
    pub fn new() -> Self {
        Self {
            segments: BTreeMap::new(),
            by_size: std::array::from_fn(|_| BTreeSet::new()),
            reads: HashMap::new(),
            counts: UnitCounts::default(),
        }
    }

    pub fn counts(&self) -> UnitCounts {
        self.counts
    }

    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    pub fn has_segment(&self, no: SegmentNo) -> bool {
        self.segments.contains_key(&no)
    }

    /// Units of the longest free run.
    pub fn largest_free(&self) -> u32 {
        self.by_size.iter().filter_map(|set| set.last()).map(|&(units, ..)| units).max().unwrap_or(0)
    }

    /// Adds a segment whose units are all free.
    pub fn add_segment(&mut self, no: SegmentNo, units: u32) {
        self.add_unsorted_segment(no, units);
        self.set_run(no, 0, units);
        self.counts.free += u64::from(units);
    }

    /// Adds a segment whose extents are claimed next; [`Self::settle`] finds what stayed free.
    pub fn add_unsorted_segment(&mut self, no: SegmentNo, units: u32) {
        let segment = Segment {
            group: UNBOUND,
            units,
            busy: 0,
            runs: BTreeMap::new(),
            taken: Bits::new(units),
            starts: Bits::new(units),
        };
        let before = self.segments.insert(no, segment);
        debug_assert!(before.is_none(), "segment {no} added twice");
        self.counts.total += u64::from(units);
    }

    /// Takes over an extent that the index names. Between [`Self::add_unsorted_segment`] and [`Self::settle`].
    pub fn claim(&mut self, e: Extent) -> Result<(), Misfit> {
        let segment = self.segments.get_mut(&e.segment).ok_or(Misfit::OutOfRange)?;
        if e.units == 0 || e.unit.checked_add(e.units).is_none_or(|end| end > segment.units) {
            return Err(Misfit::OutOfRange);
        }
        if segment.taken.any(e.unit, e.units) {
            return Err(Misfit::Overlap);
        }
        segment.taken.set(e.unit, e.units, true);
        segment.starts.set(e.unit, 1, true);
        segment.busy += e.units;
        if segment.group == UNBOUND {
            segment.group = group_of(e.units);
        }
        self.counts.used += u64::from(e.units);
        Ok(())
    }

    /// Gives up an extent claimed before [`Self::settle`].
    pub fn unclaim(&mut self, e: Extent) {
        let segment = self.segments.get_mut(&e.segment).expect("only a claimed extent is given up");
        segment.taken.set(e.unit, e.units, false);
        segment.starts.set(e.unit, 1, false);
        segment.busy -= e.units;
        self.counts.used -= u64::from(e.units);
    }

    /// Makes free runs of every unit that nobody claimed.
    pub fn settle(&mut self) {
        let mut all: [Vec<(u32, SegmentNo, u32)>; GROUPS + 1] = std::array::from_fn(|_| Vec::new());
        for (&no, segment) in &mut self.segments {
            if segment.busy == 0 {
                segment.group = UNBOUND;
            }
            let runs: Vec<(u32, u32)> = segment.taken.zero_runs(segment.units).collect();
            for &(unit, units) in &runs {
                all[segment.group].push((units, no, unit));
                self.counts.free += u64::from(units);
            }
            segment.runs = runs.into_iter().collect();
        }
        // From whole lists: building a tree at once is several times cheaper than one insert after another.
        self.by_size = all.map(|runs| runs.into_iter().collect());
    }

    /// Takes `units` contiguous units. Without `anywhere` only from its own size group and from empty segments.
    pub fn alloc(&mut self, units: u32, anywhere: bool) -> Option<Extent> {
        let group = group_of(units);
        let fit = |set: &BTreeSet<(u32, SegmentNo, u32)>| set.range((units, SegmentNo(0), 0)..).next().copied();
        let (run, segment, unit) = fit(&self.by_size[group])
            .or_else(|| fit(&self.by_size[UNBOUND]))
            .or_else(|| if anywhere { self.by_size.iter().filter_map(fit).min() } else { None })?;
        self.unset_run(segment, unit, run);
        let s = self.segments.get_mut(&segment).expect("a run's segment exists");
        if s.group == UNBOUND {
            // The whole segment was this one run.
            s.group = group;
        }
        s.busy += units;
        s.taken.set(unit, units, true);
        s.starts.set(unit, 1, true);
        if run > units {
            self.set_run(segment, unit + units, run - units);
        }
        self.counts.free -= u64::from(units);
        self.counts.used += u64::from(units);
        Some(Extent { segment, unit, units })
    }

    /// Counts a reader in, unless no used extent starts there.
    pub fn begin_read(&mut self, segment: SegmentNo, unit: u32, units: u32) -> bool {
        let fits = |s: &Segment| unit.checked_add(units).is_some_and(|end| end <= s.units) && s.starts.get(unit);
        if !self.segments.get(&segment).is_some_and(fits) {
            return false;
        }
        self.reads.entry((segment, unit)).or_default().readers += 1;
        true
    }

    /// Counts a reader out; the last one frees an extent that was released meanwhile.
    pub fn end_read(&mut self, segment: SegmentNo, unit: u32) {
        let reads = self.reads.get_mut(&(segment, unit)).expect("every end has its begin");
        reads.readers -= 1;
        if reads.readers > 0 {
            return;
        }
        let leaving = reads.leaving;
        self.reads.remove(&(segment, unit));
        if let Some(units) = leaving {
            self.counts.leaving -= u64::from(units);
            self.set_free(Extent { segment, unit, units });
        }
    }

    /// Gives an extent back: free at once, or with its last reader.
    pub fn release(&mut self, e: Extent) {
        self.end_use(e);
        match self.reads.get_mut(&(e.segment, e.unit)) {
            Some(reads) => {
                debug_assert!(reads.leaving.is_none(), "{e:?} released twice");
                reads.leaving = Some(e.units);
                self.counts.leaving += u64::from(e.units);
            }
            None => self.set_free(e),
        }
    }

    /// Takes an extent out of use until the operator says otherwise.
    pub fn quarantine(&mut self, e: Extent) {
        self.end_use(e);
        self.counts.quarantined += u64::from(e.units);
    }

    /// Gives a quarantined extent back.
    pub fn pardon(&mut self, e: Extent) {
        self.counts.quarantined -= u64::from(e.units);
        // Readers that began before the quarantine hold on to it as to a released one.
        match self.reads.get_mut(&(e.segment, e.unit)) {
            Some(reads) => {
                reads.leaving = Some(e.units);
                self.counts.leaving += u64::from(e.units);
            }
            None => self.set_free(e),
        }
    }

    fn end_use(&mut self, e: Extent) {
        let s = self.segments.get_mut(&e.segment).expect("a used extent's segment exists");
        assert!(s.starts.get(e.unit), "{e:?} is not in use");
        s.starts.set(e.unit, 1, false);
        self.counts.used -= u64::from(e.units);
    }

    fn set_free(&mut self, e: Extent) {
        let s = self.segments.get_mut(&e.segment).expect("a used extent's segment exists");
        debug_assert!(s.taken.all(e.unit, e.units), "{e:?} was free in part");
        s.taken.set(e.unit, e.units, false);
        s.busy -= e.units;
        let (mut unit, mut units) = (e.unit, e.units);
        let before = s.runs.range(..unit).next_back().map(|(&u, &n)| (u, n)).filter(|(u, n)| u + n == unit);
        let after = s.runs.get_key_value(&(unit + units)).map(|(&u, &n)| (u, n));
        if let Some((u, n)) = before {
            self.unset_run(e.segment, u, n);
            (unit, units) = (u, units + n);
        }
        if let Some((u, n)) = after {
            self.unset_run(e.segment, u, n);
            units += n;
        }
        let s = self.segments.get_mut(&e.segment).expect("as above");
        if s.busy == 0 {
            s.group = UNBOUND;
        }
        self.set_run(e.segment, unit, units);
        self.counts.free += u64::from(e.units);
    }

    fn set_run(&mut self, no: SegmentNo, unit: u32, units: u32) {
        let s = self.segments.get_mut(&no).expect("a run's segment exists");
        s.runs.insert(unit, units);
        self.by_size[s.group].insert((units, no, unit));
    }

    fn unset_run(&mut self, no: SegmentNo, unit: u32, units: u32) {
        let s = self.segments.get_mut(&no).expect("a run's segment exists");
        let run = s.runs.remove(&unit);
        let listed = self.by_size[s.group].remove(&(units, no, unit));
        debug_assert!(run == Some(units) && listed, "the two lists of free runs agree");
    }

    /// Whether the lists agree with each other and with the counts; what they disagree on otherwise. For tests and fsck:
    /// walks every unit.
    pub fn check(&self) -> Result<(), String> {
        let c = self.counts;
        if c.free + c.used + c.leaving + c.quarantined != c.total {
            return Err(format!("units do not add up: {c:?}"));
        }
        let mut listed = 0;
        for (&no, s) in &self.segments {
            if s.runs.iter().map(|(&u, &n)| (u, n)).ne(s.taken.zero_runs(s.units)) {
                return Err(format!("free runs of segment {no} are not its free units"));
            }
            if s.taken.ones() != s.busy || (s.busy == 0) != (s.group == UNBOUND) {
                return Err(format!("segment {no}: busy {} group {}", s.busy, s.group));
            }
            if let Some((&unit, &units)) = s.runs.iter().find(|&(&u, &n)| !self.by_size[s.group].contains(&(n, no, u)))
            {
                return Err(format!("run {unit}+{units} of segment {no} is not in its size list"));
            }
            listed += s.runs.len();
        }
        let free: u64 = self.by_size.iter().flatten().map(|&(units, ..)| u64::from(units)).sum();
        if free != c.free || listed != self.by_size.iter().map(BTreeSet::len).sum::<usize>() {
            return Err(format!("size lists hold {free} free units, counted {}", c.free));
        }
        Ok(())
    }
}

/// One bit per unit of a segment.
#[derive(Debug)]
struct Bits(Box<[u64]>);

impl Bits {
    fn new(units: u32) -> Self {
        Self(vec![0; units.div_ceil(64) as usize].into())
    }

    fn get(&self, at: u32) -> bool {
        self.0[at as usize / 64] >> (at % 64) & 1 == 1
    }

    /// The words that `at..at+n` touches, with the bits of each that belong to it.
    fn masks(at: u32, n: u32) -> impl Iterator<Item = (usize, u64)> {
        let end = at + n;
        (at / 64..end.div_ceil(64)).map(move |word| {
            let low = at.saturating_sub(word * 64);
            let high = (end - word * 64).min(64);
            (word as usize, (u64::MAX << low) & (u64::MAX >> (64 - high)))
        })
    }

    fn set(&mut self, at: u32, n: u32, on: bool) {
        for (word, mask) in Self::masks(at, n) {
            if on {
                self.0[word] |= mask;
            } else {
                self.0[word] &= !mask;
            }
        }
    }

    fn any(&self, at: u32, n: u32) -> bool {
        Self::masks(at, n).any(|(word, mask)| self.0[word] & mask != 0)
    }

    fn all(&self, at: u32, n: u32) -> bool {
        Self::masks(at, n).all(|(word, mask)| self.0[word] & mask == mask)
    }

    fn ones(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }

    /// Maximal runs of zero bits among the first `units`, as (first, number).
    fn zero_runs(&self, units: u32) -> impl Iterator<Item = (u32, u32)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next(at, units, false)?;
            let end = self.next(first, units, true).unwrap_or(units);
            at = end;
            Some((first, end - first))
        })
    }

    /// The first bit from `at` on that is `on`, below `units`.
    fn next(&self, at: u32, units: u32, on: bool) -> Option<u32> {
        let mut at = at;
        while at < units {
            let word = self.0[at as usize / 64];
            let wanted = (if on { word } else { !word }) >> (at % 64);
            if wanted != 0 {
                return Some(at + wanted.trailing_zeros()).filter(|&found| found < units);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: SegmentNo = SegmentNo(1);

    fn extent(unit: u32, units: u32) -> Extent {
        Extent { segment: S, unit, units }
    }

    #[test]
    fn a_freed_hole_is_taken_by_the_next_block_of_its_size() {
        let mut x = Extents::new();
        x.add_segment(S, 100);
        let e: Vec<_> = (0..10).map(|_| x.alloc(10, false).unwrap()).collect();
        assert_eq!(x.alloc(1, true), None);
        x.release(e[3]);
        x.release(e[7]);
        assert_eq!(x.alloc(11, true), None);
        assert_eq!(x.alloc(10, false), Some(e[3]));
        x.release(e[6]);
        assert_eq!(x.largest_free(), 20);
        assert_eq!(x.alloc(20, true), Some(extent(60, 20)));
    }

    #[test]
    fn small_blocks_go_to_a_large_groups_segment_only_as_the_last_resort() {
        let mut x = Extents::new();
        x.add_segment(S, 100);
        x.alloc(40, false).unwrap();
        assert_eq!(x.alloc(1, false), None);
        assert_eq!(x.alloc(1, true), Some(extent(40, 1)));
    }

    #[test]
    fn an_emptied_segment_takes_any_size_again() {
        let mut x = Extents::new();
        x.add_segment(S, 100);
        let e = x.alloc(1, false).unwrap();
        x.release(e);
        assert!(x.alloc(100, false).is_some());
    }

    #[test]
    fn an_extent_being_read_is_not_given_away() {
        let mut x = Extents::new();
        x.add_segment(S, 8);
        let e = x.alloc(8, false).unwrap();
        assert!(x.begin_read(S, 0, 8) && x.begin_read(S, 0, 8));
        x.release(e);
        assert!(!x.begin_read(S, 0, 8));
        assert_eq!((x.alloc(1, true), x.counts().leaving), (None, 8));
        x.end_read(S, 0);
        assert_eq!(x.alloc(1, true), None);
        x.end_read(S, 0);
        assert_eq!(x.alloc(8, true), Some(e));
        x.check().unwrap();
    }

    #[test]
    fn a_quarantined_extent_is_not_given_away() {
        let mut x = Extents::new();
        x.add_segment(S, 8);
        let e = x.alloc(8, false).unwrap();
        x.quarantine(e);
        assert_eq!(x.alloc(1, true), None);
        assert!(!x.begin_read(S, 0, 8));
        x.pardon(e);
        assert_eq!(x.alloc(8, true), Some(e));
        x.check().unwrap();
    }

    #[test]
    fn what_the_index_says_is_taken_over_unless_it_overlaps_or_lies_outside() {
        let mut x = Extents::new();
        x.add_unsorted_segment(S, 100);
        assert_eq!(x.claim(extent(10, 10)), Ok(()));
        assert_eq!(x.claim(extent(19, 1)), Err(Misfit::Overlap));
        assert_eq!(x.claim(extent(0, 11)), Err(Misfit::Overlap));
        assert_eq!(x.claim(extent(99, 2)), Err(Misfit::OutOfRange));
        assert_eq!(x.claim(extent(u32::MAX, 2)), Err(Misfit::OutOfRange));
        assert_eq!(x.claim(Extent { segment: SegmentNo(2), unit: 0, units: 1 }), Err(Misfit::OutOfRange));
        assert_eq!(x.claim(extent(50, 50)), Ok(()));
        x.unclaim(extent(10, 10));
        x.settle();
        x.check().unwrap();
        assert_eq!((x.counts().free, x.largest_free()), (50, 50));
    }

    proptest! {
        /// Against a plain list of extents: nothing overlaps, nothing leaks, and a rebuild finds the same free runs.
        #[test]
        fn extents_never_overlap_and_units_add_up(
            ops in prop::collection::vec((0u8..6, 1u32..80, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut x = Extents::new();
            let mut live: Vec<Extent> = Vec::new();
            let mut reading: Vec<Extent> = Vec::new();
            let mut next_segment = 1;
            for (op, units, pick) in ops {
                match op {
                    0 if next_segment < 5 => {
                        x.add_segment(SegmentNo(next_segment), 130);
                        next_segment += 1;
                    }
                    0..=2 => {
                        if let Some(e) = x.alloc(units, op == 2) {
                            prop_assert_eq!(e.units, units);
                            for l in live.iter().chain(&reading) {
                                prop_assert!(l.segment != e.segment || l.unit + l.units <= e.unit || e.unit + e.units <= l.unit);
                            }
                            live.push(e);
                        } else if op == 2 {
                            prop_assert!(x.largest_free() < units);
                        }
                    }
                    3 if !live.is_empty() => {
                        let e = live.swap_remove(pick.index(live.len()));
                        x.release(e);
                    }
                    4 if !live.is_empty() => {
                        let e = live[pick.index(live.len())];
                        prop_assert!(x.begin_read(e.segment, e.unit, e.units));
                        reading.push(e);
                    }
                    5 if !reading.is_empty() => {
                        let e = reading.swap_remove(pick.index(reading.len()));
                        x.end_read(e.segment, e.unit);
                    }
                    _ => {}
                }
                prop_assert_eq!(x.check(), Ok(()));
                prop_assert_eq!(x.counts().used, live.iter().map(|e| u64::from(e.units)).sum::<u64>());
            }
            for e in reading {
                x.end_read(e.segment, e.unit);
            }
            let mut again = Extents::new();
            for (&no, s) in &x.segments {
                again.add_unsorted_segment(no, s.units);
            }
            for &e in &live {
                prop_assert_eq!(again.claim(e), Ok(()));
            }
            again.settle();
            prop_assert_eq!(again.check(), Ok(()));
            prop_assert_eq!(again.counts(), x.counts());
        }
    }
}
