//! KVKeep's own paths: one node, started for the run; a path is what one call does (`What`) on some lanes (`lane`).
//!
//! To add a path: a variant of `What`, its call in `Lane::once`, and a line in `start` that names it.

mod lane;

use std::path::Path as FilePath;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kvkeep_client::{Call, ClientConfig, Lost, Put, PutPosition, WayWish, Wire};

use super::bars::ours as names;
use super::path::{BATCH, BLOCK_BYTES, BLOCKS, Entry, Group, Kind, Measuring, Path, PathId, Sample, Way};
use super::processor::Processor;
use super::references::{CONNECTIONS, Memory};
use crate::load::any_size_format;
use crate::node::{DataDir, Node, Recipe};
use lane::{Lane, What, key};

/// Arena of a node: the working set, and room for what is put.
const ARENA_BYTES: &str = "2GiB";
/// Keys of a look-up without a hit: prompts of 1,024, 16,384 and 65,536 tokens of 16 tokens a key.
const MISSED_KEYS: [u32; 3] = [64, 1024, 4096];
/// Blocks of one call that fills the store.
const FILL_BATCH: usize = 8;
/// The certificate of the node with TLS is for this name.
const TLS_HOST: &str = "localhost";
/// Its token.
const TLS_TOKEN: &str = "kvkeep-bench-0123456789";

/// A node of this run.
struct Served {
    node: Node,
    config: ClientConfig,
    // Removed when the node is gone.
    _data: DataDir,
}

/// One path: lanes that make the same call, each on a thread and a connection of its own.
struct Ours {
    served: Arc<Served>,
    memory: Arc<Memory>,
    what: What,
    bytes: usize,
    lanes: Vec<Lane>,
}

/// Starts the nodes, stores the working set and answers all paths.
pub async fn start(kvkeepd: Option<&FilePath>, memory: &Arc<Memory>) -> anyhow::Result<Vec<Entry>> {
    let plain = Arc::new(Served::start(kvkeepd, &[]).await?);
    plain.store(memory).await.context("store the working set")?;
    let mut entries = Vec::new();
    let single = PathId::single;
    let mut add = |served: &Arc<Served>, id: PathId, wire, what: What, says: &str| -> anyhow::Result<()> {
        let blocks = if what.has_blocks() { id.batch as usize * BLOCK_BYTES } else { 0 };
        let lanes = (0..id.connections as usize).map(|n| {
            let config = ClientConfig { way: WayWish::Only(wire), ..served.config.clone() };
            Lane::new(config, what, id.batch as usize, n, id.connections as usize, memory)
        });
        let lanes = lanes.collect::<anyhow::Result<Vec<_>>>().with_context(|| id.to_string())?;
        entries.push(Entry {
            what: says.to_owned(),
            kind: Kind::Ours,
            group: if wire == Wire::Socket { Group::SameHost } else { Group::Network },
            path: Box::new(Ours { served: Arc::clone(served), memory: Arc::clone(memory), what, bytes: blocks, lanes }),
            id,
        });
        Ok(())
    };
    add(&plain, single(names::EMPTY_CALL, Way::Call), Wire::Socket, What::Ping, "an empty call, Unix socket")?;
    for batch in MISSED_KEYS {
        let id = PathId { batch, ..single(names::MISSED_MATCH, Way::Call) };
        add(&plain, id, Wire::Socket, What::MissedMatch, "a look-up of so many keys without a hit, Unix socket")?;
    }
    for batch in [BATCH, 1] {
        let id = |name, way| PathId { batch, ..single(name, way) };
        let socket = Wire::Socket;
        add(&plain, id(names::REGION_GET, Way::Get), socket, What::RegionGet, "the server copies into a region")?;
        add(
            &plain,
            id(names::REGION_PUT, Way::Put),
            socket,
            What::RegionPut,
            "the server copies out of a region, and sums",
        )?;
        add(
            &plain,
            id(names::MAPPED_GET, Way::Get),
            socket,
            What::MappedGet,
            "match, lease, map, release; nothing copied",
        )?;
        for connections in CONNECTIONS {
            let get = id(names::PORT_GET, Way::Get).over(connections);
            let put = id(names::PORT_PUT, Way::Put).over(connections);
            add(&plain, get, Wire::Port, What::Get, "block port, into the caller's buffers, summed on both sides")?;
            add(&plain, put, Wire::Port, What::Put, "block port, summed on both sides")?;
        }
        add(&plain, id(names::GRPC_GET, Way::Get), Wire::Grpc, What::Get, "gRPC, into the caller's buffers")?;
        add(&plain, id(names::GRPC_PUT, Way::Put), Wire::Grpc, What::Put, "gRPC")?;
    }
    match Served::start_tls(kvkeepd).await {
        Ok(served) => {
            let served = Arc::new(served);
            served.store(memory).await.context("store the working set over TLS")?;
            for connections in CONNECTIONS {
                let id = |name, way| single(name, way).over(connections);
                add(&served, id(names::PORT_GET_TLS, Way::Get), Wire::Port, What::Get, "block port with TLS")?;
                add(&served, id(names::PORT_PUT_TLS, Way::Put), Wire::Port, What::Put, "block port with TLS")?;
            }
        }
        Err(why) => eprintln!("SKIPPED the block port with TLS: {why:#}"),
    }
    Ok(entries)
}

