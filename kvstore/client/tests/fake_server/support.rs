//! A server in this process that keeps blocks in a map, counts calls, and misbehaves on request.

#![expect(clippy::unwrap_used, reason = "the support of tests: an unwrap is an assertion")]

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use kvkeep_client::{Client, ClientConfig, Namespace, convert};
use kvkeep_core::{ChunkSums, Error, ErrorKind, Format, Group, Rule, SizeRule, Topology};
use kvkeep_proto::v1;
use kvkeep_proto::v1::blocks_server::{Blocks, BlocksServer};
use kvkeep_proto::v1::sessions_server::SessionsServer;
use parking_lot::Mutex;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::fake_sessions::FakeSession;

/// Keys of one call.
pub const BATCH_KEYS: u32 = 4;
/// Data of one chunk, bytes.
pub const CHUNK_BYTES: u32 = 128 * 1024;
/// Bytes granted by one reserve.
pub const RESERVE_BYTES: u64 = 1 << 20;

/// What happens to one call.
#[derive(Clone)]
pub enum Fault {
    /// It fails before anything is done.
    Refuse(Status),
    /// It is done, and its answer is lost.
    LoseAnswer(Status),
    /// It never answers.
    Stall,
}

/// What a get sends.
pub enum Step {
    Reply(v1::GetReply),
    Fail(Status),
    Stall,
}

/// Key, group, shard.
pub type PartId = (Bytes, u32, u32);

pub type Bend = Box<dyn FnMut(Vec<v1::GetReply>) -> Vec<Step> + Send>;

#[derive(Default)]
pub struct State {
    pub epoch: u64,
    pub greeted: HashSet<SocketAddr>,
    pub blocks: HashMap<PartId, Bytes>,
    pub sessions: HashMap<String, FakeSession>,
    pub reservations: HashMap<u64, (PartId, u64, BytesMut)>,
    next_reservation: u64,
    /// Calls per verb, those that failed included.
    pub calls: HashMap<&'static str, u32>,
    /// What happens to the next calls of a verb.
    pub faults: HashMap<&'static str, VecDeque<Fault>>,
    /// Bends the answers of get.
    pub bend: Option<Bend>,
    /// Every reserve, in order.
    pub reserves: Vec<v1::ReserveRequest>,
    /// Largest number of items or queries seen in one call.
    pub largest_batch: usize,
    pub tokens: HashSet<String>,
    pub deadlines: Vec<u32>,
}

#[derive(Clone, Default)]
pub struct Fake {
    pub state: Arc<Mutex<State>>,
}

