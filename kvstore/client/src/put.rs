//! `put`: reserve, write, commit. Reserve says what is needed before bytes are sent; bytes then stream straight from the
//! caller's buffers, and their checksums are made on the way.

mod chunks;

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::checksum::RunningSums;
use kvkeep_core::ids::{GroupId, ShardId, Version};
use kvkeep_core::{Class, ErrorKind as CoreKind, Tier};
use kvkeep_proto::v1;
use kvkeep_proto::v1::envelope::Message;
use kvkeep_proto::v1::part_answer::Answer;

use self::chunks::{CHUNK_BYTES, Chunks, PartSums};
use crate::block::pool::Lent;
use crate::call::Call;
use crate::client::{Safety, Tries};
use crate::connection::blocks;
use crate::convert::{self, Retention};
use crate::error::{Error, ErrorKind, Result};
use crate::hot::{Asked, Line};
use crate::namespace::Namespace;
use crate::region::Place;

/// Time that giving reservations back may take after a put failed; the server frees them by itself in the end.
const RELEASE_TIME: Duration = Duration::from_millis(500);

/// What the bytes of a part are: [`Bytes`], or a [`Place`] in a region.
pub trait PutData {
    /// How many there are.
    fn byte_count(&self) -> u64;
}

impl PutData for Bytes {
    fn byte_count(&self) -> u64 {
        self.len() as u64
    }
}

impl PutData for Place {
    fn byte_count(&self) -> u64 {
        self.len()
    }
}

/// Positions to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put<D = Bytes> {
    /// Key of the position before the first one; `None`: the chain starts here.
    pub parent: Option<Bytes>,
    /// Index of the first position in its chain.
    pub first_position: u32,
    /// In chain order, unless `unordered`.
    pub positions: Vec<PutPosition<D>>,
    /// What the acknowledgement promises; `None`: cache.
    pub class: Option<Class>,
    /// What to do where a tier is full.
    pub retention: Retention,
    /// No chain: each key stands alone for the policy.
    pub unordered: bool,
    /// Time to live; `None`: none.
    pub ttl: Option<Duration>,
    /// Higher stays longer.
    pub priority: i32,
}

impl<D> Default for Put<D> {
    fn default() -> Self {
        Self {
            parent: None,
            first_position: 0,
            positions: Vec::new(),
            class: None,
            retention: Retention::default(),
            unordered: false,
            ttl: None,
            priority: 0,
        }
    }
}

impl Put<Place> {
    /// The positions from `done` on with their bytes copied out of their regions.
    pub(crate) fn copied_from(&self, done: usize) -> Put {
        let part = |p: &PutPart<Place>| PutPart { group: p.group, shard: p.shard, data: p.data.copy_out() };
        let position = |p: &PutPosition<Place>| PutPosition {
            key: p.key.clone(),
            parts: p.parts.iter().map(part).collect(),
            token_ids: p.token_ids.clone(),
        };
        let parent = match done.checked_sub(1) {
            None => self.parent.clone(),
            Some(_) if self.unordered => None,
            Some(last) => Some(self.positions[last].key.clone()),
        };
        Put {
            parent,
            first_position: self.first_position.saturating_add(done as u32),
            positions: self.positions[done..].iter().map(position).collect(),
            class: self.class,
            retention: self.retention,
            unordered: self.unordered,
            ttl: self.ttl,
            priority: self.priority,
        }
    }
}

/// One position and the parts of it that this caller has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutPosition<D = Bytes> {
    /// Its key.
    pub key: Bytes,
    /// The parts.
    pub parts: Vec<PutPart<D>>,
    /// Its tokens, told to watchers; may be empty.
    pub token_ids: Vec<u32>,
}

/// One part and its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutPart<D = Bytes> {
    /// Which group of the format.
    pub group: GroupId,
    /// Which shard of the group.
    pub shard: ShardId,
    /// The bytes; not copied before they are framed.
    pub data: D,
}

impl<D> Default for PutPosition<D> {
    fn default() -> Self {
        Self { key: Bytes::new(), parts: Vec::new(), token_ids: Vec::new() }
    }
}

impl<D: PutData> PutPosition<D> {
    /// A position with one part: group 0, shard 0.
    pub fn of(key: Bytes, data: D) -> Self {
        Self { key, parts: vec![PutPart { group: GroupId(0), shard: ShardId(0), data }], token_ids: Vec::new() }
    }

