//! `kvkeep.v1.Sessions` over gRPC.

use std::pin::Pin;
use std::sync::Arc;

use kvkeep_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::hello;
use crate::store::Store;
use crate::verbs::sessions::spell_progress;
use crate::verbs::{Call, Refusal, Verbs};

/// Words of a restore that wait for a slow listener.
const PROGRESS_AHEAD: usize = 4;

/// The service.
#[derive(Clone)]
pub struct SessionsService {
    verbs: Verbs,
}

type Reply<T> = Result<Response<T>, Status>;

impl SessionsService {
    /// Over this store.
    pub fn new(store: Arc<Store>) -> Self {
        Self { verbs: Verbs { store } }
    }

    /// The call, and its message without the context.
    fn open_call<T>(
        &self,
        request: Request<T>,
        ctx: impl FnOnce(&mut T) -> Option<v1::CallContext>,
    ) -> Result<(Call, T), Status> {
        let (_, extensions, mut message) = request.into_parts();
        let hello = hello(&self.verbs.store, &extensions)?;
        let call = self.verbs.call(&hello, ctx(&mut message)).map_err(Refusal::into_status)?;
        Ok((call, message))
    }
}

fn reply<T>(answer: Result<T, Refusal>) -> Reply<T> {
    answer.map(Response::new).map_err(Refusal::into_status)
}

#[tonic::async_trait]
impl v1::sessions_server::Sessions for SessionsService {
    async fn open(&self, request: Request<v1::OpenSessionRequest>) -> Reply<v1::OpenSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.open_session(&call, wish).await)
    }

    async fn append(&self, request: Request<v1::AppendSessionRequest>) -> Reply<v1::AppendSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.append_session(&call, wish).await)
    }

    async fn get(&self, request: Request<v1::GetSessionRequest>) -> Reply<v1::GetSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.get_session(&call, wish))
    }

    async fn list(&self, request: Request<v1::ListSessionsRequest>) -> Reply<v1::ListSessionsReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.list_sessions(&call, wish))
    }

    async fn manifest(&self, request: Request<v1::ManifestRequest>) -> Reply<v1::ManifestReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.session_manifest(&call, wish).await)
    }

    async fn tokens(&self, request: Request<v1::TokensRequest>) -> Reply<v1::TokensReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.session_tokens(&call, wish).await)
    }

    async fn fork(&self, request: Request<v1::ForkSessionRequest>) -> Reply<v1::ForkSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.fork_session(&call, wish).await)
    }

    async fn truncate(&self, request: Request<v1::TruncateSessionRequest>) -> Reply<v1::TruncateSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.truncate_session(&call, wish).await)
    }

    async fn pin(&self, request: Request<v1::PinSessionRequest>) -> Reply<v1::PinSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.pin_session(&call, wish).await)
    }

    async fn unpin(&self, request: Request<v1::UnpinSessionRequest>) -> Reply<v1::UnpinSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.unpin_session(&call, wish).await)
    }

    async fn hint(&self, request: Request<v1::HintSessionRequest>) -> Reply<v1::HintSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.hint_session(&call, wish).await)
    }

    type RestoreStream = Pin<Box<dyn Stream<Item = Result<v1::RestoreProgress, Status>> + Send>>;

    async fn restore(&self, request: Request<v1::RestoreSessionRequest>) -> Reply<Self::RestoreStream> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        let (tell, told) = mpsc::channel(PROGRESS_AHEAD);
        let (end, ended) = mpsc::channel(1);
        let verbs = self.verbs.clone();
        tokio::spawn(async move {
            let restoring = verbs.restore_session(&call, wish, tell);
            tokio::select! {
                answer = restoring => {
                    // A caller that has gone needs no answer.
                    let _ = end.send(answer.map_err(Refusal::into_status)).await;
                }
                // Nobody waits for it any more.
                () = end.closed() => {}
            }
        });
        let told = ReceiverStream::new(told).map(|progress| Ok(spell_progress(progress)));
        Ok(Response::new(Box::pin(told.chain(ReceiverStream::new(ended)))))
    }

    async fn close(&self, request: Request<v1::CloseSessionRequest>) -> Reply<v1::CloseSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.close_session(&call, wish).await)
    }

    async fn delete(&self, request: Request<v1::DeleteSessionRequest>) -> Reply<v1::DeleteSessionReply> {
        let (call, wish) = self.open_call(request, |m| m.ctx.take())?;
        reply(self.verbs.delete_session(&call, wish).await)
    }
}
