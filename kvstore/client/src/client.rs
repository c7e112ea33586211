//! The client: its connections, the way every call takes (deadline, hello, retries), and the verbs that name no namespace.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvkeep_core::ids::LeaseId;
use kvkeep_core::{Format, Handle, RequestId};
use kvkeep_proto::v1;
use parking_lot::RwLock;

use crate::admin::Admin;
use crate::block::breaker::BreakerState;
use crate::block::faults::Fault;
use crate::block::pool::Way;
use crate::block::sockets::Sockets;
use crate::budget::Bucket;
use crate::call::Call;
use crate::config::{ClientConfig, Lost};
use crate::connection::{Connection, Hello, Wire, blocks};
use crate::convert;
use crate::endpoint::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{EventStream, Watch};
use crate::hot::Hot;
use crate::namespace::Namespace;

/// Times that one call says hello anew before it gives up.
const HELLOS_PER_CALL_MAX: u32 = 3;

/// A KVKeep server, seen from a program. Cheap to clone; all clones share connections and the retry budget.
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
}

/// What a client has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Calls that the program made.
    pub calls: u64,
    /// Tries beyond the first.
    pub retries: u64,
    /// Retries not made because the budget was spent.
    pub retries_denied: u64,
    /// Hellos said, the first ones included.
    pub hellos: u64,
    /// Restarts of the server that were noticed.
    pub restarts: u64,
    /// Parts given back as misses because their checksums did not match.
    pub bad_sums: u64,
    /// Answers that broke the rules of the wire.
    pub violations: u64,
    /// Parts given back as misses because the deadline passed.
    pub late_parts: u64,
    /// Calls that were lost with the server, and answered with misses where that was asked for.
    pub lost_calls: u64,
    /// Times that the circuit breaker opened.
    pub breaker_opened: u64,
    /// Calls that it did not let out.
    pub breaker_refused: u64,
    /// Parts whose destination the server may still be writing: see [`crate::region`].
    pub doubtful_parts: u64,
}

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) calls: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) retries_denied: AtomicU64,
    pub(crate) hellos: AtomicU64,
    pub(crate) restarts: AtomicU64,
    pub(crate) bad_sums: AtomicU64,
    pub(crate) violations: AtomicU64,
    pub(crate) late_parts: AtomicU64,
    pub(crate) lost_calls: AtomicU64,
    pub(crate) doubtful_parts: AtomicU64,
}

/// Adds to a counter; counters order nothing.
pub(crate) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

pub(crate) struct Shared {
    pub(crate) config: ClientConfig,
    pub(crate) connections: Vec<Connection>,
    pub(crate) target: Target,
    pub(crate) hot: Hot,
    pub(crate) sockets: Arc<Sockets>,
    next: AtomicUsize,
    pub(crate) hello: RwLock<Arc<Hello>>,
    bucket: Bucket,
    pub(crate) counts: Counts,
}

/// Whether a step may be done twice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Safety {
    /// Doing it again changes nothing.
    Repeatable,
    /// Tried again only when the server cannot have done it.
    Once,
}

/// A connection with a hello that holds, for one try.
pub(crate) struct Line<'a> {
    connection: &'a Connection,
    hello_number: u64,
    pub(crate) wire: Wire,
}

/// The tries of one call.
pub(crate) struct Tries<'a> {
    shared: &'a Shared,
    pub(crate) deadline: Instant,
    made: u32,
    hellos: u32,
    /// How the server was lost, if it was.
    lost: Option<Error>,
}

impl Client {
    /// Connects and says hello on every connection, and finds the fastest way. Fails within the connect timeout and the
    /// deadline where nobody answers; an endpoint `local:` starts its server first, within [`crate::embedded::START_MAX`].
    pub async fn connect(config: ClientConfig) -> Result<Self> {
        let client = Self::lazy(config)?;
        let shared = &client.shared;
        let within = shared.config.deadline.min(shared.config.connect_timeout + Duration::from_secs(3));
        for connection in &shared.connections {
            let (_, hello) = connection
                .introduce(&shared.config, &shared.target, within)
                .await
                .map_err(|e| e.with("endpoint", &shared.config.endpoint))?;
            shared.heard(hello);
        }
        shared.find_way(true).await?;
        Ok(client)
    }

