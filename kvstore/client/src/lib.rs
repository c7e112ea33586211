//! The Rust SDK of KVKeep, over gRPC (TCP or a Unix socket). Everyone who talks to a server uses it: benches, the CLI, the agent, Python.
//!
//! ```no_run
//! # async fn f(format: kvkeep_core::Format, key: bytes::Bytes, block: bytes::Bytes) -> kvkeep_client::Result<()> {
//! use kvkeep_client::{Call, Client, ClientConfig, GetItem, MatchQuery, Put, PutPosition};
//! let client = Client::connect(ClientConfig::from_env()).await?;
//! let ns = client.register_namespace("my-model", &format, "digest of the weights").await?;
//! let call = Call::default();
//! ns.put(&Put { positions: vec![PutPosition::of(key.clone(), block)], ..Put::default() }, &call).await?;
//! let found = ns.match_chain(&MatchQuery::of(vec![key.clone()]), &call).await?;
//! assert_eq!(found.boundary_positions, 1);
//! let parts = ns.get(&[GetItem::of(key)], found.lease_id(), &call).await?;
//! assert!(parts[0].is_hit());
//! # Ok(()) }
//! ```
//!
//! The map: [`client`] is the way that every call takes (hello, deadline, retries within [`budget`]); [`connection`] is one
//! HTTP/2 connection and its hello, `endpoint` where it leads, [`embedded`] a private server that is started on demand;
//! [`namespace`] has the verbs on blocks, of which [`matching`], [`get`] (with `assembly`, the checks on what arrives) and
//! [`put`] are long enough for files of their own; [`sessions`] has the verbs on sessions, [`session_file`] takes one
//! along in a file; [`events`] and [`admin`] are for routers and operators; [`engine`] is the
//! synchronous face of all that, for engines; [`convert`] translates between core and proto, and the server uses it too.
//!
//! What it promises: a part given back as a hit is whole, of one version, and its checksums matched; every call ends by its
//! deadline; no call is repeated that could do harm; no task runs in the background but those of HTTP/2 (and, where a private
//! server was started, a thread that waits for its end). A future may be dropped at any moment: what it had reserved frees
//! itself on the server.

pub mod admin;
mod assembly;
pub mod block;
pub mod budget;
pub mod call;
pub mod client;
pub mod config;
pub mod connection;
pub mod convert;
pub mod embedded;
mod endpoint;
pub mod engine;
pub mod error;
pub mod events;
pub mod get;
mod hot;
pub mod matching;
pub mod namespace;
mod process;
pub mod put;
pub mod region;
mod region_calls;
pub mod session_file;
pub mod sessions;

/// The Rust of `docs/embedding.md`, compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/embedding.md")]
struct EmbeddingPage;

pub use admin::Admin;
pub use block::breaker::BreakerState;
pub use block::faults::Fault;
pub use block::pool::{Way, Wire};
pub use budget::RetryBudget;
pub use call::Call;
pub use client::{Client, Counters};
pub use config::{ClientConfig, Lost, WayWish};
pub use connection::{Hello, Limits};
pub use convert::{Retention, SessionHint, SessionState};
pub use embedded::LocalEndpoint;
pub use engine::{Engine, EngineConfig};
pub use error::{Error, ErrorKind, Result};
pub use events::{EventStream, Watch};
pub use get::{GetItem, GotInto, GotPart};
pub use kvkeep_proto::v1 as wire;
pub use matching::{Match, MatchQuery, Verdict};
pub use namespace::{Lease, Namespace};
pub use put::{PartOutcome, Put, PutPart, PutPosition};
pub use region::geometry::Geometry;
pub use region::mapped::{MappedBlock, MappedMatch, MappedPart};
pub use region::{Keeper, Place, Region};
pub use sessions::{OpenSession, SessionInfo, Sessions};
