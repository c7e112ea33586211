//! What is where, position by position: what `manifest` answers, and what a restore finds missing.

use std::sync::Arc;

use kvkeep_core::catalogue::Namespace;
use kvkeep_core::session::Session;
use kvkeep_core::{Class, Digest, Key, MissReason, PartStatus, Tier};

use super::super::Store;

/// Positions of one answer.
pub const POSITIONS_ANSWER_MAX: usize = 4096;

/// One position of a manifest.
#[derive(Clone, Debug)]
pub struct Placing {
    /// Which.
    pub digest: Digest,
    /// Known from a copy that is here.
    pub key: Option<Key>,
    /// A hit, or a miss.
    pub status: PartStatus,
    /// The slowest that one of its parts needs.
    pub tier: Option<Tier>,
    /// Why it is not here.
    pub reason: Option<MissReason>,
    /// The weakest of its parts.
    pub class: Option<Class>,
    /// Of all its parts.
    pub bytes: u64,
}

impl Store {
    /// Where positions `first..first + count` of a session are.
    pub async fn placings(
        self: &Arc<Self>,
        namespace: &Namespace,
        session: &Session,
        first: u64,
        count: usize,
    ) -> Vec<Placing> {
        let digests: Vec<Digest> = session.manifest.from(first).take(count.min(POSITIONS_ANSWER_MAX)).collect();
        let handle = session.handle(namespace.id);
        let stale = namespace.revision != session.revision;
        let named: Vec<_> = digests.iter().map(|d| (*d, handle)).collect();
        let mut placings = Vec::with_capacity(digests.len());
        for slice in named.chunks(super::SLICE_KEYS) {
            let keys = self.keys_of(slice).await;
            placings.extend(slice.iter().zip(keys).map(|((digest, _), key)| self.placing(*digest, key, stale)));
        }
        placings
    }

    /// Where one position is; `stale`: under another revision than the namespace's.
    pub(super) fn placing(&self, digest: Digest, key: Option<Key>, stale: bool) -> Placing {
        let miss = |reason| Placing {
            digest,
            key: None,
            status: PartStatus::Miss,
            tier: None,
            reason: Some(reason),
            class: None,
            bytes: 0,
        };
        if stale {
            return miss(MissReason::Revision);
        }
        let parts: Vec<_> = self.located(&digest).into_iter().map(|(_, found)| found).collect();
        if self.directory.lock().standing(&digest).is_none() {
            let why = if parts.is_empty() { self.why_gone(&digest) } else { MissReason::Incomplete };
            return Placing { key, bytes: parts.iter().map(|p| u64::from(p.len)).sum(), ..miss(why) };
        }
        Placing {
            digest,
            key,
            status: PartStatus::Hit,
            tier: parts.iter().map(|p| if p.slot.is_some() { Tier::Dram } else { Tier::Nvme }).max(),
            reason: None,
            class: parts.iter().map(|p| p.class).min(),
            bytes: parts.iter().map(|p| u64::from(p.len)).sum(),
        }
    }

    /// Why a position that a manifest names is not here: it was once.
    pub(super) fn why_gone(&self, digest: &Digest) -> MissReason {
        let gone = self.directory.lock().view(digest).and_then(|v| v.gone);
        gone.or_else(|| self.journal.why_absent(digest)).unwrap_or(MissReason::Evicted)
    }
}

/// One sentence for a person.
pub fn sentence(reason: MissReason) -> &'static str {
    match reason {
        MissReason::NeverStored => "nothing was ever stored under its key",
        MissReason::Evicted => "it was evicted from its last tier: class cache makes no promise",
        MissReason::Expired => "its time to live ended",
        MissReason::Refused => "its put was refused",
        MissReason::Quarantined => "its bytes failed their checksum and were put aside",
        MissReason::Revision => "the weights have changed since: its bytes are of no use to the new ones",
        MissReason::Format => "what is stored does not fit the format",
        MissReason::Late => "it could not be read before the deadline",
        MissReason::Removed => "it was removed",
        MissReason::Incomplete => "some of its shards or groups are not here",
        MissReason::Pending => "it is being written",
        MissReason::Io => "its device failed the read",
        MissReason::Restart => "it was in memory only when the server stopped",
        MissReason::Unreachable => "the server that has it did not answer",
        MissReason::Cancelled => "the caller took the call back",
    }
}
