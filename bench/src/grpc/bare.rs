//! The other side of the gRPC comparison: a plain tonic service of the same messages that lands and checksums the same bytes,
//! and does nothing else a store has to do.
//!
//! Floor of a put: one copy out of HTTP/2 frames inside the library, one copy into the slot, one pass of crc32. Of a get: one
//! pass of crc32, one copy into HTTP/2 frames inside the library.

use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use kvkeep_client::wire;
use kvkeep_client::wire::blocks_server::{Blocks, BlocksServer};
use kvkeep_core::{ChunkSums, SUM_CHUNK_BYTES};
use parking_lot::Mutex;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::{CHUNK_BYTES, CONNECTION_WINDOW_BYTES, FRAME_BYTES, MESSAGE_BYTES_MAX, STREAM_WINDOW_BYTES};
use crate::block_bytes::{self, Seed};

/// Bytes that are served: more than a last-level cache holds.
const SERVED_BYTES: usize = 256 << 20;
/// Bytes that puts land in.
const LANDING_BYTES: usize = 256 << 20;

/// Flags of `kvkeep-bench bare-server`.
#[derive(Args, Debug)]
pub struct BareCommand {
    /// Address to serve on
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Bytes of a block
    #[arg(long, default_value_t = 1 << 20)]
    block_bytes: usize,
}

struct Bare {
    served: Bytes,
    block_bytes: usize,
    slots: Vec<Mutex<Slot>>,
}

struct Slot {
    bytes: Vec<u8>,
    sums: ChunkSums,
}

/// Runs `kvkeep-bench bare-server` until it is killed.
pub async fn command(command: BareCommand) -> anyhow::Result<bool> {
    let listener = tokio::net::TcpListener::bind(&command.listen)
        .await
        .with_context(|| format!("listen on {}", command.listen))?;
    let slots = (LANDING_BYTES / command.block_bytes.max(1)).max(1);
    let bare = Bare {
        served: block_bytes::block(Seed::nth(0), SERVED_BYTES.max(command.block_bytes)),
        block_bytes: command.block_bytes,
        slots: (0..slots)
            // Written once, so that no put pays for the first touch of a page.
            .map(|_| Mutex::new(Slot { bytes: vec![1; command.block_bytes], sums: ChunkSums::default() }))
            .collect(),
    };
    println!("bare ready listen={}", listener.local_addr()?);
    let incoming = TcpListenerStream::new(listener).map(|socket| {
        let socket = socket?;
        socket.set_nodelay(true)?;
        Ok::<_, std::io::Error>(socket)
    });
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .add_service(BlocksServer::from_arc(Arc::new(bare)).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming(incoming)
        .await?;
    Ok(true)
}

impl Bare {
    /// The chunks of one item, its sums with the first.
    fn chunks(&self, number: u32, item: &wire::GetItem) -> impl Iterator<Item = wire::GetReply> + use<> {
        let places = self.served.len() / self.block_bytes;
        let place = item.key.iter().fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(usize::from(*b))) % places;
        let part = self.served.slice(place * self.block_bytes..(place + 1) * self.block_bytes);
        let mut sums = part.chunks(SUM_CHUNK_BYTES).map(crc32fast::hash).collect::<Vec<_>>();
        let chunks = part.len().div_ceil(CHUNK_BYTES);
        (0..chunks).map(move |i| {
            let (from, to) = (i * CHUNK_BYTES, part.len().min((i + 1) * CHUNK_BYTES));
            wire::GetReply {
                item: number,
                status: wire::PartStatus::Hit as i32,
                offset: from as u64,
                data: part.slice(from..to),
                last: i + 1 == chunks,
                part_bytes: part.len() as u64,
                version: 1,
                crc32: std::mem::take(&mut sums),
                tier: wire::Tier::Dram as i32,
                ..wire::GetReply::default()
            }
        })
    }

    /// Lands one chunk; answers how many bytes of the block are there.
    fn land(&self, chunk: &wire::WriteRequest) -> Result<u64, Status> {
        let slot = &self.slots[chunk.reservation_id as usize % self.slots.len()];
        let mut slot = slot.lock();
        let from = usize::try_from(chunk.offset).unwrap_or(usize::MAX);
        let to = from.saturating_add(chunk.data.len());
        let place = slot.bytes.get_mut(from..to).ok_or_else(|| Status::out_of_range("beyond the block"))?;
        place.copy_from_slice(&chunk.data);
        if to == self.block_bytes {
            slot.sums = ChunkSums::of(&slot.bytes);
        }
        Ok(to as u64)
    }
}

/// What the comparison uses, and the rest of the service, which this side does not have.
macro_rules! service {
    ($($absent:ident($request:ident) -> $reply:ident),+ $(,)?) => {
        #[tonic::async_trait]
        impl Blocks for Bare {
            type GetStream = Pin<Box<dyn Stream<Item = Result<wire::GetReply, Status>> + Send>>;
            type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<wire::EventBatch, Status>> + Send>>;

            async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
                let request = request.into_inner();
                let items: Vec<_> =
                    request.items.iter().enumerate().map(|(i, item)| self.chunks(i as u32, item)).collect();
                Ok(Response::new(Box::pin(tokio_stream::iter(items.into_iter().flatten().map(Ok)))))
            }

            async fn write(
                &self,
                request: Request<Streaming<wire::WriteRequest>>,
            ) -> Result<Response<wire::WriteReply>, Status> {
                let mut chunks = request.into_inner();
                let mut reply = wire::WriteReply::default();
                while let Some(chunk) = chunks.message().await? {
                    let bytes = self.land(&chunk)?;
                    match reply.results.last_mut() {
                        Some(last) if last.reservation_id == chunk.reservation_id => last.bytes = bytes,
                        _ => reply.results.push(wire::WriteResult {
                            reservation_id: chunk.reservation_id,
                            bytes,
                            error: None,
                        }),
                    }
                }
                Ok(Response::new(reply))
            }

            async fn watch_events(
                &self,
                _: Request<wire::WatchEventsRequest>,
            ) -> Result<Response<Self::WatchEventsStream>, Status> {
                Err(Status::unimplemented("the bare service only moves bytes"))
            }

            $(async fn $absent(&self, _: Request<wire::$request>) -> Result<Response<wire::$reply>, Status> {
                Err(Status::unimplemented("the bare service only moves bytes"))
            })+
        }
    };
}

service!(
    hello(HelloRequest) -> HelloReply,
    register_format(RegisterFormatRequest) -> RegisterFormatReply,
    register_namespace(RegisterNamespaceRequest) -> RegisterNamespaceReply,
    advance_revision(AdvanceRevisionRequest) -> AdvanceRevisionReply,
    r#match(MatchRequest) -> MatchReply,
    lease(LeaseRequest) -> LeaseReply,
    reserve(ReserveRequest) -> ReserveReply,
    commit(CommitRequest) -> CommitReply,
    touch(TouchRequest) -> TouchReply,
    prefetch(PrefetchRequest) -> PrefetchReply,
    release(ReleaseRequest) -> ReleaseReply,
    remove(RemoveRequest) -> RemoveReply,
    list(ListRequest) -> ListReply,
    stats(StatsRequest) -> StatsReply,
    explain(ExplainRequest) -> ExplainReply,
);
