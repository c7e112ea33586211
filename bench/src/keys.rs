//! From the ids of a trace to keys as engines make them.

use std::hash::Hasher as _;

use kvkeep_core::Key;
use siphasher::sip128::{Hasher128, SipHasher13};

/// Bytes of a key: what a sha256 over tokens has.
pub const KEY_BYTES: usize = 32;

/// The id of one prefix block of a workload: equal ids mean equal whole prefixes up to and including that block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixId(pub u64);

impl PrefixId {
    /// 32 bytes without structure, as a cryptographic hash would give.
    pub fn key(self) -> Key {
        let mut bytes = [0; KEY_BYTES];
        for (half, out) in bytes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let mut h = SipHasher13::new();
            h.write_u64(half as u64);
            h.write_u64(self.0);
            *out = h.finish128().as_bytes();
        }
        Key::new(&bytes).expect("32 bytes are a key")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_different_ids_differ_in_both_halves() {
        let (a, b) = (PrefixId(1).key(), PrefixId(2).key());
        assert_ne!(a.as_bytes()[..16], b.as_bytes()[..16]);
        assert_ne!(a.as_bytes()[16..], b.as_bytes()[16..]);
        assert_eq!(a, PrefixId(1).key());
    }
}
