//! The one error type of this crate: what, may I retry, and where.

use std::fmt;
use std::time::Duration;

/// What kind of failure. Ordinary outcomes (miss, loading, throttled) are values, not errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller's argument can never be right.
    InvalidArgument,
    /// No such namespace, or not the caller's.
    UnknownNamespace,
    /// No such session.
    UnknownSession,
    /// The name is taken by a different format; the context names the fields that differ.
    FormatMismatch,
    /// The handle's revision is not the namespace's.
    StaleRevision,
    /// A part's size is not what its format says.
    WrongSize,
    /// Bytes do not match their checksum.
    Checksum,
    /// Over a named limit that waiting will not lift.
    TooLarge,
    /// Over a named limit that lifts by itself; try again later.
    Throttled,
    /// The lease or reservation has ended.
    Expired,
    /// Something else is in the way of this state change.
    Conflict,
    /// A device or file failed.
    Io,
    /// Stored metadata is not what was written.
    Corrupt,
    /// No room, and nothing may be evicted.
    Full,
    /// Configuration that cannot work.
    Config,
    /// The server is stopping or not started.
    Unavailable,
    /// The caller may not do this.
    Denied,
}

impl ErrorKind {
    /// The word used on the wire, in logs and in metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::UnknownNamespace => "unknown_namespace",
            Self::UnknownSession => "unknown_session",
            Self::FormatMismatch => "format_mismatch",
            Self::StaleRevision => "stale_revision",
            Self::WrongSize => "wrong_size",
            Self::Checksum => "checksum",
            Self::TooLarge => "too_large",
            Self::Throttled => "throttled",
            Self::Expired => "expired",
            Self::Conflict => "conflict",
            Self::Io => "io",
            Self::Corrupt => "corrupt",
            Self::Full => "full",
            Self::Config => "config",
            Self::Unavailable => "unavailable",
            Self::Denied => "denied",
        }
    }
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure a person can act on: kind, message, fields, and whether trying again unchanged can help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: &'static str,
    context: Vec<(&'static str, String)>,
    retry_after: Option<Duration>,
}

impl Error {
    /// `message` is lowercase, without a full stop, and says what to do where that is not obvious.
    pub fn new(kind: ErrorKind, message: &'static str) -> Self {
        Self { kind, message, context: Vec::new(), retry_after: None }
    }

    /// Adds a field.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.context.push((name, value.to_string()));
        self
    }

    /// Says when trying again unchanged may help.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
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

    /// How long to wait before trying again; `None` where trying again does not help or no time is known.
    pub fn retry_hint(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether trying again, unchanged, can help.
    pub fn is_retryable(&self) -> bool {
        self.retry_after.is_some()
            || matches!(self.kind, ErrorKind::Throttled | ErrorKind::Full | ErrorKind::Unavailable)
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
