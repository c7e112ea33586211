//! Mark and sweep: what only sessions keep, and no manifest names any more, is removed. And fsck, which says whether both
//! sides agree.
//!
//! ```text
//! mark    every manifest of a durable session, and every block of token ids; appends that come meanwhile add to the marks
//! sweep   the directory, slice by slice: a durable block that only sessions keep, without a mark, a lease or an append that
//!         looks at it, is suspected; one that the sweep before suspected too is removed
//! ```
//! Two sweeps, so that a block put a moment ago has an interval to be named, and no clock is asked. An append holds what it
//! looks at before it looks, under the directory's lock; the look at its hold comes before the look at the marks: whichever
//! way they meet, the block stays or the append is refused.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvkeep_core::session::{Command, Session, SessionName};
use kvkeep_core::{Class, Digest, MissReason, Result};
use kvkeep_proto::v1;

use super::super::Store;

/// Directory entries looked at for one hold of its lock.
const SWEEP_ENTRIES: u32 = 1024;
/// Sessions whose time has come, taken away by one command.
const EXPIRE_MOST: u32 = 256;
/// So often those are looked for, and those that are due.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);
/// A block that so many sweeps in a row found unnamed is removed.
const TIMES: u32 = 2;
/// Missing positions that fsck names.
const MISSING_MAX: usize = 1000;

/// What sweeps found so far.
#[derive(Default)]
pub(super) struct Sweeper {
    /// How many sweeps in a row found a block unnamed. One sweep at a time.
    suspects: tokio::sync::Mutex<HashMap<Digest, u32>>,
    sweeps: AtomicU64,
    swept: AtomicU64,
}

/// What a walk over the directory found.
#[derive(Default)]
struct Walk {
    durable_blocks: u64,
    unnamed: Vec<(Digest, u32, u64)>,
}

