//! Slots that clients read in place: evicted and used again while leases expire, are released, and instances end.
//!
//! Real: [`Holds`], the entry of a slot and the reader's look at it. Modelled as the arena has them: a slot is free
//! again when the last hold on it is dropped, and whoever is handed it fills it at once; a lease is there or is not,
//! under one lock.

use std::sync::Arc as Known;

use kvkeep_core::holds::{Hold, Holds, Process};
use kvkeep_core::slot_entry::is_still;
use kvkeep_core::{InstanceId, LeaseId};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::sync::{Arc, Mutex, Weak};
use shuttle::thread;

use crate::explore::{catches, random};
use crate::slot_entry::Slot;

const ITERATIONS: usize = 4000;
const ONE: InstanceId = InstanceId([1; 16]);
const LEASE: LeaseId = LeaseId(1);
const BYTES_MAX: u64 = 100;

/// The slot and who has it.
struct Arena {
    slot: Slot,
    state: Mutex<Allocator>,
}

struct Allocator {
    free: bool,
    /// The table's own hold on what is published.
    published: Option<Arc<Loan>>,
    generation: u64,
}

/// A use of the slot, which ends with the last hold on it.
struct Loan {
    arena: Weak<Arena>,
    generation: u64,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(arena) = self.arena.upgrade() {
            arena.state.lock().unwrap().free = true;
        }
    }
}

struct Pin(Arc<Loan>);

impl Hold for Pin {
    type Slot = u64;
    fn slot(&self) -> u64 {
        self.0.generation
    }
    fn bytes(&self) -> u64 {
        1
    }
}

impl Arena {
    fn new() -> Arc<Self> {
        let state = Allocator { free: true, published: None, generation: 0 };
        Arc::new(Self { slot: Slot::new(), state: Mutex::new(state) })
    }

    /// Stores a block, where the slot is free. Whether it was.
    fn put(self: &Arc<Self>) -> bool {
        let generation = {
            let mut state = self.state.lock().unwrap();
            if !std::mem::take(&mut state.free) {
                return false;
            }
            state.generation += 1;
            state.generation
        };
        let loan = Arc::new(Loan { arena: Arc::downgrade(self), generation });
        self.slot.fill(generation);
        let mut state = self.state.lock().unwrap();
        self.slot.publish(generation);
        state.published = Some(loan);
        true
    }

    fn pin(&self) -> Option<Pin> {
        self.state.lock().unwrap().published.clone().map(Pin)
    }

    fn evict(&self) {
        let table = {
            let mut state = self.state.lock().unwrap();
            let table = state.published.take();
            if table.is_some() {
                self.slot.clear();
            }
            table
        };
        drop(table);
    }
}

/// A process that has mapped the file, until it ends.
struct Mapper(AtomicBool);

impl Process for Mapper {
    fn has_ended(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// What is wrong with the server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// An expired lease takes its holds along.
    LetsGoAtExpiry,
    /// The lease is looked at, and then the slot is held.
    LooksThenHolds,
    /// The end of an instance lets go, whoever still reads.
    LetsGoWithInstance,
    /// An instance that comes back has no processes.
    ForgetsProcesses,
}

struct Server {
    arena: Arc<Arena>,
    /// Leases that are there. Taken before `holds`.
    leases: Mutex<Vec<LeaseId>>,
    holds: Mutex<Holds<Pin, Mapper>>,
    fault: Fault,
}

impl Server {
    /// With one block, and one lease on it.
    fn new(fault: Fault) -> Arc<Self> {
        let arena = Arena::new();
        assert!(arena.put());
        Arc::new(Self { arena, leases: Mutex::new(vec![LEASE]), holds: Mutex::new(Holds::default()), fault })
    }

    /// A file for a process of the instance, which is watched from then on.
    fn open_file(&self, process: &Known<Mapper>) {
        self.holds.lock().unwrap().processes(ONE).push(Known::clone(process));
    }

    /// Tells a client where the block lies, held for it: by its generation.
    fn map(&self, lease: LeaseId) -> Option<u64> {
        let pin = self.arena.pin()?;
        let generation = pin.slot();
        let held = {
            let leases = self.leases.lock().unwrap();
            if !leases.contains(&lease) {
                return None;
            }
            if self.fault == Fault::LooksThenHolds {
                drop(leases);
            }
            self.holds.lock().unwrap().hold(ONE, lease, vec![pin], BYTES_MAX)
        };
        assert!(!held.too_much);
        drop(held);
        Some(generation)
    }

    fn end_lease(&self, lease: LeaseId) {
        self.leases.lock().unwrap().retain(|l| *l != lease);
    }

    fn release(&self, lease: LeaseId) {
        self.end_lease(lease);
        let released = self.holds.lock().unwrap().release(ONE, lease);
        drop(released);
    }

    fn expire(&self, lease: LeaseId) {
        if self.fault == Fault::LetsGoAtExpiry {
            self.release(lease);
        }
        self.end_lease(lease);
    }

