//! Conversations that are kept: a share of the workload's sessions has a durable session in the store.
//!
//! After the puts of a turn, which are of class `cache`, its whole positions and its token ids are appended: the append
//! raises the blocks. [`keep`] does that -> [`ledger`] remembers what was acknowledged -> [`check`] restores each session and
//! compares all of it: keys, every byte, token ids.

pub mod check;
pub mod keep;
pub mod ledger;

use crate::trace::SessionId;

/// Words that token ids are drawn from.
const VOCABULARY: u64 = 128_000;

/// Id of the token at this place of a conversation.
pub fn token_id(conversation: SessionId, index: u64) -> u32 {
    let mut x = conversation.0.rotate_left(40) ^ index;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) % VOCABULARY) as u32
}

/// The token ids of a conversation within these places.
pub fn token_ids(conversation: SessionId, places: std::ops::Range<u64>) -> Vec<u32> {
    places.map(|index| token_id(conversation, index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_follow_from_the_place_alone_and_differ_between_conversations() {
        let all = token_ids(SessionId(7), 0..1000);
        assert_eq!(all[600..], token_ids(SessionId(7), 600..1000));
        let equal = all.iter().zip(token_ids(SessionId(8), 0..1000)).filter(|(a, b)| **a == *b).count();
        assert!(equal < 5, "{equal}");
        assert!(all.iter().all(|id| u64::from(*id) < VOCABULARY));
    }
}
