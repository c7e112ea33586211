//! The small records: of the store, and of each group. Behind the seal ([`super::seal`]), places counted from there.
//!
//! Store: whose log this is.
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | node |
//!
//! Hard state: what raft itself must not forget.
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | term |
//! | 8 | 8 | vote; 0 = nobody |
//! | 16 | 8 | commit, never below what is applied |
//!
//! Start of the log: the last entry that was cut off (or that a snapshot stands for).
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | index |
//! | 8 | 8 | term |
//!
//! Applied: how far the keys beside it are.
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | index |
//! | 8 | 8 | term |
//! | 16 | 8 | clock: the largest stamp that was applied, ms |
//! | 24 | 1 | flags: 1 = leaves its joint configuration by itself |
//! | 25 | 8 | members, u16 each: voters, outgoing voters, learners, learners to come |
//! | 33 | 8 n | their nodes, in that order |

use raft::eraftpb::{ConfState, HardState};

use super::{Reader, seal};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::NodeId;

/// Members of a group, of each kind.
pub const MEMBERS_MAX: usize = 64;

/// Whose log this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreRecord {
    /// The node.
    pub node: NodeId,
}

impl StoreRecord {
    /// As stored under [`super::STORE_KEY`].
    pub fn encode(self) -> Vec<u8> {
        seal::sealed(super::STORE_KEY, &self.node.number().to_le_bytes())
    }

    /// Back.
    ///
    /// # Errors
    /// `Corrupt`, `NewerVersion`.
    pub fn decode(value: &[u8]) -> Result<Self> {
        let mut r = Reader(seal::open(super::STORE_KEY, value)?.1);
        let node = NodeId::new(r.u64()?)?;
        r.end()?;
        Ok(Self { node })
    }
}

/// A hard state as stored under `key`.
pub fn encode_hard_state(key: &[u8], hs: &HardState) -> Vec<u8> {
    let mut value = seal::unsealed(0, 24);
    for n in [hs.term, hs.vote, hs.commit] {
        value.extend_from_slice(&n.to_le_bytes());
    }
    seal::seal(key, value)
}

/// Back.
///
/// # Errors
/// `Corrupt`, `NewerVersion`.
pub fn decode_hard_state(key: &[u8], value: &[u8]) -> Result<HardState> {
    let mut r = Reader(seal::open(key, value)?.1);
    let hs = HardState { term: r.u64()?, vote: r.u64()?, commit: r.u64()? };
    r.end()?;
    Ok(hs)
}

/// The entry before the first one that is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStart {
    /// Its index.
    pub index: u64,
    /// Its term.
    pub term: u64,
}

impl LogStart {
    /// As stored under `key`.
    pub fn encode(self, key: &[u8]) -> Vec<u8> {
        let mut value = seal::unsealed(0, 16);
        value.extend_from_slice(&self.index.to_le_bytes());
        value.extend_from_slice(&self.term.to_le_bytes());
        seal::seal(key, value)
    }

    /// Back.
    ///
    /// # Errors
    /// `Corrupt`, `NewerVersion`.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self> {
        let mut r = Reader(seal::open(key, value)?.1);
        let start = Self { index: r.u64()?, term: r.u64()? };
        r.end()?;
        Ok(start)
    }
}

/// How far a state machine has applied, and what raft must know of that moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Applied {
    /// Of the last entry.
    pub index: u64,
    /// Of the last entry.
    pub term: u64,
    /// The largest stamp so far, ms. Entries are given this, so it never goes back.
    pub clock_ms: u64,
    /// Who belongs to the group.
    pub members: ConfState,
}

impl Applied {
    /// As stored under `key`.
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let m = &self.members;
        let lists = [&m.voters, &m.voters_outgoing, &m.learners, &m.learners_next];
        let mut value = seal::unsealed(0, 33 + 8 * lists.iter().map(|l| l.len()).sum::<usize>());
        for n in [self.index, self.term, self.clock_ms] {
            value.extend_from_slice(&n.to_le_bytes());
        }
        value.push(u8::from(m.auto_leave));
        for list in lists {
            // Groups are refused more members than MEMBERS_MAX before this is written.
            value.extend_from_slice(&(list.len() as u16).to_le_bytes());
        }
        for node in lists.into_iter().flatten() {
            value.extend_from_slice(&node.to_le_bytes());
        }
        seal::seal(key, value)
    }

    /// Back.
    ///
    /// # Errors
    /// `Corrupt`, `NewerVersion`.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self> {
        let mut r = Reader(seal::open(key, value)?.1);
        let (index, term, clock_ms) = (r.u64()?, r.u64()?, r.u64()?);
        let auto_leave = r.take(1)?[0] & 1 != 0;
        let mut counts = [0; 4];
        for count in &mut counts {
            *count = usize::from(r.u16()?);
            if *count > MEMBERS_MAX {
                return Err(Error::new(ErrorKind::Corrupt, "a group has more members than it may have"));
            }
        }
        let mut lists = [const { Vec::new() }; 4];
        for (list, count) in lists.iter_mut().zip(counts) {
            for _ in 0..count {
                list.push(r.u64()?);
            }
        }
        r.end()?;
        let [voters, voters_outgoing, learners, learners_next] = lists;
        let members = ConfState { voters, learners, voters_outgoing, learners_next, auto_leave };
        Ok(Self { index, term, clock_ms, members })
    }
}

/// Refuses a group that is larger than its record can say.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn check_members(m: &ConfState) -> Result<()> {
    let most = [&m.voters, &m.voters_outgoing, &m.learners, &m.learners_next].into_iter().map(Vec::len).max();
    if most > Some(MEMBERS_MAX) {
        return Err(Error::new(ErrorKind::InvalidArgument, "a group has more members than it may have")
            .with("members_max", MEMBERS_MAX));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn applied_comes_back(
            index: u64, term: u64, clock_ms: u64, auto_leave: bool,
            lists in prop::array::uniform4(prop::collection::vec(any::<u64>(), 0..5)),
        ) {
            let [voters, learners, voters_outgoing, learners_next] = lists;
            let members = ConfState { voters, learners, voters_outgoing, learners_next, auto_leave };
            let applied = Applied { index, term, clock_ms, members };
            prop_assert_eq!(Applied::decode(b"k", &applied.encode(b"k")).unwrap(), applied);
        }

        #[test]
        fn the_small_ones_come_back(term: u64, vote: u64, commit: u64) {
            let hs = HardState { term, vote, commit };
            prop_assert_eq!(decode_hard_state(b"h", &encode_hard_state(b"h", &hs)).unwrap(), hs);
            let start = LogStart { index: commit, term };
            prop_assert_eq!(LogStart::decode(b"s", &start.encode(b"s")).unwrap(), start);
        }

        /// Behind a right checksum, too.
        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>) {
            let value = seal::sealed(b"k", &body);
            let _ = (Applied::decode(b"k", &value), LogStart::decode(b"k", &value), decode_hard_state(b"k", &value));
        }
    }

    #[test]
    fn a_store_knows_its_node() {
        let record = StoreRecord { node: NodeId::new(3).unwrap() };
        assert_eq!(StoreRecord::decode(&record.encode()).unwrap(), record);
    }
}
