//! What is stored and removed, as it happens.

use std::pin::Pin;
use std::task::{Context, Poll};

use kvkeep_core::Handle;
use kvkeep_proto::v1;
use tokio_stream::{Stream, StreamExt as _};

use crate::call::Call;
use crate::client::{Safety, Shared};
use crate::connection::blocks;
use crate::convert;
use crate::error::{Error, Result};

/// What to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watch {
    /// One namespace; `None`: all of the tenant's.
    pub handle: Option<Handle>,
    /// First send what is here.
    pub snapshot: bool,
    /// Go on after this event; not with a snapshot.
    pub after_sequence: u64,
}

/// Batches of events. A batch with `gap` says that events were lost: open a new stream with a snapshot.
pub struct EventStream {
    batches: tonic::Streaming<v1::EventBatch>,
}

impl EventStream {
    pub(crate) async fn open(shared: &Shared, watch: &Watch, call: &Call) -> Result<Self> {
        const VERB: &str = "watch_events";
        let mut tries = shared.begin(call);
        loop {
            let opened = async {
                let line = shared.line(tries.left(VERB)?).await?;
                let left = tries.left(VERB)?;
                // No grpc-timeout: it would end the stream, not only its opening.
                let mut ctx = call.to_proto(left);
                ctx.deadline_ms = 0;
                let request = v1::WatchEventsRequest {
                    ctx: Some(ctx),
                    handle: watch.handle.map(convert::handle_to_proto),
                    snapshot: watch.snapshot,
                    after_sequence: watch.after_sequence,
                };
                match tokio::time::timeout(left, blocks(line.wire.clone()).watch_events(request)).await {
                    Ok(Ok(reply)) => Ok(Self { batches: reply.into_inner() }),
                    Ok(Err(status)) => Err(line.judge(VERB, status)),
                    Err(_) => Err(Error::late(VERB)),
                }
            };
            match opened.await {
                Ok(stream) => return Ok(stream),
                Err(e) => tries.again(e, Safety::Repeatable).await?,
            }
        }
    }

    /// The next batch; `None` when the server ended the stream.
    pub async fn next_batch(&mut self) -> Option<Result<v1::EventBatch>> {
        self.next().await
    }
}

impl Stream for EventStream {
    type Item = Result<v1::EventBatch>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.batches)
            .poll_next(cx)
            .map(|next| next.map(|batch| batch.map_err(|s| Error::from_status("watch_events", s))))
    }
}
