//! KVKeep's own paths: one node, started for the run, and one function per path.
//!
//! A path is a function that makes calls until its [`Stretch`] is over, and a line in [`start`] that names it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use kvkeep_client::{Call, Client, ClientConfig, GetItem, Namespace, PartOutcome, Put, PutPosition};

use super::bars::ours::{GRPC_GET, GRPC_PUT};
use super::path::{BATCH, BLOCK_BYTES, BLOCKS, Entry, Group, Kind, Measuring, Path, PathId, Sample, Stretch, Way};
use super::references::Memory;
use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::node::{DataDir, Node, Recipe};

/// Arena of the node: the working set, and room for what is put.
const ARENA_BYTES: &str = "2GiB";
/// Blocks of one call that fills the store.
const FILL_BATCH: usize = 8;
/// Ids of what is put, far from those of the working set.
const FRESH_FROM: u64 = 1 << 32;

/// The node and what is known of it.
pub struct Ours {
    node: Node,
    namespace: Namespace,
    memory: Arc<Memory>,
    keys: Vec<Bytes>,
    fresh: AtomicU64,
    // Removed when the node is gone.
    _data: DataDir,
}

/// Starts a node, stores the working set and answers all paths through it.
pub async fn start(kvkeepd: Option<&std::path::Path>, memory: &Arc<Memory>) -> anyhow::Result<Vec<Entry>> {
    let data = DataDir::open(None)?;
    let more = ["--arena-bytes", ARENA_BYTES, "--no-nvme"].map(str::to_owned);
    let node = Recipe::kvkeepd(kvkeepd, &data, &more)?.start("127.0.0.1:0").await?;
    let client = Client::connect(ClientConfig::to(node.endpoint())).await?;
    let namespace = client.register_namespace("peers", &any_size_format(BLOCK_BYTES as u64), "generated").await?;
    let ours = Arc::new(Ours {
        node,
        namespace,
        memory: Arc::clone(memory),
        keys: (0..BLOCKS as u64).map(key).collect(),
        fresh: AtomicU64::new(FRESH_FROM),
        _data: data,
    });
    ours.store_working_set().await.context("store the working set")?;
    let entry = |id: PathId, what: &str, group, path: Box<dyn Path>| Entry {
        id,
        what: what.to_owned(),
        kind: Kind::Ours,
        group,
        path,
    };
    let mut entries = Vec::new();
    for batch in [BATCH, 1] {
        let id = |name, way| PathId { batch, ..PathId::single(name, way) };
        let network = |id, what, path| entry(id, what, Group::Network, path);
        let (get, put) = (GrpcGet::new(&ours, batch), GrpcPut { ours: Arc::clone(&ours), batch: batch as usize });
        entries.push(network(id(GRPC_GET, Way::Get), "the SDK over gRPC into the caller's buffers", Box::new(get)));
        entries.push(network(id(GRPC_PUT, Way::Put), "the SDK over gRPC", Box::new(put)));
    }
    Ok(entries)
}

fn key(id: u64) -> Bytes {
    Bytes::copy_from_slice(PrefixId(id).key().as_bytes())
}

impl Ours {
    /// For the CPU clock.
    fn stretch(&self, window: Duration) -> Stretch {
        Stretch::begin(window, &[self.node.pid()])
    }

    /// Puts what of the working set is not there (any more): puts of others may have pushed it out.
    async fn store_working_set(&self) -> anyhow::Result<()> {
        for first in (0..BLOCKS).step_by(FILL_BATCH) {
            let blocks = (first..first + FILL_BATCH).map(|n| (self.keys[n].clone(), self.memory.block(n)));
            self.put(blocks).await?;
        }
        Ok(())
    }

    async fn put(&self, blocks: impl Iterator<Item = (Bytes, Bytes)>) -> anyhow::Result<()> {
        let positions = blocks.map(|(key, data)| PutPosition::of(key, data)).collect();
        let put = Put { positions, unordered: true, ..Put::default() };
        for outcome in self.namespace.put(&put, &Call::default()).await.context("put")? {
            match outcome {
                PartOutcome::Stored { .. } | PartOutcome::AlreadyPresent { .. } => {}
                PartOutcome::Refused(e) => return Err(anyhow::Error::new(e).context("put")),
                PartOutcome::InProgressElsewhere { .. } => bail!("nobody else writes here"),
            }
        }
        Ok(())
    }

    /// Blocks that nobody has put before.
    fn fresh(&self, blocks: usize) -> Vec<(Bytes, Bytes)> {
        let first = self.fresh.fetch_add(blocks as u64, Ordering::Relaxed);
        let block = |n: u64| (key(n), self.memory.block(n as usize % BLOCKS));
        (first..first + blocks as u64).map(block).collect()
    }
}

struct GrpcGet {
    ours: Arc<Ours>,
    batch: usize,
    at: usize,
}

impl GrpcGet {
    fn new(ours: &Arc<Ours>, batch: u32) -> Self {
        Self { ours: Arc::clone(ours), batch: batch as usize, at: 0 }
    }

    async fn run(&mut self, window: Duration) -> anyhow::Result<Sample> {
        let ours = &self.ours;
        ours.store_working_set().await?;
        let mut landing = ours.memory.landing()?;
        let mut stretch = ours.stretch(window);
        while stretch.going() {
            let blocks = self.at..self.at + self.batch;
            let items: Vec<_> = ours.keys[blocks.clone()].iter().cloned().map(GetItem::of).collect();
            let place = &mut landing[blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES];
            let mut buffers: Vec<_> = place.chunks_exact_mut(BLOCK_BYTES).collect();
            let (call, bytes) = (Call::default(), self.batch * BLOCK_BYTES);
            let got = stretch.wait(bytes, ours.namespace.get_into(&items, &mut buffers, None, &call)).await?;
            ensure!(got.iter().all(|part| part.is_hit() && part.len == BLOCK_BYTES), "a get came back short");
            self.at = blocks.end % BLOCKS;
        }
        Ok(stretch.end())
    }
}

impl Path for GrpcGet {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(self.run(window))
    }
}

struct GrpcPut {
    ours: Arc<Ours>,
    batch: usize,
}

impl Path for GrpcPut {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(async move {
            let mut stretch = self.ours.stretch(window);
            while stretch.going() {
                let blocks = self.ours.fresh(self.batch);
                stretch.wait(self.batch * BLOCK_BYTES, self.ours.put(blocks.into_iter())).await?;
            }
            Ok(stretch.end())
        })
    }
}
