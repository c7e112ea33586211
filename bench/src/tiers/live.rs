//! A trace through a running node, one request after the other: match with a lease, get what was found, compare every
//! byte, put the rest, release; then wait until the node has done what it does behind the calls.
//!
//! The wait stands for the time between two requests, which a fast replay leaves out: blocks that were put reach NVMe,
//! leases end, and DRAM goes back below its watermark.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_client::{Call, Client, Error, GetItem, MatchQuery, Namespace, PartOutcome, Put, PutPart, PutPosition};
use kvkeep_client::{ErrorKind, Retention};
use kvkeep_core::{Class, ErrorKind as CoreKind, GroupId, Key, RequestId, ShardId, Tier};
use serde::Serialize;

use super::Found;
use super::sizes::Sizes;
use crate::block_bytes::{self, Seed};
use crate::keys::PrefixId;
use crate::measure::{Latencies, LatencySummary, share};
use crate::policy::replay::{Prepared, Turn, format};

/// Positions of one get and of one put: a put's bytes must fit what a small arena lets be reserved.
const BATCH: usize = 512;
/// Lease of a request: its release ends it.
const LEASE: Duration = Duration::from_secs(60);
/// Between two looks at the node, growing.
const LOOK: Duration = Duration::from_micros(200);
const LOOK_MAX: Duration = Duration::from_millis(5);
/// A node that has not settled by then is not waited for any longer; that is counted.
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// A node that is full for so long has failed.
const FULL_MAX: Duration = Duration::from_secs(60);
/// Between two lines of progress.
const TELL: Duration = Duration::from_secs(10);

/// What a live replay came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Live {
    /// Tokens found.
    pub found: Found,
    /// Bytes that came back and were compared.
    pub bytes_verified: u64,
    /// Of these, different from what was put.
    pub bytes_wrong: u64,
    /// Parts that matched and did not come, by reason.
    pub parts_lost: BTreeMap<String, u64>,
    /// Parts put that were there already.
    pub parts_present: u64,
    /// Puts that waited because the node was full for the moment.
    pub puts_waited: u64,
    /// Requests after which the node did not settle in time.
    pub unsettled: u64,
    /// Blocks in DRAM and on NVMe when a request came.
    pub resident: Resident,
    /// Parts that the node dropped from both tiers, or did not write to NVMe, by its own count.
    pub node: NodeCounts,
    /// One match with its lease, microseconds.
    pub match_us: LatencySummary,
    /// One get of up to 512 parts, microseconds.
    pub get_us: LatencySummary,
    /// One put of up to 512 parts, microseconds.
    pub put_us: LatencySummary,
    /// Seconds it took.
    pub seconds: f64,
}

/// What was resident when requests came, once the tiers had filled up.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Resident {
    /// Blocks in DRAM, mean.
    pub dram_mean: f64,
    /// Blocks in DRAM, most.
    pub dram_max: u64,
    /// Blocks on NVMe, mean.
    pub nvme_mean: f64,
    /// Blocks on NVMe, most.
    pub nvme_max: u64,
}

/// Some of the node's own counters.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct NodeCounts {
    /// Copies brought up from NVMe.
    pub promoted: u64,
    /// Copies dropped from DRAM that NVMe has.
    pub demoted: u64,
    /// Blocks that left their last tier.
    pub evicted: u64,
    /// Blocks that were put and not written to NVMe.
    pub not_written: u64,
}

/// What [`Client::stats`] says of the tiers.
struct Look {
    dram_blocks: u64,
    dram_free_bytes: u64,
    nvme_blocks: u64,
    dirty_bytes: u64,
    leased: u32,
    counts: NodeCounts,
}

struct Driver<'a> {
    trace: &'a Prepared,
    client: &'a Client,
    namespace: Namespace,
    block_bytes: usize,
    free_bytes: u64,
    live: Live,
    match_latency: Latencies,
    get_latency: Latencies,
    put_latency: Latencies,
}

