//! The same model over real files and RocksDB, with restarts in place of cuts, and two stores on one folder.

use std::path::Path;
use std::sync::Arc;

use kvkeep_core::error::{ErrorKind, Result};
use kvkeep_tiers::io::{DiskOptions, FlushCoordinator, PreadDisk};
use kvkeep_tiers::nvme::{Keep, NvmeConfig, NvmeStore, RocksIndex, index_dir, make_dirs, segments_dir};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::harness::{SEGMENT_BYTES, check};
use crate::model::{Model, Step, steps};

fn open(dir: &Path) -> Result<NvmeStore> {
    let config = NvmeConfig {
        segment_bytes: SEGMENT_BYTES,
        keep_free_bytes: 0,
        ..NvmeConfig::new(Some(dir.to_owned()), 4 * SEGMENT_BYTES)
    };
    make_dirs(dir)?;
    let disk = FlushCoordinator::new(PreadDisk::open(&segments_dir(dir), DiskOptions::default())?);
    let index = RocksIndex::open(&index_dir(dir))?;
    Ok(NvmeStore::open(config, Arc::new(disk), Arc::new(index), &mut |_| Keep::Yes)?.0)
}

async fn run(steps: Vec<Step>) {
    let dir = TempDir::new().unwrap();
    let mut store = open(dir.path()).unwrap();
    let mut model = Model::default();
    for step in steps {
        match step {
            // The process ends; what was written reached the kernel.
            Step::Cut { .. } | Step::Kill { .. } => {
                drop(store);
                store = open(dir.path()).unwrap();
                model.after_kill(&store).await;
            }
            Step::Restart => {
                store.close().await.unwrap();
                drop(store);
                store = open(dir.path()).unwrap();
                model.after_restart(&store).await;
            }
            step => model.step(&store, step).await,
        }
        check(&store);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
    #[test]
    fn a_store_on_real_files_over_restarts_is_what_the_model_says(steps in steps(40)) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(run(steps));
    }
}

#[tokio::test]
async fn a_second_store_on_the_folder_is_refused() {
    let dir = TempDir::new().unwrap();
    let first = open(dir.path()).unwrap();
    let e = open(dir.path()).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Conflict, "{e}");
    drop(first);
    open(dir.path()).unwrap();
}

/// The lock file alone, where the second one brings an index of its own.
#[tokio::test]
async fn a_second_store_with_another_index_is_refused() {
    let dir = TempDir::new().unwrap();
    let _first = open(dir.path()).unwrap();
    let disk = PreadDisk::open(&segments_dir(dir.path()), DiskOptions::default()).unwrap();
    let config = NvmeConfig::new(Some(dir.path().to_owned()), 1 << 30);
    let index = Arc::new(kvkeep_tiers::nvme::MemIndex::new());
    let e = NvmeStore::open(config, Arc::new(disk), index, &mut |_| Keep::Yes).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Conflict, "{e}");
}
