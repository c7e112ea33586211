//! SAGE, session-age Gittins eviction: what goes next is learned from how positions of the same class were used before.
//!
//! ```text
//! access ─> classes   what the position is told apart by from now on; weights: what it costs, its priority
//!        ─> hazards   its gap is an observation of the class that it had       <─ ghosts: those that left and came back
//!        ─> calendar  how many of each class are open, by last access
//!        ─> cells     its place among the evictable ones of its tiers
//! now and then: hazards + calendar ─fit─> an index per class and age ─> the order of the cells
//! victim <─ the longest unused leaf of the cell with the lowest index times weight
//! ```
//!
//! One set of observations for both tiers, one order, two sets of cells. Only leaves have a seat in the cells: a position
//! leaves them when a child enters or when its turn comes and something else keeps it, and comes back to the old end of
//! its cell when the obstacle ends. Nothing here knows how large a tier is; there is nothing to configure.

mod ages;
mod calendar;
mod cells;
mod classes;
mod clients;
pub(crate) mod fit;
mod ghosts;
mod hazards;
mod order;
mod owners;
mod snapshot;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use crate::directory::entry::{Entry, EntryId, Level};
use crate::directory::list::{List, Seat};
use crate::directory::slab::Slab;
use crate::ids::Instant;
use crate::words::{Hint, RequestInfo};

use self::ages::{Ages, BUCKETS};
use self::calendar::Calendar;
use self::cells::Ranks;
use self::classes::{ClassId, Seen, Sort};
use self::clients::Clients;
use self::fit::{Fit, Fits, Fitted};
use self::ghosts::{Fell, Ghost, Ghosts, SAMPLED};
use self::hazards::Hazards;
use self::order::Order;
use self::snapshot::Learned;
use super::last_resort::LastResort;
use super::weight::Weight;
use super::{Access, Leased, Obstacle, Policy, obstacle};

/// Ghosts remembered unless said otherwise: 128 MiB at most.
pub const GHOSTS_MAX: u32 = 4 * 1024 * 1024;

/// How long one that was deferred is not asked for again while there are others.
const DEFERRED_FOR: Duration = Duration::from_secs(1);
/// Positions of ended sessions that one call looks at.
const FINISHED_LOOKS: usize = 256;
/// Deferred positions that come back in one call.
const RETURNS_MAX: u32 = 1024;

/// Values of an entry's seat byte; those in between are a bucket plus one.
const PARKED: u8 = 0;
const LEASED: u8 = 255;
const DEFERRED: u8 = 254;

const _: () = assert!(BUCKETS < DEFERRED as usize);

/// See the module.
pub(crate) struct Sage {
    ages: Arc<Ages>,
    hazards: Hazards,
    calendar: Calendar,
    ghosts: Ghosts,
    clients: Clients,
    ranks: Ranks,
    orders: [Order; 2],
    leased: LastResort,
    deferred: [List; 2],
    /// When those that were deferred come back.
    deferred_until: Instant,
    /// The newest time that was told.
    now: Instant,
    fits: Fits,
}

impl Sage {
    pub(crate) fn new(ghosts_max: u32) -> Self {
        let ages = Arc::new(Ages::new());
        let hazards = Hazards::new(&ages);
        Self {
            ranks: Ranks::new(hazards.index()),
            hazards,
            ages,
            calendar: Calendar::new(),
            ghosts: Ghosts::new(ghosts_max),
            clients: Clients::default(),
            orders: Level::BOTH.map(Order::new),
            leased: LastResort::new(),
            deferred: Level::BOTH.map(|level| List::new(Seat::Policy(level))),
            deferred_until: Instant(0),
            now: Instant(0),
            fits: Fits::default(),
        }
    }

    /// Time goes on: fits when it is time to.
    fn tick(&mut self, now: Instant) {
        self.now = self.now.max(now);
        if self.fits.tick(self.now) {
            self.fit();
        }
    }

