//! Slots that clients read in place. A map holds each slot for as long as a client may look at it, past the end of its
//! lease and past the end of its instance: `kvkeep_core::holds` has the rules. A client that was stopped in the middle
//! of a read may therefore go on reading whenever it wakes up. What it costs is bounded by `limits.mapped_bytes_max`
//! per instance.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use kvkeep_client::block::table::{self, Record, RecordPlace};
use kvkeep_core::directory::Located;
use kvkeep_core::holds::{Hold, Holds, HoldsUsage, Process};
use kvkeep_core::{BlockId, Digest, Error, ErrorKind, InstanceId, LeaseId, MissReason, PartStatus, Result, SlotRef};
use kvkeep_proto::v1;
use kvkeep_tiers::dram::{Pinned, Site};
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
    ///
    /// # Errors
    /// `Throttled` where the instance would hold more than `limits.mapped_bytes_max`.
    pub fn map_positions(
        &self,
        caller: Caller,
        lease: LeaseId,
        digests: &[Digest],
        keys: &[Bytes],
    ) -> Result<v1::MappedParts> {
        let mut told = Told::of(digests.len());
        for (slice, digests) in digests.chunks(SLICE_KEYS).enumerate() {
            let first = slice * SLICE_KEYS;
            let mut wanted = Vec::with_capacity(digests.len());
            {
                let directory = self.directory.lock();
                for (n, digest) in (first..).zip(digests) {
                    let parts = directory.leased_parts(lease, digest);
                    wanted.extend(parts.map(|(group, shard, found)| Wanted {
                        item: n as u32,
                        id: BlockId { digest: *digest, group, shard },
                        key: &keys[n],
                        found: Some(found),
                    }));
                }
            }
            self.map(caller, lease, wanted, false, &mut told)?;
        }
        Ok(told.into_proto())
    }

    /// The same for single parts. Each must be under the lease.
    ///
    /// # Errors
    /// As [`Self::map_positions`].
    pub fn map_items(&self, caller: Caller, lease: LeaseId, reads: &[PartRead], sums: bool) -> Result<v1::MappedParts> {
        let mut told = Told::of(reads.len());
        for (slice, reads) in reads.chunks(SLICE_KEYS).enumerate() {
            let first = (slice * SLICE_KEYS) as u32;
            let directory = self.directory.lock();
            let find = |(item, read): (u32, &'_ PartRead)| {
                let held = directory.lease_holds(lease, &read.id.digest);
                let found = directory.locate(&read.id.digest, read.id.group, read.id.shard);
                let right =
                    |f: &Located| held && read.version.is_none_or(|v| v == f.version) && f.fidelity <= read.fidelity;
                (item, found.filter(right))
            };
            let found: Vec<_> = (first..).zip(reads).map(find).collect();
            drop(directory);
            let wanted = found.into_iter().zip(reads).map(|((item, found), read)| Wanted {
                item,
                id: read.id,
                key: read.key.as_bytes(),
                found,
            });
            self.map(caller, lease, wanted.collect(), sums, &mut told)?;
        }
        Ok(told.into_proto())
    }

    /// Floor of a slice: one hold of the arena's lock and one of the directory's, whatever its length.
    fn map(&self, caller: Caller, lease: LeaseId, wanted: Vec<Wanted<'_>>, sums: bool, told: &mut Told) -> Result<()> {
        let in_dram = wanted.iter().filter_map(|w| Some((w.found?.slot?, &w.id, w.key)));
        let mut pinned = self.arena.pin_mapped(in_dram).into_iter();
        let mut slots = Vec::with_capacity(wanted.len());
        let (first, first_sum) = (told.records.len(), told.crc32.len());
        for w in &wanted {
            let record = match w.found {
                None => w.missing(PartStatus::Miss, MissReason::Removed),
                Some(Located { slot: None, .. }) => w.missing(PartStatus::Loading, MissReason::Pending),
                Some(found) => match pinned.next().flatten() {
                    // Evicted a moment ago, or not what it was taken for.
                    None => w.missing(PartStatus::Miss, MissReason::Evicted),
                    Some((pin, site)) => match sums.then(|| pin.sums()).transpose() {
                        Err(_) => w.missing(PartStatus::Miss, MissReason::Quarantined),
                        Ok(sums) => {
                            told.crc32.extend(sums.iter().flat_map(|sums| sums.as_slice()));
                            let record = w.hit(&pin, site, found.version.0);
                            slots.push(MappedSlot(pin));
                            record
                        }
                    },
                },
            };
            told.records.push(record);
        }
        let (count, bytes_max) = (slots.len() as u64, self.config.limits.mapped_bytes_max.0);
        let held = {
            // Held while the lease is certain to be there: a hold that came behind its release, or behind the end of its
            // instance, would be nobody's to give back.
            let directory = self.directory.lock();
            if directory.lease_info(lease).is_none_or(|l| l.instance != caller.instance) {
                drop(directory);
                let gone = wanted.iter().map(|w| w.missing(PartStatus::Miss, MissReason::Removed));
                told.records[first..].iter_mut().zip(gone).for_each(|(told, gone)| *told = gone);
                told.crc32.truncate(first_sum);
                return Ok(());
            }
            self.mapped.0.lock().hold(caller.instance, lease, slots, bytes_max)
        };
        // Outside of the locks, as in `Mapped::release`.
        drop(held.not_needed);
        if held.too_much {
            return Err(Error::new(
                ErrorKind::Throttled,
                "this instance holds too much for mapped reads: release leases",
            )
            .with("limits.mapped_bytes_max", self.config.limits.mapped_bytes_max)
            .retry_after(NO_ROOM_RETRY));
        }
        failpoint::at("map.told");
        self.counters.mapped_parts.add(count);
        if count > 0 {
            self.first_hit();
        }
        Ok(())
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

/// A part that a client wants to read in place.
struct Wanted<'a> {
    item: u32,
    id: BlockId,
    /// The full key: compared before anything is told, as with every other way out.
    key: &'a [u8],
    found: Option<Located>,
}

impl Wanted<'_> {
    fn hit(&self, pin: &Pinned, site: Site, version: u64) -> Record {
        let Site { file, offset, entry, generation } = site;
        let length = pin.len() as u32; // at most `limits.part_bytes_max`, far below 4 GiB
        let place = RecordPlace { length, file, offset, entry, version, generation };
        Record { place, reason: None, ..self.missing(PartStatus::Hit, MissReason::Removed) }
    }

    fn missing(&self, status: PartStatus, reason: MissReason) -> Record {
        let BlockId { group, shard, .. } = self.id;
        Record { item: self.item, group, shard, status, reason: Some(reason), place: RecordPlace::default() }
    }
}

/// The answer to a map as it grows.
struct Told {
    records: Vec<Record>,
    crc32: Vec<u32>,
}

impl Told {
    fn of(parts: usize) -> Self {
        Self { records: Vec::with_capacity(parts), crc32: Vec::new() }
    }

    fn into_proto(self) -> v1::MappedParts {
        table::to_proto(&self.records, self.crc32)
    }
}
