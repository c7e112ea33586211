//! The one error type of this crate: what, may I retry, when, and where.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::ErrorKind as CoreKind;
use kvkeep_proto::v1;

use crate::convert;

/// Message of [`Error::not_asked`].
const NOT_ASKED: &str = "the server gave no sign of life a moment ago: not asked";

/// What kind of failure. Misses, loading and throttled parts are values, not errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The server said no, or a check that this crate shares with it did.
    Refused(CoreKind),
    /// The connection has not said hello. The client repairs it; seen only where that failed again and again.
    HelloRequired,
    /// No answer from the endpoint: not running, not reachable, or gone in the middle.
    Unreachable,
    /// The call's deadline passed first.
    Late,
    /// The caller took the call back.
    Cancelled,
    /// The server broke the rules of the wire.
    Protocol,
    /// The server speaks another major version of the wire.
    Version,
}

impl ErrorKind {
    /// The word used in logs, JSON and the CLI.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Refused(kind) => kind.word(),
            Self::HelloRequired => convert::HELLO_REQUIRED,
            Self::Unreachable => "unreachable",
            Self::Late => "late",
            Self::Cancelled => "cancelled",
            Self::Protocol => "protocol",
            Self::Version => "version",
        }
    }
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure that a caller can act on.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    message: Cow<'static, str>,
    retryable: bool,
    retry_after: Option<Duration>,
    /// Whether the server may have done what was asked.
    may_have_run: bool,
    context: Vec<(Cow<'static, str>, String)>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        let retryable = matches!(kind, ErrorKind::HelloRequired | ErrorKind::Unreachable);
        Self {
            kind,
            message: message.into(),
            retryable,
            retry_after: None,
            may_have_run: false,
            context: Vec::new(),
            source: None,
        }
    }

    pub(crate) fn late(verb: &'static str) -> Self {
        Self { may_have_run: true, ..Self::new(ErrorKind::Late, "the call's deadline passed before its answer came") }
            .with("verb", verb)
    }

    /// Nothing came for as long as a lost server is waited for, and nothing was asked of it.
    pub(crate) fn silence() -> Self {
        Self::new(ErrorKind::Unreachable, "the server gave no sign of life")
            .caused_by(std::io::Error::from(std::io::ErrorKind::TimedOut))
    }

    /// The circuit breaker does not let the call out: trying again at once cannot help.
    pub(crate) fn not_asked() -> Self {
        Self::new(ErrorKind::Unreachable, NOT_ASKED).final_word()
    }

    /// Whether it is [`Self::not_asked`]: then an earlier error says more.
    pub(crate) fn is_not_asked(&self) -> bool {
        self.message == NOT_ASKED
    }

    pub(crate) fn protocol(message: &'static str) -> Self {
        Self { may_have_run: true, ..Self::new(ErrorKind::Protocol, message) }
    }

    pub(crate) fn config(message: &'static str) -> Self {
        Self::new(ErrorKind::Refused(CoreKind::Config), message)
    }

    pub(crate) fn invalid(message: &'static str) -> Self {
        Self::new(ErrorKind::Refused(CoreKind::InvalidArgument), message)
    }

    /// Adds a field.
    #[must_use]
    pub(crate) fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl fmt::Display) -> Self {
        self.context.push((name.into(), value.to_string()));
        self
    }

    #[must_use]
    pub(crate) fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// The server may have done what was asked.
    #[must_use]
    pub(crate) fn may_be_done(mut self) -> Self {
        self.may_have_run = true;
        self
    }

    /// Trying again at once cannot help.
    #[must_use]
    pub(crate) fn final_word(mut self) -> Self {
        self.retryable = false;
        self
    }

    /// Whether nothing came for too long, as opposed to a connection that broke.
    pub(crate) fn is_silence(&self) -> bool {
        let source = self.source.as_deref().and_then(|e| e.downcast_ref::<std::io::Error>());
        source.is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut)
    }

    /// Whether the server was lost, or never there: an engine goes on as if it had no store.
    pub fn is_loss(&self) -> bool {
        matches!(self.kind, ErrorKind::Unreachable | ErrorKind::Late | ErrorKind::HelloRequired | ErrorKind::Protocol)
    }

    /// The server certainly did not do what was asked.
    #[must_use]
    pub(crate) fn not_run(mut self) -> Self {
        self.may_have_run = false;
        self
    }

    /// From an error inside an answer.
    pub(crate) fn from_detail(detail: v1::ErrorDetail) -> Self {
        let kind = match convert::error_kind_from_word(&detail.kind) {
            Some(kind) => ErrorKind::Refused(kind),
            None if detail.kind == convert::HELLO_REQUIRED => ErrorKind::HelloRequired,
            None if detail.kind == convert::LATE => ErrorKind::Late,
            // A newer server's word: the flags below still say what to do.
            None => ErrorKind::Protocol,
        };
        let mut context: Vec<_> = detail.fields.into_iter().map(|(k, v)| (Cow::Owned(k), v)).collect();
        context.sort();
        Self {
            kind,
            message: Cow::Owned(detail.message),
            retryable: detail.retryable,
            retry_after: convert::millis_from_proto(detail.retry_after_ms),
            may_have_run: kind == ErrorKind::Late,
            context,
            source: None,
        }
    }

    /// From a failed call.
    pub(crate) fn from_status(verb: &'static str, status: tonic::Status) -> Self {
        if let Some(detail) = convert::detail_from_status(&status) {
            return Self::from_detail(detail).with("verb", verb);
        }
        if let Some(error) = causes::<Self>(&status).next() {
            return error.clone().with("verb", verb); // our own end could not connect, and says why
        }
        // No detail: not one of our answers, but something on the way (tonic, a proxy, the connection).
        let mut error = match status.code() {
            tonic::Code::DeadlineExceeded => Self::late(verb),
            _ if timed_out(&status) => Self::late(verb),
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => {
                Self::new(ErrorKind::Refused(CoreKind::Denied), "the server refused the credentials").with("verb", verb)
            }
            tonic::Code::ResourceExhausted | tonic::Code::OutOfRange => {
                Self::new(ErrorKind::Refused(CoreKind::TooLarge), "a message is over a limit of the wire")
                    .with("verb", verb)
            }
            tonic::Code::Unimplemented => {
                Self::new(ErrorKind::Version, "the server does not know this call").with("verb", verb)
            }
            tonic::Code::InvalidArgument => {
                Self::new(ErrorKind::Refused(CoreKind::InvalidArgument), "the server could not read the call")
                    .with("verb", verb)
            }
            _ => Self::new(ErrorKind::Unreachable, "the server did not answer").with("verb", verb),
        };
        error.may_have_run = matches!(error.kind, ErrorKind::Late | ErrorKind::Unreachable) && !never_left(&status);
        error.with("grpc", format!("{:?}: {}", status.code(), status.message())).caused_by(status)
    }

    /// What kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message without its fields.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether trying again, unchanged, can help.
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// When the server said to try again; `None` where it named no time.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether the server may have done what was asked although no answer came.
    pub fn may_have_run(&self) -> bool {
        self.may_have_run
    }

    /// The fields.
    pub fn context(&self) -> impl Iterator<Item = (&str, &str)> {
        self.context.iter().map(|(k, v)| (k.as_ref(), v.as_str()))
    }
}

/// The errors of this type that stand behind the status.
fn causes<E: std::error::Error + 'static>(status: &tonic::Status) -> impl Iterator<Item = &E> {
    std::iter::successors(std::error::Error::source(status), |error| error.source()).filter_map(|e| e.downcast_ref())
}

/// Whether the call failed before a byte of it was sent: the connection could not be made.
fn never_left(status: &tonic::Status) -> bool {
    causes::<std::io::Error>(status).any(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Whether our own end of the connection gave up on the answer (tonic then says `Cancelled`).
fn timed_out(status: &tonic::Status) -> bool {
    causes::<tonic::TimeoutExpired>(status).next().is_some()
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

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<kvkeep_core::Error> for Error {
    fn from(e: kvkeep_core::Error) -> Self {
        Self::from_detail(convert::error_to_proto(&e))
    }
}