    /// Learns here and now.
    fn fit(&mut self) {
        let fitted = self.seen().run();
        self.fits.done();
        self.take(fitted);
    }

    fn seen(&mut self) -> Fit {
        Fit { ages: Arc::clone(&self.ages), seen: self.hazards.seen(&self.calendar, self.now) }
    }

    /// Takes over a new order.
    fn take(&mut self, fitted: Fitted) {
        self.hazards.set_index(fitted.index);
        self.ranks = fitted.ranks;
        for order in &mut self.orders {
            order.rank(&self.ranks);
        }
    }

    fn unlink(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        let l = level as usize;
        match slab[id].seat[l] {
            PARKED => {}
            LEASED => self.leased.unlink(slab, id),
            DEFERRED => self.deferred[l].unlink(slab, id),
            _ => self.orders[l].unlink(slab, &self.ranks, id),
        }
        slab[id].seat[l] = PARKED;
    }

    /// Gives an entry that has no seat the one of its class and age.
    fn seat(&mut self, slab: &mut Slab, id: EntryId, level: Level, oldest: bool) {
        let bucket = self.ages.since(self.now, slab[id].last_access);
        self.orders[level as usize].push(slab, &self.ranks, id, bucket, oldest);
    }

    /// Brings those back that were deferred.
    fn undefer(&mut self, slab: &mut Slab, level: Level) {
        for _ in 0..RETURNS_MAX {
            let Some(id) = self.deferred[level as usize].front() else { return };
            self.unlink(slab, id, level);
            self.seat(slab, id, level, true);
        }
    }

    /// What was observed with this access, as of the class that the position had.
    fn observe(&mut self, slab: &mut Slab, id: EntryId, access: &Access<'_>) -> Option<Duration> {
        let e = &mut slab[id];
        let (class, last, weight) = match access.last {
            Some(last) => (ClassId(e.class), last, 1),
            None => {
                let (ghost, weight) = self.ghosts.take(&e.digest)?;
                (e.uses, e.session) = (ghost.uses, ghost.session);
                e.set(Entry::SHARED, ghost.shared);
                (ghost.class, ghost.last, weight)
            }
        };
        let gap = e.last_access.since(last);
        let bucket = self.ages.bucket(gap);
        self.calendar.take(class, last, weight);
        self.hazards.used(class, bucket, weight);
        match class.sort() {
            Sort::History { .. } => {}
            Sort::Ended { .. } => self.clients.came_after_end(access.info, access.now),
            Sort::Due { due, .. } => self.clients.came(access.info, bucket.abs_diff(due), access.now),
        }
        Some(gap)
    }

    /// The class that a hint gives a position that only this session uses; `None`: history decides.
    fn hinted(&mut self, e: &Entry, access: &Access<'_>) -> Option<ClassId> {
        if e.has(Entry::SHARED) {
            return None;
        }
        let info = &owners::named(e, access.info);
        match info.hint? {
            Hint::Ends => self.clients.trust(info, access.now).map(|trust| ClassId::ended(trust, e.uses)),
            // The next prompt fills this position, and then it has another key.
            Hint::DueIn(_) if access.tail => None,
            Hint::DueIn(ms) => {
                let due = self.ages.bucket(Duration::from_millis(u64::from(ms)));
                self.clients.noise(info).map(|noise| ClassId::due(noise, due))
            }
        }
    }
}

/// Shared positions keep the best of what was said of them.
fn set_weight(e: &mut Entry, weight: Option<Weight>) {
    if let Some(weight) = weight.filter(|weight| !e.has(Entry::SHARED) || *weight > e.weight()) {
        e.set_weight(weight);
    }
}

impl Policy for Sage {
    fn enter(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        if let Some(parent) = slab[id].parent.some() {
            // No leaf any more.
            self.unlink(slab, parent, level);
        }
        self.unlink(slab, id, level);
        if slab[id].resident_children[level as usize] == 0 {
            self.seat(slab, id, level, false);
        }
    }

