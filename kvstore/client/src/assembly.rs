//! Puts the chunks of a get together and believes nothing: a part is a hit only when every byte asked for arrived once, in
//! order, of one version, and every checksum that the range covers matched. What does not is a miss.
//!
//! No I/O happens here, so that hostile answers can be tried by the thousand.

use bytes::{Bytes, BytesMut};
use kvkeep_core::checksum::{ChunkSums, SUM_CHUNK_BYTES};
use kvkeep_core::{Fidelity, MissReason, PartStatus};
use kvkeep_proto::v1;

use crate::convert;
use crate::get::{GetItem, Header};

/// Where the bytes of parts go.
pub(crate) trait Landing {
    /// Whether item `item` has room for a range of `total` bytes.
    fn has_room(&mut self, item: usize, total: u64) -> bool;
    /// Where `len` bytes at `at` of the range of `item`, which is `total` bytes long, may be read to straight away; `None`:
    /// there is no such place, they are landed by [`Self::land`].
    fn room(&mut self, item: usize, at: u64, total: u64, len: usize) -> Option<Room<'_>>;
    /// `chunk` belongs at `at` of the range of `item`, which is `total` bytes long. Called in order, never beyond `total`.
    fn land(&mut self, item: usize, at: u64, total: u64, chunk: Bytes);
    /// The item is no hit after all, or is asked for again: what landed is worthless.
    fn forget(&mut self, item: usize);
}

/// Memory that bytes are read into.
pub(crate) enum Room<'a> {
    /// This, exactly.
    Slice(&'a mut [u8]),
    /// Behind what this holds; it has the capacity.
    Tail(&'a mut BytesMut),
}

/// Lands each part in memory of its own. A part that came in one chunk is that chunk: nothing is copied.
#[derive(Default)]
pub(crate) struct Owned {
    parts: Vec<BytesMut>,
    whole: Vec<Bytes>,
}

impl Owned {
    pub(crate) fn new(items: usize) -> Self {
        Self { parts: vec![BytesMut::new(); items], whole: vec![Bytes::new(); items] }
    }

    /// The bytes of an item.
    pub(crate) fn take(&mut self, item: usize) -> Bytes {
        let whole = std::mem::take(&mut self.whole[item]);
        if whole.is_empty() { std::mem::take(&mut self.parts[item]).freeze() } else { whole }
    }
}

impl Landing for Owned {
    fn has_room(&mut self, _item: usize, _total: u64) -> bool {
        true // `Assembly` bounds a part by the server's block limit
    }

    fn room(&mut self, item: usize, at: u64, total: u64, _len: usize) -> Option<Room<'_>> {
        let part = &mut self.parts[item];
        if at == 0 {
            part.clear();
            part.reserve(total as usize);
        }
        Some(Room::Tail(part))
    }

    fn land(&mut self, item: usize, at: u64, total: u64, chunk: Bytes) {
        if at == 0 && chunk.len() as u64 == total {
            self.whole[item] = chunk;
            return;
        }
        let part = &mut self.parts[item];
        if at == 0 {
            part.reserve(total as usize);
        }
        part.extend_from_slice(&chunk);
    }

    fn forget(&mut self, item: usize) {
        self.whole[item] = Bytes::new();
        self.parts[item] = BytesMut::new();
    }
}

/// Lands each part in a buffer of the caller's.
pub(crate) struct Lent<'a, 'b>(pub(crate) &'a mut [&'b mut [u8]]);

impl Landing for Lent<'_, '_> {
    fn has_room(&mut self, item: usize, total: u64) -> bool {
        self.0[item].len() as u64 >= total
    }

    fn room(&mut self, item: usize, at: u64, _total: u64, len: usize) -> Option<Room<'_>> {
        let at = usize::try_from(at).ok()?;
        self.0[item].get_mut(at..at.checked_add(len)?).map(Room::Slice)
    }

    fn land(&mut self, item: usize, at: u64, _total: u64, chunk: Bytes) {
        let at = at as usize;
        self.0[item][at..at + chunk.len()].copy_from_slice(&chunk);
    }

    fn forget(&mut self, _item: usize) {
        // The caller is told that the buffer holds nothing.
    }
}

/// The server broke a rule of the wire; nothing more of this answer is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub(crate) &'static str);

/// Bounds of one answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Data of one reply, bytes.
    pub(crate) chunk_bytes: usize,
    /// A part, bytes.
    pub(crate) block_bytes: u64,
}

/// A part of which some, but not all, has arrived.
struct Open {
    header: Header,
    /// Next byte, of the part.
    at: u64,
    /// Where the range ends, of the part.
    end: u64,
    sums: RangeSums,
    /// The rest is read and thrown away, for this reason.
    spoilt: Option<MissReason>,
    /// The chunk at hand is its last.
    last: bool,
}