    fn to_proto(&self) -> v1::PutPosition {
        v1::PutPosition {
            key: self.key.clone(),
            parts: self
                .parts
                .iter()
                .map(|p| v1::PutPart {
                    group: u32::from(p.group.0),
                    shard: u32::from(p.shard.0),
                    length: p.data.byte_count(),
                })
                .collect(),
            token_ids: self.token_ids.clone(),
        }
    }
}

/// What became of one part.
#[derive(Clone, Debug)]
pub enum PartOutcome {
    /// Its bytes are stored and acknowledged.
    Stored {
        /// Drawn at commit.
        version: Version,
        /// Reached.
        class: Class,
        /// The acknowledgement stands on so many copies.
        copies: u32,
        /// The class asks for so many.
        copies_wanted: u32,
        /// Fewer copies than the class asks for.
        degraded: bool,
    },
    /// Somebody stored it before; those bytes are kept.
    AlreadyPresent {
        /// Where, if known.
        tier: Option<Tier>,
        /// Of the bytes that are kept.
        class: Class,
        /// Of the bytes that are kept.
        version: Option<Version>,
    },
    /// Another caller is writing it.
    InProgressElsewhere {
        /// When to look again.
        retry_after: Duration,
    },
    /// Not stored, and why.
    Refused(Error),
}

impl PartOutcome {
    /// Whether the store has the part at the class asked for.
    pub fn is_kept(&self) -> bool {
        matches!(self, Self::Stored { .. } | Self::AlreadyPresent { .. })
    }
}

/// A part that has to be committed.
struct Slot<D = Bytes> {
    /// Its place among the answers of this step.
    outcome: usize,
    reservation_id: u64,
    /// `None`: an upgrade, for which no bytes are sent.
    data: Option<D>,
}

impl Namespace {
    /// Stores positions. Answers one outcome per part, in the order of positions and their parts. An error means that
    /// nothing was stored by this call; where some was, the rest is [`PartOutcome::Refused`]. So is all of it when the server
    /// was lost, unless [`crate::config::Lost::Errors`] is configured.
    pub async fn put(&self, put: &Put, call: &Call) -> Result<Vec<PartOutcome>> {
        let parts = put.positions.iter().map(|p| p.parts.len()).sum();
        let mut outcomes = Vec::with_capacity(parts);
        let mut leases = Vec::new();
        let mut tries = self.client.shared.begin(call);
        let mut done = 0;
        while done < put.positions.len() {
            let asked = done..put.positions.len().min(done + self.batch());
            match self.put_prefix(put, asked, &mut tries, call, &mut leases).await {
                Ok((positions, some)) => {
                    done += positions;
                    outcomes.extend(some);
                }
                Err(e) if done == 0 => {
                    self.client.shared.miss(e.clone())?;
                    outcomes.resize(parts, PartOutcome::Refused(e));
                    break;
                }
                Err(e) => {
                    outcomes.resize(parts, PartOutcome::Refused(e));
                    break;
                }
            }
        }
        if !leases.is_empty() {
            // They held what was present already while this call went on. Failing is harmless: they expire.
            let brief = call.clone().within(RELEASE_TIME);
            let _ = self.client.shared.release(leases, Vec::new(), Vec::new(), &brief).await;
        }
        Ok(outcomes)
    }

    /// Puts a prefix of `asked`, as much as the server grants; tries the whole step again where that helps, which is safe:
    /// what a lost try did store is then present.
    async fn put_prefix(
        &self,
        put: &Put,
        asked: Range<usize>,
        tries: &mut Tries<'_>,
        call: &Call,
        leases: &mut Vec<u64>,
    ) -> Result<(usize, Vec<PartOutcome>)> {
        loop {
            let mut reservations = Vec::new();
            let e = match self.put_once(put, asked.clone(), tries, call, leases, &mut reservations).await {
                Ok(done) => return Ok(done),
                Err(e) => e,
            };
            if !reservations.is_empty() {
                let brief = call.clone().within(RELEASE_TIME);
                let _ = self.client.shared.release(Vec::new(), reservations, Vec::new(), &brief).await;
            }
            tries.again(e, Safety::Repeatable).await?;
        }
    }

    async fn put_once(
        &self,
        put: &Put,
        asked: Range<usize>,
        tries: &Tries<'_>,
        call: &Call,
        leases: &mut Vec<u64>,
        reservations: &mut Vec<u64>,
    ) -> Result<(usize, Vec<PartOutcome>)> {
        let reply = self.reserve(put, &asked, tries, call).await?;
        leases.extend((reply.lease_id != 0).then_some(reply.lease_id));
        let (granted, mut outcomes, mut slots) = read_reserve(&put.positions[asked], reply)?;
        reservations.extend(slots.iter().map(|s| s.reservation_id));
        if slots.is_empty() {
            return Ok((granted, outcomes));
        }
        match self.client.shared.hot_line().await? {
            Line::Block(lent) => self.send_block(lent, slots, &mut outcomes, tries, call).await?,
            Line::Grpc => {
                let sums = self.write_grpc(&mut slots, &mut outcomes, tries).await?;
                self.commit_grpc(&slots, sums, &mut outcomes, tries, call).await?;
            }
        }
        reservations.clear();
        Ok((granted, outcomes))
    }

