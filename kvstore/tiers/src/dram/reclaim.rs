//! Which blocks stand in the way when slots of one size are wanted and only other sizes, or other tenants, have room.
//!
//! Two kinds of place can be emptied: a run of neighbouring extents (with the holes between and beside them) in a file of
//! the same tenant, and a whole file of another tenant, which is then replaced. The cheapest in live bytes wins. Nobody who
//! was active in the last two windows loses its last extent: not another size of the same tenant, not another tenant.

use std::collections::BTreeSet;
use std::time::Instant;

use kvkeep_core::SlotRef;
use kvkeep_core::ids::{BlockId, TenantId};

use super::file::{ArenaFile, Cell, Extent, slots_that_fit};
use super::layout::entry_id;
use super::state::{PROMISE, State};

/// Extents that would have to go, and what that costs.
struct Place {
    file: u16,
    starts: Vec<u32>,
    /// Another tenant's: the whole file goes.
    foreign: bool,
    /// Not yet being emptied: a place on which somebody has begun comes first.
    fresh: bool,
    live_bytes: u64,
}

/// Chooses a place, stops handing out its slots, and returns the blocks in it.
pub(super) fn candidates(state: &mut State, tenant: TenantId, units: u32, now: Instant) -> Vec<(SlotRef, BlockId)> {
    state.roll_window(now);
    state.pressed = Some(state.window);
    let best = state
        .all_files()
        .flat_map(|file| match file.tenant {
            Some(owner) if owner == tenant => runs(state, file, units, now),
            Some(_) => whole(state, file, units, tenant).into_iter().collect(),
            None => Vec::new(),
        })
        .min_by_key(|p| (p.fresh, p.live_bytes, p.foreign));
    let Some(place) = best else { return Vec::new() };
    let until = now + PROMISE;
    if let Some(file) = state.file_mut(place.file) {
        if place.foreign {
            file.leaving_for = Some(tenant);
        } else {
            file.promised = Some((units, until));
        }
    }
    let mut victims = Vec::new();
    for start in place.starts {
        state.drain(place.file, start, until);
        let extent = state.file(place.file).and_then(|f| f.extents.get(&start));
        if extent.is_some_and(Extent::is_empty) {
            state.dissolve(place.file, start);
        } else if let Some(extent) = extent {
            victims.extend(extent.cells.iter().enumerate().filter_map(|(slot, cell)| match cell {
                Cell::Published(memory) => Some((memory.end().at.pack(), entry_id(extent.entry(slot as u32))?)),
                _ => None,
            }));
        }
    }
    if place.foreign && state.file(place.file).is_some_and(ArenaFile::is_empty) {
        state.doom(place.file, tenant, now);
    }
    victims
}

fn live_bytes(extent: &Extent) -> u64 {
    u64::from(extent.live) * extent.shape.slot_bytes()
}

fn is_active(extent: &Extent, window: u64) -> bool {
    extent.touched + 1 >= window
}

/// The shortest runs of extents of other sizes, from each extent on, whose end would make room for one slot.
fn runs(state: &State, file: &ArenaFile, units: u32, now: Instant) -> Vec<Place> {
    let mut places = Vec::new();
    let taken_for_others =
        file.leaving_for.is_some() || file.promised.is_some_and(|(for_units, until)| for_units != units && now < until);
    if taken_for_others {
        return places;
    }
    let extents: Vec<&Extent> = file.extents.values().collect();
    for first in 0..extents.len() {
        let mut place =
            Place { file: file.mapping.index(), starts: Vec::new(), foreign: false, fresh: false, live_bytes: 0 };
        let mut sizes = BTreeSet::new();
        for extent in &extents[first..] {
            if extent.shape.slot_units == units || extent.quarantined > 0 {
                break;
            }
            place.starts.push(extent.shape.start);
            place.live_bytes += live_bytes(extent);
            place.fresh |= extent.draining.is_none();
            sizes.insert(extent.shape.slot_units);
            let (from, to) = (extents[first].shape.start, extent.shape.end());
            let (before, after) = file.holes_beside(from, to);
            if slots_that_fit(to - from + before + after, units) > 0 {
                if sizes.iter().all(|size| may_lose(state, file, *size, &place)) {
                    places.push(place);
                }
                break;
            }
        }
    }
    places
}

/// Whether a size of the file's tenant keeps an extent when those of `place` go, or does without.
fn may_lose(state: &State, file: &ArenaFile, size: u32, place: &Place) -> bool {
    let Some(domain) = file.tenant.and_then(|t| state.domains.get(&t)) else { return false };
    let of_size = || {
        let files = domain.files.iter().filter_map(|index| state.file(*index));
        files
            .flat_map(|f| f.extents.values().map(|e| (f.mapping.index(), e)))
            .filter(|(_, e)| e.shape.slot_units == size)
    };
    of_size().any(|(index, e)| e.draining.is_none() && (index != place.file || !place.starts.contains(&e.shape.start)))
        || !of_size().any(|(_, e)| e.live > 0 && is_active(e, state.window))
}

/// Another tenant's file, where that tenant keeps an extent elsewhere or was not active.
fn whole(state: &State, file: &ArenaFile, units: u32, wanted_by: TenantId) -> Option<Place> {
    let domain = state.domains.get(&file.tenant?)?;
    let for_another = file.leaving_for.is_some_and(|t| t != wanted_by);
    if for_another || slots_that_fit(file.units() - 1, units) == 0 || file.extents.values().any(|e| e.quarantined > 0) {
        return None;
    }
    let index = file.mapping.index();
    let elsewhere = domain.files.iter().filter(|i| **i != index).filter_map(|i| state.file(*i));
    let floor = elsewhere.flat_map(|f| f.extents.values()).any(|e| e.live > 0 && e.draining.is_none());
    let active = file.extents.values().any(|e| e.live > 0 && is_active(e, state.window));
    (floor || !active).then(|| Place {
        file: index,
        starts: file.extents.keys().copied().collect(),
        foreign: true,
        fresh: file.leaving_for.is_none(),
        live_bytes: file.extents.values().map(live_bytes).sum(),
    })
}
