//! What the log holds, byte by byte. This format is final: another one raises a version, and a newer version is refused by
//! name.
//!
//! Keys. Groups and indexes are big-endian, so that a group is one range and its entries stand in order:
//!
//! | table | key | value |
//! |---|---|---|
//! | meta | `v` | [store record](records::StoreRecord) |
//! | meta | `g`, group 8, `h` | [hard state](records::encode_hard_state) |
//! | meta | `g`, group 8, `s` | [start of the log](records::LogStart) |
//! | log | group 8, index 8 | [`entry`] |
//! | state | group 8, 0 | [how far the state machine has applied](records::Applied) |
//! | state | group 8, 1, key of the state machine | bytes of the state machine |
//!
//! What a group has applied stands before what it made of it, in one range: one scan of it is one moment.
//!
//! Every value begins with the same eight bytes ([`seal`]), little-endian as all numbers in values:
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 1 | version of this kind of value, 1 |
//! | 1 | 1 | kind of entry; elsewhere 0 |
//! | 2 | 2 | zeros |
//! | 4 | 4 | crc32 of key and value, these four as zero |
//! | 8 | n | the value itself |

pub mod entry;
pub mod records;
pub mod seal;
pub mod snapshot;

use crate::error::{Error, ErrorKind, Result};
use crate::ids::GroupId;

/// Key of the store's own record.
pub const STORE_KEY: &[u8] = b"v";

const GROUP_TAG: u8 = b'g';
const APPLIED_TAG: u8 = 0;
const MACHINE_TAG: u8 = 1;

fn group_record(group: GroupId, tag: u8) -> Vec<u8> {
    let mut key = Vec::with_capacity(10);
    key.push(GROUP_TAG);
    key.extend_from_slice(&group.number().to_be_bytes());
    key.push(tag);
    key
}

/// Key of a group's hard state.
pub fn hard_state_key(group: GroupId) -> Vec<u8> {
    group_record(group, b'h')
}

/// Key of where a group's log starts.
pub fn log_start_key(group: GroupId) -> Vec<u8> {
    group_record(group, b's')
}

/// Where the records of all groups begin in the table of them.
pub const GROUPS_FROM: &[u8] = &[GROUP_TAG];

/// The group whose hard state has this key; `None` for any other key.
pub fn group_of_hard_state(key: &[u8]) -> Option<GroupId> {
    let (tag, rest) = key.split_first()?;
    let (number, kind) = rest.split_first_chunk::<8>()?;
    let group = GroupId::new(u64::from_be_bytes(*number)).ok()?;
    (*tag == GROUP_TAG && kind == b"h").then_some(group)
}

/// Key of an entry.
pub fn entry_key(group: GroupId, index: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(16);
    key.extend_from_slice(&group.number().to_be_bytes());
    key.extend_from_slice(&index.to_be_bytes());
    key
}

/// The index in an entry's key, if it is of this group.
pub fn entry_index(group: GroupId, key: &[u8]) -> Option<u64> {
    let index = key.strip_prefix(&group.number().to_be_bytes())?;
    Some(u64::from_be_bytes(index.try_into().ok()?))
}

/// Where a group's part of a table begins. The part of the next number is where it ends.
pub fn group_from(group: GroupId) -> Vec<u8> {
    group.number().to_be_bytes().to_vec()
}

/// The first key behind a group's part of a table.
pub fn group_to(group: GroupId) -> Vec<u8> {
    // A group's number is never the largest u64.
    (group.number() + 1).to_be_bytes().to_vec()
}

/// Key of how far a group has applied.
pub fn applied_key(group: GroupId) -> Vec<u8> {
    let mut key = group_from(group);
    key.push(APPLIED_TAG);
    key
}

/// Key of what a group's state machine keeps under `key`.
pub fn state_key(group: GroupId, key: &[u8]) -> Vec<u8> {
    let mut whole = Vec::with_capacity(9 + key.len());
    whole.extend_from_slice(&group.number().to_be_bytes());
    whole.push(MACHINE_TAG);
    whole.extend_from_slice(key);
    whole
}

/// The state machine's part of a key in the table of states; `None` if it is not this group's.
pub fn machine_key(group: GroupId, key: &[u8]) -> Option<&[u8]> {
    key.strip_prefix(&group.number().to_be_bytes())?.strip_prefix(&[MACHINE_TAG])
}

/// Reads numbers off the front of a value. Whatever is missing is damage.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(bytes).ok_or_else(too_short)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(too_short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<()> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Corrupt, "a value is longer than its fields"))
        }
    }
}

fn too_short() -> Error {
    Error::new(ErrorKind::Corrupt, "a value is shorter than its fields")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stand_in_order_and_tell_whose_they_are() {
        let (a, b) = (GroupId::new(1).unwrap(), GroupId::new(256).unwrap());
        let keys = [entry_key(GroupId::ZERO, u64::MAX), entry_key(a, 1), entry_key(a, 256), entry_key(b, 1)];
        assert!(keys.is_sorted());
        assert_eq!(entry_index(a, &keys[2]), Some(256));
        assert_eq!(entry_index(b, &keys[2]), None);
        assert!(applied_key(a) < state_key(a, b"") && state_key(a, &[255; 9]) < group_to(a));
        assert_eq!(machine_key(a, &state_key(a, b"k")), Some(&b"k"[..]));
        assert_eq!(machine_key(a, &applied_key(a)), None);
        assert_eq!(group_of_hard_state(&hard_state_key(b)), Some(b));
        assert_eq!(group_of_hard_state(&log_start_key(b)), None);
    }
}
