//! What happened to blocks: the bounded history behind `explain` and the bounded ring behind `watch_events`.

use std::sync::Arc;

use kvkeep_core::events::{EVENT_BYTES_MAX, Event, EventRing, Read};
use kvkeep_core::history::{History, HistoryEntry, Record};
use kvkeep_core::words::{EventKind, Happening};
use kvkeep_core::{BlockMeta, Digest, GroupId, Handle, Key, MissReason, Tier};
use kvkeep_tiers::nvme::IndexEntry;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::clock::Clock;

/// Which way a copy went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Up.
    Promoted,
    /// Its copy in this tier was dropped; a colder one is left.
    Demoted,
    /// Its last copy was dropped by policy.
    Evicted,
    /// Its last copy is gone for another reason.
    Gone(MissReason),
}

/// The block an entry is about.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    handle: Handle,
    digest: Digest,
    group: GroupId,
    parent: Option<Digest>,
    position: u32,
    len: u32,
    key: &'a Key,
}

impl<'a> Subject<'a> {
    /// As a copy describes itself.
    pub fn of(meta: &'a BlockMeta) -> Self {
        Self {
            handle: meta.handle,
            digest: meta.id.digest,
            group: meta.id.group,
            parent: meta.parent,
            position: meta.position,
            len: meta.len,
            key: &meta.key,
        }
    }

    /// As the NVMe index describes it.
    pub fn of_entry(entry: &'a IndexEntry) -> Self {
        Self {
            handle: entry.handle,
            digest: entry.id.digest,
            group: entry.id.group,
            parent: entry.parent,
            position: entry.position,
            len: entry.len,
            key: &entry.key,
        }
    }

    fn event(&self, what: EventKind, tier: Tier) -> Event {
        Event {
            what,
            handle: self.handle,
            digest: self.digest,
            parent: self.parent,
            position: self.position,
            tier,
            bytes: u64::from(self.len),
            groups: 1u64.checked_shl(u32::from(self.group.0)).unwrap_or(0),
            key: self.key.as_bytes().into(),
            parent_key: Arc::default(),
            token_ids: Arc::default(),
        }
    }
}

/// Both rings.
pub struct Journal {
    rings: Mutex<Rings>,
    latest: watch::Sender<u64>,
}

struct Rings {
    history: History,
    events: EventRing,
}

impl Journal {
    /// With so many entries each.
    pub fn new(history_max: usize, events_max: usize) -> Self {
        Self {
            rings: Mutex::new(Rings {
                history: History::new(history_max),
                events: EventRing::new(events_max, EVENT_BYTES_MAX),
            }),
            latest: watch::channel(0).0,
        }
    }

    /// A part was committed.
    pub fn stored(&self, meta: &BlockMeta, parent_key: Option<Arc<[u8]>>, token_ids: Arc<[u32]>) {
        let mut event = Subject::of(meta).event(EventKind::Stored, Tier::Dram);
        event.parent_key = parent_key.unwrap_or_default();
        event.token_ids = token_ids;
        self.record(event, Happening::Stored, None, None);
    }

    /// A copy moved or left; by the policy's word, when keeping it was worth so much.
    pub fn moved(&self, subject: &Subject<'_>, moved: Moved, tier: Tier, index_value: Option<f32>) {
        let (what, kind, reason) = match moved {
            Moved::Promoted => (Happening::Promoted, EventKind::Promoted, None),
            Moved::Demoted => (Happening::Demoted, EventKind::Demoted, None),
            Moved::Evicted => (Happening::Evicted, EventKind::Removed, Some(MissReason::Evicted)),
            Moved::Gone(MissReason::Expired) => (Happening::Expired, EventKind::Removed, Some(MissReason::Expired)),
            Moved::Gone(reason) => (Happening::Removed, EventKind::Removed, Some(reason)),
        };
        self.record(subject.event(kind, tier), what, reason, index_value);
    }

    fn record(&self, event: Event, what: Happening, why: Option<MissReason>, index_value: Option<f32>) {
        let sequence = {
            let mut rings = self.rings.lock();
            let record = Record { what, tier: Some(event.tier), why, index_value };
            rings.history.record(event.digest, record, Clock::unix_ms());
            rings.events.push(event)
        };
        self.latest.send_replace(sequence);
    }

    /// Something happened that is no event for watchers, or of which only the digest is known.
    pub fn note(&self, digest: &Digest, what: Happening, tier: Tier, why: Option<MissReason>) {
        let record = Record { what, tier: Some(tier), why, index_value: None };
        self.rings.lock().history.record(*digest, record, Clock::unix_ms());
    }

    /// Why a position is absent, as far as is remembered.
    pub fn why_absent(&self, digest: &Digest) -> Option<MissReason> {
        self.rings.lock().history.why_absent(digest)
    }

    /// What is remembered of a position, newest last.
    pub fn history(&self, digest: &Digest, max: usize) -> Vec<HistoryEntry> {
        self.rings.lock().history.of(digest, max)
    }

    /// Events after a sequence number.
    pub fn events_after(&self, sequence: u64, max: usize) -> Read {
        self.rings.lock().events.after(sequence, max)
    }

    /// Sequence number of the newest event; a change wakes the receiver.
    pub fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }
}
