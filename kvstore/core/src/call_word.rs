//! The call word: how a client takes back memory that a server may be writing, whatever became of the server.
//!
//! A server that was stopped in the middle of a copy goes on with it when it wakes up, long after its client has given the
//! call up and uses the memory for something else. So both look at one 32-bit word in memory that they share:
//!
//! ```text
//! bit 31: revoked, set by the client, never cleared within a call | bits 30..0: copies under way, counted by the server
//!
//! server, before a copy: +1, look at what was there: revoked -> -1, and no copy
//! server, behind a copy: -1, look at what was there: revoked -> what was copied (of a put) does not count
//! client: set bit 31, look at what was there: 0 copies -> the memory is the client's again, now and for good
//!                                             else     -> once the count is 0, or the server is gone
//! ```
//! One atomic step on each side decides: either the server counted itself in before the client revoked, and the client sees
//! it, or it sees the revocation. Nothing else is needed, and nobody waits for anybody.
//!
//! A word is one call's. It serves another only where the call was answered: a server that has not begun yet when the
//! client revokes looks at the word whenever it wakes up, and must find it revoked then.
//!
//! The order of the bytes around it follows from the word alone, since every step is a read-modify-write (or a load) of
//! it that acquires and releases. A client that finds the count at 0 reads what the server's last step wrote, or
//! something later in the same chain of steps: all that was copied happens before it. A server that is let in comes
//! before the revocation in the order of the word; its copy ends before its last step, and it takes what it copied for
//! the client's only where that step, too, comes before the revocation, and so before whatever the client writes behind
//! it. (Streaming stores are fenced by the copy.)
//!
//! Written over a trait, so that a test can put its own scheduler under it (`tests/shuttle`). That scheduler explores
//! sequentially consistent interleavings only; the rest is the paragraph above.

use std::sync::atomic::{AtomicU32, Ordering};

/// The revoked bit.
pub const REVOKED: u32 = 1 << 31;
/// Bytes of a word; it is aligned to as many.
pub const CALL_WORD_BYTES: usize = 4;

/// A 32-bit word that two processes share. Every operation is sequentially consistent.
pub trait SharedWord {
    /// Adds, wrapping; answers what was there.
    fn add(&self, n: u32) -> u32;
    /// Sets bits; answers what was there.
    fn set(&self, bits: u32) -> u32;
    /// What is there.
    fn get(&self) -> u32;
}

impl SharedWord for AtomicU32 {
    fn add(&self, n: u32) -> u32 {
        self.fetch_add(n, Ordering::SeqCst)
    }

    fn set(&self, bits: u32) -> u32 {
        self.fetch_or(bits, Ordering::SeqCst)
    }

    fn get(&self) -> u32 {
        self.load(Ordering::SeqCst)
    }
}

/// The server counts a copy in. `false`: the client took its memory back; do not touch it.
#[must_use]
pub fn begin_copy(word: &impl SharedWord) -> bool {
    let may = word.add(1) & REVOKED == 0;
    if !may {
        word.add(1u32.wrapping_neg());
    }
    may
}

/// The server counts a copy out. `false`: the client took its memory back meanwhile: what was copied out of it must not be
/// used.
#[must_use]
pub fn end_copy(word: &impl SharedWord) -> bool {
    word.add(1u32.wrapping_neg()) & REVOKED == 0
}

/// The client takes its memory back. `true`: it has it, from now on nothing is copied. `false`: see [`is_settled`].
#[must_use]
pub fn revoke(word: &impl SharedWord) -> bool {
    word.set(REVOKED) & !REVOKED == 0
}

/// Whether a revoked word's memory is the client's again.
pub fn is_settled(word: &impl SharedWord) -> bool {
    word.get() == REVOKED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revoked_word_lets_no_copy_begin_and_tells_of_one_that_began_before() {
        let word = AtomicU32::new(0);
        assert!(begin_copy(&word));
        assert!(!revoke(&word));
        assert!(!begin_copy(&word));
        assert!(!is_settled(&word));
        assert!(!end_copy(&word));
        assert!(is_settled(&word));
        assert!(revoke(&AtomicU32::new(0)));
    }
}
