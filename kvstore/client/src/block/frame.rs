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

/// Appends a frame without its payload, which follows on the stream.
pub fn encode(envelope: &Envelope, payload: usize, out: &mut BytesMut) {
    let len = envelope.encoded_len();
    out.reserve(HEAD_BYTES + len);
    // Both are bounded far below 4 GiB: envelopes by `limits.envelope_bytes_max`, payloads by `limits.chunk_bytes_max`.
    out.put_u32_le(len as u32);
    out.put_u32_le(payload as u32);
    envelope.encode_raw(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_back_and_http2_is_never_taken_for_one() {
        let envelope = Envelope { call: 7, end: true, ..Envelope::default() };
        let mut out = BytesMut::new();
        encode(&envelope, 4096, &mut out);
        let head = Head::parse(out[..HEAD_BYTES].try_into().unwrap());
        assert_eq!((head.envelope as usize, head.payload), (out.len() - HEAD_BYTES, 4096));
        assert_eq!(Envelope::decode(&out[HEAD_BYTES..]).unwrap(), envelope);
        assert!(Head::parse(*b"PRI * HT").envelope > 64 << 20, "longer than any envelope may be");
    }
}
