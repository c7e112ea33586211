//! A seeded client of sessions, and what it was told: blocks are put as `cache`, appended with their token ids, forked,
//! truncated and deleted. What an operation would have changed when its answer did not come is kept as two states; after
//! a crash the server must have one of them, whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::sessions::{Append, ContentPart, ListSessions, OpenSession, Restore, Sessions};
use kvkeep_client::{Call, Client, Error, ErrorKind, GetItem, Namespace, PartOutcome, Put, PutPosition};
use kvkeep_core::{Class, ErrorKind as CoreKind, RequestId};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::formats::TOKENS_PER_KEY;
use crate::ledger::{block, hex};
use crate::{payload, workload};

/// Sessions of one client at a time.
const SESSIONS_MAX: usize = 8;
/// Positions of one session; then it is deleted.
const POSITIONS_MAX: usize = 64;
/// Positions of one append at most.
const APPEND_MAX: u64 = 10;
/// Blocks that a client puts as `durable` for itself.
const KEPT_MAX: usize = 40;
/// Sessions of one page of a list: small, so that pages are walked.
const PAGE: u32 = 3;

/// The namespace that this workload uses.
pub const NAMESPACE: &str = "sessions";

/// What is in a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    keys: Vec<Bytes>,
    tokens: Vec<u32>,
    content: Vec<ContentPart>,
}

impl State {
    fn first(&self, positions: usize, keep_tokens: bool) -> Self {
        let mut cut = self.clone();
        cut.keys.truncate(positions);
        if !keep_tokens {
            cut.tokens.truncate(positions * TOKENS_PER_KEY as usize);
        }
        cut.content.retain(|c| c.first_token < cut.tokens.len() as u64);
        cut
    }
}

/// What a client knows of a session: one of these. `None`: there is none.
#[derive(Clone, Debug)]
struct Known {
    class: Class,
    states: Vec<Option<State>>,
}

/// One client, its sessions and what it was told. Lives through restarts of the server.
#[derive(Debug)]
pub struct SessionWork {
    rng: StdRng,
    number: u64,
    next_session: u64,
    next_chain: u64,
    sessions: BTreeMap<String, Known>,
    /// Blocks that it put as `durable`, whatever sessions do with them.
    kept: BTreeSet<Bytes>,
    /// Those whose put got no answer.
    maybe_kept: BTreeSet<Bytes>,
    /// What was done.
    pub done: Done,
}

/// What a client of sessions has done and seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Appends acknowledged.
    pub appends: u64,
    /// Appends refused because a block had left before.
    pub appends_refused: u64,
    /// Forks acknowledged.
    pub forks: u64,
    /// Truncations acknowledged.
    pub truncates: u64,
    /// Deletions acknowledged.
    pub deletes: u64,
    /// Blocks refused for want of room.
    pub blocks_refused: u64,
}

/// What a look at everything found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Sessions that are there.
    pub sessions: u64,
    /// Operations without an answer that were done.
    pub done_unanswered: u64,
    /// Operations without an answer that were not done.
    pub undone_unanswered: u64,
    /// Positions of durable sessions, every byte compared.
    pub durable_positions: u64,
    /// Positions of cache sessions that are there, every byte compared.
    pub cache_positions: u64,
    /// Token ids compared.
    pub tokens: u64,
    /// Blocks put as durable for themselves, compared.
    pub kept: u64,
}

impl std::ops::AddAssign for Seen {
    fn add_assign(&mut self, o: Self) {
        self.sessions += o.sessions;
        self.done_unanswered += o.done_unanswered;
        self.undone_unanswered += o.undone_unanswered;
        self.durable_positions += o.durable_positions;
        self.cache_positions += o.cache_positions;
        self.tokens += o.tokens;
        self.kept += o.kept;
    }
}

/// Registers the workload's namespace.
///
/// # Errors
/// Of the call.
pub async fn namespace(client: &Client) -> Result<Namespace, Error> {
    client.register_namespace(NAMESPACE, &workload::format(), "weights-1").await
}

