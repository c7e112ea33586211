//! Where one part lies in a client's memory: runs, of one region or several, that its bytes fill in order.

use std::sync::Arc;

use kvkeep_core::call_word::{begin_copy, end_copy};
use kvkeep_core::checksum::RunningSums;
use kvkeep_core::{Error, ErrorKind, InstanceId, Result};
use kvkeep_proto::v1;
use kvkeep_tiers::io::IoBuf;
use kvkeep_tiers::region::{Region, Runs, Word};

use crate::failpoint;
use crate::store::Store;

/// The runs of one part, checked.
pub struct Scatter {
    runs: Vec<(Arc<Region>, Runs)>,
    bytes: u64,
}

/// What a copy came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    /// The bytes moved.
    Yes,
    /// The client took its memory back: nothing that was copied counts.
    Revoked,
}

impl Scatter {
    /// Looks the regions up and checks that the runs lie in them. `runs_left`: how many the call may still name.
    pub fn open(store: &Store, instance: InstanceId, wish: v1::Scatter, runs_left: &mut u64) -> Result<Self> {
        let mut scatter = Self { runs: Vec::with_capacity(wish.runs.len()), bytes: 0 };
        for runs in wish.runs {
            let count = runs.count.max(1);
            *runs_left = runs_left.checked_sub(u64::from(count)).ok_or_else(|| {
                Error::new(ErrorKind::TooLarge, "the call names too many runs of memory; split it")
                    .with("limit", "limits.runs_max")
                    .with("max", store.config.limits.runs_max)
            })?;
            let region = store.region(instance, runs.region_id)?;
            let checked = Runs { offset: runs.offset, bytes: runs.run_bytes, stride: runs.stride, count };
            scatter.bytes += region.check(checked)?;
            scatter.runs.push((region, checked));
        }
        Ok(scatter)
    }

    /// Bytes of all runs.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether copies are memory accesses; else they are system calls that may wait.
    pub fn is_mapped(&self) -> bool {
        self.runs.iter().all(|(region, _)| region.is_mapped())
    }

    /// The memory as the destination of one device read of `len` bytes: one run of whole pages in a mapped region.
    pub fn io_buf(&self, len: u64) -> Option<IoBuf> {
        match &self.runs[..] {
            [(region, runs)] if runs.bytes >= len && runs.count == 1 => {
                region.io_buf(runs.offset, usize::try_from(len).ok()?)
            }
            _ => None,
        }
    }

    /// Copies `from` into the runs, as far as it reaches.
    pub fn write(&self, mut from: &[u8], word: Option<&Word>) -> Result<Copied> {
        self.guarded(word, |scatter| {
            for (region, runs) in &scatter.runs {
                for (offset, bytes) in runs.each() {
                    let (head, tail) = from.split_at(from.len().min(bytes as usize));
                    if head.is_empty() {
                        return Ok(());
                    }
                    region.write(offset, head)?;
                    from = tail;
                }
            }
            Ok(())
        })
    }

    /// Fills `to` from the runs, and sums what it was filled with.
    pub fn read(&self, mut to: &mut [u8], sums: &mut RunningSums, word: Option<&Word>) -> Result<Copied> {
        self.guarded(word, |scatter| {
            for (region, runs) in &scatter.runs {
                for (offset, bytes) in runs.each() {
                    let (head, tail) = std::mem::take(&mut to).split_at_mut(bytes as usize);
                    region.read(offset, head, sums)?;
                    to = tail;
                }
            }
            Ok(())
        })
    }

    fn guarded(&self, word: Option<&Word>, copy: impl FnOnce(&Self) -> Result<()>) -> Result<Copied> {
        let Some(word) = word else { return copy(self).map(|()| Copied::Yes) };
        if !begin_copy(word) {
            return Ok(Copied::Revoked);
        }
        failpoint::at("copy.guarded");
        let copied = copy(self);
        let counts = end_copy(word);
        copied.map(|()| if counts { Copied::Yes } else { Copied::Revoked })
    }
}

/// The word that guards a call, if it names one.
pub fn word(store: &Store, instance: InstanceId, wish: Option<v1::CallWord>) -> Result<Option<Word>> {
    match wish {
        Some(wish) if wish.region_id != 0 => store.region(instance, wish.region_id)?.word(wish.offset).map(Some),
        _ => Ok(None),
    }
}