    /// A client that connects at its first call. Fails only where the configuration is wrong: while nobody answers, the hot
    /// verbs are misses (or errors, as [`ClientConfig::lost`] says).
    pub fn lazy(config: ClientConfig) -> Result<Self> {
        config.validate()?;
        let target = config.target()?;
        let sockets = Arc::<Sockets>::default();
        let lazy = |_| Connection::lazy(&config, &target, &sockets);
        let connections = (0..config.connections).map(lazy).collect::<Result<Vec<_>>>()?;
        let shared = Shared {
            hot: Hot::new(&config, Arc::clone(&sockets)),
            sockets,
            bucket: Bucket::new(config.retry),
            config,
            connections,
            target,
            next: AtomicUsize::new(0),
            hello: RwLock::new(Arc::new(Hello::unknown())),
            counts: Counts::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Which way the hot verbs go; `None`: nobody has answered yet.
    pub fn way(&self) -> Option<Way> {
        self.shared.hot.way()
    }

    /// What the circuit breaker lets out.
    pub fn breaker(&self) -> BreakerState {
        self.shared.hot.pool.breaker.state()
    }

    /// Plays a lost server, for tests of programs that use this client.
    pub fn inject(&self, fault: Fault) {
        self.shared.hot.faults.set(fault);
    }

    /// What the server said last of itself: its limits, its version, our tenant.
    pub fn hello(&self) -> Arc<Hello> {
        self.shared.hello()
    }

    /// Changes when the server was started again: leases and reservations of before are gone.
    pub fn server_epoch(&self) -> u64 {
        self.hello().server_epoch
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &ClientConfig {
        &self.shared.config
    }

    /// What was counted since the client was made.
    pub fn counters(&self) -> Counters {
        let c = &self.shared.counts;
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Counters {
            calls: get(&c.calls),
            retries: get(&c.retries),
            retries_denied: get(&c.retries_denied),
            hellos: get(&c.hellos),
            restarts: get(&c.restarts),
            bad_sums: get(&c.bad_sums),
            violations: get(&c.violations),
            late_parts: get(&c.late_parts),
            lost_calls: get(&c.lost_calls),
            breaker_opened: self.shared.hot.pool.breaker.counts().0,
            breaker_refused: self.shared.hot.pool.breaker.counts().1,
            doubtful_parts: get(&c.doubtful_parts),
        }
    }

    /// Checks a format with the server; answers its fingerprint.
    pub async fn register_format(&self, format: &Format, call: &Call) -> Result<[u8; 16]> {
        let format = convert::format_to_proto(format);
        let reply = self
            .shared
            .unary(
                "register_format",
                call,
                Safety::Repeatable,
                |ctx| v1::RegisterFormatRequest { ctx: Some(ctx), format: Some(format.clone()) },
                |wire, r| async move { blocks(wire).register_format(r).await },
            )
            .await?;
        fingerprint(&reply.fingerprint)
    }

    /// Opens a namespace, making it where it is new: same declaration, same namespace. Fails with `format_mismatch` where the
    /// name has another format. Look at [`Namespace::revision_matches`] before reading or writing.
    pub async fn register_namespace(&self, name: &str, format: &Format, revision_digest: &str) -> Result<Namespace> {
        let wire_format = convert::format_to_proto(format);
        let reply = self
            .shared
            .unary(
                "register_namespace",
                &Call::default(),
                Safety::Repeatable,
                |ctx| v1::RegisterNamespaceRequest {
                    ctx: Some(ctx),
                    name: name.to_owned(),
                    format: Some(wire_format.clone()),
                    revision_digest: revision_digest.to_owned(),
                    require_full: false,
                },
                |wire, r| async move { blocks(wire).register_namespace(r).await },
            )
            .await?;
        Ok(Namespace {
            handle: convert::handle_from_proto(reply.handle)?,
            created: reply.created,
            fingerprint: fingerprint(&reply.fingerprint)?,
            revision_matches: reply.revision_matches,
            revision_digest: reply.revision_digest,
            client: self.clone(),
        })
    }

    /// A namespace by a handle known from elsewhere (another process of the engine, an operator's list). Nothing is asked
    /// of the server; a handle that is wrong shows at its first call.
    pub fn attach(&self, handle: Handle) -> Namespace {
        Namespace {
            handle,
            created: false,
            fingerprint: [0; 16],
            revision_matches: true,
            revision_digest: String::new(),
            client: self.clone(),
        }
    }

    /// Ends leases, by id or by the request that took them, and abandons reservations. Idempotent; answers how many ended.
    pub async fn release(&self, leases: &[LeaseId], requests: &[RequestId], call: &Call) -> Result<u32> {
        let request_ids: Vec<_> = requests.iter().map(|r| Bytes::copy_from_slice(r.as_bytes())).collect();
        self.shared.release(leases.iter().map(|l| l.0).collect(), Vec::new(), request_ids, call).await
    }

    /// Numbers of the server, this tenant's share where it has one.
    pub async fn stats(&self, call: &Call) -> Result<v1::StatsReply> {
        self.shared
            .unary(
                "stats",
                call,
                Safety::Repeatable,
                |ctx| v1::StatsRequest { ctx: Some(ctx) },
                |wire, r| async move { blocks(wire).stats(r).await },
            )
            .await
    }

    /// What a recent request missed, and why: `misses` of the answer, newest last.
    pub async fn explain_request(&self, request: &RequestId, call: &Call) -> Result<v1::ExplainReply> {
        self.shared
            .unary(
                "explain",
                call,
                Safety::Repeatable,
                |ctx| v1::ExplainRequest {
                    ctx: Some(ctx),
                    request_id: Bytes::copy_from_slice(request.as_bytes()),
                    ..v1::ExplainRequest::default()
                },
                |wire, r| async move { blocks(wire).explain(r).await },
            )
            .await
    }

    /// Follows what is stored and removed. The call's deadline covers the opening; the stream then lives until one side
    /// ends it, and a dead connection ends it within seconds.
    pub async fn watch_events(&self, watch: &Watch, call: &Call) -> Result<EventStream> {
        EventStream::open(&self.shared, watch, call).await
    }

    /// The operator's verbs. They need the admin right.
    pub fn admin(&self) -> Admin {
        Admin { client: self.clone() }
    }
}

fn fingerprint(bytes: &[u8]) -> Result<[u8; 16]> {
    bytes.try_into().map_err(|_| Error::protocol("a fingerprint has 16 bytes").with("bytes", bytes.len()))
}

impl Shared {
    pub(crate) fn hello(&self) -> Arc<Hello> {
        Arc::clone(&self.hello.read())
    }

    /// Starts a call: earns budget and fixes the moment it must end.
    pub(crate) fn begin(&self, call: &Call) -> Tries<'_> {
        count(&self.counts.calls, 1);
        self.bucket.earn();
        let within = call.deadline.unwrap_or(self.config.deadline).min(self.hello().limits.deadline_max);
        Tries { shared: self, deadline: Instant::now() + within, made: 1, hellos: 0, lost: None }
    }

    /// A connection on which hello was said, in turn.
    pub(crate) async fn line(&self, left: Duration) -> Result<Line<'_>> {
        let i = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let connection = &self.connections[i];
        let (hello_number, said) = connection.greet(&self.config, left).await?;
        self.heard(said);
        Ok(Line { connection, hello_number, wire: connection.wire() })
    }

    /// Takes note of what a server said, if it said something just now.
    pub(crate) fn heard(&self, said: Option<Arc<Hello>>) {
        let Some(said) = said else { return };
        count(&self.counts.hellos, 1);
        let mut known = self.hello.write();
        if known.server_epoch != 0 && known.server_epoch != said.server_epoch {
            count(&self.counts.restarts, 1);
        }
        *known = said;
    }

    /// A call with one answer.
    pub(crate) async fn unary<Req, Rep, Sent>(
        &self,
        verb: &'static str,
        call: &Call,
        safety: Safety,
        make: impl Fn(v1::CallContext) -> Req,
        send: impl Fn(Wire, tonic::Request<Req>) -> Sent,
    ) -> Result<Rep>
    where
        Sent: Future<Output = Result<tonic::Response<Rep>, tonic::Status>>,
    {
        let mut tries = self.begin(call);
        loop {
            match self.once(verb, &tries, call, &make, &send).await {
                Ok(reply) => return Ok(reply),
                Err(e) => tries.again(e, safety).await?,
            }
        }
    }

    /// One try of a call with one answer.
    pub(crate) async fn once<Req, Rep, Sent>(
        &self,
        verb: &'static str,
        tries: &Tries<'_>,
        call: &Call,
        make: impl Fn(v1::CallContext) -> Req,
        send: impl Fn(Wire, tonic::Request<Req>) -> Sent,
    ) -> Result<Rep>
    where
        Sent: Future<Output = Result<tonic::Response<Rep>, tonic::Status>>,
    {
        let line = self.line(tries.left(verb)?).await?;
        let left = tries.left(verb)?;
        let mut request = tonic::Request::new(make(call.to_proto(left)));
        request.set_timeout(left);
        let answer = tokio::time::timeout(left, send(line.wire.clone(), request)).await;
        match answer {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(line.judge(verb, status)),
            Err(_) => Err(Error::late(verb)),
        }
    }

    pub(crate) async fn release(
        &self,
        lease_ids: Vec<u64>,
        reservation_ids: Vec<u64>,
        request_ids: Vec<Bytes>,
        call: &Call,
    ) -> Result<u32> {
        let reply = self
            .hot(
                "release",
                call,
                |ctx| v1::ReleaseRequest {
                    ctx: Some(ctx),
                    lease_ids: lease_ids.clone(),
                    reservation_ids: reservation_ids.clone(),
                    request_ids: request_ids.clone(),
                },
                |wire, r| async move { blocks(wire).release(r).await },
            )
            .await;
        match reply {
            Ok(reply) => Ok(reply.released),
            // What a lost server held ends by itself.
            Err(e) => self.miss(e).map(|_| 0),
        }
    }
}

impl Line<'_> {
    /// What a failed call means; notes where hello must be said again.
    pub(crate) fn judge(&self, verb: &'static str, status: tonic::Status) -> Error {
        let error = Error::from_status(verb, status);
        if error.kind() == ErrorKind::HelloRequired {
            self.connection.forget(self.hello_number);
        }
        error
    }
}

