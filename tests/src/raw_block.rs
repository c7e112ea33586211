//! The block protocol by hand: for frames that the SDK refuses to send, and for connections that break.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use bytes::BytesMut;
use kvkeep_client::block::reader::FrameReader;
use kvkeep_client::block::{frame, stream};
use kvkeep_core::InstanceId;
use kvkeep_proto::v1;
use kvkeep_proto::v1::Envelope;
use kvkeep_proto::v1::envelope::Message;
use tokio::net::{TcpStream, UnixStream};

use crate::{Node, raw};

/// How long an answer may take, or the end of a connection.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// One connection.
pub struct RawBlock {
    frames: FrameReader,
    write: stream::WriteHalf,
    last_call: u64,
}

impl RawBlock {
    /// The Unix socket, without hello.
    ///
    /// # Panics
    /// If nobody listens.
    pub async fn unix(node: &Node) -> Self {
        let socket = node.data_dir().join("kvkeepd.sock");
        Self::over(stream::unix(UnixStream::connect(socket).await.expect("the server listens on its socket")))
    }

    /// The block port, without hello.
    ///
    /// # Panics
    /// If nobody listens.
    pub async fn tcp(node: &Node) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", node.block_port().await)).await;
        Self::over(stream::tcp(stream.expect("the server listens on its block port")))
    }

    fn over((read, write): (stream::ReadHalf, stream::WriteHalf)) -> Self {
        let mut frames = FrameReader::new(read);
        frames.patience = Some(ANSWER_MAX);
        Self { frames, write, last_call: 0 }
    }

    /// And a hello.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn greeted(mut self, instance: InstanceId) -> Self {
        let reply = self.call(Message::Hello(raw::hello(instance))).await.expect("hello is answered");
        assert!(matches!(reply.message, Some(Message::HelloReply(_))), "{reply:?}");
        self
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Of the socket.
    pub async fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write.write_frame(bytes, &[], None, Some(ANSWER_MAX)).await
    }

    /// Sends a frame; answers the number of its call.
    ///
    /// # Errors
    /// Of the socket.
    pub async fn send(
        &mut self,
        message: Message,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<u64> {
        self.last_call += 1;
        let envelope = Envelope { call: self.last_call, end: true, message: Some(message), ..Default::default() };
        let mut head = BytesMut::new();
        frame::encode(&envelope, payload.len(), &mut head);
        self.write.write_frame(&head, payload, descriptor, Some(ANSWER_MAX)).await?;
        Ok(self.last_call)
    }

    /// The next frame that is no heartbeat.
    ///
    /// # Errors
    /// `UnexpectedEof` where the server closed the connection.
    pub async fn next(&mut self) -> io::Result<Envelope> {
        loop {
            let head = self.frames.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let envelope = self.frames.envelope(head.envelope as usize).await?;
            self.frames.skip(head.payload as usize).await?;
            if envelope.call != 0 || envelope.error.is_some() {
                return Ok(envelope);
            }
        }
    }

    /// Sends a frame and waits for its answer.
    ///
    /// # Errors
    /// Of the socket.
    pub async fn call(&mut self, message: Message) -> io::Result<Envelope> {
        self.send(message, &[], None).await?;
        self.next().await
    }

    /// Whether the server closes the connection, whatever it says before.
    pub async fn is_closed(&mut self) -> bool {
        loop {
            match self.next().await {
                Ok(_) => {}
                Err(e) => return e.kind() != io::ErrorKind::TimedOut,
            }
        }
    }
}

/// Registers a descriptor as a region; its number, or the error's kind and message.
///
/// # Errors
/// As the server says.
///
/// # Panics
/// If the connection ends.
pub async fn register(
    block: &mut RawBlock,
    descriptor: Option<BorrowedFd<'_>>,
    offset: u64,
    length: u64,
) -> Result<v1::RegisterRegionReply, (String, String)> {
    let wish = Message::RegisterRegion(v1::RegisterRegionRequest { offset, length });
    block.send(wish, &[], descriptor).await.expect("the connection lives");
    match block.next().await.expect("a registration is answered") {
        Envelope { error: Some(e), .. } => Err((e.kind, e.message)),
        Envelope { message: Some(Message::RegisterRegionReply(reply)), .. } => Ok(reply),
        other => panic!("{other:?}"),
    }
}
