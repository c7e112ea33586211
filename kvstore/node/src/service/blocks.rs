//! Every verb of `kvkeep.v1.Blocks` over gRPC: takes the message out of its call and puts the answer into one.

use std::sync::Arc;

use kvkeep_client::convert;
use kvkeep_proto::v1;
use tonic::{Extensions, Request, Response, Status, Streaming};

use super::{connection, events, streams};
use crate::connection::Hello;
use crate::store::Store;
use crate::store::reservations::ReservationId;
use crate::verbs::{Call, Refusal, Verbs, within};

/// The service.
#[derive(Clone)]
pub struct Blocks {
    verbs: Verbs,
}

type Reply<T> = Result<Response<T>, Status>;

impl Blocks {
    /// Over this store.
    pub fn new(store: Arc<Store>) -> Self {
        Self { verbs: Verbs { store } }
    }

    fn hello(&self, extensions: &Extensions) -> Result<Hello, Status> {
        super::hello(&self.verbs.store, extensions)
    }

    /// Who calls, and until when.
    fn call(&self, extensions: &Extensions, ctx: Option<v1::CallContext>) -> Result<Call, Status> {
        self.verbs.call(&self.hello(extensions)?, ctx).map_err(Refusal::into_status)
    }

    /// The call, and its message without the context.
    fn open<T>(
        &self,
        request: Request<T>,
        ctx: impl FnOnce(&mut T) -> Option<v1::CallContext>,
    ) -> Result<(Call, T), Status> {
        let (_, extensions, mut message) = request.into_parts();
        let call = self.call(&extensions, ctx(&mut message))?;
        Ok((call, message))
    }
}

fn reply<T>(answer: Result<T, Refusal>) -> Reply<T> {
    answer.map(Response::new).map_err(Refusal::into_status)
}

#[tonic::async_trait]
impl v1::blocks_server::Blocks for Blocks {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Reply<v1::HelloReply> {
        let connection = connection(request.extensions())?;
        let bearer = request
            .metadata()
            .get("authorization")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Bearer "))
            .map(str::to_owned);
        reply(self.verbs.hello(&connection, request.into_inner(), bearer))
    }

    async fn register_format(&self, request: Request<v1::RegisterFormatRequest>) -> Reply<v1::RegisterFormatReply> {
        self.hello(request.extensions())?;
        reply(self.verbs.register_format(request.into_inner()))
    }

    async fn register_namespace(
        &self,
        request: Request<v1::RegisterNamespaceRequest>,
    ) -> Reply<v1::RegisterNamespaceReply> {
        let hello = self.hello(request.extensions())?;
        reply(self.verbs.register_namespace(&hello, request.into_inner()).await)
    }

    async fn advance_revision(&self, request: Request<v1::AdvanceRevisionRequest>) -> Reply<v1::AdvanceRevisionReply> {
        let hello = self.hello(request.extensions())?;
        reply(self.verbs.advance_revision(&hello, request.into_inner()).await)
    }

    async fn r#match(&self, request: Request<v1::MatchRequest>) -> Reply<v1::MatchReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.r#match(call, wish.queries, false).await)
    }

    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Reply<v1::LeaseReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.lease(&call, wish))
    }

    type GetStream = streams::GetReplies;

    async fn get(&self, request: Request<v1::GetRequest>) -> Reply<Self::GetStream> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        let get = self.verbs.get(call, wish).map_err(Refusal::into_status)?;
        Ok(Response::new(streams::start(get, Arc::clone(&self.verbs.store))))
    }

    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Reply<v1::ReserveReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.reserve(&call, wish).await)
    }

    async fn write(&self, request: Request<Streaming<v1::WriteRequest>>) -> Reply<v1::WriteReply> {
        let call = self.call(request.extensions(), None)?;
        let mut chunks = request.into_inner();
        let chunk_max = self.verbs.store.config.limits.chunk_bytes_max;
        let mut writer = self.verbs.store.writer(call.caller);
        loop {
            let next = tokio::time::timeout_at(call.deadline, chunks.message())
                .await
                .map_err(|_| Status::deadline_exceeded("the write did not end before its deadline"))?;
            let Some(chunk) = next? else { break };
            within("limits.chunk_bytes_max", chunk.data.len(), chunk_max).map_err(Refusal::into_status)?;
            writer
                .chunk(ReservationId(chunk.reservation_id), chunk.offset, &chunk.data)
                .map_err(|e| convert::status_from_error(&e))?;
        }
        Ok(Response::new(writer.finish()))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Reply<v1::CommitReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.commit(&call, wish.parts).await)
    }

    async fn touch(&self, request: Request<v1::TouchRequest>) -> Reply<v1::TouchReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.touch(&call, wish))
    }

    async fn prefetch(&self, request: Request<v1::PrefetchRequest>) -> Reply<v1::PrefetchReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.prefetch(&call, wish))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Reply<v1::ReleaseReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.release(&call, wish))
    }

    async fn remove(&self, request: Request<v1::RemoveRequest>) -> Reply<v1::RemoveReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.remove(&call, wish).await)
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Reply<v1::ListReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.list(&call, wish).await)
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Reply<v1::StatsReply> {
        self.open(request, |m| m.ctx.take())?;
        Ok(Response::new(self.verbs.store.stats()))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Reply<v1::ExplainReply> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        reply(self.verbs.explain(&call, wish).await)
    }

    type WatchEventsStream = events::EventStream;

    async fn watch_events(&self, request: Request<v1::WatchEventsRequest>) -> Reply<Self::WatchEventsStream> {
        let (call, wish) = self.open(request, |m| m.ctx.take())?;
        let refuse = |e| convert::status_from_error(&e);
        let store = &self.verbs.store;
        let namespace = match &wish.handle {
            None => None,
            Some(h) if h.namespace_id == 0 => None,
            Some(_) => {
                let handle = convert::handle_from_proto(wish.handle).map_err(refuse)?;
                store.namespace_of(call.caller, handle).map_err(refuse)?;
                Some(handle.namespace)
            }
        };
        let stream = events::watch(Arc::clone(store), call.caller, namespace, wish.snapshot, wish.after_sequence)
            .map_err(refuse)?;
        Ok(Response::new(stream))
    }
}
