//! Get: what is asked, understood and checked, and how an answer is spelt. Moving the bytes is the wire's business.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, stream};
use kvkeep_client::convert;
use kvkeep_core::{BlockMeta, GroupId, Handle, Key, LeaseId, MissReason, PartStatus, ShardId, Tier};
use kvkeep_proto::v1;

use super::{Answer, Call, Verbs, narrow};
use crate::store::Store;
use crate::store::clock::Clock;
use crate::store::get::{Compare, Fetched, PartRead};
use crate::store::requests::Missed;

/// Parts fetched at a time, whatever their size.
const PARTS_AHEAD_MAX: usize = 64;

/// One get, understood.
pub struct Get {
    /// Its call.
    pub call: Call,
    /// Namespace and revision.
    pub handle: Handle,
    /// The handle is at the namespace's revision; else every part is a miss.
    pub current: bool,
    /// The lease it leans on.
    pub lease: Option<LeaseId>,
    /// What is asked.
    pub reads: Vec<PartRead>,
    /// Data of one reply at most, bytes.
    pub chunk_bytes: usize,
}

impl Verbs {
    /// Checks a get.
    pub fn get(&self, call: Call, wish: v1::GetRequest) -> Answer<Get> {
        self.keys_within(wish.items.len())?;
        let handle = convert::handle_from_proto(wish.handle)?;
        let (_, current) = self.store.namespace_of(call.caller, handle)?;
        let lease = convert::lease_from_proto(wish.lease_id);
        if let Some(id) = lease {
            self.store.check_lease(call.caller, id)?;
        }
        let fidelity = convert::fidelity_from_proto(wish.fidelity)?;
        let digests = self.store.digests(call.caller, handle, wish.items.iter().map(|i| &i.key[..]));
        let mut reads = Vec::with_capacity(wish.items.len());
        for (item, digest) in wish.items.iter().zip(&digests) {
            let id = kvkeep_core::BlockId {
                digest: *digest,
                group: GroupId(narrow("group", item.group)?),
                shard: ShardId(narrow("shard", item.shard)?),
            };
            reads.push(PartRead {
                id,
                key: Key::new(&item.key)?,
                offset: item.offset,
                length: item.length,
                version: convert::version_from_proto(item.version),
                fidelity,
            });
        }
        let chunk_max = self.store.config.limits.chunk_bytes_max;
        let chunk = if wish.chunk_bytes == 0 { chunk_max } else { wish.chunk_bytes.clamp(4096, chunk_max) };
        Ok(Get { call, handle, current, lease, reads, chunk_bytes: chunk as usize })
    }
}

impl Get {
    /// Counts its accesses.
    pub fn count(&self, store: &Store) {
        // Parts of one position stand together.
        let positions = self.reads.chunk_by(|a, b| a.id.digest == b.id.digest).map(|parts| &parts[0].id.digest);
        let Call { caller, context, .. } = &self.call;
        store.touch(*caller, &context.request_id, self.lease, &context.info, positions);
    }
}

/// The parts of a get, fetched ahead of whoever sends them, in the order asked.
pub struct Fetches {
    stream: Pin<Box<dyn Stream<Item = Fetched> + Send>>,
    store: Arc<Store>,
    began: std::time::Instant,
    /// Bytes of DRAM hits, and of hits below.
    moved: [u64; 2],
}

impl Fetches {
    /// Counts the accesses and starts reading, by `limits.get_read_ahead_bytes` ahead. Whoever sends the parts compares what
    /// `compare` leaves.
    pub fn start(store: &Arc<Store>, get: Get, compare: Compare) -> Self {
        if get.current {
            get.count(store);
        }
        let Get { call, handle, current, reads, .. } = get;
        let width = store.parts_ahead(&reads).clamp(1, PARTS_AHEAD_MAX);
        let (fetcher, caller) = (Arc::clone(store), call.caller);
        let (asked, request) = (reads.len() as u32, call.context.request_id);
        let stream = stream::iter(reads.into_iter().enumerate())
            .map(move |(nth, read)| {
                let (store, request) = (Arc::clone(&fetcher), request.clone());
                async move {
                    let key = read.key.clone();
                    let fetched = if current {
                        store.fetch(caller, handle, read, compare).await
                    } else {
                        store.counters.missed(MissReason::Revision);
                        Fetched::No(PartStatus::Miss, MissReason::Revision)
                    };
                    if let Fetched::No(_, reason) = &fetched {
                        let (tenant, reason, unix_ms) = (caller.tenant, *reason, Clock::unix_ms());
                        let (verb, keys, hits) = ("get", asked, nth as u32);
                        store.requests.missed(Missed {
                            tenant,
                            request,
                            verb,
                            handle,
                            keys,
                            hits,
                            key,
                            reason,
                            unix_ms,
                        });
                    }
                    fetched
                }
            })
            .buffered(width)
            .boxed();
        Self { stream, store: Arc::clone(store), began: std::time::Instant::now(), moved: [0; 2] }
    }

    /// The next part; `None` behind the last.
    pub async fn next(&mut self) -> Option<Fetched> {
        let fetched = self.stream.next().await;
        if let Some(Fetched::Hit { range, tier, .. }) = &fetched {
            self.moved[usize::from(*tier != Tier::Dram)] += range.len() as u64;
        }
        fetched
    }

    /// All of it was sent: how fast it went is known.
    pub fn finish(self) {
        match self.moved {
            [dram, 0] => self.store.rates.dram_moved(dram, self.began.elapsed()),
            [0, nvme] => self.store.rates.nvme_moved(nvme, self.began.elapsed()),
            _ => {}
        }
    }
}

/// The answer to an item that is no hit.
pub fn no(item: usize, status: PartStatus, reason: MissReason) -> v1::GetReply {
    v1::GetReply {
        item: item as u32,
        status: convert::status_to_proto(status),
        reason: convert::reason_opt_to_proto(Some(reason)),
        last: true,
        ..Default::default()
    }
}

/// What stands with the first chunk of a hit, without data.
pub fn hit(item: usize, meta: &BlockMeta, tier: Tier, offset: usize) -> v1::GetReply {
    v1::GetReply {
        item: item as u32,
        status: convert::status_to_proto(PartStatus::Hit),
        offset: offset as u64,
        part_bytes: u64::from(meta.len),
        version: meta.version.0,
        crc32: meta.sums.as_slice().to_vec(),
        tier: convert::tier_to_proto(tier),
        fidelity: convert::fidelity_to_proto(meta.fidelity),
        ..Default::default()
    }
}

/// The chunks that a range is cut into.
pub fn chunks(range: std::ops::Range<usize>, chunk_bytes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = range.end;
    range.step_by(chunk_bytes.max(1)).map(move |at| at..(at + chunk_bytes).min(end))
}
