//! The bytes of one file of a [`SimDisk`](super::SimDisk): what is durable, and page by page what was written since.

use std::collections::BTreeMap;

use super::faults::Dice;
use crate::io::buf::IO_ALIGN;
use crate::io::disk::FileId;

/// What a device writes at once even when the power goes, bytes.
const SECTOR: usize = 512;

/// A page as some write left it.
struct Written {
    /// The file's clock when it was written.
    at: u64,
    /// A flush that covered it has failed: it can be read until the power goes, and no flush will save it.
    forsaken: bool,
    bytes: Box<[u8]>,
}

pub(super) struct SimFile {
    /// Set while it is open.
    pub(super) id: Option<FileId>,
    durable: Vec<u8>,
    /// By page number, what was written and not flushed, oldest first. A power cut may leave any of them.
    volatile: BTreeMap<u64, Vec<Written>>,
    clock: u64,
}

impl SimFile {
    pub(super) fn new(id: FileId, bytes: u64) -> Self {
        Self { id: Some(id), durable: vec![0; bytes as usize], volatile: BTreeMap::new(), clock: 0 }
    }

    pub(super) fn len(&self) -> u64 {
        self.durable.len() as u64
    }

    /// Writes served so far.
    pub(super) fn clock(&self) -> u64 {
        self.clock
    }

    /// Reads what lies from `at` on; fewer bytes at the end of the file.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> usize {
        let bytes = into.len().min(self.len().saturating_sub(at) as usize);
        for (n, chunk) in into[..bytes].chunks_mut(IO_ALIGN).enumerate() {
            let offset = at as usize + n * IO_ALIGN;
            match self.volatile.get(&((offset / IO_ALIGN) as u64)).and_then(|versions| versions.last()) {
                Some(newest) => chunk.copy_from_slice(&newest.bytes[..chunk.len()]),
                None => chunk.copy_from_slice(&self.durable[offset..offset + chunk.len()]),
            }
        }
        bytes
    }

    /// Writes whole pages inside the file.
    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.clock += 1;
        for (n, page) in bytes.chunks(IO_ALIGN).enumerate() {
            let page_no = at / IO_ALIGN as u64 + n as u64;
            self.volatile.entry(page_no).or_default().push(Written {
                at: self.clock,
                forsaken: false,
                bytes: page.into(),
            });
        }
    }

    /// Makes durable what had been written when the clock showed `begun`.
    pub(super) fn flush(&mut self, begun: u64) {
        let durable = &mut self.durable;
        self.volatile.retain(|page, versions| {
            let covered = versions.partition_point(|v| v.at <= begun);
            if covered > 0 && !versions[covered - 1].forsaken {
                let start = *page as usize * IO_ALIGN;
                let end = (start + IO_ALIGN).min(durable.len());
                durable[start..end].copy_from_slice(&versions[covered - 1].bytes[..end - start]);
                versions.drain(..covered);
            }
            !versions.is_empty()
        });
    }

    /// A flush begun when the clock showed `begun` has failed: the kernel now takes these pages for clean.
    pub(super) fn flush_failed(&mut self, begun: u64) {
        for version in self.volatile.values_mut().flatten().filter(|v| v.at <= begun) {
            version.forsaken = true;
        }
    }

    /// The power goes.
    pub(super) fn cut(&mut self, dice: &mut Dice) {
        for (page, versions) in std::mem::take(&mut self.volatile) {
            let start = page as usize * IO_ALIGN;
            let old = &mut self.durable[start..][..versions[0].bytes.len()];
            let version = |n: u64| (n > 0).then(|| &versions[n as usize - 1].bytes);
            let candidates = versions.len() as u64 + 1;
            let mut page = old.to_vec();
            // Mostly whole: the newest, or any; one page in three is torn between two versions.
            let first = if dice.one_in(2) { candidates - 1 } else { dice.below(candidates) };
            if let Some(bytes) = version(first) {
                page.copy_from_slice(bytes);
            }
            if dice.one_in(3) {
                let from = SECTOR * (1 + dice.below((IO_ALIGN / SECTOR - 1) as u64) as usize);
                match version(dice.below(candidates)) {
                    Some(bytes) => page[from..].copy_from_slice(&bytes[from..]),
                    None => page[from..].copy_from_slice(&old[from..]),
                }
            }
            old.copy_from_slice(&page);
        }
    }

    pub(super) fn truncate(&mut self, bytes: u64) {
        self.durable.truncate(bytes as usize);
        self.volatile.retain(|page, _| page * (IO_ALIGN as u64) < bytes);
        let tail = bytes as usize % IO_ALIGN;
        if let Some(versions) = self.volatile.get_mut(&(bytes / IO_ALIGN as u64)) {
            for version in versions {
                version.bytes = version.bytes[..tail].into();
            }
        }
    }

    pub(super) fn flip_durably(&mut self, bit: u64) {
        let offset = bit / 8;
        let mut byte = [0];
        self.read_bytes(offset, &mut byte);
        self.overwrite_durably(offset, &[byte[0] ^ (1 << (bit % 8))]);
    }

    pub(super) fn overwrite_durably(&mut self, offset: u64, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let at = offset as usize + n;
            self.durable[at] = *byte;
            for version in self.volatile.get_mut(&((at / IO_ALIGN) as u64)).into_iter().flatten() {
                version.bytes[at % IO_ALIGN] = *byte;
            }
        }
    }

    fn read_bytes(&self, offset: u64, into: &mut [u8]) {
        let mut page = vec![0; IO_ALIGN];
        let start = offset - offset % IO_ALIGN as u64;
        self.read(start, &mut page);
        into.copy_from_slice(&page[(offset - start) as usize..][..into.len()]);
    }
}
