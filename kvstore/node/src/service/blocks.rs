//! Every verb of `kvkeep.v1.Blocks`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::{Digest, Error, ErrorKind, GroupId, Handle, Key, LeaseId, RequestId, ShardId, Tier};
use kvkeep_proto::{PROTOCOL_MAJOR, PROTOCOL_MINOR, v1};
use tonic::{Request, Response, Status, Streaming};

use super::call::{Call, connection, hello, refuse, within};
use super::{events, streams};
use crate::connection::{Hello, Via};
use crate::store::Store;
use crate::store::get::PartRead;
use crate::store::lookup::{MatchWish, Matched};
use crate::store::put::{PartAnswer, PartWish, PositionWish, ReserveWish};
use crate::store::reservations::ReservationId;

/// A match of more keys than this (some 200 us of work) runs beside the runtime's threads: short calls do not queue behind
/// it, and the system's scheduler lets them in first.
const INLINE_KEYS_MAX: usize = 1024;

/// Keys of one call, as the store knows them.
struct Batch {
    handle: Handle,
    /// The handle is at its namespace's revision.
    current: bool,
    digests: Vec<Digest>,
}

/// The service.
#[derive(Clone)]
pub struct Blocks {
    store: Arc<Store>,
}

impl Blocks {
    /// Over this store.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    fn call<T>(&self, request: &Request<T>, ctx: Option<v1::CallContext>) -> Result<Call, Status> {
        Call::open(&self.store, request.extensions(), ctx)
    }

    fn keys_within(&self, count: usize) -> Result<(), Status> {
        within("limits.batch_keys_max", count, self.store.config.limits.batch_keys_max)
    }

    /// A batch of keys under one handle, checked.
    fn batch(&self, call: &Call, handle: Option<v1::Handle>, keys: &[Bytes]) -> Result<Batch, Status> {
        self.keys_within(keys.len())?;
        check_keys(keys)?;
        let handle = convert::handle_from_proto(handle).map_err(refuse)?;
        let (_, current) = self.store.namespace_of(call.caller, handle).map_err(refuse)?;
        let digests = self.store.digests(call.caller, handle, keys.iter().map(|k| &k[..]));
        Ok(Batch { handle, current, digests })
    }

    fn lease_term(&self, ttl_ms: u32) -> Duration {
        let limits = &self.store.config.limits;
        let ms = if ttl_ms == 0 { limits.lease_ttl_ms_default } else { ttl_ms.min(limits.lease_ttl_ms_max) };
        Duration::from_millis(u64::from(ms))
    }

    fn limits(&self) -> v1::Limits {
        let l = &self.store.config.limits;
        v1::Limits {
            batch_keys_max: l.batch_keys_max,
            match_queries_max: l.match_queries_max,
            block_bytes_max: l.block_bytes_max.0,
            chunk_bytes_max: l.chunk_bytes_max,
            reserve_bytes_max: l.reserve_bytes_max.0,
            leases_per_instance_max: l.leases_per_instance_max,
            leased_positions_per_instance_max: l.leased_positions_per_instance_max,
            lease_ttl_ms_max: l.lease_ttl_ms_max,
            lease_life_ms_max: l.lease_life_ms_max,
            deadline_ms_max: l.deadline_ms_max,
            reservation_ms: l.reservation_ms,
        }
    }
}

fn check_keys(raw: &[Bytes]) -> Result<(), Status> {
    raw.iter().try_for_each(|k| match k.len() {
        1..=128 => Ok(()),
        // The error names the length as `Key::new` does.
        _ => Key::new(k).map(|_| ()).map_err(refuse),
    })
}

fn narrow<T: TryFrom<u32>>(name: &'static str, n: u32) -> Result<T, Error> {
    T::try_from(n).map_err(|_| {
        Error::new(ErrorKind::InvalidArgument, "a number is out of range").with("field", name).with("value", n)
    })
}

