//! Frames out of a stream. Payload goes from the kernel straight to where it belongs, but for the few KiB that came with
//! the envelope before it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, BytesMut};
use kvkeep_proto::v1::Envelope;
use prost::Message as _;
use tokio::io::AsyncReadExt as _;

use super::frame::{HEAD_BYTES, Head, LINE_BYTES};
use super::stream::ReadHalf;

/// Asked of the kernel at once where frames come without payload, bytes. Behind one with payload no more is asked for than
/// the next envelope, or [`LINE_BYTES`], which what lies before a payload always has: a piece of payload that came with it
/// would be copied once more, and all the rest of it would be copied between buffers that are aligned differently.
const READ_BYTES: usize = 4096;
/// Payload that nobody wants is read away in pieces of so many bytes.
const SKIP_BYTES: usize = 64 << 10;

/// Reads frames.
pub struct FrameReader {
    half: ReadHalf,
    /// Read and not used yet.
    buffer: BytesMut,
    /// The last frame had payload, so the next one may.
    exact: bool,
    /// How long one read may take; `None`: for ever.
    pub patience: Option<Duration>,
}

fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl FrameReader {
    /// Over a stream.
    pub fn new(half: ReadHalf) -> Self {
        Self { half, buffer: BytesMut::new(), exact: false, patience: None }
    }

    /// Gets more bytes from the kernel, of which `missing` are needed and `least` may be taken; `false` at the end of the
    /// stream. Dropped early, nothing is lost.
    async fn fill(&mut self, missing: usize, least: usize) -> io::Result<bool> {
        let asked = missing.max(if self.exact { least } else { READ_BYTES });
        self.buffer.reserve(asked);
        let mut room = (&mut self.buffer).limit(asked);
        Ok(patiently(self.patience, self.half.read_buf(&mut room)).await? > 0)
    }

    /// Waits for the next frame, and reads its lengths; `None` where the stream ends between two frames. May be dropped and
    /// called again.
    ///
    /// # Errors
    /// `UnexpectedEof` in the middle of the lengths, `TimedOut` where patience ended.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(bytes) = self.buffer.first_chunk::<HEAD_BYTES>() {
                let head = Head::parse(*bytes);
                self.buffer.advance(HEAD_BYTES);
                self.exact = head.payload > 0;
                return Ok(Some(head));
            }
            if !self.fill(HEAD_BYTES - self.buffer.len(), LINE_BYTES - self.buffer.len()).await? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Whether a frame has begun to arrive.
    pub fn has_begun(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Reads the envelope of `len` bytes that follows the lengths.
    ///
    /// # Errors
    /// `InvalidData` where it is none.
    pub async fn envelope(&mut self, len: usize) -> io::Result<Envelope> {
        self.buffer.reserve(len.saturating_sub(self.buffer.len()));
        while self.buffer.len() < len {
            if !self.fill(len - self.buffer.len(), 0).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        // Frozen, so that keys and other bytes of the message share this memory instead of being copied.
        let bytes = self.buffer.split_to(len).freeze();
        Envelope::decode(bytes).map_err(|_| violation("what came is no envelope"))
    }

    /// Reads payload into `to`, all of it; `seen` is shown each piece when it is there.
    ///
    /// # Errors
    /// `UnexpectedEof`, `TimedOut`, and the socket's.
    pub async fn payload(&mut self, to: &mut [u8], mut seen: impl FnMut(&[u8])) -> io::Result<()> {
        let buffered = self.buffer.len().min(to.len());
        let (head, mut rest) = to.split_at_mut(buffered);
        self.buffer.copy_to_slice(head);
        seen(head);
        while !rest.is_empty() {
            match patiently(self.patience, self.half.read(rest)).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    seen(&rest[..n]);
                    rest = &mut rest[n..];
                }
            }
        }
        Ok(())
    }

    /// Reads payload behind what `to` holds; otherwise as [`Self::payload`].
    ///
    /// # Errors
    /// As [`Self::payload`].
    pub async fn payload_tail(&mut self, to: &mut BytesMut, len: usize, mut seen: impl FnMut(&[u8])) -> io::Result<()> {
        to.reserve(len);
        let buffered = self.buffer.len().min(len);
        to.extend_from_slice(&self.buffer[..buffered]);
        seen(&self.buffer[..buffered]);
        self.buffer.advance(buffered);
        let mut left = len - buffered;
        while left > 0 {
            let at = to.len();
            let mut room = (&mut *to).limit(left);
            match patiently(self.patience, self.half.read_buf(&mut room)).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    seen(&to[at..]);
                    left -= n;
                }
            }
        }
        Ok(())
    }

    /// Reads payload and throws it away.
    ///
    /// # Errors
    /// As [`Self::payload`].
    pub async fn skip(&mut self, len: usize) -> io::Result<()> {
        let mut scratch = vec![0; len.min(SKIP_BYTES)];
        let mut left = len;
        while left > 0 {
            let some = left.min(SKIP_BYTES);
            self.payload(&mut scratch[..some], |_| {}).await?;
            left -= some;
        }
        Ok(())
    }

    /// The oldest descriptor that came and was not taken yet.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.half.take_descriptor()
    }

    /// Whether descriptors wait to be taken.
    pub fn has_descriptors(&self) -> bool {
        self.half.has_descriptors()
    }
}

/// Waits so long for one step of I/O.
pub(crate) async fn patiently<T>(
    patience: Option<Duration>,
    step: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match patience {
        None => step.await,
        Some(patience) => match tokio::time::timeout(patience, step).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        },
    }
}
