//! Checking blocks at rest, so that damage is found while a replica or the engine can still make up for it.

use std::ops::ControlFlow;
use std::sync::Arc;

use kvkeep_core::error::{Error, ErrorKind, Result};

use super::entry::{INDEX_KEY_BYTES, IndexEntry, IndexKey};
use super::place::Extent;
use super::read::{Doubt, Expect, Read};
use super::records;
use super::store::{NvmeStore, padded};
use super::writer::{BlockCopy, Op};
use crate::io::IoBuf;

/// Blocks of one scrub call at most.
pub const SCRUB_BLOCKS_MAX: usize = 1024;
/// Extents pardoned in one batch.
const PARDON_BATCH: usize = 1024;

/// Where a scrub goes on: after the last block that it checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubCursor(IndexKey);

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubFault {
    /// Its bytes are not what was put; it is gone, its extent quarantined.
    Corrupt(Doubt),
    /// Something else was there; it is gone.
    Stale,
    /// The device failed the read. It stays.
    Io,
}

/// What one slice of a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Blocks read in full.
    pub checked: u64,
    /// Their payload, bytes.
    pub bytes: u64,
    /// Those that were not right. The ones that are gone are to be forgotten by whoever still names them.
    pub faults: Vec<(BlockCopy, ScrubFault)>,
    /// Where to go on; `None` at the end of the device.
    pub next: Option<ScrubCursor>,
}

impl NvmeStore {
    /// Reads the next `blocks` blocks (at most [`SCRUB_BLOCKS_MAX`]) after `cursor`, one at a time, and checks every byte.
    /// The caller sets the pace.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if the index cannot be read.
    pub async fn scrub(&self, cursor: Option<ScrubCursor>, blocks: usize) -> Result<ScrubReport> {
        let blocks = blocks.clamp(1, SCRUB_BLOCKS_MAX);
        let shared = Arc::clone(&self.shared);
        let listing = tokio::task::spawn_blocking(move || {
            let mut entries = Vec::with_capacity(blocks);
            let from = cursor.map_or(Vec::new(), |c| c.0.to_vec());
            shared.index.scan(&from, &mut |key, value| {
                if let Ok(key) = <&IndexKey>::try_from(key)
                    && cursor.is_none_or(|c| c.0 != *key)
                    && let Ok(entry) = IndexEntry::decode(key, value)
                {
                    entries.push(entry);
                }
                if entries.len() == blocks { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            Ok::<_, Error>(entries)
        });
        let stopped = |_| Error::new(ErrorKind::Unavailable, "the runtime stopped during a scrub");
        let entries = listing.await.map_err(stopped)??;
        let mut report = ScrubReport {
            next: entries.last().filter(|_| entries.len() == blocks).map(|e| ScrubCursor(e.index_key())),
            ..ScrubReport::default()
        };
        for entry in entries {
            let copy = BlockCopy { handle: entry.handle, id: entry.id, place: entry.place };
            let expect = Expect {
                id: entry.id,
                handle: entry.handle,
                key: Some(entry.key),
                version: entry.version,
                len: entry.len,
            };
            let fault = match self.get(&expect, entry.place, IoBuf::alloc(padded(entry.len))).await {
                Read::Ok { .. } => None,
                // Freed or superseded while the scrub was on its way.
                Read::Stale if self.entry(copy.handle, copy.id)?.is_some_and(|e| e.place != copy.place) => None,
                Read::Stale => Some(ScrubFault::Stale),
                Read::Corrupt(doubt) => Some(ScrubFault::Corrupt(doubt)),
                Read::Io(_) => Some(ScrubFault::Io),
            };
            report.checked += 1;
            report.bytes += u64::from(entry.len);
            report.faults.extend(fault.map(|f| (copy, f)));
        }
        Ok(report)
    }

    /// Gives every quarantined extent back to the free list, for an operator who knows what was wrong with the device.
    /// Answers how many.
    ///
    /// # Errors
    /// `Io` if the index failed.
    pub async fn clear_quarantine(&self) -> Result<u64> {
        let mut cleared = 0;
        loop {
            let shared = Arc::clone(&self.shared);
            let listing = tokio::task::spawn_blocking(move || {
                let mut extents: Vec<Extent> = Vec::new();
                shared.index.scan(records::QUARANTINE_PREFIX, &mut |key, value| {
                    extents.extend(records::as_quarantine(key, value));
                    let done = !key.starts_with(records::QUARANTINE_PREFIX) || extents.len() == PARDON_BATCH;
                    if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })?;
                Ok::<_, Error>(extents)
            });
            let stopped = |_| Error::new(ErrorKind::Unavailable, "the runtime stopped");
            let extents = listing.await.map_err(stopped)??;
            if extents.is_empty() {
                return Ok(cleared);
            }
            cleared += extents.len() as u64;
            self.writer.ask(|done| Op::Pardon { extents, done }).await?;
        }
    }
}

const _: () = assert!(INDEX_KEY_BYTES == size_of::<IndexKey>());
