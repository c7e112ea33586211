//! Priorities: the policy is told how much a session's positions count. What it was told is in the positions' entries: it
//! goes with them, and is said again when the session is appended to or restored, and after a start.

use std::sync::Arc;

use kvkeep_core::RequestInfo;
use kvkeep_core::session::{Session, SessionName};
use kvkeep_core::words::Priority;

use super::super::Store;

impl Store {
    /// Tells the policy the priority of a session's positions from `first` on; how many of them are here.
    pub async fn tell_priority(&self, name: &SessionName, session: &Session, first: u64) -> u64 {
        let info = RequestInfo {
            session: kvkeep_client::convert::session_number(name.id.as_str()),
            priority: Some(Priority::of_number(session.priority)),
            ..RequestInfo::default()
        };
        let now = self.clock.policy();
        let mut told = 0;
        self.each_slice(session.manifest.from(first), |directory, digest| {
            told += u64::from(directory.hint(digest, &info, now));
        })
        .await;
        told
    }

    /// Tells it of every session that has one, after a start.
    pub(super) async fn tell_all_priorities(self: &Arc<Self>) {
        let prioritized: Vec<_> = {
            let state = self.sessions.state().read();
            state.iter().filter(|(_, s)| s.priority != 0).map(|(name, s)| (name.clone(), Arc::clone(s))).collect()
        };
        for (name, session) in prioritized {
            self.tell_priority(&name, &session, 0).await;
        }
    }
}
