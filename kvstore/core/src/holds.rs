//! Which slots are held for clients that read them in place, and until when.
//!
//! ```text
//! hold, while the lease is there ──> held for (instance, lease), charged to the instance
//!     release of the lease ───────────────────────────────────────────────────> let go
//!     the lease ends by itself: nothing changes. Its slots leave the directory like any other, and their memory stays as it
//!         is (quarantined) ── release, or ↓
//!     end of the instance ──> orphaned ── release by an instance that came back, or ↓
//!                                └── every process that could read them has ended ──> let go
//! ```
//! Two rules of whoever calls:
//! - [`Holds::hold`] runs while it is certain that the lease is there, and a release ends the lease first: so no hold comes
//!   behind the release that would have ended it. The end of an instance ends its leases first, too.
//! - What a call hands back is dropped outside of the lock: the last hold on a slot takes other locks.
//!
//! An instance may end while its process lives (its connections were closed for a while), and come back under the same
//! name with files that it mapped before. So the processes of an instance are known for as long as they live, whatever
//! ended meanwhile: each is in a reader, or in an orphan from which the next reader of that name learns of it.
//!
//! `tests/shuttle` drives this against slots that are reused.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use crate::ids::{InstanceId, LeaseId};

/// A hold on one slot: its memory stays as it is for as long as this lives.
pub trait Hold {
    /// Names the slot's use: two holds of one name are of the same bytes.
    type Slot: Copy + Eq + Hash + Debug;
    /// Which.
    fn slot(&self) -> Self::Slot;
    /// Bytes to be charged.
    fn bytes(&self) -> u64;
}

/// A process that was given files with slots in them.
pub trait Process {
    /// Whether it can read nothing any more. Once true it stays true.
    fn has_ended(&self) -> bool;
}

/// What became of a wish to hold: what is not here is held.
#[derive(Debug)]
#[must_use = "dropped outside of the lock"]
pub struct Held<H> {
    /// Further holds on slots that their lease holds already, and everything from the first that is over the bound.
    pub not_needed: Vec<H>,
    /// The bound was met.
    pub too_much: bool,
}

/// What one instance holds. Dropping it lets go.
#[derive(Debug)]
pub struct Reader<H: Hold, P> {
    leases: HashMap<LeaseId, Vec<H>>,
    bytes: u64,
    processes: Vec<Arc<P>>,
}

impl<H: Hold, P> Default for Reader<H, P> {
    fn default() -> Self {
        Self { leases: HashMap::new(), bytes: 0, processes: Vec::new() }
    }
}

impl<H: Hold, P: Process> Reader<H, P> {
    fn release(&mut self, lease: LeaseId) -> Vec<H> {
        let released = self.leases.remove(&lease).unwrap_or_default();
        self.bytes -= released.iter().map(Hold::bytes).sum::<u64>();
        released
    }

    fn nobody_reads(&self) -> bool {
        self.processes.iter().all(|p| p.has_ended())
    }
}

/// Everything held for mapped reads.
#[derive(Debug)]
pub struct Holds<H: Hold, P> {
    readers: HashMap<InstanceId, Reader<H, P>>,
    /// Of instances that have ended, while one of their processes lives.
    orphans: Vec<(InstanceId, Reader<H, P>)>,
}

/// Numbers for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldsUsage {
    /// Slots held for instances that live.
    pub slots: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes held for processes whose instance has ended.
    pub orphaned_bytes: u64,
}

impl<H: Hold, P> Default for Holds<H, P> {
    fn default() -> Self {
        Self { readers: HashMap::new(), orphans: Vec::new() }
    }
}

impl<H: Hold, P: Process> Holds<H, P> {
    /// The reader of an instance, which knows the living processes of earlier readers of that name.
    fn reader(&mut self, instance: InstanceId) -> &mut Reader<H, P> {
        let orphans = &self.orphans;
        self.readers.entry(instance).or_insert_with(|| {
            let before = orphans.iter().filter(|(of, _)| *of == instance).flat_map(|(_, reader)| &reader.processes);
            let mut processes: Vec<Arc<P>> = Vec::new();
            for process in before.filter(|p| !p.has_ended()) {
                if !processes.iter().any(|known| Arc::ptr_eq(known, process)) {
                    processes.push(Arc::clone(process));
                }
            }
            Reader { processes, ..Reader::default() }
        })
    }

    /// Holds slots under a lease, which is certain to be there meanwhile. Slots that it holds already are not charged twice,
    /// so that a match may be asked again; one that is named twice in one call is.
    pub fn hold(&mut self, instance: InstanceId, lease: LeaseId, wished: Vec<H>, bytes_max: u64) -> Held<H> {
        let mut held = Held { not_needed: Vec::new(), too_much: false };
        if wished.is_empty() {
            return held;
        }
        let Reader { leases, bytes, .. } = self.reader(instance);
        let holds = leases.entry(lease).or_default();
        // Empty in the usual case, a lease that was taken just now: then nothing is hashed per slot.
        let known: HashSet<H::Slot> = holds.iter().map(Hold::slot).collect();
        let mut wished = wished.into_iter();
        for hold in wished.by_ref() {
            if known.contains(&hold.slot()) {
                held.not_needed.push(hold);
            } else if bytes.saturating_add(hold.bytes()) > bytes_max {
                held.too_much = true;
                held.not_needed.push(hold);
                break;
            } else {
                *bytes += hold.bytes();
                holds.push(hold);
            }
        }
        held.not_needed.extend(wished);
        if holds.is_empty() {
            leases.remove(&lease);
        }
        held
    }

