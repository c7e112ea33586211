//! One engine: takes a request, reads what the store has of it, checks every byte, puts the rest.
//!
//! A request has two phases, each tried again as a whole while the server is away: what was read before a crash counts, what
//! was put before it is found present.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use kvkeep_client::{
    Call, Error, ErrorKind, GetItem, Match, MatchQuery, Namespace, PartOutcome, Put, PutPart, PutPosition,
};
use kvkeep_core::{Class, ErrorKind as CoreKind, RequestId, RequestInfo, Tier, Version};

use super::ledger::{BlockName, Ledger};
use super::plan::{PaceArg, Plan, PolicyClockArg, RetentionArg};
use super::sessions::ledger::SessionLedger;
use super::tally::{Live, Tally};
use crate::block_bytes::{self, Seed};
use crate::keys::PrefixId;
use crate::trace::Request;

/// Pause before a phase is tried again while the server is away.
pub(super) const OUTAGE_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause that the server may ask for.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Lease of a request: long enough for its gets, short enough to end soon after a crash of ours.
const LEASE: Duration = Duration::from_secs(30);

/// What all engines share.
pub struct Shared {
    /// What to do.
    pub plan: Plan,
    /// Where blocks go.
    pub namespace: Namespace,
    /// Blocks that were promised.
    pub ledger: Ledger,
    /// Sessions that were promised.
    pub sessions: SessionLedger,
    /// What is watched.
    pub live: Live,
    /// When the replay began.
    pub began: Instant,
}

/// One engine and its counts.
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    /// What it has counted.
    pub tally: Tally,
}

/// Why a phase did not finish.
pub(super) enum Halt {
    /// The server is away, restarting or full for the moment.
    Away(Error),
    /// It will not work however often it is tried.
    Fatal(anyhow::Error),
}

/// What was read: hit positions from the start of the chain.
#[derive(Default)]
struct Read {
    positions: usize,
    tokens: Vec<(u64, Option<Tier>)>,
}

/// How long the server may stay away.
pub(super) struct Patience {
    bound: Duration,
    since: Option<Instant>,
}

impl Patience {
    pub(super) fn new(bound: Duration) -> Self {
        Self { bound, since: None }
    }

    pub(super) async fn wait(&mut self, verb: &str, error: Error) -> anyhow::Result<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > self.bound {
            return Err(error).with_context(|| format!("{verb}: the server was away for over {:?}", self.bound));
        }
        tokio::time::sleep(error.retry_after().unwrap_or(OUTAGE_PAUSE).clamp(OUTAGE_PAUSE, PAUSE_MAX)).await;
        Ok(())
    }
}

/// Whether an error says that the server is away or busy, and not that the request is wrong.
pub(super) fn passes(error: &Error) -> bool {
    error.is_retryable()
        || matches!(
            error.kind(),
            ErrorKind::Unreachable
                | ErrorKind::Late
                | ErrorKind::HelloRequired
                | ErrorKind::Refused(CoreKind::Expired | CoreKind::Unavailable | CoreKind::Throttled | CoreKind::Full)
        )
}

