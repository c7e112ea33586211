//! Why a position is, or is not, here: the last things that happened, in a ring of fixed size.
//!
//! ```text
//! entry (40 bytes): digest 16 | wall ms 8 | distance back to the same digest 4 | index value 4 | what | tier | why | 5 unused
//! ```
//! Entries of one digest are chained backwards by distance, so a look-up costs as many steps as it returns.

use hashbrown::HashTable;

use crate::ids::Digest;
use crate::words::{Happening, MissReason, Tier};

/// Default number of entries.
pub const HISTORY_ENTRIES: usize = 65_536;

#[derive(Clone, Copy)]
struct Slot {
    digest: Digest,
    unix_ms: u64,
    /// How many entries ago this digest was last recorded; 0: not before, as far as is known.
    back: u32,
    /// NaN: none.
    index_value: f32,
    what: Happening,
    tier: Option<Tier>,
    why: Option<MissReason>,
}

const _: () = assert!(size_of::<Slot>() == 40, "an entry of the history has 40 bytes");

/// One thing that happened to a position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HistoryEntry {
    /// The caller's wall clock, milliseconds since 1970; for people only.
    pub unix_ms: u64,
    /// What happened.
    pub what: Happening,
    /// In which tier, where that matters.
    pub tier: Option<Tier>,
    /// Why, where there is a reason.
    pub why: Option<MissReason>,
    /// What the policy found it worth then, where the policy let it go ([`Directory::index_value`](crate::Directory::index_value)).
    pub index_value: Option<f32>,
}

/// Something that happens to a position, as it is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// What happens.
    pub what: Happening,
    /// In which tier, where that matters.
    pub tier: Option<Tier>,
    /// Why, where there is a reason.
    pub why: Option<MissReason>,
    /// What the policy finds it worth, where the policy lets it go.
    pub index_value: Option<f32>,
}

/// A bounded ring of [`HistoryEntry`], searchable by digest.
pub struct History {
    ring: Vec<Slot>,
    capacity: usize,
    /// Entries ever recorded; entry `n` lies in slot `n % capacity`.
    next: u64,
    /// Slot of the newest entry of each digest.
    newest: HashTable<u32>,
}

impl History {
    /// Room for `entries`, 1 at least; memory is taken as it fills.
    pub fn new(entries: usize) -> Self {
        let capacity = entries.clamp(1, u32::MAX as usize);
        Self { ring: Vec::new(), capacity, next: 0, newest: HashTable::new() }
    }

    /// Adds an entry; the oldest one makes room.
    pub fn record(&mut self, digest: Digest, record: Record, unix_ms: u64) {
        let at = (self.next % self.capacity as u64) as u32;
        let before = self.newest_of(&digest).map(|slot| self.number_of(slot));
        if self.ring.len() == self.capacity {
            self.forget(at);
        }
        let back = before.map_or(0, |n| (self.next - n) as u32);
        let Record { what, tier, why, index_value } = record;
        let slot = Slot { digest, unix_ms, back, index_value: index_value.unwrap_or(f32::NAN), what, tier, why };
        if self.ring.len() < self.capacity {
            self.ring.push(slot);
        } else {
            self.ring[at as usize] = slot;
        }
        let ring = &self.ring;
        let hash = |slot: &u32| ring[*slot as usize].digest.as_table_hash();
        match self.newest.find_mut(digest.as_table_hash(), |slot| ring[*slot as usize].digest == digest) {
            Some(newest) => *newest = at,
            None => {
                self.newest.insert_unique(digest.as_table_hash(), at, hash);
            }
        }
        self.next += 1;
    }