impl SessionWork {
    /// Client `number` of a run with this seed.
    pub fn new(seed: u64, number: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(payload::mix(seed ^ payload::mix(number))),
            number,
            next_session: 0,
            next_chain: (seed << 16 | number) << 32,
            sessions: BTreeMap::new(),
            kept: BTreeSet::new(),
            maybe_kept: BTreeSet::new(),
            done: Done::default(),
        }
    }

    /// Works until `stop`, or until the server does not answer any more.
    ///
    /// # Panics
    /// If an answer is wrong, or one that a healthy server does not give.
    pub async fn run(&mut self, client: &Client, stop: Arc<AtomicBool>) {
        let ns = match namespace(client).await {
            Ok(ns) => ns,
            Err(e) => return gone(&e),
        };
        while !stop.load(Ordering::Relaxed) {
            let step = match self.rng.random_range(0..100) {
                0..45 => self.append(&ns).await,
                45..65 => self.crowd(&ns).await,
                65..73 => self.fork(&ns.sessions()).await,
                73..80 => self.truncate(&ns.sessions()).await,
                80..86 => self.delete(&ns.sessions()).await,
                86..94 => self.look(&ns).await,
                _ => self.restore(&ns.sessions()).await,
            };
            if let Err(e) = step {
                return gone(&e);
            }
        }
    }

    fn call(&mut self) -> Call {
        let request = RequestId::new(&self.rng.random::<[u8; 16]>()).expect("16 bytes are within the bound");
        Call::of(request).within(Duration::from_secs(20))
    }

    /// A session whose state is known.
    fn any(&mut self) -> Option<(String, Class, State)> {
        let settled = |(id, known): (&String, &Known)| match &known.states[..] {
            [Some(state)] => Some((id.clone(), known.class, state.clone())),
            _ => None,
        };
        let all: Vec<_> = self.sessions.iter().filter_map(settled).collect();
        let at = self.rng.random_range(0..all.len().max(1));
        all.into_iter().nth(at)
    }

    fn new_id(&mut self) -> String {
        self.next_session += 1;
        format!("{}-{}", self.number, self.next_session)
    }

    /// Notes what a session becomes, and has it happen: one of the two until it is answered.
    async fn change<T>(
        &mut self,
        id: &str,
        class: Class,
        to: Option<State>,
        happen: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, Error> {
        let known = self.sessions.entry(id.to_owned()).or_insert(Known { class, states: vec![None] });
        let [before] = &known.states[..] else { panic!("only what is known is changed") };
        let before = before.clone();
        known.states.push(to.clone());
        let outcome = happen.await;
        let states = match &outcome {
            Ok(_) => vec![to],
            Err(e) if is_refusal(e) => vec![before],
            Err(_) => return outcome.map(Some),
        };
        known.states = states;
        if known.states == [None] {
            self.sessions.remove(id);
        }
        match outcome {
            Ok(done) => Ok(Some(done)),
            Err(e) if is_room(&e) => Ok(None),
            Err(e) => panic!("{id}: {e}"),
        }
    }

    async fn append(&mut self, ns: &Namespace) -> Result<(), Error> {
        let sessions = ns.sessions();
        let new = self.sessions.len() < SESSIONS_MAX && self.rng.random_bool(0.2) || self.sessions.is_empty();
        if new {
            let class = if self.rng.random_bool(0.8) { Class::Durable } else { Class::Cache };
            let (id, call) = (self.new_id(), self.call());
            let open = OpenSession { class: Some(class), ..OpenSession::default() };
            let opening = sessions.open(&id, &open, &call);
            self.change(&id, class, Some(State::default()), opening).await?;
        }
        let Some((id, class, state)) = self.any() else { return Ok(()) };
        if state.keys.len() >= POSITIONS_MAX {
            return self.delete_one(&sessions, &id, class).await;
        }
        let count = self.rng.random_range(1..=APPEND_MAX);
        let keys = payload::chain(self.next_chain, count);
        self.next_chain += 1;
        // Now and then one that was never put.
        let never = self.rng.random_bool(0.05).then(|| self.rng.random_range(0..count as usize));
        if !self.put(ns, &keys, &state, never).await? {
            return Ok(());
        }
        let ids = self.rng.random_range(0..=count as usize * TOKENS_PER_KEY as usize + 5);
        let from_token = state.tokens.len() as u64;
        let token_ids: Vec<u32> = (0..ids).map(|_| self.rng.random()).collect();
        let part =
            |at: usize| ContentPart { first_token: from_token + at as u64, tokens: 1, content_id: keys[0].slice(..9) };
        let content: Vec<_> = (ids > 8).then(|| part(ids / 3)).into_iter().collect();
        let append = Append { from_position: state.keys.len() as u64, keys, from_token, token_ids, content };
        let mut after = state.clone();
        after.keys.extend(append.keys.iter().cloned());
        after.tokens.extend(&append.token_ids);
        after.content.extend(append.content.iter().cloned());
        let (positions, tokens) = (after.keys.len() as u64, after.tokens.len() as u64);
        let call = self.call();
        let appending = sessions.append(&id, &append, &call);
        match self.change(&id, class, Some(after), appending).await? {
            Some(appended) => {
                assert!(never.is_none(), "{id}: an append of a position that was never put");
                assert_eq!((appended.positions, appended.tokens, appended.repeated), (positions, tokens, false));
                self.done.appends += 1;
                if self.rng.random_bool(0.2) {
                    let again = sessions.append(&id, &append, &call).await?;
                    assert!(again.repeated, "{id}: {again:?}");
                }
            }
            None => self.done.appends_refused += 1,
        }
        Ok(())
    }

    /// Puts the blocks of an append as `cache`, some as `durable`; whether all are here.
    async fn put(
        &mut self,
        ns: &Namespace,
        keys: &[Bytes],
        state: &State,
        never: Option<usize>,
    ) -> Result<bool, Error> {
        let class = if self.kept.len() < KEPT_MAX && self.rng.random_bool(0.1) { Class::Durable } else { Class::Cache };
        let wanted: Vec<_> =
            keys.iter().enumerate().filter(|(n, _)| Some(*n) != never).map(|(_, key)| key.clone()).collect();
        let put = Put {
            parent: state.keys.last().cloned(),
            first_position: state.keys.len() as u32,
            unordered: never.is_some(),
            positions: wanted.iter().map(|key| PutPosition::of(key.clone(), block(key))).collect(),
            class: Some(class),
            ..Put::default()
        };
        if class == Class::Durable {
            self.maybe_kept.extend(wanted.iter().cloned());
        }
        let mut all = true;
        let call = self.call();
        for (key, outcome) in wanted.iter().zip(ns.put(&put, &call).await?) {
            match outcome {
                PartOutcome::Stored { .. } => {
                    if class == Class::Durable {
                        self.maybe_kept.remove(key);
                        self.kept.insert(key.clone());
                    }
                }
                PartOutcome::Refused(e) if is_room(&e) => {
                    self.done.blocks_refused += 1;
                    all = false;
                }
                PartOutcome::Refused(e) => return Err(e),
                other => panic!("nobody else writes this: {other:?}"),
            }
        }
        Ok(all)
    }

    /// Blocks of no session: they push others out.
    async fn crowd(&mut self, ns: &Namespace) -> Result<(), Error> {
        let keys = payload::chain(self.next_chain, 16);
        self.next_chain += 1;
        let positions = keys.iter().map(|key| PutPosition::of(key.clone(), block(key))).collect();
        let put = Put { positions, class: Some(Class::Cache), ..Put::default() };
        let call = self.call();
        ns.put(&put, &call).await.map(drop)
    }

    async fn fork(&mut self, sessions: &Sessions) -> Result<(), Error> {
        if self.sessions.len() >= SESSIONS_MAX {
            return Ok(());
        }
        let Some((from, class, state)) = self.any() else { return Ok(()) };
        let at = self.rng.random_range(0..=state.keys.len());
        let (to, call) = (self.new_id(), self.call());
        let whole = self.rng.random_bool(0.3);
        let becomes = if whole { state } else { state.first(at, false) };
        let forking = sessions.fork(&from, &to, (!whole).then_some(at as u64), &call);
        if let Some((_, created)) = self.change(&to, class, Some(becomes), forking).await? {
            assert!(created, "{to} is new");
            self.done.forks += 1;
        }
        Ok(())
    }

    async fn truncate(&mut self, sessions: &Sessions) -> Result<(), Error> {
        let Some((id, class, state)) = self.any() else { return Ok(()) };
        let at = self.rng.random_range(0..=state.keys.len());
        let (keep_tokens, call) = (self.rng.random_bool(0.3), self.call());
        let becomes = state.first(at, keep_tokens);
        let cutting = sessions.truncate(&id, at as u64, keep_tokens, &call);
        if let Some(info) = self.change(&id, class, Some(becomes), cutting).await? {
            assert_eq!(info.positions, at as u64);
            self.done.truncates += 1;
        }
        Ok(())
    }

    async fn delete(&mut self, sessions: &Sessions) -> Result<(), Error> {
        match self.any() {
            Some((id, class, _)) if self.sessions.len() > 2 => self.delete_one(sessions, &id, class).await,
            _ => Ok(()),
        }
    }

    async fn delete_one(&mut self, sessions: &Sessions, id: &str, class: Class) -> Result<(), Error> {
        let call = self.call();
        let deleting = sessions.delete(id, &call);
        if let Some(deleted) = self.change(id, class, None, deleting).await? {
            assert!(deleted, "{id} was there");
            self.done.deletes += 1;
        }
        Ok(())
    }

    async fn restore(&mut self, sessions: &Sessions) -> Result<(), Error> {
        let Some((id, class, state)) = self.any() else { return Ok(()) };
        let call = self.call();
        let restored = sessions.restore(&id, &Restore::default(), &call).await?.finish().await?;
        if class == Class::Durable {
            assert!(restored.missing.is_empty(), "{id}: {restored:?}");
            assert_eq!(restored.usable_positions, state.keys.len() as u64);
        }
        Ok(())
    }

    /// One session, as it is now.
    async fn look(&mut self, ns: &Namespace) -> Result<(), Error> {
        let Some((id, class, state)) = self.any() else { return Ok(()) };
        let call = self.call();
        let now = read(&ns.sessions(), &id, &call).await?;
        assert!(now.is(&state, class), "{id}: {}", now.differs(&state));
        Ok(())
    }

    /// Looks at everything that is there, and at everything that must be.
    ///
    /// # Panics
    /// If anything is not as it was told.
    pub async fn check(&mut self, ns: &Namespace) -> Seen {
        let (sessions, mut seen) = (ns.sessions(), Seen::default());
        let there = self.listed(&sessions).await;
        let unknown: Vec<_> = there.iter().filter(|id| !self.sessions.contains_key(*id)).collect();
        assert!(unknown.is_empty(), "deleted sessions are there again: {unknown:?}");
        for (id, mut known) in std::mem::take(&mut self.sessions) {
            let states = std::mem::take(&mut known.states);
            let call = Call::default();
            let state = if there.contains(&id) {
                let now = read(&sessions, &id, &call).await.expect("a session that is listed can be read");
                let found = states.iter().position(|s| s.as_ref().is_some_and(|s| now.is(s, known.class)));
                let found = found.unwrap_or_else(|| {
                    let differ: Vec<_> = states.iter().flatten().map(|s| now.differs(s)).collect();
                    panic!("{id} ({}) is none of what it may be: {differ:#?}", known.class)
                });
                if states.len() > 1 {
                    seen.done_unanswered += u64::from(found == 1);
                    seen.undone_unanswered += u64::from(found == 0);
                }
                states.into_iter().nth(found).flatten()
            } else {
                assert!(states.contains(&None), "{id} is lost");
                if states.len() > 1 {
                    let deleted = states.last() == Some(&None);
                    seen.done_unanswered += u64::from(deleted);
                    seen.undone_unanswered += u64::from(!deleted);
                }
                None
            };
            let Some(state) = state else { continue };
            let hits = hits(ns, &state.keys).await;
            seen.sessions += 1;
            seen.tokens += state.tokens.len() as u64;
            if known.class == Class::Durable {
                assert_eq!(hits, state.keys.len(), "{id} has lost blocks");
                seen.durable_positions += hits as u64;
            } else {
                seen.cache_positions += hits as u64;
            }
            known.states = vec![Some(state)];
            self.sessions.insert(id, known);
        }
        let kept: Vec<_> = self.kept.iter().cloned().collect();
        assert_eq!(hits(ns, &kept).await, kept.len(), "blocks that were put as durable are lost");
        seen.kept = kept.len() as u64;
        seen
    }

    /// Ids of this client's sessions, page by page.
    async fn listed(&self, sessions: &Sessions) -> BTreeSet<String> {
        let which = ListSessions { id_prefix: format!("{}-", self.number), ..ListSessions::default() };
        let (mut ids, mut token) = (BTreeSet::new(), Bytes::new());
        loop {
            let page = sessions.list_page(&which, &token, PAGE, &Call::default()).await.expect("a list is answered");
            for session in page.sessions {
                assert!(ids.insert(session.id.clone()), "{} is listed twice", session.id);
            }
            token = page.next_page_token;
            if token.is_empty() {
                return ids;
            }
        }
    }

    /// Deletes all its sessions; how many blocks it put as durable itself: at least, at most.
    ///
    /// # Panics
    /// If the server does not do it.
    pub async fn delete_everything(&mut self, sessions: &Sessions) -> (u64, u64) {
        for id in std::mem::take(&mut self.sessions).into_keys() {
            assert!(sessions.delete(&id, &Call::default()).await.expect("a healthy node deletes"), "{id}");
        }
        let kept = self.kept.len() as u64;
        (kept, kept + self.maybe_kept.len() as u64)
    }
}