impl Engine {
    /// An engine with nothing counted.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, tally: Tally::default() }
    }

    /// Serves one request.
    pub async fn serve(&mut self, request: &Request) -> anyhow::Result<()> {
        let shared = Arc::clone(&self.shared);
        let plan = &shared.plan;
        if plan.args.pace == PaceArg::Trace {
            tokio::time::sleep_until((shared.began + Duration::from_millis(request.at_ms)).into()).await;
        }
        let call = self.call(request);
        let keys: Vec<Bytes> = request.blocks.iter().map(|b| Bytes::copy_from_slice(b.key().as_bytes())).collect();
        let mut patience = Patience::new(plan.outage);
        let read = loop {
            match self.read(request, &keys, &call).await {
                Ok(read) => break read,
                Err(Halt::Away(e)) => patience.wait("read", e).await?,
                Err(Halt::Fatal(e)) => return Err(e),
            }
        };
        self.put_from(request, &keys, read.positions, &call).await?;
        if plan.is_kept(request.session) {
            self.keep(request, &keys, &call).await?;
        }
        // Failing is harmless: the lease ends by itself.
        let brief = call.clone().within(Duration::from_secs(1));
        if let Err(e) = shared.namespace.release(&[], std::slice::from_ref(&call.request_id), &brief).await {
            self.tally.error("release", &e);
        }
        self.count(request, &read);
        Ok(())
    }

    /// Puts the positions of a chain from one on, batch by batch, as far as they are worth trying.
    pub(super) async fn put_from(
        &mut self,
        request: &Request,
        keys: &[Bytes],
        first: usize,
        call: &Call,
    ) -> anyhow::Result<()> {
        let mut patience = Patience::new(self.shared.plan.outage);
        let mut done = first;
        while done < keys.len() {
            match self.put_batch(request, keys, done, call).await {
                Ok(0) => break,
                Ok(positions) => {
                    done += positions;
                    patience.since = None;
                }
                Err(Halt::Away(e)) => patience.wait("put", e).await?,
                Err(Halt::Fatal(e)) => return Err(e),
            }
        }
        Ok(())
    }

    fn call(&self, request: &Request) -> Call {
        let id = RequestId::new(&request.number.to_be_bytes()).expect("8 bytes are a request id");
        let info = RequestInfo {
            kind: request.kind,
            input_tokens: request.input_tokens,
            output_tokens: request.output_tokens,
            ..RequestInfo::default()
        };
        let trace_clock = self.shared.plan.args.policy_clock == PolicyClockArg::Trace;
        Call { info, policy_clock: trace_clock.then_some(kvkeep_core::Instant(request.at_ms)), ..Call::of(id) }
    }

    fn count(&mut self, request: &Request, read: &Read) {
        let live = &self.shared.live;
        let tokens: u64 = read.tokens.iter().map(|(t, _)| t).sum();
        self.tally.requests += 1;
        self.tally.input_tokens += u64::from(request.input_tokens);
        for (tokens, tier) in &read.tokens {
            self.tally.hit(*tokens, *tier);
        }
        Live::count(&live.requests, 1);
        Live::count(&live.input_tokens, u64::from(request.input_tokens));
        Live::count(&live.hit_tokens, tokens);
    }

    /// Notes a failure and says what it means.
    pub(super) fn halt(&mut self, verb: &'static str, error: Error) -> Halt {
        self.tally.error(verb, &error);
        if passes(&error) { Halt::Away(error) } else { Halt::Fatal(anyhow::Error::new(error).context(verb)) }
    }

    /// Matches the chain with a lease, and gets everything that the boundary needs.
    async fn read(&mut self, request: &Request, keys: &[Bytes], call: &Call) -> Result<Read, Halt> {
        let shared = Arc::clone(&self.shared);
        // A chain over the server's bound is matched as far as one call goes.
        let bound = shared.namespace.client().hello().limits.batch_keys_max.max(1);
        let query = MatchQuery::of(keys[..keys.len().min(bound)].to_vec()).leased(LEASE);
        let began = Instant::now();
        let found = shared.namespace.match_chain(&query, call).await.map_err(|e| self.halt("match", e))?;
        self.tally.match_latency.note(began.elapsed());
        let boundary = found.boundary_positions as usize;
        let mut read = Read::default();
        let step = shared.plan.positions_per_batch(shared.plan.args.get_batch_bytes);
        while read.positions < boundary {
            let from = read.positions;
            let to = boundary.min(from + step);
            self.get_batch(request, keys, from..to, &found, call, &mut read).await?;
            if read.positions < to {
                break;
            }
        }
        if read.positions < boundary && !shared.plan.prefixes_are_usable() {
            // Windows and states were read for the boundary that was promised; a smaller one needs others.
            read = Read::default();
        }
        Ok(read)
    }

    /// Gets positions and appends those that are whole and right, up to the first that is not.
    async fn get_batch(
        &mut self,
        request: &Request,
        keys: &[Bytes],
        range: std::ops::Range<usize>,
        found: &Match,
        call: &Call,
        read: &mut Read,
    ) -> Result<(), Halt> {
        let shared = Arc::clone(&self.shared);
        let plan = &shared.plan;
        let wanted: Vec<(usize, BlockName)> = range
            .clone()
            .flat_map(|i| {
                let id = request.blocks[i];
                plan.needed_parts(i as u32, found.boundary_positions)
                    .map(move |(group, shard)| (i, BlockName { id, group, shard }))
            })
            .collect();
        let items: Vec<_> = wanted.iter().map(|(i, b)| GetItem::part(keys[*i].clone(), b.group, b.shard)).collect();
        let began = Instant::now();
        let parts = shared.namespace.get(&items, found.lease_id(), call).await.map_err(|e| self.halt("get", e))?;
        self.tally.get_latency.note(began.elapsed());
        let mut whole = vec![true; range.len()];
        let mut slowest: Vec<Option<Tier>> = vec![None; range.len()];
        for ((i, block), part) in wanted.iter().zip(parts) {
            let at = i - range.start;
            if part.is_hit() {
                whole[at] &= self.verify(*block, &part.data);
                slowest[at] = slowest[at].max(part.tier);
            } else {
                whole[at] = false;
                self.tally.lost(part.reason.map_or(part.status.word(), |r| r.word()));
            }
            // Comparing megabytes takes milliseconds; the connection's task wants its turn.
            tokio::task::yield_now().await;
        }
        for (at, i) in range.enumerate() {
            if !whole[at] {
                break;
            }
            shared.live.note_hit(began);
            read.tokens.push((self.tokens_at(request, i), slowest[at]));
            read.positions += 1;
        }
        Ok(())
    }

    /// Tokens that position `i` covers: the last block of a request may be partly filled.
    fn tokens_at(&self, request: &Request, i: usize) -> u64 {
        let each = u64::from(self.shared.plan.tokens_per_block());
        u64::from(request.input_tokens).saturating_sub(i as u64 * each).min(each)
    }

    /// Compares every byte of a part.
    fn verify(&mut self, block: BlockName, data: &[u8]) -> bool {
        let seed = Seed::of(&block.id.key(), block.group, block.shard);
        let missing = self.shared.plan.part_bytes().abs_diff(data.len() as u64);
        let wrong = block_bytes::wrong_bytes(seed, data) + missing;
        self.tally.bytes_read += data.len() as u64;
        self.tally.bytes_verified += data.len() as u64;
        Live::count(&self.shared.live.bytes, data.len() as u64);
        if wrong > 0 {
            self.tally.bytes_wrong += wrong;
            self.tally.parts_wrong += 1;
            Live::count(&self.shared.live.bytes_wrong, wrong);
        }
        wrong == 0
    }

    /// Puts the next positions of the chain; answers how many it is done with, 0 where the rest is not worth trying.
    async fn put_batch(&mut self, request: &Request, keys: &[Bytes], from: usize, call: &Call) -> Result<usize, Halt> {
        let shared = Arc::clone(&self.shared);
        let plan = &shared.plan;
        let to = keys.len().min(from + plan.positions_per_batch(plan.args.put_batch_bytes));
        let class = plan.class(request.session);
        let positions: Vec<_> = (from..to).map(|i| position(plan, request.blocks[i], &keys[i], i as u32)).collect();
        let names: Vec<_> = (from..to)
            .flat_map(|i| {
                let id = request.blocks[i];
                plan.format.parts_at(i as u32).map(move |(group, shard)| BlockName { id, group, shard })
            })
            .collect();
        let put = Put {
            parent: from.checked_sub(1).map(|i| keys[i].clone()),
            first_position: from as u32,
            positions,
            class: Some(class),
            retention: plan.retention(),
            ..Put::default()
        };
        let began = Instant::now();
        let outcomes = shared.namespace.put(&put, call).await.map_err(|e| self.halt("put", e))?;
        self.tally.put_latency.note(began.elapsed());
        let mut refused = None;
        for (block, outcome) in names.iter().zip(outcomes) {
            match outcome {
                PartOutcome::Stored { version, class, degraded, .. } => {
                    self.tally.parts_stored += 1;
                    self.tally.bytes_written += plan.part_bytes();
                    self.tally.acknowledged_degraded += u64::from(degraded);
                    Live::count(&shared.live.bytes, plan.part_bytes());
                    if class == Class::Durable {
                        shared.ledger.note(*block, Some(version));
                    }
                }
                PartOutcome::AlreadyPresent { class, version, .. } => {
                    self.tally.parts_present += 1;
                    if class == Class::Durable {
                        shared.ledger.note(*block, version);
                    }
                }
                PartOutcome::InProgressElsewhere { .. } => self.tally.parts_in_progress += 1,
                PartOutcome::Refused(e) => {
                    self.tally.error("put", &e);
                    refused.get_or_insert(e);
                }
            }
        }
        match refused {
            None => Ok(to - from),
            Some(e) if !passes(&e) => Err(Halt::Fatal(anyhow::Error::new(e).context("put"))),
            // An engine that asked for no promise goes on without the block; one that did waits for room.
            Some(e) if busy(&e) && class == Class::Cache && plan.args.retention == RetentionArg::BestEffort => Ok(0),
            Some(e) => Err(Halt::Away(e)),
        }
    }
}

