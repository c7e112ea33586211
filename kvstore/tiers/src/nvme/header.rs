//! The header before every block on NVMe: what the extent holds, so that a read can tell the right block from any other.

use kvkeep_core::block::BlockMeta;
use kvkeep_core::checksum::{ChunkSums, SUM_CHUNK_BYTES};
use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_core::ids::{
    BlockId, Digest, GroupId, Handle, KEY_BYTES_MAX, Key, NamespaceId, Revision, ShardId, TenantId, Version,
};
use kvkeep_core::words::{Class, Fidelity};

use super::place::{Sequence, UNIT_BYTES};

/// First bytes of every header.
pub const MAGIC: [u8; 8] = *b"KVKBLOCK";
/// The version that this code writes and reads. The device's own version goes up with it.
pub const FORMAT_VERSION: u16 = 1;
/// Bytes of a page, the unit in which headers grow.
pub const PAGE_BYTES: usize = UNIT_BYTES as usize;
/// Most frames of one block that a reader accepts.
pub const FRAMES_MAX: usize = 1024;
/// Codec of a frame that holds the raw bytes.
pub const CODEC_RAW: u8 = 0;

/// A payload in the header page starts at a multiple of this, in bytes.
const INLINE_ALIGN: usize = 64;

/// # A block on disk
///
/// ```text
/// extent (4 KiB units): | header page | header page ... | payload, padded to 4 KiB |
/// small block:          | header, zeros up to a multiple of 64, payload, zeros |
/// ```
/// What the padding holds means nothing; the sums do not cover it.
///
/// # The header, little-endian
///
/// |   at | size | field                                                                     |
/// |------|------|---------------------------------------------------------------------------|
/// |    0 |    8 | magic `KVKBLOCK`                                                          |
/// |    8 |    2 | format version, 1                                                         |
/// |   10 |    1 | header pages                                                              |
/// |   11 |    1 | flags: 1 = has a parent, 2 = the payload is in the header page            |
/// |   12 |    4 | crc32 of bytes 0 .. header bytes, taken with these four as zero           |
/// |   16 |    4 | header bytes: where the sums end                                          |
/// |   20 |    2 | frames                                                                    |
/// |   22 |    1 | class at write                                                            |
/// |   23 |    1 | fidelity                                                                  |
/// |   24 |    8 | sequence                                                                  |
/// |   32 |    8 | version of the put                                                        |
/// |   40 |   16 | digest                                                                    |
/// |   56 |    2 | group                                                                     |
/// |   58 |    2 | shard                                                                     |
/// |   60 |    4 | tenant                                                                    |
/// |   64 |    4 | namespace                                                                 |
/// |   68 |    4 | revision                                                                  |
/// |   72 |    4 | index of the position in its chain                                        |
/// |   76 |    4 | raw length, bytes                                                         |
/// |   80 |    4 | stored length (all frames), bytes                                         |
/// |   84 |    4 | number of sums                                                            |
/// |   88 |   16 | digest of the parent, or zeros                                            |
/// |  104 |    1 | key length                                                                |
/// |  105 |   23 | zeros                                                                     |
/// |  128 |  128 | key, filled up with zeros                                                 |
/// |  256 | 32 n | frame table                                                               |
/// |  ... |  4 m | sums: crc32 of each 64 KiB of raw bytes                                   |
///
/// # One frame of the table
///
/// | at | size | field                                                       |
/// |----|------|-------------------------------------------------------------|
/// |  0 |    2 | layer                                                       |
/// |  2 |    1 | kind                                                        |
/// |  3 |    1 | codec: 0 = raw                                              |
/// |  4 |    2 | codec parameters                                            |
/// |  6 |    2 | tokens                                                      |
/// |  8 |    8 | offset from the start of the payload, bytes                 |
/// | 16 |    4 | encoded length, bytes                                       |
/// | 20 |    4 | raw length, bytes                                           |
/// | 24 |    4 | crc32 of the encoded bytes                                  |
/// | 28 |    4 | flags                                                       |
///
/// Version 1 has exactly one frame: raw, over the whole payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the block is.
    pub meta: BlockMeta,
    /// Which put of this device wrote it.
    pub sequence: Sequence,
}

const FIXED_BYTES: usize = 256;
const FRAME_BYTES: usize = 32;
const KEY_AT: usize = 128;
const CRC_AT: usize = 12;
const FLAG_PARENT: u8 = 1;
const FLAG_INLINE: u8 = 2;
const _: () = assert!(KEY_AT + KEY_BYTES_MAX == FIXED_BYTES);
const _: () = assert!(PAGES_MAX <= u8::MAX as usize);