    /// What a lease of this instance held, to be dropped outside of the lock. The lease has ended before.
    #[must_use = "dropped outside of the lock"]
    pub fn release(&mut self, instance: InstanceId, lease: LeaseId) -> Vec<H> {
        let orphaned = self.orphans.iter_mut().filter(|(of, _)| *of == instance).map(|(_, reader)| reader);
        self.readers.get_mut(&instance).into_iter().chain(orphaned).flat_map(|reader| reader.release(lease)).collect()
    }

    /// The processes of an instance that live, to which one may be added: it is about to be given a file.
    pub fn processes(&mut self, instance: InstanceId) -> &mut Vec<Arc<P>> {
        let processes = &mut self.reader(instance).processes;
        processes.retain(|p| !p.has_ended());
        processes
    }

    /// The instance has ended, its leases before it; what it holds goes once each of its processes has.
    pub fn end_instance(&mut self, instance: InstanceId) {
        if let Some(reader) = self.readers.remove(&instance) {
            self.orphans.push((instance, reader));
        }
    }

    /// What nobody can read any more, to be dropped outside of the lock.
    #[must_use = "dropped outside of the lock"]
    pub fn bury(&mut self) -> Vec<Reader<H, P>> {
        self.orphans.extract_if(.., |(_, reader)| reader.nobody_reads()).map(|(_, reader)| reader).collect()
    }

    /// Whether nothing is held, for nobody.
    pub fn is_empty(&self) -> bool {
        self.readers.values().all(|r| r.leases.is_empty() && r.bytes == 0) && self.orphans.is_empty()
    }

    /// Numbers of this moment.
    pub fn usage(&self) -> HoldsUsage {
        HoldsUsage {
            slots: self.readers.values().flat_map(|r| r.leases.values()).map(|s| s.len() as u64).sum(),
            bytes: self.readers.values().map(|r| r.bytes).sum(),
            orphaned_bytes: self.orphans.iter().map(|(_, r)| r.bytes).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Slot number, and what dropping it lets go.
    #[derive(Debug)]
    struct Slot(u32, #[expect(dead_code, reason = "its count is looked at")] Arc<()>);

    impl Hold for Slot {
        type Slot = u32;
        fn slot(&self) -> u32 {
            self.0
        }
        fn bytes(&self) -> u64 {
            10
        }
    }

    impl Process for AtomicBool {
        fn has_ended(&self) -> bool {
            self.load(Ordering::Relaxed)
        }
    }

    const ONE: InstanceId = InstanceId([1; 16]);

    fn holds() -> (Holds<Slot, AtomicBool>, Arc<()>) {
        (Holds::default(), Arc::new(()))
    }

    #[test]
    fn what_an_instance_holds_is_bounded_and_let_go_by_its_release() {
        let (mut holds, held) = holds();
        let mut hold = |lease, slots: &[u32]| {
            let wished = slots.iter().map(|slot| Slot(*slot, Arc::clone(&held))).collect();
            let not = holds.hold(ONE, LeaseId(lease), wished, 25);
            (not.not_needed.iter().map(Hold::slot).collect::<Vec<_>>(), not.too_much)
        };
        assert_eq!(hold(1, &[1]), (vec![], false));
        assert_eq!(hold(1, &[1]), (vec![1], false), "held already");
        assert_eq!(hold(2, &[2, 3, 4]), (vec![3, 4], true), "the bound lies between 2 and 3");
        assert_eq!(hold(3, &[5]), (vec![5], true));
        assert_eq!(holds.usage(), HoldsUsage { slots: 2, bytes: 20, orphaned_bytes: 0 });
        assert_eq!(holds.release(InstanceId([2; 16]), LeaseId(1)).len(), 0, "another's");
        assert_eq!(holds.release(ONE, LeaseId(1)).len(), 1);
        assert_eq!(holds.release(ONE, LeaseId(2)).len(), 1);
        assert!(holds.is_empty());
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn an_instance_that_comes_back_has_the_processes_that_it_had() {
        let (mut holds, held) = holds();
        let process = Arc::new(AtomicBool::new(false));
        holds.processes(ONE).push(Arc::clone(&process));
        assert!(!holds.hold(ONE, LeaseId(1), vec![Slot(1, Arc::clone(&held))], 100).too_much);
        holds.end_instance(ONE);
        assert!(holds.bury().is_empty(), "its process reads on");
        // The process is here again, with the files that it mapped before: it asks for none.
        assert!(!holds.hold(ONE, LeaseId(2), vec![Slot(2, Arc::clone(&held))], 100).too_much);
        holds.end_instance(ONE);
        assert!(holds.bury().is_empty(), "and still reads on");
        assert_eq!(holds.usage().orphaned_bytes, 20);
        assert_eq!(holds.release(ONE, LeaseId(1)).len(), 1, "what it held before it can give back");
        process.store(true, Ordering::Relaxed);
        assert_eq!(holds.bury().len(), 2);
        assert!(holds.is_empty());
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
