//! [`Manifest`]: the chain of a session, by digest, in runs that forks share until one of them grows.

use std::sync::Arc;

use crate::ids::Digest;

/// Positions of a run: what placement keeps together, and what one stored value holds.
pub const RUN_POSITIONS: usize = 32;

/// Positions in order. All runs but the last are full.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    runs: Vec<Arc<Vec<Digest>>>,
    len: u64,
}

impl Manifest {
    /// Positions.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No positions.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Runs.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// One run.
    pub fn run(&self, n: usize) -> Option<&[Digest]> {
        self.runs.get(n).map(|run| &run[..])
    }

    /// Positions from `first` on.
    pub fn from(&self, first: u64) -> impl Iterator<Item = Digest> + '_ {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let runs = self.runs.iter().skip(first / RUN_POSITIONS);
        runs.flat_map(|run| run.iter().copied()).skip(first % RUN_POSITIONS)
    }

    /// All positions.
    pub fn iter(&self) -> impl Iterator<Item = Digest> + '_ {
        self.from(0)
    }

    /// Adds positions; the first run that changed.
    pub(super) fn push(&mut self, digests: &[Digest]) -> usize {
        let changed = usize::try_from(self.len).unwrap_or(usize::MAX) / RUN_POSITIONS;
        let mut rest = digests;
        while !rest.is_empty() {
            match self.runs.last_mut().filter(|run| run.len() < RUN_POSITIONS) {
                Some(run) => {
                    let (now, later) = rest.split_at(rest.len().min(RUN_POSITIONS - run.len()));
                    Arc::make_mut(run).extend_from_slice(now);
                    rest = later;
                }
                None => self.runs.push(Arc::default()),
            }
        }
        self.len += digests.len() as u64;
        changed
    }

    /// One whole run, as it was stored. `false`: the run before it is not full, or this one has no fitting length.
    pub(super) fn load_run(&mut self, digests: Vec<Digest>) -> bool {
        let full = self.len.is_multiple_of(RUN_POSITIONS as u64);
        if !full || digests.is_empty() || digests.len() > RUN_POSITIONS {
            return false;
        }
        self.len += digests.len() as u64;
        self.runs.push(Arc::new(digests));
        true
    }

    /// Keeps the first `len` positions.
    pub(super) fn truncate(&mut self, len: u64) {
        if len >= self.len {
            return;
        }
        let at = usize::try_from(len).unwrap_or(usize::MAX);
        self.runs.truncate(at.div_ceil(RUN_POSITIONS));
        if !at.is_multiple_of(RUN_POSITIONS)
            && let Some(run) = self.runs.last_mut()
        {
            Arc::make_mut(run).truncate(at % RUN_POSITIONS);
        }
        self.len = len;
    }

    /// The first `len` positions, sharing all whole runs.
    pub(super) fn first(&self, len: u64) -> Self {
        let mut first = self.clone();
        first.truncate(len);
        first
    }
}