    fn access(&mut self, slab: &mut Slab, id: EntryId, access: &Access<'_>) {
        self.tick(access.now);
        self.hazards.accessed(slab[id].parent.some().is_none());
        let gap = self.observe(slab, id, access);
        let levels = Level::BOTH.map(|level| slab[id].resident(level).then_some(level));
        for level in levels.into_iter().flatten() {
            // Under the class that it had.
            self.unlink(slab, id, level);
        }
        owners::note(slab, id, access.info, access.tail);
        set_weight(&mut slab[id], access.weight);
        let e = &mut slab[id];
        e.uses = e.uses.saturating_add(1);
        let seen = Seen { uses: e.uses, gap, tail: access.tail, info: access.info };
        let history = ClassId::of_history(&seen);
        let class = self.hinted(&slab[id], access).unwrap_or(history);
        let e = &mut slab[id];
        e.class = class.0;
        self.calendar.add(class, e.last_access, 1);
        for level in levels.into_iter().flatten() {
            if slab[id].resident_children[level as usize] == 0 {
                self.seat(slab, id, level, false);
            }
        }
    }

    fn freed(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        let ready = match (slab[id].seat[level as usize], obstacle(slab, id, level)) {
            (PARKED | LEASED | DEFERRED, None) => true,
            // Its children were in the way until now: let its turn come, so that it joins the last resort.
            (PARKED, Some(Obstacle::Leased)) => level == Level::Dram,
            _ => false,
        };
        if ready {
            self.unlink(slab, id, level);
            self.seat(slab, id, level, true);
        }
    }

    fn leave(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        self.unlink(slab, id, level);
    }

    fn gone(&mut self, slab: &mut Slab, id: EntryId, evicted: bool) {
        let e = &mut slab[id];
        let (class, last) = (ClassId(e.class), e.last_access);
        let mut ghost = Ghost::new(&e.digest, last, class, e.uses);
        (ghost.session, ghost.shared) = (e.session, e.has(Entry::SHARED));
        e.uses = 0;
        e.set(Entry::SHARED, false);
        if !evicted {
            self.calendar.take(class, last, 1);
            self.hazards.lost(class, self.ages.since(self.now, last), 1);
            return;
        }
        let (calendar, hazards, ages, now) = (&mut self.calendar, &mut self.hazards, &self.ages, self.now);
        self.ghosts.remember(ghost, |fell| match fell {
            Fell::Sampled(g) => calendar.add(g.class, g.last, SAMPLED - 1),
            Fell::Forgotten(g) => calendar.take(g.class, g.last, 1),
            Fell::Lost(g) => {
                calendar.take(g.class, g.last, SAMPLED);
                hazards.lost(g.class, ages.since(now, g.last), SAMPLED);
            }
        });
    }

    fn victim(&mut self, slab: &mut Slab, level: Level, now: Instant, leased: Leased) -> Option<EntryId> {
        let l = level as usize;
        self.tick(now);
        self.orders[l].age(slab, &self.ranks, &self.ages, self.now);
        if self.deferred[l].len() > 0 && self.now >= self.deferred_until {
            self.undefer(slab, level);
        }
        while let Some(id) = self.orders[l].first(&self.ranks).or_else(|| self.deferred[l].front()) {
            let Some(kept) = obstacle(slab, id, level) else { return Some(id) };
            if kept == Obstacle::Leased && leased == Leased::WaitFor {
                return None;
            }
            self.unlink(slab, id, level);
            if kept == Obstacle::Leased && level == Level::Dram {
                self.leased.push(slab, id);
                slab[id].seat[l] = LEASED;
            }
        }
        if level == Level::Dram && leased == Leased::PassOver { self.leased.victim(slab) } else { None }
    }

    fn defer(&mut self, slab: &mut Slab, id: EntryId, level: Level) {
        let leased = slab[id].seat[level as usize] == LEASED;
        self.unlink(slab, id, level);
        if leased {
            self.leased.push(slab, id);
            slab[id].seat[level as usize] = LEASED;
            return;
        }
        if self.deferred.iter().all(|list| list.len() == 0) {
            self.deferred_until = self.now.after(DEFERRED_FOR);
        }
        self.deferred[level as usize].push_back(slab, id);
        slab[id].seat[level as usize] = DEFERRED;
    }

