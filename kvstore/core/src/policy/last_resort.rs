//! Leased positions in DRAM whose turn came: what goes when nothing else is left, if NVMe has them too.

use crate::directory::entry::{Entry, EntryId, Level};
use crate::directory::list::{List, Seat};
use crate::directory::slab::Slab;

/// Leased entries looked at in one call, when nothing else is left.
const STEPS: u32 = 256;

/// A list through the DRAM seats of its entries; a policy says in the entry's seat byte that it is in here.
pub(super) struct LastResort(pub(super) List);

impl LastResort {
    pub(super) fn new() -> Self {
        Self(List::new(Seat::Policy(Level::Dram)))
    }

    pub(super) fn push(&mut self, slab: &mut Slab, id: EntryId) {
        self.0.push_back(slab, id);
    }

    pub(super) fn unlink(&mut self, slab: &mut Slab, id: EntryId) {
        self.0.unlink(slab, id);
    }

    /// A leased position that DRAM can spare because NVMe has all of it.
    pub(super) fn victim(&mut self, slab: &mut Slab) -> Option<EntryId> {
        for _ in 0..STEPS.min(self.0.len()) {
            let id = self.0.front()?;
            let e = &slab[id];
            if e.resident_children[Level::Dram as usize] == 0
                && e.saved()
                && !e.has(Entry::PINNED[Level::Dram as usize])
            {
                return Some(id);
            }
            self.0.unlink(slab, id);
            self.0.push_back(slab, id);
        }
        None
    }
}
