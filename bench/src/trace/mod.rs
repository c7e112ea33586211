//! Workloads: requests in the order of time, each with the prefix blocks of its input.
//!
//! [`reader`] takes published traces as they are (JSONL, plain or zstd); [`mod@line`] is its parser, where untrusted
//! bytes come in; [`synthetic`] makes a seeded multi-turn workload where no trace is given.

pub mod line;
pub mod reader;
pub mod synthetic;

use kvkeep_core::RequestKind;

use crate::keys::PrefixId;

/// Requests of one session are served in order; requests of different sessions may overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// One request to an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Counts from 0 in the order of the workload.
    pub number: u64,
    /// Milliseconds from the start of the workload.
    pub at_ms: u64,
    /// Whose.
    pub session: SessionId,
    /// What it is to the engine.
    pub kind: RequestKind,
    /// Tokens of its input.
    pub input_tokens: u32,
    /// Tokens of its output.
    pub output_tokens: u32,
    /// Its input, one id per started block of tokens.
    pub blocks: Vec<PrefixId>,
}

/// What a workload is, for the report.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Source {
    /// `mooncake`, `mooncake+sessions`, `qwen-bailian`, `synthetic`.
    pub format: &'static str,
    /// The file, or the seed.
    pub name: String,
    /// Tokens that one id covers.
    pub tokens_per_block: u32,
}

/// An opened workload.
pub struct Workload {
    /// What it is.
    pub source: Source,
    /// Its requests; a bad line ends it with an error that names the line.
    pub requests: Box<dyn Iterator<Item = anyhow::Result<Request>> + Send>,
    /// How many there are, where that is known.
    pub total: Option<u64>,
}