    async fn reserve(
        &self,
        put: &Put,
        asked: &Range<usize>,
        tries: &Tries<'_>,
        call: &Call,
    ) -> Result<v1::ReserveReply> {
        self.client
            .shared
            .hot_once(
                "reserve",
                tries,
                call,
                |ctx| self.reserve_request(put, asked, ctx),
                |wire, r| async move { blocks(wire).reserve(r).await },
            )
            .await
    }

    /// What reserve is asked for some positions of a put.
    pub(crate) fn reserve_request<D: PutData>(
        &self,
        put: &Put<D>,
        asked: &Range<usize>,
        ctx: v1::CallContext,
    ) -> v1::ReserveRequest {
        let parent = match asked.start {
            0 => put.parent.clone(),
            _ if put.unordered => None,
            n => Some(put.positions[n - 1].key.clone()),
        };
        v1::ReserveRequest {
            ctx: Some(ctx),
            handle: self.wire_handle(),
            parent_key: parent.unwrap_or_default(),
            first_position: put.first_position.saturating_add(asked.start as u32),
            positions: put.positions[asked.clone()].iter().map(PutPosition::to_proto).collect(),
            unordered: put.unordered,
            class: convert::class_to_proto(put.class.unwrap_or(Class::Cache)),
            fidelity: v1::Fidelity::Exact as i32,
            retention: convert::retention_to_proto(put.retention),
            bytes_max: 0,
            ttl_ms: put.ttl.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            priority: put.priority,
        }
    }

    /// Reads both halves of an answered [`Self::put_from`]: positions granted, and an outcome per part.
    pub(crate) fn read_put_from(
        &self,
        put: &Put<Place>,
        asked: &Range<usize>,
        reserved: v1::ReserveReply,
        results: Vec<v1::CommitResult>,
    ) -> Result<(usize, Vec<PartOutcome>)> {
        let (granted, mut outcomes, slots) = read_reserve(&put.positions[asked.clone()], reserved)?;
        if results.len() != slots.len() || results.iter().zip(&slots).any(|(r, s)| r.reservation_id != s.reservation_id)
        {
            return Err(Error::protocol("put_from commits other reservations than it made"));
        }
        for (result, slot) in results.into_iter().zip(slots) {
            outcomes[slot.outcome] = read_result(result)?;
        }
        Ok((granted, outcomes))
    }