#[tonic::async_trait]
impl v1::blocks_server::Blocks for Blocks {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        let connection = connection(request.extensions())?;
        let bearer = request
            .metadata()
            .get("authorization")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Bearer "))
            .map(str::to_owned);
        let said = request.into_inner();
        if said.major != PROTOCOL_MAJOR {
            let error =
                Error::new(ErrorKind::InvalidArgument, "this server speaks another major version of the protocol")
                    .with("client", said.major)
                    .with("server", PROTOCOL_MAJOR);
            return Err(refuse(error));
        }
        let instance = convert::instance_from_proto(&said.instance_id).map_err(refuse)?;
        let token = if said.token.is_empty() { bearer.unwrap_or_default() } else { said.token };
        let identity = self.store.identify(connection.via, &token).map_err(|e| {
            self.store.counters.denied_calls.one();
            refuse(e)
        })?;
        let tenant = self.store.tenant(&identity.tenant).map_err(refuse)?;
        let tenant_name: Arc<str> = identity.tenant.as_str().into();
        let hello = Hello { instance, tenant, tenant_name: Arc::clone(&tenant_name), admin: identity.admin };
        if !connection.say_hello(hello) {
            let error = Error::new(
                ErrorKind::Conflict,
                "this connection or this instance has said hello as somebody else; open another, or draw another instance id",
            );
            return Err(refuse(error));
        }
        let via = match connection.via {
            Via::Tcp(peer) => peer.to_string(),
            Via::Unix { uid } => format!("unix uid {uid}"),
        };
        tracing::debug!(client = %said.client, %instance, tenant = %tenant_name, %via, "hello");
        Ok(Response::new(v1::HelloReply {
            major: PROTOCOL_MAJOR,
            minor: PROTOCOL_MINOR,
            features: vec!["blocks".into()],
            server: concat!("kvkeepd ", env!("CARGO_PKG_VERSION")).into(),
            server_epoch: self.store.epoch,
            limits: Some(self.limits()),
            tenant: tenant_name.to_string(),
            node: self.store.config.node_name.clone(),
        }))
    }

    async fn register_format(
        &self,
        request: Request<v1::RegisterFormatRequest>,
    ) -> Result<Response<v1::RegisterFormatReply>, Status> {
        hello(&self.store, request.extensions())?;
        let format = convert::format_from_proto(request.into_inner().format).map_err(refuse)?;
        format.validate().map_err(refuse)?;
        Ok(Response::new(v1::RegisterFormatReply { fingerprint: Bytes::copy_from_slice(&format.fingerprint().0) }))
    }

    async fn register_namespace(
        &self,
        mut request: Request<v1::RegisterNamespaceRequest>,
    ) -> Result<Response<v1::RegisterNamespaceReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let format = convert::format_from_proto(wish.format).map_err(refuse)?;
        let registered = self
            .store
            .register_namespace(call.caller, wish.name, format, wish.revision_digest, wish.require_full)
            .await
            .map_err(refuse)?;
        let n = &registered.namespace;
        Ok(Response::new(v1::RegisterNamespaceReply {
            handle: Some(v1::Handle { namespace_id: n.id.0, revision: n.revision.0 }),
            created: registered.created,
            fingerprint: Bytes::copy_from_slice(&n.fingerprint.0),
            revision_digest: n.revision_digest.clone(),
            revision_matches: registered.revision_matches,
        }))
    }

    async fn advance_revision(
        &self,
        mut request: Request<v1::AdvanceRevisionRequest>,
    ) -> Result<Response<v1::AdvanceRevisionReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let from = convert::handle_from_proto(wish.from).map_err(refuse)?;
        let handle = self.store.advance_revision(call.caller, from, wish.revision_digest).await.map_err(refuse)?;
        Ok(Response::new(v1::AdvanceRevisionReply { handle: Some(convert::handle_to_proto(handle)) }))
    }

    async fn r#match(&self, mut request: Request<v1::MatchRequest>) -> Result<Response<v1::MatchReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let queries = request.into_inner().queries;
        within("limits.match_queries_max", queries.len(), self.store.config.limits.match_queries_max)?;
        let keys = queries.iter().map(|q| q.keys.len()).sum();
        self.keys_within(keys)?;
        let service = self.clone();
        let answer = move || {
            let answer = |query| {
                service.match_one(&call, query).unwrap_or_else(|e| v1::MatchResult {
                    error: Some(convert::error_to_proto(&e)),
                    ..Default::default()
                })
            };
            queries.into_iter().map(answer).collect()
        };
        let results = if keys <= INLINE_KEYS_MAX {
            answer()
        } else {
            tokio::task::spawn_blocking(answer).await.map_err(|_| Status::internal("the match was cut short"))?
        };
        Ok(Response::new(v1::MatchReply { results }))
    }

    async fn lease(&self, mut request: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let ttl = self.lease_term(wish.ttl_ms);
        if let Some(id) = convert::lease_from_proto(wish.lease_id) {
            let left = self.store.renew(call.caller, id, ttl).map_err(refuse)?;
            let lease = v1::GrantedLease { lease_id: id.0, ttl_ms: convert::millis_to_proto(left), positions: 0 };
            return Ok(Response::new(v1::LeaseReply { lease: Some(lease), statuses: Bytes::new() }));
        }
        let Batch { handle, current, digests } = self.batch(&call, wish.handle, &wish.keys)?;
        let digests = if current { digests } else { Vec::new() };
        let (lease, statuses) = self
            .store
            .lease(call.caller, call.context.request_id, handle, &digests, ttl, &call.context.info)
            .map_err(refuse)?;
        let positions = statuses.iter().filter(|s| **s == kvkeep_core::PartStatus::Hit).count() as u32;
        Ok(Response::new(v1::LeaseReply {
            lease: lease.map(|(id, left)| v1::GrantedLease {
                lease_id: id.0,
                ttl_ms: convert::millis_to_proto(left),
                positions,
            }),
            statuses: convert::statuses_to_proto(&statuses),
        }))
    }

    type GetStream = streams::GetReplies;

    async fn get(&self, mut request: Request<v1::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        self.keys_within(wish.items.len())?;
        let handle = convert::handle_from_proto(wish.handle).map_err(refuse)?;
        let (_, current) = self.store.namespace_of(call.caller, handle).map_err(refuse)?;
        let lease = convert::lease_from_proto(wish.lease_id);
        if let Some(id) = lease {
            self.store.check_lease(call.caller, id).map_err(refuse)?;
        }
        let fidelity = convert::fidelity_from_proto(wish.fidelity).map_err(refuse)?;
        let raw_keys = wish.items.iter().map(|i| &i.key[..]);
        let digests = self.store.digests(call.caller, handle, raw_keys);
        let mut reads = Vec::with_capacity(wish.items.len());
        for (item, digest) in wish.items.iter().zip(&digests) {
            let id = kvkeep_core::BlockId {
                digest: *digest,
                group: GroupId(narrow("group", item.group).map_err(refuse)?),
                shard: ShardId(narrow("shard", item.shard).map_err(refuse)?),
            };
            reads.push(PartRead {
                id,
                key: Key::new(&item.key).map_err(refuse)?,
                offset: item.offset,
                length: item.length,
                version: convert::version_from_proto(item.version),
                fidelity,
            });
        }
        let chunk_max = self.store.config.limits.chunk_bytes_max;
        let chunk = if wish.chunk_bytes == 0 { chunk_max } else { wish.chunk_bytes.clamp(4096, chunk_max) };
        let get = streams::Get { call, handle, current, lease, reads, chunk_bytes: chunk as usize };
        Ok(Response::new(get.start(Arc::clone(&self.store))))
    }

    async fn reserve(&self, mut request: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let parts: usize = wish.positions.iter().map(|p| p.parts.len().max(1)).sum();
        self.keys_within(parts)?;
        let wish = reserve_wish(wish).map_err(refuse)?;
        let reserves = self.store.reserve(call.caller, wish, call.deadline).await.map_err(refuse)?;
        let answers = reserves.answers.into_iter().map(|a| v1::PartAnswer { answer: Some(spell_answer(a)) }).collect();
        Ok(Response::new(v1::ReserveReply {
            answers,
            granted_positions: reserves.granted_positions,
            lease_id: convert::lease_to_proto(reserves.lease),
            reservation_ms: self.store.config.limits.reservation_ms,
        }))
    }

    async fn write(&self, request: Request<Streaming<v1::WriteRequest>>) -> Result<Response<v1::WriteReply>, Status> {
        let call = self.call(&request, None)?;
        let mut chunks = request.into_inner();
        let chunk_max = self.store.config.limits.chunk_bytes_max;
        let mut writer = self.store.writer(call.caller);
        loop {
            let next = tokio::time::timeout_at(call.deadline, chunks.message())
                .await
                .map_err(|_| Status::deadline_exceeded("the write did not end before its deadline"))?;
            let Some(chunk) = next? else { break };
            within("limits.chunk_bytes_max", chunk.data.len(), chunk_max)?;
            writer.chunk(ReservationId(chunk.reservation_id), chunk.offset, &chunk.data).map_err(refuse)?;
        }
        let results = writer
            .finish()
            .into_iter()
            .map(|(id, error, written)| v1::WriteResult {
                reservation_id: id.0,
                bytes: u64::from(written),
                error: error.as_ref().map(convert::error_to_proto),
            })
            .collect();
        Ok(Response::new(v1::WriteReply { results }))
    }

    async fn commit(&self, mut request: Request<v1::CommitRequest>) -> Result<Response<v1::CommitReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let parts = request.into_inner().parts;
        self.keys_within(parts.len())?;
        let parts = parts.into_iter().map(|p| (ReservationId(p.reservation_id), p.crc32)).collect();
        // Started work is finished even if the caller goes away: a half-known acknowledgement helps nobody.
        let store = Arc::clone(&self.store);
        let committing = tokio::spawn(async move { store.commit(call.caller, call.context.info, parts).await });
        let committed = tokio::time::timeout_at(call.deadline, committing)
            .await
            .map_err(|_| Status::deadline_exceeded("not committed before the deadline; it may still be"))?
            .map_err(|_| Status::internal("the commit was cut short"))?;
        let results = committed
            .into_iter()
            .map(|(id, result)| match result {
                Ok(c) => {
                    let wanted = self.store.copies_wanted(c.class);
                    v1::CommitResult {
                        reservation_id: id.0,
                        version: c.version.0,
                        class: convert::class_to_proto(c.class),
                        copies: 1,
                        copies_wanted: wanted,
                        degraded: wanted > 1,
                        superseded: c.superseded,
                        owners: vec![self.store.config.node_name.clone()],
                        error: None,
                    }
                }
                Err(e) => v1::CommitResult {
                    reservation_id: id.0,
                    error: Some(convert::error_to_proto(&e)),
                    ..Default::default()
                },
            })
            .collect();
        Ok(Response::new(v1::CommitReply { results }))
    }

    async fn touch(&self, mut request: Request<v1::TouchRequest>) -> Result<Response<v1::TouchReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let batch = self.batch(&call, wish.handle, &wish.keys)?;
        Ok(Response::new(v1::TouchReply { touched: self.store.touch(&batch.digests, &call.context.info) }))
    }

    async fn prefetch(&self, mut request: Request<v1::PrefetchRequest>) -> Result<Response<v1::PrefetchReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        if wish.to != 0 && convert::tier_from_proto(wish.to).map_err(refuse)? != Tier::Dram {
            let error = Error::new(ErrorKind::InvalidArgument, "a storage node prefetches into dram and nowhere else");
            return Err(refuse(error));
        }
        let batch = self.batch(&call, wish.handle, &wish.keys)?;
        let (started, already, refused) = self.store.prefetch(call.caller, batch.handle, &batch.digests);
        Ok(Response::new(v1::PrefetchReply { started, already, refused }))
    }

    async fn release(&self, mut request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        self.keys_within(wish.lease_ids.len() + wish.reservation_ids.len() + wish.request_ids.len())?;
        let requests: Vec<_> =
            wish.request_ids.iter().map(|r| RequestId::new(r)).collect::<Result<_, _>>().map_err(refuse)?;
        let leases: Vec<_> = wish.lease_ids.into_iter().map(LeaseId).collect();
        let mut released = self.store.release(call.caller, &leases, &requests);
        released += self.store.abandon(call.caller, wish.reservation_ids.into_iter().map(ReservationId));
        Ok(Response::new(v1::ReleaseReply { released }))
    }

    async fn remove(&self, mut request: Request<v1::RemoveRequest>) -> Result<Response<v1::RemoveReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let batch = self.batch(&call, wish.handle, &wish.keys)?;
        let (removed, absent) = self.store.remove(&batch.digests).await;
        Ok(Response::new(v1::RemoveReply { removed, absent, held: 0 }))
    }

    async fn list(&self, mut request: Request<v1::ListRequest>) -> Result<Response<v1::ListReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let handle = convert::handle_from_proto(wish.handle).map_err(refuse)?;
        self.store.namespace_of(call.caller, handle).map_err(refuse)?;
        let (positions, next_page_token) = self
            .store
            .list(handle, &wish.key_prefix, &wish.page_token, wish.page_size, call.deadline)
            .await
            .map_err(refuse)?;
        Ok(Response::new(v1::ListReply { positions, next_page_token }))
    }

    async fn stats(&self, mut request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        self.call(&request, ctx)?;
        Ok(Response::new(self.store.stats()))
    }

    async fn explain(&self, mut request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainReply>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let handle = convert::handle_from_proto(wish.handle).map_err(refuse)?;
        let key = Key::new(&wish.key).map_err(refuse)?;
        Ok(Response::new(self.store.explain(call.caller, handle, &key).await.map_err(refuse)?))
    }

    type WatchEventsStream = events::EventStream;

    async fn watch_events(
        &self,
        mut request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let ctx = request.get_mut().ctx.take();
        let call = self.call(&request, ctx)?;
        let wish = request.into_inner();
        let namespace = match &wish.handle {
            None => None,
            Some(h) if h.namespace_id == 0 => None,
            Some(_) => {
                let handle = convert::handle_from_proto(wish.handle).map_err(refuse)?;
                self.store.namespace_of(call.caller, handle).map_err(refuse)?;
                Some(handle.namespace)
            }
        };
        let stream = events::watch(Arc::clone(&self.store), call.caller, namespace, wish.snapshot, wish.after_sequence)
            .map_err(refuse)?;
        Ok(Response::new(stream))
    }
}