/// Replays through the node behind `client`.
///
/// # Errors
/// The node refuses a call for good, or stays full.
pub async fn replay(
    trace: &Prepared,
    client: &Client,
    sizes: &Sizes,
    block_bytes: u64,
    name: &str,
) -> anyhow::Result<Live> {
    let mut format = format(trace.tokens_per_block);
    format.groups[0].size = kvkeep_core::SizeRule::Exact(block_bytes);
    let namespace = client.register_namespace("tiers", &format, "generated").await.context("the namespace")?;
    let mut driver = Driver {
        trace,
        client,
        namespace,
        block_bytes: usize::try_from(block_bytes)?,
        free_bytes: sizes.free_bytes(),
        live: Live::default(),
        match_latency: Latencies::default(),
        get_latency: Latencies::default(),
        put_latency: Latencies::default(),
    };
    let began = Instant::now();
    let mut told = began;
    let (mut input, mut seen) = (0, Vec::with_capacity(trace.turns.len()));
    for (number, turn) in trace.turns.iter().enumerate() {
        driver.serve(number, turn).await.with_context(|| format!("request {number}"))?;
        let look = driver.settle().await?;
        seen.push((look.dram_blocks, look.nvme_blocks));
        driver.live.node = look.counts;
        input += u64::from(turn.info.input_tokens);
        if told.elapsed() >= TELL {
            told = Instant::now();
            let percent = |tokens| share(tokens, input) * 100.0;
            eprintln!(
                "tiers: {name}: {}/{} requests, {:.0} s: dram {:.1} %, nvme {:.1} %; {} and {} blocks there",
                number + 1,
                trace.turns.len(),
                began.elapsed().as_secs_f64(),
                percent(driver.live.found.dram_tokens),
                percent(driver.live.found.nvme_tokens),
                look.dram_blocks,
                look.nvme_blocks
            );
        }
    }
    Ok(Live {
        resident: Resident::of(&seen),
        match_us: driver.match_latency.summary(),
        get_us: driver.get_latency.summary(),
        put_us: driver.put_latency.summary(),
        seconds: began.elapsed().as_secs_f64(),
        ..driver.live
    })
}

impl Resident {
    /// Of blocks in both tiers after each request; the means are those of the second half, when the tiers are full.
    fn of(seen: &[(u64, u64)]) -> Self {
        let full = &seen[seen.len() / 2..];
        let mean = |sum: u64| if full.is_empty() { 0.0 } else { sum as f64 / full.len() as f64 };
        Self {
            dram_mean: mean(full.iter().map(|s| s.0).sum()),
            dram_max: seen.iter().map(|s| s.0).max().unwrap_or(0),
            nvme_mean: mean(full.iter().map(|s| s.1).sum()),
            nvme_max: seen.iter().map(|s| s.1).max().unwrap_or(0),
        }
    }
}

/// Whether the node is full for the moment.
fn is_full(error: &Error) -> bool {
    error.is_retryable() || matches!(error.kind(), ErrorKind::Refused(CoreKind::Full | CoreKind::Throttled))
}