/// What to do with the data of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admitted {
    /// It has none: its item is settled.
    Settled,
    /// Read it and throw it away.
    Unwanted,
    /// It belongs at `at` of the range of `item`, which is `total` bytes long.
    Wanted {
        /// Index of the item.
        item: usize,
        /// Within the range, bytes.
        at: u64,
        /// Bytes of the range.
        total: u64,
    },
}

/// The items of one get, in the order asked.
pub(crate) struct Assembly<'a> {
    items: &'a [GetItem],
    bounds: Bounds,
    done: Vec<Header>,
    open: Option<Open>,
    /// Parts whose checksums did not match.
    pub(crate) bad_sums: u64,
}

impl<'a> Assembly<'a> {
    pub(crate) fn new(items: &'a [GetItem], bounds: Bounds) -> Self {
        Self { items, bounds, done: Vec::with_capacity(items.len()), open: None, bad_sums: 0 }
    }

    /// Items that are settled: a prefix.
    pub(crate) fn settled(&self) -> usize {
        self.done.len()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.done.len() == self.items.len()
    }

    /// The stream broke: what arrived of the item in the middle is worthless. Items from [`Self::settled`] on may be asked
    /// for again.
    pub(crate) fn interrupt(&mut self, landing: &mut impl Landing) {
        if self.open.take().is_some() {
            landing.forget(self.done.len());
        }
    }

    /// Ends it: everything not settled is a miss, for this reason. One header per item.
    pub(crate) fn finish(mut self, reason: MissReason, landing: &mut impl Landing) -> Vec<Header> {
        self.interrupt(landing);
        self.done.resize(self.items.len(), Header::miss(reason));
        self.done
    }

    /// After a violation: the item it happened in is not to be trusted.
    pub(crate) fn quarantine(&mut self, landing: &mut impl Landing) {
        self.interrupt(landing);
        if !self.is_complete() {
            self.done.push(Header::miss(MissReason::Quarantined));
        }
    }

    /// Takes one reply with its data. `first`: index of the item that the request called 0.
    pub(crate) fn feed(
        &mut self,
        first: usize,
        mut reply: v1::GetReply,
        landing: &mut impl Landing,
    ) -> Result<(), Violation> {
        let data = std::mem::take(&mut reply.data);
        match self.admit(first, &reply, data.len(), landing)? {
            Admitted::Settled => {}
            Admitted::Unwanted => self.pass(data.len(), landing),
            Admitted::Wanted { item, at, total } => {
                if self.compare(&data) {
                    landing.land(item, at, total, data);
                } else {
                    landing.forget(item);
                }
                self.pass(0, landing);
            }
        }
        Ok(())
    }

    /// Takes a reply whose data, `len` bytes, is somewhere else: says what to do with it. Unless the reply was
    /// [`Admitted::Settled`], [`Self::pass`] follows when its data is dealt with.
    pub(crate) fn admit(
        &mut self,
        first: usize,
        reply: &v1::GetReply,
        len: usize,
        landing: &mut impl Landing,
    ) -> Result<Admitted, Violation> {
        let index = self.done.len();
        if first.checked_add(reply.item as usize) != Some(index) || index >= self.items.len() {
            return Err(Violation("a chunk of an item out of order"));
        }
        if len > self.bounds.chunk_bytes {
            return Err(Violation("a chunk larger than was asked for"));
        }
        // A status that this version does not know is no hit.
        let status = convert::status_from_proto(reply.status).unwrap_or(PartStatus::Miss);
        if status != PartStatus::Hit {
            if len > 0 {
                return Err(Violation("data of a part that is no hit"));
            }
            self.interrupt(landing);
            self.done.push(Header {
                status,
                reason: convert::reason_opt_from_proto(reply.reason),
                retry_after: convert::millis_from_proto(reply.retry_after_ms),
                ..Header::miss(MissReason::Incomplete)
            });
            return Ok(Admitted::Settled);
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.begin(index, reply, landing)?,
        };
        let offset = self.items[index].offset;
        let admitted = Self::continues(&open, reply, len);
        open.last = reply.last;
        let (at, total) = (open.at.saturating_sub(offset), open.end.saturating_sub(offset));
        // Put back even when it failed, so that `interrupt` finds what landed.
        self.open = Some(open);
        Ok(if admitted? { Admitted::Wanted { item: index, at, total } } else { Admitted::Unwanted })
    }

    /// Compares the next piece of the admitted reply's data with the sums that it completes; `false`: it is worthless, and so
    /// is its part, which is to be forgotten.
    pub(crate) fn compare(&mut self, piece: &[u8]) -> bool {
        let Some(open) = &mut self.open else { return false };
        let right = open.sums.feed(open.at, piece);
        if !right {
            open.spoilt = Some(MissReason::Quarantined);
        }
        open.at += piece.len() as u64;
        right
    }