impl Blocks {
    fn match_one(&self, call: &Call, query: v1::MatchQuery) -> Result<v1::MatchResult, Error> {
        for key in &query.keys {
            if !(1..=kvkeep_core::ids::KEY_BYTES_MAX).contains(&key.len()) {
                Key::new(key)?;
            }
        }
        let handle = convert::handle_from_proto(query.handle)?;
        let request_id = if query.request_id.is_empty() {
            call.context.request_id.clone()
        } else {
            RequestId::new(&query.request_id)?
        };
        let wish = MatchWish {
            request_id,
            handle,
            digests: self.store.digests(call.caller, handle, query.keys.iter().map(|k| &k[..])),
            lease: query.lease.map(|l| self.lease_term(l.ttl_ms)),
            promote: query.promote,
            statuses: query.want_statuses,
            fidelity: convert::fidelity_from_proto(query.fidelity)?,
        };
        let matched = self.store.match_chain(call.caller, &call.context.info, &wish)?;
        Ok(spell_match(matched))
    }
}

fn spell_match(matched: Matched) -> v1::MatchResult {
    let outcome = matched.outcome;
    let verdict = match (matched.recompute_us, outcome.boundary_positions) {
        (_, 0) | (0, _) => v1::load_estimate::Verdict::Unspecified,
        (recompute, _) if matched.load_us <= recompute => v1::load_estimate::Verdict::Load,
        _ => v1::load_estimate::Verdict::Recompute,
    };
    v1::MatchResult {
        boundary_positions: outcome.boundary_positions,
        boundary_tokens: matched.boundary_tokens,
        lease: matched.lease.map(|(id, left)| v1::GrantedLease {
            lease_id: id.0,
            ttl_ms: convert::millis_to_proto(left),
            positions: outcome.leased_positions,
        }),
        estimate: Some(v1::LoadEstimate {
            bytes: outcome.dram_bytes + outcome.nvme_bytes,
            dram_bytes: outcome.dram_bytes,
            nvme_bytes: outcome.nvme_bytes,
            remote_bytes: 0,
            load_us: matched.load_us,
            recompute_us: matched.recompute_us,
            verdict: verdict as i32,
        }),
        reason: convert::reason_opt_to_proto(outcome.reason),
        statuses: Bytes::from(outcome.statuses),
        tiers: Bytes::from(outcome.tiers),
        error: None,
    }
}

