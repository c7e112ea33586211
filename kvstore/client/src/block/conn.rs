//! One connection of the block protocol, used by one call at a time.
//!
//! A call sends its frame and reads until its last answer; heartbeats tell that the server lives. When nothing at all came
//! for `ClientConfig::patience`, the server counts as gone and the connection is closed: an answer that is late is one that
//! nobody would understand.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use kvkeep_proto::v1::Envelope;
use kvkeep_proto::v1::envelope::Message;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{TlsConnector, TlsStream, rustls};

use super::reader::FrameReader;
use super::sockets::{Noted, Sockets};
use super::stream::{self, WriteHalf};
use super::{frame, stream::ReadHalf};
use crate::config::ClientConfig;
use crate::connection::{self, Hello};
use crate::error::{Error, ErrorKind, Result};

/// Largest envelope that we take, bytes: what the largest batch is answered with, and then some.
const ENVELOPE_BYTES_MAX: usize = 32 << 20;
/// Frames of calls that were given up, which one call reads over before it gives up the connection.
const STRAY_FRAMES_MAX: u32 = 4096;

/// Where block connections go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// The Unix socket.
    Unix(PathBuf),
    /// The block port.
    Tcp {
        /// Name or address.
        host: String,
        /// Its port.
        port: u16,
        /// With TLS.
        tls: bool,
    },
}

/// A connection that has said hello.
pub(crate) struct Conn {
    // Dropped before the halves close the socket.
    _noted: Noted,
    frames: FrameReader,
    write: WriteHalf,
    head: BytesMut,
    last_call: u64,
    /// What the server said.
    pub(crate) hello: Arc<Hello>,
    /// The server's process, where it is on this host and can be watched.
    pub(crate) server: Option<Arc<OwnedFd>>,
    /// Calls were answered on it before.
    pub(crate) used: bool,
}

/// An I/O error as what it means for the call. `sent`: the server may have it.
fn lost(verb: &'static str, sent: bool, error: io::Error) -> Error {
    let message = match error.kind() {
        io::ErrorKind::TimedOut => "the server gave no sign of life",
        io::ErrorKind::InvalidData => {
            return Error::protocol("the server broke the rules of the block protocol")
                .with("verb", verb)
                .caused_by(error);
        }
        _ => "the connection to the server broke",
    };
    let error = Error::new(ErrorKind::Unreachable, message).with("verb", verb).caused_by(error);
    if sent { error.may_be_done() } else { error }
}

impl Conn {
    /// Connects and says hello, within `config.patience` for each step.
    pub(crate) async fn dial(address: &Address, config: &ClientConfig, sockets: &Arc<Sockets>) -> Result<Self> {
        let patience = config.patience;
        let Connected { noted, read, write, server } = connect(address, config, sockets).await?;
        let mut frames = FrameReader::new(read);
        frames.patience = Some(patience);
        let hello = Arc::new(Hello::unknown());
        let head = BytesMut::new();
        let mut conn = Self { _noted: noted, frames, write, head, last_call: 0, hello, server, used: false };
        let said = connection::hello_request(config);
        match conn.call("hello", Message::Hello(said), patience).await.map_err(Error::not_run)? {
            Message::HelloReply(reply) => conn.hello = Arc::new(Hello::from_proto(reply)?),
            _ => return Err(Error::protocol("hello was answered with something else")),
        }
        Ok(conn)
    }

    /// Sends the next frame of a call, or the first of a new one.
    pub(crate) async fn send(
        &mut self,
        verb: &'static str,
        envelope: Envelope,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> Result<()> {
        self.head.clear();
        frame::encode(&envelope, payload.len(), &mut self.head);
        let sent = self.write.write_frame(&self.head, payload, descriptor, Some(patience)).await;
        sent.map_err(|e| lost(verb, true, e))
    }

    /// A number for a new call.
    pub(crate) fn next_call(&mut self) -> u64 {
        self.last_call += 1;
        self.last_call
    }

    /// The next frame of a call, and the bytes of its payload, which must be read before anything else.
    pub(crate) async fn next(
        &mut self,
        verb: &'static str,
        call: u64,
        patience: Duration,
    ) -> Result<(Envelope, usize)> {
        self.frames.patience = Some(patience);
        let mut stray = 0;
        loop {
            let (envelope, payload) = self.any_frame().await.map_err(|e| lost(verb, true, e))?;
            if envelope.call == call && !matches!(envelope.message, Some(Message::Heartbeat(_)) if call == 0) {
                self.used = true;
                return Ok((envelope, payload));
            }
            // A frame without a call that says an error is the server's last word on this connection.
            if let (0, Some(error)) = (envelope.call, envelope.error) {
                return Err(Error::from_detail(error).with("verb", verb));
            }
            // A heartbeat, or the rest of a call that nobody waits for any more.
            self.frames.skip(payload).await.map_err(|e| lost(verb, true, e))?;
            if envelope.call != 0 {
                stray += 1;
                if stray > STRAY_FRAMES_MAX {
                    return Err(Error::protocol("the server goes on answering other calls"));
                }
            }
        }
    }

    async fn any_frame(&mut self) -> io::Result<(Envelope, usize)> {
        let head = self.frames.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let len = head.envelope as usize;
        if len > ENVELOPE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an envelope larger than any answer"));
        }
        Ok((self.frames.envelope(len).await?, head.payload as usize))
    }

