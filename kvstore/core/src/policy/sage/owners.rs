//! Whose a position is, as far as hints need to know: one session's alone, or shared.
//!
//! A session is one byte of an entry: its own number's, or, where the engine names none, one that is *inferred*: a chain
//! is a session from its start, or from where it branches off another, and what lies before a branch is shared. The end of a
//! prompt that does not fill its block is no branch: the next prompt of the same session fills it, under another key.

use crate::directory::entry::{Entry, EntryId};
use crate::directory::slab::Slab;
use crate::words::RequestInfo;

/// A session in one byte: enough to tell most others from it. 0: none.
fn byte(session: u64) -> u8 {
    if session == 0 { 0 } else { (session.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56).max(1) as u8 }
}

/// The request, with a session: its own, or that of the position.
pub(super) fn named(e: &Entry, info: &RequestInfo) -> RequestInfo {
    RequestInfo { session: if info.session == 0 { u64::from(e.session) } else { info.session }, ..*info }
}

/// A request uses a position; its count of uses is still that from before.
pub(super) fn note(slab: &mut Slab, id: EntryId, info: &RequestInfo, tail: bool) {
    let session = byte(info.session);
    let e = &mut slab[id];
    let first = e.uses == 0;
    match (first, session) {
        (true, 0) => infer(slab, id, tail),
        (true, _) => e.session = session,
        // Whoever it is, the position goes on being whose it was.
        (false, 0) => {}
        (false, _) if e.session != session => e.set(Entry::SHARED, true),
        (false, _) => {}
    }
}

fn infer(slab: &mut Slab, id: EntryId, tail: bool) {
    let own = byte(slab[id].digest.as_table_hash());
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