/// Most pages of a header that this version writes: one frame, and the sums of the largest block.
pub const PAGES_MAX: usize =
    (FIXED_BYTES + FRAME_BYTES + 4 * ChunkSums::count_for(BLOCK_BYTES_MAX as usize)).div_ceil(PAGE_BYTES);

/// How a block of some length lies in its extent. Follows from the length alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Pages of the header.
    pub header_pages: usize,
    /// Where the payload starts in the header page, if it is there.
    pub inline_at: Option<usize>,
    /// Units of the whole extent.
    pub units: u32,
}

impl Shape {
    /// Of a block of `len` raw bytes, 1 to [`BLOCK_BYTES_MAX`].
    pub const fn of(len: u32) -> Self {
        let header_bytes = FIXED_BYTES + FRAME_BYTES + 4 * ChunkSums::count_for(len as usize);
        let inline_at = header_bytes.next_multiple_of(INLINE_ALIGN);
        if inline_at + len as usize <= PAGE_BYTES {
            return Self { header_pages: 1, inline_at: Some(inline_at), units: 1 };
        }
        let header_pages = header_bytes.div_ceil(PAGE_BYTES);
        Self { header_pages, inline_at: None, units: header_pages as u32 + (len as usize).div_ceil(PAGE_BYTES) as u32 }
    }

    /// Bytes of the header pages.
    pub const fn header_bytes(self) -> usize {
        self.header_pages * PAGE_BYTES
    }
}

/// Why bytes are not a header that may be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else is there, or nothing.
    #[error("no block header")]
    NoMagic,
    /// Not of the version that all headers of the device have, which is told when it is opened.
    #[error("header has format version {0}, the device {FORMAT_VERSION}")]
    Version(u16),
    /// The header's own checksum does not hold.
    #[error("header checksum")]
    Checksum,
    /// A field contradicts another one.
    #[error("header field {0}")]
    Field(&'static str),
}

