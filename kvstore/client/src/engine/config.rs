//! How an engine's store is set up.

use kvkeep_core::{Error as CoreError, ErrorKind as CoreKind, Format};

use crate::config::ClientConfig;
use crate::error::Result;

/// Most queues of an engine.
pub const QUEUES_MAX: usize = 16;
/// Most calls of one queue that are in flight or wait to be polled. With all queues full there are still twice as many call
/// words as calls.
pub const IN_FLIGHT_MAX: usize = 512;

/// Everything an engine says at its start.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The server and the patience with it. `lost` is not looked at: an engine's losses are misses.
    pub client: ClientConfig,
    /// Name of the namespace.
    pub namespace: String,
    /// How this model's KV looks.
    pub format: Format,
    /// Digest of weights and adapters: a store that holds KV of others is not read and not written.
    pub revision: String,
    /// Queues of submitted calls, 1 to [`QUEUES_MAX`]. Each has its own completions and its own event descriptor.
    pub queues: usize,
    /// Calls of one queue that are in flight or wait to be polled, 1 to [`IN_FLIGHT_MAX`]; more are refused as busy.
    pub in_flight_max: usize,
}

impl EngineConfig {
    /// One queue of 64 calls, and the client's defaults (a server with defaults on this machine).
    pub fn new(namespace: impl Into<String>, format: Format, revision: impl Into<String>) -> Self {
        Self {
            client: ClientConfig::default(),
            namespace: namespace.into(),
            format,
            revision: revision.into(),
            queues: 1,
            in_flight_max: 64,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        self.client.validate()?;
        self.format.validate()?;
        if self.namespace.is_empty() {
            return Err(CoreError::new(CoreKind::Config, "an engine names its namespace").into());
        }
        if !(1..=QUEUES_MAX).contains(&self.queues) || !(1..=IN_FLIGHT_MAX).contains(&self.in_flight_max) {
            return Err(CoreError::new(CoreKind::Config, "an engine has 1 to 16 queues of 1 to 512 calls")
                .with("queues", self.queues)
                .with("in_flight_max", self.in_flight_max)
                .into());
        }
        Ok(())
    }
}
