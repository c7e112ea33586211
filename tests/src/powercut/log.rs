//! The shim's log. Its layout is drawn in `tests/powercut/shim.c`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 4] = b"PCUT";
const HEADER_BYTES: usize = 64;

/// One change, or one flush.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// 1, 2, 3 ... in the order they were made.
    pub(super) number: u64,
    /// Of the file; of the folder where a name changes.
    pub(super) inode: u64,
    pub(super) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Bytes `[offset, offset + bytes)` changed; before they were `before`, and zeros behind it.
    Bytes {
        offset: u64,
        bytes: u64,
        old_size: u64,
        new_size: u64,
        before: Vec<u8>,
        truncates: bool,
    },
    /// A flush of the file, or of the folder's names, that covers every change up to this number.
    Flush {
        names: bool,
        covers: u64,
    },
    Create(PathBuf),
    Unlink {
        path: PathBuf,
        grave: PathBuf,
    },
    /// `grave` holds what `to` was, if it was something.
    Rename {
        from: PathBuf,
        to: PathBuf,
        grave: Option<PathBuf>,
    },
    MakeFolder(PathBuf),
    RemoveFolder(PathBuf),
}

/// Every whole record. The last one may be torn by the kill: then what it announces was not done.
///
/// # Panics
/// If the log is not one, or holds what cannot be undone.
pub(super) fn read(path: &Path) -> Vec<Record> {
    let log = fs::read(path).expect("the log can be read");
    let mut rest = &log[..];
    let mut records = Vec::new();
    while let Some((head, tail)) = rest.split_at_checked(HEADER_BYTES) {
        assert_eq!(&head[..4], MAGIC, "record {} of the log has no magic", records.len());
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let Some((data, next)) = tail.split_at_checked(number(56) as usize) else { break };
        let kind = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes"));
        let (offset, bytes, old_size, new_size) = (number(24), number(32), number(40), number(48));
        let mut names = data.split(|b| *b == 0).map(|n| PathBuf::from(OsString::from_vec(n.to_vec())));
        let mut name = || names.next().expect("the record has as many names as its kind");
        let what = match kind {
            1 | 2 => What::Bytes { offset, bytes, old_size, new_size, before: data.to_vec(), truncates: kind == 2 },
            3 | 9 => What::Flush { names: kind == 9, covers: offset },
            4 => What::Create(name()),
            5 => What::Unlink { path: name(), grave: name() },
            6 => What::Rename { from: name(), to: name(), grave: Some(name()).filter(|g| g.is_absolute()) },
            7 => What::MakeFolder(name()),
            8 => What::RemoveFolder(name()),
            10 => panic!("the power-cut shim cannot undo this: {}", String::from_utf8_lossy(data)),
            other => panic!("the log has a record of unknown kind {other}"),
        };
        // Each life counts from 1: what covers what cannot be told over two of them.
        let last = records.last().map_or(0, |r: &Record| r.number);
        assert!(number(8) > last, "the log has two lives of the server: cut the power at the end of each");
        records.push(Record { number: number(8), inode: number(16), what });
        rest = next;
    }
    records
}
