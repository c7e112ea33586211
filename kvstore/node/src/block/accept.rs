//! Accepting: the block port, with TLS where gRPC has it, and the Unix socket, where the first bytes of a connection say
//! which protocol it speaks.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvkeep_client::block::stream;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::{GREETING_MAX, HELLO_WAIT, connection};
use crate::connection::{Connection, Instances, Via};
use crate::listener::Accepted;
use crate::verbs::Verbs;

/// What HTTP/2 begins with. As the length of an envelope it would be over half a GiB.
const HTTP2_BEGINS: [u8; 4] = *b"PRI ";
/// A look at a connection that has sent too little to be told apart is repeated so often.
const SNIFF_EVERY: Duration = Duration::from_millis(2);
/// Connections that wait for the gRPC server.
const GRPC_BACKLOG: usize = 64;
/// Pause after the system refused a connection.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// What every acceptor needs.
#[derive(Clone)]
pub struct Acceptor {
    /// Served on the connections.
    pub verbs: Verbs,
    /// Who is here.
    pub instances: Arc<Instances>,
    /// Ends accepting, and then the connections.
    pub stop: CancellationToken,
    /// Connections that are served.
    pub served: TaskTracker,
    greeting: Arc<Semaphore>,
}

impl Acceptor {
    /// For a node's listeners.
    pub fn new(verbs: Verbs, stop: CancellationToken) -> Self {
        let instances = Arc::clone(&verbs.store.instances);
        Self { verbs, instances, stop, served: TaskTracker::new(), greeting: Arc::new(Semaphore::new(GREETING_MAX)) }
    }

    /// Serves the block port until the node stops.
    pub async fn tcp(self, listener: TcpListener, tls: Option<TlsAcceptor>) {
        while let Some(accepted) = self.next(listener.accept()).await {
            let Ok((stream, peer)) = accepted else {
                tokio::time::sleep(REFUSED_PAUSE).await;
                continue;
            };
            if let Err(error) = stream.set_nodelay(true) {
                debug!(%peer, %error, "nodelay refused");
            }
            let (Some(connection), Ok(place)) =
                (self.instances.admit(Via::Tcp(peer)), Arc::clone(&self.greeting).try_acquire_owned())
            else {
                metrics::counter!("kvkeep_connections_refused_total").increment(1);
                continue;
            };
            let (this, tls) = (self.clone(), tls.clone());
            self.served.spawn(async move {
                match tls {
                    None => {
                        drop(place);
                        let (read, write) = stream::tcp(stream);
                        this.serve(connection, read, write).await;
                    }
                    Some(tls) => match tokio::time::timeout(HELLO_WAIT, tls.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            drop(place);
                            let (read, write) = stream::tls(TlsStream::<TcpStream>::Server(stream));
                            this.serve(connection, read, write).await;
                        }
                        Ok(Err(error)) => debug!(%peer, %error, "TLS handshake failed"),
                        Err(_) => debug!(%peer, "TLS handshake took too long"),
                    },
                }
            });
        }
    }

    /// Serves the Unix socket until the node stops: block connections here, gRPC ones through the channel.
    pub fn unix(
        self,
        listener: UnixListener,
        allowed: impl Fn(u32) -> bool + Send + 'static,
    ) -> (impl Future<Output = ()> + Send + 'static, mpsc::Receiver<io::Result<Accepted<UnixStream>>>) {
        let (grpc, receiver) = mpsc::channel(GRPC_BACKLOG);
        let serving = async move {
            while let Some(accepted) = self.next(listener.accept()).await {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(REFUSED_PAUSE).await;
                    continue;
                };
                let Ok(cred) = stream.peer_cred() else { continue };
                if !allowed(cred.uid()) {
                    warn!(uid = cred.uid(), "unix peer refused: add its uid to auth.unix_uids to let it in");
                    metrics::counter!("kvkeep_connections_refused_total").increment(1);
                    continue;
                }
                let pid = cred.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
                let via = Via::Unix { uid: cred.uid(), pid };
                let (Some(connection), Ok(place)) =
                    (self.instances.admit(via), Arc::clone(&self.greeting).try_acquire_owned())
                else {
                    metrics::counter!("kvkeep_connections_refused_total").increment(1);
                    continue;
                };
                let (this, grpc) = (self.clone(), grpc.clone());
                self.served.spawn(async move {
                    let spoken = tokio::time::timeout(HELLO_WAIT, speaks_http2(&stream)).await;
                    drop(place);
                    match spoken {
                        Ok(Ok(false)) => {
                            let (read, write) = stream::unix(stream);
                            this.serve(connection, read, write).await;
                        }
                        // A gRPC server that takes no more is stopping.
                        Ok(Ok(true)) => drop(grpc.send(Ok(Accepted::new(stream, connection))).await),
                        Ok(Err(error)) => debug!(%error, "unix peer went before it spoke"),
                        Err(_) => debug!("unix peer said nothing"),
                    }
                });
            }
        };
        (serving, receiver)
    }

    async fn next<T>(&self, accept: impl Future<Output = io::Result<T>>) -> Option<io::Result<T>> {
        tokio::select! {
            () = self.stop.cancelled() => None,
            accepted = accept => Some(accepted.inspect_err(|error| warn!(%error, "accept failed"))),
        }
    }

    async fn serve(self, connection: Arc<Connection>, read: stream::ReadHalf, write: stream::WriteHalf) {
        connection::serve(self.verbs, connection, read, write, self.stop).await;
    }
}

/// Looks at the first bytes without taking them.
async fn speaks_http2(stream: &UnixStream) -> io::Result<bool> {
    loop {
        stream.readable().await?;
        let mut first = [0; HTTP2_BEGINS.len()];
        let seen = stream.try_io(Interest::READABLE, || {
            let (_, n) = rustix::net::recv(stream, &mut first[..], RecvFlags::PEEK)?;
            Ok(n)
        });
        match seen {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) if first[..n] != HTTP2_BEGINS[..n] => return Ok(false),
            Ok(n) if n == first.len() => return Ok(true),
            // So far it could be either.
            Ok(_) => tokio::time::sleep(SNIFF_EVERY).await,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}
