//! L2: the arena, host memory in shared files that the kernel hands out once and a restarted server finds again.
//!
//! Read in this order: [`ArenaConfig`] and [`NoRoom`] (here) -> `layout` (what stands in a file) -> `memory` (the mapping,
//! and all `unsafe`) -> `file` (holes and extents of one file) -> `state` (the allocator) -> [`slot`](Reserved) (a slot in
//! its users' hands) -> [`arena`](Arena) (the door) -> `grow` (files come and go) -> `adopt` (files of a previous life) ->
//! `reclaim` (which blocks stand in the way) -> `usage`, `pages` (figures).
//!
//! ```text
//! reserve ─> Reserved ── write_at | io_buf ─> publish ─> SlotRef ── pin ─> Pinned (Deref, Bytes, io_buf)
//!    │           └ drop: free again                         └ free | quarantine: gone for new pins at once,
//!    └ NoRoom: what would help                                the memory is reused when the last holder lets go
//! ```
//! **Order of stores**, so that a killed server leaves at worst an entry that does not verify: the entry's state is empty
//! before a slot is handed out; payload; entry; fence; state published. To free: state empty first.
//!
//! **Growth.** Files are made on demand by one thread that keeps two spares ready, populated and (where the engine
//! can) registered, up to the capacity: an idle server holds little, a reservation never waits for the kernel to clear
//! memory, and no page can be missing when a copy reaches it. A burst that outruns the thread is told
//! [`NoRoomReason::Growing`]: try again in some milliseconds.

mod adopt;
mod arena;
mod file;
mod grow;
mod layout;
mod memory;
mod pages;
mod reclaim;
mod slot;
mod state;
mod usage;

use std::fmt;
use std::path::PathBuf;

use kvkeep_core::{Error, ErrorKind, Result};

pub use adopt::AdoptionReport;
pub use arena::{Arena, Slots};
pub use grow::{FixedRegion, Registrar};
pub use memory::UNIT_BYTES;
pub use slot::{Pinned, Purpose, Reserved, Site};
pub use usage::{ArenaUsage, Stranded, TenantUsage};

/// How long a place that was emptied for one size or tenant is kept for it, seconds.
pub const PROMISE_SECONDS: u64 = state::PROMISE.as_secs();

/// Smallest file of an arena that is large enough for four of them, bytes.
pub const FILE_BYTES_MIN: u64 = 64 << 20;
/// Largest file, bytes: an io_uring buffer may not be larger.
pub const FILE_BYTES_MAX: u64 = 1 << 30;
/// A smaller arena still has this many files (so: tenants), where its largest slot allows.
pub const FILES_MIN: u64 = 4;
/// A file is at least this part of a large arena: 1/64.
pub const FILES_TARGET: u64 = 64;

/// Memory that only one purpose may use, bytes each. Checked against the free bytes of the whole arena; what a purpose has
/// in flight counts against its reserve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserves {
    /// Incoming replicas.
    pub replicas: u64,
    /// Blocks on their way up from L3.
    pub l3_reads: u64,
    /// Scratch of codecs.
    pub encode: u64,
    /// Repair.
    pub repair: u64,
}

impl Reserves {
    fn of(&self, purpose: Purpose) -> u64 {
        match purpose {
            Purpose::Put => 0,
            Purpose::Promote => self.l3_reads,
            Purpose::Replica => self.replicas,
            Purpose::Encode => self.encode,
            Purpose::Repair => self.repair,
        }
    }

    /// All of them, bytes.
    pub fn total(&self) -> u64 {
        self.replicas.saturating_add(self.l3_reads).saturating_add(self.encode).saturating_add(self.repair)
    }

    /// Bytes that `purpose` must leave free for the others.
    fn kept_from(&self, purpose: Purpose, in_flight: &[u64; Purpose::COUNT]) -> u64 {
        [Purpose::Promote, Purpose::Replica, Purpose::Encode, Purpose::Repair]
            .into_iter()
            .filter(|p| *p != purpose)
            .map(|p| self.of(p).saturating_sub(in_flight[p.index()]))
            .sum()
    }
}