impl Fake {
    /// Serves on a free port.
    pub async fn start() -> (Self, String) {
        let fake = Self::default();
        fake.state.lock().epoch = 1;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = BlocksServer::new(fake.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .add_service(SessionsServer::new(fake.clone()))
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        (fake, addr.to_string())
    }

    /// A client of it, and its namespace.
    pub async fn client(addr: &str, change: impl FnOnce(&mut ClientConfig)) -> (Client, Namespace) {
        let mut config = ClientConfig::to(addr);
        config.lost = kvkeep_client::Lost::Errors;
        change(&mut config);
        let client = Client::connect(config).await.unwrap();
        let ns = client.register_namespace("n", &format(), "r1").await.unwrap();
        (client, ns)
    }

    pub fn fault(&self, verb: &'static str, fault: Fault) {
        self.state.lock().faults.entry(verb).or_default().push_back(fault);
    }

    pub fn bend(&self, bend: impl FnMut(Vec<v1::GetReply>) -> Vec<Step> + Send + 'static) {
        self.state.lock().bend = Some(Box::new(bend));
    }

    pub fn calls(&self, verb: &'static str) -> u32 {
        self.state.lock().calls.get(verb).copied().unwrap_or(0)
    }

    /// What a restart does to those who are connected.
    pub fn forget_everyone(&self) {
        let mut state = self.state.lock();
        state.epoch += 1;
        state.greeted.clear();
        state.reservations.clear();
    }

    pub async fn answer<Req, Rep>(
        &self,
        verb: &'static str,
        request: Request<Req>,
        act: impl FnOnce(&mut State, Req) -> Result<Rep, Status>,
    ) -> Result<Response<Rep>, Status> {
        let peer = request.remote_addr().unwrap();
        let fault = {
            let mut state = self.state.lock();
            *state.calls.entry(verb).or_default() += 1;
            if let Some(token) = request.metadata().get("authorization") {
                state.tokens.insert(token.to_str().unwrap().to_owned());
            }
            if verb == "hello" {
                state.greeted.insert(peer);
            } else if !state.greeted.contains(&peer) {
                return Err(convert::status_from_detail(&convert::hello_required()));
            }
            state.faults.get_mut(verb).and_then(VecDeque::pop_front)
        };
        match fault {
            Some(Fault::Refuse(status)) => Err(status),
            Some(Fault::Stall) => std::future::pending().await,
            Some(Fault::LoseAnswer(status)) => {
                act(&mut self.state.lock(), request.into_inner())?;
                Err(status)
            }
            None => act(&mut self.state.lock(), request.into_inner()).map(Response::new),
        }
    }
}

pub fn refusal(kind: ErrorKind) -> Status {
    convert::status_from_error(&Error::new(kind, "as the test asked"))
}

pub fn format() -> Format {
    Format {
        model: "m".into(),
        dtype: "bf16".into(),
        layout: "l".into(),
        hash_algorithm: "h".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 2,
            replicated: false,
            size: SizeRule::UpTo(8 << 20),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

pub fn key(i: usize) -> Bytes {
    Bytes::from(format!("key-{i}"))
}

/// The bytes of part `i`.
pub fn content(i: usize, len: usize) -> Bytes {
    (0..len).map(|b| (b.wrapping_mul(31) ^ (b >> 9) ^ i.wrapping_mul(97)) as u8).collect()
}

fn get_replies(state: &State, request: &v1::GetRequest) -> Vec<v1::GetReply> {
    let chunk = (request.chunk_bytes as usize).min(CHUNK_BYTES as usize);
    let mut replies = Vec::new();
    for (i, item) in request.items.iter().enumerate() {
        let item_index = i as u32;
        let Some(data) = state.blocks.get(&(item.key.clone(), item.group, item.shard)) else {
            replies.push(v1::GetReply {
                item: item_index,
                status: v1::PartStatus::Miss as i32,
                reason: v1::MissReason::NeverStored as i32,
                last: true,
                ..Default::default()
            });
            continue;
        };
        let end = if item.length == 0 { data.len() } else { (item.offset + item.length) as usize };
        let mut at = item.offset as usize;
        while at < end {
            let to = end.min(at + chunk);
            let first = at == item.offset as usize;
            replies.push(v1::GetReply {
                item: item_index,
                status: v1::PartStatus::Hit as i32,
                offset: at as u64,
                data: data.slice(at..to),
                last: to == end,
                part_bytes: if first { data.len() as u64 } else { 0 },
                version: if first { 99 } else { 0 },
                crc32: if first { ChunkSums::of(data).as_slice().to_vec() } else { Vec::new() },
                tier: v1::Tier::Dram as i32,
                ..Default::default()
            });
            at = to;
        }
    }
    replies
}

fn reserve(state: &mut State, request: v1::ReserveRequest) -> v1::ReserveReply {
    let mut reply = v1::ReserveReply { reservation_ms: 1000, ..Default::default() };
    let mut bytes = 0;
    for position in &request.positions {
        let wanted: u64 = position.parts.iter().map(|p| p.length).sum();
        if bytes > 0 && bytes + wanted > RESERVE_BYTES {
            break;
        }
        bytes += wanted;
        reply.granted_positions += 1;
        for part in &position.parts {
            let id = (position.key.clone(), part.group, part.shard);
            let answer = if state.blocks.contains_key(&id) {
                reply.lease_id = 77;
                v1::part_answer::Answer::Present(v1::part_answer::Present {
                    tier: v1::Tier::Dram as i32,
                    class: v1::Class::Cache as i32,
                    version: 99,
                })
            } else {
                state.next_reservation += 1;
                let reservation_id = state.next_reservation;
                state.reservations.insert(reservation_id, (id, part.length, BytesMut::new()));
                v1::part_answer::Answer::Slot(v1::part_answer::Slot { reservation_id })
            };
            reply.answers.push(v1::PartAnswer { answer: Some(answer) });
        }
    }
    state.reserves.push(request);
    reply
}

fn write(state: &mut State, chunks: Vec<v1::WriteRequest>) -> v1::WriteReply {
    let mut results: Vec<v1::WriteResult> = Vec::new();
    for chunk in chunks {
        if results.last().is_none_or(|r| r.reservation_id != chunk.reservation_id) {
            results.push(v1::WriteResult { reservation_id: chunk.reservation_id, ..Default::default() });
        }
        let result = results.last_mut().unwrap();
        let landed = state.reservations.get_mut(&chunk.reservation_id);
        match landed {
            Some((_, length, buffer))
                if buffer.len() as u64 == chunk.offset && chunk.data.len() <= CHUNK_BYTES as usize =>
            {
                buffer.extend_from_slice(&chunk.data);
                assert!(buffer.len() as u64 <= *length);
                result.bytes = buffer.len() as u64;
            }
            _ => result.error = Some(convert::error_to_proto(&Error::new(ErrorKind::Expired, "no such reservation"))),
        }
    }
    v1::WriteReply { results }
}

fn commit(state: &mut State, request: &v1::CommitRequest) -> v1::CommitReply {
    let results = request
        .parts
        .iter()
        .map(|part| {
            let mut result = v1::CommitResult { reservation_id: part.reservation_id, ..Default::default() };
            match state.reservations.remove(&part.reservation_id) {
                Some((id, length, bytes)) => {
                    assert_eq!(bytes.len() as u64, length);
                    assert_eq!(ChunkSums::of(&bytes).as_slice(), part.crc32, "the client's sums");
                    state.blocks.insert(id, bytes.freeze());
                    (result.version, result.class, result.copies, result.copies_wanted) = (99, 1, 1, 1);
                }
                None => {
                    result.error =
                        Some(convert::error_to_proto(&Error::new(ErrorKind::Expired, "no such reservation")));
                }
            }
            result
        })
        .collect();
    v1::CommitReply { results }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Blocks for Fake {
    async fn hello(&self, r: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        self.answer("hello", r, |state, _| {
            Ok(v1::HelloReply {
                major: 1,
                server: "fake/0".into(),
                server_epoch: state.epoch,
                limits: Some(v1::Limits {
                    batch_keys_max: BATCH_KEYS,
                    match_queries_max: 2,
                    block_bytes_max: 8 << 20,
                    chunk_bytes_max: CHUNK_BYTES,
                    reserve_bytes_max: RESERVE_BYTES,
                    deadline_ms_max: 60_000,
                    ..Default::default()
                }),
                ..Default::default()
            })
        })
        .await
    }

    async fn register_namespace(
        &self,
        r: Request<v1::RegisterNamespaceRequest>,
    ) -> Result<Response<v1::RegisterNamespaceReply>, Status> {
        self.answer("register_namespace", r, |_, request| {
            let format = convert::format_from_proto(request.format).map_err(|e| convert::status_from_error(&e))?;
            Ok(v1::RegisterNamespaceReply {
                handle: Some(v1::Handle { namespace_id: 1, revision: 1 }),
                created: true,
                fingerprint: Bytes::copy_from_slice(&format.fingerprint().0),
                revision_digest: request.revision_digest,
                revision_matches: true,
            })
        })
        .await
    }

    async fn advance_revision(
        &self,
        r: Request<v1::AdvanceRevisionRequest>,
    ) -> Result<Response<v1::AdvanceRevisionReply>, Status> {
        self.answer("advance_revision", r, |_, request| {
            let from = request.from.unwrap();
            Ok(v1::AdvanceRevisionReply { handle: Some(v1::Handle { revision: from.revision + 1, ..from }) })
        })
        .await
    }

    async fn r#match(&self, r: Request<v1::MatchRequest>) -> Result<Response<v1::MatchReply>, Status> {
        self.answer("match", r, |state, request| {
            state.deadlines.push(request.ctx.unwrap().deadline_ms);
            state.largest_batch = state.largest_batch.max(request.queries.len());
            let results = request.queries.iter().map(|q| {
                let here = q.keys.iter().take_while(|k| state.blocks.contains_key(&((*k).clone(), 0, 0))).count();
                v1::MatchResult {
                    boundary_positions: here as u32,
                    boundary_tokens: here as u64 * 16,
                    ..Default::default()
                }
            });
            Ok(v1::MatchReply { results: results.collect() })
        })
        .await
    }

    type GetStream = Replies<v1::GetReply>;
    async fn get(&self, r: Request<v1::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let replies = self
            .answer("get", r, |state, request| {
                state.largest_batch = state.largest_batch.max(request.items.len());
                let replies = get_replies(state, &request);
                Ok(match &mut state.bend {
                    Some(bend) => bend(replies),
                    None => replies.into_iter().map(Step::Reply).collect(),
                })
            })
            .await?
            .into_inner();
        let stream = tokio_stream::iter(replies).then(|step| async {
            match step {
                Step::Reply(reply) => Ok(reply),
                Step::Fail(status) => Err(status),
                Step::Stall => std::future::pending().await,
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn reserve(&self, r: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveReply>, Status> {
        self.answer("reserve", r, |state, request| Ok(reserve(state, request))).await
    }

    async fn write(&self, r: Request<Streaming<v1::WriteRequest>>) -> Result<Response<v1::WriteReply>, Status> {
        let (meta, extensions, mut stream) = r.into_parts();
        let mut chunks = Vec::new();
        while let Some(chunk) = stream.next().await {
            chunks.push(chunk?);
        }
        let request = Request::from_parts(meta, extensions, chunks);
        self.answer("write", request, |state, chunks| Ok(write(state, chunks))).await
    }

    async fn commit(&self, r: Request<v1::CommitRequest>) -> Result<Response<v1::CommitReply>, Status> {
        self.answer("commit", r, |state, request| Ok(commit(state, &request))).await
    }

    async fn release(&self, r: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        self.answer("release", r, |state, request| {
            let ids = &request.reservation_ids;
            let released = ids.iter().filter(|id| state.reservations.remove(id).is_some()).count();
            Ok(v1::ReleaseReply { released: (released + request.lease_ids.len()) as u32 })
        })
        .await
    }

    async fn list(&self, r: Request<v1::ListRequest>) -> Result<Response<v1::ListReply>, Status> {
        // Two a page, the token is the index.
        self.answer("list", r, |state, request| {
            let mut keys: Vec<_> = state.blocks.keys().map(|k| k.0.clone()).collect();
            keys.sort();
            keys.dedup();
            let from = request.page_token.first().map_or(0, |b| usize::from(*b));
            let page = keys.iter().skip(from).take(2.min(request.page_size as usize));
            let positions: Vec<_> = page.map(|k| v1::PositionInfo { key: k.clone(), ..Default::default() }).collect();
            let next = from + positions.len();
            let next_page_token = if next < keys.len() { Bytes::from(vec![next as u8]) } else { Bytes::new() };
            Ok(v1::ListReply { positions, next_page_token })
        })
        .await
    }

    type WatchEventsStream = Replies<v1::EventBatch>;
    async fn watch_events(
        &self,
        r: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        self.answer("watch_events", r, |_, _| Ok(())).await?;
        let batch = v1::EventBatch { sequence: 5, snapshot_end: true, ..Default::default() };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(batch), Err(Status::unavailable("gone"))]))))
    }

    async fn register_format(
        &self,
        _: Request<v1::RegisterFormatRequest>,
    ) -> Result<Response<v1::RegisterFormatReply>, Status> {
        Err(Status::unimplemented("not here"))
    }
    async fn lease(&self, _: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseReply>, Status> {
        Err(Status::unimplemented("not here"))
    }
    async fn touch(&self, r: Request<v1::TouchRequest>) -> Result<Response<v1::TouchReply>, Status> {
        self.answer("touch", r, |state, request| {
            state.largest_batch = state.largest_batch.max(request.keys.len());
            Ok(v1::TouchReply { touched: request.keys.len() as u32 })
        })
        .await
    }
    async fn prefetch(&self, _: Request<v1::PrefetchRequest>) -> Result<Response<v1::PrefetchReply>, Status> {
        Err(Status::unimplemented("not here"))
    }
    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Result<Response<v1::RemoveReply>, Status> {
        Err(Status::unimplemented("not here"))
    }
    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsReply>, Status> {
        Err(Status::unimplemented("not here"))
    }
    async fn explain(&self, _: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainReply>, Status> {
        Err(Status::unimplemented("not here"))
    }
}
