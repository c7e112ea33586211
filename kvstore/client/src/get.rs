//! `get`: bytes out of the store, into memory of their own or straight into the caller's buffers.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use kvkeep_core::ids::{GroupId, LeaseId, ShardId, Version};
use kvkeep_core::{Fidelity, MissReason, PartStatus, Tier};
use kvkeep_proto::v1;
use kvkeep_proto::v1::envelope::Message;

use crate::assembly::{Admitted, Assembly, Bounds, Landing, Lent, Owned, Room};
use crate::block::conn::Conn;
use crate::call::Call;
use crate::client::{Safety, Tries, count};
use crate::connection::blocks;
use crate::convert;
use crate::error::{Error, ErrorKind, Result};
use crate::hot::{Asked, Line};
use crate::namespace::Namespace;

/// Data that we ask for in one chunk, bytes: one HTTP/2 frame; parts up to this size arrive without being copied together.
const CHUNK_BYTES: usize = 1 << 20;

/// One part, or a range of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetItem {
    /// Of its position.
    pub key: Bytes,
    /// Which group of the format.
    pub group: GroupId,
    /// Which shard of the group.
    pub shard: ShardId,
    /// First byte within the part.
    pub offset: u64,
    /// Bytes from there; 0: to the part's end.
    pub length: u64,
    /// Only this version (the rest of a range that was read before); `None`: any.
    pub version: Option<Version>,
}

impl GetItem {
    /// The whole part of group 0, shard 0.
    pub fn of(key: Bytes) -> Self {
        Self::part(key, GroupId(0), ShardId(0))
    }

    /// A whole part.
    pub fn part(key: Bytes, group: GroupId, shard: ShardId) -> Self {
        Self { key, group, shard, offset: 0, length: 0, version: None }
    }

    pub(crate) fn to_proto(&self) -> v1::GetItem {
        v1::GetItem {
            key: self.key.clone(),
            group: u32::from(self.group.0),
            shard: u32::from(self.shard.0),
            offset: self.offset,
            length: self.length,
            version: convert::version_to_proto(self.version),
        }
    }
}

/// What is known of an item beside its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) status: PartStatus,
    pub(crate) reason: Option<MissReason>,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) part_bytes: u64,
    pub(crate) version: Option<Version>,
    pub(crate) tier: Option<Tier>,
    pub(crate) fidelity: Fidelity,
    pub(crate) sums_ok: bool,
}

impl Header {
    pub(crate) fn miss(reason: MissReason) -> Self {
        Self {
            status: PartStatus::Miss,
            reason: Some(reason),
            retry_after: None,
            part_bytes: 0,
            version: None,
            tier: None,
            fidelity: Fidelity::Exact,
            sums_ok: false,
        }
    }

    /// What an answer without data says of an item.
    pub(crate) fn from_proto(reply: &v1::GetReply) -> Result<Self> {
        // A status that this version does not know is no hit.
        let status = convert::status_from_proto(reply.status).unwrap_or(PartStatus::Miss);
        let version = convert::version_from_proto(reply.version);
        if status == PartStatus::Hit && (version.is_none() || reply.part_bytes == 0) {
            return Err(Error::protocol("a part without a version, or of no size"));
        }
        let fidelity = convert::fidelity_from_proto(reply.fidelity).unwrap_or(Fidelity::Near);
        if status == PartStatus::Hit && fidelity != Fidelity::Exact {
            return Ok(Self::miss(MissReason::Format));
        }
        Ok(Self {
            status,
            reason: convert::reason_opt_from_proto(reply.reason),
            retry_after: convert::millis_from_proto(reply.retry_after_ms),
            part_bytes: reply.part_bytes,
            version: version.filter(|_| status == PartStatus::Hit),
            tier: convert::tier_opt_from_proto(reply.tier),
            fidelity,
            sums_ok: false,
        })
    }
}

