//! A lane: one client of its own, on a thread and a runtime of its own, as an engine's worker would be.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use kvkeep_client::{Call, Client, ClientConfig, GetItem, MatchQuery, Namespace, Place, Put, PutPosition, Region};
use kvkeep_core::{LeaseId, RequestId};

use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::peers::memory::Pages;
use crate::peers::path::{BLOCK_BYTES, BLOCKS};
use crate::peers::references::Memory;

/// Ids of what is put, far from those of the working set, and never used twice in a run.
static FRESH: AtomicU64 = AtomicU64::new(1 << 32);
/// Lease of a mapped get.
const LEASE: Duration = Duration::from_secs(30);

/// What one call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Nothing.
    Ping,
    /// Bytes into buffers.
    Get,
    /// Bytes out of buffers.
    Put,
    /// Into a registered region.
    RegionGet,
    /// Out of a registered region.
    RegionPut,
    /// In place.
    MappedGet,
    /// A look-up of so many keys as the batch has, none of which was ever stored: what a store costs that helps nothing.
    MissedMatch,
}

impl What {
    /// Whether it moves, or hands out, blocks.
    pub fn has_blocks(self) -> bool {
        !matches!(self, Self::Ping | Self::MissedMatch)
    }

    /// Whether it needs the working set.
    pub fn reads(self) -> bool {
        matches!(self, Self::Get | Self::RegionGet | Self::MappedGet)
    }
}

/// One client.
pub struct Lane {
    /// Taken by `drop`.
    runtime: Option<tokio::runtime::Runtime>,
    client: Client,
    namespace: Namespace,
    memory: Arc<Memory>,
    batch: usize,
    /// Its share of the working set, and how far it has come.
    first: usize,
    blocks: usize,
    at: usize,
    /// Where bytes land, of both kinds; as large as its share, so that every destination is cold.
    buffer: Option<Pages>,
    region: Option<Region>,
    /// Of the last mapped read.
    lease: Option<LeaseId>,
    requests: u64,
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Dropped on a thread of another runtime, which refuses to wait for this one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The key of a block.
pub fn key(id: u64) -> Bytes {
    Bytes::copy_from_slice(PrefixId(id).key().as_bytes())
}

impl Lane {
    /// Number `lane` of `lanes`; connects.
    pub fn new(
        config: ClientConfig,
        what: What,
        batch: usize,
        lane: usize,
        lanes: usize,
        memory: &Arc<Memory>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
        let blocks = BLOCKS / lanes;
        // On a thread of its own: this one may belong to a runtime, which refuses to wait for another.
        let connect = || {
            runtime.block_on(async {
                let config = ClientConfig { instance: kvkeep_core::InstanceId(rand::random()), ..config };
                let client = Client::connect(config).await?;
                let format = any_size_format(BLOCK_BYTES as u64);
                let namespace = client.register_namespace("peers", &format, "generated").await?;
                anyhow::Ok((client, namespace))
            })
        };
        let connected = std::thread::scope(|scope| scope.spawn(connect).join());
        let (client, namespace) = connected.map_err(|_| anyhow::anyhow!("connecting panicked"))??;
        let regions = matches!(what, What::RegionGet | What::RegionPut);
        let region = regions.then(|| Region::new(blocks * BLOCK_BYTES)).transpose()?;
        if let (Some(region), What::RegionPut) = (&region, what) {
            (0..blocks).for_each(|n| region.write(n * BLOCK_BYTES, &memory.block(lane * blocks + n)));
        }
        Ok(Self {
            runtime: Some(runtime),
            client,
            namespace,
            memory: Arc::clone(memory),
            batch,
            first: lane * blocks,
            blocks,
            at: 0,
            buffer: (what == What::Get).then(|| Pages::new(blocks * BLOCK_BYTES)),
            region,
            lease: None,
            requests: 0,
        })
    }

    /// Makes calls until the time is over, at least one; how long each took.
    pub fn run(&mut self, what: What, ends: Instant) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        while latencies.is_empty() || Instant::now() < ends {
            latencies.push(self.once(what)?);
            self.at = (self.at + self.batch) % self.blocks;
        }
        Ok(latencies)
    }

