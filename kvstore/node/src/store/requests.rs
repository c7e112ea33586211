//! What recent requests asked for and did not get: so that `explain` of a request id says why a request was slow.

use std::collections::VecDeque;

use kvkeep_core::{Handle, Key, MissReason, RequestId, TenantId};
use parking_lot::Mutex;

/// Misses that are remembered, the newest: about 200 bytes each. Requests without an id are not.
pub const MISSES_MAX: usize = 16_384;
/// Misses of one answer.
const ANSWER_MAX: usize = 256;

/// One miss.
#[derive(Clone, Debug)]
pub struct Missed {
    /// Whose request.
    pub tenant: TenantId,
    /// Which.
    pub request: RequestId,
    /// What was asked: a chain that ended before its last key, or one part.
    pub verb: &'static str,
    /// Under which weights.
    pub handle: Handle,
    /// Keys asked for.
    pub keys: u32,
    /// Of them, so many were here before the first that was not.
    pub hits: u32,
    /// The first that was not here.
    pub key: Key,
    /// Why.
    pub reason: MissReason,
    /// This node's wall clock, for people only.
    pub unix_ms: u64,
}

/// The ring.
#[derive(Default)]
pub struct Requests(Mutex<VecDeque<Missed>>);

impl Requests {
    /// Remembers a miss, and forgets the oldest.
    pub fn missed(&self, miss: Missed) {
        if miss.request.as_bytes().is_empty() {
            return;
        }
        let mut ring = self.0.lock();
        if ring.len() == MISSES_MAX {
            ring.pop_front();
        }
        ring.push_back(miss);
    }

    /// What is remembered of a request, newest last.
    pub fn of(&self, tenant: TenantId, request: &RequestId) -> Vec<Missed> {
        let ring = self.0.lock();
        let theirs = ring.iter().rev().filter(|m| m.tenant == tenant && m.request == *request);
        let mut found: Vec<_> = theirs.take(ANSWER_MAX).cloned().collect();
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use kvkeep_core::{NamespaceId, Revision};

    use super::*;

    fn miss(tenant: u32, request: &[u8], key: u8) -> Missed {
        Missed {
            tenant: TenantId(tenant),
            request: RequestId::new(request).unwrap(),
            verb: "match",
            handle: Handle { namespace: NamespaceId(1), revision: Revision(1) },
            keys: 2,
            hits: 1,
            key: Key::new(&[key]).unwrap(),
            reason: MissReason::Evicted,
            unix_ms: 0,
        }
    }

    #[test]
    fn a_request_has_its_own_misses_in_their_order_and_the_ring_is_bounded() {
        let requests = Requests::default();
        requests.missed(miss(0, b"a", 1));
        requests.missed(miss(0, b"", 2));
        requests.missed(miss(1, b"a", 3));
        requests.missed(miss(0, b"a", 4));
        let found: Vec<_> = requests.of(TenantId(0), &RequestId::new(b"a").unwrap());
        assert_eq!(found.iter().map(|m| m.key.as_bytes()[0]).collect::<Vec<_>>(), [1, 4]);
        assert!(requests.of(TenantId(0), &RequestId::default()).is_empty());
        (0..MISSES_MAX).for_each(|_| requests.missed(miss(0, b"b", 5)));
        assert!(requests.of(TenantId(0), &RequestId::new(b"a").unwrap()).is_empty(), "the oldest are forgotten");
        assert_eq!(requests.of(TenantId(0), &RequestId::new(b"b").unwrap()).len(), ANSWER_MAX);
    }
}