    /// The admitted reply is dealt with; `unread` bytes of it nobody looked at.
    pub(crate) fn pass(&mut self, unread: usize, landing: &mut impl Landing) {
        let index = self.done.len();
        let Some(open) = &mut self.open else { return };
        open.at += unread as u64;
        if open.last
            && let Some(open) = self.open.take()
        {
            let offset = self.items[index].offset;
            self.settle(index, offset, open, landing);
        }
    }

    /// Reads what stands with the first chunk of an item.
    fn begin(&self, index: usize, reply: &v1::GetReply, landing: &mut impl Landing) -> Result<Open, Violation> {
        let item = &self.items[index];
        let part_bytes = reply.part_bytes;
        if part_bytes == 0 || part_bytes > self.bounds.block_bytes {
            return Err(Violation("a part of no size, or over the server's own limit"));
        }
        if reply.crc32.len() != ChunkSums::count_for(part_bytes as usize) {
            return Err(Violation("not one checksum per 64 KiB of the part"));
        }
        let version = convert::version_from_proto(reply.version).ok_or(Violation("a part without a version"))?;
        let end = if item.length == 0 { Some(part_bytes) } else { item.offset.checked_add(item.length) };
        let end = end.filter(|end| *end <= part_bytes && *end > item.offset);
        let fidelity = convert::fidelity_from_proto(reply.fidelity).unwrap_or(Fidelity::Near);
        let spoilt = match end {
            None => Some(MissReason::Format), // the range does not lie in the part
            Some(_) if fidelity != Fidelity::Exact => Some(MissReason::Format),
            Some(_) if item.version.is_some_and(|v| v != version) => Some(MissReason::Quarantined),
            Some(end) if !landing.has_room(index, end - item.offset) => Some(MissReason::Format),
            Some(_) => None,
        };
        let end = end.unwrap_or(part_bytes);
        Ok(Open {
            header: Header {
                status: PartStatus::Hit,
                reason: None,
                retry_after: None,
                part_bytes,
                version: Some(version),
                tier: convert::tier_opt_from_proto(reply.tier),
                fidelity,
                sums_ok: false,
            },
            at: item.offset.min(end),
            end,
            sums: RangeSums::new(&reply.crc32, part_bytes, item.offset, end),
            spoilt,
            last: false,
        })
    }

    /// Whether a chunk goes on where the last one ended; answers whether its data is of any use.
    fn continues(open: &Open, reply: &v1::GetReply, len: usize) -> Result<bool, Violation> {
        if open.spoilt.is_some() {
            // Nothing of it is used; it only has to end.
            return if len == 0 && !reply.last { Err(Violation("an empty chunk")) } else { Ok(false) };
        }
        let len = len as u64;
        if reply.offset != open.at {
            return Err(Violation("a chunk that does not begin where the last one ended"));
        }
        if len == 0 {
            return Err(Violation("an empty chunk"));
        }
        if len > open.end - open.at {
            return Err(Violation("more data than was asked for"));
        }
        if reply.last != (open.at + len == open.end) {
            return Err(Violation("a last chunk that is not where the range ends"));
        }
        Ok(true)
    }

    fn settle(&mut self, index: usize, offset: u64, open: Open, landing: &mut impl Landing) {
        let header = match open.spoilt {
            None => Header { sums_ok: offset == 0 && open.end == open.header.part_bytes, ..open.header },
            Some(reason) => {
                self.bad_sums += u64::from(reason == MissReason::Quarantined);
                landing.forget(index);
                Header::miss(reason)
            }
        };
        self.done.push(header);
    }
}

/// Compares a range, as it arrives, with the sums of the whole part: those of the 64 KiB that the range covers whole.
struct RangeSums {
    sums: Box<[u32]>,
    part_bytes: u64,
    start: u64,
    end: u64,
    running: crc32fast::Hasher,
}

impl RangeSums {
    fn new(sums: &[u32], part_bytes: u64, start: u64, end: u64) -> Self {
        Self { sums: sums.into(), part_bytes, start, end, running: crc32fast::Hasher::new() }
    }

    /// Takes the bytes at `at`; answers whether every sum that they completed matched.
    fn feed(&mut self, mut at: u64, mut bytes: &[u8]) -> bool {
        const CHUNK: u64 = SUM_CHUNK_BYTES as u64;
        while !bytes.is_empty() {
            let index = at / CHUNK;
            let (chunk_start, chunk_end) = (index * CHUNK, ((index + 1) * CHUNK).min(self.part_bytes));
            let n = (bytes.len() as u64).min(chunk_end - at) as usize;
            let (head, tail) = bytes.split_at(n);
            at += n as u64;
            bytes = tail;
            if chunk_start < self.start || chunk_end > self.end {
                continue; // covered in part: cannot be checked here, the server checked it
            }
            self.running.update(head);
            if at == chunk_end {
                let sum = std::mem::take(&mut self.running).finalize();
                if self.sums.get(index as usize) != Some(&sum) {
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests;
