//! A slot that is used for one block after another, and a reader that nobody protects: all it has is the entry.

use kvkeep_core::slot_entry::{
    EntryReader, EntryWriter, GENERATION_AT, STATE_AT, STATE_PUBLISHED, clear, is_still, publish, reused,
};
use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicU32, Ordering};
use shuttle::thread;

use crate::explore::{catches, every};

/// Words of a modelled entry: state, crc, generation (two).
const ENTRY_WORDS: usize = 4;
/// Words of payload: as many as can be seen half-written.
const PAYLOAD_WORDS: usize = 2;

/// A slot and its entry, in memory that two processes share. Plain memory writes are relaxed stores, one for each word:
/// another process may see any part of them.
pub struct Slot {
    entry: [AtomicU32; ENTRY_WORDS],
    payload: [AtomicU32; PAYLOAD_WORDS],
}

/// The server's end of an entry.
struct Writer<'a>(&'a Slot);

impl EntryWriter for Writer<'_> {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        for (n, word) in bytes.chunks(4).enumerate() {
            let word = u32::from_le_bytes(word.try_into().expect("whole words"));
            self.0.entry[at / 4 + n].store(word, Ordering::Relaxed);
        }
    }

    fn store_last(&mut self, at: usize, word: u32) {
        self.0.entry[at / 4].store(word, Ordering::Release);
    }
}

impl EntryReader for Slot {
    fn load_first(&self, at: usize) -> u32 {
        self.entry[at / 4].load(Ordering::Acquire)
    }
}

impl Slot {
    pub fn new() -> Self {
        Self { entry: Default::default(), payload: Default::default() }
    }

    /// The payload of a use: a word that no other use has, repeated.
    pub fn bytes_of(generation: u64) -> [u32; PAYLOAD_WORDS] {
        [(generation >> 32) as u32 + generation as u32; PAYLOAD_WORDS]
    }

    /// Whoever was handed the slot writes it.
    pub fn fill(&self, generation: u64) {
        reused();
        for (cell, word) in self.payload.iter().zip(Self::bytes_of(generation)) {
            cell.store(word, Ordering::Relaxed);
        }
    }

    pub fn publish(&self, generation: u64) {
        let mut entry = [0; ENTRY_WORDS * 4];
        entry[GENERATION_AT..GENERATION_AT + 8].copy_from_slice(&generation.to_le_bytes());
        publish(&mut Writer(self), &entry);
    }

    pub fn clear(&self) {
        clear(&mut Writer(self));
    }

    pub fn copy(&self) -> [u32; PAYLOAD_WORDS] {
        [0, 1].map(|n| self.payload[n].load(Ordering::Relaxed))
    }
}

/// What a reader comes away with: `None` where the block is gone.
type Read = fn(&Slot, u64) -> Option<[u32; PAYLOAD_WORDS]>;

fn real(slot: &Slot, generation: u64) -> Option<[u32; PAYLOAD_WORDS]> {
    let copied = slot.copy();
    is_still(slot, generation).then_some(copied)
}

fn checks_before(slot: &Slot, generation: u64) -> Option<[u32; PAYLOAD_WORDS]> {
    is_still(slot, generation).then(|| slot.copy())
}

/// The generation first: this is what the client did until this test was written.
fn state_last(slot: &Slot, generation: u64) -> Option<[u32; PAYLOAD_WORDS]> {
    let copied = slot.copy();
    let low = u64::from(slot.load_first(GENERATION_AT));
    let high = u64::from(slot.load_first(GENERATION_AT + 4));
    (slot.load_first(STATE_AT) == STATE_PUBLISHED && (high << 32 | low) == generation).then_some(copied)
}

fn no_generation(slot: &Slot, _: u64) -> Option<[u32; PAYLOAD_WORDS]> {
    let copied = slot.copy();
    (slot.load_first(STATE_AT) == STATE_PUBLISHED).then_some(copied)
}

/// A use, told to a reader, and then the next one. `clears`: the server clears the state first, as it does.
fn reuse(read: Read, clears: bool) {
    let slot = Arc::new(Slot::new());
    let (first, next) = (7, 1 << 32 | 7);
    slot.fill(first);
    slot.publish(first);
    let server = {
        let slot = Arc::clone(&slot);
        thread::spawn(move || {
            if clears {
                slot.clear();
            }
            slot.fill(next);
            slot.publish(next);
        })
    };
    if let Some(copied) = read(&slot, first) {
        assert_eq!(copied, Slot::bytes_of(first), "a reader believes what is another block's");
    }
    server.join().unwrap();
}

#[test]
fn a_reader_believes_only_what_was_its_blocks_all_the_while() {
    assert!(every(|| reuse(real, true)) > 200);
}

#[test]
fn a_reader_finds_a_block_that_nobody_takes_away() {
    every(|| {
        let slot = Slot::new();
        slot.fill(9);
        slot.publish(9);
        assert_eq!(real(&slot, 9), Some(Slot::bytes_of(9)));
        assert_eq!(real(&slot, 8), None);
        slot.clear();
        assert_eq!(real(&slot, 9), None);
    });
}

#[test]
fn broken_readers_and_writers_are_caught() {
    let because = "another block's";
    catches(because, || every(|| reuse(checks_before, true)));
    catches(because, || every(|| reuse(state_last, true)));
    catches(because, || every(|| reuse(no_generation, true)));
    catches(because, || every(|| reuse(real, false)));
}
