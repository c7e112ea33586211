//! Call words: one per call that names memory, in a small region of their own.
//!
//! A word is used again only where its call was answered: then the server is done with it. One that was revoked stays
//! revoked for good, for a server that was stopped before its copy looks at it whenever it wakes up, and what a later
//! call made of the word must not let it in. So a call that was given up costs its word; when those of a region are
//! used up, a new region takes its place. The server keeps the old one at least for as long as a call there knows a
//! word of it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvkeep_core::call_word::{CALL_WORD_BYTES, is_settled, revoke};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::Region;
use crate::error::Result;

/// Bytes of the first region of words: far more words than calls can be in flight.
const BYTES: usize = 64 << 10;
/// Each that takes its place is twice as large, up to this: a server takes so many regions of one client and no more,
/// and it knows those of before for as long as this client stays connected.
const BYTES_MAX: usize = 4 << 20;
/// The server's process has ended, and its disk may still be writing what it asked for: for so long at most.
const DEVICE_GRACE: Duration = Duration::from_secs(1);

/// All words of a client.
#[derive(Default)]
pub(crate) struct Words(Mutex<State>);

#[derive(Default)]
struct State {
    region: Option<Region>,
    /// Of the region.
    free: Vec<usize>,
    /// Words of the region that are revoked.
    spent: usize,
    doubts: Vec<Doubt>,
}

/// Memory that a server may still be writing.
struct Doubt {
    region: Region,
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
        // With none free and none spent all are in flight, and come back.
        if state.region.is_none() || (state.free.is_empty() && state.spent > 0) {
            let bytes = state.region.as_ref().map_or(BYTES, |before| (before.len() * 2).min(BYTES_MAX));
            state.region = Some(Region::new(bytes)?);
            state.free = (0..bytes / CALL_WORD_BYTES).map(|n| n * CALL_WORD_BYTES).collect();
            state.spent = 0;
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
        state.doubts.retain_mut(|d| {
            let over = is_settled(d.region.memory().word(d.offset));
            if !over && d.ended.is_none() && d.server.as_deref().is_some_and(ended) {
                d.ended = Some(Instant::now());
            }
            !over && d.ended.is_none_or(|since| since.elapsed() < DEVICE_GRACE)
        });
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
        let mut state = self.words.0.lock();
        if state.region.as_ref().is_some_and(|now| now.is(&self.region)) {
            state.free.push(self.offset);
        }
    }

    /// Takes the memory back; `false`: a copy is under way, and the memory is in doubt.
    pub(crate) fn take_back(mut self) -> bool {
        self.close()
    }

    fn close(&mut self) -> bool {
        self.open = false;
        let settled = revoke(self.region.memory().word(self.offset));
        let mut state = self.words.0.lock();
        if state.region.as_ref().is_some_and(|now| now.is(&self.region)) {
            state.spent += 1;
        }
        if !settled {
            let (region, server) = (self.region.clone(), self.server.take());
            state.doubts.push(Doubt { region, offset: self.offset, server, ended: None });
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

    #[test]
    fn a_server_that_wakes_up_late_finds_the_word_of_a_call_given_up_revoked_whatever_was_called_since() {
        let words = Arc::new(Words::default());
        // A call that is given up before the server looked at its word.
        let given_up = words.take(None).unwrap().unwrap();
        let (region, offset) = (given_up.region.clone(), given_up.offset);
        assert!(given_up.take_back());
        // Calls enough to have used every word there is.
        let calls = BYTES / CALL_WORD_BYTES + 10;
        let later: Vec<Word> = (0..calls).map_while(|_| words.take(None).unwrap()).collect();
        assert_eq!(later.len(), calls, "a region that is used up is replaced");
        assert!(later.iter().all(|word| !word.region.is(&region) || word.offset != offset));
        assert!(!begin_copy(region.memory().word(offset)), "the memory of that call is its caller's, for good");
        // Those that are answered are used again; those of the region of before are not.
        later.into_iter().for_each(Word::answered);
        let state = words.0.lock();
        assert_eq!((state.free.len(), state.spent), (2 * BYTES / CALL_WORD_BYTES, 0));
    }
}
