//! What was acknowledged of each kept session: its positions, and how many of its token ids.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::keys::PrefixId;
use crate::trace::SessionId;

/// Positions remembered over all sessions, 8 bytes each; conversations that would go beyond are not kept any longer.
pub const LEDGER_POSITIONS_MAX: usize = 8 << 20;

/// What a session was acknowledged to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Promise {
    /// In chain order.
    pub positions: Vec<PrefixId>,
    /// Token ids; they follow from their places.
    pub tokens: u64,
}

/// What the next append of a conversation carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// From here on.
    Append {
        /// Positions that were acknowledged.
        from_position: usize,
        /// Token ids that were acknowledged.
        from_token: u64,
    },
    /// The turn has nothing that was not acknowledged.
    Nothing,
    /// The turn does not go on from what was acknowledged.
    Diverged,
    /// [`LEDGER_POSITIONS_MAX`] is reached.
    Full,
}

/// The promises, shared by all engines.
#[derive(Default)]
pub struct SessionLedger(Mutex<State>);

#[derive(Default)]
struct State {
    sessions: BTreeMap<SessionId, Promise>,
    positions: usize,
    appends: u64,
    diverged: u64,
}

impl SessionLedger {
    /// What to append of a turn with these whole positions and so many tokens.
    pub fn next(&self, session: SessionId, whole: &[PrefixId], tokens: u64) -> Next {
        let mut state = self.0.lock();
        let none = Promise::default();
        let promise = state.sessions.get(&session).unwrap_or(&none);
        let (positions, from_token) = (promise.positions.len(), promise.tokens);
        if !whole.starts_with(&promise.positions) || tokens < from_token {
            state.diverged += 1;
            return Next::Diverged;
        }
        if whole.len() == positions && tokens == from_token {
            return Next::Nothing;
        }
        if state.positions + whole.len() - positions > LEDGER_POSITIONS_MAX {
            return Next::Full;
        }
        Next::Append { from_position: positions, from_token }
    }

    /// Notes that a session has all of these positions and so many tokens.
    pub fn note(&self, session: SessionId, whole: &[PrefixId], tokens: u64) {
        let mut state = self.0.lock();
        state.appends += 1;
        let promise = state.sessions.entry(session).or_default();
        let new = &whole[promise.positions.len()..];
        promise.positions.extend_from_slice(new);
        promise.tokens = tokens;
        state.positions += new.len();
    }

    /// Sessions with at least one acknowledged append.
    pub fn len(&self) -> usize {
        self.0.lock().sessions.len()
    }

    /// Whether nothing was acknowledged.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Acknowledged appends, and turns that did not go on from what was acknowledged.
    pub fn appends_and_diverged(&self) -> (u64, u64) {
        let state = self.0.lock();
        (state.appends, state.diverged)
    }

    /// What is promised by now, in order of the conversations.
    pub fn promises(&self) -> Vec<(SessionId, Promise)> {
        self.0.lock().sessions.iter().map(|(id, promise)| (*id, promise.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: u64) -> Vec<PrefixId> {
        (0..n).map(PrefixId).collect()
    }

    #[test]
    fn a_turn_appends_what_was_not_acknowledged() {
        let ledger = SessionLedger::default();
        let session = SessionId(4);
        assert_eq!(ledger.next(session, &ids(2), 1100), Next::Append { from_position: 0, from_token: 0 });
        assert!(ledger.is_empty(), "what was not acknowledged is not promised");
        ledger.note(session, &ids(2), 1100);
        assert_eq!(ledger.next(session, &ids(2), 1100), Next::Nothing);
        assert_eq!(ledger.next(session, &ids(2), 1200), Next::Append { from_position: 2, from_token: 1100 });
        ledger.note(session, &ids(5), 2600);
        ledger.note(SessionId(1), &ids(1), 512);
        let promises = ledger.promises();
        assert_eq!(promises[1], (session, Promise { positions: ids(5), tokens: 2600 }));
        assert_eq!((promises.len(), ledger.appends_and_diverged()), (2, (3, 0)));
    }

    #[test]
    fn a_turn_that_does_not_go_on_is_counted_and_not_appended() {
        let ledger = SessionLedger::default();
        let session = SessionId(4);
        ledger.note(session, &ids(3), 1600);
        let other = [PrefixId(0), PrefixId(9), PrefixId(2), PrefixId(3)];
        assert_eq!(ledger.next(session, &other, 2100), Next::Diverged);
        assert_eq!(ledger.next(session, &ids(2), 2100), Next::Diverged);
        assert_eq!(ledger.next(session, &ids(3), 1500), Next::Diverged);
        assert_eq!(ledger.appends_and_diverged(), (1, 3));
        assert_eq!(ledger.promises()[0].1.positions, ids(3));
    }
}
