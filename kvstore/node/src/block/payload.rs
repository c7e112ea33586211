//! Bytes that travel on the connection: get out of slots, write into them.
//!
//! Floor of 1 MiB out: one pass for the sums, one `writev` of the slot itself (as many as the socket's buffer asks for). A longer
//! block is summed frame by frame: the client takes in one while the next is summed.
//! In: the kernel's copy into the slot and one pass for the sums behind it, while the bytes are in the cache.

use std::collections::hash_map::Entry;
use std::io;
use std::sync::Arc;

use kvkeep_client::block::reader::FrameReader;
use kvkeep_core::{MissReason, PartStatus, RequestId};
use kvkeep_proto::v1;
use kvkeep_proto::v1::Envelope;
use kvkeep_proto::v1::envelope::Message;

use super::connection::ByCall;
use super::peer::{Peer, Ticket};
use crate::connection::Hello;
use crate::failpoint;
use crate::store::get::{Compare, Fetched};
use crate::store::reservations::ReservationId;
use crate::store::write::{Room, Writer};
use crate::verbs::get::{Fetches, Get, chunks, hit, no};
use crate::verbs::{Answer, Refusal};

/// Serves a get: parts in the order asked, each in chunks.
pub async fn get(peer: Arc<Peer>, ticket: Ticket, get: Get) {
    let (deadline, chunk_bytes, total) = (get.call.deadline, get.chunk_bytes, get.reads.len());
    let store = Arc::clone(&peer.verbs.store);
    let mut fetches = Fetches::start(&store, get, Compare::First(chunk_bytes));
    for item in 0..total {
        let last = item + 1 == total;
        let fetched = tokio::select! {
            () = ticket.stop.cancelled() => Err(MissReason::Cancelled),
            fetched = tokio::time::timeout_at(deadline, fetches.next()) => {
                fetched.map_err(|_| MissReason::Late).map(|f| f.unwrap_or(Fetched::No(PartStatus::Miss, MissReason::Io)))
            }
        };
        let sent = match fetched {
            // What arrived is the answer; the rest is named.
            Err(reason) => return rest(&peer, &ticket, item..total, reason).await,
            Ok(Fetched::No(status, reason)) => {
                peer.send(&reply(ticket.call, last, no(item, status, reason)), &[], None).await
            }
            Ok(Fetched::Bad(error)) => return peer.answer(ticket.call, Err(error.into())).await,
            Ok(Fetched::Hit { part, meta, range, tier, mut compared }) => {
                failpoint::at("get.fetched");
                let (mut head, end) = (Some(hit(item, &meta, tier, range.start)), range.end);
                let mut sent = Ok(());
                for chunk in chunks(range, chunk_bytes) {
                    if !store.compare_to(&part, &meta, &mut compared, chunk.end) {
                        // What went out of it is worthless to the client now; its copy on NVMe is there for the next get.
                        store.drop_bad_copy(&meta.id, part.slot());
                        store.counters.missed(MissReason::Quarantined);
                        let bad = no(item, PartStatus::Miss, MissReason::Quarantined);
                        sent = peer.send(&reply(ticket.call, last, bad), &[], None).await;
                        break;
                    }
                    let mut message = head.take().unwrap_or_else(|| v1::GetReply {
                        item: item as u32,
                        status: v1::PartStatus::Hit as i32,
                        ..Default::default()
                    });
                    (message.offset, message.last) = (chunk.start as u64, chunk.end == end);
                    let frame = reply(ticket.call, last && chunk.end == end, message);
                    sent = peer.send(&frame, &part[chunk], None).await;
                    failpoint::at("get.chunk_sent");
                    if sent.is_err() {
                        break;
                    }
                }
                sent
            }
        };
        if sent.is_err() {
            return;
        }
    }
    if total == 0 {
        // Nothing was asked: an answer without a part.
        let _ = peer.send(&Envelope { call: ticket.call, end: true, ..Default::default() }, &[], None).await;
    }
    fetches.finish();
}

async fn rest(peer: &Peer, ticket: &Ticket, items: std::ops::Range<usize>, reason: MissReason) {
    let end = items.end;
    for item in items {
        peer.verbs.store.counters.missed(reason);
        let frame = reply(ticket.call, item + 1 == end, no(item, PartStatus::Miss, reason));
        if peer.send(&frame, &[], None).await.is_err() {
            return;
        }
    }
}

fn reply(call: u64, end: bool, reply: v1::GetReply) -> Envelope {
    Envelope { call, end, message: Some(Message::GetReply(reply)), ..Default::default() }
}

/// Write calls of a connection: their frames come one after the other and land where the socket is read.
#[derive(Default)]
pub struct Writes(ByCall<(Ticket, Writer)>);

impl Writes {
    /// Takes one frame's payload off the stream, into its slot. Answers when it was the call's last.
    ///
    /// # Errors
    /// Of the stream, which cannot be read on then.
    #[expect(clippy::too_many_arguments, reason = "a frame, and what it is read from")]
    pub async fn frame(
        &mut self,
        peer: &Arc<Peer>,
        frames: &mut FrameReader,
        hello: &Hello,
        call: u64,
        end: bool,
        write: v1::WriteRequest,
        payload: usize,
    ) -> io::Result<Option<Answer<Message>>> {
        let (_, writer) = match self.0.entry(call) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(place) => match (peer.start(call, RequestId::default()), peer.verbs.call(hello, None)) {
                (Ok(ticket), Ok(context)) => place.insert((ticket, peer.verbs.store.writer(context.caller))),
                (Err(e), _) => {
                    frames.skip(payload).await?;
                    return Ok(end.then_some(Err(e.into())));
                }
                (_, Err(e)) => {
                    frames.skip(payload).await?;
                    return Ok(end.then_some(Err(e)));
                }
            },
        };
        let mut failed = None;
        if payload > 0 {
            let id = ReservationId(write.reservation_id);
            match writer.room(id, write.offset, payload) {
                Ok(Some(Room { bytes, sums })) => {
                    failpoint::at("write.landing");
                    frames.payload(bytes, |_| {}).await?;
                    // Piece by piece it is slower: the client sleeps more often.
                    sums.add(bytes);
                    writer.landed(id, payload);
                }
                Ok(None) => frames.skip(payload).await?,
                Err(e) => {
                    frames.skip(payload).await?;
                    failed = Some(Refusal::from(e));
                }
            }
        }
        if let Some(refusal) = failed {
            self.0.remove(&call);
            return Ok(Some(Err(refusal)));
        }
        if !end {
            return Ok(None);
        }
        failpoint::at("write.ended");
        let writer = self.0.remove(&call).map(|(_, writer)| writer);
        Ok(writer.map(|w| Ok(Message::WriteReply(w.finish()))))
    }
}
