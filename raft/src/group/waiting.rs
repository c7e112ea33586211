//! Who waits for what: proposals for their place in the log to be applied, reads for the state to be recent enough.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};
use crate::machine::Reply;

/// What became of a command.
#[derive(Debug)]
pub struct Answer {
    /// Its place in the log.
    pub index: u64,
    /// What the state machine said.
    pub reply: Reply,
}

impl Answer {
    /// The reply as what it is.
    ///
    /// # Errors
    /// `Broken` if the state machine answers with something else.
    pub fn take<T: 'static>(self) -> Result<T> {
        let wrong = |_| Error::new(ErrorKind::Broken, "the state machine answered something else");
        self.reply.downcast::<T>().map(|reply| *reply).map_err(wrong)
    }
}

/// A share of the bounds on what is taken and not answered; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    requests: Arc<AtomicUsize>,
    bytes_taken: Arc<AtomicUsize>,
    bytes: usize,
}

impl Permit {
    /// One request of this many bytes, unless a bound would be passed.
    pub fn take(
        requests: &Arc<AtomicUsize>,
        requests_max: usize,
        bytes_taken: &Arc<AtomicUsize>,
        bytes_max: usize,
        bytes: usize,
    ) -> Option<Self> {
        let add = |to: &AtomicUsize, n: usize, max: usize| {
            to.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| now.checked_add(n).filter(|sum| *sum <= max))
                .is_ok()
        };
        if !add(requests, 1, requests_max) {
            return None;
        }
        if !add(bytes_taken, bytes, bytes_max) {
            requests.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        Some(Self { requests: Arc::clone(requests), bytes_taken: Arc::clone(bytes_taken), bytes })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.requests.fetch_sub(1, Ordering::AcqRel);
        self.bytes_taken.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Where an answer goes. Whoever has it finds its share of the bounds free.
#[derive(Debug)]
pub(crate) struct Asker<T> {
    pub answer: oneshot::Sender<Result<T>>,
    pub permit: Permit,
}

impl<T> Asker<T> {
    pub fn tell(self, answer: Result<T>) {
        drop(self.permit);
        // Someone who does not wait any more needs no answer.
        let _ = self.answer.send(answer);
    }
}

#[derive(Debug)]
struct Proposed {
    index: u64,
    term: u64,
    asker: Asker<Answer>,
}

#[derive(Debug)]
struct Read {
    id: u64,
    /// Known once the leader has said so.
    index: Option<u64>,
    asker: Asker<u64>,
}

/// All that wait in one group, on the node where they asked.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// By index.
    proposed: VecDeque<Proposed>,
    reads: VecDeque<Read>,
    next_read: u64,
}

impl Waiting {
    pub fn is_empty(&self) -> bool {
        self.proposed.is_empty() && self.reads.is_empty()
    }

    /// A proposal stands at this place in this node's log, which says nothing about its being committed.
    pub fn proposed(&mut self, index: u64, term: u64, asker: Asker<Answer>) {
        // A place that is given out again was lost with an earlier leadership, and those behind it.
        while let Some(lost) = self.proposed.pop_back_if(|p| p.index >= index) {
            lost.asker.tell(Err(superseded(lost.index, lost.term)));
        }
        self.proposed.push_back(Proposed { index, term, asker });
    }

    /// The entry at this place was applied: it is the proposal that waits for it only if the term is the same.
    pub fn applied(&mut self, index: u64, term: u64, reply: Reply) {
        self.skipped(index - 1);
        if let Some(p) = self.proposed.pop_front_if(|p| p.index == index) {
            p.asker.tell(if p.term == term {
                Ok(Answer { index, reply })
            } else {
                Err(superseded(index, p.term).with("taken_by_term", term))
            });
        }
    }

    /// Everything up to this index is in the state, by a snapshot: what it holds cannot be told from here.
    pub fn skipped(&mut self, index: u64) {
        while let Some(p) = self.proposed.pop_front_if(|p| p.index <= index) {
            p.asker.tell(Err(unknown("a snapshot took its place")));
        }
    }

    /// A read that waits for its index; the id is what raft is asked with.
    pub fn read(&mut self, asker: Asker<u64>) -> u64 {
        self.next_read += 1;
        self.reads.push_back(Read { id: self.next_read, index: None, asker });
        self.next_read
    }

    /// Raft knows the index of a read.
    pub fn read_index(&mut self, id: u64, index: u64) {
        if let Some(read) = self.reads.iter_mut().find(|r| r.id == id) {
            read.index = Some(index);
        }
    }

    /// Reads that raft must be asked for once more: it drops requests without a word while there is no leader, and while a
    /// new leader has committed nothing in its term.
    pub fn reads_without_index(&mut self) -> Vec<u64> {
        self.reads.retain(|r| !r.asker.answer.is_closed());
        self.reads.iter().filter(|r| r.index.is_none()).map(|r| r.id).collect()
    }

    /// Answers the reads that `applied` is enough for.
    pub fn answer_reads(&mut self, applied: u64) {
        let mut at = 0;
        while at < self.reads.len() {
            if self.reads[at].index.is_some_and(|index| index <= applied)
                && let Some(read) = self.reads.remove(at)
            {
                read.asker.tell(Ok(applied));
            } else {
                at += 1;
            }
        }
    }

    /// The group ends: what was taken may have been applied or not.
    pub fn fail(&mut self, error: &Error) {
        for p in self.proposed.drain(..) {
            p.asker.tell(Err(unknown("the group failed").with("cause", error)));
        }
        for read in self.reads.drain(..) {
            read.asker.tell(Err(error.clone()));
        }
    }
}

fn superseded(index: u64, term: u64) -> Error {
    Error::new(ErrorKind::Superseded, "another leader's entry took the place of the command")
        .with("index", index)
        .with("term", term)
}

fn unknown(why: &'static str) -> Error {
    Error::new(ErrorKind::Unknown, "the end of the command was not seen: it may be applied or not").with("why", why)
}