    /// Streams the bytes of every slot; those that the server refused leave `slots` and are told in `outcomes`. Answers
    /// the sums of each slot that has bytes, in the order they were sent.
    async fn write_grpc(
        &self,
        slots: &mut Vec<Slot>,
        outcomes: &mut [PartOutcome],
        tries: &Tries<'_>,
    ) -> Result<PartSums> {
        const VERB: &str = "write";
        let sent: Vec<(u64, Bytes)> =
            slots.iter().filter_map(|s| s.data.clone().map(|data| (s.reservation_id, data))).collect();
        if sent.is_empty() {
            return Ok(Vec::new());
        }
        let shared = &self.client.shared;
        let (chunks, sums) = Chunks::new(sent, self.chunk_bytes());
        let line = shared.line(tries.left(VERB)?).await?;
        let left = tries.left(VERB)?;
        let mut request = tonic::Request::new(tokio_stream::iter(chunks));
        request.set_timeout(left);
        let reply = match tokio::time::timeout(left, blocks(line.wire.clone()).write(request)).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) => return Err(line.judge(VERB, status)),
            Err(_) => return Err(Error::late(VERB)),
        };
        drop_unwritten(slots, reply, outcomes);
        match sums.await {
            Ok(sums) => Ok(sums),
            // The server answered before it had taken everything: only right where it refused what it did not take.
            Err(_) if slots.iter().all(|s| s.data.is_none()) => Ok(Vec::new()),
            Err(_) => Err(Error::protocol("write was answered before everything was sent")),
        }
    }

    fn chunk_bytes(&self) -> usize {
        CHUNK_BYTES.min(self.client.shared.hello().limits.chunk_bytes_max)
    }

    /// Writes and commits on one connection. Bytes go from the caller's buffers to the socket, each summed just before. The
    /// commit follows the last of them at once: what was not written whole the server does not commit.
    async fn send_block(
        &self,
        mut lent: Lent<'_>,
        mut slots: Vec<Slot>,
        outcomes: &mut [PartOutcome],
        tries: &Tries<'_>,
        call: &Call,
    ) -> Result<()> {
        const VERB: &str = "write";
        let shared = &self.client.shared;
        let patience = shared.config.patience;
        let (left, chunk_bytes) = (tries.left(VERB)?, self.chunk_bytes());
        let conn = lent.conn();
        let (write, commit) = (conn.next_call(), conn.next_call());
        let frame = |call, end, message| v1::Envelope { call, end, message: Some(message), ..Default::default() };
        let sending = async {
            let mut parts = Vec::with_capacity(slots.len());
            for Slot { reservation_id, data, .. } in &slots {
                let (mut sums, mut offset) = (RunningSums::default(), 0);
                for chunk in data.iter().flat_map(|data| data.chunks(chunk_bytes)) {
                    let wish = v1::WriteRequest { reservation_id: *reservation_id, offset, data: Bytes::new() };
                    // Just before they go: they are in the cache then, and the server takes in the chunk before.
                    sums.add(chunk);
                    conn.send(VERB, frame(write, false, Message::Write(wish)), chunk, None, patience).await?;
                    offset += chunk.len() as u64;
                }
                let crc32 = sums.finish().as_slice().to_vec();
                parts.push(v1::CommitPart { reservation_id: *reservation_id, crc32 });
            }
            let writes = slots.iter().any(|slot| slot.data.is_some());
            if writes {
                let end = frame(write, true, Message::Write(v1::WriteRequest::default()));
                conn.send(VERB, end, &[], None, patience).await?;
            }
            let request = v1::CommitRequest { ctx: Some(call.to_proto(left)), parts };
            conn.send("commit", frame(commit, true, Message::Commit(request)), &[], None, patience).await?;
            let written = match writes {
                false => v1::WriteReply::default(),
                true => match conn.answer(VERB, write, patience).await? {
                    Message::WriteReply(reply) => reply,
                    _ => return Err(Error::protocol("write was answered with something else")),
                },
            };
            match conn.answer("commit", commit, patience).await? {
                Message::CommitReply(reply) => Ok((written, reply)),
                _ => Err(Error::protocol("commit was answered with something else")),
            }
        };
        let answer = tokio::time::timeout(left, sending).await.unwrap_or_else(|_| Err(Error::late(VERB)));
        // Never another connection behind the caller's back: what was sent on this one may have landed.
        let (written, committed) = shared.block_answered(lent, false, answer).map_err(Asked::into_error)?;
        read_commit(&slots, committed, outcomes)?;
        // Why it was not written says more than that it is not committed therefore.
        drop_unwritten(&mut slots, written, outcomes);
        Ok(())
    }

    async fn commit_grpc(
        &self,
        slots: &[Slot],
        sums: PartSums,
        outcomes: &mut [PartOutcome],
        tries: &Tries<'_>,
        call: &Call,
    ) -> Result<()> {
        if slots.is_empty() {
            return Ok(());
        }
        let mut sums: HashMap<u64, Vec<u32>> = sums.into_iter().collect();
        let parts: Vec<_> = slots
            .iter()
            .map(|slot| v1::CommitPart {
                reservation_id: slot.reservation_id,
                crc32: sums.remove(&slot.reservation_id).unwrap_or_default(),
            })
            .collect();
        let reply = self
            .client
            .shared
            .hot_once(
                "commit",
                tries,
                call,
                |ctx| v1::CommitRequest { ctx: Some(ctx), parts: parts.clone() },
                |wire, r| async move { blocks(wire).commit(r).await },
            )
            .await?;
        read_commit(slots, reply, outcomes)
    }
}

/// Reads the answer to the commit of these slots.
fn read_commit(slots: &[Slot], reply: v1::CommitReply, outcomes: &mut [PartOutcome]) -> Result<()> {
    if reply.results.len() != slots.len()
        || reply.results.iter().zip(slots).any(|(r, s)| r.reservation_id != s.reservation_id)
    {
        return Err(Error::protocol("commit answers for other reservations than were asked"));
    }
    for (result, slot) in reply.results.into_iter().zip(slots) {
        outcomes[slot.outcome] = read_result(result)?;
    }
    Ok(())
}

