//! Get into a region: the server copies from the slot into the client's memory, or has the device read straight into it.
//!
//! Floor of one 1 MiB part: one pass of non-temporal copies (1 MiB read, 1 MiB written), the share of a checksum pass that
//! `arena.verify_dram` asks for; no system call beside the two messages. From NVMe: DMA into the region, one pass for the
//! sums.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvkeep_core::call_word::{begin_copy, end_copy};
use kvkeep_core::{Error, ErrorKind, MissReason, PartStatus, RequestId, Tier};
use kvkeep_proto::v1;
use kvkeep_tiers::region::Word;
use tokio_util::sync::CancellationToken;

use super::peer::Peer;
use super::scatter::{Copied, Scatter, word};
use crate::config::VerifyDram;
use crate::connection::Hello;
use crate::failpoint;
use crate::store::Store;
use crate::store::get::{Compare, Fetched, Obtained, PartRead};
use crate::verbs::get::{Get, hit, no};
use crate::verbs::{Answer, Refusal};

/// One call.
pub struct GetInto {
    job: Arc<Job>,
}

/// What the tasks of one call share.
struct Job {
    store: Arc<Store>,
    get: Get,
    into: Vec<Scatter>,
    word: Option<Word>,
    compare: Compare,
    want_sums: bool,
    next: AtomicUsize,
}

impl GetInto {
    /// Checks a call.
    pub fn open(peer: &Peer, hello: &Hello, wish: v1::GetIntoRequest) -> Answer<Self> {
        let verbs = &peer.verbs;
        let mut wished = wish.get.unwrap_or_default();
        let call = verbs.call(hello, wished.ctx.take())?;
        let get = verbs.get(call, wished)?;
        if wish.into.len() != get.reads.len() {
            return Err(Error::new(ErrorKind::InvalidArgument, "get_into names one place per item")
                .with("items", get.reads.len())
                .with("places", wish.into.len())
                .into());
        }
        let store = &verbs.store;
        let mut left = u64::from(store.config.limits.runs_max);
        let open = |scatter| Scatter::open(store, hello.instance, scatter, &mut left);
        let into = wish.into.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let word = word(store, hello.instance, wish.word)?;
        let compare = match store.config.arena.verify_dram {
            VerifyDram::Never => Compare::None,
            VerifyDram::Sampled => Compare::One,
            VerifyDram::Always => Compare::All,
        };
        let (store, want_sums) = (Arc::clone(store), wish.want_sums);
        Ok(Self { job: Arc::new(Job { store, get, into, word, compare, want_sums, next: AtomicUsize::new(0) }) })
    }

    /// Of the call.
    pub fn request(&self) -> &RequestId {
        &self.job.get.call.context.request_id
    }

    /// Serves it, in as many tasks as help.
    pub async fn run(self, stop: &CancellationToken) -> Answer<v1::GetIntoReply> {
        let job = self.job;
        let reads = &job.get.reads;
        if job.get.current {
            job.get.count(&job.store);
        }
        let mut items: Vec<_> = match job.tasks() {
            0 | 1 => Arc::clone(&job).work(stop.clone()).await?,
            tasks => {
                let mut working = tokio::task::JoinSet::new();
                for _ in 0..tasks {
                    working.spawn(Arc::clone(&job).work(stop.clone()));
                }
                let mut items = Vec::with_capacity(reads.len());
                // Every task ends before the call is answered: nothing is copied behind the answer.
                let mut failed = None;
                while let Some(some) = working.join_next().await {
                    match some.unwrap_or(Err(Refusal::Cut("the get was cut short"))) {
                        Ok(some) => items.extend(some),
                        Err(e) => failed = Some(e),
                    }
                }
                if let Some(e) = failed {
                    return Err(e);
                }
                items
            }
        };
        items.sort_unstable_by_key(|reply| reply.item);
        Ok(v1::GetIntoReply { items })
    }
}

impl Job {
    /// Memory is copied by as many tasks as there are processors; what waits for the device may wait side by side.
    fn tasks(&self) -> usize {
        let ahead = self.store.reads_ahead(&self.get.reads);
        ahead.min(self.get.reads.len())
    }

