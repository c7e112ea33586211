//! The largest token boundary of a chain that is usable under the rules of all groups.
//!
//! ```text
//! let mut m = Matcher::new(&format, keys, fidelity, want_statuses, lease);
//! for slice in digests.chunks(SLICE) { m.feed(&mut lock(directory), slice, now)?; }   // the lock is free in between
//! while m.settle(&mut lock(directory), &info, now) {}                                 // with a lease only
//! let outcome = m.finish(|digest| history.why_absent(digest));
//! ```
//! One pass, no memory per position but the statuses asked for: each group keeps how many of its last blocks are here
//! without a gap and what they weigh; whenever all rules hold, that is the new best boundary.
//!
//! With a lease each slice's hits are leased while the lock is held, so that what was seen stays; what the boundary does
//! not need is given back when settling. Without one a match is no access and promises nothing.

use std::collections::VecDeque;

use crate::error::Result;
use crate::format::Format;
use crate::ids::{Digest, Instant, LeaseId};
use crate::lease::LeaseAsk;
use crate::words::{Fidelity, MissReason, PartStatus, RequestInfo, Tier};

use super::Directory;
use super::entry::{Entry, EntryId, Part};
use super::home::{Need, Shape};

/// Positions worked on per lock hold.
pub const SLICE: usize = 256;
/// Look-ups that wait for memory together.
const BURST: usize = 32;

/// Bytes in DRAM, and bytes only on NVMe.
#[derive(Clone, Copy, Debug, Default)]
struct Weight {
    dram: u64,
    nvme: u64,
}

impl Weight {
    fn plus(self, other: Weight) -> Weight {
        Weight { dram: self.dram + other.dram, nvme: self.nvme + other.nvme }
    }

    fn minus(self, other: Weight) -> Weight {
        Weight { dram: self.dram - other.dram, nvme: self.nvme - other.nvme }
    }
}

/// What is known of one group up to here.
#[derive(Clone, Debug, Default)]
struct Run {
    /// Blocks up to the last one that are here without a gap.
    blocks: u32,
    /// Of all blocks so far that are here.
    sum: Weight,
    /// Window: `sum` after each of the last blocks, as many as the window has.
    recent: VecDeque<Weight>,
    /// `sum` before the blocks that the rule needs at the last block's end.
    before: Weight,
}

/// Why the boundary is not larger.
#[derive(Clone, Copy, Debug)]
enum Obstacle {
    /// Nothing is tracked.
    Absent(Digest),
    /// It was here, and went for this.
    Gone(MissReason),
    /// Parts of it are here.
    Incomplete,
}

/// Answer of a match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatchOutcome {
    /// Positions covered by the largest usable boundary.
    pub boundary_positions: u32,
    /// A [`PartStatus`] code per key, if asked for: a hit below the boundary, where all that it needs is here, and
    /// wherever every part of the position is here; else a miss.
    pub statuses: Vec<u8>,
    /// The code of the slowest [`Tier`] a part of the position must be read from, per key, if asked for; 0: nothing of it
    /// is here.
    pub tiers: Vec<u8>,
    /// Bytes that the boundary needs and DRAM has.
    pub dram_bytes: u64,
    /// Bytes that the boundary needs and only NVMe has.
    pub nvme_bytes: u64,
    /// Why the boundary is not larger; `None`: nothing is missing.
    pub reason: Option<MissReason>,
    /// The lease over what the boundary needs (and what it held before); `None`: not asked for, or nothing to hold.
    pub lease: Option<LeaseId>,
    /// Positions that this match added to the lease.
    pub leased_positions: u32,
}

/// A lease being taken.
struct Taking {
    ask: LeaseAsk,
    /// The lease and whether this match made it, from the first hit on.
    lease: Option<(LeaseId, bool)>,
    /// What this match added and has not settled yet: index in the chain and entry.
    fresh: Vec<(u32, EntryId)>,
    kept: u32,
}

/// One match of one chain. See the module.
pub struct Matcher {
    shape: Shape,
    accept: Fidelity,
    fed: u32,
    runs: Vec<Run>,
    /// A group that needs every block lacks one: the boundary is final.
    broken: bool,
    boundary: u32,
    needed: Weight,
    obstacle: Option<Obstacle>,
    detail: Option<(Vec<u8>, Vec<u8>)>,
    taking: Option<Taking>,
}