    /// The last `most` entries of a digest, newest last.
    pub fn of(&self, digest: &Digest, most: usize) -> Vec<HistoryEntry> {
        let mut out = Vec::new();
        let mut number = self.newest_of(digest).map(|slot| self.number_of(slot));
        while let Some(n) = number
            && out.len() < most
        {
            let s = &self.ring[(n % self.capacity as u64) as usize];
            let index_value = Some(s.index_value).filter(|value| !value.is_nan());
            out.push(HistoryEntry { unix_ms: s.unix_ms, what: s.what, tier: s.tier, why: s.why, index_value });
            // A chain ends where it leads to what was overwritten.
            number = n.checked_sub(u64::from(s.back)).filter(|older| *older < n && *older >= self.oldest());
        }
        out.reverse();
        out
    }

    /// The reason in the newest entry of a digest, if it has one: why the position is absent.
    pub fn why_absent(&self, digest: &Digest) -> Option<MissReason> {
        self.newest_of(digest).and_then(|slot| self.ring[slot as usize].why)
    }

    /// Entries held.
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether nothing was recorded yet.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    fn oldest(&self) -> u64 {
        self.next - self.ring.len() as u64
    }

    fn newest_of(&self, digest: &Digest) -> Option<u32> {
        self.newest.find(digest.as_table_hash(), |slot| self.ring[*slot as usize].digest == *digest).copied()
    }

    /// The number of the entry that lies in `slot` now.
    fn number_of(&self, slot: u32) -> u64 {
        let capacity = self.capacity as u64;
        let lap = (self.next - 1 - u64::from(slot)) / capacity;
        lap * capacity + u64::from(slot)
    }

    /// Takes the entry in `slot` out of the index if it is its digest's newest one.
    fn forget(&mut self, slot: u32) {
        let hash = self.ring[slot as usize].digest.as_table_hash();
        if let Ok(found) = self.newest.find_entry(hash, |s| *s == slot) {
            found.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::from_slice(&[n; 16]).unwrap()
    }

    fn stored() -> Record {
        Record { what: Happening::Stored, tier: Some(Tier::Dram), why: None, index_value: None }
    }

    #[test]
    fn the_newest_reason_explains_an_absence() {
        let mut h = History::new(8);
        h.record(digest(1), stored(), 10);
        assert_eq!(h.why_absent(&digest(1)), None);
        let why = Some(MissReason::Evicted);
        let evicted = Record { what: Happening::Evicted, tier: Some(Tier::Nvme), why, index_value: Some(0.25) };
        h.record(digest(1), evicted, 20);
        assert_eq!(h.of(&digest(1), 9).iter().map(|e| e.index_value).collect::<Vec<_>>(), [None, Some(0.25)]);
        assert_eq!(h.why_absent(&digest(1)), Some(MissReason::Evicted));
        assert_eq!(h.of(&digest(1), 9).iter().map(|e| e.unix_ms).collect::<Vec<_>>(), [10, 20]);
        assert_eq!(h.of(&digest(1), 1)[0].what, Happening::Evicted);
        assert!(h.of(&digest(2), 9).is_empty());
    }

    proptest! {
        /// Against a plain queue: every look-up gives the newest entries of the digest that are still in the ring.
        #[test]
        fn it_agrees_with_a_plain_queue(capacity in 1usize..9, records in prop::collection::vec(0u8..4, 0..60)) {
            let mut h = History::new(capacity);
            let mut model = VecDeque::new();
            for (i, d) in records.into_iter().enumerate() {
                h.record(digest(d), stored(), i as u64);
                model.push_back((d, i as u64));
                if model.len() > capacity {
                    model.pop_front();
                }
                for d in 0..4 {
                    let all: Vec<u64> = model.iter().filter(|(m, _)| *m == d).map(|(_, at)| *at).collect();
                    let two = &all[all.len().saturating_sub(2)..];
                    prop_assert_eq!(h.of(&digest(d), 99).iter().map(|e| e.unix_ms).collect::<Vec<_>>(), all.clone());
                    prop_assert_eq!(h.of(&digest(d), 2).iter().map(|e| e.unix_ms).collect::<Vec<_>>(), two.to_vec());
                }
            }
        }
    }
}