    /// A call with one answer.
    pub(crate) async fn call(&mut self, verb: &'static str, message: Message, patience: Duration) -> Result<Message> {
        let call = self.next_call();
        self.send(
            verb,
            Envelope { call, end: true, message: Some(message), ..Default::default() },
            &[],
            None,
            patience,
        )
        .await?;
        self.answer(verb, call, patience).await
    }

    /// The one answer of a call that was sent.
    pub(crate) async fn answer(&mut self, verb: &'static str, call: u64, patience: Duration) -> Result<Message> {
        let (envelope, payload) = self.next(verb, call, patience).await?;
        match envelope {
            Envelope { error: Some(detail), .. } => Err(Error::from_detail(detail).with("verb", verb)),
            Envelope { end: true, message: Some(message), .. } if payload == 0 => Ok(message),
            _ => {
                Err(Error::protocol("an answer without an end, or with bytes that were not asked for")
                    .with("verb", verb))
            }
        }
    }

    /// Reads payload.
    pub(crate) fn frames(&mut self) -> &mut FrameReader {
        &mut self.frames
    }

    /// An error of reading payload.
    pub(crate) fn lost(verb: &'static str, error: io::Error) -> Error {
        lost(verb, true, error)
    }
}

struct Connected {
    noted: Noted,
    read: ReadHalf,
    write: WriteHalf,
    server: Option<Arc<OwnedFd>>,
}

async fn connect(address: &Address, config: &ClientConfig, sockets: &Arc<Sockets>) -> Result<Connected> {
    let failed = |what: &'static str, e: io::Error| Error::new(ErrorKind::Unreachable, what).caused_by(e);
    let within = config.patience.min(config.connect_timeout);
    let late = |what: &'static str| failed(what, io::ErrorKind::TimedOut.into());
    match address {
        Address::Unix(path) => {
            let stream: UnixStream = crate::endpoint::dial(path, within).await?;
            let pid = stream.peer_cred().ok().and_then(|c| c.pid()).and_then(rustix::process::Pid::from_raw);
            let watch = |pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok();
            let noted = sockets.note(stream.as_fd());
            let (read, write) = stream::unix(stream);
            Ok(Connected { noted, read, write, server: pid.and_then(watch).map(Arc::new) })
        }
        Address::Tcp { host, port, tls } => {
            let what = "the block port does not answer";
            let stream = tokio::time::timeout(within, TcpStream::connect((host.as_str(), *port)));
            let stream = stream.await.map_err(|_| late(what))?.map_err(|e| failed(what, e))?;
            let noted = sockets.note(stream.as_fd());
            stream.set_nodelay(true).map_err(|e| failed("TCP_NODELAY is refused", e))?;
            if !tls {
                let (read, write) = stream::tcp(stream);
                return Ok(Connected { noted, read, write, server: None });
            }
            let name = rustls::pki_types::ServerName::try_from(host.clone())
                .map_err(|_| Error::config("TLS needs a host name or address").with("host", host))?;
            let what = "the block port's TLS handshake failed";
            // A handshake is dear where the server is busy: it gets more than a sign of life.
            let handshake = TlsConnector::from(tls_config(config)?).connect(name, stream);
            let stream = tokio::time::timeout(config.connect_timeout, handshake).await;
            let stream = stream.map_err(|_| late(what))?.map_err(|e| failed(what, e))?;
            let (read, write) = stream::tls(TlsStream::Client(stream));
            Ok(Connected { noted, read, write, server: None })
        }
    }
}

fn tls_config(config: &ClientConfig) -> Result<Arc<rustls::ClientConfig>> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;
    let pem = connection::authorities(config)?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate =
            certificate.map_err(|e| Error::config("the certificate authority is not usable PEM").with("cause", e))?;
        roots.add(certificate).map_err(|e| Error::config("a certificate authority is not usable").with("cause", e))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::config("TLS cannot be set up").with("cause", e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
