//! The one error type of this crate: what, may I retry, and where.
//!
//! What is ordinary is a value: a full queue is [`crate::Proposed::Overloaded`].

use std::fmt;

/// What kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The argument can never be right: a command that is too large, a group number out of range.
    InvalidArgument,
    /// This node holds no such group.
    UnknownGroup,
    /// The group, or the log, is there already or open elsewhere.
    Conflict,
    /// Another node leads the group, or nobody does yet.
    NotLeader,
    /// Another entry took the place in the log: the command was not applied and will not be.
    Superseded,
    /// The command was taken and its end was not seen: it may be applied or not. Ask the state.
    Unknown,
    /// The host is stopping, or has stopped: nothing was taken.
    Stopped,
    /// The disk failed. The log takes nothing more until it is opened again; what was acknowledged before is safe.
    Poisoned,
    /// Reading or writing failed.
    Io,
    /// Stored bytes are not what was written.
    Corrupt,
    /// Stored bytes are of a version that this program does not know.
    NewerVersion,
    /// The state machine could not take a committed command: the group stands still rather than diverge.
    Machine,
    /// A rule of this crate or of raft was broken; the group stands still.
    Broken,
}

impl ErrorKind {
    /// The word used in logs and metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::UnknownGroup => "unknown_group",
            Self::Conflict => "conflict",
            Self::NotLeader => "not_leader",
            Self::Superseded => "superseded",
            Self::Unknown => "unknown",
            Self::Stopped => "stopped",
            Self::Poisoned => "poisoned",
            Self::Io => "io",
            Self::Corrupt => "corrupt",
            Self::NewerVersion => "newer_version",
            Self::Machine => "machine",
            Self::Broken => "broken",
        }
    }
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure a person can act on: kind, message, fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: &'static str,
    context: Vec<(&'static str, String)>,
}

impl Error {
    /// `message` is lowercase, without a full stop, and says what to do where that is not obvious.
    pub fn new(kind: ErrorKind, message: &'static str) -> Self {
        Self { kind, message, context: Vec::new() }
    }

    /// Adds a field.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.context.push((name, value.to_string()));
        self
    }

    /// What kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message without its fields.
    pub fn message(&self) -> &'static str {
        self.message
    }

    /// The fields, in the order they were added.
    pub fn context(&self) -> &[(&'static str, String)] {
        &self.context
    }

    /// Whether the same call can succeed later, and cannot have taken effect now.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::NotLeader | ErrorKind::Superseded)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.word(), self.message)?;
        for (i, (name, value)) in self.context.iter().enumerate() {
            write!(f, "{}{name}={value}", if i == 0 { " (" } else { ", " })?;
        }
        if !self.context.is_empty() {
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<kvkeep_rocks::Error> for Error {
    fn from(e: kvkeep_rocks::Error) -> Self {
        let (kind, message) = match e.kind() {
            kvkeep_rocks::ErrorKind::Busy => (ErrorKind::Conflict, "another process has this raft log open"),
            kvkeep_rocks::ErrorKind::Corrupt => (ErrorKind::Corrupt, "the raft log is damaged"),
            kvkeep_rocks::ErrorKind::Io => (ErrorKind::Io, "the raft log cannot be read or written"),
        };
        Self::new(kind, message).with("cause", e)
    }
}
