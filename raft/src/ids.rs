//! Numbers with names. Index and term are plain u64, as raft itself spells them.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// A raft group. Group 0 holds what every node must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(u64);

impl GroupId {
    /// Of this number; the largest u64 is kept as an end for ranges of keys.
    ///
    /// # Errors
    /// `InvalidArgument` for that one.
    pub fn new(number: u64) -> Result<Self> {
        if number == u64::MAX {
            return Err(Error::new(ErrorKind::InvalidArgument, "no group has this number").with("group", number));
        }
        Ok(Self(number))
    }

    /// Group 0.
    pub const ZERO: Self = Self(0);

    /// The number.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A member of a group: the node it runs on. Raft takes 0 for "nobody".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

impl NodeId {
    /// Of this number.
    ///
    /// # Errors
    /// `InvalidArgument` for 0.
    pub fn new(number: u64) -> Result<Self> {
        if number == 0 {
            return Err(Error::new(ErrorKind::InvalidArgument, "no node has the number 0"));
        }
        Ok(Self(number))
    }

    /// The one node of a store that has no cluster.
    pub const ALONE: Self = Self(1);

    /// The number.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
