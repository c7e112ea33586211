//! The eight bytes before every value: version, kind, checksum over key and value.

use crate::error::{Error, ErrorKind, Result};

/// Version of every kind of value there is.
pub const VALUE_VERSION: u8 = 1;
/// Bytes before the value itself.
pub const SEAL_BYTES: usize = 8;

/// A value that begins with room for its seal. Fill it, then [`seal`] it.
pub(crate) fn unsealed(kind: u8, bytes: usize) -> Vec<u8> {
    let mut value = Vec::with_capacity(SEAL_BYTES + bytes);
    value.extend_from_slice(&[VALUE_VERSION, kind, 0, 0, 0, 0, 0, 0]);
    value
}

/// Puts the checksum in its place.
pub(crate) fn seal(key: &[u8], mut value: Vec<u8>) -> Vec<u8> {
    let sum = sum(key, &value).to_le_bytes();
    value[4..SEAL_BYTES].copy_from_slice(&sum);
    value
}

/// A value with `body` in it, sealed.
pub(crate) fn sealed(key: &[u8], body: &[u8]) -> Vec<u8> {
    let mut value = unsealed(0, body.len());
    value.extend_from_slice(body);
    seal(key, value)
}

/// Kind and body of a sealed value.
///
/// # Errors
/// `Corrupt` if the checksum is not that of key and value, `NewerVersion` if it is right and the version unknown.
pub(crate) fn open<'a>(key: &[u8], value: &'a [u8]) -> Result<(u8, &'a [u8])> {
    let corrupt = || Error::new(ErrorKind::Corrupt, "a value of the raft log is damaged").with("key", hex(key));
    let (head, body) = value.split_first_chunk::<SEAL_BYTES>().ok_or_else(corrupt)?;
    let [version, kind, _, _, a, b, c, d] = *head;
    if u32::from_le_bytes([a, b, c, d]) != sum(key, value) {
        return Err(corrupt());
    }
    if version != VALUE_VERSION {
        return Err(Error::new(ErrorKind::NewerVersion, "a value of the raft log is of a newer version")
            .with("key", hex(key))
            .with("version", version)
            .with("known", VALUE_VERSION));
    }
    Ok((kind, body))
}

fn sum(key: &[u8], value: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(key);
    crc.update(&value[..4]);
    crc.update(&[0; 4]);
    crc.update(&value[SEAL_BYTES..]);
    crc.finalize()
}

fn hex(key: &[u8]) -> String {
    key.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flipped_bit_and_another_key_are_damage() {
        let good = sealed(b"key", b"body");
        assert_eq!(open(b"key", &good).unwrap(), (0, &b"body"[..]));
        assert_eq!(open(b"kez", &good).unwrap_err().kind(), ErrorKind::Corrupt);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 16;
            assert_eq!(open(b"key", &bad).unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut newer = unsealed(0, 0);
        newer[0] = VALUE_VERSION + 1;
        assert_eq!(open(b"k", &seal(b"k", newer)).unwrap_err().kind(), ErrorKind::NewerVersion);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(key: Vec<u8>, value: Vec<u8>) {
            let _ = open(&key, &value);
        }
    }
}