impl Tries<'_> {
    /// Time left, or that none is.
    pub(crate) fn left(&self, verb: &'static str) -> Result<Duration> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(Error::late(verb)),
            left => Ok(left),
        }
    }

    /// After a failed try: waits until the next one may start, or gives the error back.
    pub(crate) async fn again(&mut self, error: Error, safety: Safety) -> Result<()> {
        if error.kind() == ErrorKind::HelloRequired {
            // The server did nothing but ask for a greeting: free, but not for ever.
            self.hellos += 1;
            return if self.hellos <= HELLOS_PER_CALL_MAX { Ok(()) } else { Err(error) };
        }
        let budget = self.shared.bucket.budget();
        let error = match self.lost.take() {
            // What happened says more than that the server is not asked again just now.
            Some(lost) if error.is_not_asked() => lost.final_word(),
            _ => error,
        };
        if error.is_loss() {
            self.lost = Some(error.clone());
        }
        if error.is_silence() && self.shared.config.lost == Lost::Misses {
            // An engine does not wait for a lost server again and again within one call.
            return Err(error);
        }
        if !error.is_retryable() || (safety == Safety::Once && error.may_have_run()) || self.made >= budget.attempts_max
        {
            return Err(error);
        }
        let pause = budget.pause(self.made).max(error.retry_after().unwrap_or_default());
        if Instant::now() + pause >= self.deadline {
            return Err(error);
        }
        if !self.shared.bucket.spend() {
            count(&self.shared.counts.retries_denied, 1);
            return Err(error.with("retry_budget", "spent"));
        }
        self.made += 1;
        count(&self.shared.counts.retries, 1);
        tokio::time::sleep(pause).await;
        Ok(())
    }
}
