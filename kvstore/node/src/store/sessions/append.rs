//! Append: what a manifest comes to name is here, whole, and of the session's class before it is proposed. A client's word is
//! not taken for it.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use kvkeep_core::session::text::Tokens;
use kvkeep_core::session::{Command, Outcome, Session, SessionName};
use kvkeep_core::{BlockId, Class, Digest, Error, ErrorKind, Handle, Keeper, Result};
use parking_lot::Mutex;

use super::super::put::Caller;
use super::super::{SLICE_KEYS, Store};
use super::odd;
use crate::failpoint;

/// Blocks of one append that are raised to durable at a time.
const RAISES_MAX: usize = 32;

/// An append.
#[derive(Clone, Debug)]
pub struct AppendWish {
    /// Which session.
    pub name: SessionName,
    /// Of the caller's weights.
    pub handle: Handle,
    /// Positions that it has now.
    pub from_position: u64,
    /// Of the positions after those.
    pub keys: Vec<Bytes>,
    /// Token ids; `None`: none were given.
    pub tokens: Option<Tokens>,
}

/// Digests that appends under way have looked at, and how many of them.
#[derive(Default)]
pub(super) struct Holding(Mutex<HashMap<Digest, u32>>);

/// One append's share of it.
pub(super) struct Held<'a> {
    holding: &'a Holding,
    digests: Vec<Digest>,
}

impl Holding {
    fn hold(&self, digests: &[Digest]) -> Held<'_> {
        let mut all = self.0.lock();
        digests.iter().for_each(|d| *all.entry(*d).or_default() += 1);
        Held { holding: self, digests: digests.to_vec() }
    }

    /// Whether an append under way looks at it.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.0.lock().contains_key(digest)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut all = self.holding.0.lock();
        for digest in &self.digests {
            if let Some(n) = all.get_mut(digest) {
                *n -= 1;
                if *n == 0 {
                    all.remove(digest);
                }
            }
        }
    }
}

/// What an append came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Positions now.
    pub positions: u64,
    /// Token ids now.
    pub tokens: u64,
    /// It was there already.
    pub repeated: bool,
}

impl Store {
    /// Adds positions, and token ids, to the end of a session.
    ///
    /// # Errors
    /// `Conflict` where it is not as long as the caller believes, or a position is not here whole; `StaleRevision`;
    /// `UnknownSession`; what raising a block to durable says.
    pub async fn append_session(self: &Arc<Self>, caller: Caller, wish: AppendWish) -> Result<Appended> {
        let (namespace, _) = self.session(caller, &wish.name)?;
        if namespace.revision != wish.handle.revision {
            return Err(Error::new(
                ErrorKind::StaleRevision,
                "the weights of this namespace have changed; register again",
            )
            .with("revision", wish.handle.revision)
            .with("current", namespace.revision));
        }
        let digests = self.digests(caller, wish.handle, wish.keys.iter().map(|k| &k[..]));
        // Before the look at session and directory, until the manifest names them: a sweep in between leaves them alone.
        let held = self.sessions.holding.hold(&digests);
        let (_, session) = self.session(caller, &wish.name)?;
        // One that repeats what is there already need not find the blocks once more.
        if !session.names(wish.from_position, &digests) {
            self.pins_allow(&session, digests.len())?;
            self.ready(wish.handle, &digests, session.class).await?;
        }
        failpoint::at("session.append.ready");
        let (text, text_held) = match wish.tokens.filter(|t| !t.ids.is_empty()) {
            Some(tokens) => {
                let block = self.text_block(caller, session.uid, &tokens).await?;
                let held = self.sessions.holding.hold(&[block.text.digest]);
                self.put_text(caller, &block).await?;
                (Some(block.text), Some(held))
            }
            None => (None, None),
        };
        let command = Command::Append {
            name: wish.name.clone(),
            uid: session.uid,
            revision: wish.handle.revision,
            from_position: wish.from_position,
            digests,
            text,
        };
        let outcome = self.sessions.change(&command).await;
        drop((held, text_held));
        let Outcome::Appended { positions, tokens, repeated } = outcome? else { return Err(odd()) };
        failpoint::at("session.append.applied");
        self.counters.session_appends.one();
        if session.pinned.is_some() {
            self.settle_pins(&wish.name).await;
        }
        if session.priority != 0
            && let Ok((_, session)) = self.session(caller, &wish.name)
        {
            self.tell_priority(&wish.name, &session, wish.from_position).await;
        }
        Ok(Appended { positions, tokens, repeated })
    }

    /// What is appended to a pinned session is pinned, too.
    fn pins_allow(&self, session: &Session, more: usize) -> Result<()> {
        let positions_max = u64::from(self.config.limits.pinned_positions_max);
        let pinned = self.sessions.state().read().pinned_positions(session.tenant);
        if session.pinned.is_some() && pinned + more as u64 > positions_max {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "the session is pinned, and the tenant would have more positions pinned than it may; unpin it to append",
            )
            .with("limits.pinned_positions_max", positions_max)
            .with("pinned", pinned)
            .with("asked", more));
        }
        Ok(())
    }

    /// Makes sure that positions are here whole, and have the class.
    async fn ready(self: &Arc<Self>, handle: Handle, digests: &[Digest], class: Class) -> Result<()> {
        let mut raise: Vec<BlockId> = Vec::new();
        for (n, slice) in digests.chunks(SLICE_KEYS).enumerate() {
            let directory = self.directory.lock();
            for (i, digest) in slice.iter().enumerate() {
                let Some(standing) = directory.standing(digest) else {
                    let index = n * SLICE_KEYS + i;
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        "a position is not here whole: put its blocks first, then append",
                    )
                    .with("index_in_append", index));
                };
                if class == Class::Durable {
                    raise.extend(standing.filter(|s| s.class < Class::Durable).map(|s| s.id));
                }
            }
        }
        let raised: Vec<Result<()>> = stream::iter(raise)
            .map(|id| {
                let store = Arc::clone(self);
                async move { store.make_durable(handle, id, Keeper::Sessions).await }
            })
            .buffer_unordered(RAISES_MAX)
            .collect()
            .await;
        raised.into_iter().collect()
    }
}
