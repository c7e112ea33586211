//! Why a command did not do what was asked, and with which exit code it ends.

use std::fmt;

use kvkeep_client::ErrorKind;
use kvkeep_core::ErrorKind as CoreKind;

/// What a command answers to `main`.
pub type Outcome<T = ()> = Result<T, Failure>;

/// A failure, in words for a person.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    kind: &'static str,
    message: String,
    advice: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    /// Standard output was closed: whoever read it has enough.
    Ok = 0,
    Failed = 1,
    Usage = 2,
    Unreachable = 3,
}

impl Failure {
    /// Exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: Code::Failed, kind: "failed", message: message.into(), advice: None }
    }

    /// Exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: Code::Usage, kind: "usage", message: message.into(), advice: None }
    }

    /// What a person could do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code as u8
    }

    /// The word for JSON.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// What a person could do, if something is known.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<kvkeep_client::Error> for Failure {
    fn from(e: kvkeep_client::Error) -> Self {
        let (code, advice) = match e.kind() {
            ErrorKind::Unreachable if e.to_string().contains("certificate") => (
                Code::Unreachable,
                Some("the server's certificate is not one that --ca (KVKEEP_CA) vouches for under this host name"),
            ),
            ErrorKind::Unreachable | ErrorKind::Late => (
                Code::Unreachable,
                Some(
                    "start a node (`kvkeepd --data-dir DIR --listen ADDR`), or name another with --endpoint or KVKEEP_ENDPOINT",
                ),
            ),
            ErrorKind::Refused(CoreKind::Denied) => (Code::Failed, Some("give a token with the right by KVKEEP_TOKEN")),
            ErrorKind::Refused(CoreKind::Config) => (Code::Usage, None),
            ErrorKind::Version => (Code::Failed, Some("use the kvkeepctl of the server's version")),
            _ => (Code::Failed, None),
        };
        Self { code, kind: e.kind().word(), message: e.to_string(), advice: advice.map(str::to_owned) }
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        let code = if e.kind() == std::io::ErrorKind::BrokenPipe { Code::Ok } else { Code::Failed };
        Self { code, kind: "io", message: e.to_string(), advice: None }
    }
}
