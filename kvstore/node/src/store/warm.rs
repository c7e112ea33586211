//! The warm set: what was in DRAM at a clean stop comes back after the start, hottest first, bandwidth-limited.
//!
//! ```text
//! | at | size | field                                                   |
//! |----|------|---------------------------------------------------------|
//! |  0 |  4   | magic `KVW1`                                            |
//! |  4 |  4   | crc32 of what follows, little-endian                    |
//! |  8 | 24 n | per position, hottest first: digest 16, namespace u32,  |
//! |    |      | revision u32, little-endian                             |
//! ```
//! A hint, never a truth: a damaged or missing file costs warmth and nothing else.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::{Digest, Handle, InstanceId, NamespaceId, Revision};
use kvkeep_tiers::dram::Purpose;

use super::Store;
use super::put::Caller;

const MAGIC: &[u8; 4] = b"KVW1";
const ENTRY_BYTES: usize = 24;
/// Longest list, in positions.
const POSITIONS_MAX: usize = 1 << 22;

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("warm-set")
}

/// Encodes a list.
fn encode(list: &[(Digest, Handle)]) -> Vec<u8> {
    let mut body = Vec::with_capacity(list.len() * ENTRY_BYTES);
    for (digest, handle) in list {
        body.extend_from_slice(digest.as_bytes());
        body.extend_from_slice(&handle.namespace.0.to_le_bytes());
        body.extend_from_slice(&handle.revision.0.to_le_bytes());
    }
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// Decodes a list; `None` where anything is off.
fn decode(bytes: &[u8]) -> Option<Vec<(Digest, Handle)>> {
    let (head, body) = bytes.split_at_checked(8)?;
    let sum: [u8; 4] = head[4..].try_into().ok()?;
    if &head[..4] != MAGIC
        || u32::from_le_bytes(sum) != crc32fast::hash(body)
        || !body.len().is_multiple_of(ENTRY_BYTES)
    {
        return None;
    }
    body.chunks_exact(ENTRY_BYTES)
        .map(|e| {
            let number = |at: usize| Some(u32::from_le_bytes(e.get(at..at + 4)?.try_into().ok()?));
            let handle = Handle { namespace: NamespaceId(number(16)?), revision: Revision(number(20)?) };
            Some((Digest::from_slice(&e[..16]).ok()?, handle))
        })
        .collect()
}

impl Store {
    /// Writes the list at a clean stop.
    pub(super) fn save_warm_set(&self) {
        let list: Vec<_> = {
            let directory = self.directory.lock();
            let hottest = directory.hottest(kvkeep_core::Tier::Dram, POSITIONS_MAX);
            hottest.into_iter().filter_map(|d| Some((d, directory.view(&d)?.handle))).collect()
        };
        let path = path(&self.config.data_dir);
        let written = fs::File::create(&path).and_then(|mut f| f.write_all(&encode(&list)));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "the warm set was not written: the next start is cold");
        }
    }

    /// Brings the list back, in the background, until the arena reaches its watermark.
    pub(super) async fn load_warm_set(self: Arc<Self>) {
        let path = path(&self.config.data_dir);
        let Ok(bytes) = fs::read(&path) else { return };
        let _ = fs::remove_file(&path);
        let rate = self.config.nvme.warm_bytes_per_s.0;
        let Some(list) = decode(&bytes) else {
            tracing::warn!(path = %path.display(), "the warm set is damaged: starting cold");
            return;
        };
        if rate == 0 {
            return;
        }
        let (start, mut moved, mut parts_back) = (Instant::now(), 0u64, 0u64);
        for (digest, handle) in list {
            let usage = self.arena.usage();
            let reserve = usage.capacity_bytes / 100 * u64::from(self.config.arena.high_watermark_percent);
            if self.stopping.is_cancelled() || usage.free_bytes <= reserve {
                break;
            }
            let Some(namespace) = self.views.any(handle.namespace) else { continue };
            let caller = Caller { instance: InstanceId([0; 16]), tenant: namespace.tenant };
            for (id, found) in self.located(&digest).into_iter().filter(|(_, f)| f.slot.is_none()) {
                moved += u64::from(found.len);
                parts_back += 1;
                self.read_up(caller, &id, handle, None, &found, Purpose::Promote).await;
            }
            let due = Duration::from_secs_f64(moved as f64 / rate as f64);
            if let Some(early) = due.checked_sub(start.elapsed()) {
                tokio::time::sleep(early).await;
            }
        }
        tracing::info!(parts = parts_back, bytes = moved, seconds = start.elapsed().as_secs_f64(), "warm set is back");
    }
}

#[cfg(test)]
mod tests {
    use kvkeep_core::{DigestKey, KeyDomain};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_comes_back_as_it_was_and_a_changed_byte_is_noticed() {
        let handle = Handle { namespace: NamespaceId(3), revision: Revision(7) };
        let list: Vec<_> =
            (0..5u8).map(|i| (DigestKey::from_bytes([1; 16]).digest(KeyDomain(0), handle, &[i]), handle)).collect();
        let good = encode(&list);
        assert_eq!(decode(&good).unwrap(), list);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), None, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode(&bytes);
        }
    }
}
