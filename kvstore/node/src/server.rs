//! Listeners and the life of a server: bind, serve, drain.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kvkeep_proto::v1;
use kvkeep_proto::v1::admin_server::AdminServer;
use kvkeep_proto::v1::blocks_server::BlocksServer;
use kvkeep_proto::v1::sessions_server::SessionsServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;
use tonic::transport::{Identity, Server, ServerTlsConfig};

use crate::address::{BlockListen, SocketFile};
use crate::block::accept::Acceptor;
use crate::config::Config;
use crate::listener;
use crate::service::admin::Admin;
use crate::service::blocks::Blocks;
use crate::service::sessions::SessionsService;
use crate::store::{Store, Ways};
use crate::verbs::Verbs;

/// HTTP/2 flow-control window of one stream, bytes: a block in flight must not wait for updates.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 flow-control window of a connection, bytes.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Largest HTTP/2 frame this end takes, bytes. gRPC's default of 16 KiB costs a system call and a wake-up each.
const FRAME_BYTES_MAX: u32 = 1 << 20;
/// Largest message beside the data of a chunk: keys, sums, answers of one batch.
const MESSAGE_OVERHEAD_BYTES: usize = 16 << 20;
/// Calls at a time on one connection.
const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// A silent peer is asked for a sign of life.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
/// ... and given up after so long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls in flight may take so long to end at a stop.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// A server whose ports are bound.
pub struct Bound {
    store: Arc<Store>,
    tcp: Option<TcpListener>,
    block: Option<(TcpListener, Option<TlsAcceptor>)>,
    unix: Option<UnixListener>,
    health: tonic_health::server::HealthReporter,
    routers: Vec<Router>,
}

/// Binds every listener of the configuration.
pub async fn bind(store: Arc<Store>) -> anyhow::Result<Bound> {
    let config = &store.config;
    let tcp = match config.listen.grpc.address() {
        None => None,
        Some(address) => Some(TcpListener::bind(address).await.with_context(|| {
            format!("cannot listen on {address}: is another kvkeepd running? try --listen 127.0.0.1:0")
        })?),
    };
    let unix = match config.listen.unix.as_os_str().is_empty() {
        true => None,
        false => Some(
            bind_unix(&config.listen.unix)
                .with_context(|| format!("cannot listen on the Unix socket {}", config.listen.unix.display()))?,
        ),
    };
    let block = bind_block(config, tcp.as_ref().map(TcpListener::local_addr).transpose()?).await?;
    let ways = Ways {
        block_port: block.as_ref().map_or(Ok(0), |(listener, _)| listener.local_addr().map(|a| a.port()))?,
        // Resolved: an absolute path, or empty.
        unix_socket: config.listen.unix.to_string_lossy().into_owned(),
    };
    let _ = store.ways.set(ways); // a store is bound once
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<BlocksServer<Blocks>>().await;
    let router = |tls: bool| -> anyhow::Result<Router> {
        let mut server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
        if tls {
            server = server.tls_config(tls_config(config)?)?;
        }
        let message_max = config.limits.chunk_bytes_max as usize + MESSAGE_OVERHEAD_BYTES;
        let blocks = BlocksServer::new(Blocks::new(Arc::clone(&store)))
            .max_decoding_message_size(message_max)
            .max_encoding_message_size(message_max);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .context("reflection")?;
        Ok(server
            .add_service(blocks)
            .add_service(
                SessionsServer::new(SessionsService::new(Arc::clone(&store)))
                    .max_decoding_message_size(message_max)
                    .max_encoding_message_size(message_max),
            )
            .add_service(AdminServer::new(Admin::new(Arc::clone(&store))).max_encoding_message_size(message_max))
            .add_service(health_service.clone())
            .add_service(reflection))
    };
    let mut routers = Vec::new();
    if tcp.is_some() {
        routers.push(router(config.listen.tls_cert.is_some())?);
    }
    if unix.is_some() {
        routers.push(router(false)?);
    }
    Ok(Bound { store, tcp, block, unix, health, routers })
}

