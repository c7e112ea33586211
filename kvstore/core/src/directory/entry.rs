//! One tracked position and its parts, packed: 112 bytes, plus a boxed list where a position has more than one part or
//! its format has groups that outlive their use (`window`, `state`).
//!
//! ```text
//! Entry 112 = digest 16 | parts 32 | last access 8 | list links 2 x 8 | parent 4 | home 4 | chain index 4
//!           | children 4 | resident children 2 x 4 | leases 4 | accesses 4 | list seats 2 | flags 2 | gone 1 | the policy's own 3
//! Part   32 = version 8 | slot 8 | place 8 | len 4 | shard 2 | group 1 | grade 1
//! ```

use crate::block::{NvmePlace, SlotRef};
use crate::ids::{Digest, GroupId, Instant, ShardId, Version};
use crate::policy::weight::Weight;
use crate::words::{Class, Fidelity, Keeper, MissReason, Tier};

use super::home::HomeId;
use super::list::Link;

/// The two tiers a node's directory keeps order in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Level {
    Dram = 0,
    Nvme = 1,
}

impl Level {
    pub(crate) const BOTH: [Level; 2] = [Level::Dram, Level::Nvme];

    pub(crate) fn of(tier: Tier) -> Option<Level> {
        match tier {
            Tier::Dram => Some(Level::Dram),
            Tier::Nvme => Some(Level::Nvme),
            Tier::Hbm | Tier::Remote => None,
        }
    }
}

/// Index of an entry in the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct EntryId(pub(crate) u32);

impl EntryId {
    /// No entry.
    pub(crate) const NONE: EntryId = EntryId(u32::MAX);

    pub(crate) fn some(self) -> Option<EntryId> {
        (self != EntryId::NONE).then_some(self)
    }
}

/// Class, fidelity and keeper of a part in one byte whose unused values let [`Parts`] stay at 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Grade {
    CacheExact = 1,
    CacheNear = 2,
    ReplicatedExact = 3,
    ReplicatedNear = 4,
    DurableExact = 5,
    DurableNear = 6,
    /// Durable, and kept for sessions only.
    SessionExact = 7,
    SessionNear = 8,
}

impl Grade {
    fn new(class: Class, keeper: Keeper, fidelity: Fidelity) -> Self {
        match (class, keeper, fidelity) {
            (Class::Cache, _, Fidelity::Exact) => Self::CacheExact,
            (Class::Cache, _, Fidelity::Near) => Self::CacheNear,
            (Class::Replicated, _, Fidelity::Exact) => Self::ReplicatedExact,
            (Class::Replicated, _, Fidelity::Near) => Self::ReplicatedNear,
            (Class::Durable, Keeper::Caller, Fidelity::Exact) => Self::DurableExact,
            (Class::Durable, Keeper::Caller, Fidelity::Near) => Self::DurableNear,
            (Class::Durable, Keeper::Sessions, Fidelity::Exact) => Self::SessionExact,
            (Class::Durable, Keeper::Sessions, Fidelity::Near) => Self::SessionNear,
        }
    }
}

/// One block: where its copies lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub version: Version,
    pub slot: Option<SlotRef>,
    pub place: Option<NvmePlace>,
    pub len: u32,
    shard: ShardId,
    group: u8,
    grade: Grade,
}

impl Part {
    pub(crate) fn new(
        group: GroupId,
        shard: ShardId,
        version: Version,
        len: u32,
        class: Class,
        keeper: Keeper,
        fidelity: Fidelity,
    ) -> Self {
        let group = u8::try_from(group.0).expect("a checked format has at most 64 groups");
        Self { version, slot: None, place: None, len, shard, group, grade: Grade::new(class, keeper, fidelity) }
    }

    pub(crate) fn group(&self) -> GroupId {
        GroupId(u16::from(self.group))
    }

    pub(crate) fn shard(&self) -> ShardId {
        self.shard
    }

    pub(crate) fn class(&self) -> Class {
        match self.grade {
            Grade::CacheExact | Grade::CacheNear => Class::Cache,
            Grade::ReplicatedExact | Grade::ReplicatedNear => Class::Replicated,
            Grade::DurableExact | Grade::DurableNear | Grade::SessionExact | Grade::SessionNear => Class::Durable,
        }
    }