impl Served {
    async fn start(kvkeepd: Option<&FilePath>, more: &[String]) -> anyhow::Result<Self> {
        let data = DataDir::open(None)?;
        let mut args = ["--arena-bytes", ARENA_BYTES, "--no-nvme"].map(str::to_owned).to_vec();
        args.extend_from_slice(more);
        let node = Recipe::kvkeepd(kvkeepd, &data, &args)?.start("127.0.0.1:0").await?;
        let config =
            ClientConfig { lost: Lost::Errors, patience: Duration::from_secs(2), ..ClientConfig::to(node.endpoint()) };
        Ok(Self { node, config, _data: data })
    }

    async fn start_tls(kvkeepd: Option<&FilePath>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("a folder for a certificate")?;
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        let tokens = folder.path().join("tokens");
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=kvkeep", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&cert)
            .output()
            .context("openssl, to make a certificate")?;
        ensure!(made.status.success(), "openssl makes no certificate");
        std::fs::write(&tokens, format!("bench {TLS_TOKEN} admin\n"))?;
        for secret in [&key, &tokens] {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(secret, std::fs::Permissions::from_mode(0o600))?;
        }
        let args = [("--tls-cert", &cert), ("--tls-key", &key), ("--tokens-file", &tokens)];
        let args: Vec<_> =
            args.iter().flat_map(|(flag, path)| [(*flag).to_owned(), path.display().to_string()]).collect();
        let mut served = Self::start(kvkeepd, &args).await?;
        let port = served.node.listen.rsplit(':').next().context("the node's port")?;
        served.config = ClientConfig {
            token: Some(TLS_TOKEN.to_owned()),
            ca_pem: Some(std::fs::read_to_string(&cert)?),
            endpoint: format!("https://{TLS_HOST}:{port}"),
            ..served.config.clone()
        };
        Ok(served)
    }

    /// Puts what of the working set is not there (any more): puts of others may have pushed it out.
    async fn store(&self, memory: &Arc<Memory>) -> anyhow::Result<()> {
        let client = kvkeep_client::Client::connect(self.config.clone()).await?;
        let namespace = client.register_namespace("peers", &any_size_format(BLOCK_BYTES as u64), "generated").await?;
        for first in (0..BLOCKS).step_by(FILL_BATCH) {
            let position = |n: usize| PutPosition::of(key(n as u64), memory.block(n));
            let positions = (first..first + FILL_BATCH).map(position).collect();
            let put = Put { positions, unordered: true, ..Put::default() };
            let outcomes = namespace.put(&put, &Call::default()).await?;
            ensure!(outcomes.iter().all(|o| o.is_kept()), "the working set was refused: {outcomes:?}");
        }
        Ok(())
    }
}

impl Path for Ours {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(async move {
            if self.what.reads() {
                self.served.store(&self.memory).await?;
            }
            let processor = Processor::of(&[self.served.node.pid()]);
            let (what, cpu, began) = (self.what, processor.seconds(), Instant::now());
            let ends = began + window;
            let calls = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    self.lanes.iter_mut().map(|lane| scope.spawn(move || lane.run(what, ends))).collect();
                let joined = threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a client panicked"))?);
                joined.collect::<anyhow::Result<Vec<_>>>()
            })?;
            let latencies = calls.concat();
            Ok(Sample {
                bytes: (latencies.len() * self.bytes) as u64,
                elapsed: began.elapsed(),
                cpu_seconds: processor.seconds() - cpu,
                latencies,
            })
        })
    }
}