fn reserve_wish(wish: v1::ReserveRequest) -> Result<ReserveWish, Error> {
    let positions = wish
        .positions
        .into_iter()
        .map(|p| {
            let parts = p
                .parts
                .iter()
                .map(|part| {
                    let len = u32::try_from(part.length).map_err(|_| {
                        Error::new(ErrorKind::TooLarge, "the block is over every limit").with("bytes", part.length)
                    })?;
                    Ok(PartWish {
                        group: GroupId(narrow("group", part.group)?),
                        shard: ShardId(narrow("shard", part.shard)?),
                        len,
                    })
                })
                .collect::<Result<_, Error>>()?;
            Ok(PositionWish { key: Key::new(&p.key)?, parts, token_ids: p.token_ids.into() })
        })
        .collect::<Result<_, Error>>()?;
    Ok(ReserveWish {
        handle: convert::handle_from_proto(wish.handle)?,
        parent: if wish.parent_key.is_empty() { None } else { Some(Key::new(&wish.parent_key)?) },
        first_position: wish.first_position,
        positions,
        unordered: wish.unordered,
        class: convert::class_from_proto(wish.class)?,
        fidelity: convert::fidelity_from_proto(wish.fidelity)?,
        keep: convert::retention_from_proto(wish.retention)? == convert::Retention::Keep,
        bytes_max: wish.bytes_max,
        ttl: (wish.ttl_ms != 0).then(|| Duration::from_millis(wish.ttl_ms)),
    })
}

fn spell_answer(answer: PartAnswer) -> v1::part_answer::Answer {
    use v1::part_answer::{Answer, InProgress, Present, Slot};
    match answer {
        PartAnswer::Present { tier, class, version } => Answer::Present(Present {
            tier: convert::tier_to_proto(tier),
            class: convert::class_to_proto(class),
            version: version.0,
        }),
        PartAnswer::Upgrade(id) => Answer::Upgrade(Slot { reservation_id: id.0 }),
        PartAnswer::InProgress { retry_after } => {
            Answer::InProgress(InProgress { retry_after_ms: convert::millis_to_proto(retry_after) })
        }
        PartAnswer::Slot(id) => Answer::Slot(Slot { reservation_id: id.0 }),
        PartAnswer::Refused(error) => Answer::Refused(convert::error_to_proto(&error)),
    }
}
