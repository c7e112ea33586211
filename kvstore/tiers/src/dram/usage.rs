//! The arena in figures.

use std::sync::atomic::Ordering;
use std::time::Instant;

use kvkeep_core::ids::TenantId;

use super::arena::Shared;
use super::memory::UNIT_BYTES;

/// Bytes that are neither used nor usable for what is wanted now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stranded {
    /// Between the end of a payload and the end of its slot.
    pub rounding: u64,
    /// In holes of tenants' files too small for the smallest slot size that the tenant uses.
    pub holes: u64,
    /// In slots that nobody used for a minute, while reservations of other sizes or tenants found no room.
    pub idle: u64,
}

impl Stranded {
    /// All of it, bytes: `arena_stranded_bytes`.
    pub fn total(&self) -> u64 {
        self.rounding + self.holes + self.idle
    }
}

/// One tenant's part, bytes unless said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenantUsage {
    /// Whose.
    pub tenant: TenantId,
    /// Files it has.
    pub files: u64,
    /// Of these files.
    pub file_bytes: u64,
    /// Of its slots in use.
    pub used_bytes: u64,
    /// Published blocks, a count.
    pub blocks: u64,
}

/// Figures of one moment, bytes unless said.
///
/// `file_bytes = building_bytes + metadata_bytes + used_bytes + quarantined_bytes + free_slot_bytes + hole_bytes`, and
/// `capacity_bytes = metadata_bytes + used_bytes + quarantined_bytes + free_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaUsage {
    /// What it may have.
    pub capacity_bytes: u64,
    /// Files it has, a count.
    pub files: u64,
    /// Of the files, those being made included.
    pub file_bytes: u64,
    /// Of these, of files being made or removed.
    pub building_bytes: u64,
    /// Of headers and slot tables.
    pub metadata_bytes: u64,
    /// Of slots reserved, published, or freed and still held.
    pub used_bytes: u64,
    /// Of the payloads in them.
    pub payload_bytes: u64,
    /// Of slots reserved and not yet published.
    pub reserved_bytes: u64,
    /// Capacity that is neither used, bad, nor metadata; allocated or not.
    pub free_bytes: u64,
    /// Of free slots.
    pub free_slot_bytes: u64,
    /// Not carved yet, spares included.
    pub hole_bytes: u64,
    /// Of no use at the moment.
    pub stranded: Stranded,
    /// Slots somebody reads, a count.
    pub pinned_slots: u64,
    /// Of these slots.
    pub pinned_bytes: u64,
    /// Of slots whose memory failed.
    pub quarantined_bytes: u64,
    /// Published blocks, a count.
    pub blocks: u64,
    /// Times the system refused a file, a count.
    pub grow_failures: u64,
    /// By tenant, in order of their ids.
    pub tenants: Vec<TenantUsage>,
}

pub(super) fn usage(shared: &Shared, now: Instant) -> ArenaUsage {
    let unit = UNIT_BYTES as u64;
    let mut state = shared.state.lock();
    state.roll_window(now);
    let mut out = ArenaUsage {
        capacity_bytes: shared.config.capacity_bytes,
        file_bytes: state.file_bytes,
        building_bytes: state.file_bytes,
        metadata_bytes: state.metadata_bytes,
        used_bytes: state.used_bytes,
        payload_bytes: state.payload_bytes,
        reserved_bytes: state.in_flight.iter().sum(),
        free_bytes: state.free_bytes(&shared.config),
        pinned_slots: shared.gauge.slots.load(Ordering::Relaxed),
        pinned_bytes: shared.gauge.bytes.load(Ordering::Relaxed),
        quarantined_bytes: state.quarantined_bytes,
        grow_failures: state.grow_failures,
        ..ArenaUsage::default()
    };
    let pressed = state.pressed.is_some_and(|window| window + 1 >= state.window);
    for file in state.all_files() {
        out.files += 1;
        out.building_bytes -= file.bytes();
        let smallest = file.tenant.and_then(|t| state.domains.get(&t)?.classes.keys().next().copied());
        for hole in file.hole_units() {
            let bytes = u64::from(hole) * unit;
            out.hole_bytes += bytes;
            if smallest.is_some_and(|units| super::file::slots_that_fit(hole, units) == 0) {
                out.stranded.holes += bytes;
            }
        }
    }
    for (tenant, domain) in &state.domains {
        out.blocks += domain.blocks;
        let file_bytes = domain.files.iter().filter_map(|i| state.file(*i)).map(|f| f.bytes()).sum();
        out.tenants.push(TenantUsage {
            tenant: *tenant,
            files: domain.files.len() as u64,
            file_bytes,
            used_bytes: domain.used_bytes,
            blocks: domain.blocks,
        });
        for (units, class) in &domain.classes {
            let slot_bytes = u64::from(*units) * unit;
            out.free_slot_bytes += class.free * slot_bytes;
            if pressed {
                out.stranded.idle += class.idle() * slot_bytes;
            }
        }
    }
    out.stranded.rounding = out.used_bytes - out.payload_bytes;
    out.tenants.sort_unstable_by_key(|t| t.tenant);
    out
}