/// What a huge page of shared memory has, bytes.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// How to open an arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaConfig {
    /// A folder of its own on tmpfs; made with mode 0700 where it is missing.
    pub dir: PathBuf,
    /// Most bytes that its files may have together, tables included.
    pub capacity_bytes: u64,
    /// Parts of it for one purpose each.
    pub reserves: Reserves,
    /// Ask the kernel for huge pages before memory is populated. [`Arena::page_bytes`] says what came of it.
    pub huge_pages: bool,
    /// Largest payload, bytes.
    pub slot_bytes_max: u64,
    /// Empty memory that is kept populated ahead of demand, bytes: two files, if that is more.
    pub ready_bytes: u64,
}

impl ArenaConfig {
    /// An arena without reserves or huge pages, for blocks up to `slot_bytes_max`.
    pub fn new(dir: impl Into<PathBuf>, capacity_bytes: u64, slot_bytes_max: u64) -> Self {
        Self {
            dir: dir.into(),
            capacity_bytes,
            reserves: Reserves::default(),
            huge_pages: false,
            slot_bytes_max,
            ready_bytes: 0,
        }
    }

    /// Bytes of a new file: the largest of 64 MiB, 1/64 of the arena and one slot, at most 1 GiB; of a small arena at most
    /// a quarter, so that it has room for [`FILES_MIN`] tenants, but always one slot.
    pub fn file_bytes(&self) -> u64 {
        let one = file::file_bytes_for_one(self.slot_bytes_max);
        let rule = FILE_BYTES_MIN.max(self.capacity_bytes / FILES_TARGET).min(FILE_BYTES_MAX);
        let bytes = rule.min(self.capacity_bytes / FILES_MIN);
        // Whole huge pages, unless the arena is tiny.
        let step = if bytes >= 8 * HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { UNIT_BYTES as u64 };
        (bytes / step * step).max(one)
    }

    /// Checks the relations between the fields; the error names what disagrees.
    pub fn validate(&self) -> Result<()> {
        let bad = |message| Err(Error::new(ErrorKind::Config, message).with("capacity_bytes", self.capacity_bytes));
        let one = file::file_bytes_for_one(self.slot_bytes_max);
        if self.slot_bytes_max == 0 || self.slot_bytes_max > u64::from(u32::MAX) || one > FILE_BYTES_MAX {
            return bad("the largest slot and its table must fit into a file of 1 GiB")
                .map_err(|e| e.with("slot_bytes_max", self.slot_bytes_max));
        }
        if one > self.capacity_bytes {
            return bad("the arena is smaller than its largest slot; make it larger or allow smaller blocks")
                .map_err(|e| e.with("slot_bytes_max", self.slot_bytes_max));
        }
        if self.reserves.total() > self.capacity_bytes / 2 {
            return bad("the reserves take more than half of the arena")
                .map_err(|e| e.with("reserves_bytes", self.reserves.total()));
        }
        if self.capacity_bytes / self.file_bytes() >= slot::FILES_MAX as u64 {
            return bad("the arena would have more files than can be told apart (1,024)");
        }
        Ok(())
    }
}

/// Why a reservation was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoomReason {
    /// Empty, or larger than `slot_bytes_max`: never.
    TooLarge,
    /// The arena was closed.
    Closed,
    /// A file is being made: try again in some milliseconds.
    Growing,
    /// Free bytes are fewer than asked and what the other purposes' reserves keep.
    Full,
    /// Bytes are free, but not as a slot of this size for this tenant.
    NoSlot,
}

/// What the caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReclaimHint {
    /// Free any blocks of `short_bytes` together.
    AnyBytes,
    /// Free a block of this tenant that fills a slot of this size; or make room for more such slots by
    /// [`Arena::reclaim_candidates`].
    SameSize,
    /// The tenant has no slot of this size: only [`Arena::reclaim_candidates`] helps.
    OtherSizes,
}

/// A reservation that was not granted: an ordinary outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// Why.
    pub reason: NoRoomReason,
    /// How many bytes would have to be freed, at least.
    pub short_bytes: u64,
    /// What would help; `None` where only time or nothing does.
    pub hint: Option<ReclaimHint>,
}

impl NoRoom {
    fn never(reason: NoRoomReason) -> Self {
        Self { reason, short_bytes: 0, hint: None }
    }
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.reason {
            NoRoomReason::TooLarge => "no slot can be that large",
            NoRoomReason::Closed => "the arena has been closed",
            NoRoomReason::Growing => "memory is on its way",
            NoRoomReason::Full => "the arena is full",
            NoRoomReason::NoSlot => "no slot of this size is free",
        };
        write!(f, "{why}; {} bytes short", self.short_bytes)
    }
}
