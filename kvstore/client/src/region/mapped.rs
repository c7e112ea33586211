//! The server's memory, read in place: nothing is copied. For processes on the server's host that it trusts.
//!
//! A lease holds the slots; [`Client::release`](crate::Client::release) (or
//! [`Client::post_release`](crate::Client::post_release), which does not wait) gives them back. A slot that is held is not
//! used for anything else, even when the lease ends before its client wakes up; the generation in its entry is compared all
//! the same, behind every copy.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvkeep_core::ids::{GroupId, ShardId, Version};
use kvkeep_core::slot_entry::{EntryReader, is_still};
use kvkeep_core::{MissReason, PartStatus};
use kvkeep_proto::v1;
use kvkeep_proto::v1::envelope::Message;
use parking_lot::Mutex;

use super::memory::Memory;
use crate::block::conn::Conn;
use crate::block::table::{self, Record, RecordPlace};
use crate::convert;
use crate::error::{Error, Result};
use crate::matching::Match;

/// Files kept mapped; more than an arena has.
const FILES_MAX: usize = 1024;

/// Files of the server's arena that this process has mapped, by nonce.
#[derive(Default)]
pub(crate) struct Files(Mutex<HashMap<u64, Arc<Memory>>>);

/// A match, and where its blocks lie.
#[derive(Clone, Debug)]
pub struct MappedMatch {
    /// The match; its lease holds the parts.
    pub found: Match,
    /// The parts of the positions up to the boundary, in order. Empty where this client cannot read in place.
    pub parts: Vec<MappedPart>,
}

impl MappedMatch {
    /// In a forked child: puts zeroes where the blocks lay, for whoever holds on to [`MappedBlock::as_ptr`] there. Elsewhere it
    /// does nothing. It takes no lock.
    pub fn after_fork(&self) {
        let mut last: Option<&Arc<Memory>> = None;
        for MappedBlock { file, .. } in self.parts.iter().filter_map(|part| part.block.as_ref()) {
            if !last.is_some_and(|known| Arc::ptr_eq(known, file)) {
                file.stand_in();
            }
            last = Some(file);
        }
    }
}

/// One part.
#[derive(Clone, Debug)]
pub struct MappedPart {
    /// Index of its key.
    pub item: usize,
    /// Its group.
    pub group: GroupId,
    /// Its shard.
    pub shard: ShardId,
    /// A hit, `loading` where it is on NVMe only (get it, or prefetch it and match again), or a miss.
    pub status: PartStatus,
    /// Why it is no hit.
    pub reason: Option<MissReason>,
    /// Where it lies, where it is a hit.
    pub block: Option<MappedBlock>,
}

/// A block in the server's memory.
#[derive(Clone, Debug)]
pub struct MappedBlock {
    file: Arc<Memory>,
    offset: usize,
    len: usize,
    entry: usize,
    generation: u64,
    /// Of the put that made the bytes.
    pub version: Version,
}

impl MappedBlock {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a block has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts in this process: read-only memory, for a DMA or a copy of the caller's own. Behind it ask
    /// [`Self::is_still_there`].
    pub fn as_ptr(&self) -> *const u8 {
        self.file.as_ptr().wrapping_add(self.offset)
    }

    /// Whether the slot was this block's all the while until now. `false`: what was read is worthless. A forked child does
    /// not have the mapping: there it is `false` always, and [`Self::as_ptr`] points nowhere, or after
    /// [`MappedMatch::after_fork`] to zeroes.
    pub fn is_still_there(&self) -> bool {
        self.file.is_here() && is_still(self, self.generation)
    }

    /// Copies it out; `false`: it is gone, and `to` holds nothing.
    ///
    /// # Panics
    /// If `to` has another length.
    #[must_use]
    pub fn copy_to(&self, to: &mut [u8]) -> bool {
        assert_eq!(to.len(), self.len, "a copy takes the whole block");
        if !self.file.is_here() {
            return false;
        }
        self.file.copy_out(self.offset, to);
        self.is_still_there()
    }
}

