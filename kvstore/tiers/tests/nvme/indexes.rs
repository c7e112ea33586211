//! One property suite over both indexes: after a cut, a prefix of the batches, and at least what was synced.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kvkeep_core::error::ErrorKind;
use kvkeep_tiers::nvme::{Change, Index, MemIndex, RocksIndex};
use proptest::prelude::*;
use tempfile::TempDir;

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// An index that can lose its power.
trait Device {
    type Index: Index;
    fn index(&self) -> &Self::Index;
    fn synced(&mut self);
    fn cut(self, kept: u32) -> Self;
}

struct Mem(MemIndex);

impl Device for Mem {
    type Index = MemIndex;
    fn index(&self) -> &MemIndex {
        &self.0
    }
    fn synced(&mut self) {}
    fn cut(self, kept: u32) -> Self {
        self.0.cut(kept as usize % (self.0.unsynced() + 1));
        self
    }
}

/// A cut leaves the write-ahead log as long as it was at the last sync, or a part of what came after.
struct Rocks {
    dir: TempDir,
    index: RocksIndex,
    wal_at_sync: BTreeMap<PathBuf, u64>,
}

impl Rocks {
    fn at(dir: TempDir) -> Self {
        let index = RocksIndex::open(&dir.path().join("index")).unwrap();
        index.sync().unwrap();
        let wal_at_sync = logs(dir.path());
        Self { dir, index, wal_at_sync }
    }
}

fn logs(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let logs = fs::read_dir(dir.join("index")).unwrap().map(|f| f.unwrap());
    logs.filter(|f| f.path().extension().is_some_and(|e| e == "log"))
        // RocksDB removes old logs behind our back.
        .filter_map(|f| Some((f.file_name().into(), f.metadata().ok()?.len())))
        .collect()
}

impl Device for Rocks {
    type Index = RocksIndex;
    fn index(&self) -> &RocksIndex {
        &self.index
    }
    fn synced(&mut self) {
        self.wal_at_sync = logs(self.dir.path());
    }
    fn cut(self, kept: u32) -> Self {
        let Self { dir, index, wal_at_sync } = self;
        // Closing writes nothing more: what is in the log stays there.
        drop(index);
        for (log, len) in logs(dir.path()) {
            let synced = wal_at_sync.get(&log).copied().unwrap_or(0);
            let keep = synced + u64::from(kept) % (len - synced + 1);
            let path = dir.path().join("index").join(log);
            fs::File::options().write(true).open(path).unwrap().set_len(keep).unwrap();
        }
        Self::at(dir)
    }
}

fn all(index: &impl Index) -> Map {
    let mut map = Map::new();
    index
        .scan(&[], &mut |k, v| {
            assert!(map.insert(k.to_vec(), v.to_vec()).is_none());
            assert_eq!(map.last_key_value().unwrap().0, k, "in key order");
            ControlFlow::Continue(())
        })
        .unwrap();
    map
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<(u8, Option<u8>)>),
    Sync,
    Cut(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let batch = prop::collection::vec((0u8..8, any::<Option<u8>>()), 1..5);
    prop::collection::vec(
        prop_oneof![6 => batch.prop_map(Step::Write), 2 => Just(Step::Sync), 1 => any::<u32>().prop_map(Step::Cut)],
        1..30,
    )
}

fn holds_a_prefix_and_all_that_was_synced<D: Device>(mut device: D, steps: Vec<Step>) {
    // What the map was after each batch since the last sync, oldest first.
    let mut since_sync = vec![Map::new()];
    for step in steps {
        match step {
            Step::Write(changes) => {
                let mut map = since_sync.last().unwrap().clone();
                let batch: Vec<Change> = changes
                    .into_iter()
                    .map(|(key, value)| {
                        // Keys of two lengths, one the prefix of the other.
                        let key = vec![b'k'; 1 + key as usize];
                        match value {
                            Some(v) => {
                                map.insert(key.clone(), vec![v; 40]);
                                Change::Put(key, vec![v; 40])
                            }
                            None => {
                                map.remove(&key);
                                Change::Delete(key)
                            }
                        }
                    })
                    .collect();
                device.index().write(&batch).unwrap();
                since_sync.push(map);
            }
            Step::Sync => {
                device.index().sync().unwrap();
                device.synced();
                since_sync.drain(..since_sync.len() - 1);
            }
            Step::Cut(kept) => {
                device = device.cut(kept);
                let found = all(device.index());
                assert!(since_sync.contains(&found), "{found:?} is none of {since_sync:?}");
                since_sync = vec![found];
            }
        }
        let current = since_sync.last().unwrap();
        assert_eq!(all(device.index()), *current);
        for n in 1..=8 {
            let key = vec![b'k'; n];
            assert_eq!(device.index().get(&key).unwrap().as_ref(), current.get(&key));
        }
    }
}

proptest! {
    #[test]
    fn the_index_in_memory_keeps_what_was_synced(steps in steps()) {
        holds_a_prefix_and_all_that_was_synced(Mem(MemIndex::new()), steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn rocksdb_keeps_what_was_synced(steps in steps()) {
        holds_a_prefix_and_all_that_was_synced(Rocks::at(TempDir::new().unwrap()), steps);
    }
}

#[test]
fn a_scan_starts_where_it_is_told_and_ends_when_told() {
    let dir = TempDir::new().unwrap();
    let rocks = RocksIndex::open(dir.path()).unwrap();
    let mem = MemIndex::new();
    for index in [&rocks as &dyn Index, &mem] {
        let batch: Vec<_> = (0..3000u16).map(|n| Change::Put(n.to_be_bytes().to_vec(), vec![])).collect();
        index.write(&batch).unwrap();
        let mut seen = Vec::new();
        index
            .scan(&5u16.to_be_bytes(), &mut |k, _| {
                seen.push(u16::from_be_bytes(k.try_into().unwrap()));
                if seen.len() == 2500 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        assert_eq!(seen, (5..2505).collect::<Vec<_>>());
    }
}

#[test]
fn a_second_opener_is_told_that_the_index_is_taken() {
    let dir = TempDir::new().unwrap();
    let _first = RocksIndex::open(dir.path()).unwrap();
    let e = RocksIndex::open(dir.path()).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Conflict, "{e}");
}

#[test]
fn a_flipped_bit_in_a_table_is_corruption_and_not_another_value() {
    let dir = TempDir::new().unwrap();
    let index = RocksIndex::open(dir.path()).unwrap();
    let batch: Vec<_> = (0..2000u16).map(|n| Change::Put(n.to_be_bytes().to_vec(), vec![n as u8; 100])).collect();
    index.write(&batch).unwrap();
    index.sync().unwrap();
    drop(index);
    // A second open writes what the log held into a table.
    drop(RocksIndex::open(dir.path()).unwrap());
    let tables: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "sst"))
        .collect();
    assert!(!tables.is_empty(), "the log was not written out");
    for table in tables {
        let mut bytes = fs::read(&table).unwrap();
        bytes[100] ^= 4;
        fs::write(&table, bytes).unwrap();
    }
    let result = RocksIndex::open(dir.path()).and_then(|index| {
        let mut seen = 0u16;
        index.scan(&[], &mut |k, v| {
            assert_eq!((k, v), (&seen.to_be_bytes()[..], &vec![seen as u8; 100][..]));
            seen += 1;
            ControlFlow::Continue(())
        })
    });
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt);
}
