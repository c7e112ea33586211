//! One HTTP/2 connection and its hello. tonic dials again by itself when a connection breaks; the server then asks for a
//! new hello, which is said here once however many calls were waiting for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_proto::v1::admin_client::AdminClient;
use kvkeep_proto::v1::blocks_client::BlocksClient;
use kvkeep_proto::v1::sessions_client::SessionsClient;
use kvkeep_proto::{PROTOCOL_MAJOR, PROTOCOL_MINOR, v1};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::block::sockets::Sockets;
use crate::config::ClientConfig;
use crate::embedded;
use crate::endpoint::{self, Target};
use crate::error::{Error, ErrorKind, Result};

/// HTTP/2 flow-control window of one stream, bytes. With the default of 64 KiB a call waits for the network every 64 KiB.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 flow-control window of one connection, bytes.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Largest HTTP/2 frame that we accept, bytes; the default of 16 KiB costs a wake-up per 16 KiB.
const FRAME_BYTES_MAX: u32 = 1 << 20;
/// Largest message that we accept, bytes: a chunk, or a page of a list.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// An idle connection is asked after so long whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// And counts as broken when it has not answered after so long.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Times that a private server is looked for before the first hello is given up.
const INTRODUCTIONS_MAX: u32 = 3;

/// What generated clients stand on: a channel that adds the token.
pub(crate) type Wire = InterceptedService<Channel, Bearer>;

/// The block verbs on a wire.
pub(crate) fn blocks(wire: Wire) -> BlocksClient<Wire> {
    BlocksClient::new(wire).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// The operator's verbs on a wire.
pub(crate) fn admin(wire: Wire) -> AdminClient<Wire> {
    AdminClient::new(wire).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// The verbs on sessions on a wire.
pub(crate) fn sessions(wire: Wire) -> SessionsClient<Wire> {
    SessionsClient::new(wire).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// Adds `authorization: Bearer` to every call.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// What the server said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Minor version of the wire; the major one is ours.
    pub minor: u32,
    /// What the server understands beside the base of this version.
    pub features: Vec<String>,
    /// Name and version of the server.
    pub server: String,
    /// Changes with every start of the server; leases and reservations end with it.
    pub server_epoch: u64,
    /// The tenant that our credentials belong to.
    pub tenant: String,
    /// The node's name.
    pub node: String,
    /// Bounds of the server.
    pub limits: Limits,
    /// Where else it is reached.
    pub ways: Ways,
}

/// Where else a server is reached, and what this connection may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// TCP port of the block protocol; 0: none.
    pub block_port: u16,
    /// Path of its Unix socket, on its own host; empty: none.
    pub unix_socket: String,
    /// Whether this connection may map the arena.
    pub may_map: bool,
    /// Whether regions may be registered on this connection.
    pub may_register: bool,
}

/// Bounds of a server. A request over one fails with `too_large`; the client splits gets, puts and matches by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Keys of one call.
    pub batch_keys_max: usize,
    /// Queries of one match call.
    pub match_queries_max: usize,
    /// Bytes of one block.
    pub block_bytes_max: u64,
    /// Data bytes of one chunk, either way.
    pub chunk_bytes_max: usize,
    /// Bytes granted by one reserve.
    pub reserve_bytes_max: u64,
    /// Leases of one engine instance.
    pub leases_per_instance_max: u32,
    /// Positions leased by one engine instance.
    pub leased_positions_per_instance_max: u32,
    /// Time to live of a lease.
    pub lease_ttl_max: Duration,
    /// Life of a lease however often it is renewed.
    pub lease_life_max: Duration,
    /// Deadline of a call.
    pub deadline_max: Duration,
    /// A reservation not committed by then is abandoned.
    pub reservation: Duration,
    /// Runs of memory that one call may name.
    pub runs_max: u32,
    /// Memory that one instance may register, bytes.
    pub region_bytes_max: u64,
    /// Slots held for the mapped reads of one instance, bytes.
    pub mapped_bytes_max: u64,
}

impl Hello {
    /// Reads an answer; limits that were left out get small values that any server keeps.
    pub(crate) fn from_proto(reply: v1::HelloReply) -> Result<Self> {
        if reply.major != PROTOCOL_MAJOR {
            return Err(Error::new(ErrorKind::Version, "the server speaks another major version of the wire")
                .with("ours", PROTOCOL_MAJOR)
                .with("theirs", reply.major)
                .with("server", reply.server));
        }
        let l = reply.limits.unwrap_or_default();
        let or = |n: u32, default: u32| if n == 0 { default } else { n };
        let ms = |n: u32, default: u32| Duration::from_millis(u64::from(or(n, default)));
        Ok(Self {
            minor: reply.minor,
            features: reply.features,
            server: reply.server,
            server_epoch: reply.server_epoch,
            tenant: reply.tenant,
            node: reply.node,
            limits: Limits {
                batch_keys_max: or(l.batch_keys_max, 256) as usize,
                match_queries_max: or(l.match_queries_max, 1) as usize,
                block_bytes_max: match l.block_bytes_max {
                    0 => BLOCK_BYTES_MAX,
                    n => n.min(BLOCK_BYTES_MAX),
                },
                // A chunk of ours must also fit the message we accept.
                chunk_bytes_max: (or(l.chunk_bytes_max, 64 << 10) as usize).min(MESSAGE_BYTES_MAX / 2),
                reserve_bytes_max: l.reserve_bytes_max,
                leases_per_instance_max: l.leases_per_instance_max,
                leased_positions_per_instance_max: l.leased_positions_per_instance_max,
                lease_ttl_max: ms(l.lease_ttl_ms_max, 1000),
                lease_life_max: ms(l.lease_life_ms_max, 1000),
                deadline_max: ms(l.deadline_ms_max, 60_000),
                reservation: ms(l.reservation_ms, 1000),
                runs_max: or(l.runs_max, 1024),
                region_bytes_max: l.region_bytes_max,
                mapped_bytes_max: l.mapped_bytes_max,
            },
            ways: Ways {
                block_port: u16::try_from(reply.block_port).unwrap_or(0),
                unix_socket: reply.unix_socket,
                may_map: reply.may_map,
                may_register: reply.may_register,
            },
        })
    }

