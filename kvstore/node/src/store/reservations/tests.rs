//! Writers of one block, while its reservation expires, is abandoned, and its instance ends: [`Reservations`] as it is,
//! under a lock, in threads and interleavings of `shuttle`. The slots are modelled: they say when they are freed.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvkeep_core::ids::{Digest, GroupId, Handle, Key, NamespaceId, Revision, ShardId};
use kvkeep_core::{ChunkSums, Fidelity, Version};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::sync::{Arc, Mutex};
use shuttle::{Config, Runner, thread};

use super::*;

const ITERATIONS: usize = 4000;
const SEED: u64 = 0x4b56_4b65_6570;
const LEN: u32 = 100;
const ONE: InstanceId = InstanceId([1; 16]);
const TENANT: TenantId = TenantId(1);
const ENDS: Instant = Instant(10);

/// What is true of the memory of one block's slots.
#[derive(Default)]
struct Memory {
    slots: AtomicUsize,
    /// Somebody writes the block.
    written: AtomicBool,
}

struct Slot {
    memory: Arc<Memory>,
    written: bool,
}

impl Slot {
    fn new(memory: &Arc<Memory>) -> Self {
        memory.slots.fetch_add(1, Ordering::SeqCst);
        Self { memory: Arc::clone(memory), written: false }
    }

    /// Takes its time.
    fn write(&mut self) {
        self.written = true;
        assert!(!self.memory.written.swap(true, Ordering::SeqCst), "two writers of one block");
        thread::yield_now();
        self.memory.written.store(false, Ordering::SeqCst);
        self.written = false;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(!self.written, "a slot is freed under its writer");
            self.memory.slots.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// What is wrong with the node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The end of a reservation forgets it, whoever has its bytes.
    EndsUnderWriter,
    /// A writer whose call is over keeps the bytes to itself.
    KeepsBytes,
}

/// How a reservation ends that is not committed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Expiry,
    Instance,
    Abandoned,
}

struct Node {
    reservations: Mutex<Reservations<Slot>>,
    memory: Arc<Memory>,
    fault: Fault,
}

fn block() -> BlockId {
    BlockId { digest: Digest::from_slice(&[7; 16]).unwrap(), group: GroupId(0), shard: ShardId(0) }
}

impl Node {
    fn new(fault: Fault) -> Arc<Self> {
        let reservations = Mutex::new(Reservations::new(u64::from(LEN)));
        Arc::new(Self { reservations, memory: Arc::default(), fault })
    }

    /// Reserves the block, and tells whether it is this caller's to write.
    fn reserve(&self, id: u64) -> Option<ReservationId> {
        let meta = BlockMeta {
            id: block(),
            tenant: TENANT,
            handle: Handle { namespace: NamespaceId(1), revision: Revision(1) },
            key: Key::new(b"k").unwrap(),
            version: Version(1),
            class: Class::Cache,
            keeper: kvkeep_core::words::Keeper::Caller,
            fidelity: Fidelity::Exact,
            position: 0,
            parent: None,
            len: LEN,
            sums: ChunkSums::default(),
        };
        let reservation = Reservation {
            instance: ONE,
            meta,
            class: Class::Cache,
            keep: false,
            ttl: None,
            priority: None,
            parent_key: None,
            token_ids: std::sync::Arc::from([]),
            slot: Some(Slot::new(&self.memory)),
            written: 0,
            sums: RunningSums::default(),
        };
        let id = ReservationId(id);
        self.reservations.lock().unwrap().add(id, reservation, ENDS).then_some(id)
    }

    /// One Write call.
    fn write(&self, id: ReservationId) {
        let taken = self.reservations.lock().unwrap().take(id, TENANT);
        let Ok(mut reservation) = taken else { return };
        reservation.slot.as_mut().unwrap().write();
        reservation.written = LEN;
        if self.fault != Fault::KeepsBytes {
            self.reservations.lock().unwrap().give_back(id, reservation);
        }
    }

    /// Whether it published the slot; that is then the directory's, and freed here.
    fn commit(&self, id: ReservationId) -> bool {
        let taken = self.reservations.lock().unwrap().take(id, TENANT);
        let Ok(mut reservation) = taken else { return false };
        if reservation.written != LEN {
            self.reservations.lock().unwrap().give_back(id, reservation);
            return false;
        }
        let mut published = reservation.slot.take().unwrap();
        // Nobody else may write it now: a published slot is read.
        published.write();
        self.reservations.lock().unwrap().finish(id);
        true
    }

    fn end(&self, id: ReservationId, how: End) {
        let mut reservations = self.reservations.lock().unwrap();
        if self.fault == Fault::EndsUnderWriter {
            return reservations.finish(id);
        }
        match how {
            End::Expiry => _ = reservations.expire(ENDS),
            End::Instance => _ = reservations.end_instance(ONE),
            End::Abandoned => _ = reservations.abandon(id, TENANT),
        }
    }
}

/// Two calls write and commit one reservation, it ends in one of the ways there are, and another caller wants the block.
fn scenario(fault: Fault, how: End) {
    let node = Node::new(fault);
    let id = node.reserve(1).expect("nobody else is there");
    let spawn = |f: fn(&Node, ReservationId, End)| {
        let node = Arc::clone(&node);
        thread::spawn(move || f(&node, id, how))
    };
    let threads = [
        spawn(|node, id, _| {
            node.write(id);
            node.commit(id);
        }),
        spawn(|node, id, _| {
            node.write(id);
        }),
        spawn(|node, id, how| node.end(id, how)),
    ];
    // Reserved again as soon as the bound and the block let it: nobody writes the block any more then.
    if let Some(again) = node.reserve(2) {
        node.write(again);
        // The other ways may have ended this one, too.
        assert!(node.commit(again) || how != End::Abandoned, "a reservation that nobody ended is gone");
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let mut reservations = node.reservations.lock().unwrap();
    reservations.expire(ENDS);
    let left = (reservations.count(), reservations.bytes(), reservations.in_progress(&block()).is_some());
    assert_eq!(left, (0, 0, false), "a reservation has leaked");
    assert_eq!(node.memory.slots.load(Ordering::SeqCst), 0, "a slot has leaked");
}

fn explore(scenario: fn()) {
    // A failure prints its schedule, which `shuttle::replay(scenario, ..)` runs again.
    Runner::new(RandomScheduler::new_from_seed(SEED, ITERATIONS / 2), Config::default()).run(scenario);
    Runner::new(PctScheduler::new_from_seed(SEED, 3, ITERATIONS / 2), Config::default()).run(scenario);
}

fn catches(because: &str, scenario: fn()) {
    let panic = catch_unwind(AssertUnwindSafe(|| explore(scenario))).expect_err("a broken variant was not caught");
    let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    assert!(said.is_some_and(|said| said.contains(because)), "caught for another reason: {said:?}");
}

#[test]
fn a_reservation_that_ends_under_its_writer_frees_its_slot_once_and_behind_it() {
    explore(|| scenario(Fault::None, End::Expiry));
    explore(|| scenario(Fault::None, End::Instance));
    explore(|| scenario(Fault::None, End::Abandoned));
}

#[test]
fn broken_reservations_are_caught() {
    catches("two writers of one block", || scenario(Fault::EndsUnderWriter, End::Expiry));
    catches("has leaked", || scenario(Fault::KeepsBytes, End::Expiry));
}