    async fn work(self: Arc<Self>, stop: CancellationToken) -> Answer<Vec<v1::GetReply>> {
        let mut replies = Vec::new();
        let mut copied = 0;
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(read) = self.get.reads.get(item) else { return Ok(replies) };
            replies.push(if stop.is_cancelled() {
                self.store.counters.missed(MissReason::Cancelled);
                no(item, PartStatus::Miss, MissReason::Cancelled)
            } else if tokio::time::Instant::now() >= self.get.call.deadline {
                self.store.counters.missed(MissReason::Late);
                no(item, PartStatus::Miss, MissReason::Late)
            } else {
                self.item(item, read).await?
            });
            copied += self.into[item].bytes();
            if copied >= 1 << 20 && self.next.load(Ordering::Relaxed) < self.get.reads.len() {
                copied = 0;
                // A copy of 1 MiB keeps a worker for some 70 us: others get their turn between two.
                tokio::task::yield_now().await;
            }
        }
    }

    async fn item(self: &Arc<Self>, item: usize, read: &PartRead) -> Answer<v1::GetReply> {
        if !self.get.current {
            self.store.counters.missed(MissReason::Revision);
            return Ok(no(item, PartStatus::Miss, MissReason::Revision));
        }
        failpoint::at("get_into.begun");
        let (caller, handle) = (self.get.call.caller, self.get.handle);
        // The device may fill the region itself; the word is held from before it is asked until it has answered.
        let mut guard = None;
        let landing = |len| {
            let buf = self.into[item].io_buf(len)?;
            if let Some(word) = &self.word {
                guard = Some(begin_copy(word).then_some(word)?);
            }
            Some(buf)
        };
        let obtained = self.store.fetch_or_land(caller, handle, read.clone(), self.compare, landing).await;
        if guard.is_some_and(|word| !end_copy(word)) {
            return Ok(self.revoked(item));
        }
        match obtained {
            Obtained::Landed(meta) => Ok(self.spell(item, &meta, Tier::Nvme, 0)),
            Obtained::Fetched(fetched) => self.copy(item, fetched).await,
        }
    }

    async fn copy(self: &Arc<Self>, item: usize, fetched: Fetched) -> Answer<v1::GetReply> {
        match fetched {
            Fetched::No(status, reason) => Ok(no(item, status, reason)),
            Fetched::Bad(error) => Err(error.into()),
            Fetched::Hit { part, meta, range, tier, .. } => {
                if range.len() as u64 > self.into[item].bytes() {
                    return Ok(no(item, PartStatus::Miss, MissReason::Format));
                }
                let start = range.start;
                let copied = if self.into[item].is_mapped() {
                    self.into[item].write(&part[range], self.word.as_ref())
                } else {
                    let job = Arc::clone(self);
                    let copy = move || job.into[item].write(&part[range], job.word.as_ref());
                    tokio::task::spawn_blocking(copy).await.map_err(|_| Refusal::Cut("the copy was cut short"))?
                };
                failpoint::at("get_into.copied");
                match copied {
                    Ok(Copied::Yes) => Ok(self.spell(item, &meta, tier, start)),
                    Ok(Copied::Revoked) => Ok(self.revoked(item)),
                    // The client's own memory has failed: its part is a miss, the others are not.
                    Err(error) => {
                        tracing::debug!(%error, "a region could not be written");
                        Ok(no(item, PartStatus::Miss, MissReason::Io))
                    }
                }
            }
        }
    }

    fn revoked(&self, item: usize) -> v1::GetReply {
        self.store.counters.revoked_copies.one();
        no(item, PartStatus::Miss, MissReason::Cancelled)
    }

    fn spell(&self, item: usize, meta: &kvkeep_core::BlockMeta, tier: Tier, offset: usize) -> v1::GetReply {
        let mut reply = hit(item, meta, tier, offset);
        reply.last = true;
        if !self.want_sums {
            reply.crc32.clear();
        }
        reply
    }
}
