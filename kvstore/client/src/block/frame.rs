//! Frames of the block protocol (drawn in `wire.proto`): two lengths, an envelope, a payload that no message holds.

use bytes::{BufMut as _, BytesMut};
use kvkeep_proto::v1::Envelope;
use prost::Message as _;

/// Bytes before the envelope.
pub const HEAD_BYTES: usize = 8;

/// What stands before an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the envelope.
    pub envelope: u32,
    /// Bytes of the payload behind it.
    pub payload: u32,
}

impl Head {
    /// Reads both lengths.
    pub fn parse(bytes: [u8; HEAD_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self { envelope: u32::from_le_bytes([a, b, c, d]), payload: u32::from_le_bytes([e, f, g, h]) }
    }
}

/// What lies before a payload is a multiple of this, bytes: a cache line.
pub const LINE_BYTES: usize = 64;
/// Field `padding` of the envelope, as it begins on the wire: number 4, bytes.
const PADDING_TAG: u8 = 4 << 3 | 2;

/// Appends a frame without its payload, which follows on the stream.
pub fn encode(envelope: &Envelope, payload: usize, out: &mut BytesMut) {
    let bare = envelope.encoded_len();
    let over = (HEAD_BYTES + bare) % LINE_BYTES;
    // Tag and length take two bytes: a padding of one does not exist.
    let padding = match (payload, over) {
        (0, _) | (_, 0) => 0,
        (_, 63) => LINE_BYTES + 1,
        (_, over) => LINE_BYTES - over,
    };
    out.reserve(HEAD_BYTES + bare + padding);
    // Both are bounded far below 4 GiB: envelopes by `limits.envelope_bytes_max`, payloads by `limits.chunk_bytes_max`.
    out.put_u32_le((bare + padding) as u32);
    out.put_u32_le(payload as u32);
    envelope.encode_raw(out);
    if padding > 0 {
        out.put_u8(PADDING_TAG);
        out.put_u8((padding - 2) as u8); // at most 63: one byte of a varint
        out.put_bytes(0, padding - 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_before_a_payload_is_whole_cache_lines() {
        for n in 0..200 {
            let detail = kvkeep_proto::v1::ErrorDetail { message: "x".repeat(n), ..Default::default() };
            let envelope = Envelope { call: 7, error: Some(detail), ..Envelope::default() };
            let mut out = BytesMut::new();
            encode(&envelope, 5, &mut out);
            assert_eq!(out.len() % LINE_BYTES, 0, "{n}");
            let read = Envelope::decode(&out[HEAD_BYTES..]).unwrap();
            assert_eq!(Envelope { padding: Default::default(), ..read }, envelope);
        }
    }

    #[test]
    fn a_frame_is_read_back_and_http2_is_never_taken_for_one() {
        let envelope = Envelope { call: 7, end: true, ..Envelope::default() };
        let mut out = BytesMut::new();
        encode(&envelope, 0, &mut out);
        let head = Head::parse(out[..HEAD_BYTES].try_into().unwrap());
        assert_eq!((head.envelope as usize, head.payload), (out.len() - HEAD_BYTES, 0));
        assert_eq!(Envelope::decode(&out[HEAD_BYTES..]).unwrap(), envelope);
        assert!(Head::parse(*b"PRI * HT").envelope > 64 << 20, "longer than any envelope may be");
    }
}