/// A session as the server tells it.
struct Now {
    class: Class,
    positions: u64,
    /// `None`: not here, so the key is not known.
    keys: Vec<Option<Bytes>>,
    tokens: Vec<u32>,
    content: Vec<ContentPart>,
    damaged: bool,
}

async fn read(sessions: &Sessions, id: &str, call: &Call) -> Result<Now, Error> {
    let info = sessions.get(id, call).await?;
    let manifest = sessions.manifest_all(id, call).await?;
    let tokens = sessions.tokens_all(id, call).await?;
    assert_eq!(info.tokens, tokens.total, "{id}");
    let keys = manifest.into_iter().map(|p| p.key).collect();
    Ok(Now {
        class: info.class,
        positions: info.positions,
        keys,
        tokens: tokens.ids,
        content: tokens.content,
        damaged: tokens.damaged,
    })
}

impl Now {
    fn is(&self, state: &State, class: Class) -> bool {
        // Blocks of a cache session may be gone, and their keys with them.
        let same = |(now, key): (&Option<Bytes>, &Bytes)| now.as_ref().map_or(class == Class::Cache, |now| now == key);
        self.class == class
            && self.positions == state.keys.len() as u64
            && self.keys.len() == state.keys.len()
            && self.keys.iter().zip(&state.keys).all(same)
            && !self.damaged
            && self.tokens == state.tokens
            && self.content == state.content
    }

