//! How a client is set up.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use kvkeep_core::InstanceId;

use crate::block::pool::Wire;
use crate::budget::RetryBudget;
use crate::endpoint::Target;
use crate::error::{Error, Result};

/// Where a server listens when nothing else is said.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:7070";
/// How long a block connection may be silent while it owes an answer.
pub const PATIENCE: Duration = Duration::from_millis(100);
/// Most connections of one client.
pub const CONNECTIONS_MAX: usize = 64;

/// Which way the hot verbs shall go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WayWish {
    /// The fastest there is: the Unix socket of a server on this host, its block port, gRPC.
    #[default]
    Fastest,
    /// This one, or not at all.
    Only(Wire),
}

/// What becomes of a hot verb when the server is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lost {
    /// It is answered with misses, counted as such: an engine goes on as if it had no store.
    #[default]
    Misses,
    /// It fails: for tools that want to know.
    Errors,
}

/// Everything a client needs to know. `ClientConfig::default()` talks to a server with defaults on this machine.
#[derive(Clone)]
pub struct ClientConfig {
    /// `http://host:port`, `https://host:port`, or `host:port` for http; `unix:/path` for the socket of a server on this
    /// host; `local:folder` for a private one that is started where none answers ([`crate::embedded`]).
    pub endpoint: String,
    /// Bearer token. Never shown by `Debug`.
    pub token: Option<String>,
    /// PEM file of the certificate authorities that an https endpoint is checked against.
    pub ca_file: Option<PathBuf>,
    /// The same as text; wins over `ca_file`.
    pub ca_pem: Option<String>,
    /// Name and version of the program, for the server's logs.
    pub name: String,
    /// Names this engine instance: leases belong to it, and processes that share one share its leases. Random by default.
    pub instance: InstanceId,
    /// Connections, 1 to [`CONNECTIONS_MAX`]. More than one helps large transfers; calls take turns.
    pub connections: usize,
    /// Of a call that names none.
    pub deadline: Duration,
    /// Longest wait for one TCP (and TLS) connection, or one to a Unix socket. The start of a private server has its own
    /// bound, [`crate::embedded::START_MAX`].
    pub connect_timeout: Duration,
    /// Bounds on trying again.
    pub retry: RetryBudget,
    /// Which way the hot verbs shall go.
    pub way: WayWish,
    /// What becomes of them when the server is lost.
    pub lost: Lost,
    /// A block connection on which nothing at all came for so long has lost its server (which promises a sign of life every
    /// 50 ms while it owes an answer).
    pub patience: Duration,
    /// Block connections at a time, 1 to [`CONNECTIONS_MAX`]; each call has one for itself, more calls wait.
    pub block_connections: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            token: None,
            ca_file: None,
            ca_pem: None,
            name: concat!("kvkeep-client/", env!("CARGO_PKG_VERSION")).to_owned(),
            instance: crate::process::fresh_instance(),
            connections: 1,
            deadline: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(2),
            retry: RetryBudget::default(),
            way: WayWish::default(),
            lost: Lost::default(),
            patience: PATIENCE,
            block_connections: 16,
        }
    }
}

impl ClientConfig {
    /// The default with what `KVKEEP_ENDPOINT`, `KVKEEP_TOKEN` and `KVKEEP_CA` (a file) say; empty ones say nothing.
    pub fn from_env() -> Self {
        let said = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let mut config = Self::default();
        if let Some(endpoint) = said("KVKEEP_ENDPOINT") {
            config.endpoint = endpoint;
        }
        config.token = said("KVKEEP_TOKEN");
        config.ca_file = said("KVKEEP_CA").map(PathBuf::from);
        config
    }

    /// The default with this endpoint.
    pub fn to(endpoint: impl Into<String>) -> Self {
        Self { endpoint: endpoint.into(), ..Self::default() }
    }

    /// Where the endpoint leads.
    pub(crate) fn target(&self) -> Result<Target> {
        Target::parse(&self.endpoint)
    }

    /// How long a registration may be silent: the server enters every page into its page table, and says so by heartbeats.
    pub(crate) fn registration_patience(&self) -> Duration {
        self.patience.max(Duration::from_millis(500))
    }

    /// Whether a client can be made with it.
    ///
    /// # Errors
    /// `config`: what is wrong with it.
    pub fn check(&self) -> Result<()> {
        self.validate()?;
        self.target().map(|_| ())
    }

    pub(crate) fn validate(&self) -> Result<()> {
        if self.connections == 0 || self.connections > CONNECTIONS_MAX {
            return Err(Error::config("a client has 1 to 64 connections").with("connections", self.connections));
        }
        if self.block_connections == 0 || self.block_connections > CONNECTIONS_MAX || self.patience.is_zero() {
            return Err(Error::config("a client has 1 to 64 block connections, and some patience")
                .with("block_connections", self.block_connections));
        }
        if self.deadline.is_zero() || self.connect_timeout.is_zero() {
            return Err(Error::config("deadline and connect_timeout are more than 0"));
        }
        let r = self.retry;
        if !(0.0..=1.0).contains(&r.ratio) || r.attempts_max == 0 {
            return Err(Error::config("a retry ratio lies between 0 and 1, and a call has at least 1 try")
                .with("ratio", r.ratio)
                .with("attempts_max", r.attempts_max));
        }
        Ok(())
    }
}

impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "secret"))
            .field("name", &self.name)
            .field("instance", &self.instance)
            .field("connections", &self.connections)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_without_a_scheme_is_http() {
        for (endpoint, uri) in [("host:7070", "http://host:7070"), ("https://host:7070", "https://host:7070")] {
            let target = ClientConfig::to(endpoint).target().unwrap();
            assert!(matches!(&target, Target::Tcp(said) if said == uri), "{endpoint}: {target:?}");
        }
        assert!(matches!(ClientConfig::to("unix:///socket").target().unwrap(), Target::Unix(_)));
        assert!(matches!(ClientConfig::to("local:/folder").target().unwrap(), Target::Local(_)));
        assert!(ClientConfig::to("ftp://host").target().is_err());
        assert!(ClientConfig::to("").target().is_err());
    }

    #[test]
    fn a_token_is_not_shown() {
        let config = ClientConfig { token: Some("hunter2".into()), ..ClientConfig::default() };
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