    /// Of a server that has not been heard of: limits that any server keeps.
    pub(crate) fn unknown() -> Self {
        Self::from_proto(v1::HelloReply { major: PROTOCOL_MAJOR, ..Default::default() })
            .expect("an empty answer of our own version is understood")
    }
}

/// What this client says first.
pub(crate) fn hello_request(config: &ClientConfig) -> v1::HelloRequest {
    v1::HelloRequest {
        major: PROTOCOL_MAJOR,
        minor: PROTOCOL_MINOR,
        instance_id: bytes::Bytes::copy_from_slice(&config.instance.0),
        token: config.token.clone().unwrap_or_default(),
        features: Vec::new(),
        client: config.name.clone(),
    }
}

/// The PEM of the certificate authorities that https is checked against.
pub(crate) fn authorities(config: &ClientConfig) -> Result<String> {
    match (&config.ca_pem, &config.ca_file) {
        (Some(pem), _) => Ok(pem.clone()),
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|e| {
            Error::config("the file of certificate authorities cannot be read")
                .with("file", path.display())
                .caused_by(e)
        }),
        (None, None) => {
            Err(Error::config("https needs the server's certificate authority: set KVKEEP_CA to its PEM file"))
        }
    }
}

/// One connection.
pub(crate) struct Connection {
    wire: Wire,
    /// Number of the hello that holds on this connection; 0: none does.
    greeted: AtomicU64,
    gate: tokio::sync::Mutex<u64>,
}

impl Connection {
    /// Sets up a channel; dials at its first call.
    pub(crate) fn lazy(config: &ClientConfig, target: &Target, sockets: &Arc<Sockets>) -> Result<Self> {
        let uri = match target {
            Target::Tcp(uri) => uri.as_str(),
            Target::Unix(_) | Target::Local(_) => endpoint::NO_HOST,
        };
        let bad = |e: tonic::transport::Error| {
            Error::config("the endpoint is not an address").with("endpoint", &config.endpoint).caused_by(e)
        };
        let mut endpoint = Endpoint::from_shared(uri.to_owned()).map_err(bad)?;
        if uri.starts_with("https://") {
            let pem = authorities(config)?;
            endpoint = endpoint
                .tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)))
                .map_err(|e| Error::config("the certificate authority is not usable PEM").caused_by(e))?;
        }
        let endpoint = endpoint
            .user_agent(config.name.clone())
            .map_err(|e| Error::config("the client's name is not a header value").caused_by(e))?
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let channel = endpoint::channel(&endpoint, target.clone(), config.connect_timeout, sockets);
        let bearer = match &config.token {
            None => None,
            Some(token) => {
                let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
                    .parse()
                    .map_err(|_| Error::config("the token holds characters that no header may hold"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        Ok(Self {
            wire: InterceptedService::new(channel, Bearer(bearer)),
            greeted: AtomicU64::new(0),
            gate: tokio::sync::Mutex::new(0),
        })
    }

    /// The first hello. A private server is started before it, and once more where it ended, having been idle for so long,
    /// just when it was found.
    pub(crate) async fn introduce(
        &self,
        config: &ClientConfig,
        target: &Target,
        within: Duration,
    ) -> Result<(u64, Option<Arc<Hello>>)> {
        let Target::Local(local) = target else { return self.greet(config, within).await };
        let mut tries = 0;
        loop {
            embedded::ensure(local).await?;
            tries += 1;
            match self.greet(config, within).await {
                Err(e) if e.kind() == ErrorKind::Unreachable && tries < INTRODUCTIONS_MAX => {}
                result => return result,
            }
        }
    }

    pub(crate) fn wire(&self) -> Wire {
        self.wire.clone()
    }

    /// Makes sure that a hello holds; answers its number, and what the server said if it was asked just now.
    pub(crate) async fn greet(&self, config: &ClientConfig, within: Duration) -> Result<(u64, Option<Arc<Hello>>)> {
        let held = self.greeted.load(Ordering::Acquire);
        if held != 0 {
            return Ok((held, None));
        }
        let greeting = async {
            let mut last = self.gate.lock().await;
            let held = self.greeted.load(Ordering::Acquire);
            if held != 0 {
                return Ok((held, None)); // another call said it while this one waited
            }
            let mut request = tonic::Request::new(hello_request(config));
            request.set_timeout(within);
            let reply = blocks(self.wire()).hello(request).await.map_err(|s| Error::from_status("hello", s))?;
            let hello = Arc::new(Hello::from_proto(reply.into_inner())?);
            *last += 1;
            self.greeted.store(*last, Ordering::Release);
            Ok((*last, Some(hello)))
        };
        // Whatever happened to the hello, the call that it was said for has not been sent.
        tokio::time::timeout(within, greeting)
            .await
            .unwrap_or_else(|_| Err(Error::late("hello")))
            .map_err(Error::not_run)
    }

    /// The next call says hello again, whatever holds now: the server may be another one.
    pub(crate) fn doubt(&self) {
        self.greeted.store(0, Ordering::Release);
    }

    /// The server says that hello number `held` does not hold (it restarted, or the connection was made anew).
    pub(crate) fn forget(&self, held: u64) {
        // Lost races are right: somebody forgot it already, or said a newer one.
        let _ = self.greeted.compare_exchange(held, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}