    pub(crate) fn fidelity(&self) -> Fidelity {
        match self.grade {
            Grade::CacheExact | Grade::ReplicatedExact | Grade::DurableExact | Grade::SessionExact => Fidelity::Exact,
            Grade::CacheNear | Grade::ReplicatedNear | Grade::DurableNear | Grade::SessionNear => Fidelity::Near,
        }
    }

    /// On whose word it stays. What is not durable yet was put by a caller.
    pub(crate) fn keeper(&self) -> Keeper {
        match self.grade {
            Grade::SessionExact | Grade::SessionNear => Keeper::Sessions,
            _ => Keeper::Caller,
        }
    }

    pub(crate) fn set_class(&mut self, class: Class, keeper: Keeper) {
        self.grade = Grade::new(class, keeper, self.fidelity());
    }

    pub(crate) fn on(&self, level: Level) -> bool {
        match level {
            Level::Dram => self.slot.is_some(),
            Level::Nvme => self.place.is_some(),
        }
    }

    fn key(&self) -> (u8, u16) {
        (self.group, self.shard.0)
    }
}

/// Parts of a position that has, or may have, several, in (group, shard) order, and its seats in the lists of what may
/// go early.
#[derive(Debug, Default)]
pub(crate) struct Multi {
    pub parts: Vec<Part>,
    /// Seats in the lists of spare parts, per level.
    pub spare: [Link; 2],
    /// Seat in the queue of chain ends to look at.
    pub trim: Link,
}

/// The parts of a position.
#[derive(Debug)]
pub(crate) enum Parts {
    /// None are left: the entry stands for its children or leases only.
    None,
    One(Part),
    Many(Box<Multi>),
}

