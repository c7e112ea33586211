//! A group's state as it travels to another member, in raft's snapshot. Index, term and members stand beside it in raft's
//! own fields.
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `KRS1`; the digit is the version |
//! | 4 | 4 | crc32 of what follows |
//! | 8 | 8 | clock, ms |
//! | 16 | | for each key of the state machine, in order: bytes of the key 4, bytes of the value 4, key, value |

use super::Reader;
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 4] = b"KRS1";

/// Keys and values of a state machine, in order of the keys.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Makes a snapshot of pairs that are added in order of their keys.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub fn new() -> Self {
        let mut data = MAGIC.to_vec();
        data.resize(16, 0);
        Self(data)
    }

    pub fn add(&mut self, key: &[u8], value: &[u8]) {
        // Both are bounded by SNAPSHOT_BYTES_MAX, which the caller holds.
        self.0.extend_from_slice(&(key.len() as u32).to_le_bytes());
        self.0.extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.0.extend_from_slice(key);
        self.0.extend_from_slice(value);
    }

    pub fn bytes(&self) -> usize {
        self.0.len()
    }

    pub fn finish(mut self, clock_ms: u64) -> Vec<u8> {
        self.0[8..16].copy_from_slice(&clock_ms.to_le_bytes());
        let sum = crc32fast::hash(&self.0[8..]).to_le_bytes();
        self.0[4..8].copy_from_slice(&sum);
        self.0
    }
}

/// Clock and pairs of a snapshot.
///
/// # Errors
/// `NewerVersion` if it begins with another magic, `Corrupt` if it is damaged.
pub(crate) fn decode(data: &[u8]) -> Result<(u64, Pairs)> {
    let mut r = Reader(data);
    if r.take(4)? != MAGIC {
        return Err(Error::new(ErrorKind::NewerVersion, "a snapshot of another version than KRS1"));
    }
    let sum = r.u32()?;
    if sum != crc32fast::hash(r.0) {
        return Err(Error::new(ErrorKind::Corrupt, "a snapshot is damaged"));
    }
    let clock_ms = r.u64()?;
    let mut pairs = Pairs::new();
    while !r.0.is_empty() {
        let (key, value) = (r.u32()? as usize, r.u32()? as usize);
        pairs.push((r.take(key)?.to_vec(), r.take(value)?.to_vec()));
    }
    Ok((clock_ms, pairs))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(clock_ms: u64, pairs: &Pairs) -> Vec<u8> {
        let mut writer = Writer::new();
        pairs.iter().for_each(|(k, v)| writer.add(k, v));
        writer.finish(clock_ms)
    }

    proptest! {
        #[test]
        fn a_snapshot_comes_back(clock: u64, pairs: Pairs) {
            prop_assert_eq!(decode(&encode(clock, &pairs)).unwrap(), (clock, pairs));
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut data: Vec<u8>) {
            let _ = decode(&data);
            // And behind a right head.
            let sum = crc32fast::hash(&data);
            data.splice(0..0, [&MAGIC[..], &sum.to_le_bytes()].concat());
            let _ = decode(&data);
        }
    }

    #[test]
    fn damage_is_named() {
        let mut data = encode(1, &vec![(b"k".to_vec(), b"v".to_vec())]);
        *data.last_mut().unwrap() ^= 1;
        assert_eq!(decode(&data).unwrap_err().kind(), ErrorKind::Corrupt);
        data[3] = b'2';
        assert_eq!(decode(&data).unwrap_err().kind(), ErrorKind::NewerVersion);
    }
}
