//! Put from a region: reserve, copy, commit in one call.
//!
//! Floor of one 1 MiB part: one pass over the client's memory, summed page by page on its way into the slot by non-temporal
//! stores (what the client's memory held before or holds afterwards proves nothing); no system call beside the two messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvkeep_core::{Error, ErrorKind, RequestId};
use kvkeep_proto::v1;
use kvkeep_proto::v1::part_answer::Answer as PartAnswer;
use kvkeep_tiers::region::Word;
use tokio_util::sync::CancellationToken;

use super::peer::Peer;
use super::scatter::{Copied, Scatter, word};
use crate::connection::Hello;
use crate::failpoint;
use crate::machine::cores;
use crate::store::reservations::ReservationId;
use crate::verbs::{Answer, Call, Verbs};

/// One call.
pub struct PutFrom {
    verbs: Verbs,
    call: Call,
    wish: v1::ReserveRequest,
    from: Vec<Scatter>,
    sums: Vec<v1::PartSums>,
    word: Option<Word>,
}

/// What the copying tasks share.
struct Copying {
    verbs: Verbs,
    call: Call,
    /// Reservation, its place among the parts, and where its bytes are.
    parts: Vec<(ReservationId, usize, Scatter)>,
    word: Option<Word>,
    next: AtomicUsize,
}

impl PutFrom {
    /// Checks a call.
    pub fn open(peer: &Peer, hello: &Hello, wish: v1::PutFromRequest) -> Answer<Self> {
        let verbs = peer.verbs.clone();
        let mut reserve = wish.reserve.unwrap_or_default();
        let call = verbs.call(hello, reserve.ctx.take())?;
        let lengths: Vec<u64> = reserve.positions.iter().flat_map(|p| &p.parts).map(|p| p.length).collect();
        let bad = |what: &'static str| Error::new(ErrorKind::InvalidArgument, what);
        if wish.from.len() != lengths.len() || (!wish.sums.is_empty() && wish.sums.len() != lengths.len()) {
            return Err(bad("put_from names one place (and, if any, one list of sums) per part")
                .with("parts", lengths.len())
                .with("places", wish.from.len())
                .with("sums", wish.sums.len())
                .into());
        }
        let mut left = u64::from(verbs.store.config.limits.runs_max);
        let mut from = Vec::with_capacity(lengths.len());
        for (scatter, length) in wish.from.into_iter().zip(lengths) {
            let scatter = Scatter::open(&verbs.store, hello.instance, scatter, &mut left)?;
            if scatter.bytes() != length {
                return Err(bad("the runs of a part have as many bytes as the part")
                    .with("runs_bytes", scatter.bytes())
                    .with("part_bytes", length)
                    .into());
            }
            from.push(scatter);
        }
        let word = word(&verbs.store, hello.instance, wish.word)?;
        Ok(Self { verbs, call, wish: reserve, from, sums: wish.sums, word })
    }

    /// Of the call.
    pub fn request(&self) -> &RequestId {
        &self.call.context.request_id
    }

    /// Serves it.
    pub async fn run(self, stop: &CancellationToken) -> Answer<v1::PutFromReply> {
        let Self { verbs, call, wish, from, mut sums, word } = self;
        let reserve = verbs.reserve(&call, wish).await?;
        failpoint::at("put_from.reserved");
        let mut parts = Vec::new();
        let mut upgrades = Vec::new();
        let mut from = from.into_iter();
        for (index, answer) in reserve.answers.iter().enumerate() {
            let scatter = from.next();
            match (&answer.answer, scatter) {
                (Some(PartAnswer::Slot(slot)), Some(scatter)) => {
                    parts.push((ReservationId(slot.reservation_id), index, scatter));
                }
                (Some(PartAnswer::Upgrade(slot)), _) => upgrades.push((slot.reservation_id, index)),
                _ => {}
            }
        }
        let copying =
            Arc::new(Copying { verbs: verbs.clone(), call: call.clone(), parts, word, next: AtomicUsize::new(0) });
        let mut failed = Copying::all(&copying, stop).await;
        failpoint::at("put_from.copied");
        // In the order of the answers, so that results and slots can be read side by side.
        let mut commits: Vec<(usize, u64)> = copying.parts.iter().map(|(id, index, _)| (*index, id.0)).collect();
        commits.extend(upgrades.into_iter().map(|(id, index)| (index, id)));
        commits.sort_unstable();
        let commit = |(index, id): &(usize, u64)| {
            let sums = sums.get_mut(*index).map(|s| std::mem::take(&mut s.crc32)).unwrap_or_default();
            v1::CommitPart { reservation_id: *id, crc32: sums }
        };
        let good: Vec<_> = commits.iter().filter(|(index, _)| !failed.contains_key(index)).map(commit).collect();
        let mut committed = match good.is_empty() {
            true => Vec::new(),
            false => verbs.commit(&call, good).await?.results,
        }
        .into_iter();
        let results = commits
            .into_iter()
            .map(|(index, id)| match failed.remove(&index) {
                Some(error) => verbs.spell_committed(ReservationId(id), Err(error)),
                None => committed.next().unwrap_or_else(|| {
                    let error = Error::new(ErrorKind::Conflict, "a part was committed and not answered for");
                    verbs.spell_committed(ReservationId(id), Err(error))
                }),
            })
            .collect();
        failpoint::at("put_from.committed");
        Ok(v1::PutFromReply { reserve: Some(reserve), commit: Some(v1::CommitReply { results }) })
    }
}

type Failed = std::collections::HashMap<usize, Error>;

impl Copying {
    /// Copies every part into its slot; what failed, by its place. The reservations of those are given up.
    async fn all(this: &Arc<Self>, stop: &CancellationToken) -> Failed {
        let tasks = cores().min(this.parts.len());
        if tasks <= 1 {
            return Arc::clone(this).work(stop.clone()).await;
        }
        let mut working = tokio::task::JoinSet::new();
        for _ in 0..tasks {
            working.spawn(Arc::clone(this).work(stop.clone()));
        }
        let mut failed = Failed::new();
        while let Some(some) = working.join_next().await {
            // A task that was cut short has left its reservation as it was: its commit says that bytes are missing.
            failed.extend(some.unwrap_or_default());
        }
        failed
    }

    async fn work(self: Arc<Self>, stop: CancellationToken) -> Failed {
        let mut failed = Failed::new();
        loop {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((id, index, scatter)) = self.parts.get(next) else { return failed };
            let copied = if stop.is_cancelled() {
                Err(Error::new(ErrorKind::Expired, "the call was cancelled"))
            } else if scatter.is_mapped() {
                self.copy(next)
            } else {
                let this = Arc::clone(&self);
                tokio::task::spawn_blocking(move || this.copy(next))
                    .await
                    .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "the copy was cut short")))
            };
            if let Err(error) = copied {
                self.verbs.store.abandon(self.call.caller, std::iter::once(*id));
                failed.insert(*index, error);
            }
            if scatter.bytes() >= 1 << 20 {
                tokio::task::yield_now().await;
            }
        }
    }

    fn copy(&self, part: usize) -> Result<(), Error> {
        let (id, _, scatter) = &self.parts[part];
        let word = self.word.as_ref();
        let copied = self.verbs.store.fill(self.call.caller, *id, |slot, sums| scatter.read(slot, sums, word))?;
        // A word that is revoked by now was not when the bytes were taken: they are what was put.
        match copied {
            Copied::Yes => Ok(()),
            Copied::Revoked => {
                self.verbs.store.counters.revoked_copies.one();
                Err(Error::new(ErrorKind::Expired, "the client took its memory back"))
            }
        }
    }
}
