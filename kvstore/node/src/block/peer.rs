//! One connection as its calls see it: where answers go, which calls run, and when the other side is gone.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytes::BytesMut;
use kvkeep_client::block::{frame, stream::WriteHalf};
use kvkeep_core::{Error, ErrorKind, RequestId};
use kvkeep_proto::v1::{Envelope, Heartbeat, envelope::Message};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{HEARTBEAT_EVERY, SEND_PATIENCE};
use crate::connection::Connection;
use crate::verbs::{Answer, Verbs};

/// The connection of some calls.
pub struct Peer {
    /// The verbs, and the store behind them.
    pub verbs: Verbs,
    /// Who it is.
    pub connection: Arc<Connection>,
    /// Cancelled when it is gone, or broke a rule: calls stop copying.
    pub gone: CancellationToken,
    out: tokio::sync::Mutex<Out>,
    calls: Mutex<HashMap<u64, Running>>,
    /// Told when the first call starts.
    busy: Notify,
    calls_max: usize,
}

struct Out {
    half: WriteHalf,
    head: BytesMut,
}

struct Running {
    request: RequestId,
    stop: CancellationToken,
}

/// A call while it runs.
pub struct Ticket {
    peer: Arc<Peer>,
    /// Its number.
    pub call: u64,
    /// Cancelled when the caller takes it back or is gone.
    pub stop: CancellationToken,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.peer.calls.lock().remove(&self.call);
    }
}

impl Peer {
    /// Of a connection.
    pub fn new(verbs: Verbs, connection: Arc<Connection>, half: WriteHalf) -> Arc<Self> {
        let calls_max = verbs.store.config.limits.calls_per_connection_max as usize;
        Arc::new(Self {
            verbs,
            connection,
            gone: CancellationToken::new(),
            out: tokio::sync::Mutex::new(Out { half, head: BytesMut::new() }),
            calls: Mutex::default(),
            busy: Notify::new(),
            calls_max,
        })
    }

    /// Registers a call.
    ///
    /// # Errors
    /// `Conflict` where a call of this number runs; `Throttled` where too many run.
    pub fn start(self: &Arc<Self>, call: u64, request: RequestId) -> Result<Ticket, Error> {
        let mut calls = self.calls.lock();
        if calls.len() >= self.calls_max {
            return Err(Error::new(ErrorKind::Throttled, "too many calls in flight on this connection")
                .with("limits.calls_per_connection_max", self.calls_max)
                .retry_after(std::time::Duration::from_millis(1)));
        }
        if calls.contains_key(&call) {
            return Err(Error::new(ErrorKind::Conflict, "a call of this number is in flight").with("call", call));
        }
        let stop = self.gone.child_token();
        calls.insert(call, Running { request, stop: stop.clone() });
        drop(calls);
        self.busy.notify_one();
        Ok(Ticket { peer: Arc::clone(self), call, stop })
    }

    /// Ends calls early: one by its number, or all of a request.
    pub fn cancel(&self, call: u64, request: &RequestId) {
        let calls = self.calls.lock();
        let hit = |(number, running): &(&u64, &Running)| {
            if call == 0 { running.request == *request } else { **number == call }
        };
        calls.iter().filter(hit).for_each(|(_, running)| running.stop.cancel());
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> usize {
        self.calls.lock().len()
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// Of the socket; the connection is gone then.
    pub async fn send(
        &self,
        envelope: &Envelope,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut out = self.out.lock().await;
        self.write(&mut out, envelope, payload, descriptor).await
    }

    async fn write(
        &self,
        out: &mut Out,
        envelope: &Envelope,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        out.head.clear();
        frame::encode(envelope, payload.len(), &mut out.head);
        let Out { half, head } = out;
        let sent = half.write_frame(head, payload, descriptor, Some(SEND_PATIENCE)).await;
        if sent.is_err() {
            // Half a frame may be out: nothing that follows would be understood.
            self.gone.cancel();
        }
        sent
    }

    /// Sends the last frame of a call.
    pub async fn answer(&self, call: u64, answer: Answer<Message>) {
        let envelope = spell(call, answer);
        // A peer that is gone needs no answer, and everybody who must know is told by `gone`.
        let _ = self.send(&envelope, &[], None).await;
    }

    /// Tells the other side that its calls are alive, for as long as there are any. Ends with the connection.
    pub async fn pulse(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.gone.cancelled() => return,
                () = self.busy.notified() => {}
            }
            loop {
                tokio::select! {
                    () = self.gone.cancelled() => return,
                    () = tokio::time::sleep(HEARTBEAT_EVERY) => {}
                }
                if self.in_flight() == 0 {
                    break;
                }
                // Whoever holds it is sending a frame, which is a sign of life as well.
                if let Ok(mut out) = self.out.try_lock() {
                    let beat = Envelope { message: Some(Message::Heartbeat(Heartbeat {})), ..Envelope::default() };
                    if self.write(&mut out, &beat, &[], None).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// The last frame of a call.
pub fn spell(call: u64, answer: Answer<Message>) -> Envelope {
    match answer {
        Ok(message) => Envelope { call, end: true, error: None, message: Some(message) },
        Err(refusal) => Envelope { call, end: true, error: Some(refusal.into_detail()), message: None },
    }
}
