//! Where an endpoint leads, and how a connection to it is made.

use std::io::ErrorKind as IoErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::block::sockets::{NotedStream, Sockets};
use crate::embedded::{self, LocalEndpoint};
use crate::error::{Error, ErrorKind, Result};

/// Longest path of a Unix socket, bytes: what the kernel's `sun_path` holds beside its final zero.
pub(crate) const SOCKET_PATH_BYTES_MAX: usize = 107;
/// What stands in `:authority` of a connection that has no host.
pub(crate) const NO_HOST: &str = "http://localhost";

/// Where an endpoint leads.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A server reached over TCP, as a URI with its scheme.
    Tcp(String),
    /// A server on this host, by the path of its Unix socket.
    Unix(PathBuf),
    /// A server of our own on this host, started where none answers.
    Local(LocalEndpoint),
}

impl Target {
    /// Reads an endpoint.
    pub(crate) fn parse(endpoint: &str) -> Result<Self> {
        if let Some(path) = endpoint.strip_prefix("unix:") {
            let path = absolute_path(path).ok_or_else(|| {
                Error::config("a Unix socket is named by its absolute path: unix:/run/kvkeep/kvkeepd.sock")
                    .with("endpoint", endpoint)
            })?;
            fits(path)?;
            return Ok(Self::Unix(path.to_path_buf()));
        }
        if endpoint.starts_with(embedded::SCHEME) {
            return endpoint.parse().map(Self::Local);
        }
        match endpoint.split_once("://") {
            None if endpoint.is_empty() => Err(Error::config("the endpoint is empty")),
            None => Ok(Self::Tcp(format!("http://{endpoint}"))),
            Some(("http" | "https", _)) => Ok(Self::Tcp(endpoint.to_owned())),
            Some((scheme, _)) => Err(Error::config(
                "an endpoint is http://host:port, https://host:port, host:port, unix:/path/of/socket or local:folder",
            )
            .with("scheme", scheme)),
        }
    }
}

/// The path of `/path` or `///path`.
fn absolute_path(text: &str) -> Option<&Path> {
    let path = text.strip_prefix("//").unwrap_or(text);
    (path.starts_with('/') && path.len() > 1).then(|| Path::new(path))
}

/// Whether a socket can have this path.
pub(crate) fn fits(socket: &Path) -> Result<()> {
    let bytes = socket.as_os_str().len();
    if bytes <= SOCKET_PATH_BYTES_MAX {
        return Ok(());
    }
    Err(Error::config("the path of a Unix socket has at most 107 bytes: use a folder with a shorter path")
        .with("socket", socket.display())
        .with("bytes", bytes))
}

/// Connects to the socket at `path`.
pub(crate) async fn dial(path: &Path, within: Duration) -> Result<UnixStream> {
    let failed = |message: &'static str, e: std::io::Error| {
        Error::new(ErrorKind::Unreachable, message).with("socket", path.display()).caused_by(e)
    };
    match tokio::time::timeout(within, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(e)) => Err(match e.kind() {
            IoErrorKind::NotFound => failed("there is no such Unix socket: is kvkeepd running?", e),
            IoErrorKind::ConnectionRefused => failed("nobody answers on the Unix socket: is kvkeepd running?", e),
            IoErrorKind::PermissionDenied => failed("the Unix socket is not for this user", e),
            IoErrorKind::WouldBlock => failed("too many wait for the server to answer on the Unix socket", e),
            _ => failed("the Unix socket cannot be connected to", e),
        }),
        Err(late) => Err(failed("the Unix socket does not answer", late.into())),
    }
}

/// Connects to the host and port of a URI; what bounds it is the endpoint's connect timeout.
async fn dial_tcp(uri: &Uri) -> Result<TcpStream> {
    let failed = |e: std::io::Error| {
        let message = match e.kind() {
            IoErrorKind::ConnectionRefused => "nobody answers at the endpoint: is kvkeepd running?",
            _ => "the endpoint cannot be connected to",
        };
        Error::new(ErrorKind::Unreachable, message).with("endpoint", uri).caused_by(e)
    };
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(default))).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream)
}

/// A channel that dials at its first call, and again when its connection breaks. For a Unix socket `endpoint` names no connect
/// timeout: the whole of `dial` counts. Dialled here also for TCP, so that every socket is known ([`Sockets`]).
pub(crate) fn channel(endpoint: &Endpoint, target: Target, within: Duration, sockets: &Arc<Sockets>) -> Channel {
    let sockets = Arc::clone(sockets);
    match target {
        Target::Tcp(_) => {
            endpoint.clone().connect_timeout(within).connect_with_connector_lazy(tower::service_fn(move |uri: Uri| {
                let sockets = Arc::clone(&sockets);
                async move { dial_tcp(&uri).await.map(|stream| TokioIo::new(NotedStream::new(&sockets, stream))) }
            }))
        }
        Target::Unix(_) | Target::Local(_) => endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (target, sockets) = (target.clone(), Arc::clone(&sockets));
            async move {
                let stream = match &target {
                    Target::Tcp(_) => return Err(Error::config("a TCP endpoint is no Unix socket")),
                    Target::Unix(path) => dial(path, within).await?,
                    Target::Local(local) => embedded::dial(local, within).await?,
                };
                Ok::<_, Error>(TokioIo::new(NotedStream::new(&sockets, stream)))
            }
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unix_endpoint_is_an_absolute_path() {
        for text in ["unix:/run/kv.sock", "unix:///run/kv.sock"] {
            match Target::parse(text).unwrap() {
                Target::Unix(path) => assert_eq!(path, Path::new("/run/kv.sock"), "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        for text in ["unix:", "unix:/", "unix:run/kv.sock", "unix://run/kv.sock", "unix://"] {
            let error = Target::parse(text).unwrap_err();
            assert!(error.to_string().contains("absolute path"), "{text}: {error}");
        }
        let long = format!("unix:/{}", "s".repeat(SOCKET_PATH_BYTES_MAX));
        assert!(Target::parse(&long).unwrap_err().to_string().contains("at most 107 bytes"));
    }

    #[tokio::test]
    async fn a_socket_that_nobody_serves_is_unreachable_at_once() {
        let folder = std::env::temp_dir().join(format!("kvkeep-endpoint-{}", rand::random::<u32>()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("stale.sock");
        let missing = dial(&path, Duration::from_secs(5)).await.unwrap_err();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // leaves its file
        let stale = dial(&path, Duration::from_secs(5)).await.unwrap_err();
        std::fs::remove_dir_all(&folder).unwrap();
        for (error, says) in [(missing, "no such"), (stale, "nobody answers")] {
            assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
            assert!(error.to_string().contains(says), "{error}");
            assert!(error.is_retryable() && !error.may_have_run());
        }
    }
}
