//! How long a device with many blocks takes to open: `cargo run --release -p kvkeep-node --example index_open -- [entries] [folder]`.
//!
//! Makes an index of so many blocks (10 million unless told otherwise; 32-byte keys, 16 KiB each, in random order, as a
//! store would have written it) over segments that are holes, then opens it three times as a node does: every entry goes into
//! a directory, in chains of 64. With a folder
//! the index is kept and used again.
//!
//! The floor is the index itself: about 140 bytes an entry, read, checked and decoded once; no segment is read.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant as Clock;

use kvkeep_core::block::BlockMeta;
use kvkeep_core::catalogue::Namespace;
use kvkeep_core::checksum::ChunkSums;
use kvkeep_core::directory::{Directory, DirectoryLimits};
use kvkeep_core::error::Result;
use kvkeep_core::ids::{
    BlockId, DigestKey, GroupId, Handle, Key, KeyDomain, NamespaceId, Revision, ShardId, TenantId, Version,
};
use kvkeep_core::words::{Class, Fidelity, PolicyKind};
use kvkeep_core::{Format, Group, Rule, SizeRule, Topology};
use kvkeep_node::store::load::Loader;
use kvkeep_tiers::io::sim::Dice;
use kvkeep_tiers::io::{DiskOptions, PreadDisk};
use kvkeep_tiers::nvme::config::{SEGMENT_BYTES_MAX, segment_name};
use kvkeep_tiers::nvme::header::Shape;
use kvkeep_tiers::nvme::{
    Change, Extent, Index, IndexEntry, Keep, NvmeConfig, NvmeStore, RocksIndex, SegmentNo, Sequence, UNIT_BYTES,
    index_dir, segments_dir,
};

const LEN: u32 = 16 * 1024;
const BATCH: u64 = 1000;
/// Positions of one chain.
const CHAIN: u64 = 64;

fn namespace() -> Namespace {
    let format = Format {
        model: "model".into(),
        dtype: "bf16".into(),
        layout: "example".into(),
        hash_algorithm: "random".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 1,
            replicated: false,
            size: SizeRule::Exact(u64::from(LEN)),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    };
    Namespace {
        id: NamespaceId(1),
        tenant: TenantId(0),
        name: "example".into(),
        fingerprint: format.fingerprint(),
        format,
        revision: Revision(1),
        revision_digest: "weights".into(),
        require_full: false,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let entries: u64 = args.next().map_or(Ok(10_000_000), |n| n.parse())?;
    let temporary = tempfile::tempdir()?;
    let dir = args.next().map_or(temporary.path().to_owned(), Into::into);

    let per_segment = SEGMENT_BYTES_MAX / UNIT_BYTES / u64::from(Shape::of(LEN).units);
    let segments = entries.div_ceil(per_segment);
    if !index_dir(&dir).exists() {
        let start = Clock::now();
        fs::create_dir_all(segments_dir(&dir))?;
        for no in 1..=segments {
            let path = segments_dir(&dir).join(segment_name(SegmentNo(u16::try_from(no)?)));
            fs::File::create(path)?.set_len(SEGMENT_BYTES_MAX)?;
        }
        fill(&dir, entries, per_segment)?;
        println!("made an index of {entries} entries in {:.1} s", start.elapsed().as_secs_f64());
    }

    for _ in 0..3 {
        let start = Clock::now();
        let index = RocksIndex::open(&index_dir(&dir))?;
        let opened = start.elapsed();
        let config = NvmeConfig {
            segment_bytes: SEGMENT_BYTES_MAX,
            ..NvmeConfig::new(Some(dir.clone()), segments * SEGMENT_BYTES_MAX)
        };
        let disk = PreadDisk::open(&segments_dir(&dir), DiskOptions::default())?;
        let mut bytes = 0u64;
        let mut loader = Loader::start(Directory::new(DirectoryLimits::default(), PolicyKind::Sage))?;
        let namespace = Arc::new(namespace());
        let (store, report) = NvmeStore::open(config, Arc::new(disk), Arc::new(index), &mut |entry| {
            bytes += u64::from(entry.len);
            loader.add(entry, &namespace);
            Keep::Yes
        })?;
        let (directory, refused) = loader.finish()?;
        assert!(refused.is_empty(), "{} blocks were refused", refused.len());
        assert_eq!(directory.totals().positions, entries);
        assert_eq!(report.entries, entries, "{report:?}");
        println!(
            "opened {} entries ({} GiB in {} segments) in {:.2} s: RocksDB {:.2} s, scan and free lists {:.2} s; {:.2} million a second",
            report.entries,
            bytes >> 30,
            report.segments,
            start.elapsed().as_secs_f64(),
            opened.as_secs_f64(),
            report.took.as_secs_f64(),
            entries as f64 / start.elapsed().as_secs_f64() / 1e6,
        );
        drop(store);
    }
    Ok(())
}

fn fill(dir: &Path, entries: u64, per_segment: u64) -> Result<()> {
    let index = RocksIndex::open(&index_dir(dir))?;
    let handle = Handle { namespace: NamespaceId(1), revision: Revision(1) };
    let secret = DigestKey::from_bytes([5; 16]);
    let mut dice = Dice::new(1);
    let mut batch = Vec::new();
    let mut before = None;
    for n in 0..entries {
        let key: Vec<u8> = (0..4).flat_map(|_| dice.next_u64().to_le_bytes()).collect();
        let meta = BlockMeta {
            id: BlockId { digest: secret.digest(KeyDomain(0), handle, &key), group: GroupId(0), shard: ShardId(0) },
            tenant: TenantId(0),
            handle,
            key: Key::new(&key)?,
            version: Version(dice.next_u64()),
            class: Class::Cache,
            keeper: kvkeep_core::words::Keeper::Caller,
            fidelity: Fidelity::Exact,
            position: (n % CHAIN) as u32,
            parent: before.filter(|_| n % CHAIN != 0),
            len: LEN,
            sums: ChunkSums::default(),
        };
        before = Some(meta.id.digest);
        let units = Shape::of(LEN).units;
        let extent =
            Extent { segment: SegmentNo(1 + (n / per_segment) as u16), unit: (n % per_segment) as u32 * units, units };
        let entry = IndexEntry::new(&meta, Class::Cache, extent, Sequence(n + 1));
        batch.push(Change::Put(entry.index_key().to_vec(), entry.encode()));
        if batch.len() as u64 == BATCH || n + 1 == entries {
            index.write(&std::mem::take(&mut batch))?;
        }
    }
    index.sync()
}