/// One item of an answered get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GotPart {
    /// A hit, or why there are no bytes.
    pub status: PartStatus,
    /// Why it is no hit.
    pub reason: Option<MissReason>,
    /// When to ask again, where the server named a time.
    pub retry_after: Option<Duration>,
    /// The bytes asked for; empty unless a hit. They may share memory with the parts that arrived beside them: copy what is
    /// small and kept for long.
    pub data: Bytes,
    /// Size of the whole part, bytes.
    pub part_bytes: u64,
    /// Of the put that made the bytes.
    pub version: Option<Version>,
    /// Where it was found.
    pub tier: Option<Tier>,
    /// Whether the bytes are those of the put.
    pub fidelity: Fidelity,
    /// The whole part was compared with its checksums here. `false` for a hit on a range: then the 64 KiB chunks that lie
    /// whole in the range were compared here, and the server vouches for the ends.
    pub sums_ok: bool,
}

impl GotPart {
    /// Whether `data` is what was put.
    pub fn is_hit(&self) -> bool {
        self.status == PartStatus::Hit
    }

    fn new(h: Header, data: Bytes) -> Self {
        Self {
            status: h.status,
            reason: h.reason,
            retry_after: h.retry_after,
            data,
            part_bytes: h.part_bytes,
            version: h.version,
            tier: h.tier,
            fidelity: h.fidelity,
            sums_ok: h.sums_ok,
        }
    }
}

/// One item of an answered [`Namespace::get_into`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GotInto {
    /// A hit, or why the buffer holds nothing. What a buffer holds after anything but a hit is undefined.
    pub status: PartStatus,
    /// Why it is no hit.
    pub reason: Option<MissReason>,
    /// When to ask again, where the server named a time.
    pub retry_after: Option<Duration>,
    /// Bytes at the start of the buffer.
    pub len: usize,
    /// Size of the whole part, bytes.
    pub part_bytes: u64,
    /// Of the put that made the bytes.
    pub version: Option<Version>,
    /// Where it was found.
    pub tier: Option<Tier>,
    /// As in [`GotPart`].
    pub sums_ok: bool,
    /// The call was given up while the server was copying: what the place holds may still change, see [`crate::region`].
    /// Never for a hit, and never for a buffer.
    pub in_doubt: bool,
}

impl GotInto {
    pub(crate) fn new(h: Header, item: &GetItem) -> Self {
        Self {
            status: h.status,
            reason: h.reason,
            retry_after: h.retry_after,
            len: match h.status {
                PartStatus::Hit if item.length == 0 => h.part_bytes.saturating_sub(item.offset) as usize,
                PartStatus::Hit => item.length as usize,
                _ => 0,
            },
            part_bytes: h.part_bytes,
            version: h.version,
            tier: h.tier,
            sums_ok: h.sums_ok,
            in_doubt: false,
        }
    }

    /// Whether the buffer begins with what was put.
    pub fn is_hit(&self) -> bool {
        self.status == PartStatus::Hit
    }
}

const VERB: &str = "get";

/// What one get asks.
struct Batch<'a> {
    items: &'a [GetItem],
    bounds: Bounds,
    lease: Option<LeaseId>,
    call: &'a Call,
}

impl Namespace {
    /// Reads parts. Answers one per item, in order; parts that are not here, late, or that failed a check are values and
    /// not errors. At the deadline what arrived is the answer, and the rest is `miss` with reason `late`; when the server
    /// is lost in the middle and does not come back, the rest is `miss` with reason `io`; where it was lost before anything
    /// came, all is `miss` with reason `unreachable`, unless [`crate::config::Lost::Errors`] is configured. An error means
    /// that the call itself is wrong.
    pub async fn get(&self, items: &[GetItem], lease: Option<LeaseId>, call: &Call) -> Result<Vec<GotPart>> {
        let mut landing = Owned::new(items.len());
        let headers = self.fetch(items, lease, call, &mut landing).await?;
        Ok(headers
            .into_iter()
            .enumerate()
            .map(|(i, h)| {
                let data = if h.status == PartStatus::Hit { landing.take(i) } else { Bytes::new() };
                GotPart::new(h, data)
            })
            .collect())
    }

    /// Reads parts into the caller's buffers, one per item; each must hold the range asked for (a part that does not fit its
    /// buffer is a miss with reason `format`). Otherwise as [`Self::get`].
    pub async fn get_into(
        &self,
        items: &[GetItem],
        buffers: &mut [&mut [u8]],
        lease: Option<LeaseId>,
        call: &Call,
    ) -> Result<Vec<GotInto>> {
        if items.len() != buffers.len() {
            return Err(kvkeep_core::Error::new(
                kvkeep_core::ErrorKind::InvalidArgument,
                "get_into takes one buffer per item",
            )
            .with("items", items.len())
            .with("buffers", buffers.len())
            .into());
        }
        let headers = self.fetch(items, lease, call, &mut Lent(buffers)).await?;
        Ok(headers.into_iter().zip(items).map(|(h, item)| GotInto::new(h, item)).collect())
    }

