//! The bytes of a block, made from its name alone, so that every byte read back can be checked without keeping a copy.
//!
//! They look like bf16 activations: sign and mantissa are noise, the exponent follows that of a normal distribution (about
//! 2.6 bits of entropy), so that a codec meets what it will meet in production.
//!
//! ```text
//! word i of a block = table[(start + i) mod TABLE_WORDS]      exponents, sampled once; `start` comes from the seed
//!                   ^ wyrand(seed + i * STEP) & SIGN_MANTISSA  noise of this block alone
//! ```
//! Floor: one multiplication and two loads per 8 bytes. It must stay far above what one connection carries, or the bench
//! would measure itself: `examples/generator_speed.rs`.

use std::hash::Hasher as _;
use std::sync::OnceLock;

use kvkeep_core::{GroupId, Key, ShardId};
use siphasher::sip::SipHasher13;

/// Words of the table of exponents: 32 KiB, so that it stays in the first-level cache.
const TABLE_WORDS: usize = 4096;
/// Odd, so that the stream has full period.
const STEP: u64 = 0xa076_1d64_78bd_642f;
/// Second constant of wyrand.
const MIX: u64 = 0xe703_7ed1_a0b4_28db;
/// Sign and mantissa bits of four bf16 numbers.
const SIGN_MANTISSA: u64 = 0x807f_807f_807f_807f;
/// Exponent bits of 1.0 as bf16, in place.
const ONE: u64 = 127 << 7;

/// What names the bytes of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(u64);

impl Seed {
    /// Of one part of a position.
    pub fn of(key: &Key, group: GroupId, shard: ShardId) -> Self {
        let mut h = SipHasher13::new();
        h.write(key.as_bytes());
        h.write_u16(group.0);
        h.write_u16(shard.0);
        Self(h.finish())
    }

    /// Of the `n`-th anonymous block.
    pub fn nth(n: u64) -> Self {
        Self(wyrand(n.wrapping_mul(STEP)))
    }
}

fn wyrand(s: u64) -> u64 {
    let product = u128::from(s) * u128::from(s ^ MIX);
    product as u64 ^ (product >> 64) as u64
}

/// Exponents of a standard normal distribution scaled by 0.5: mostly 124..=126, a long tail below.
fn table() -> &'static [u64; TABLE_WORDS] {
    static TABLE: OnceLock<Box<[u64; TABLE_WORDS]>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = Box::new([0; TABLE_WORDS]);
        for (i, word) in table.iter_mut().enumerate() {
            for lane in 0..4 {
                let r = wyrand(((i * 4 + lane) as u64).wrapping_mul(MIX) | 1);
                // Each step down in exponent halves the interval, hence the chance: trailing zeros are geometric.
                let down = u64::from((r | 1 << 20).trailing_zeros());
                *word |= (ONE - ((down + 1) << 7)) << (16 * lane);
            }
        }
        table
    })
}

/// The words of a block from word `first` on.
fn words(seed: Seed, first: usize) -> impl Iterator<Item = u64> {
    let table = table();
    let start = (seed.0 >> 40) as usize;
    let mut s = seed.0.wrapping_add((first as u64).wrapping_mul(STEP));
    (first..).map(move |i| {
        s = s.wrapping_add(STEP);
        table[(start.wrapping_add(i)) % TABLE_WORDS] ^ (wyrand(s) & SIGN_MANTISSA)
    })
}

/// Fills `out` with the block's bytes from its start.
pub fn fill(seed: Seed, out: &mut [u8]) {
    let mut words = words(seed, 0);
    let (chunks, tail) = out.as_chunks_mut::<8>();
    for (chunk, word) in chunks.iter_mut().zip(&mut words) {
        *chunk = word.to_le_bytes();
    }
    if let Some(word) = words.next() {
        tail.copy_from_slice(&word.to_le_bytes()[..tail.len()]);
    }
}

/// A block of `len` bytes.
pub fn block(seed: Seed, len: usize) -> bytes::Bytes {
    let mut out = vec![0; len];
    fill(seed, &mut out);
    out.into()
}

/// Compares every byte of `got` with the block's; answers how many differ.
pub fn wrong_bytes(seed: Seed, got: &[u8]) -> u64 {
    let (chunks, tail) = got.as_chunks::<8>();
    let mut differ = 0;
    // One pass that only says whether; the count is for the rare case.
    let mut expected = words(seed, 0);
    for (chunk, word) in chunks.iter().zip(&mut expected) {
        differ |= u64::from_le_bytes(*chunk) ^ word;
    }
    let last = expected.next().unwrap_or_default().to_le_bytes();
    if differ == 0 && tail == &last[..tail.len()] {
        return 0;
    }
    let mut right = vec![0; got.len()];
    fill(seed, &mut right);
    got.iter().zip(&right).filter(|(a, b)| a != b).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// What was filled verifies, at any length; one changed byte anywhere is found and counted.
        #[test]
        fn any_changed_byte_is_counted(seed: u64, len in 1usize..5000, at: prop::sample::Index, flip in 1u8..) {
            let seed = Seed(seed);
            let mut bytes = vec![0; len];
            fill(seed, &mut bytes);
            prop_assert_eq!(wrong_bytes(seed, &bytes), 0);
            bytes[at.index(len)] ^= flip;
            prop_assert_eq!(wrong_bytes(seed, &bytes), 1);
        }
    }

    /// Neighbouring names do not make neighbouring bytes: a block served under a wrong name is seen in most of its bytes.
    #[test]
    fn another_parts_bytes_are_wrong_nearly_everywhere() {
        let key = Key::new(&[1; 32]).unwrap();
        let bytes = block(Seed::of(&key, GroupId(0), ShardId(0)), 4096);
        for other in [
            Seed::of(&key, GroupId(0), ShardId(1)),
            Seed::of(&key, GroupId(1), ShardId(0)),
            Seed::of(&Key::new(&[2; 32]).unwrap(), GroupId(0), ShardId(0)),
        ] {
            assert!(wrong_bytes(other, &bytes) > 3000);
        }
    }

    /// The exponent is where a codec gains; sign and mantissa are where it cannot.
    #[test]
    fn the_bytes_look_like_bf16_of_small_numbers() {
        let bytes = block(Seed::nth(7), 1 << 20);
        let mut exponents = [0u32; 256];
        let mut negative = 0;
        for pair in bytes.as_chunks::<2>().0 {
            let value = u16::from_le_bytes(*pair);
            exponents[usize::from(value >> 7 & 0xff)] += 1;
            negative += u32::from(value >> 15);
        }
        let n: u32 = exponents.iter().sum();
        assert!(negative > n * 49 / 100 && negative < n * 51 / 100);
        let entropy: f64 =
            exponents.iter().filter(|c| **c > 0).map(|c| f64::from(*c) / f64::from(n)).map(|p| -p * p.log2()).sum();
        assert!((1.5..3.5).contains(&entropy), "{entropy}");
        assert_eq!(exponents[128..].iter().sum::<u32>(), 0);
    }
}
