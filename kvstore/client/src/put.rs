//! `put`: reserve, write, commit. Reserve says what is needed before bytes are sent; bytes then stream straight from the
//! caller's buffers, and their checksums are made on the way.

mod chunks;

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ids::{GroupId, ShardId, Version};
use kvkeep_core::{Class, ErrorKind as CoreKind, Tier};
use kvkeep_proto::v1;
use kvkeep_proto::v1::part_answer::Answer;

use self::chunks::{CHUNK_BYTES, Chunks, PartSums};
use crate::call::Call;
use crate::client::{Safety, Tries};
use crate::connection::blocks;
use crate::convert::{self, Retention};
use crate::error::{Error, ErrorKind, Result};
use crate::namespace::Namespace;

/// Time that giving reservations back may take after a put failed; the server frees them by itself in the end.
const RELEASE_TIME: Duration = Duration::from_millis(500);

/// Positions to store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Put {
    /// Key of the position before the first one; `None`: the chain starts here.
    pub parent: Option<Bytes>,
    /// Index of the first position in its chain.
    pub first_position: u32,
    /// In chain order, unless `unordered`.
    pub positions: Vec<PutPosition>,
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

/// One position and the parts of it that this caller has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutPosition {
    /// Its key.
    pub key: Bytes,
    /// The parts.
    pub parts: Vec<PutPart>,
    /// Its tokens, told to watchers; may be empty.
    pub token_ids: Vec<u32>,
}

/// One part and its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutPart {
    /// Which group of the format.
    pub group: GroupId,
    /// Which shard of the group.
    pub shard: ShardId,
    /// The bytes; not copied before they are framed.
    pub data: Bytes,
}

impl PutPosition {
    /// A position with one part: group 0, shard 0.
    pub fn of(key: Bytes, data: Bytes) -> Self {
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
                    length: p.data.len() as u64,
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
struct Slot {
    /// Its place among the answers of this step.
    outcome: usize,
    reservation_id: u64,
    /// `None`: an upgrade, for which no bytes are sent.
    data: Option<Bytes>,
}

impl Namespace {
    /// Stores positions. Answers one outcome per part, in the order of positions and their parts. An error means that
    /// nothing was stored by this call; where some was, the rest is [`PartOutcome::Refused`].
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
                Err(e) if done == 0 => return Err(e),
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
        let granted = reply.granted_positions as usize;
        if granted == 0 {
            return Err(Error::from_detail(convert::error_to_proto(
                &kvkeep_core::Error::new(CoreKind::Throttled, "the server granted no position of the put")
                    .with("positions", asked.len()),
            )));
        }
        let positions = put.positions[asked]
            .get(..granted)
            .ok_or_else(|| Error::protocol("reserve grants more positions than were asked").with("granted", granted))?;
        let parts: Vec<&PutPart> = positions.iter().flat_map(|p| &p.parts).collect();
        if reply.answers.len() != parts.len() {
            return Err(Error::protocol("reserve answers for another number of parts than it granted")
                .with("parts", parts.len())
                .with("answers", reply.answers.len()));
        }
        let mut outcomes = Vec::with_capacity(parts.len());
        let mut slots = Vec::new();
        for (part, answer) in parts.iter().zip(reply.answers) {
            let (outcome, slot) = read_answer(outcomes.len(), part, answer)?;
            reservations.extend(slot.as_ref().map(|s| s.reservation_id));
            slots.extend(slot);
            outcomes.push(outcome);
        }
        if slots.is_empty() {
            return Ok((granted, outcomes));
        }
        let sums = self.write(&mut slots, &mut outcomes, tries).await?;
        self.commit(&slots, sums, &mut outcomes, tries, call).await?;
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
        let parent = match asked.start {
            0 => put.parent.clone(),
            _ if put.unordered => None,
            n => Some(put.positions[n - 1].key.clone()),
        };
        let positions: Vec<_> = put.positions[asked.clone()].iter().map(PutPosition::to_proto).collect();
        self.client
            .shared
            .once(
                "reserve",
                tries,
                call,
                |ctx| v1::ReserveRequest {
                    ctx: Some(ctx),
                    handle: self.wire_handle(),
                    parent_key: parent.clone().unwrap_or_default(),
                    first_position: put.first_position.saturating_add(asked.start as u32),
                    positions: positions.clone(),
                    unordered: put.unordered,
                    class: convert::class_to_proto(put.class.unwrap_or(Class::Cache)),
                    fidelity: v1::Fidelity::Exact as i32,
                    retention: convert::retention_to_proto(put.retention),
                    bytes_max: 0,
                    ttl_ms: put.ttl.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
                    priority: put.priority,
                },
                |wire, r| async move { blocks(wire).reserve(r).await },
            )
            .await
    }

    /// Streams the bytes of every slot; those that the server refused leave `slots` and are told in `outcomes`. Answers
    /// the sums of each slot that has bytes, in the order they were sent.
    async fn write(&self, slots: &mut Vec<Slot>, outcomes: &mut [PartOutcome], tries: &Tries<'_>) -> Result<PartSums> {
        const VERB: &str = "write";
        let sent: Vec<(u64, Bytes)> =
            slots.iter().filter_map(|s| s.data.clone().map(|data| (s.reservation_id, data))).collect();
        if sent.is_empty() {
            return Ok(Vec::new());
        }
        let chunk_bytes = CHUNK_BYTES.min(self.client.hello().limits.chunk_bytes_max);
        let (chunks, sums) = Chunks::new(sent, chunk_bytes);
        let line = self.client.shared.line(tries.left(VERB)?).await?;
        let left = tries.left(VERB)?;
        let mut request = tonic::Request::new(tokio_stream::iter(chunks));
        request.set_timeout(left);
        let reply = match tokio::time::timeout(left, blocks(line.wire.clone()).write(request)).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) => return Err(line.judge(VERB, status)),
            Err(_) => return Err(Error::late(VERB)),
        };
        let mut results: HashMap<u64, v1::WriteResult> =
            reply.results.into_iter().map(|r| (r.reservation_id, r)).collect();
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
        match sums.await {
            Ok(sums) => Ok(sums),
            // The server answered before it had taken everything: only right where it refused what it did not take.
            Err(_) if slots.iter().all(|s| s.data.is_none()) => Ok(Vec::new()),
            Err(_) => Err(Error::protocol("write was answered before everything was sent")),
        }
    }

    async fn commit(
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
            .once(
                "commit",
                tries,
                call,
                |ctx| v1::CommitRequest { ctx: Some(ctx), parts: parts.clone() },
                |wire, r| async move { blocks(wire).commit(r).await },
            )
            .await?;
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
}

/// What reserve said of a part: its outcome if that is settled, else a slot (the outcome is then replaced later).
fn read_answer(outcome: usize, part: &PutPart, answer: v1::PartAnswer) -> Result<(PartOutcome, Option<Slot>)> {
    let pending = || PartOutcome::Refused(Error::protocol("the part was never committed"));
    let slot = |id: u64, data: Option<Bytes>| match id {
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