impl EntryReader for MappedBlock {
    fn load_first(&self, at: usize) -> u32 {
        u32::from_le(self.file.word(self.entry + at).load(Ordering::Acquire))
    }
}

impl Files {
    /// Reads the answer to a map, opening files that are not mapped yet on the connection it came from.
    pub(crate) async fn read(
        &self,
        conn: &mut Conn,
        parts: v1::MappedParts,
        patience: Duration,
    ) -> Result<Vec<MappedPart>> {
        let records =
            table::from_proto(&parts).ok_or_else(|| Error::protocol("a table of mapped parts is cut short"))?;
        let mut out = Vec::with_capacity(records.len());
        // Blocks of one call mostly lie in one file.
        let mut last: Option<(u64, Arc<Memory>)> = None;
        for Record { item, group, shard, status, reason, place } in records {
            let block = match status {
                PartStatus::Hit => {
                    let file = match last.take_if(|(nonce, _)| *nonce == place.file) {
                        Some((_, file)) => file,
                        None => self.file(conn, place.file, patience).await?,
                    };
                    last = Some((place.file, Arc::clone(&file)));
                    Some(block(file, &place)?)
                }
                _ => None,
            };
            out.push(MappedPart { item: item as usize, group, shard, status, reason, block });
        }
        Ok(out)
    }

    async fn file(&self, conn: &mut Conn, nonce: u64, patience: Duration) -> Result<Arc<Memory>> {
        let known = self.0.lock().get(&nonce).filter(|file| file.is_here()).cloned();
        match known {
            Some(file) => Ok(file),
            None => self.open(conn, nonce, patience).await,
        }
    }

    async fn open(&self, conn: &mut Conn, nonce: u64, patience: Duration) -> Result<Arc<Memory>> {
        const VERB: &str = "open_file";
        let wish = Message::OpenFile(v1::OpenFileRequest { file: nonce });
        let Message::OpenFileReply(reply) = conn.call(VERB, wish, patience).await? else {
            return Err(Error::protocol("open_file was answered with something else"));
        };
        let descriptor = conn
            .frames()
            .take_descriptor()
            .ok_or_else(|| Error::protocol("a file of the arena came without its descriptor"))?;
        let bytes =
            usize::try_from(reply.length).map_err(|_| Error::protocol("a file larger than the address space"))?;
        let mapped = Memory::map(descriptor, 0, bytes, false).and_then(Memory::kept_from_children);
        let mapped = mapped
            .map_err(|e| Error::config("a file of the arena cannot be mapped").with("bytes", bytes).caused_by(e))?;
        let mapped = Arc::new(mapped);
        let mut files = self.0.lock();
        if files.len() >= FILES_MAX {
            // Those that nobody reads now; one that is asked for again is opened again.
            files.retain(|_, file| Arc::strong_count(file) > 1);
        }
        files.insert(nonce, Arc::clone(&mapped));
        Ok(mapped)
    }
}

/// A part that the server says is a hit: inside of its file, or the server lies.
fn block(file: Arc<Memory>, place: &RecordPlace) -> Result<MappedBlock> {
    let bytes = file.len() as u64;
    let fits = |at: u64, len: u64| at.checked_add(len).is_some_and(|end| end <= bytes);
    let length = u64::from(place.length);
    let entry = usize::try_from(place.entry).ok().filter(|at| at.is_multiple_of(8) && fits(place.entry, 64));
    match (entry, fits(place.offset, length) && length > 0, convert::version_from_proto(place.version)) {
        (Some(entry), true, Some(version)) => Ok(MappedBlock {
            file,
            offset: place.offset as usize,
            len: place.length as usize,
            entry,
            generation: place.generation,
            version,
        }),
        _ => Err(Error::protocol("a mapped part lies outside of its file")),
    }
}