    fn hint(&mut self, slab: &mut Slab, id: EntryId, info: &RequestInfo, weight: Option<Weight>, now: Instant) {
        self.tick(now);
        owners::note(slab, id, info, false);
        // An announced age counts from the last access.
        let waited = u32::try_from(now.since(slab[id].last_access).as_millis()).unwrap_or(u32::MAX);
        let hint = info.hint.map(|hint| match hint {
            Hint::Ends => Hint::Ends,
            Hint::DueIn(ms) => Hint::DueIn(ms.saturating_add(waited)),
        });
        let access = Access { info: &RequestInfo { hint, ..*info }, now, last: None, tail: false, weight };
        let class = self.hinted(&slab[id], &access).filter(|class| class.0 != slab[id].class);
        if class.is_none() && weight.is_none_or(|weight| weight == slab[id].weight()) {
            return;
        }
        let listed = Level::BOTH.map(|level| (level, slab[id].seat[level as usize] != PARKED));
        for (level, _) in listed {
            self.unlink(slab, id, level);
        }
        let e = &mut slab[id];
        set_weight(e, weight);
        if let Some(class) = class {
            self.calendar.take(ClassId(e.class), e.last_access, 1);
            self.calendar.add(class, e.last_access, 1);
            e.class = class.0;
        }
        for (level, _) in listed.into_iter().filter(|(_, listed)| *listed) {
            self.seat(slab, id, level, false);
        }
    }

    fn finished(&self, slab: &Slab, level: Level, wanted: &dyn Fn(EntryId) -> bool) -> Option<EntryId> {
        let free = |id| obstacle(slab, id, level).is_none() && wanted(id);
        self.orders[level as usize].first_of(slab, ClassId::certainly_ended(), FINISHED_LOOKS, free)
    }

    fn value(&self, slab: &Slab, id: EntryId, now: Instant) -> Option<f32> {
        let e = &slab[id];
        let bucket = self.ages.since(now, e.last_access);
        Some(self.ranks.value_of(ClassId(e.class), bucket) * e.weight().factor())
    }

    fn save(&self) -> Vec<u8> {
        let learned = Learned {
            used: self.hazards.used.clone(),
            lost: self.hazards.open_and_lost(&self.ages, &self.calendar, self.now),
            requests: self.hazards.requests,
            clients: self.clients.known.iter().map(|(id, client)| (*id, *client)).collect(),
        };
        learned.to_bytes()
    }

    fn load(&mut self, bytes: &[u8]) -> bool {
        let Some(learned) = Learned::from_bytes(bytes) else { return false };
        (self.hazards.used, self.hazards.lost) = (learned.used, learned.lost);
        self.hazards.requests = learned.requests;
        self.clients.known = learned.clients.into_iter().collect();
        self.fit();
        true
    }

    fn fit_elsewhere(&mut self) {
        self.fits.elsewhere();
    }

    fn begin_fit(&mut self) -> Option<Fit> {
        self.fits.begin().then(|| self.seen())
    }

    fn end_fit(&mut self, fitted: Fitted) {
        // One that was made here meanwhile knows more.
        if self.fits.done() {
            self.take(fitted);
        }
    }

    fn ghosts(&self) -> usize {
        self.ghosts.len()
    }

    fn hottest(&self, slab: &Slab, level: Level, visit: &mut dyn FnMut(EntryId) -> bool) {
        let leased = (level == Level::Dram).then_some(&self.leased.0);
        for list in leased.into_iter().chain([&self.deferred[level as usize]]) {
            let mut next = list.back();
            while let Some(id) = next {
                if !visit(id) {
                    return;
                }
                next = list.before(slab, id);
            }
        }
        self.orders[level as usize].last_to_first(slab, &self.ranks, visit);
    }
}