/// Reads the answer to a write: slots that did not take all their bytes leave `slots` and are told in `outcomes`.
fn drop_unwritten(slots: &mut Vec<Slot>, reply: v1::WriteReply, outcomes: &mut [PartOutcome]) {
    let mut results: HashMap<u64, v1::WriteResult> = reply.results.into_iter().map(|r| (r.reservation_id, r)).collect();
    slots.retain(|slot| {
        let Some(data) = &slot.data else { return true };
        let refused = match results.remove(&slot.reservation_id) {
            None => Error::protocol("write does not answer for a reservation"),
            Some(v1::WriteResult { error: Some(detail), .. }) => Error::from_detail(detail),
            Some(r) if r.bytes == data.len() as u64 => return true,
            Some(r) => {
                Error::protocol("not all bytes of a part landed").with("sent", data.len()).with("landed", r.bytes)
            }
        };
        outcomes[slot.outcome] = PartOutcome::Refused(refused);
        false
    });
}

/// What reserve said of some positions: how many it granted, and per part of those an outcome, and a slot where it has to be
/// committed.
fn read_reserve<D: Clone>(
    asked: &[PutPosition<D>],
    reply: v1::ReserveReply,
) -> Result<(usize, Vec<PartOutcome>, Vec<Slot<D>>)> {
    let granted = reply.granted_positions as usize;
    if granted == 0 {
        return Err(Error::from_detail(convert::error_to_proto(
            &kvkeep_core::Error::new(CoreKind::Throttled, "the server granted no position of the put")
                .with("positions", asked.len()),
        )));
    }
    let positions = asked
        .get(..granted)
        .ok_or_else(|| Error::protocol("reserve grants more positions than were asked").with("granted", granted))?;
    let parts: Vec<&PutPart<D>> = positions.iter().flat_map(|p| &p.parts).collect();
    if reply.answers.len() != parts.len() {
        return Err(Error::protocol("reserve answers for another number of parts than it granted")
            .with("parts", parts.len())
            .with("answers", reply.answers.len()));
    }
    let mut outcomes = Vec::with_capacity(parts.len());
    let mut slots = Vec::new();
    for (part, answer) in parts.iter().zip(reply.answers) {
        let (outcome, slot) = read_answer(outcomes.len(), part, answer)?;
        slots.extend(slot);
        outcomes.push(outcome);
    }
    Ok((granted, outcomes, slots))
}

/// What reserve said of a part: its outcome if that is settled, else a slot (the outcome is then replaced later).
fn read_answer<D: Clone>(
    outcome: usize,
    part: &PutPart<D>,
    answer: v1::PartAnswer,
) -> Result<(PartOutcome, Option<Slot<D>>)> {
    let pending = || PartOutcome::Refused(Error::protocol("the part was never committed"));
    let slot = |id: u64, data: Option<D>| match id {
        0 => Err(Error::protocol("a slot without a reservation")),
        reservation_id => Ok(Some(Slot { outcome, reservation_id, data })),
    };
    Ok(match answer.answer {
        Some(Answer::Present(p)) => (
            PartOutcome::AlreadyPresent {
                tier: convert::tier_opt_from_proto(p.tier),
                class: convert::class_from_proto(p.class)?,
                version: convert::version_from_proto(p.version),
            },
            None,
        ),
        Some(Answer::InProgress(p)) => {
            (PartOutcome::InProgressElsewhere { retry_after: Duration::from_millis(u64::from(p.retry_after_ms)) }, None)
        }
        Some(Answer::Refused(detail)) => (PartOutcome::Refused(Error::from_detail(detail)), None),
        Some(Answer::Slot(s)) => (pending(), slot(s.reservation_id, Some(part.data.clone()))?),
        Some(Answer::Upgrade(s)) => (pending(), slot(s.reservation_id, None)?),
        None => return Err(Error::new(ErrorKind::Protocol, "reserve left a part without an answer")),
    })
}

fn read_result(result: v1::CommitResult) -> Result<PartOutcome> {
    if let Some(detail) = result.error {
        return Ok(PartOutcome::Refused(Error::from_detail(detail)));
    }
    let class = convert::class_from_proto(result.class)?;
    let version = convert::version_from_proto(result.version);
    Ok(match (result.superseded, version) {
        (true, version) => PartOutcome::AlreadyPresent { tier: None, class, version },
        (false, Some(version)) => PartOutcome::Stored {
            version,
            class,
            copies: result.copies,
            copies_wanted: result.copies_wanted,
            degraded: result.degraded,
        },
        (false, None) => return Err(Error::protocol("a committed part has no version")),
    })
}
