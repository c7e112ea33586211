//! Doubly linked lists through the entries themselves: no allocation, every move O(1).

use super::entry::{Entry, EntryId, Level, Parts};
use super::slab::Slab;

/// One seat in one list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    before: EntryId,
    after: EntryId,
}

impl Default for Link {
    fn default() -> Self {
        Self { before: EntryId::NONE, after: EntryId::NONE }
    }
}

/// Which seat of an entry a list uses. An entry is in at most one list per seat.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Seat {
    /// The policy's, per level.
    Policy(Level),
    /// Spare parts, per level.
    Spare(Level),
    /// Chain ends to look at.
    Trim,
}

impl Seat {
    fn link(self, entry: &mut Entry) -> &mut Link {
        match (self, &mut entry.parts) {
            (Seat::Policy(level), _) => &mut entry.links[level as usize],
            (Seat::Spare(level), Parts::Many(m)) => &mut m.spare[level as usize],
            (Seat::Trim, Parts::Many(m)) => &mut m.trim,
            (Seat::Spare(_) | Seat::Trim, Parts::None | Parts::One(_)) => {
                unreachable!("only positions with a part list sit in these lists, and leave them before it goes")
            }
        }
    }
}

/// Front = goes first.
#[derive(Debug)]
pub(crate) struct List {
    front: EntryId,
    back: EntryId,
    len: u32,
    seat: Seat,
}

impl List {
    pub(crate) fn new(seat: Seat) -> Self {
        Self { front: EntryId::NONE, back: EntryId::NONE, len: 0, seat }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn front(&self) -> Option<EntryId> {
        self.front.some()
    }

    pub(crate) fn back(&self) -> Option<EntryId> {
        self.back.some()
    }

    /// The neighbour towards the front, of an entry of a policy's list.
    pub(crate) fn before(&self, slab: &Slab, id: EntryId) -> Option<EntryId> {
        match self.seat {
            Seat::Policy(level) => slab[id].links[level as usize].before.some(),
            Seat::Spare(_) | Seat::Trim => None,
        }
    }

    pub(crate) fn push_back(&mut self, slab: &mut Slab, id: EntryId) {
        *self.seat.link(&mut slab[id]) = Link { before: self.back, after: EntryId::NONE };
        match self.back.some() {
            Some(back) => self.seat.link(&mut slab[back]).after = id,
            None => self.front = id,
        }
        self.back = id;
        self.len += 1;
    }

    pub(crate) fn push_front(&mut self, slab: &mut Slab, id: EntryId) {
        *self.seat.link(&mut slab[id]) = Link { before: EntryId::NONE, after: self.front };
        match self.front.some() {
            Some(front) => self.seat.link(&mut slab[front]).before = id,
            None => self.back = id,
        }
        self.front = id;
        self.len += 1;
    }

    /// Takes out an entry that is in this list.
    pub(crate) fn unlink(&mut self, slab: &mut Slab, id: EntryId) {
        let Link { before, after } = std::mem::take(self.seat.link(&mut slab[id]));
        match before.some() {
            Some(before) => self.seat.link(&mut slab[before]).after = after,
            None => self.front = after,
        }
        match after.some() {
            Some(after) => self.seat.link(&mut slab[after]).before = before,
            None => self.back = before,
        }
        self.len -= 1;
    }
}