impl Driver<'_> {
    async fn serve(&mut self, number: usize, turn: &Turn) -> anyhow::Result<()> {
        let id = RequestId::new(&(number as u64).to_be_bytes()).context("a request id")?;
        let clock = kvkeep_core::Instant(turn.at_ms);
        let call = Call { info: turn.info, policy_clock: Some(clock), ..Call::of(id) };
        let names: Vec<Key> = turn.blocks.iter().map(|block| PrefixId(u64::from(*block)).key()).collect();
        let keys: Vec<Bytes> = names.iter().map(|key| Bytes::copy_from_slice(key.as_bytes())).collect();
        let bound = self.client.hello().limits.batch_keys_max;
        ensure!(keys.len() <= bound, "a request of {} blocks; one match takes {bound}", keys.len());
        let began = Instant::now();
        let query = MatchQuery::of(keys.clone()).leased(LEASE);
        let found = self.namespace.match_chain(&query, &call).await.context("match")?;
        self.match_latency.note(began.elapsed());
        let boundary = found.boundary_positions as usize;
        let mut read = 0;
        while read < boundary {
            let to = boundary.min(read + BATCH);
            let got = self.get(turn, &names, &keys, read..to, found.lease_id(), &call).await?;
            read += got;
            if read < to {
                break;
            }
        }
        let mut done = read;
        while done < keys.len() {
            let to = keys.len().min(done + BATCH);
            self.put(&names, &keys, done..to, &call).await?;
            done = to;
        }
        self.namespace.release(&[], std::slice::from_ref(&call.request_id), &call).await.context("release")?;
        Ok(())
    }

    /// Gets some positions; how many of them, from the first on, came and were right.
    async fn get(
        &mut self,
        turn: &Turn,
        names: &[Key],
        keys: &[Bytes],
        range: std::ops::Range<usize>,
        lease: Option<kvkeep_core::LeaseId>,
        call: &Call,
    ) -> anyhow::Result<usize> {
        let items: Vec<_> = keys[range.clone()].iter().map(|key| GetItem::of(key.clone())).collect();
        let began = Instant::now();
        let parts = self.namespace.get(&items, lease, call).await.context("get")?;
        self.get_latency.note(began.elapsed());
        let (mut came, mut whole) = (0, true);
        for (i, part) in range.zip(parts) {
            if !part.is_hit() {
                let reason = part.reason.map_or(part.status.word(), |reason| reason.word());
                *self.live.parts_lost.entry(reason.to_owned()).or_default() += 1;
                whole = false;
                continue;
            }
            let wrong = if part.data.len() == self.block_bytes {
                block_bytes::wrong_bytes(Seed::of(&names[i], GroupId(0), ShardId(0)), &part.data)
            } else {
                self.block_bytes as u64
            };
            self.live.bytes_verified += part.data.len() as u64;
            self.live.bytes_wrong += wrong;
            if whole && wrong == 0 {
                came += 1;
                let tokens = self.trace.tokens(turn, i + 1) - self.trace.tokens(turn, i);
                self.live.found.add(tokens, part.tier.context("a part without a tier")?);
            }
        }
        Ok(came)
    }

    /// Puts some positions, waiting where the node is full for the moment.
    async fn put(
        &mut self,
        names: &[Key],
        keys: &[Bytes],
        range: std::ops::Range<usize>,
        call: &Call,
    ) -> anyhow::Result<()> {
        let position = |i: usize| {
            let data = block_bytes::block(Seed::of(&names[i], GroupId(0), ShardId(0)), self.block_bytes);
            let part = PutPart { group: GroupId(0), shard: ShardId(0), data };
            PutPosition { key: keys[i].clone(), parts: vec![part], token_ids: Vec::new() }
        };
        let positions: Vec<_> = range.clone().map(position).collect();
        let since = Instant::now();
        let mut done = 0;
        while done < positions.len() {
            let first = range.start + done;
            let put = Put {
                parent: first.checked_sub(1).map(|before| keys[before].clone()),
                first_position: first as u32,
                positions: positions[done..].to_vec(),
                class: Some(Class::Cache),
                // Blocks are dropped by the policy, not for a queue that is full because the replay is fast.
                retention: Retention::Keep,
                ..Put::default()
            };
            let began = Instant::now();
            let outcomes = self.namespace.put(&put, call).await.context("put")?;
            self.put_latency.note(began.elapsed());
            let before = done;
            for outcome in outcomes {
                match outcome {
                    PartOutcome::Stored { .. } => {}
                    PartOutcome::AlreadyPresent { .. } => self.live.parts_present += 1,
                    // A call of ours that was given up and sent again has not ended yet.
                    PartOutcome::InProgressElsewhere { retry_after } if since.elapsed() < FULL_MAX => {
                        self.live.puts_waited += 1;
                        tokio::time::sleep(retry_after).await;
                        break;
                    }
                    PartOutcome::InProgressElsewhere { .. } => bail!("a part is being written for {FULL_MAX:?}"),
                    PartOutcome::Refused(error) if is_full(&error) && since.elapsed() < FULL_MAX => {
                        self.live.puts_waited += 1;
                        tokio::time::sleep(error.retry_after().unwrap_or(LOOK_MAX)).await;
                        break;
                    }
                    PartOutcome::Refused(error) => return Err(error).context("put"),
                }
                done += 1;
            }
            ensure!(done > before || since.elapsed() < FULL_MAX, "a put was never answered");
        }
        Ok(())
    }

    /// Waits until the node has written what was put, let go of the leases and evicted down to its watermark.
    async fn settle(&mut self) -> anyhow::Result<Look> {
        let began = Instant::now();
        let mut pause = LOOK;
        loop {
            let look = self.look().await?;
            if look.dirty_bytes == 0 && look.leased == 0 && look.dram_free_bytes >= self.free_bytes {
                return Ok(look);
            }
            if began.elapsed() >= SETTLE_MAX {
                self.live.unsettled += 1;
                return Ok(look);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_MAX);
        }
    }

    async fn look(&self) -> anyhow::Result<Look> {
        let stats = self.client.stats(&Call::default()).await.context("stats")?;
        let tier = |wanted| {
            let tier = stats.tiers.iter().find(|t| convert::tier_opt_from_proto(t.tier) == Some(wanted));
            tier.with_context(|| format!("the node has no tier {wanted}"))
        };
        let (dram, nvme) = (tier(Tier::Dram)?, tier(Tier::Nvme)?);
        let counter = |name: &str| stats.counters.get(name).copied().unwrap_or(0);
        Ok(Look {
            dram_blocks: dram.positions,
            dram_free_bytes: dram.free_bytes,
            nvme_blocks: nvme.positions,
            dirty_bytes: counter("kvkeep_dirty_bytes"),
            leased: stats.leased_positions,
            counts: NodeCounts {
                promoted: counter("kvkeep_promoted_parts_total"),
                demoted: counter("kvkeep_demoted_parts_total"),
                evicted: counter("kvkeep_evicted_parts_total"),
                not_written: counter("kvkeep_nvme_skipped_parts_total"),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_those_of_the_second_half() {
        let resident = Resident::of(&[(1, 1), (9, 9), (4, 6), (6, 8)]);
        assert_eq!((resident.dram_mean, resident.nvme_mean), (5.0, 7.0));
        assert_eq!((resident.dram_max, resident.nvme_max), (9, 9));
        assert_eq!(Resident::of(&[]).dram_mean, 0.0);
    }
}
