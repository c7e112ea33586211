//! Sessions that an engine said are due: brought up to DRAM a little before.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::session::SessionName;
use kvkeep_core::{InstanceId, Instant};
use parking_lot::Mutex;

use super::super::Store;
use super::super::put::Caller;
use crate::config::PolicyClock;

/// Sessions that are waited for; of more, those that are due last are not.
const DUE_MAX: usize = 4096;
/// A session is brought up so long before it is due.
const LEAD: Duration = Duration::from_secs(2);

/// Which sessions are due when, on the monotonic clock.
#[derive(Default)]
pub(super) struct Due(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    by_time: BTreeSet<(Instant, SessionName)>,
    by_name: HashMap<SessionName, Instant>,
}

impl Due {
    /// A session is due then; what was said before is forgotten.
    fn set(&self, name: SessionName, at: Option<Instant>) {
        let mut waiting = self.0.lock();
        if let Some(before) = waiting.by_name.remove(&name) {
            waiting.by_time.remove(&(before, name.clone()));
        }
        let Some(at) = at else { return };
        waiting.by_name.insert(name.clone(), at);
        waiting.by_time.insert((at, name));
        if waiting.by_time.len() > DUE_MAX
            && let Some((_, last)) = waiting.by_time.pop_last()
        {
            waiting.by_name.remove(&last);
        }
    }

    /// Takes those whose time has come.
    fn take(&self, now: Instant) -> Vec<SessionName> {
        let mut waiting = self.0.lock();
        let mut due = Vec::new();
        while waiting.by_time.first().is_some_and(|(at, _)| *at <= now)
            && let Some((_, name)) = waiting.by_time.pop_first()
        {
            waiting.by_name.remove(&name);
            due.push(name);
        }
        due
    }
}

impl Store {
    /// A session is due in so long; `None`: it is not expected. Nothing happens where the policy's clock is not the node's own: a
    /// trace that is replayed says times that do not pass.
    pub(super) fn expect_session(&self, name: &SessionName, due: Option<Duration>) {
        if self.config.policy_clock != PolicyClock::Monotonic {
            return;
        }
        let at = due.map(|due| self.clock.monotonic().after(due.saturating_sub(LEAD)));
        self.sessions.due.set(name.clone(), at);
    }

    /// Brings up what is due now: what is not in DRAM and may be read, as any prefetch.
    pub(super) fn bring_up_due(self: &Arc<Self>) {
        for name in self.sessions.due.take(self.clock.monotonic()) {
            let Some(session) = self.sessions.state().read().get(&name).cloned() else { continue };
            let caller = Caller { instance: InstanceId([0; 16]), tenant: session.tenant };
            let digests: Vec<_> = session.manifest.iter().collect();
            let (started, _, refused) = self.prefetch(caller, session.handle(name.namespace), &digests);
            tracing::debug!(session = %name.id, started, refused, "a session is due: brought up");
        }
    }
}

#[cfg(test)]
mod tests {
    use kvkeep_core::NamespaceId;
    use kvkeep_core::session::SessionId;

    use super::*;

    fn name(n: usize) -> SessionName {
        SessionName { namespace: NamespaceId(1), id: SessionId::new(&format!("s{n}")).unwrap() }
    }

    #[test]
    fn the_last_word_counts_and_those_due_last_are_dropped_at_the_bound() {
        let due = Due::default();
        due.set(name(0), Some(Instant(10)));
        due.set(name(0), Some(Instant(20)));
        due.set(name(1), Some(Instant(15)));
        due.set(name(2), Some(Instant(5)));
        due.set(name(2), None);
        assert!(due.take(Instant(14)).is_empty());
        assert_eq!(due.take(Instant(20)), [name(1), name(0)]);
        (0..=DUE_MAX).for_each(|n| due.set(name(n), Some(Instant(n as u64))));
        let all = due.take(Instant(u64::MAX));
        assert_eq!((all.len(), all.last()), (DUE_MAX, Some(&name(DUE_MAX - 1))));
    }
}
