//! Least recently used, leaves first.
//!
//! Every resident position enters the list at its young end with each access, leaf or not. Only when its turn comes and
//! something keeps it is it taken out (*parked*); when the obstacle ends it returns to the old end, which is its place:
//! everything in the list is younger. So the order is exactly that of last access among leaves, every move is O(1), and
//! a position is parked at most once per access.

use crate::directory::entry::{EntryId, Level};
use crate::directory::list::{List, Seat};
use crate::directory::slab::Slab;
use crate::ids::Instant;

use super::last_resort::LastResort;
use super::{Access, Leased, Obstacle, Policy, obstacle};

/// Values of an entry's policy byte.
const PARKED: u8 = 0;
const LISTED: u8 = 1;
const LEASED: u8 = 2;

/// See the module.
pub(crate) struct Lru {
    /// Per level, the oldest in front.
    main: [List; 2],
    leased: LastResort,
}

impl Lru {
    pub(crate) fn new() -> Self {
        Self { main: Level::BOTH.map(|level| List::new(Seat::Policy(level))), leased: LastResort::new() }
    }

    fn unlink(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        match slab[id].seat[level as usize] {
            LISTED => self.main[level as usize].unlink(slab, id),
            LEASED => self.leased.unlink(slab, id),
            _ => {}
        }
        slab[id].seat[level as usize] = PARKED;
    }

    fn rejoin(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        self.unlink(slab, id, level);
        self.main[level as usize].push_back(slab, id);
        slab[id].seat[level as usize] = LISTED;
    }
}

impl Policy for Lru {
    fn enter(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        self.rejoin(slab, id, level);
    }

    fn access(&mut self, slab: &mut Slab, id: EntryId, _: &Access<'_>) {
        for level in Level::BOTH {
            if slab[id].resident(level) {
                self.rejoin(slab, id, level);
            }
        }
    }

    fn freed(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        let ready = match (slab[id].seat[level as usize], obstacle(slab, id, level)) {
            (LISTED, _) => false,
            (_, None) => true,
            // Its children were in the way until now: let its turn come, so that it joins the last resort.
            (PARKED, Some(Obstacle::Leased)) => level == Level::Dram,
            (_, Some(_)) => false,
        };
        if ready {
            self.unlink(slab, id, level);
            self.main[level as usize].push_front(slab, id);
            slab[id].seat[level as usize] = LISTED;
        }
    }

    fn leave(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        self.unlink(slab, id, level);
    }

    fn gone(&mut self, _: &mut Slab, _: EntryId, _: bool) {}

    fn victim(&mut self, slab: &mut Slab, level: Level, _now: Instant, leased: Leased) -> Option<EntryId> {
        while let Some(id) = self.main[level as usize].front() {
            let Some(kept) = obstacle(slab, id, level) else { return Some(id) };
            if kept == Obstacle::Leased && leased == Leased::WaitFor {
                return None;
            }
            self.unlink(slab, id, level);
            if kept == Obstacle::Leased && level == Level::Dram {
                self.leased.push(slab, id);
                slab[id].seat[level as usize] = LEASED;
            }
        }
        if level == Level::Dram && leased == Leased::PassOver { self.leased.victim(slab) } else { None }
    }

    fn defer(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        if slab[id].seat[level as usize] == LEASED {
            self.leased.unlink(slab, id);
            self.leased.push(slab, id);
        } else {
            self.rejoin(slab, id, level);
        }
    }

    fn hottest(&self, slab: &Slab, level: Level, visit: &mut dyn FnMut(EntryId) -> bool) {
        let leased = (level == Level::Dram).then_some(&self.leased.0);
        for list in leased.into_iter().chain([&self.main[level as usize]]) {
            let mut next = list.back();
            while let Some(id) = next {
                if !visit(id) {
                    return;
                }
                next = list.before(slab, id);
            }
        }
    }
}
