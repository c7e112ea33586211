//! Checksums of raw block bytes: one crc32 (IEEE) per 64 KiB, made at commit and stored with the block.

/// Raw bytes covered by one sum.
pub const SUM_CHUNK_BYTES: usize = 64 * 1024;

/// The sums of one block, in order; the last one covers what is left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSums(Box<[u32]>);

impl ChunkSums {
    /// Sums `bytes`, one pass.
    pub fn of(bytes: &[u8]) -> Self {
        Self(bytes.chunks(SUM_CHUNK_BYTES).map(crc32fast::hash).collect())
    }

    /// From sums that were stored or sent.
    pub fn from_slice(sums: &[u32]) -> Self {
        Self(sums.into())
    }

    /// How many sums a block of `len` bytes has.
    pub const fn count_for(len: usize) -> usize {
        len.div_ceil(SUM_CHUNK_BYTES)
    }

    /// The sums.
    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }

    /// The first chunk of `bytes` that is not what it was, if any. `bytes` starts at chunk `first` of the block and ends
    /// at a chunk boundary or at the end of the block. A missing sum is a mismatch.
    pub fn first_mismatch(&self, first: usize, bytes: &[u8]) -> Option<usize> {
        bytes
            .chunks(SUM_CHUNK_BYTES)
            .enumerate()
            .find(|(i, chunk)| self.0.get(first + i) != Some(&crc32fast::hash(chunk)))
            .map(|(i, _)| first + i)
    }

    /// Whether `bytes`, a whole block, is what was summed.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        self.0.len() == Self::count_for(bytes.len()) && self.first_mismatch(0, bytes).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_is_found_in_its_chunk() {
        let mut bytes = vec![3u8; 2 * SUM_CHUNK_BYTES + 5];
        let sums = ChunkSums::of(&bytes);
        assert_eq!(sums.as_slice().len(), 3);
        assert!(sums.matches(&bytes));
        bytes[SUM_CHUNK_BYTES + 9] ^= 1;
        assert_eq!(sums.first_mismatch(0, &bytes), Some(1));
        assert_eq!(sums.first_mismatch(2, &bytes[2 * SUM_CHUNK_BYTES..]), None);
        assert!(!sums.matches(&bytes[..SUM_CHUNK_BYTES]));
    }
}