    fn once(&mut self, what: What) -> anyhow::Result<Duration> {
        let Self { runtime, client, namespace, memory, batch, first, at, buffer, region, lease, requests, .. } = self;
        let (batch, at) = (*batch, *at);
        let runtime = runtime.as_ref().context("a lane has a runtime")?;
        *requests += 1;
        let call = Call::of(RequestId::new(&requests.to_be_bytes()).expect("8 bytes are not over 64"));
        let items =
            || -> Vec<GetItem> { (*first + at..*first + at + batch).map(|n| GetItem::of(key(n as u64))).collect() };
        let places = |region: &Region| -> Vec<Place> {
            // SAFETY: a lane has one call in flight, and its region is nobody else's.
            (at..at + batch).map(|n| unsafe { region.place(n * BLOCK_BYTES, BLOCK_BYTES) }).collect()
        };
        let fresh = FRESH.fetch_add(batch as u64, Ordering::Relaxed);
        match what {
            What::Ping => {
                let began = Instant::now();
                runtime.block_on(client.ping())?;
                Ok(began.elapsed())
            }
            What::Get => {
                let (items, range) = (items(), at * BLOCK_BYTES..(at + batch) * BLOCK_BYTES);
                let buffer = buffer.as_mut().context("a get has a buffer")?;
                let mut buffers: Vec<_> = buffer[range].chunks_exact_mut(BLOCK_BYTES).collect();
                let began = Instant::now();
                let got = runtime.block_on(namespace.get_into(&items, &mut buffers, None, &call))?;
                let took = began.elapsed();
                ensure!(got.iter().all(|g| g.is_hit() && g.len == BLOCK_BYTES), "a get came back short");
                Ok(took)
            }
            What::RegionGet => {
                let region = region.as_ref().context("a get has a region")?;
                let (items, places) = (items(), places(region));
                let began = Instant::now();
                let got = runtime.block_on(namespace.get_into_region(&items, &places, None, &call))?;
                let took = began.elapsed();
                ensure!(got.iter().all(|g| g.is_hit() && g.len == BLOCK_BYTES), "a get came back short");
                Ok(took)
            }
            What::Put => {
                let position =
                    |n: usize| PutPosition::of(key(fresh + n as u64), memory.block(*first + (at + n) % BLOCKS));
                let put = Put { positions: (0..batch).map(position).collect(), unordered: true, ..Put::default() };
                let began = Instant::now();
                let outcomes = runtime.block_on(namespace.put(&put, &call))?;
                let took = began.elapsed();
                ensure!(outcomes.iter().all(|o| o.is_kept()), "a put was refused: {outcomes:?}");
                Ok(took)
            }
            What::RegionPut => {
                let region = region.as_ref().context("a put has a region")?;
                let positions = places(region).into_iter().zip(fresh..);
                let positions = positions.map(|(place, n)| PutPosition::of(key(n), place)).collect();
                let put = Put { positions, unordered: true, ..Put::default() };
                let began = Instant::now();
                let outcomes = runtime.block_on(namespace.put_from(&put, &call))?;
                let took = began.elapsed();
                ensure!(outcomes.iter().all(|o| o.is_kept()), "a put was refused: {outcomes:?}");
                Ok(took)
            }
            What::MissedMatch => {
                let keys: Vec<_> = (0..batch as u64).map(|n| key(fresh + n)).collect();
                let query = MatchQuery::of(keys).leased(LEASE);
                let began = Instant::now();
                let found = runtime.block_on(namespace.match_chain(&query, &call))?;
                let took = began.elapsed();
                ensure!(found.boundary_positions == 0, "{} keys matched", found.boundary_positions);
                Ok(took)
            }
            What::MappedGet => {
                let keys: Vec<_> = (*first + at..*first + at + batch).map(|n| key(n as u64)).collect();
                // The lease of the call before ends with this one.
                let query = MatchQuery { release: lease.take(), ..MatchQuery::of(keys).leased(LEASE) };
                let began = Instant::now();
                let parts = runtime.block_on(async {
                    let mapped = namespace.match_mapped(&query, &call).await?;
                    *lease = mapped.found.lease_id();
                    anyhow::Ok(mapped.parts.iter().filter(|p| p.block.is_some()).count())
                })?;
                let took = began.elapsed();
                ensure!(parts == batch, "{parts} of {batch} blocks were mapped");
                Ok(took)
            }
        }
    }
}
