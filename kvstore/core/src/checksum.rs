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

/// The sums of a block that arrives in pieces.
#[derive(Clone, Debug, Default)]
pub struct RunningSums {
    whole: Vec<u32>,
    open: crc32fast::Hasher,
    /// Bytes in `open`.
    open_bytes: usize,
}

impl RunningSums {
    /// Takes the next bytes.
    pub fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (head, tail) = bytes.split_at(bytes.len().min(SUM_CHUNK_BYTES - self.open_bytes));
            self.open.update(head);
            self.open_bytes += head.len();
            bytes = tail;
            if self.open_bytes == SUM_CHUNK_BYTES {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        self.whole.push(std::mem::take(&mut self.open).finalize());
        self.open_bytes = 0;
    }

    /// The sums of all bytes taken.
    pub fn finish(mut self) -> ChunkSums {
        if self.open_bytes > 0 {
            self.close();
        }
        ChunkSums(self.whole.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_pieces_have_the_sums_of_the_whole() {
        let bytes: Vec<u8> = (0..3 * SUM_CHUNK_BYTES + 77).map(|i| (i * 31 % 251) as u8).collect();
        for piece in [1000, SUM_CHUNK_BYTES - 1, SUM_CHUNK_BYTES, 2 * SUM_CHUNK_BYTES + 1, bytes.len()] {
            let mut sums = RunningSums::default();
            bytes.chunks(piece).for_each(|some| sums.add(some));
            assert_eq!(sums.finish(), ChunkSums::of(&bytes), "{piece}");
        }
        assert_eq!(RunningSums::default().finish(), ChunkSums::of(&[]));
    }

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
