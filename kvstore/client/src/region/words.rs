//! Call words: one per call that names memory, in a small region of their own.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvkeep_core::call_word::{CALL_WORD_BYTES, is_settled, revoke};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::Region;
use crate::error::Result;

/// Bytes of the region of words: far more words than calls can be in flight.
const BYTES: usize = 64 << 10;
/// The server's process has ended, and its disk may still be writing what it asked for: for so long at most.
const DEVICE_GRACE: Duration = Duration::from_secs(1);

/// All words of a client.
#[derive(Default)]
pub(crate) struct Words(Mutex<State>);

#[derive(Default)]
struct State {
    region: Option<Region>,
    free: Vec<usize>,
    doubts: Vec<Doubt>,
}

/// Memory that a server may still be writing.
struct Doubt {
    offset: usize,
    server: Option<Arc<OwnedFd>>,
    ended: Option<Instant>,
}

/// The word of one call. Dropped without [`Word::answered`] it takes the call's memory back.
pub(crate) struct Word {
    words: Arc<Words>,
    pub(crate) region: Region,
    pub(crate) offset: usize,
    server: Option<Arc<OwnedFd>>,
    open: bool,
}

impl Words {
    /// A word for a call to this server.
    pub(crate) fn take(self: &Arc<Self>, server: Option<Arc<OwnedFd>>) -> Result<Option<Word>> {
        let mut state = self.0.lock();
        if state.region.is_none() {
            state.region = Some(Region::new(BYTES)?);
            state.free = (0..BYTES / CALL_WORD_BYTES).map(|n| n * CALL_WORD_BYTES).collect();
        }
        let (Some(region), Some(offset)) = (state.region.clone(), state.free.pop()) else { return Ok(None) };
        region.memory().word(offset).store(0, Ordering::SeqCst);
        Ok(Some(Word { words: Arc::clone(self), region, offset, server, open: true }))
    }

    /// Servers of before know the words' region no more.
    pub(crate) fn forget(&self, instance: kvkeep_core::InstanceId) {
        if let Some(region) = &self.0.lock().region {
            region.forget(instance);
        }
    }

    /// Looks after memory in doubt; how many calls' memory still is.
    pub(crate) fn settle(&self) -> usize {
        let mut state = self.0.lock();
        let Some(region) = state.region.clone() else { return 0 };
        let mut doubts = std::mem::take(&mut state.doubts);
        let settled = |d: &mut Doubt| {
            let over = is_settled(region.memory().word(d.offset));
            if !over && d.ended.is_none() && d.server.as_deref().is_some_and(ended) {
                d.ended = Some(Instant::now());
            }
            over || d.ended.is_some_and(|since| since.elapsed() >= DEVICE_GRACE)
        };
        let freed: Vec<usize> = doubts.extract_if(.., settled).map(|d| d.offset).collect();
        state.free.extend(freed);
        state.doubts = doubts;
        state.doubts.len()
    }
}

fn ended(process: &OwnedFd) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
}

impl Word {
    /// The call was answered: its memory is the caller's.
    pub(crate) fn answered(mut self) {
        self.open = false;
        self.words.0.lock().free.push(self.offset);
    }

    /// Takes the memory back; `false`: a copy is under way, and the memory is in doubt.
    pub(crate) fn take_back(mut self) -> bool {
        self.close()
    }

    fn close(&mut self) -> bool {
        self.open = false;
        let settled = revoke(self.region.memory().word(self.offset));
        let mut state = self.words.0.lock();
        if settled {
            state.free.push(self.offset);
        } else {
            state.doubts.push(Doubt { offset: self.offset, server: self.server.take(), ended: None });
        }
        settled
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        if self.open {
            self.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvkeep_core::call_word::{begin_copy, end_copy};

    #[test]
    fn a_call_given_up_in_the_middle_of_a_copy_leaves_its_memory_in_doubt_until_the_copy_ends() {
        let words = Arc::new(Words::default());
        let word = words.take(None).unwrap().unwrap();
        let (region, offset) = (word.region.clone(), word.offset);
        let servers = region.memory().word(offset);
        assert!(begin_copy(servers));
        assert!(!word.take_back());
        assert_eq!(words.settle(), 1);
        assert!(!begin_copy(servers), "no copy begins any more");
        assert!(!end_copy(servers));
        assert_eq!(words.settle(), 0);
        drop(words.take(None).unwrap().unwrap());
        assert_eq!(words.settle(), 0, "a call that was dropped before the server began leaves no doubt");
    }
}
