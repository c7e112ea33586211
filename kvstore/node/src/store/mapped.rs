//! Slots that clients read in place. A map holds each slot for as long as a client may look at it, past the end of its
//! lease and past the end of its instance: `kvkeep_core::holds` has the rules. A client that was stopped in the middle
//! of a read may therefore go on reading whenever it wakes up. What it costs is bounded by `limits.mapped_bytes_max`
//! per instance.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::holds::{Held, Hold, Holds, HoldsUsage, Process};
use kvkeep_core::{BlockId, Digest, Error, ErrorKind, InstanceId, LeaseId, MissReason, PartStatus, Result, SlotRef};
use kvkeep_proto::v1;
use kvkeep_tiers::dram::Pinned;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};

use super::get::PartRead;
use super::put::{Caller, NO_ROOM_RETRY};
use super::{SLICE_KEYS, Store};
use crate::failpoint;

/// Processes of one instance that may hold the arena's files.
const READERS_MAX: usize = 256;

/// All slots held for mapped reads. Its lock is taken inside of the directory's.
#[derive(Default)]
pub struct Mapped(Mutex<Holds<MappedSlot, Mapper>>);

/// A pinned slot.
struct MappedSlot(Pinned);

impl Hold for MappedSlot {
    type Slot = SlotRef;

    fn slot(&self) -> SlotRef {
        self.0.slot()
    }

    fn bytes(&self) -> u64 {
        self.0.padded_len() as u64
    }
}

/// A process that was given a file of the arena, and what says that it has ended.
struct Mapper {
    pid: u32,
    process: OwnedFd,
}

impl Process for Mapper {
    fn has_ended(&self) -> bool {
        let mut poll = [PollFd::new(&self.process, PollFlags::IN)];
        // A descriptor that cannot be polled is one that says nothing: the process counts as alive.
        rustix::event::poll(&mut poll, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
    }
}

impl Mapped {
    /// Gives back what a lease of this instance held. The lease has ended in the directory before.
    pub(super) fn release(&self, instance: InstanceId, lease: LeaseId) {
        let released = self.0.lock().release(instance, lease);
        // Outside of the lock: the last hold on a slot takes the arena's.
        drop(released);
    }

    /// A process of this instance is about to be given a file: it is watched from now on.
    ///
    /// # Errors
    /// `Throttled` where the instance has [`READERS_MAX`] processes, `Denied` where the process cannot be watched.
    pub fn admit(&self, instance: InstanceId, pid: u32) -> Result<()> {
        let mut holds = self.0.lock();
        let processes = holds.processes(instance);
        if processes.iter().any(|known| known.pid == pid) {
            return Ok(());
        }
        if processes.len() == READERS_MAX {
            return Err(Error::new(ErrorKind::Throttled, "too many processes of this instance map the arena")
                .with("processes_max", READERS_MAX)
                .retry_after(NO_ROOM_RETRY));
        }
        let process = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok())
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Denied,
                    "the end of this process cannot be watched (another pid namespace?): it gets regions, not mappings",
                )
                .with("pid", pid)
            })?;
        processes.push(Arc::new(Mapper { pid, process }));
        Ok(())
    }

    /// The instance has ended, its leases in the directory before it; its slots go once each of its processes has.
    pub(super) fn end_instance(&self, instance: InstanceId) {
        self.0.lock().end_instance(instance);
        self.bury();
    }

    /// Lets go of what nobody can read any more.
    pub(super) fn bury(&self) {
        let gone = self.0.lock().bury();
        // As in `release`.
        drop(gone);
    }

    /// Numbers of this moment.
    pub fn usage(&self) -> HoldsUsage {
        self.0.lock().usage()
    }
}

impl Store {
    /// Where the parts of leased positions lie in DRAM, held for the caller until it releases the lease. `keys`: of the
    /// digests, in the same order.
    pub fn map_positions(
        &self,
        caller: Caller,
        lease: LeaseId,
        digests: &[Digest],
        keys: &[Bytes],
    ) -> Result<Vec<v1::MappedPart>> {
        let mut parts = Vec::with_capacity(digests.len());
        for (i, (digests, keys)) in digests.chunks(SLICE_KEYS).zip(keys.chunks(SLICE_KEYS)).enumerate() {
            let mut found = Vec::with_capacity(digests.len());
            {
                let directory = self.directory.lock();
                for (n, digest) in digests.iter().enumerate() {
                    for (group, shard, located) in directory.leased_parts(lease, digest) {
                        found.push((n, BlockId { digest: *digest, group, shard }, located));
                    }
                }
            }
            for (n, id, located) in found {
                let part = self.map_part(caller, lease, &id, &keys[n], located.slot, located.version.0, false)?;
                parts.push(v1::MappedPart { item: (i * SLICE_KEYS + n) as u32, ..part });
            }
        }
        Ok(parts)
    }

