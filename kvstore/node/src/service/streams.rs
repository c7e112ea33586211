//! The stream of a get: parts in the order asked, read ahead within a bound, cut into chunks.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::{Stream, StreamExt as _};
use kvkeep_client::convert;
use kvkeep_core::{Handle, LeaseId, MissReason, PartStatus, Tier};
use kvkeep_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::call::Call;
use crate::store::Store;
use crate::store::get::{Fetched, PartRead};

/// Replies of one get.
pub type GetReplies = Pin<Box<dyn Stream<Item = Result<v1::GetReply, Status>> + Send>>;

/// Chunks that wait for the transport: with HTTP/2's own windows behind them, a few keep it busy.
const CHUNKS_AHEAD: usize = 4;
/// Parts fetched at a time, whatever their size.
const PARTS_AHEAD_MAX: usize = 64;

/// One get, understood.
pub struct Get {
    /// Its call.
    pub call: Call,
    /// Namespace and revision.
    pub handle: Handle,
    /// The handle is at the namespace's revision; else every part is a miss.
    pub current: bool,
    /// The lease it leans on.
    pub lease: Option<LeaseId>,
    /// What is asked.
    pub reads: Vec<PartRead>,
    /// Data of one reply at most.
    pub chunk_bytes: usize,
}

type Replies = mpsc::Sender<Result<v1::GetReply, Status>>;

impl Get {
    /// Serves it. Reads run ahead of the transport by `limits.get_read_ahead_bytes`; a client that goes away ends them.
    pub fn start(self, store: Arc<Store>) -> GetReplies {
        let (replies, receiver) = mpsc::channel(CHUNKS_AHEAD);
        tokio::spawn(self.serve(store, replies));
        ReceiverStream::new(receiver).boxed()
    }

    async fn serve(self, store: Arc<Store>, replies: Replies) {
        let Self { call, handle, current, lease, reads, chunk_bytes } = self;
        let total = reads.len();
        let start = Instant::now();
        let mut moved = [0u64; 2];
        if current {
            store.touch_once(lease, &call.context.info, &reads);
        }
        let width = store.parts_ahead(&reads).clamp(1, PARTS_AHEAD_MAX);
        let mut fetches = futures_util::stream::iter(reads)
            .map(|read| {
                let store = Arc::clone(&store);
                let caller = call.caller;
                async move {
                    if current {
                        store.fetch(caller, handle, read).await
                    } else {
                        store.counters.missed(MissReason::Revision);
                        Fetched::No(PartStatus::Miss, MissReason::Revision)
                    }
                }
            })
            .buffered(width);
        for item in 0..total {
            let fetched = match tokio::time::timeout_at(call.deadline, fetches.next()).await {
                Ok(Some(fetched)) => fetched,
                Ok(None) => return,
                Err(_) => return late(&store, item..total, &replies).await,
            };
            if let Fetched::Hit { range, tier, .. } = &fetched {
                moved[usize::from(*tier != Tier::Dram)] += range.len() as u64;
            }
            for reply in spell(item, fetched, chunk_bytes) {
                let failed = reply.is_err();
                match tokio::time::timeout_at(call.deadline, replies.send(reply)).await {
                    Ok(Ok(())) if !failed => {}
                    // The client went away, the call failed, or the transport took no more before the deadline.
                    _ => return,
                }
            }
        }
        match moved {
            [dram, 0] => store.rates.dram_moved(dram, start.elapsed()),
            [0, nvme] => store.rates.nvme_moved(nvme, start.elapsed()),
            _ => {}
        }
    }
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

fn no(item: usize, status: PartStatus, reason: MissReason) -> v1::GetReply {
    v1::GetReply {
        item: item as u32,
        status: convert::status_to_proto(status),
        reason: convert::reason_opt_to_proto(Some(reason)),
        last: true,
        ..Default::default()
    }
}

fn spell(item: usize, fetched: Fetched, chunk_bytes: usize) -> VecDeque<Result<v1::GetReply, Status>> {
    match fetched {
        Fetched::No(status, reason) => VecDeque::from([Ok(no(item, status, reason))]),
        Fetched::Bad(error) => VecDeque::from([Err(convert::status_from_error(&error))]),
        Fetched::Hit { part, meta, range, tier } => {
            let mut out = VecDeque::with_capacity(range.len().div_ceil(chunk_bytes));
            let mut at = range.start;
            while at < range.end {
                let end = (at + chunk_bytes).min(range.end);
                out.push_back(Ok(v1::GetReply {
                    item: item as u32,
                    status: convert::status_to_proto(PartStatus::Hit),
                    offset: at as u64,
                    data: part.range(at..end).unwrap_or_default(),
                    last: end == range.end,
                    ..Default::default()
                }));
                at = end;
            }
            if let Some(Ok(first)) = out.front_mut() {
                first.part_bytes = part.len() as u64;
                first.version = meta.version.0;
                first.crc32 = meta.sums.as_slice().to_vec();
                first.tier = convert::tier_to_proto(tier);
                first.fidelity = convert::fidelity_to_proto(meta.fidelity);
            }
            out
        }
    }
}
