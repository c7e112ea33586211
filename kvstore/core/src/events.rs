//! What happened, for watchers: a bounded ring of numbered events. A reader that falls behind is told of the gap and
//! takes a snapshot; nothing waits for a reader.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::ids::{Digest, Handle};
use crate::words::{EventKind, Tier};

/// Default bound of the ring, events.
pub const EVENTS_MAX: usize = 65_536;
/// Default bound of the ring, bytes of keys and token ids.
pub const EVENT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One change of one position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub what: EventKind,
    /// Namespace and revision of the position.
    pub handle: Handle,
    /// The position.
    pub digest: Digest,
    /// The position before it, where known.
    pub parent: Option<Digest>,
    /// Its index in its chain.
    pub position: u32,
    /// The medium.
    pub tier: Tier,
    /// Raw bytes of the parts this event is about.
    pub bytes: u64,
    /// Groups that this event is about: bit `g` for group `g`.
    pub groups: u64,
    /// The engine's key; empty where the caller did not have it at hand.
    pub key: Arc<[u8]>,
    /// The parent's key; empty where there is none or the caller did not have it at hand.
    pub parent_key: Arc<[u8]>,
    /// Token ids as the engine gave them with the put; empty where it gave none.
    pub token_ids: Arc<[u32]>,
}

impl Event {
    /// What the event counts against the ring's bound in bytes.
    fn weight(&self) -> usize {
        self.key.len() + self.parent_key.len() + size_of_val::<[u32]>(&self.token_ids)
    }
}

/// An event with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// 1 for the first event of this life of the server, then one more each.
    pub sequence: u64,
    /// The event.
    pub event: Arc<Event>,
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// The events after the one asked for, oldest first; none: nothing happened since.
    Events(Vec<Numbered>),
    /// Events in between are gone, or the number was never given out: take a snapshot, then read after `newest`.
    Gap {
        /// Number of the newest event.
        newest: u64,
    },
}

/// The ring.
pub struct EventRing {
    ring: VecDeque<Arc<Event>>,
    newest: u64,
    events_max: usize,
    bytes: usize,
    bytes_max: usize,
}

impl EventRing {
    /// Keeps at most `events_max` events (1 at least) whose keys and token ids have at most `bytes_max` bytes together.
    pub fn new(events_max: usize, bytes_max: usize) -> Self {
        Self { ring: VecDeque::new(), newest: 0, events_max: events_max.max(1), bytes: 0, bytes_max }
    }

    /// Adds an event and gives its number. The oldest ones make room; an event that alone is over the bound in bytes is
    /// kept alone.
    pub fn push(&mut self, event: Event) -> u64 {
        self.bytes += event.weight();
        self.ring.push_back(Arc::new(event));
        self.newest += 1;
        while self.ring.len() > self.events_max || (self.bytes > self.bytes_max && self.ring.len() > 1) {
            self.bytes -= self.ring.pop_front().map_or(0, |old| old.weight());
        }
        self.newest
    }

    /// At most `max` events after number `sequence`; 0 reads from the first event of this life.
    pub fn after(&self, sequence: u64, max: usize) -> Read {
        let first = self.newest - self.ring.len() as u64 + 1;
        if sequence > self.newest || sequence + 1 < first {
            return Read::Gap { newest: self.newest };
        }
        let skip = (sequence + 1 - first) as usize;
        let events = self.ring.iter().enumerate().skip(skip).take(max);
        Read::Events(
            events.map(|(i, e)| Numbered { sequence: first + i as u64, event: Arc::clone(e) }).collect::<Vec<_>>(),
        )
    }

    /// Number of the newest event; 0 before the first.
    pub fn newest(&self) -> u64 {
        self.newest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NamespaceId, Revision};

    fn event(position: u32, key: &[u8]) -> Event {
        Event {
            what: EventKind::Stored,
            handle: Handle { namespace: NamespaceId(1), revision: Revision(1) },
            digest: Digest::from_slice(&[1; 16]).unwrap(),
            parent: None,
            position,
            tier: Tier::Dram,
            bytes: 4096,
            groups: 1,
            key: key.into(),
            parent_key: [].into(),
            token_ids: [].into(),
        }
    }

    fn positions(read: Read) -> Vec<(u64, u32)> {
        match read {
            Read::Events(events) => events.iter().map(|n| (n.sequence, n.event.position)).collect(),
            Read::Gap { newest } => panic!("gap before {newest}"),
        }
    }

    #[test]
    fn a_reader_gets_every_event_once_in_order() {
        let mut ring = EventRing::new(8, 1024);
        assert_eq!(positions(ring.after(0, 9)), []);
        for i in 0..5 {
            assert_eq!(ring.push(event(i, b"k")), u64::from(i) + 1);
        }
        assert_eq!(positions(ring.after(0, 2)), [(1, 0), (2, 1)]);
        assert_eq!(positions(ring.after(2, 9)), [(3, 2), (4, 3), (5, 4)]);
        assert_eq!(positions(ring.after(5, 9)), []);
    }

    #[test]
    fn a_slow_reader_is_told_of_the_gap() {
        let mut ring = EventRing::new(3, 1024);
        for i in 0..5 {
            ring.push(event(i, b"k"));
        }
        assert_eq!(ring.after(1, 9), Read::Gap { newest: 5 });
        assert_eq!(positions(ring.after(2, 9)), [(3, 2), (4, 3), (5, 4)]);
    }

    /// A number from an earlier life of the server is a gap, not silence until the numbers catch up.
    #[test]
    fn a_number_never_given_out_is_a_gap() {
        let mut ring = EventRing::new(3, 1024);
        ring.push(event(0, b"k"));
        assert_eq!(ring.after(7, 9), Read::Gap { newest: 1 });
    }

    #[test]
    fn keys_and_token_ids_are_bounded_in_bytes() {
        let mut ring = EventRing::new(100, 10);
        for i in 0..6 {
            ring.push(event(i, b"four"));
        }
        assert_eq!(positions(ring.after(4, 9)), [(5, 4), (6, 5)]);
        ring.push(event(6, &[0; 64]));
        assert_eq!(positions(ring.after(6, 9)), [(7, 6)]);
        assert_eq!(ring.after(5, 9), Read::Gap { newest: 7 });
    }
}
