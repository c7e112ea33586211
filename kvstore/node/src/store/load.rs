//! Filling a directory from an NVMe index, at the speed of a start.
//!
//! ```text
//! RocksDB scan, decode | claim extents, ask what to keep | insert into the directory, a slice at a time
//! (a thread of tiers)  | (the caller's thread)           | (a thread of its own)
//! ```
//! Floor: about 140 bytes an entry read and checked once, and one insert of a directory entry, which waits for memory
//! three or four times; the parents of a slice are looked up together so that those waits overlap.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use kvkeep_core::catalogue::Namespace;
use kvkeep_core::directory::{Directory, Inserted, Placed};
use kvkeep_core::{BlockMeta, Error, ErrorKind, Instant, NvmePlace, RequestInfo, Result};
use kvkeep_tiers::nvme::{BlockCopy, IndexEntry};

use super::SLICE_KEYS;

/// Slices that wait for the directory.
const SLICES_AHEAD: usize = 64;

/// Neighbours in the index mostly share a namespace.
struct Slice {
    namespace: Arc<Namespace>,
    blocks: Vec<(BlockMeta, NvmePlace)>,
}

/// A directory being filled.
pub struct Loader {
    slices: SyncSender<Slice>,
    /// Emptied by the thread that filled them: memory is cheapest to give back where it was taken.
    done: Receiver<Vec<(BlockMeta, NvmePlace)>>,
    next: Option<Slice>,
    filling: JoinHandle<(Directory, Vec<BlockCopy>)>,
}

impl Loader {
    /// Starts filling `directory`.
    ///
    /// # Errors
    /// `Unavailable` where the system gives no thread.
    pub fn start(mut directory: Directory) -> Result<Self> {
        let (slices, arriving) = sync_channel::<Slice>(SLICES_AHEAD);
        let (give_back, done) = channel();
        let fill = move || {
            let info = RequestInfo::default();
            let mut refused = Vec::new();
            for Slice { namespace, blocks } in arriving {
                directory.warm(blocks.iter().filter_map(|(meta, _)| meta.parent.as_ref()));
                for (meta, place) in &blocks {
                    let inserted = directory.insert(meta, &namespace.format, Placed::Nvme(*place), &info, Instant(0));
                    if !matches!(inserted, Ok(Inserted::Stored)) {
                        refused.push(BlockCopy { handle: meta.handle, id: meta.id, place: *place });
                    }
                }
                // Nobody takes it where the loader has ended.
                let _ = give_back.send(blocks);
            }
            (directory, refused)
        };
        let filling = Builder::new()
            .name("kvkeep-load".into())
            .spawn(fill)
            .map_err(|e| Error::new(ErrorKind::Unavailable, "no thread to fill the directory with").with("cause", e))?;
        Ok(Self { slices, done, next: None, filling })
    }

    /// Adds a block of the index.
    pub fn add(&mut self, entry: &IndexEntry, namespace: &Arc<Namespace>) {
        if self.next.as_ref().is_some_and(|s| s.blocks.len() == SLICE_KEYS || !Arc::ptr_eq(&s.namespace, namespace)) {
            self.send();
        }
        let slice = self.next.get_or_insert_with(|| {
            let mut blocks = self.done.try_recv().unwrap_or_default();
            blocks.clear();
            blocks.reserve_exact(SLICE_KEYS);
            Slice { namespace: Arc::clone(namespace), blocks }
        });
        slice.blocks.push((entry.described(), entry.place));
    }

    fn send(&mut self) {
        if let Some(slice) = self.next.take() {
            // The other end goes only with its thread, whose panic `finish` reports.
            let _ = self.slices.send(slice);
        }
    }

    /// The directory, and the blocks it did not take (it is full, or they do not fit their format): the caller frees them.
    ///
    /// # Errors
    /// `Unavailable` where filling it panicked.
    pub fn finish(mut self) -> Result<(Directory, Vec<BlockCopy>)> {
        self.send();
        drop(self.slices);
        self.filling.join().map_err(|_| Error::new(ErrorKind::Unavailable, "filling the directory failed: see the log"))
    }
}
