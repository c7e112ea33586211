//! The hot verbs and the way they go: the Unix socket, the block port, or gRPC. One decision per client, made when the server
//! is first heard of and made anew when it was lost.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::MissReason;
use kvkeep_proto::v1;
use kvkeep_proto::v1::envelope::Message;
use parking_lot::RwLock;

use crate::block::conn::Address;
use crate::block::faults::Faults;
use crate::block::pool::{Lent, Pool, Way, Wire};
use crate::block::sockets::Sockets;
use crate::call::Call;
use crate::client::{Safety, Shared, Tries, count};
use crate::config::{ClientConfig, Lost, WayWish};
use crate::connection::{Hello, Wire as Grpc};
use crate::endpoint::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::region::mapped::Files;
use crate::region::words::Words;

/// What a client has for its hot verbs.
pub(crate) struct Hot {
    pub(crate) pool: Pool,
    pub(crate) faults: Arc<Faults>,
    pub(crate) words: Arc<Words>,
    pub(crate) files: Files,
    way: RwLock<Option<Way>>,
    /// One call looks for the way, the others wait for it.
    looking: tokio::sync::Mutex<()>,
}

/// A message that both wires carry.
pub(crate) trait Verb: Sized {
    /// Its answer.
    type Reply;
    /// Into an envelope.
    fn pack(self) -> Message;
    /// Out of one.
    fn unpack(message: Message) -> Option<Self::Reply>;
}

macro_rules! verbs {
    ($($request:ident, $reply:ident, $ask:ident, $answer:ident;)+) => {
        $(impl Verb for v1::$request {
            type Reply = v1::$reply;

            fn pack(self) -> Message {
                Message::$ask(self)
            }

            fn unpack(message: Message) -> Option<v1::$reply> {
                match message {
                    Message::$answer(reply) => Some(reply),
                    _ => None,
                }
            }
        })+
    };
}

verbs! {
    MatchRequest, MatchReply, Match, MatchReply;
    LeaseRequest, LeaseReply, Lease, LeaseReply;
    ReleaseRequest, ReleaseReply, Release, ReleaseReply;
    TouchRequest, TouchReply, Touch, TouchReply;
    ReserveRequest, ReserveReply, Reserve, ReserveReply;
    CommitRequest, CommitReply, Commit, CommitReply;
    GetIntoRequest, GetIntoReply, GetInto, GetIntoReply;
    PutFromRequest, PutFromReply, PutFrom, PutFromReply;
    MapRequest, MapReply, Map, MapReply;
    UnregisterRegionRequest, UnregisterRegionReply, UnregisterRegion, UnregisterRegionReply;
}

/// A way for one try.
#[expect(clippy::large_enum_variant, reason = "it is made and taken apart once per call")]
pub(crate) enum Line<'a> {
    /// Over gRPC.
    Grpc,
    /// On this block connection.
    Block(Lent<'a>),
}

impl Hot {
    pub(crate) fn new(config: &ClientConfig, sockets: Arc<Sockets>) -> Self {
        let faults = Arc::new(Faults::default());
        Self {
            pool: Pool::new(config.block_connections, Arc::clone(&faults), sockets),
            faults,
            words: Arc::default(),
            files: Files::default(),
            way: RwLock::new(None),
            looking: tokio::sync::Mutex::new(()),
        }
    }

    pub(crate) fn way(&self) -> Option<Way> {
        self.way.read().clone()
    }

    fn wire(&self) -> Option<Wire> {
        self.way.read().as_ref().map(|w| w.wire)
    }

    fn set(&self, way: Option<Way>, address: Option<Address>) {
        self.pool.set_address(address);
        *self.way.write() = way;
    }
}

