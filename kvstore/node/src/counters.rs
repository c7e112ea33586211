//! What a node counts. One list: the same names stand in `/metrics`, in `Stats` and in the documentation.

use std::sync::atomic::{AtomicU64, Ordering};

use kvkeep_core::MissReason;

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident => $name:literal),+ $(,)?) => {
        /// Counts since the node started.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $field: Count,)+
            misses: [Count; MissReason::ALL.len()],
        }

        impl Counters {
            /// Every count with its name.
            pub fn each(&self, mut f: impl FnMut(String, u64)) {
                $(f($name.to_string(), self.$field.get());)+
                for (reason, count) in MissReason::ALL.iter().zip(&self.misses) {
                    f(format!("kvkeep_misses_total{{reason=\"{reason}\"}}"), count.get());
                }
            }

            /// Tells the metrics recorder.
            pub fn publish(&self) {
                $(metrics::counter!($name).absolute(self.$field.get());)+
                for (reason, count) in MissReason::ALL.iter().zip(&self.misses) {
                    metrics::counter!("kvkeep_misses_total", "reason" => reason.word()).absolute(count.get());
                }
            }
        }
    };
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn one(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// Match queries answered.
    match_queries => "kvkeep_match_queries_total",
    /// Keys looked at by match.
    match_keys => "kvkeep_match_keys_total",
    /// Keys inside the boundaries that match answered.
    match_hit_keys => "kvkeep_match_hit_keys_total",
    /// Parts served from DRAM.
    get_dram_parts => "kvkeep_get_dram_parts_total",
    /// Parts served from NVMe.
    get_nvme_parts => "kvkeep_get_nvme_parts_total",
    /// Parts whose place in DRAM was told to a client that reads them there.
    mapped_parts => "kvkeep_mapped_parts_total",
    /// Parts read from NVMe straight into a client's region.
    get_straight_parts => "kvkeep_get_straight_parts_total",
    /// Copies not made, or thrown away, because the client took its memory back.
    revoked_copies => "kvkeep_revoked_copies_total",
    /// Frames that broke the rules of the block protocol; each closes its connection.
    block_violations => "kvkeep_block_violations_total",
    /// Bytes served.
    get_bytes => "kvkeep_get_bytes_total",
    /// Parts a reserve answered as present.
    put_present_parts => "kvkeep_put_present_parts_total",
    /// Parts a reserve refused.
    put_refused_parts => "kvkeep_put_refused_parts_total",
    /// Parts committed.
    put_parts => "kvkeep_put_parts_total",
    /// Bytes committed.
    put_bytes => "kvkeep_put_bytes_total",
    /// Parts whose writer lost to one that committed first.
    put_superseded_parts => "kvkeep_put_superseded_parts_total",
    /// Reservations that were never committed.
    reservations_abandoned => "kvkeep_reservations_abandoned_total",
    /// Copies dropped from DRAM that are on NVMe still.
    demoted_parts => "kvkeep_demoted_parts_total",
    /// Positions of ended sessions that left DRAM before anybody wanted their room.
    finished_positions => "kvkeep_finished_positions_total",
    /// Copies brought up from NVMe.
    promoted_parts => "kvkeep_promoted_parts_total",
    /// Parts that left their last tier by policy.
    evicted_parts => "kvkeep_evicted_parts_total",
    /// Parts written to NVMe.
    nvme_written_parts => "kvkeep_nvme_written_parts_total",
    /// Bytes written to NVMe, payload.
    nvme_written_bytes => "kvkeep_nvme_written_bytes_total",
    /// Parts not written to NVMe: over budget, full, queue full, poisoned.
    nvme_skipped_parts => "kvkeep_nvme_skipped_parts_total",
    /// Bytes read from NVMe, payload.
    nvme_read_bytes => "kvkeep_nvme_read_bytes_total",
    /// Copies that failed their own checksum.
    corrupt_copies => "kvkeep_corrupt_copies_total",
    /// Copies that a scrub checked.
    scrubbed_copies => "kvkeep_scrubbed_copies_total",
    /// Prefetches refused because the queue was full.
    prefetch_refused => "kvkeep_prefetch_refused_total",
    /// Puts that waited for room.
    put_waits => "kvkeep_put_waits_total",
    /// Appends to sessions that were acknowledged.
    session_appends => "kvkeep_session_appends_total",
    /// Restores of sessions that ended.
    session_restores => "kvkeep_session_restores_total",
    /// Sessions whose time to live ended.
    sessions_expired => "kvkeep_sessions_expired_total",
    /// Durable positions that no session named any more, removed.
    session_swept_positions => "kvkeep_session_swept_positions_total",
    /// Calls refused because they came without a hello or with bad credentials.
    denied_calls => "kvkeep_denied_calls_total",
}

impl Counters {
    /// Counts a part that was asked for and not served.
    pub fn missed(&self, reason: MissReason) {
        if let Some(count) = MissReason::ALL.iter().position(|r| *r == reason).and_then(|i| self.misses.get(i)) {
            count.one();
        }
    }
}
