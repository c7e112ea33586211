//! Parts that come over a socket, on their way into regions.

use bytes::Bytes;

use super::Place;
use crate::assembly::{Landing, Room};

/// Lands parts that come over a socket in the regions they belong to.
pub(crate) struct Landed<'a>(pub(crate) &'a [Place]);

impl Landing for Landed<'_> {
    fn has_room(&mut self, item: usize, total: u64) -> bool {
        self.0[item].len() >= total
    }

    fn room(&mut self, item: usize, at: u64, _total: u64, len: usize) -> Option<Room<'_>> {
        let mut pieces = self.0[item].pieces(at, len as u64);
        match (pieces.next(), pieces.next()) {
            (Some((region, offset, bytes)), None) if bytes == len => {
                // SAFETY: who made the place promised that its bytes are this call's alone until it is answered, and this call
                // fills one piece at a time.
                Some(Room::Slice(unsafe { region.memory().slice_mut(offset, len) }))
            }
            _ => None,
        }
    }

    fn land(&mut self, item: usize, at: u64, _total: u64, chunk: Bytes) {
        let mut rest = &chunk[..];
        for (region, offset, len) in self.0[item].pieces(at, chunk.len() as u64) {
            let (head, tail) = rest.split_at(len);
            region.memory().copy_in(offset, head);
            rest = tail;
        }
    }

    fn forget(&mut self, _item: usize) {
        // The caller is told that the place holds nothing.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;

    #[test]
    fn a_block_in_pieces_lands_where_its_runs_are() {
        let region = Region::new(1 << 16).unwrap();
        // SAFETY: nobody else knows the region.
        let place = unsafe { region.strided(100, 10, 50, 3).and(region.place(1000, 7)) };
        assert_eq!((place.len(), place.run_count()), (37, 4));
        let block: Vec<u8> = (1..=37).collect();
        let places = [place];
        let mut landing = Landed(&places);
        landing.land(0, 0, 37, Bytes::copy_from_slice(&block[..15]));
        landing.land(0, 15, 37, Bytes::copy_from_slice(&block[15..]));
        assert!(places[0].copy_out()[..] == block[..]);
        let mut at = [0; 10];
        region.read(150, &mut at);
        assert_eq!(at[..], block[10..20]);
        assert!(landing.room(0, 5, 37, 10).is_none(), "it crosses two runs");
        assert!(matches!(landing.room(0, 10, 37, 10), Some(Room::Slice(s)) if s.len() == 10));
    }
}