impl Parts {
    pub(crate) fn as_slice(&self) -> &[Part] {
        match self {
            Parts::None => &[],
            Parts::One(p) => std::slice::from_ref(p),
            Parts::Many(m) => &m.parts,
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [Part] {
        match self {
            Parts::None => &mut [],
            Parts::One(p) => std::slice::from_mut(p),
            Parts::Many(m) => &mut m.parts,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    pub(crate) fn find(&self, group: GroupId, shard: ShardId) -> Option<&Part> {
        self.as_slice().iter().find(|p| p.group() == group && p.shard == shard)
    }

    pub(crate) fn find_mut(&mut self, group: GroupId, shard: ShardId) -> Option<&mut Part> {
        self.as_mut_slice().iter_mut().find(|p| p.group() == group && p.shard == shard)
    }

    /// Adds a part that is not there. `expected`: how many the position will have; `boxed`: keep a list even for one.
    pub(crate) fn add(&mut self, part: Part, expected: usize, boxed: bool) {
        if let Parts::Many(m) = self {
            let at = m.parts.partition_point(|p| p.key() < part.key());
            m.parts.reserve_exact(1);
            m.parts.insert(at, part);
            return;
        }
        if self.is_empty() && !boxed && expected <= 1 {
            *self = Parts::One(part);
            return;
        }
        let mut parts = Vec::with_capacity(expected.max(self.as_slice().len() + 1));
        parts.extend_from_slice(self.as_slice());
        parts.push(part);
        parts.sort_unstable_by_key(Part::key);
        *self = Parts::Many(Box::new(Multi { parts, ..Multi::default() }));
    }

    /// Takes a part out. An emptied list stays boxed until [`Parts::forget_empty`].
    pub(crate) fn take(&mut self, group: GroupId, shard: ShardId) -> Option<Part> {
        match self {
            Parts::One(p) if p.group() == group && p.shard == shard => {
                let part = *p;
                *self = Parts::None;
                Some(part)
            }
            Parts::Many(m) => {
                let at = m.parts.iter().position(|p| p.group() == group && p.shard == shard)?;
                Some(m.parts.remove(at))
            }
            Parts::One(_) | Parts::None => None,
        }
    }

    /// Gives the box of an emptied list back. Its seats must have been left.
    pub(crate) fn forget_empty(&mut self) {
        if let Parts::Many(m) = self
            && m.parts.is_empty()
        {
            *self = Parts::None;
        }
    }
}

/// One tracked position.
#[derive(Debug)]
pub(crate) struct Entry {
    pub digest: Digest,
    pub parts: Parts,
    pub last_access: Instant,
    /// Seats in the policy's lists, per level.
    pub links: [Link; 2],
    /// The position before it; in a vacant entry the next vacant one.
    pub parent: EntryId,
    pub home: HomeId,
    /// Index in its chain; of an entry that never had parts the largest one its children allow.
    pub position: u32,
    /// Entries whose parent this is.
    pub children: u32,
    /// Of them, those with a copy in DRAM, and those with one on NVMe.
    pub resident_children: [u32; 2],
    pub leases: u32,
    /// Accesses since it is tracked, saturating.
    pub accesses: u32,
    /// Which of its lists the policy has put it in, per level; 0: none.
    pub seat: [u8; 2],
    /// Code of the [`MissReason`] for which the last part went; 0: never had one, or has some.
    pub gone: u8,
    pub flags: u16,
    /// The policy's: what it is told apart by, uses as far as they are remembered, and whose it is.
    pub class: u8,
    pub uses: u8,
    pub session: u8,
}

const _: () = assert!(size_of::<Part>() == 32 && size_of::<Parts>() == 32 && size_of::<Entry>() == 112);

impl Entry {
    /// The slab's own: not in use.
    pub(crate) const VACANT: u16 = 1;
    /// `window` and `state` parts lie behind the last usable boundary.
    pub(crate) const SPARE: u16 = 2;
    /// Has a time to live in the side table.
    pub(crate) const EXPIRES: u16 = 4;
    /// Some part is of class `durable`.
    pub(crate) const DURABLE: u16 = 8;
    /// Counted as resident in DRAM, on NVMe.
    const RESIDENT: [u16; 2] = [16, 32];
    /// In the queue of chain ends to look at.
    pub(crate) const TRIM: u16 = 64;
    /// In the list of spare parts in DRAM, on NVMe.
    pub(crate) const SPARE_LISTED: [u16; 2] = [128, 256];
    /// More than one session has used it.
    pub(crate) const SHARED: u16 = 512;
    /// A session wants it kept in DRAM, on NVMe.
    pub(crate) const PINNED: [u16; 2] = [1024, 2048];
    /// A prompt ended in the middle of a position after it.
    pub(crate) const TAILED: u16 = 4096;
    /// Three bits: its [`Weight`], zero being that of most.
    const WEIGHT_SHIFT: u32 = 13;

    pub(crate) fn new(digest: Digest, home: HomeId, position: u32, now: Instant) -> Self {
        Self {
            digest,
            parts: Parts::None,
            last_access: now,
            links: [Link::default(); 2],
            parent: EntryId::NONE,
            home,
            position,
            children: 0,
            resident_children: [0; 2],
            leases: 0,
            accesses: 0,
            seat: [0; 2],
            gone: 0,
            flags: 0,
            class: 0,
            uses: 0,
            session: 0,
        }
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn set(&mut self, flag: u16, on: bool) {
        if on {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
    }

    /// What the policy multiplies its value with.
    pub(crate) fn weight(&self) -> Weight {
        Weight::from_bits((self.flags >> Self::WEIGHT_SHIFT) as u8)
    }

    pub(crate) fn set_weight(&mut self, weight: Weight) {
        let others = self.flags & !(u16::MAX << Self::WEIGHT_SHIFT);
        self.flags = others | u16::from(weight.bits()) << Self::WEIGHT_SHIFT;
    }

    /// Whether it counts as resident on this level.
    pub(crate) fn resident(&self, level: Level) -> bool {
        self.has(Self::RESIDENT[level as usize])
    }

    pub(crate) fn set_resident(&mut self, level: Level, on: bool) {
        self.set(Self::RESIDENT[level as usize], on);
    }

    /// The strongest class among its parts.
    pub(crate) fn class(&self) -> Class {
        self.parts.as_slice().iter().map(Part::class).max().unwrap_or(Class::Cache)
    }

    /// Why its last part went, if that is known.
    pub(crate) fn gone_for(&self) -> Option<MissReason> {
        MissReason::from_code(self.gone)
    }

    /// Whether every part that has a slot lies on NVMe too: dropping the slots loses nothing.
    pub(crate) fn saved(&self) -> bool {
        self.parts.as_slice().iter().all(|p| p.slot.is_none() || p.place.is_some())
    }
}