    pub(crate) async fn fetch(
        &self,
        items: &[GetItem],
        lease: Option<LeaseId>,
        call: &Call,
        landing: &mut impl Landing,
    ) -> Result<Vec<Header>> {
        let shared = &self.client.shared;
        let limits = shared.hello().limits;
        let bounds =
            Bounds { chunk_bytes: CHUNK_BYTES.min(limits.chunk_bytes_max), block_bytes: limits.block_bytes_max };
        let mut tries = shared.begin(call);
        let mut assembly = Assembly::new(items, bounds);
        let mut rest_is = MissReason::Io;
        while !assembly.is_complete() {
            let batch = Batch { items, bounds, lease, call };
            match self.fetch_batch(&tries, &mut assembly, &batch, landing).await {
                Ok(()) => {}
                Err(e) => {
                    assembly.interrupt(landing);
                    if e.kind() == ErrorKind::Protocol {
                        // It lies or is broken: asking again would bring more of it.
                        count(&shared.counts.violations, 1);
                        assembly.quarantine(landing);
                        break;
                    }
                    if let Err(e) = tries.again(e, Safety::Repeatable).await {
                        match e.kind() {
                            ErrorKind::Late => rest_is = MissReason::Late,
                            // The call itself is wrong (a range outside of its part, a stale handle): no miss.
                            ErrorKind::Refused(_) if !e.is_retryable() => return Err(e),
                            _ if assembly.settled() == 0 => rest_is = shared.miss(e)?,
                            // What arrived is told; so the loss is a reason and no error, whatever is configured.
                            _ if e.is_loss() => rest_is = MissReason::Unreachable,
                            _ => {}
                        }
                        break;
                    }
                }
            }
        }
        count(&shared.counts.bad_sums, assembly.bad_sums);
        let headers = assembly.finish(rest_is, landing);
        let late = headers.iter().filter(|h| h.reason == Some(MissReason::Late)).count();
        count(&shared.counts.late_parts, late as u64);
        Ok(headers)
    }

    /// Asks for the next items, as many as one call may name, and takes what comes until the answer ends.
    async fn fetch_batch(
        &self,
        tries: &Tries<'_>,
        assembly: &mut Assembly<'_>,
        batch: &Batch<'_>,
        landing: &mut impl Landing,
    ) -> Result<()> {
        let shared = &self.client.shared;
        match shared.hot_line().await? {
            Line::Grpc => {
                let fetched = self.fetch_grpc(tries, assembly, batch, landing).await;
                shared.judge_grpc(&fetched);
                fetched
            }
            Line::Block(mut lent) => {
                let used = lent.conn().used;
                let left = tries.left(VERB)?;
                let fetching = self.fetch_block(lent.conn(), left, assembly, batch, landing);
                let answer = tokio::time::timeout(left, fetching).await.unwrap_or_else(|_| Err(Error::late(VERB)));
                match shared.block_answered(lent, used, answer) {
                    Ok(()) => Ok(()),
                    Err(Asked::Failed(e)) => Err(e),
                    // The loop around this asks again, on another connection.
                    Err(Asked::Stale) => {
                        assembly.interrupt(landing);
                        Ok(())
                    }
                }
            }
        }
    }

    fn get_request(&self, assembly: &Assembly<'_>, batch: &Batch<'_>, left: Duration) -> v1::GetRequest {
        let first = assembly.settled();
        let items = &batch.items[first..batch.items.len().min(first + self.batch())];
        v1::GetRequest {
            ctx: Some(batch.call.to_proto(left)),
            handle: self.wire_handle(),
            items: items.iter().map(GetItem::to_proto).collect(),
            lease_id: convert::lease_to_proto(batch.lease),
            fidelity: v1::Fidelity::Exact as i32,
            chunk_bytes: batch.bounds.chunk_bytes as u32,
        }
    }

