//! What a put sends: chunks of parts, and the parts' checksums made on the way.

use bytes::Bytes;
use kvkeep_core::checksum::SUM_CHUNK_BYTES;
use kvkeep_proto::v1;
use tokio::sync::oneshot;

/// Data of one chunk that we send, bytes: one HTTP/2 frame.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// Checksums of the parts that were sent, by reservation.
pub(super) type PartSums = Vec<(u64, Vec<u32>)>;

/// Cuts parts into chunks, without copying, and sums them while they are sent. Made chunk by chunk as the connection takes
/// them, so no more than the connection's window is ever in flight.
pub(super) struct Chunks {
    parts: std::vec::IntoIter<(u64, Bytes)>,
    current: Option<(u64, Bytes, u64)>,
    chunk_bytes: usize,
    running: Vec<u32>,
    sums: PartSums,
    done: Option<oneshot::Sender<PartSums>>,
}

impl Chunks {
    pub(super) fn new(parts: Vec<(u64, Bytes)>, chunk_bytes: usize) -> (Self, oneshot::Receiver<PartSums>) {
        let (done, sums) = oneshot::channel();
        // Whole 64 KiB, so that a sum never spans two chunks. A server that allows less gets no sums: they are optional.
        let chunk_bytes = match chunk_bytes / SUM_CHUNK_BYTES {
            0 => chunk_bytes.max(1),
            n => n * SUM_CHUNK_BYTES,
        };
        let chunks = Self {
            parts: parts.into_iter(),
            current: None,
            chunk_bytes,
            running: Vec::new(),
            sums: Vec::new(),
            done: Some(done),
        };
        (chunks, sums)
    }
}

impl Iterator for Chunks {
    type Item = v1::WriteRequest;

    fn next(&mut self) -> Option<v1::WriteRequest> {
        let (reservation_id, mut rest, offset) = match self.current.take() {
            Some(current) => current,
            None => match self.parts.next() {
                Some((id, data)) => (id, data, 0),
                None => {
                    if let Some(done) = self.done.take() {
                        let _ = done.send(std::mem::take(&mut self.sums)); // nobody waits any more: nothing to tell
                    }
                    return None;
                }
            },
        };
        let data = rest.split_to(rest.len().min(self.chunk_bytes));
        if self.chunk_bytes.is_multiple_of(SUM_CHUNK_BYTES) {
            self.running.extend(data.chunks(SUM_CHUNK_BYTES).map(crc32fast::hash));
        }
        if rest.is_empty() {
            self.sums.push((reservation_id, std::mem::take(&mut self.running)));
        } else {
            self.current = Some((reservation_id, rest, offset + data.len() as u64));
        }
        Some(v1::WriteRequest { reservation_id, offset, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvkeep_core::ChunkSums;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_carry_every_byte_once_in_order_and_the_sums_of_whole_parts(
            lens in proptest::collection::vec(1usize..300_000, 1..5),
            chunk_bytes in 60_000usize..400_000,
        ) {
            let parts: Vec<(u64, Bytes)> = lens
                .iter()
                .enumerate()
                .map(|(i, len)| (i as u64 + 1, (0..*len).map(|b| (b * 31 + i) as u8).collect()))
                .collect();
            let (chunks, mut sums) = Chunks::new(parts.clone(), chunk_bytes);
            let mut landed = vec![Vec::new(); parts.len()];
            for chunk in chunks {
                let part = &mut landed[chunk.reservation_id as usize - 1];
                prop_assert_eq!(chunk.offset, part.len() as u64);
                prop_assert!(!chunk.data.is_empty() && chunk.data.len() <= chunk_bytes);
                part.extend_from_slice(&chunk.data);
            }
            let sums = sums.try_recv().unwrap();
            for (((id, data), landed), (sum_id, sum)) in parts.iter().zip(&landed).zip(&sums) {
                prop_assert_eq!(data, landed);
                prop_assert_eq!(id, sum_id);
                if chunk_bytes >= SUM_CHUNK_BYTES {
                    prop_assert!(ChunkSums::of(data).as_slice() == sum.as_slice());
                }
            }
        }
    }
}
