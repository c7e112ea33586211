//! A session as one file: to keep it, to carry it to another cluster, to look at it.
//!
//! ```text
//! head      magic  version  n  header (n bytes of JSON)                                   crc32
//! records   kind   length   body                                                          crc32
//!             tokens    first token, ids          ─┐ in order, from 0
//!             content   first token, tokens, id   ─┘
//!             position  index, parts, reason, digest, key   ─┐ for each position
//!             part      group, shard, payload                ─┘ for each of its parts that was here
//!             end       counts, crc32 of everything before this record
//! ```
//! `docs/formats.md` has the bytes. The header is a [`FileHeader`]: enough to make the namespace anew. Every byte is under a
//! checksum, every record has one place where it may stand, and nothing may follow the end: a file that was cut, bent or
//! put together otherwise is refused, with the place ([`kvkeep_core::ErrorKind::Corrupt`], `at_byte`).
//!
//! Both ways memory is bounded: payload goes through in windows of [`WINDOW_BYTES`] (or one position, where that is larger),
//! keys and token ids are kept and have named limits. An import reads the file twice: first it checks all of it and changes
//! nothing; then it puts the blocks; the session is made when they are there.

mod check;
mod export;
mod import;
mod reader;
mod record;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;

use kvkeep_core::{Class, ErrorKind as CoreKind, Format};
use kvkeep_proto::v1;
use serde::{Deserialize, Serialize};

use crate::convert;
use crate::error::{Error, ErrorKind, Result};

pub use export::{Export, Exported};
pub use import::{Import, Imported};
pub use reader::{FileContents, inspect, read_header};

/// Version of the layout.
pub const FILE_VERSION: u32 = 1;
/// Payload that is held at a time, bytes.
pub const WINDOW_BYTES: u64 = 32 << 20;
/// Payload of the largest position that is exported, bytes.
pub const POSITION_BYTES_MAX: u64 = 1 << 30;
/// Most positions of one file.
pub const POSITIONS_MAX: u64 = 1 << 20;
/// Most token ids of one file.
pub const TOKENS_MAX: u64 = 1 << 24;
/// Most content parts of one file.
pub const CONTENT_MAX: u64 = 1 << 16;
/// Longest header, bytes.
pub const HEADER_BYTES_MAX: u32 = 1 << 20;

/// What the header says it is.
const WHAT: &str = "kvkeep session";

/// A namespace, as far as a file must know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its name.
    pub namespace: String,
    /// How its KV looks.
    pub format: Format,
    /// Of the weights that it holds.
    pub revision_digest: String,
}

impl Origin {
    /// From what a node tells of its namespaces.
    pub fn from_info(info: &v1::NamespaceInfo) -> Result<Self> {
        Ok(Self {
            namespace: info.name.clone(),
            format: convert::format_from_proto(info.format.clone())?,
            revision_digest: info.revision_digest.clone(),
        })
    }
}

/// What a file says of itself and of its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHeader {
    what: String,
    /// Program that wrote it.
    pub written_by: String,
    /// Name of the namespace it comes from.
    pub namespace: String,
    /// Of that namespace.
    pub format: Format,
    /// Of the format, as hexadecimal.
    pub fingerprint: String,
    /// Of the weights that the blocks were computed with.
    pub revision_digest: String,
    /// What it was.
    pub session: FileSession,
}

/// A session, as a file describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSession {
    /// Its name.
    pub id: String,
    /// Of its blocks.
    pub class: Class,
    /// It took no appends any more.
    pub closed: bool,
    /// Without a change for so long it is deleted; 0: never.
    pub ttl_ms: u64,
    /// Higher stays longer.
    pub priority: i32,
    /// What the caller finds it by.
    pub attributes: BTreeMap<String, String>,
    /// That it had; the file has a record of each.
    pub positions: u64,
    /// Whose ids were kept; fewer in the file where some were damaged.
    pub tokens: u64,
    /// Wall clock of where it comes from.
    pub created_unix_ms: u64,
    /// Wall clock of where it comes from.
    pub changed_unix_ms: u64,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileCounts {
    /// Positions, missing ones included.
    pub positions: u64,
    /// Of which no part is in the file.
    pub missing: u64,
    /// Of which some parts are in the file, and not all.
    pub incomplete: u64,
    /// Parts.
    pub parts: u64,
    /// Payload of the parts.
    pub bytes: u64,
    /// Token ids.
    pub tokens: u64,
    /// Content parts.
    pub content: u64,
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Read from the store, written to the file.
    Exporting,
    /// Read from the file, compared with its checksums.
    Checking,
    /// Read from the file, put into the store.
    Storing,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileProgress {
    /// What is done.
    pub stage: Stage,
    /// Positions behind it.
    pub positions: u64,
    /// Of the session.
    pub total_positions: u64,
    /// Payload behind it, bytes.
    pub bytes: u64,
}

/// Told how far it is.
pub type OnProgress<'a> = &'a mut (dyn FnMut(FileProgress) + Send);

impl FileHeader {
    /// The namespace it comes from.
    pub fn origin(&self) -> Origin {
        Origin {
            namespace: self.namespace.clone(),
            format: self.format.clone(),
            revision_digest: self.revision_digest.clone(),
        }
    }

    /// Checks what a file says of itself.
    fn validate(&self) -> Result<()> {
        let bad = |field: &'static str| corrupt("the header of the file makes no sense").with("field", field);
        if self.what != WHAT {
            return Err(bad("what"));
        }
        self.format.validate().map_err(|e| bad("format").with("why", e.message()))?;
        if self.fingerprint != self.format.fingerprint().to_string() {
            return Err(bad("fingerprint"));
        }
        if !(1..=256).contains(&self.session.id.len()) {
            return Err(bad("session.id"));
        }
        within_limits(self.session.positions, self.session.tokens)
    }
}

/// Refuses what no file may hold.
fn within_limits(positions: u64, tokens: u64) -> Result<()> {
    for (what, n, max) in [("positions", positions, POSITIONS_MAX), ("tokens", tokens, TOKENS_MAX)] {
        if n > max {
            let message = "the session is larger than a session file may be";
            return Err(Error::new(ErrorKind::Refused(CoreKind::TooLarge), message).with(what, n).with("at_most", max));
        }
    }
    Ok(())
}

fn corrupt(message: &'static str) -> Error {
    Error::new(ErrorKind::Refused(CoreKind::Corrupt), message)
}

fn io(message: &'static str, e: std::io::Error) -> Error {
    Error::new(ErrorKind::Refused(CoreKind::Io), message).with("why", &e).caused_by(e)
}