/// The block port, with TLS where gRPC has it.
async fn bind_block(
    config: &Config,
    grpc: Option<SocketAddr>,
) -> anyhow::Result<Option<(TcpListener, Option<TlsAcceptor>)>> {
    let any_port = config.listen.grpc.address().is_some_and(|a| a.port() == 0);
    let at = match (config.listen.block, grpc) {
        (BlockListen::Off, _) | (BlockListen::Beside, None) => return Ok(None),
        (BlockListen::At(address), _) => address,
        (BlockListen::Beside, Some(grpc)) if any_port => SocketAddr::new(grpc.ip(), 0),
        (BlockListen::Beside, Some(grpc)) => {
            let port = grpc.port().checked_add(1).context("no port is above gRPC's: set listen.block")?;
            SocketAddr::new(grpc.ip(), port)
        }
    };
    let listener = TcpListener::bind(at).await.with_context(|| {
        format!("cannot listen on {at} for the block protocol: --block-listen names another, or `off`")
    })?;
    let tls = match (&config.listen.tls_cert, &config.listen.tls_key) {
        (Some(cert), Some(key)) => Some(block_tls(cert, key)?),
        _ => None,
    };
    Ok(Some((listener, tls)))
}

fn block_tls(cert: &std::path::Path, key: &std::path::Path) -> anyhow::Result<TlsAcceptor> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("{} holds no certificates", cert.display()))?;
    let key = PrivateKeyDer::from_pem_file(key).with_context(|| format!("{} holds no private key", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key))
        .context("the TLS certificate and key do not fit")?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn tls_config(config: &Config) -> anyhow::Result<ServerTlsConfig> {
    let (Some(cert), Some(key)) = (&config.listen.tls_cert, &config.listen.tls_key) else {
        anyhow::bail!("listen.tls_cert and listen.tls_key come together");
    };
    let mode = fs::metadata(key).with_context(|| format!("cannot read {}", key.display()))?.permissions().mode();
    if mode & 0o077 != 0 {
        anyhow::bail!("the TLS key {} is readable by others: chmod 600", key.display());
    }
    let read = |p: &std::path::Path| fs::read(p).with_context(|| format!("cannot read {}", p.display()));
    Ok(ServerTlsConfig::new().identity(Identity::from_pem(read(cert)?, read(key)?)))
}

/// A socket of our own user; one that a dead server left behind is replaced, one that answers is not.
fn bind_unix(path: &std::path::Path) -> io::Result<UnixListener> {
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "a server answers on it"));
        }
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

impl Bound {
    /// Where clients find it, for the line that scripts wait for: the address of TCP, or `unix:` and the path of the socket
    /// where that is all there is.
    pub fn ready(&self) -> io::Result<String> {
        Ok(match &self.tcp {
            Some(tcp) => tcp.local_addr()?.to_string(),
            None => format!("unix:{}", self.store.config.listen.unix.display()),
        })
    }

    /// Serves until `stop`; then refuses new work, lets calls in flight end, and returns.
    pub async fn serve(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let store = Arc::clone(&self.store);
        let mut servers = tokio::task::JoinSet::new();
        let instances = Arc::clone(&store.instances);
        let acceptor = Acceptor::new(Verbs { store: Arc::clone(&store) }, stop.clone());
        let served = acceptor.served.clone();
        if let Some((listener, tls)) = self.block.take() {
            let accepting = acceptor.clone().tcp(listener, tls);
            servers.spawn(async move {
                accepting.await;
                Ok(())
            });
        }
        // However serving ends, the socket's file goes with it.
        let file = |_: &UnixListener| SocketFile::of(&store.config.listen.unix).context("the socket's file");
        let _socket_file = self.unix.as_ref().map(file).transpose()?;
        if let Some(unix) = self.unix.take() {
            let own = rustix::process::getuid().as_raw();
            let uids = store.config.auth.unix_uids.clone();
            let allowed = move |uid: u32| uid == own || uid == 0 || uids.contains(&uid);
            let (accepting, incoming) = acceptor.clone().unix(unix, allowed);
            servers.spawn(async move {
                accepting.await;
                Ok(())
            });
            let incoming = ReceiverStream::new(incoming);
            let router = self.routers.pop().context("a router for the Unix socket")?;
            servers.spawn(router.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
        }
        if let Some(tcp) = self.tcp.take() {
            let router = self.routers.pop().context("a router for TCP")?;
            let incoming = listener::tcp(tcp, instances);
            servers.spawn(router.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
        }
        let health = self.health;
        let ended = async {
            while let Some(result) = servers.join_next().await {
                result??;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            result = ended => return result,
            () = stop.cancelled() => {}
        }
        health.set_not_serving::<BlocksServer<Blocks>>().await;
        // Streams without an end (watchers) are told; calls get their time; then the door closes.
        store.stopping().cancel();
        served.close();
        let drained = async {
            while servers.join_next().await.is_some() {}
            served.wait().await;
        };
        if tokio::time::timeout(DRAIN_MAX, drained).await.is_err() {
            tracing::warn!(seconds = DRAIN_MAX.as_secs(), "calls were still in flight at the end of the drain");
            servers.shutdown().await;
        }
        Ok(())
    }
}
