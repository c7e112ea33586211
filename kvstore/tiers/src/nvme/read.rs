//! Reading a block, and what to think of what was found.

use std::fmt;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use kvkeep_core::block::{BlockMeta, NvmePlace};
use kvkeep_core::checksum::{ChunkSums, SUM_CHUNK_BYTES};
use kvkeep_core::error::{Error, ErrorKind, Result};
use kvkeep_core::ids::{BlockId, Handle, Key, Version};
use kvkeep_core::words::Class;

use super::entry::IndexEntry;
use super::header::{Header, HeaderError, PAGE_BYTES, Shape};
use super::place::{Place, tag_of};
use super::shared::Shared;
use super::store::{NvmeStore, padded};
use super::writer::{BlockCopy, Op};
use crate::io::{FileId, IoBuf};

/// A read that finds the wrong bytes is done once more before anybody believes it: the second may find the right ones,
/// where a cable or a controller was at fault, and giving up a block is for ever.
const ATTEMPTS_MAX: usize = 2;

/// What the caller believes to be at a place. All of it is compared with what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expect {
    /// The block.
    pub id: BlockId,
    /// Its namespace and revision.
    pub handle: Handle,
    /// The engine's key, where the caller has it.
    pub key: Option<Key>,
    /// Of the put whose bytes are wanted.
    pub version: Version,
    /// Raw length, bytes.
    pub len: u32,
}

impl Expect {
    /// Whether a header is that of the block.
    fn is(&self, meta: &BlockMeta) -> bool {
        self.id == meta.id
            && self.handle == meta.handle
            && self.version == meta.version
            && self.len == meta.len
            && self.key.as_ref().is_none_or(|key| *key == meta.key)
    }

    /// Whether the index, asked for the block, believes the same.
    fn agrees_with(&self, entry: &IndexEntry) -> bool {
        self.version == entry.version && self.len == entry.len && self.key.as_ref().is_none_or(|key| *key == entry.key)
    }
}

/// What a read found.
#[derive(Debug)]
#[must_use]
pub enum Read {
    /// The bytes that were put, checked.
    Ok {
        /// As it was at write; the index has the class that counts.
        meta: Box<BlockMeta>,
        /// The buffer that was given, filled. What lies behind the raw length is not defined.
        payload: IoBuf,
    },
    /// Something else is there by now: the place is out of date. If the index believed in it too, it no longer does.
    Stale,
    /// Not the bytes that were put. The extent is quarantined, the block is gone from the index.
    Corrupt(Doubt),
    /// The device did not answer, or the question was wrong. Nothing is known of the block.
    Io(Error),
}

/// What did not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// There is no valid header.
    Header(HeaderError),
    /// This chunk of 64 KiB is not what was summed.
    Chunk(usize),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(e) => fmt::Display::fmt(e, f),
            Self::Chunk(n) => write!(f, "payload checksum of chunk {n}"),
        }
    }
}

/// What one attempt found.
enum Found {
    Right(Box<BlockMeta>),
    Other,
    Doubt(Doubt),
    Failed(Error),
}

impl NvmeStore {
    /// Reads a whole block straight into `into`, which has the raw length padded to whole pages. Every byte is checked.
    pub async fn get(&self, expect: &Expect, place: NvmePlace, into: IoBuf) -> Read {
        self.get_chunks(expect, place, 0..ChunkSums::count_for(expect.len as usize), into).await
    }

    /// Reads the chunks `chunks` of 64 KiB of a block, of which there are [`ChunkSums::count_for`] its length. `into` has
    /// their raw length padded to whole pages.
    pub async fn get_chunks(&self, expect: &Expect, place: NvmePlace, chunks: Range<usize>, into: IoBuf) -> Read {
        let count = ChunkSums::count_for(expect.len as usize);
        let bytes = chunk_bytes(expect.len, &chunks);
        if chunks.is_empty() || chunks.end > count || into.len() != padded(bytes) {
            return Read::Io(
                Error::new(ErrorKind::InvalidArgument, "the buffer or the chunks of a read do not fit the block")
                    .with("len", expect.len)
                    .with("buffer_bytes", into.len())
                    .with("chunks", format!("{chunks:?}")),
            );
        }
        let Some(at) = Place::unpack(place) else { return Read::Stale };
        let Some(reading) = Reading::begin(&self.shared, at, Shape::of(expect.len).units) else { return Read::Stale };
        let file = match self.shared.file(at.segment) {
            Ok(file) => file,
            Err(e) => return Read::Io(e),
        };
        let mut buf = into;
        let mut found = Found::Other;
        for _ in 0..ATTEMPTS_MAX {
            (found, buf) = self.attempt(file, expect, at, &chunks, buf).await;
            if matches!(found, Found::Right(_) | Found::Failed(_)) {
                break;
            }
        }
        drop(reading);
        match found {
            Found::Right(meta) => Read::Ok { meta, payload: buf },
            Found::Failed(e) => Read::Io(e),
            Found::Other => self.conclude(expect, place, None).await,
            Found::Doubt(doubt) => self.conclude(expect, place, Some(doubt)).await,
        }
    }

