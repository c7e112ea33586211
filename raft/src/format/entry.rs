//! An entry of the log, and a command within it.
//!
//! Entry, behind the seal (whose kind is 0 for a command, 1 and 2 for changes of members, as raft numbers them):
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | term |
//! | 8 | 4 | m, bytes of the context |
//! | 12 | m | context: raft's, empty for what this crate proposes |
//! | 12 + m | n | data: a command or raft's own change of members; nothing in a leader's first entry |
//!
//! Command: travels in messages, too, where the seal does not.
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 1 | version, 1 |
//! | 1 | 8 | stamp of the leader that proposed it, ms |
//! | 9 | n | bytes of the state machine |

use raft::eraftpb::{Entry, EntryType};

use super::{Reader, seal};
use crate::error::{Error, ErrorKind, Result};

/// Version of commands.
pub const COMMAND_VERSION: u8 = 1;
const COMMAND_HEAD_BYTES: usize = 9;

/// An entry as stored under `key`.
pub fn encode(key: &[u8], entry: &Entry) -> Vec<u8> {
    let mut value = seal::unsealed(entry.entry_type as u8, 12 + entry.context.len() + entry.data.len());
    value.extend_from_slice(&entry.term.to_le_bytes());
    // A context is raft's, and a few bytes.
    value.extend_from_slice(&(entry.context.len() as u32).to_le_bytes());
    value.extend_from_slice(&entry.context);
    value.extend_from_slice(&entry.data);
    seal::seal(key, value)
}

/// Back.
///
/// # Errors
/// `Corrupt`, `NewerVersion`.
pub fn decode(key: &[u8], index: u64, value: &[u8]) -> Result<Entry> {
    let (kind, body) = seal::open(key, value)?;
    let entry_type = EntryType::from_i32(i32::from(kind))
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "an entry of an unknown kind").with("kind", kind))?;
    let mut r = Reader(body);
    let term = r.u64()?;
    let context = r.u32()? as usize;
    let context = r.take(context)?.to_vec();
    let mut entry = Entry { term, index, context, data: r.0.to_vec(), ..Entry::default() };
    entry.set_entry_type(entry_type);
    Ok(entry)
}

/// A command with the leader's stamp.
pub(crate) fn stamped(stamp_ms: u64, command: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(COMMAND_HEAD_BYTES + command.len());
    data.push(COMMAND_VERSION);
    data.extend_from_slice(&stamp_ms.to_le_bytes());
    data.extend_from_slice(command);
    data
}

/// Stamp and command.
///
/// # Errors
/// `NewerVersion`, `Corrupt`.
pub(crate) fn unstamped(data: &[u8]) -> Result<(u64, &[u8])> {
    let mut r = Reader(data);
    let version = r.take(1)?[0];
    if version != COMMAND_VERSION {
        return Err(Error::new(ErrorKind::NewerVersion, "a command of the raft log is of a newer version")
            .with("version", version));
    }
    Ok((r.u64()?, r.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entries_come_back(term: u64, index: u64, kind in 0..3i32, data: Vec<u8>, context: Vec<u8>) {
            let entry = Entry { entry_type: kind, term, index, data, context, sync_log: false };
            prop_assert_eq!(decode(b"k", index, &encode(b"k", &entry)).unwrap(), entry);
        }

        #[test]
        fn commands_come_back(stamp: u64, command: Vec<u8>) {
            let data = stamped(stamp, &command);
            prop_assert_eq!(unstamped(&data).unwrap(), (stamp, &command[..]));
        }

        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>) {
            let _ = unstamped(&body);
            let _ = decode(b"k", 1, &seal::sealed(b"k", &body));
        }
    }

    #[test]
    fn a_command_of_a_newer_version_is_named() {
        let mut data = stamped(1, b"x");
        data[0] += 1;
        assert_eq!(unstamped(&data).unwrap_err().kind(), ErrorKind::NewerVersion);
    }

    /// The format is final: these bytes are what every version reads.
    #[test]
    fn golden_entry() {
        let entry = Entry { term: 2, index: 7, data: stamped(5, b"hi"), ..Entry::default() };
        let value = encode(&crate::format::entry_key(crate::GroupId::ZERO, 7), &entry);
        let hex: String = value.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, GOLDEN);
    }

    const GOLDEN: &str = "010000000faed0000200000000000000000000000105000000000000006869";
}
