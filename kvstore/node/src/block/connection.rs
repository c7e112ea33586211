//! Reading a connection: frames in, calls started.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::task::Poll;

use kvkeep_client::block::frame::Head;
use kvkeep_client::block::reader::FrameReader;
use kvkeep_client::block::stream::{ReadHalf, WriteHalf};
use kvkeep_client::convert;
use kvkeep_core::{Error, ErrorKind, InstanceId, RequestId};
use kvkeep_proto::v1;
use kvkeep_proto::v1::Envelope;
use kvkeep_proto::v1::envelope::Message;
use tokio_util::sync::CancellationToken;

use super::payload::Writes;
use super::peer::{Peer, Ticket, spell};
use super::{FRAME_PATIENCE, HELLO_BYTES_MAX, HELLO_WAIT, HELLOS_MAX, from, into, payload};
use crate::connection::{Connection, Hello, Via};
use crate::failpoint;
use crate::verbs::{Answer, Call, Refusal, Verbs};

/// A match of more keys than this does not run between two frames.
const INLINE_KEYS_MAX: usize = 512;

/// One connection being read.
struct Reading {
    peer: Arc<Peer>,
    frames: FrameReader,
    /// Bytes that come for reservations, by call.
    writes: Writes,
    hellos: u32,
}

/// Serves a connection until it ends, breaks a rule, or the node stops.
pub async fn serve(
    verbs: Verbs,
    connection: Arc<Connection>,
    read: ReadHalf,
    write: WriteHalf,
    stop: CancellationToken,
) {
    let peer = Peer::new(verbs, connection, write);
    let pulse = tokio::spawn(Arc::clone(&peer).pulse());
    let mut reading =
        Reading { peer: Arc::clone(&peer), frames: FrameReader::new(read), writes: Writes::default(), hellos: 0 };
    let ended = reading.run(&stop).await;
    match ended {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            peer.verbs.store.counters.block_violations.one();
            tracing::debug!(via = ?peer.connection.via, error = %e, "block connection closed: it broke a rule");
        }
        Err(e) => tracing::debug!(via = ?peer.connection.via, error = %e, "block connection ended"),
    }
    if stop.is_cancelled() {
        // What was started is answered before the door closes; the server bounds the wait.
        while peer.in_flight() > 0 && !peer.gone.is_cancelled() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
    peer.gone.cancel();
    let _ = pulse.await; // it has nothing to tell
}

fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Reading {
    async fn run(&mut self, stop: &CancellationToken) -> io::Result<()> {
        let limits = &self.peer.verbs.store.config.limits;
        let (envelope_max, payload_max) = (limits.envelope_bytes_max as usize, limits.chunk_bytes_max as usize);
        loop {
            let greeted = self.peer.connection.hello().is_some();
            self.frames.patience = match (greeted, self.frames.has_begun()) {
                (false, _) => Some(HELLO_WAIT),
                (true, true) => Some(FRAME_PATIENCE),
                (true, false) => None,
            };
            let head = tokio::select! {
                // In this order: a node that stops takes no further call from a client that never pauses.
                biased;
                () = stop.cancelled() => return Ok(()),
                () = self.peer.gone.cancelled() => return Ok(()),
                head = self.frames.head() => head?,
            };
            let Some(Head { envelope, payload }) = head else { return Ok(()) };
            let (envelope, payload) = (envelope as usize, payload as usize);
            if envelope > if greeted { envelope_max } else { HELLO_BYTES_MAX } {
                self.refuse_frame("limits.envelope_bytes_max", envelope_max, envelope).await;
                return Err(violation("an envelope over limits.envelope_bytes_max"));
            }
            if payload > if greeted { payload_max } else { 0 } {
                self.refuse_frame("limits.chunk_bytes_max", payload_max, payload).await;
                return Err(violation("a payload over limits.chunk_bytes_max"));
            }
            self.frames.patience = Some(FRAME_PATIENCE);
            let envelope = self.frames.envelope(envelope).await?;
            self.frame(envelope, payload).await?;
            if self.frames.has_descriptors() {
                return Err(violation("a descriptor that nobody asked for"));
            }
        }
    }

    /// Says why before the connection is closed: the frame that is too long cannot be read over.
    async fn refuse_frame(&self, limit: &'static str, max: usize, asked: usize) {
        let error = Error::new(ErrorKind::TooLarge, "a frame is over this server's limit; the connection is closed")
            .with("limit", limit)
            .with("max", max)
            .with("asked", asked);
        self.peer.answer(0, Err(error.into())).await;
    }

    async fn frame(&mut self, envelope: Envelope, payload: usize) -> io::Result<()> {
        let Envelope { call, end, message, .. } = envelope;
        let message = message.ok_or_else(|| violation("an envelope without a message that this server knows"))?;
        if payload > 0 && !matches!(message, Message::Write(_)) {
            return Err(violation("payload behind a message that has none"));
        }
        if let Message::Hello(said) = message {
            self.hellos += 1;
            if self.hellos > HELLOS_MAX {
                return Err(violation("too many hellos"));
            }
            let verbs = &self.peer.verbs;
            let answer = verbs.hello(&self.peer.connection, said, None).map(Message::HelloReply);
            let refused = answer.is_err();
            self.peer.answer(call, answer).await;
            return if refused { Err(violation("a hello that was refused")) } else { Ok(()) };
        }
        let Some(hello) = self.peer.connection.hello().cloned() else {
            self.peer.verbs.store.counters.denied_calls.one();
            self.peer.answer(call, Err(Refusal::HelloRequired)).await;
            return Err(violation("a call before hello"));
        };
        match message {
            Message::Write(write) => {
                let Self { peer, frames, writes, .. } = self;
                let Some(answer) = writes.frame(peer, frames, &hello, call, end, write, payload).await? else {
                    return Ok(());
                };
                self.peer.answer(call, answer).await;
            }
            Message::Cancel(cancel) => {
                let request =
                    RequestId::new(&cancel.request_id).map_err(|_| violation("a request id over 64 bytes"))?;
                self.peer.cancel(cancel.call, &request);
            }
            Message::RegisterRegion(wish) => {
                let descriptor = self.frames.take_descriptor();
                self.register_region(call, hello.instance, &wish, descriptor).await;
            }
            Message::OpenFile(wish) => self.open_file(call, &hello, &wish).await,
            other => self.verb(call, &hello, other).await?,
        }
        Ok(())
    }

    /// Everything that names a context.
    async fn verb(&mut self, number: u64, hello: &Hello, message: Message) -> io::Result<()> {
        let verbs = self.peer.verbs.clone();
        let may_map = self.peer.connection.via.may_map(&verbs.store.config.auth);
        let open = |ctx| verbs.call(hello, ctx);
        // Quick ones are answered here: a task each would cost more than they do.
        let answer = match message {
            Message::Heartbeat(beat) => Ok(Message::Heartbeat(beat)),
            Message::Release(mut m) => {
                open(m.ctx.take()).and_then(|call| verbs.release(&call, m)).map(Message::ReleaseReply)
            }
            Message::Touch(mut m) => open(m.ctx.take()).and_then(|call| verbs.touch(&call, m)).map(Message::TouchReply),
            Message::Lease(mut m) => open(m.ctx.take()).and_then(|call| verbs.lease(&call, m)).map(Message::LeaseReply),
            Message::Map(mut m) => {
                let call = open(m.ctx.take());
                call.and_then(|call| map(&verbs, call, m, may_map)).map(Message::MapReply)
            }
            Message::Match(mut m) => {
                let keys: usize = m.queries.iter().map(|q| q.keys.len()).sum();
                match open(m.ctx.take()) {
                    Err(e) => Err(e),
                    Ok(call) if keys <= INLINE_KEYS_MAX => {
                        verbs.r#match(call, m.queries, may_map).await.map(Message::MatchReply)
                    }
                    Ok(call) => {
                        let request = call.context.request_id.clone();
                        let run =
                            |_| async move { verbs.r#match(call, m.queries, may_map).await.map(Message::MatchReply) };
                        self.call(number, request, run).await;
                        return Ok(());
                    }
                }
            }
            Message::UnregisterRegion(m) => {
                let (store, instance) = (Arc::clone(&verbs.store), hello.instance);
                let run = move |_| async move {
                    store.unregister_region(instance, m.region_id).await?;
                    Ok(Message::UnregisterRegionReply(v1::UnregisterRegionReply {}))
                };
                self.call(number, RequestId::default(), run).await;
                return Ok(());
            }
            Message::Reserve(mut m) => match open(m.ctx.take()) {
                Err(e) => Err(e),
                Ok(call) => {
                    let request = call.context.request_id.clone();
                    let run = |_| async move { verbs.reserve(&call, m).await.map(Message::ReserveReply) };
                    self.call(number, request, run).await;
                    return Ok(());
                }
            },
            Message::Commit(mut m) => match open(m.ctx.take()) {
                Err(e) => Err(e),
                Ok(call) => {
                    let request = call.context.request_id.clone();
                    let run = |_| async move { verbs.commit(&call, m.parts).await.map(Message::CommitReply) };
                    self.call(number, request, run).await;
                    return Ok(());
                }
            },
            Message::Get(mut m) => match open(m.ctx.take()).and_then(|call| verbs.get(call, m)) {
                Err(e) => Err(e),
                Ok(get) => {
                    let request = get.call.context.request_id.clone();
                    match self.peer.start(number, request) {
                        Err(e) => Err(e.into()),
                        Ok(ticket) => {
                            tokio::spawn(payload::get(Arc::clone(&self.peer), ticket, get));
                            return Ok(());
                        }
                    }
                }
            },
            Message::GetInto(m) => match into::GetInto::open(&self.peer, hello, m) {
                Err(e) => Err(e),
                Ok(get) => {
                    let request = get.request().clone();
                    let run =
                        |ticket: Arc<Ticket>| async move { get.run(&ticket.stop).await.map(Message::GetIntoReply) };
                    self.call(number, request, run).await;
                    return Ok(());
                }
            },
            Message::PutFrom(m) => match from::PutFrom::open(&self.peer, hello, m) {
                Err(e) => Err(e),
                Ok(put) => {
                    let request = put.request().clone();
                    let run =
                        |ticket: Arc<Ticket>| async move { put.run(&ticket.stop).await.map(Message::PutFromReply) };
                    self.call(number, request, run).await;
                    return Ok(());
                }
            },
            _ => return Err(violation("a message that only a server sends")),
        };
        self.peer.answer(number, answer).await;
        Ok(())
    }

    /// Runs a call in a task of its own. It runs to its end even if the connection does not: started work is finished.
    async fn call<F, Fut>(&self, number: u64, request: RequestId, run: F)
    where
        F: FnOnce(Arc<Ticket>) -> Fut,
        Fut: Future<Output = Answer<Message>> + Send + 'static,
    {
        match self.peer.start(number, request) {
            Ok(ticket) => {
                let ticket = Arc::new(ticket);
                let mut running = Box::pin(run(Arc::clone(&ticket)));
                // What need not wait is answered by this task: waking another costs more than a copy of some 100 KiB.
                if let Poll::Ready(answer) = futures_util::poll!(&mut running) {
                    drop(ticket);
                    return self.peer.answer(number, answer).await;
                }
                let peer = Arc::clone(&self.peer);
                tokio::spawn(async move {
                    let envelope = spell(number, running.await);
                    // Off the list before the answer is out: the client may use the number again at once.
                    drop(ticket);
                    let _ = peer.send(&envelope, &[], None).await; // a peer that is gone needs no answer
                });
            }
            Err(e) => self.peer.answer(number, Err(e.into())).await,
        }
    }

    /// Takes a client's memory as a region.
    async fn register_region(
        &self,
        number: u64,
        instance: InstanceId,
        wish: &v1::RegisterRegionRequest,
        descriptor: Option<OwnedFd>,
    ) {
        let ticket = match self.peer.start(number, RequestId::default()) {
            Ok(ticket) => ticket,
            Err(e) => return self.peer.answer(number, Err(e.into())).await,
        };
        let (peer, via) = (Arc::clone(&self.peer), self.peer.connection.via);
        let (offset, length) = (wish.offset, wish.length);
        tokio::spawn(async move {
            let store = Arc::clone(&peer.verbs.store);
            // Mapping a region makes all its page-table entries: not between two frames, nor on the runtime.
            let register = move || store.register_region(instance, via, offset, length, descriptor);
            let (answer, untold) = match tokio::task::spawn_blocking(register).await {
                Ok(Ok(untold)) => (Ok(Message::RegisterRegionReply(untold.reply())), Some(untold)),
                Ok(Err(e)) => (Err(e.into()), None),
                Err(_) => (Err(Refusal::Cut("the registration was cut short")), None),
            };
            let envelope = spell(number, answer);
            // Off the list before the answer is out: the client may use the number again at once.
            drop(ticket);
            // Where nobody waits for the answer any more, the registration is none.
            if peer.send(&envelope, &[], None).await.is_ok()
                && let Some(untold) = untold
            {
                untold.told();
            }
        });
    }

    /// A file of the arena, for a client that may map it.
    async fn open_file(&self, number: u64, hello: &Hello, wish: &v1::OpenFileRequest) {
        let store = &self.peer.verbs.store;
        let caller = crate::store::put::Caller { instance: hello.instance, tenant: hello.tenant };
        let opened = match self.peer.connection.via {
            Via::Unix { pid, .. } if self.peer.connection.via.may_map(&store.config.auth) => {
                store.open_arena_file(caller, pid, wish.file)
            }
            _ => Err(Error::new(ErrorKind::Denied, "only processes on the Unix socket whose user may map get files")),
        };
        match opened {
            Ok((file, length)) => {
                failpoint::at("open_file.sent");
                let reply = Message::OpenFileReply(v1::OpenFileReply { file: wish.file, length });
                let _ = self.peer.send(&spell(number, Ok(reply)), &[], Some(file.as_fd())).await; // as in `answer`
            }
            Err(e) => self.peer.answer(number, Err(e.into())).await,
        }
    }
}

fn map(verbs: &Verbs, call: Call, wish: v1::MapRequest, may_map: bool) -> Answer<v1::MapReply> {
    if !may_map {
        return Err(Error::new(
            ErrorKind::Denied,
            "only processes on the Unix socket whose user may map are told places",
        )
        .into());
    }
    let lease = convert::lease_from_proto(wish.lease_id)
        .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "mapped parts are held under a lease: name it"))?;
    let want_sums = wish.want_sums;
    let get = v1::GetRequest { handle: wish.handle, items: wish.items, lease_id: wish.lease_id, ..Default::default() };
    let get = verbs.get(call, get)?;
    let reads = if get.current { &get.reads[..] } else { &[] };
    let parts = verbs.store.map_items(get.call.caller, lease, reads, want_sums)?;
    Ok(v1::MapReply { parts: Some(parts) })
}

/// Calls whose bytes are on their way.
pub type ByCall<T> = HashMap<u64, T>;