fn busy(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Refused(CoreKind::Throttled | CoreKind::Full))
}

/// A position with all of its parts' bytes.
fn position(plan: &Plan, id: PrefixId, key: &Bytes, index: u32) -> PutPosition {
    let name = id.key();
    let parts = plan.format.parts_at(index).map(|(group, shard)| PutPart {
        group,
        shard,
        data: block_bytes::block(Seed::of(&name, group, shard), plan.part_bytes() as usize),
    });
    PutPosition { key: key.clone(), parts: parts.collect(), token_ids: Vec::new() }
}

/// What became of the promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Checked {
    /// Blocks asked for.
    pub blocks_checked: u64,
    /// Of these, not there, or with wrong bytes.
    pub blocks_lost: u64,
    /// Of these, there and right under another version than was acknowledged.
    pub versions_changed: u64,
}

impl Engine {
    /// Asks for every promised block and compares every byte.
    pub async fn check_promises(&mut self) -> anyhow::Result<Checked> {
        let shared = Arc::clone(&self.shared);
        let plan = &shared.plan;
        let promises = shared.ledger.promises();
        let per_batch = usize::try_from(plan.args.get_batch_bytes.0 / plan.part_bytes()).unwrap_or(usize::MAX).max(1);
        let mut checked = Checked::default();
        for batch in promises.chunks(per_batch) {
            let one = self.read_back(batch.to_vec()).await?;
            checked.blocks_checked += one.blocks_checked;
            checked.blocks_lost += one.blocks_lost;
            checked.versions_changed += one.versions_changed;
        }
        Ok(checked)
    }