    /// On a block connection: payload goes from the socket to where it belongs.
    async fn fetch_block(
        &self,
        conn: &mut Conn,
        left: Duration,
        assembly: &mut Assembly<'_>,
        batch: &Batch<'_>,
        landing: &mut impl Landing,
    ) -> Result<()> {
        let patience = self.client.shared.config.patience;
        let first = assembly.settled();
        let request = self.get_request(assembly, batch, left);
        let asked = request.items.len();
        let call = conn.next_call();
        let frame = v1::Envelope { call, end: true, message: Some(Message::Get(request)), ..Default::default() };
        conn.send(VERB, frame, &[], None, patience).await?;
        loop {
            let (envelope, payload) = conn.next(VERB, call, patience).await?;
            if let Some(detail) = envelope.error {
                return Err(Error::from_detail(detail).with("verb", VERB));
            }
            let Some(Message::GetReply(reply)) = envelope.message else {
                return Err(Error::protocol("a get was answered with something else"));
            };
            match assembly.admit(first, &reply, payload, landing).map_err(|v| Error::protocol(v.0))? {
                Admitted::Settled => {}
                Admitted::Unwanted => {
                    conn.frames().skip(payload).await.map_err(|e| Conn::lost(VERB, e))?;
                    assembly.pass(payload, landing);
                }
                Admitted::Wanted { item, at, total } => {
                    let frames = conn.frames();
                    let mut right = true;
                    let seen = |piece: &[u8]| right &= assembly.compare(piece);
                    match landing.room(item, at, total, payload) {
                        Some(Room::Slice(to)) => frames.payload(to, seen).await.map_err(|e| Conn::lost(VERB, e))?,
                        Some(Room::Tail(to)) => {
                            frames.payload_tail(to, payload, seen).await.map_err(|e| Conn::lost(VERB, e))?;
                        }
                        None => {
                            let mut bytes = BytesMut::new();
                            frames.payload_tail(&mut bytes, payload, seen).await.map_err(|e| Conn::lost(VERB, e))?;
                            landing.land(item, at, total, bytes.freeze());
                        }
                    }
                    if !right {
                        landing.forget(item);
                    }
                    assembly.pass(0, landing);
                }
            }
            if envelope.end {
                let all = assembly.settled() == first + asked;
                return if all {
                    Ok(())
                } else {
                    Err(Error::protocol("the answer ended before every item was answered"))
                };
            }
        }
    }

    async fn fetch_grpc(
        &self,
        tries: &Tries<'_>,
        assembly: &mut Assembly<'_>,
        batch: &Batch<'_>,
        landing: &mut impl Landing,
    ) -> Result<()> {
        let first = assembly.settled();
        let line = self.client.shared.line(tries.left(VERB)?).await?;
        let left = tries.left(VERB)?;
        let request = self.get_request(assembly, batch, left);
        let asked = request.items.len();
        let mut request = tonic::Request::new(request);
        request.set_timeout(left);
        let deadline = tokio::time::Instant::from_std(tries.deadline);
        let stopped = |s: tonic::Status| -> Error {
            let error = line.judge(VERB, s);
            // A stream cut at the deadline may end with any status; what counts is that time is up.
            if Instant::now() >= tries.deadline { Error::late(VERB) } else { error }
        };
        let mut replies = tokio::time::timeout_at(deadline, blocks(line.wire.clone()).get(request))
            .await
            .map_err(|_| Error::late(VERB))?
            .map_err(stopped)?
            .into_inner();
        while assembly.settled() < first + asked {
            let next = tokio::time::timeout_at(deadline, replies.message()).await.map_err(|_| Error::late(VERB))?;
            match next.map_err(stopped)? {
                Some(reply) => assembly.feed(first, reply, landing).map_err(|v| Error::protocol(v.0))?,
                None => return Err(Error::protocol("the answer ended before every item was answered")),
            }
        }
        // A stream that is dropped before its trailers is reset, and HTTP/2 gives up a connection that sees many resets.
        // Everything asked for is here: whatever the end brings changes nothing.
        if let Ok(Ok(Some(_))) = tokio::time::timeout_at(deadline, replies.message()).await {
            return Err(Error::protocol("the answer went on after every item was answered"));
        }
        Ok(())
    }
}
