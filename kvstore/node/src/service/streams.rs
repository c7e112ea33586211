//! The stream of a get: parts in the order asked, read ahead within a bound, cut into chunks.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use kvkeep_client::convert;
use kvkeep_core::{MissReason, PartStatus};
use kvkeep_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::store::Store;
use crate::store::get::{Compare, Fetched};
use crate::verbs::get::{Fetches, Get, chunks, hit, no};

/// Replies of one get.
pub type GetReplies = Pin<Box<dyn Stream<Item = Result<v1::GetReply, Status>> + Send>>;

/// Chunks that wait for the transport: with HTTP/2's own windows behind them, a few keep it busy.
const CHUNKS_AHEAD: usize = 4;

type Replies = mpsc::Sender<Result<v1::GetReply, Status>>;

/// Serves a get. Reads run ahead of the transport by `limits.get_read_ahead_bytes`; a client that goes away ends them.
pub fn start(get: Get, store: Arc<Store>) -> GetReplies {
    let (replies, receiver) = mpsc::channel(CHUNKS_AHEAD);
    tokio::spawn(serve(get, store, replies));
    ReceiverStream::new(receiver).boxed()
}

async fn serve(get: Get, store: Arc<Store>, replies: Replies) {
    let (deadline, chunk_bytes, total) = (get.call.deadline, get.chunk_bytes, get.reads.len());
    let mut fetches = Fetches::start(&store, get, Compare::All);
    for item in 0..total {
        let fetched = match tokio::time::timeout_at(deadline, fetches.next()).await {
            Ok(Some(fetched)) => fetched,
            Ok(None) => return,
            Err(_) => return late(&store, item..total, &replies).await,
        };
        for reply in spell(item, fetched, chunk_bytes) {
            let failed = reply.is_err();
            match tokio::time::timeout_at(deadline, replies.send(reply)).await {
                Ok(Ok(())) if !failed => {}
                // The client went away, the call failed, or the transport took no more before the deadline.
                _ => return,
            }
        }
    }
    fetches.finish();
}

/// At the deadline, what arrived is the answer; the rest is named late.
async fn late(store: &Store, items: std::ops::Range<usize>, replies: &Replies) {
    for item in items {
        store.counters.missed(MissReason::Late);
        if replies.try_send(Ok(no(item, PartStatus::Miss, MissReason::Late))).is_err() {
            return;
        }
    }
}

fn spell(item: usize, fetched: Fetched, chunk_bytes: usize) -> VecDeque<Result<v1::GetReply, Status>> {
    match fetched {
        Fetched::No(status, reason) => VecDeque::from([Ok(no(item, status, reason))]),
        Fetched::Bad(error) => VecDeque::from([Err(convert::status_from_error(&error))]),
        Fetched::Hit { part, meta, range, tier, .. } => {
            let end = range.end;
            let mut head = Some(hit(item, &meta, tier, range.start));
            chunks(range, chunk_bytes)
                .map(|chunk| {
                    let rest = || v1::GetReply {
                        item: item as u32,
                        status: convert::status_to_proto(PartStatus::Hit),
                        ..Default::default()
                    };
                    Ok(v1::GetReply {
                        offset: chunk.start as u64,
                        last: chunk.end == end,
                        data: part.range(chunk).unwrap_or_default(),
                        ..head.take().unwrap_or_else(rest)
                    })
                })
                .collect()
        }
    }
}