    fn end_instance(&self) {
        self.leases.lock().unwrap().clear();
        self.holds.lock().unwrap().end_instance(ONE);
        if self.fault == Fault::LetsGoWithInstance {
            let all = std::mem::take(&mut *self.holds.lock().unwrap());
            drop(all);
        }
        self.bury();
    }

    fn bury(&self) {
        let gone = self.holds.lock().unwrap().bury();
        drop(gone);
    }

    /// The lease ends, and the slot goes to another block as soon as it can.
    fn press(self: &Arc<Self>) -> thread::JoinHandle<()> {
        let server = Arc::clone(self);
        thread::spawn(move || {
            server.expire(LEASE);
            server.arena.evict();
            for _ in 0..3 {
                if server.arena.put() {
                    return;
                }
                thread::yield_now();
            }
        })
    }

    /// Nobody is there any more: nothing is held, and the slot can be used again.
    fn is_clean(&self) {
        assert!(self.holds.lock().unwrap().is_empty(), "something is held for nobody");
        self.arena.evict();
        assert!(self.arena.state.lock().unwrap().free, "a slot has leaked");
    }
}

/// A client reads what it was told of, twice. Its memory does not change under it, whatever the entry says by then.
fn read(server: &Server, generation: u64) {
    for _ in 0..2 {
        let copied = server.arena.slot.copy();
        let there = is_still(&server.arena.slot, generation);
        assert_eq!(
            copied,
            Slot::bytes_of(generation),
            "memory that is held for a reader was used again (told: {there})"
        );
    }
}

fn process() -> Known<Mapper> {
    Known::new(Mapper(AtomicBool::new(false)))
}

/// A client maps, reads and releases, while its lease expires and the server wants the slot for another block.
fn expiry(fault: Fault) {
    let server = Server::new(fault);
    let pressing = server.press();
    if let Some(generation) = server.map(LEASE) {
        read(&server, generation);
    }
    server.release(LEASE);
    pressing.join().unwrap();
    server.is_clean();
}

/// Two connections of one instance, which does not end: one maps, one releases.
fn release(fault: Fault) {
    let server = Server::new(fault);
    let mapping = {
        let server = Arc::clone(&server);
        thread::spawn(move || {
            let _ = server.map(LEASE);
        })
    };
    server.release(LEASE);
    mapping.join().unwrap();
    server.is_clean();
}

/// The connections of a client are closed while it reads, and its instance ends. Its process reads on, and then ends.
fn end_of_instance(fault: Fault) {
    let server = Server::new(fault);
    let mapper = process();
    server.open_file(&mapper);
    let told = server.map(LEASE).expect("nothing has happened yet");
    let pressing = server.press();
    let ending = {
        let server = Arc::clone(&server);
        thread::spawn(move || {
            server.end_instance();
            server.bury();
        })
    };
    read(&server, told);
    mapper.0.store(true, Ordering::SeqCst);
    ending.join().unwrap();
    server.bury();
    pressing.join().unwrap();
    server.is_clean();
}

/// The same, and the instance comes back in between, with the files that its process has mapped already.
fn come_back(fault: Fault) {
    let server = Server::new(fault);
    let mapper = process();
    server.open_file(&mapper);
    let ending = {
        let server = Arc::clone(&server);
        thread::spawn(move || server.end_instance())
    };
    let again = LeaseId(2);
    server.leases.lock().unwrap().push(again);
    // The end of before may still be under way: it may end this lease as well.
    let told = server.map(again);
    if server.fault == Fault::ForgetsProcesses {
        server.holds.lock().unwrap().processes(ONE).clear();
    }
    ending.join().unwrap();
    let pressing = server.press();
    let ending = {
        let server = Arc::clone(&server);
        thread::spawn(move || server.end_instance())
    };
    if let Some(generation) = told {
        read(&server, generation);
    }
    mapper.0.store(true, Ordering::SeqCst);
    ending.join().unwrap();
    pressing.join().unwrap();
    server.bury();
    server.is_clean();
}

#[test]
fn a_slot_is_kept_for_its_reader_past_the_end_of_its_lease() {
    random(ITERATIONS, || expiry(Fault::None));
}

#[test]
fn a_slot_held_as_its_lease_is_released_is_not_held_for_ever() {
    random(ITERATIONS, || release(Fault::None));
}

#[test]
fn a_slot_is_kept_for_its_reader_past_the_end_of_its_instance() {
    random(ITERATIONS, || end_of_instance(Fault::None));
}

#[test]
fn a_slot_is_kept_for_the_reader_of_an_instance_that_came_back() {
    random(ITERATIONS, || come_back(Fault::None));
}

#[test]
fn broken_holds_are_caught() {
    let used = "was used again";
    catches(used, || random(ITERATIONS, || expiry(Fault::LetsGoAtExpiry)));
    catches("held for nobody", || random(ITERATIONS, || release(Fault::LooksThenHolds)));
    catches(used, || random(ITERATIONS, || end_of_instance(Fault::LetsGoWithInstance)));
    catches(used, || random(ITERATIONS, || come_back(Fault::ForgetsProcesses)));
}