impl Store {
    /// Sweeps now and then, and takes sessions away whose time has come, until the node stops.
    pub(in super::super) async fn keep_sessions(self: Arc<Self>) {
        self.settle_all_pins().await;
        self.tell_all_priorities().await;
        let every = Duration::from_millis(self.config.sessions.sweep_every_ms);
        let mut next_sweep = tokio::time::Instant::now() + every;
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(EXPIRE_EVERY) => {}
            }
            self.bring_up_due();
            if let Err(error) = self.expire_sessions().await {
                tracing::warn!(%error, "sessions whose time has come are not taken away");
            }
            if tokio::time::Instant::now() >= next_sweep {
                let removed = self.sweep_sessions().await;
                tracing::debug!(removed, "swept what sessions no longer name");
                next_sweep = tokio::time::Instant::now() + every;
            }
        }
    }

    async fn expire_sessions(self: &Arc<Self>) -> Result<()> {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        while self.sessions.state().read().any_due(now_ms) {
            let kvkeep_core::session::Outcome::Expired(names) =
                self.sessions.change(&Command::Expire { most: EXPIRE_MOST }).await?
            else {
                return Err(super::odd());
            };
            if names.is_empty() {
                return Ok(());
            }
            self.counters.sessions_expired.add(names.len() as u64);
            for name in &names {
                self.settle_pins(name).await;
            }
        }
        Ok(())
    }

    /// What manifests name now. Appends that are applied from here on add to the shared marks, until [`Self::end_marks`].
    fn begin_marks(&self) -> HashSet<Digest> {
        *self.sessions.shared.marks.lock() = Some(HashSet::new());
        let all: Vec<Arc<Session>> = self.sessions.state().read().iter().map(|(_, s)| Arc::clone(s)).collect();
        let mut marks = HashSet::new();
        for session in all {
            if session.class == Class::Durable {
                marks.extend(session.manifest.iter());
            }
            marks.extend(session.texts.iter().map(|t| t.digest));
        }
        marks
    }

    fn end_marks(&self) {
        *self.sessions.shared.marks.lock() = None;
    }

    /// Whether anything names this block, or is about to. The hold first: see the module.
    fn is_named(&self, marks: &HashSet<Digest>, digest: &Digest) -> bool {
        marks.contains(digest)
            || self.sessions.holding.has(digest)
            || self.sessions.shared.marks.lock().as_ref().is_some_and(|new| new.contains(digest))
    }

    /// Removes what two sweeps found unnamed; how many positions.
    pub async fn sweep_sessions(self: &Arc<Self>) -> u64 {
        let mut suspects = self.sessions.sweep.suspects.lock().await;
        let marks = self.begin_marks();
        let walk = self.walk(&marks).await;
        let times = |digest: &Digest| suspects.get(digest).copied().unwrap_or(0) + 1;
        let mut found: HashMap<Digest, u32> = walk.unnamed.iter().map(|u| (u.0, times(&u.0))).collect();
        let again: Vec<Digest> =
            found.iter().filter(|(_, times)| **times >= TIMES).map(|(digest, _)| *digest).collect();
        let mut removed = 0;
        for slice in again.chunks(super::SLICE_KEYS) {
            let gone: Vec<_> = {
                let mut directory = self.directory.lock();
                let still = |digest: &&Digest| !self.is_named(&marks, digest);
                let still: Vec<Digest> = slice.iter().filter(still).copied().collect();
                let mut take = |digest: Digest| {
                    let view = directory.view(&digest).filter(|v| v.leases == 0)?;
                    Some((view.handle, digest, directory.remove(&digest, MissReason::Removed)?))
                };
                still.into_iter().filter_map(&mut take).collect()
            };
            removed += gone.len() as u64;
            gone.iter().for_each(|(_, digest, _)| {
                found.remove(digest);
            });
            self.bury(&gone, MissReason::Removed).await;
            tokio::task::yield_now().await;
        }
        self.end_marks();
        *suspects = found;
        self.sessions.sweep.sweeps.fetch_add(1, Ordering::Relaxed);
        self.sessions.sweep.swept.fetch_add(removed, Ordering::Relaxed);
        self.counters.session_swept_positions.add(removed);
        removed
    }

    async fn walk(&self, marks: &HashSet<Digest>) -> Walk {
        let mut walk = Walk::default();
        let mut cursor = Some(0);
        while let Some(at) = cursor {
            let slice = self.directory.lock().unnamed(|digest| self.is_named(marks, digest), at, SWEEP_ENTRIES);
            walk.durable_blocks += slice.durable_blocks;
            walk.unnamed.extend(slice.unnamed);
            cursor = slice.next;
            tokio::task::yield_now().await;
        }
        walk
    }

    /// Compares what sessions name with what is here.
    pub async fn fsck(self: &Arc<Self>, sweep: bool) -> v1::FsckReply {
        if sweep {
            self.sweep_sessions().await;
        }
        // No sweep in between.
        let suspects = self.sessions.sweep.suspects.lock().await;
        let marks = self.begin_marks();
        let walk = self.walk(&marks).await;
        self.end_marks();
        let all: Vec<(SessionName, Arc<Session>)> = {
            let state = self.sessions.state().read();
            state.iter().map(|(name, s)| (name.clone(), Arc::clone(s))).collect()
        };
        let mut reply = v1::FsckReply {
            sessions: all.len() as u64,
            durable_blocks: walk.durable_blocks,
            unreferenced_blocks: walk.unnamed.iter().map(|u| u64::from(u.1)).sum(),
            unreferenced_bytes: walk.unnamed.iter().map(|u| u.2).sum(),
            overdue_blocks: {
                let twice = |u: &&(Digest, u32, u64)| suspects.get(&u.0).is_some_and(|times| *times >= TIMES);
                walk.unnamed.iter().filter(twice).map(|u| u64::from(u.1)).sum()
            },
            swept_blocks: self.sessions.sweep.swept.load(Ordering::Relaxed),
            sweeps: self.sessions.sweep.sweeps.load(Ordering::Relaxed),
            ..v1::FsckReply::default()
        };
        drop(suspects);
        let mut seen = HashMap::new();
        for (name, session) in all {
            self.check_session(&name, &session, &mut seen, &mut reply).await;
        }
        reply.positions = seen.len() as u64;
        reply
    }

    async fn check_session(
        self: &Arc<Self>,
        name: &SessionName,
        session: &Session,
        seen: &mut HashMap<Digest, bool>,
        reply: &mut v1::FsckReply,
    ) {
        reply.missing_token_blocks += session.texts.iter().filter(|t| !self.has_text(t)).count() as u64;
        let promised = session.class == Class::Durable && self.views.is_current(session.handle(name.namespace));
        for (at, digest) in session.manifest.iter().enumerate() {
            // Whether it was looked at: a session that promises nothing may name it first.
            let looked = seen.entry(digest).or_insert(false);
            if !promised || std::mem::replace(looked, true) {
                continue;
            }
            let here = {
                let directory = self.directory.lock();
                let standing = directory.standing(&digest);
                standing.is_some_and(|mut parts| parts.all(|p| p.class == Class::Durable))
            };
            if !here {
                reply.missing_positions += 1;
                if reply.missing.len() < MISSING_MAX {
                    reply.missing.push(v1::MissingPosition {
                        namespace_id: name.namespace.0,
                        session_id: name.id.as_str().to_owned(),
                        position: at as u64,
                        reason: kvkeep_client::convert::reason_to_proto(self.why_gone(&digest)),
                    });
                }
            }
            if at % super::SLICE_KEYS == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
}