    /// The same for single parts. Each must be under the lease.
    pub fn map_items(
        &self,
        caller: Caller,
        lease: LeaseId,
        reads: &[PartRead],
        sums: bool,
    ) -> Result<Vec<v1::MappedPart>> {
        let mut parts = Vec::with_capacity(reads.len());
        for (item, read) in reads.iter().enumerate() {
            let found = {
                let directory = self.directory.lock();
                let held = directory.lease_holds(lease, &read.id.digest);
                directory.locate(&read.id.digest, read.id.group, read.id.shard).filter(|_| held)
            };
            let part = match found {
                Some(found) if read.version.is_none_or(|v| v == found.version) && found.fidelity <= read.fidelity => {
                    self.map_part(caller, lease, &read.id, read.key.as_bytes(), found.slot, found.version.0, sums)?
                }
                _ => missing(&read.id, MissReason::Removed),
            };
            parts.push(v1::MappedPart { item: item as u32, ..part });
        }
        Ok(parts)
    }

    #[expect(clippy::too_many_arguments, reason = "one part of two loops, each of which has them apart")]
    fn map_part(
        &self,
        caller: Caller,
        lease: LeaseId,
        id: &BlockId,
        key: &[u8],
        slot: Option<SlotRef>,
        version: u64,
        sums: bool,
    ) -> Result<v1::MappedPart> {
        let Some(slot) = slot else {
            return Ok(v1::MappedPart {
                status: convert::status_to_proto(PartStatus::Loading),
                ..missing(id, MissReason::Pending)
            });
        };
        let Some((pin, site)) = self.arena.pin(slot).and_then(|p| p.site().map(|site| (p, site))) else {
            return Ok(missing(id, MissReason::Evicted));
        };
        // The full key is compared before anything is told, as with every other way out.
        if !pin.holds(id, key) {
            return Ok(missing(id, MissReason::Quarantined));
        }
        let crc32 = if sums { pin.sums().map(|s| s.as_slice().to_vec()).unwrap_or_default() } else { Vec::new() };
        let length = pin.len() as u64;
        let bytes_max = self.config.limits.mapped_bytes_max.0;
        let held = {
            // Held while the lease is certain to be there: a hold that came behind its release, or behind the end of its
            // instance, would be nobody's to give back.
            let directory = self.directory.lock();
            if !directory.lease_holds(lease, &id.digest) {
                drop(directory);
                return Ok(missing(id, MissReason::Removed));
            }
            self.mapped.0.lock().hold(caller.instance, lease, MappedSlot(pin), bytes_max)
        };
        if let Held::TooMuch(_) = held {
            return Err(Error::new(
                ErrorKind::Throttled,
                "this instance holds too much for mapped reads: release leases",
            )
            .with("limits.mapped_bytes_max", self.config.limits.mapped_bytes_max)
            .retry_after(NO_ROOM_RETRY));
        }
        failpoint::at("map.told");
        self.counters.mapped_parts.one();
        self.first_hit();
        Ok(v1::MappedPart {
            item: 0,
            group: u32::from(id.group.0),
            shard: u32::from(id.shard.0),
            status: convert::status_to_proto(PartStatus::Hit),
            reason: 0,
            file: site.file,
            offset: site.offset,
            entry: site.entry,
            length,
            version,
            generation: site.generation,
            crc32,
        })
    }

    /// A file of the arena for a process of this instance, whose end is watched from then on.
    pub fn open_arena_file(&self, caller: Caller, pid: u32, nonce: u64) -> Result<(std::fs::File, u64)> {
        self.mapped.admit(caller.instance, pid)?;
        self.arena.open_file(caller.tenant, nonce)
    }

    /// Numbers of the mapped reads.
    pub fn mapped_usage(&self) -> HoldsUsage {
        self.mapped.usage()
    }
}

fn missing(id: &BlockId, reason: MissReason) -> v1::MappedPart {
    v1::MappedPart {
        group: u32::from(id.group.0),
        shard: u32::from(id.shard.0),
        status: convert::status_to_proto(PartStatus::Miss),
        reason: convert::reason_to_proto(reason),
        ..Default::default()
    }
}
