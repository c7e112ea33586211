//! Records: their bytes and back. Numbers are little-endian.

use bytes::{Buf as _, BufMut as _, Bytes};
use kvkeep_core::MissReason;
use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_core::ids::{GroupId, KEY_BYTES_MAX, ShardId};

use crate::session_file::FileCounts;
use crate::sessions::ContentPart;

/// First bytes of a file.
pub(super) const MAGIC: [u8; 8] = *b"KVKSESS\n";
/// Bytes in front of a record's body: kind, three zeros, length.
pub(super) const PREFIX_BYTES: usize = 8;
/// Token ids of one record.
pub(super) const IDS_PER_RECORD: usize = 64 << 10;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Tokens = 1,
    Content = 2,
    Position = 3,
    Part = 4,
    End = 5,
}

impl Kind {
    fn from_code(code: u8) -> Option<Self> {
        [Self::Tokens, Self::Content, Self::Position, Self::Part, Self::End].into_iter().find(|k| *k as u8 == code)
    }

    /// For messages.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Content => "content",
            Self::Position => "position",
            Self::Part => "part",
            Self::End => "end",
        }
    }

    /// Smallest and largest body, bytes.
    fn body_bytes(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Self::Tokens => 12..=8 + 4 * IDS_PER_RECORD as u64,
            Self::Content => 13..=12 + KEY_BYTES_MAX as u64,
            Self::Position => 28..=28 + KEY_BYTES_MAX as u64,
            Self::Part => 5..=4 + BLOCK_BYTES_MAX,
            Self::End => 60..=60,
        }
    }

    /// Kind and length of the body, from a record's first bytes; `None` where no record begins so.
    pub(super) fn read(prefix: [u8; PREFIX_BYTES]) -> Option<(Self, usize)> {
        let [code, 0, 0, 0, length @ ..] = prefix else { return None };
        let (kind, length) = (Self::from_code(code)?, u32::from_le_bytes(length));
        kind.body_bytes().contains(&u64::from(length)).then_some((kind, length as usize))
    }
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Tokens {
        first: u64,
        ids: Vec<u32>,
    },
    Content(ContentPart),
    /// So many parts follow.
    Position {
        index: u32,
        parts: u32,
        /// Why parts are missing, where some are.
        reason: Option<MissReason>,
        /// In the store it comes from.
        digest: [u8; 16],
        /// Empty where nobody knew it.
        key: Bytes,
    },
    Part {
        group: GroupId,
        shard: ShardId,
        data: Bytes,
    },
    End {
        counts: FileCounts,
        /// Of everything before this record.
        crc32: u32,
    },
}

impl Record {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Tokens { .. } => Kind::Tokens,
            Self::Content(_) => Kind::Content,
            Self::Position { .. } => Kind::Position,
            Self::Part { .. } => Kind::Part,
            Self::End { .. } => Kind::End,
        }
    }

    /// Its bytes but for the checksum: those that are made, and the payload.
    pub(super) fn encode(&self) -> (Vec<u8>, &[u8]) {
        let mut out = vec![0; PREFIX_BYTES];
        let mut payload: &[u8] = &[];
        match self {
            Self::Tokens { first, ids } => {
                out.put_u64_le(*first);
                ids.iter().for_each(|id| out.put_u32_le(*id));
            }
            Self::Content(part) => {
                out.put_u64_le(part.first_token);
                out.put_u32_le(part.tokens);
                out.put_slice(&part.content_id);
            }
            Self::Position { index, parts, reason, digest, key } => {
                out.put_u32_le(*index);
                out.put_u32_le(*parts);
                out.put_u32_le(reason.map_or(0, |r| u32::from(r.code())));
                out.put_slice(digest);
                out.put_slice(key);
            }
            Self::Part { group, shard, data } => {
                out.put_u16_le(group.0);
                out.put_u16_le(shard.0);
                payload = data;
            }
            Self::End { counts, crc32 } => {
                for n in words(counts) {
                    out.put_u64_le(n);
                }
                out.put_u32_le(*crc32);
            }
        }
        let length = (out.len() - PREFIX_BYTES + payload.len()) as u32;
        out[0] = self.kind() as u8;
        out[4..PREFIX_BYTES].copy_from_slice(&length.to_le_bytes());
        (out, payload)
    }

    /// From the body, whose length [`Kind::read`] allowed; `None` where it makes no sense.
    pub(super) fn decode(kind: Kind, mut body: Bytes) -> Option<Self> {
        Some(match kind {
            Kind::Tokens => {
                let first = body.try_get_u64_le().ok()?;
                let (ids, rest) = body.as_chunks::<4>();
                if !rest.is_empty() {
                    return None;
                }
                Self::Tokens { first, ids: ids.iter().map(|id| u32::from_le_bytes(*id)).collect() }
            }
            Kind::Content => Self::Content(ContentPart {
                first_token: body.try_get_u64_le().ok()?,
                tokens: body.try_get_u32_le().ok()?,
                content_id: body,
            }),
            Kind::Position => {
                let (index, parts) = (body.try_get_u32_le().ok()?, body.try_get_u32_le().ok()?);
                // One that this version does not know reads as none.
                let reason = MissReason::from_code(u8::try_from(body.try_get_u32_le().ok()?).unwrap_or(0));
                let mut digest = [0; 16];
                body.try_copy_to_slice(&mut digest).ok()?;
                Self::Position { index, parts, reason, digest, key: body }
            }
            Kind::Part => Self::Part {
                group: GroupId(body.try_get_u16_le().ok()?),
                shard: ShardId(body.try_get_u16_le().ok()?),
                data: body,
            },
            Kind::End => {
                let mut n = || body.try_get_u64_le().ok();
                let counts = FileCounts {
                    positions: n()?,
                    missing: n()?,
                    incomplete: n()?,
                    parts: n()?,
                    bytes: n()?,
                    tokens: n()?,
                    content: n()?,
                };
                Self::End { counts, crc32: body.try_get_u32_le().ok()? }
            }
        })
    }
}

fn words(c: &FileCounts) -> [u64; 7] {
    [c.positions, c.missing, c.incomplete, c.parts, c.bytes, c.tokens, c.content]
}