    /// Gets blocks in one call and compares every byte; those on their way are waited for.
    pub(super) async fn read_back(&mut self, mut open: Vec<(BlockName, Option<Version>)>) -> anyhow::Result<Checked> {
        let shared = Arc::clone(&self.shared);
        let mut checked = Checked::default();
        let mut patience = Patience::new(shared.plan.outage);
        while !open.is_empty() {
            let items: Vec<_> = open
                .iter()
                .map(|(b, _)| GetItem::part(Bytes::copy_from_slice(b.id.key().as_bytes()), b.group, b.shard))
                .collect();
            let parts = match shared.namespace.get(&items, None, &Call::default()).await {
                Ok(parts) => parts,
                Err(e) if passes(&e) => {
                    self.tally.error("check", &e);
                    patience.wait("check", e).await?;
                    continue;
                }
                Err(e) => bail!(anyhow::Error::new(e).context("check")),
            };
            let mut again = Vec::new();
            for ((block, version), part) in open.into_iter().zip(parts) {
                use kvkeep_core::{MissReason, PartStatus};
                let later = matches!(part.status, PartStatus::Loading | PartStatus::Pending | PartStatus::Throttled)
                    || matches!(part.reason, Some(MissReason::Late));
                if !part.is_hit() && later && patience.since.is_none_or(|s| s.elapsed() < patience.bound) {
                    again.push((block, version));
                    continue;
                }
                checked.blocks_checked += 1;
                if part.is_hit() && self.verify(block, &part.data) {
                    checked.versions_changed += u64::from(version.is_some() && part.version != version);
                } else {
                    checked.blocks_lost += 1;
                    self.tally.lost(part.reason.map_or(part.status.word(), |r| r.word()));
                }
                // As above: comparing takes milliseconds.
                tokio::task::yield_now().await;
            }
            open = again;
            if !open.is_empty() {
                patience.since.get_or_insert_with(Instant::now);
                tokio::time::sleep(OUTAGE_PAUSE).await;
            }
        }
        Ok(checked)
    }
}