    fn differs(&self, state: &State) -> String {
        let wrong: Vec<_> = (0..state.keys.len())
            .filter(|n| self.keys.get(*n).and_then(Option::as_ref) != Some(&state.keys[*n]))
            .collect();
        format!(
            "{} positions for {}, {} keys listed, not as told at {wrong:?}; {} tokens for {}, the same: {}, content the same: {}, damaged: {}",
            self.positions,
            state.keys.len(),
            self.keys.len(),
            self.tokens.len(),
            state.tokens.len(),
            self.tokens == state.tokens,
            self.content == state.content,
            self.damaged,
        )
    }
}

/// How many of the blocks are here, every byte compared.
async fn hits(ns: &Namespace, keys: &[Bytes]) -> usize {
    let mut hits = 0;
    for some in keys.chunks(256) {
        let items: Vec<_> = some.iter().map(|key| GetItem::of(key.clone())).collect();
        let parts = ns.get(&items, None, &Call::default()).await.expect("a healthy node answers a get");
        for (key, part) in some.iter().zip(parts) {
            if part.is_hit() {
                assert!(part.data == block(key), "wrong bytes for {}", hex(key));
                hits += 1;
            }
        }
    }
    hits
}

/// The server says that it did not do it.
fn is_refusal(e: &Error) -> bool {
    is_room(e) || matches!(e.kind(), ErrorKind::Refused(kind) if kind != CoreKind::Unavailable)
}

/// A refusal that a workload on small tiers must expect.
fn is_room(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused(CoreKind::Full | CoreKind::Throttled | CoreKind::Expired)) || is_missing(e)
}

/// An append whose block is not here.
fn is_missing(e: &Error) -> bool {
    e.kind() == ErrorKind::Refused(CoreKind::Conflict) && e.context().any(|(name, _)| name == "index_in_append")
}

/// The only ways in which a call may fail: the server is gone, or it had no room in time.
fn gone(e: &Error) {
    let expected = matches!(
        e.kind(),
        ErrorKind::Unreachable
            | ErrorKind::Late
            | ErrorKind::Refused(CoreKind::Unavailable | CoreKind::Full | CoreKind::Throttled)
    );
    assert!(expected, "a call failed in a way that no crash explains: {e}");
}