impl Matcher {
    /// For a chain of `keys` positions from its start. Near bytes count only where `accept` is near.
    pub fn new(format: &Format, keys: usize, accept: Fidelity, want_statuses: bool, lease: Option<LeaseAsk>) -> Self {
        let shape = Shape::of(format);
        Self {
            runs: vec![Run::default(); shape.groups.len()],
            shape,
            accept,
            fed: 0,
            broken: false,
            boundary: 0,
            needed: Weight::default(),
            obstacle: None,
            detail: want_statuses.then(|| (Vec::with_capacity(keys), Vec::with_capacity(keys))),
            taking: lease.map(|ask| Taking { ask, lease: None, fresh: Vec::new(), kept: 0 }),
        }
    }

    /// Whether the rest of the chain can still change the answer.
    pub fn wants_more(&self) -> bool {
        !self.broken || self.detail.is_some()
    }

    /// The next digests of the chain, at most [`SLICE`] under one lock.
    ///
    /// # Errors
    /// With a lease: `Throttled` or `TooLarge` naming the bound, `Expired` where the lease ended meanwhile. What this match
    /// had added is given back then.
    pub fn feed(&mut self, dir: &mut Directory, digests: &[Digest], now: Instant) -> Result<()> {
        for digests in digests.chunks(BURST) {
            // First all look-ups: they wait for memory, and independent ones wait together.
            let mut found = [None; BURST];
            for (found, digest) in found.iter_mut().zip(digests) {
                *found = dir.slab.find(digest);
            }
            let mut hits = [(0, EntryId::NONE); BURST];
            let mut hit_count = 0;
            for (digest, id) in digests.iter().zip(found) {
                self.step(digest, id.map(|id| &dir.slab[id]));
                if let Some(id) = id
                    && self.taking.is_some()
                    && !self.broken
                    && !dir.slab[id].parts.is_empty()
                {
                    hits[hit_count] = (self.fed, id);
                    hit_count += 1;
                }
                self.fed += 1;
            }
            if let Some(taking) = &mut self.taking
                && let Err(e) = taking.take(dir, &hits[..hit_count], now)
            {
                taking.abandon(dir);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Takes the position at `self.fed` into account.
    fn step(&mut self, digest: &Digest, entry: Option<&Entry>) {
        let parts = entry.map_or(&[] as &[Part], |e| e.parts.as_slice());
        let mut complete = !parts.is_empty();
        let mut valid = (u64::from(self.fed) + 1).is_multiple_of(self.shape.unit);
        let mut needed = Weight::default();
        // Parts are in the order of groups: one walk over both.
        let mut rest = parts;
        for (i, (group, run)) in self.shape.groups.iter().zip(&mut self.runs).enumerate() {
            let mine = rest.iter().take_while(|p| usize::from(p.group().0) == i).count();
            let (block, others) = rest.split_at(mine);
            rest = others;
            if !group.ends_at(self.fed) {
                continue;
            }
            let usable = |p: &&Part| p.fidelity() == Fidelity::Exact || self.accept == Fidelity::Near;
            let here = block.iter().filter(usable).count() == group.shards as usize;
            if here {
                run.blocks += 1;
                run.sum = block.iter().fold(run.sum, |sum, p| {
                    let len = u64::from(p.len);
                    let weight = match p.slot {
                        Some(_) => Weight { dram: len, nvme: 0 },
                        None => Weight { dram: 0, nvme: len },
                    };
                    sum.plus(weight)
                });
            } else {
                run.blocks = 0;
                complete = false;
            }
            let block_number = (self.fed + 1) / group.span;
            valid &= match group.need {
                Need::All => {
                    self.broken |= !here;
                    run.blocks == block_number
                }
                Need::Last(window) => {
                    run.recent.push_back(run.sum);
                    if run.recent.len() > window as usize {
                        run.before = run.recent.pop_front().unwrap_or_default();
                    }
                    run.blocks >= window.min(block_number)
                }
                Need::State => {
                    let block = run.recent.pop_front().unwrap_or_default();
                    run.before = block;
                    run.recent.push_back(run.sum);
                    here
                }
            };
            needed = needed.plus(run.sum.minus(run.before));
        }
        if valid && !self.broken {
            self.boundary = self.fed + 1;
            self.needed = needed;
            self.obstacle = None;
        } else if !complete && self.obstacle.is_none() && self.shape.parts_at(self.fed) > 0 {
            self.obstacle = Some(match entry {
                None => Obstacle::Absent(*digest),
                Some(e) if e.parts.is_empty() => e.gone_for().map_or(Obstacle::Absent(*digest), Obstacle::Gone),
                Some(_) => Obstacle::Incomplete,
            });
        }
        if let Some((statuses, tiers)) = &mut self.detail {
            statuses.push(if complete { PartStatus::Hit } else { PartStatus::Miss }.code());
            let slowest = parts.iter().map(|p| if p.slot.is_some() { Tier::Dram } else { Tier::Nvme }).max();
            tiers.push(slowest.map_or(0, Tier::code));
        }
    }

    /// After the last slice, with a lease: keeps what the boundary needs (an access each, the deepest first) and gives
    /// the rest back, at most [`SLICE`] positions per call. `now` is on the policy's clock; that of [`Matcher::feed`] on
    /// the clock of leases. `true`: call again.
    pub fn settle(&mut self, dir: &mut Directory, info: &RequestInfo, now: Instant) -> bool {
        let Some(taking) = &mut self.taking else { return false };
        let Some((lease, new)) = taking.lease else { return false };
        if dir.leases.get(lease).is_none() {
            // Released or expired meanwhile, and every position with it: their entries may be others' now.
            taking.fresh.clear();
        }
        for _ in 0..SLICE {
            let Some((index, id)) = taking.fresh.pop() else { break };
            if needs(&self.shape, self.boundary, index) {
                dir.access_entry(id, info, now);
                taking.kept += 1;
            } else {
                dir.unhold(lease, [id]);
            }
        }
        if taking.fresh.is_empty() {
            if dir.leases.get(lease).is_none() || dir.end_if_empty(lease, new) {
                taking.lease = None;
            }
            return false;
        }
        true
    }

    /// The answer. `why` knows why a position is absent that the directory has forgotten.
    pub fn finish(self, why: impl Fn(&Digest) -> Option<MissReason>) -> MatchOutcome {
        let (mut statuses, tiers) = self.detail.unwrap_or_default();
        let below = statuses.len().min(self.boundary as usize);
        statuses[..below].fill(PartStatus::Hit.code());
        let reason = self.obstacle.filter(|_| self.boundary < self.fed).map(|obstacle| match obstacle {
            Obstacle::Absent(digest) => why(&digest).unwrap_or(MissReason::NeverStored),
            Obstacle::Gone(reason) => reason,
            Obstacle::Incomplete => MissReason::Incomplete,
        });
        MatchOutcome {
            boundary_positions: self.boundary,
            statuses,
            tiers,
            dram_bytes: self.needed.dram,
            nvme_bytes: self.needed.nvme,
            reason,
            lease: self.taking.as_ref().and_then(|t| t.lease).map(|(id, _)| id),
            leased_positions: self.taking.as_ref().map_or(0, |t| t.kept),
        }
    }
}

impl Taking {
    fn take(&mut self, dir: &mut Directory, hits: &[(u32, EntryId)], now: Instant) -> Result<()> {
        if hits.is_empty() {
            return Ok(());
        }
        let lease = match self.lease {
            Some((lease, _)) => lease,
            None => self.lease.insert(dir.open_lease(&self.ask, now)?).0,
        };
        let mut fresh = Vec::with_capacity(hits.len());
        let done = dir.hold(lease, hits.iter().map(|(_, id)| *id), &mut fresh);
        // What is fresh is so in the order of the hits.
        let mut fresh = fresh.into_iter().peekable();
        self.fresh.extend(hits.iter().filter(|(_, id)| fresh.next_if_eq(id).is_some()));
        done
    }

    fn abandon(&mut self, dir: &mut Directory) {
        let Some((lease, new)) = self.lease.take() else { return };
        dir.unhold(lease, self.fresh.drain(..).map(|(_, id)| id));
        dir.end_if_empty(lease, new);
    }
}

/// Whether a boundary after `boundary` positions needs a part of the position at `index`.
fn needs(shape: &Shape, boundary: u32, index: u32) -> bool {
    index < boundary
        && shape.groups.iter().filter(|g| g.ends_at(index)).any(|g| {
            let blocks_after = (boundary - index - 1) / g.span;
            match g.need {
                Need::All => true,
                Need::Last(window) => blocks_after < window,
                Need::State => blocks_after == 0,
            }
        })
}
