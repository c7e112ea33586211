//! Whose a position is, as far as hints need to know: one session's alone, or shared.
//!
//! A session is one byte of an entry: its own number's, or, where the engine names none, one that is *inferred*: a chain
//! is a session from its start, or from where it branches off another, and what lies before a branch is shared. The end of a
//! prompt that does not fill its block is no branch: the next prompt of the same session fills it, under another key.

use crate::directory::entry::{Entry, EntryId};
use crate::directory::slab::Slab;
use crate::words::RequestInfo;

/// A session in one byte: odd where the engine named it, even and not 0 where it is inferred. Enough to tell most others
/// from it.
fn byte(hash: u64, named: bool) -> u8 {
    let byte = (hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8;
    if named { byte | 1 } else { (byte & !1).max(2) }
}

fn is_inferred(session: u8) -> bool {
    session.is_multiple_of(2)
}

/// The request, with a session: its own, or that of the position.
pub(super) fn named(e: &Entry, info: &RequestInfo) -> RequestInfo {
    RequestInfo { session: if info.session == 0 { u64::from(e.session) } else { info.session }, ..*info }
}

/// A request uses a position, or says something of it; its count of uses is still that from before.
pub(super) fn note(slab: &mut Slab, id: EntryId, info: &RequestInfo, tail: bool) {
    let e = &mut slab[id];
    let first = e.uses == 0;
    if info.session == 0 {
        // Without a name it goes on being whose it was.
        if first {
            infer(slab, id, tail);
        }
        return;
    }
    let session = byte(info.session, true);
    // An inferred session gets its name from the first that comes.
    if first || is_inferred(e.session) {
        e.session = session;
    } else if e.session != session {
        e.set(Entry::SHARED, true);
    }
}

fn infer(slab: &mut Slab, id: EntryId, tail: bool) {
    let own = byte(slab[id].digest.as_table_hash(), false);
    let Some(parent) = slab[id].parent.some() else {
        slab[id].session = own;
        return;
    };
    if tail {
        slab[parent].set(Entry::TAILED, true);
    }
    let branches = slab[parent].children - u32::from(slab[parent].has(Entry::TAILED));
    if branches < 2 || tail {
        slab[id].session = slab[parent].session;
        return;
    }
    slab[id].session = own;
    // Each is marked once: what lies before a shared position is shared.
    let mut next = Some(parent);
    while let Some(at) = next.filter(|at| !slab[*at].has(Entry::SHARED)) {
        slab[at].set(Entry::SHARED, true);
        next = slab[at].parent.some();
    }
}