/// Whether a host name means this host.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl Shared {
    /// Finds the fastest way to the server that was heard of last. `settle`: a socket on which nobody answers in time is no
    /// way; otherwise it is a server that was lost, and its slow ways are not looked at.
    pub(crate) async fn find_way(&self, settle: bool) -> Result<()> {
        let hello = self.hello();
        let (mut why, only) = (
            String::new(),
            match self.config.way {
                WayWish::Fastest => None,
                WayWish::Only(wire) => Some(wire),
            },
        );
        for wire in [Wire::Socket, Wire::Port].into_iter().filter(|w| only.is_none_or(|o| o == *w)) {
            let found = match self.address(wire, &hello) {
                Ok(address) => self.try_way(wire, address, &hello).await,
                Err(reason) => Err(Error::new(ErrorKind::Unreachable, reason)),
            };
            match found {
                Ok(()) => {
                    if let Some(way) = self.hot.way.write().as_mut() {
                        way.why = why;
                    }
                    return Ok(());
                }
                Err(e) if e.is_silence() && wire == Wire::Socket && !settle => {
                    self.hot.set(None, None);
                    return Err(e);
                }
                Err(e) => {
                    let separator = if why.is_empty() { "" } else { "; " };
                    why.push_str(&format!("{separator}no {}: {}", wire.word(), e.message()));
                }
            }
        }
        match only {
            Some(wire @ (Wire::Socket | Wire::Port)) => {
                self.hot.set(None, None);
                Err(Error::new(ErrorKind::Unreachable, "the one way that was asked for is not there")
                    .with("way", wire.word())
                    .with("why", why))
            }
            _ => {
                let to = self.config.endpoint.clone();
                let way = Way { wire: Wire::Grpc, regions: false, mapped: false, to, why };
                self.hot.set(Some(way), None);
                Ok(())
            }
        }
    }

    /// Where a way would lead.
    fn address(&self, wire: Wire, hello: &Hello) -> std::result::Result<Address, &'static str> {
        match (wire, &self.target) {
            (Wire::Socket, Target::Unix(path)) => Ok(Address::Unix(path.clone())),
            (Wire::Socket, Target::Local(local)) => Ok(Address::Unix(local.socket())),
            (Wire::Socket, Target::Tcp(uri)) => match host_of(uri) {
                Some((host, _)) if !is_loopback(&host) => Err("the server is on another host"),
                _ if hello.ways.unix_socket.is_empty() => Err("the server has no Unix socket"),
                _ => Ok(Address::Unix(hello.ways.unix_socket.clone().into())),
            },
            (Wire::Port, Target::Tcp(uri)) => match (host_of(uri), hello.ways.block_port) {
                (_, 0) => Err("the server has no block port"),
                (Some((host, tls)), port) => Ok(Address::Tcp { host, port, tls }),
                (None, _) => Err("the endpoint names no host"),
            },
            (Wire::Port, _) if hello.ways.block_port != 0 => {
                Ok(Address::Tcp { host: "127.0.0.1".into(), port: hello.ways.block_port, tls: false })
            }
            (Wire::Port, _) => Err("the server has no block port"),
            (Wire::Grpc, _) => Err("gRPC is no block way"),
        }
    }

    async fn try_way(&self, wire: Wire, address: Address, hello: &Hello) -> Result<()> {
        self.hot.pool.set_address(Some(address.clone()));
        let (lent, said) = self.hot.pool.lend(&self.config).await?;
        let said = said.ok_or_else(|| Error::new(ErrorKind::Unreachable, "the server did not say hello"))?;
        // The path, or the port, may be another server's: of another host behind a tunnel, of another life.
        if said.server_epoch != hello.server_epoch {
            return Err(Error::new(ErrorKind::Unreachable, "another server answers there"));
        }
        lent.give_back();
        let to = match address {
            Address::Unix(path) => path.display().to_string(),
            Address::Tcp { host, port, .. } => format!("{host}:{port}"),
        };
        let ways = &said.ways;
        let way = Way { wire, regions: ways.may_register, mapped: ways.may_map, to, why: String::new() };
        *self.hot.way.write() = Some(way);
        self.heard(Some(said));
        Ok(())
    }

    /// The way for one try of a hot verb, looked for where none is known.
    pub(crate) async fn hot_line(&self) -> Result<Line<'_>> {
        self.hot.pool.may()?;
        self.hot.faults.call(self.config.patience).await.inspect_err(|e| self.lost(e))?;
        if self.hot.wire().is_none() {
            let opened = self.hot.pool.breaker.counts().0;
            let _one = self.hot.looking.lock().await;
            self.hot.pool.may_still(opened)?;
            if self.hot.wire().is_none() {
                let looked = async {
                    let Some(connection) = self.connections.first() else { return Ok(()) };
                    if let Target::Local(local) = &self.target {
                        crate::embedded::ensure(local).await?;
                    }
                    let said = connection.greet(&self.config, self.config.patience).await;
                    // Late here is no call's deadline: nobody answered for as long as a lost server is waited for.
                    let (_, said) = said.map_err(|e| if e.kind() == ErrorKind::Late { Error::silence() } else { e })?;
                    self.heard(said);
                    self.find_way(false).await
                };
                looked.await.inspect_err(|e| self.lost(e))?;
            }
        }
        if self.hot.wire() == Some(Wire::Grpc) {
            return Ok(Line::Grpc);
        }
        match self.hot.pool.lend(&self.config).await {
            Ok((lent, said)) => {
                self.heard(said);
                Ok(Line::Block(lent))
            }
            Err(e) => {
                self.lost(&e);
                Err(e)
            }
        }
    }

    /// A call on the hot way failed: where the server is lost, it is not asked for a moment, and then looked for anew.
    pub(crate) fn lost(&self, error: &Error) {
        if error.kind() == ErrorKind::Unreachable {
            self.hot.pool.breaker.lost(Instant::now());
            self.hot.pool.drop_idle();
            self.connections.iter().for_each(crate::connection::Connection::doubt);
            self.hot.set(None, None);
        }
    }

    /// A hot call was answered, if only with a refusal.
    pub(crate) fn answered(&self) {
        self.hot.pool.breaker.answered();
    }

    /// Tells the breaker how a call over gRPC ended.
    pub(crate) fn judge_grpc<T>(&self, ended: &Result<T>) {
        match ended {
            // Nobody there. Any other failure came from somebody: a server, or what stands before it.
            Err(e) if e.kind() == ErrorKind::Unreachable && !e.may_have_run() => self.lost(e),
            // Nobody answered, and perhaps the deadline was short.
            Err(e) if e.kind() == ErrorKind::Late => {}
            _ => self.answered(),
        }
    }

    /// What a lost server means for an engine.
    ///
    /// # Errors
    /// The error, where it is no loss or losses are to be told.
    pub(crate) fn miss(&self, error: Error) -> Result<MissReason> {
        if !error.is_loss() {
            return Err(error);
        }
        count(&self.counts.lost_calls, 1);
        match (self.config.lost, error.kind()) {
            (Lost::Errors, _) => Err(error),
            (Lost::Misses, ErrorKind::Late) => Ok(MissReason::Late),
            (Lost::Misses, _) => Ok(MissReason::Unreachable),
        }
    }

    /// A hot call with one answer, tried again where that helps; all of them may be repeated.
    pub(crate) async fn hot<Req, Sent>(
        &self,
        verb: &'static str,
        call: &Call,
        make: impl Fn(v1::CallContext) -> Req,
        send: impl Fn(Grpc, tonic::Request<Req>) -> Sent,
    ) -> Result<Req::Reply>
    where
        Req: Verb,
        Sent: Future<Output = Result<tonic::Response<Req::Reply>, tonic::Status>>,
    {
        let mut tries = self.begin(call);
        loop {
            match self.hot_once(verb, &tries, call, &make, &send).await {
                Ok(reply) => return Ok(reply),
                Err(e) => tries.again(e, Safety::Repeatable).await?,
            }
        }
    }

    /// One try of a hot call with one answer.
    pub(crate) async fn hot_once<Req, Sent>(
        &self,
        verb: &'static str,
        tries: &Tries<'_>,
        call: &Call,
        make: impl Fn(v1::CallContext) -> Req,
        send: impl Fn(Grpc, tonic::Request<Req>) -> Sent,
    ) -> Result<Req::Reply>
    where
        Req: Verb,
        Sent: Future<Output = Result<tonic::Response<Req::Reply>, tonic::Status>>,
    {
        let left = tries.left(verb)?;
        match self.hot_line().await? {
            Line::Grpc => {
                let reply = self.once(verb, tries, call, make, send).await;
                self.judge_grpc(&reply);
                reply
            }
            Line::Block(lent) => {
                let ask = |lent| self.ask_block(verb, lent, make(call.to_proto(left)), left);
                match ask(lent).await {
                    // Closed since it was last used, as by a server that was started again: not a loss, yet.
                    Err(Asked::Stale) => match self.hot_line().await? {
                        Line::Block(lent) => ask(lent).await.map_err(Asked::into_error),
                        Line::Grpc => self.once(verb, tries, call, &make, send).await,
                    },
                    other => other.map_err(Asked::into_error),
                }
            }
        }
    }

    async fn ask_block<Req: Verb>(
        &self,
        verb: &'static str,
        mut lent: Lent<'_>,
        request: Req,
        left: Duration,
    ) -> std::result::Result<Req::Reply, Asked> {
        let used = lent.conn().used;
        let patience = self.config.patience;
        let answer = tokio::time::timeout(left, lent.conn().call(verb, request.pack(), patience)).await;
        let answer = answer.unwrap_or_else(|_| Err(Error::late(verb)));
        self.block_answered(lent, used, answer).and_then(|message| {
            Req::unpack(message).ok_or_else(|| {
                Asked::Failed(Error::protocol("a call was answered with another's answer").with("verb", verb))
            })
        })
    }

    /// What an answer on a block connection means for the connection and for the breaker.
    pub(crate) fn block_answered<T>(
        &self,
        lent: Lent<'_>,
        used: bool,
        answer: Result<T>,
    ) -> std::result::Result<T, Asked> {
        match answer {
            Ok(reply) => {
                self.answered();
                lent.give_back();
                Ok(reply)
            }
            Err(e) if !e.is_loss() => {
                self.answered();
                lent.give_back();
                Err(Asked::Failed(e))
            }
            // The connection goes with the call, whatever else.
            Err(e) if used && e.kind() == ErrorKind::Unreachable && !e.is_silence() => {
                self.hot.pool.drop_idle();
                Err(Asked::Stale)
            }
            Err(e) => {
                self.lost(&e);
                Err(Asked::Failed(e))
            }
        }
    }
}

/// How a call on a block connection failed.
pub(crate) enum Asked {
    /// The connection was closed before: another may do.
    Stale,
    /// So.
    Failed(Error),
}

impl Asked {
    pub(crate) fn into_error(self) -> Error {
        match self {
            Self::Stale => Error::new(ErrorKind::Unreachable, "the server closes its connections"),
            Self::Failed(e) => e,
        }
    }
}

/// Host of a URI, and whether it is https.
fn host_of(uri: &str) -> Option<(String, bool)> {
    let parsed: tonic::transport::Uri = uri.parse().ok()?;
    let host = parsed.host()?.trim_start_matches('[').trim_end_matches(']').to_owned();
    Some((host, parsed.scheme_str() == Some("https")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_told_from_others() {
        for host in ["localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["example.org", "10.0.0.1", "::2", ""] {
            assert!(!is_loopback(host), "{host}");
        }
        assert_eq!(host_of("https://kv.example:7070"), Some(("kv.example".into(), true)));
        assert_eq!(host_of("http://[::1]:7070"), Some(("::1".into(), false)));
    }
}
