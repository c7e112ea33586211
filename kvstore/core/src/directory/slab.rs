//! Where entries live and how they are found: chunks that never move, and 1,024 small hash tables over them.
//!
//! One big table would double under the node's mutex: at 10 million positions a pause of hundreds of milliseconds and
//! half as much memory again. Each small table doubles alone, for at most a few thousand entries.

use std::ops::{Index, IndexMut};

use hashbrown::HashTable;

use crate::ids::Digest;

use super::entry::{Entry, EntryId, Parts};

/// Entries of one chunk.
const CHUNK: usize = 4096;
/// Hash tables.
const TABLES: usize = 1024;

/// Entries by id and by digest.
pub(crate) struct Slab {
    chunks: Vec<Vec<Entry>>,
    /// First vacant entry; they are chained through `parent`.
    vacant: EntryId,
    len: u32,
    tables: Box<[HashTable<EntryId>]>,
}

/// The table of a digest: chosen by its first bytes, so that an index read in the order of digests fills one table after
/// the other, each while it is in the processor's cache.
fn table_of(digest: &Digest) -> usize {
    let first = digest.as_bytes();
    (usize::from(first[0]) << 2 | usize::from(first[1]) >> 6) % TABLES
}

/// The hash within a table: none of the bits that chose the table where the table looks for a bucket (the lowest) or a tag
/// (the highest seven).
fn hash_of(digest: &Digest) -> u64 {
    digest.as_table_hash().rotate_right(24)
}

impl Slab {
    pub(crate) fn new() -> Self {
        let tables = std::iter::repeat_with(HashTable::new).take(TABLES).collect();
        Self { chunks: Vec::new(), vacant: EntryId::NONE, len: 0, tables }
    }

    /// Entries in use.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Ids given out so far are below this.
    pub(crate) fn end(&self) -> u32 {
        self.chunks.last().map_or(0, |last| ((self.chunks.len() - 1) * CHUNK + last.len()) as u32)
    }

    /// The entry, unless the id is vacant or was never given out.
    pub(crate) fn live(&self, id: u32) -> Option<&Entry> {
        self.chunks
            .get(id as usize / CHUNK)
            .and_then(|chunk| chunk.get(id as usize % CHUNK))
            .filter(|e| !e.has(Entry::VACANT))
    }

    pub(crate) fn find(&self, digest: &Digest) -> Option<EntryId> {
        let hash = hash_of(digest);
        self.tables[table_of(digest)].find(hash, |id| self[*id].digest == *digest).copied()
    }

    /// Adds an entry whose digest is not here.
    pub(crate) fn insert(&mut self, entry: Entry) -> EntryId {
        let (table, hash) = (table_of(&entry.digest), hash_of(&entry.digest));
        let id = match self.vacant.some() {
            Some(id) => {
                self.vacant = self[id].parent;
                self[id] = entry;
                id
            }
            None => {
                let id = EntryId(self.end());
                match self.chunks.last_mut().filter(|chunk| chunk.len() < CHUNK) {
                    Some(chunk) => chunk.push(entry),
                    None => {
                        let mut chunk = Vec::with_capacity(CHUNK);
                        chunk.push(entry);
                        self.chunks.push(chunk);
                    }
                }
                id
            }
        };
        let chunks = &self.chunks;
        self.tables[table]
            .insert_unique(hash, id, |id| hash_of(&chunks[id.0 as usize / CHUNK][id.0 as usize % CHUNK].digest));
        self.len += 1;
        id
    }

    /// Gives an entry back. It must have left every list. The last one to go takes all memory with it.
    pub(crate) fn remove(&mut self, id: EntryId) {
        let digest = self[id].digest;
        match self.tables[table_of(&digest)].find_entry(hash_of(&digest), |other| *other == id) {
            Ok(found) => {
                found.remove();
            }
            Err(_) => unreachable!("every entry in use is in its table"),
        }
        self.len -= 1;
        if self.len == 0 {
            // A chunk is kept, so that a directory that goes to and fro between none and one does not pay each time.
            self.chunks.truncate(1);
            self.chunks.iter_mut().for_each(Vec::clear);
            self.vacant = EntryId::NONE;
            for table in &mut self.tables {
                *table = HashTable::new();
            }
            return;
        }
        let vacant = self.vacant;
        let entry = &mut self[id];
        entry.parts = Parts::None;
        entry.flags = Entry::VACANT;
        entry.parent = vacant;
        self.vacant = id;
    }
}

impl Index<EntryId> for Slab {
    type Output = Entry;

    fn index(&self, id: EntryId) -> &Entry {
        &self.chunks[id.0 as usize / CHUNK][id.0 as usize % CHUNK]
    }
}

impl IndexMut<EntryId> for Slab {
    fn index_mut(&mut self, id: EntryId) -> &mut Entry {
        &mut self.chunks[id.0 as usize / CHUNK][id.0 as usize % CHUNK]
    }
}