impl Header {
    /// Writes the header pages of a block; `pages` is as long as [`Shape::header_bytes`] says. What follows the header is
    /// zeroed: an in-page payload is the caller's to add.
    pub fn encode(&self, pages: &mut [u8]) {
        let meta = &self.meta;
        let shape = Shape::of(meta.len);
        assert_eq!(pages.len(), shape.header_bytes(), "header pages for a block of {} bytes", meta.len);
        let sums = meta.sums.as_slice();
        assert_eq!(sums.len(), ChunkSums::count_for(meta.len as usize), "sums of a block of {} bytes", meta.len);
        pages.fill(0);
        let flags = if meta.parent.is_some() { FLAG_PARENT } else { 0 }
            | if shape.inline_at.is_some() { FLAG_INLINE } else { 0 };
        let header_bytes = FIXED_BYTES + FRAME_BYTES + 4 * sums.len();
        let mut w = Writer { out: pages, at: 0 };
        w.put(&MAGIC);
        w.put(&FORMAT_VERSION.to_le_bytes());
        w.put(&[shape.header_pages as u8, flags]);
        w.put(&[0; 4]); // The checksum, below.
        w.put(&(header_bytes as u32).to_le_bytes());
        w.put(&1u16.to_le_bytes());
        w.put(&[meta.class.code(), meta.fidelity.code()]);
        w.put(&self.sequence.0.to_le_bytes());
        w.put(&meta.version.0.to_le_bytes());
        w.put(meta.id.digest.as_bytes());
        w.put(&meta.id.group.0.to_le_bytes());
        w.put(&meta.id.shard.0.to_le_bytes());
        w.put(&meta.tenant.0.to_le_bytes());
        w.put(&meta.handle.namespace.0.to_le_bytes());
        w.put(&meta.handle.revision.0.to_le_bytes());
        w.put(&meta.position.to_le_bytes());
        w.put(&meta.len.to_le_bytes());
        w.put(&meta.len.to_le_bytes());
        w.put(&(sums.len() as u32).to_le_bytes());
        w.put(meta.parent.map_or([0; 16], |p| *p.as_bytes()).as_slice());
        w.put(&[meta.key.as_bytes().len() as u8]);
        w.at = KEY_AT;
        w.put(meta.key.as_bytes());
        w.at = FIXED_BYTES;
        w.put(&raw_frame(meta));
        for sum in sums {
            w.put(&sum.to_le_bytes());
        }
        debug_assert_eq!(w.at, header_bytes);
        let crc = crc32fast::hash(&pages[..header_bytes]);
        pages[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a header out of the first pages of an extent. Never believes a length it has not checked.
    pub fn decode(pages: &[u8]) -> Result<Self, HeaderError> {
        use HeaderError::Field;
        let fixed: &[u8; FIXED_BYTES] = pages.first_chunk().ok_or(HeaderError::NoMagic)?;
        let r = Fields(fixed);
        if fixed[..8] != MAGIC {
            return Err(HeaderError::NoMagic);
        }
        // The version comes before the checksum: another version may sum differently.
        let version = r.u16(8);
        if version != FORMAT_VERSION {
            return Err(HeaderError::Version(version));
        }
        let header_bytes = r.u32(16) as usize;
        if header_bytes < FIXED_BYTES || header_bytes > pages.len() {
            return Err(Field("header bytes"));
        }
        let mut h = crc32fast::Hasher::new();
        h.update(&pages[..CRC_AT]);
        h.update(&[0; 4]);
        h.update(&pages[CRC_AT + 4..header_bytes]);
        if h.finalize() != r.u32(CRC_AT) {
            return Err(HeaderError::Checksum);
        }

        let (frames, len, sums) = (r.u16(20) as usize, r.u32(76), r.u32(84) as usize);
        if len == 0 || u64::from(len) > BLOCK_BYTES_MAX {
            return Err(Field("raw length"));
        }
        if r.u32(80) != len {
            return Err(Field("stored length"));
        }
        if frames != 1 {
            return Err(Field("frames"));
        }
        if sums != ChunkSums::count_for(len as usize) || header_bytes != FIXED_BYTES + frames * FRAME_BYTES + 4 * sums {
            return Err(Field("number of sums"));
        }
        let shape = Shape::of(len);
        if fixed[10] as usize != shape.header_pages || (fixed[11] & FLAG_INLINE != 0) != shape.inline_at.is_some() {
            return Err(Field("header pages"));
        }
        let key_len = fixed[104] as usize;
        let key = fixed[KEY_AT..].get(..key_len).and_then(|k| Key::new(k).ok()).ok_or(Field("key length"))?;
        let sums: Vec<u32> = pages[header_bytes - 4 * sums..header_bytes]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|c| u32::from_le_bytes(*c))
            .collect();
        let meta = BlockMeta {
            id: BlockId { digest: r.digest(40), group: GroupId(r.u16(56)), shard: ShardId(r.u16(58)) },
            tenant: TenantId(r.u32(60)),
            handle: Handle { namespace: NamespaceId(r.u32(64)), revision: Revision(r.u32(68)) },
            key,
            version: Version(r.u64(32)),
            class: Class::from_code(fixed[22]).ok_or(Field("class"))?,
            keeper: kvkeep_core::words::Keeper::Caller,
            fidelity: Fidelity::from_code(fixed[23]).ok_or(Field("fidelity"))?,
            position: r.u32(72),
            parent: (fixed[11] & FLAG_PARENT != 0).then(|| r.digest(88)),
            len,
            sums: ChunkSums::from_slice(&sums),
        };
        if pages[FIXED_BYTES..FIXED_BYTES + FRAME_BYTES] != raw_frame(&meta) {
            return Err(Field("frame table"));
        }
        Ok(Self { meta, sequence: Sequence(r.u64(24)) })
    }
}

/// The only entry of version 1's frame table. Its checksum is put together from the sums: no second pass over the bytes.
fn raw_frame(meta: &BlockMeta) -> [u8; FRAME_BYTES] {
    let mut crc = crc32fast::Hasher::new();
    let mut left = meta.len as usize;
    for sum in meta.sums.as_slice() {
        let chunk = left.min(SUM_CHUNK_BYTES);
        crc.combine(&crc32fast::Hasher::new_with_initial_len(*sum, chunk as u64));
        left -= chunk;
    }
    let mut out = [0; FRAME_BYTES];
    out[3] = CODEC_RAW;
    out[16..20].copy_from_slice(&meta.len.to_le_bytes());
    out[20..24].copy_from_slice(&meta.len.to_le_bytes());
    out[24..28].copy_from_slice(&crc.finalize().to_le_bytes());
    out
}

struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

/// Little-endian fields at fixed places. Out of range panics: only called with constants, inside `FIXED_BYTES`.
struct Fields<'a>(&'a [u8; FIXED_BYTES]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        *self.0[at..].first_chunk().expect("a constant offset inside the fixed part")
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn digest(&self, at: usize) -> Digest {
        Digest::from_slice(&self.array::<16>(at)).expect("sixteen bytes make a digest")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nvme::testing::any_meta;

    fn any_header() -> impl Strategy<Value = Header> {
        (any_meta(), any::<u64>()).prop_map(|(meta, sequence)| Header { meta, sequence: Sequence(sequence) })
    }

    fn encoded(header: &Header) -> Vec<u8> {
        let mut pages = vec![0xee; Shape::of(header.meta.len).header_bytes()];
        header.encode(&mut pages);
        pages
    }

    proptest! {
        #[test]
        fn a_header_reads_back_as_it_was_written(header in any_header()) {
            prop_assert_eq!(Header::decode(&encoded(&header)), Ok(header));
        }

        /// In the part that the checksum covers; behind it there is nothing to read.
        #[test]
        fn a_flipped_bit_is_refused(header in any_header(), at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let mut pages = encoded(&header);
            let covered = FIXED_BYTES + FRAME_BYTES + 4 * header.meta.sums.as_slice().len();
            pages[at.index(covered)] ^= 1u8 << bit;
            prop_assert!(Header::decode(&pages).is_err());
        }

        /// Headers of large blocks span sectors, and a cut may leave some of an older header.
        #[test]
        fn a_torn_header_is_refused(
            new in any_header(), old in any_header(), sums in prop::collection::vec(any::<u32>(), 1500), sector in 1usize..12,
        ) {
            let large = |mut header: Header, sums: &[u32]| {
                header.meta.len = (sums.len() * SUM_CHUNK_BYTES) as u32;
                header.meta.sums = ChunkSums::from_slice(sums);
                encoded(&header)
            };
            let reversed: Vec<u32> = sums.iter().rev().copied().collect();
            let (mut pages, old) = (large(new, &sums), large(old, &reversed));
            prop_assert!(Header::decode(&pages).is_ok());
            pages[512 * sector..].copy_from_slice(&old[512 * sector..]);
            prop_assert_eq!(Header::decode(&pages), Err(HeaderError::Checksum));
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut pages in prop::collection::vec(any::<u8>(), 0..9000), ours: bool, crc: bool) {
            if ours && pages.len() >= FIXED_BYTES {
                // Past the first gates, so that the fields behind them are reached.
                pages[..8].copy_from_slice(&MAGIC);
                pages[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
                let header_bytes = (u32::from_le_bytes([pages[16], pages[17], 0, 0]) as usize).clamp(256, pages.len());
                pages[16..20].copy_from_slice(&(header_bytes as u32).to_le_bytes());
                if crc {
                    pages[CRC_AT..CRC_AT + 4].fill(0);
                    let sum = crc32fast::hash(&pages[..header_bytes]);
                    pages[CRC_AT..CRC_AT + 4].copy_from_slice(&sum.to_le_bytes());
                }
            }
            let _ = Header::decode(&pages);
        }
    }

    #[test]
    fn a_payload_that_fits_shares_the_header_page() {
        let shape = |len| Shape::of(len);
        assert_eq!(shape(1), Shape { header_pages: 1, inline_at: Some(320), units: 1 });
        assert_eq!(shape(3776), Shape { header_pages: 1, inline_at: Some(320), units: 1 });
        assert_eq!(shape(3777), Shape { header_pages: 1, inline_at: None, units: 2 });
        assert_eq!(shape(128 * 1024), Shape { header_pages: 1, inline_at: None, units: 33 });
        assert_eq!(shape(BLOCK_BYTES_MAX as u32), Shape { header_pages: PAGES_MAX, inline_at: None, units: 32768 + 3 });
    }

    #[test]
    fn the_checksum_of_the_raw_frame_is_that_of_the_payload() {
        use crate::nvme::testing::meta_of;
        for len in [1, SUM_CHUNK_BYTES, SUM_CHUNK_BYTES + 1, 3 * SUM_CHUNK_BYTES - 7] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 31 + i / 255) as u8).collect();
            let frame = raw_frame(&meta_of(&bytes));
            assert_eq!(frame[24..28], crc32fast::hash(&bytes).to_le_bytes(), "{len}");
        }
    }
}
