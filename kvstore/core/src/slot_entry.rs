//! The entry of a slot, in the few words that a reader in another process looks at: who may believe what it copied.
//!
//! A slot is used again and again; its entry says for what. Readers that mapped the file copy the payload first and
//! look at the entry behind it, as with a seqlock, only that a reader never tries twice: a block that is gone is a
//! miss.
//!
//! ```text
//! server   state = EMPTY | the slot goes to somebody else | payload | generation and the rest | state = PUBLISHED
//! reader                     payload | state is PUBLISHED? | generation is the one I was told?
//! ```
//! The reader looks at the state before the generation. The other way round it could see the old generation, then the
//! whole rest of the server's line, and then a state that says PUBLISHED again, of another block.
//!
//! **Why that is enough**, on any memory model, where a reader was told of generation `g`:
//! - It copied only bytes of `g`: then whatever it says is right.
//! - It copied one byte of a later use. Whoever wrote that byte got the slot's memory after the state was cleared
//!   (the clearing happens before: locks and the bitmap of units hand the slot on) and then went through [`reused`], a release
//!   fence before its first byte. The reader's acquire fence stands behind that byte. So the clearing happens before the reader's
//!   look at the state, which shows EMPTY (gone), or PUBLISHED of a later use, by a release store behind the generation of that
//!   use. The reader loads the state with acquire: the generation that it loads next is that one or one later still, never `g`.
//!
//! A generation is read in two halves. Halves of two later generations make up `g` only where 2^32 reservations lie
//! between them, all during three loads.
//!
//! Written over traits, so that a test can put its own scheduler under it (`tests/shuttle`). That scheduler explores
//! sequentially consistent interleavings only; that the fences are enough is the proof above.

use std::sync::atomic::{Ordering, fence};

/// Nothing in the slot, or nothing yet.
pub const STATE_EMPTY: u32 = 0;
/// `PUBL`: the slot is a block's.
pub const STATE_PUBLISHED: u32 = u32::from_le_bytes(*b"PUBL");
/// Where the state stands in an entry: `docs/formats.md`, arena file.
pub const STATE_AT: usize = 0;
/// Where the generation does, 8 bytes.
pub const GENERATION_AT: usize = 8;

/// An entry as its server writes it. One writer at a time.
pub trait EntryWriter {
    /// Plain writes, seen by others in any order.
    fn write(&mut self, at: usize, bytes: &[u8]);
    /// Stores one word, little-endian, after everything written before.
    fn store_last(&mut self, at: usize, word: u32);
}

/// An entry as somebody sees it who may be in another process.
pub trait EntryReader {
    /// Loads one word, little-endian, before everything that is loaded later.
    fn load_first(&self, at: usize) -> u32;
}

/// Writes an entry and makes it count. The slot's payload is complete. `entry` is all of it; its state is not looked at.
///
/// # Panics
/// If it has less than a state.
pub fn publish(to: &mut impl EntryWriter, entry: &[u8]) {
    let body = STATE_AT + 4;
    to.write(body, &entry[body..]);
    to.store_last(STATE_AT, STATE_PUBLISHED);
}

/// The slot is nobody's from now on. Before its memory is handed to anybody.
pub fn clear(to: &mut impl EntryWriter) {
    to.store_last(STATE_AT, STATE_EMPTY);
}

/// To be called by whoever was handed memory that readers of an earlier use may still look at, before its first byte is
/// written. On x86 this is no instruction: stores go out in order, and the locked instruction that handed the memory on
/// has sent out the streaming ones.
pub fn reused() {
    fence(Ordering::Release);
}

/// Whether the slot was of this generation all the while until now. `false`: what was read of it is worthless.
pub fn is_still(entry: &impl EntryReader, generation: u64) -> bool {
    // What was copied before was loaded before the words are.
    fence(Ordering::Acquire);
    // In this order, see above.
    entry.load_first(STATE_AT) == STATE_PUBLISHED
        && u64::from(entry.load_first(GENERATION_AT)) == generation & 0xffff_ffff
        && u64::from(entry.load_first(GENERATION_AT + 4)) == generation >> 32
}