    async fn attempt(
        &self,
        file: FileId,
        expect: &Expect,
        at: Place,
        chunks: &Range<usize>,
        into: IoBuf,
    ) -> (Found, IoBuf) {
        let shape = Shape::of(expect.len);
        let offset = at.extent(shape.units).offset();
        let head = self.shared.disk.read(file, offset, IoBuf::alloc(shape.header_bytes()));
        let (head, mut into, result) = match shape.inline_at {
            Some(_) => {
                let (head, result) = head.await;
                let result = whole(result, &head);
                (head, into, result)
            }
            None => {
                let body_at = offset + (shape.header_bytes() + chunks.start * SUM_CHUNK_BYTES) as u64;
                let body = self.shared.disk.read(file, body_at, into);
                let ((head, head_result), (body, body_result)) = both(head, body).await;
                let result = whole(head_result, &head).and_then(|()| whole(body_result, &body));
                (head, body, result)
            }
        };
        if let Err(e) = result {
            metrics::counter!("kvkeep_nvme_read_errors_total").increment(1);
            return (Found::Failed(e.with("segment", at.segment).with("unit", at.unit)), into);
        }
        let header = match Header::decode(head.as_slice()) {
            Ok(header) => header,
            Err(e) => return (Found::Doubt(Doubt::Header(e)), into),
        };
        if tag_of(header.sequence) != at.tag || !expect.is(&header.meta) {
            return (Found::Other, into);
        }
        let bytes = chunk_bytes(expect.len, chunks) as usize;
        if let Some(inline_at) = shape.inline_at {
            into.as_mut_slice()[..bytes].copy_from_slice(&head.as_slice()[inline_at..inline_at + bytes]);
        }
        match header.meta.sums.first_mismatch(chunks.start, &into.as_slice()[..bytes]) {
            None => (Found::Right(Box::new(header.meta)), into),
            Some(chunk) => (Found::Doubt(Doubt::Chunk(chunk)), into),
        }
    }

    /// The block was not there. Whether that is news depends on what the index says, which is the truth about places:
    ///
    /// - It names another place, another put, or nothing: the caller is behind, or wrong.
    /// - It names this place, and another valid header is there: the index is behind. The entry is dropped.
    /// - It names this place, the bytes are damaged, and nobody ever flushed them before a restart: they were lost with
    ///   the power, as class `cache` allows. The entry is dropped.
    /// - Otherwise the device has lost bytes that it had: quarantine.
    async fn conclude(&self, expect: &Expect, place: NvmePlace, doubt: Option<Doubt>) -> Read {
        let entry = match self.entry(expect.handle, expect.id) {
            Ok(entry) => entry,
            Err(e) => return Read::Io(e),
        };
        let Some(entry) = entry.filter(|e| e.place == place && expect.agrees_with(e)) else {
            return Read::Stale;
        };
        let copy = BlockCopy { handle: expect.handle, id: expect.id, place };
        let never_flushed = entry.class < Class::Durable
            && entry.sequence <= self.shared.opened_after
            && entry.sequence > self.shared.flushed;
        match doubt.filter(|_| !never_flushed) {
            None => {
                metrics::counter!("kvkeep_nvme_stale_total").increment(1);
                tracing::debug!(block = ?expect.id, ?place, "stale nvme entry dropped");
                self.drop_entry(copy).await
            }
            Some(doubt) => {
                metrics::counter!("kvkeep_nvme_corrupt_total").increment(1);
                tracing::warn!(block = ?expect.id, ?place, class = %entry.class, why = %doubt, "nvme block corrupt, extent quarantined");
                // On a poisoned device the entry stays, and every read finds the same.
                let _: Result<bool> = self.writer.ask(|done| Op::Quarantine { copy, done }).await;
                Read::Corrupt(doubt)
            }
        }
    }

    async fn drop_entry(&self, copy: BlockCopy) -> Read {
        // Fails on a poisoned device only, where nothing is reused: stale all the same.
        let _: Result<u64> = self.free(&[copy]).await;
        Read::Stale
    }
}

/// Raw bytes of a range of chunks.
fn chunk_bytes(len: u32, chunks: &Range<usize>) -> u32 {
    let at = |chunk: usize| u32::try_from(chunk.saturating_mul(SUM_CHUNK_BYTES)).unwrap_or(u32::MAX).min(len);
    at(chunks.end) - at(chunks.start).min(at(chunks.end))
}

/// Fewer bytes than asked for: the file ends early.
fn whole(result: std::io::Result<usize>, buf: &IoBuf) -> Result<()> {
    match result {
        Ok(n) if n == buf.len() => Ok(()),
        Ok(n) => {
            Err(Error::new(ErrorKind::Io, "a segment file is shorter than it was").with("missing_bytes", buf.len() - n))
        }
        Err(e) => Err(Error::new(ErrorKind::Io, "cannot read a block").with("cause", e)),
    }
}

/// Runs two reads at a time.
async fn both<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut a_out, mut b_out) = (None, None);
    poll_fn(|cx| {
        if a_out.is_none()
            && let Poll::Ready(out) = a.as_mut().poll(cx)
        {
            a_out = Some(out);
        }
        if b_out.is_none()
            && let Poll::Ready(out) = b.as_mut().poll(cx)
        {
            b_out = Some(out);
        }
        match (a_out.take(), b_out.take()) {
            (Some(a), Some(b)) => Poll::Ready((a, b)),
            (a, b) => {
                (a_out, b_out) = (a, b);
                Poll::Pending
            }
        }
    })
    .await
}

/// Keeps an extent out of the free list. Dropping it early is safe for everybody else: a read that nobody waits for any
/// more may see another block's bytes, in a buffer that nobody looks at.
struct Reading {
    shared: Arc<Shared>,
    at: Place,
}

impl Reading {
    fn begin(shared: &Arc<Shared>, at: Place, units: u32) -> Option<Self> {
        let here = shared.space.lock().extents.begin_read(at.segment, at.unit, units);
        here.then(|| Self { shared: Arc::clone(shared), at })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.shared.space.lock().extents.end_read(self.at.segment, self.at.unit);
    }
}

const _: () = assert!(SUM_CHUNK_BYTES.is_multiple_of(PAGE_BYTES));
