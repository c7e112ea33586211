//! What a replay is asked to do: its flags, checked, and what follows from them.

use std::hash::Hasher as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use kvkeep_client::{ClientConfig, Lost, Retention, WayWish, Wire};
use kvkeep_core::format::{GROUPS_MAX, SHARDS_MAX};
use kvkeep_core::{Class, Format, Group, GroupId, Rule, ShardId, SizeRule, Topology};
use siphasher::sip::SipHasher13;

use crate::trace::synthetic::Shape;
use crate::trace::{SessionId, Workload, reader, synthetic};
use crate::units::{ByteSize, parse_share};

/// Positions that the window of a windowed group covers.
const WINDOW_POSITIONS: u32 = 4;
/// Most concurrent engines.
const ENGINES_MAX: u32 = 1024;

/// Longest name of a trace in the ids of sessions.
const SESSION_PREFIX_MAX: usize = 64;

/// Where the server is.
#[derive(Args, Clone, Debug)]
pub struct ServerArgs {
    /// http://host:port of the server
    #[arg(long, env = "KVKEEP_ENDPOINT", default_value = kvkeep_client::config::DEFAULT_ENDPOINT)]
    pub endpoint: String,
    /// Bearer token
    #[arg(long, env = "KVKEEP_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// PEM file of the authorities that an https endpoint is checked against
    #[arg(long, env = "KVKEEP_CA")]
    pub ca: Option<PathBuf>,
    /// TCP connections
    #[arg(long, default_value_t = 2)]
    pub connections: usize,
    /// Deadline of one call, milliseconds
    #[arg(long, default_value_t = 20_000)]
    pub deadline_ms: u64,
    /// Which way match, get and put go
    #[arg(long, value_enum, default_value_t)]
    pub way: WayArg,
}

impl ServerArgs {
    /// The client these flags describe.
    pub fn client_config(&self) -> ClientConfig {
        ClientConfig {
            token: self.token.clone(),
            ca_file: self.ca.clone(),
            name: concat!("kvkeep-bench/", env!("CARGO_PKG_VERSION")).to_owned(),
            connections: self.connections,
            deadline: Duration::from_millis(self.deadline_ms),
            // What is lost is counted as failed, and a machine that is busy with the bench itself is no lost server.
            lost: Lost::Errors,
            patience: Duration::from_secs(2),
            block_connections: BLOCK_CONNECTIONS,
            way: match self.way {
                WayArg::Fastest => WayWish::Fastest,
                WayArg::Grpc => WayWish::Only(Wire::Grpc),
                WayArg::Socket => WayWish::Only(Wire::Socket),
                WayArg::Port => WayWish::Only(Wire::Port),
            },
            ..ClientConfig::to(self.endpoint.clone())
        }
    }
}

/// Block connections of one client: as many as calls in flight.
const BLOCK_CONNECTIONS: usize = 64;

/// Which way the hot verbs go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum WayArg {
    /// The fastest there is.
    #[default]
    Fastest,
    /// gRPC.
    Grpc,
    /// The block protocol on the Unix socket.
    Socket,
    /// The block protocol over TCP.
    Port,
}

impl std::fmt::Display for WayArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fastest => "fastest",
            Self::Grpc => "grpc",
            Self::Socket => "socket",
            Self::Port => "port",
        })
    }
}

/// Class of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClassArg {
    /// The node has it.
    Cache,
    /// It survives a power loss.
    Durable,
}

/// What to do where a tier is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RetentionArg {
    /// The coldest blocks make room.
    BestEffort,
    /// Nothing is dropped while NVMe has room; puts wait.
    Keep,
}

/// Which clock the policy is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyClockArg {
    /// The server's own.
    None,
    /// The workload's, for a server started with `--policy-clock=request`.
    Trace,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PaceArg {
    /// As fast as the engines can.
    Asap,
    /// At the times of the workload.
    Trace,
}

/// The workload and how it is replayed.
#[derive(Args, Clone, Debug)]
pub struct ReplayArgs {
    /// Trace file: Mooncake or Qwen-Bailian JSONL, plain or zstd. None: a seeded multi-turn workload
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Requests at most
    #[arg(long)]
    pub limit: Option<u64>,
    /// Bytes of one block: of each group and shard of a position
    #[arg(long, default_value = "256KiB")]
    pub block_bytes: ByteSize,
    /// Groups of the format: the first keeps every block, then windowed and state groups take turns
    #[arg(long, default_value_t = 1)]
    pub groups: u16,
    /// Shards of each group
    #[arg(long, default_value_t = 1)]
    pub shards: u16,
    /// Concurrent engines
    #[arg(long, default_value_t = 4)]
    pub engines: u32,
    /// Class of the puts
    #[arg(long, value_enum, default_value = "cache")]
    pub class: ClassArg,
    /// Share of sessions whose puts are durable whatever --class says
    #[arg(long, default_value_t = 0.0, value_parser = parse_share)]
    pub durable_share: f64,
    /// Share of sessions that have a durable session in the store, whose turns are appended; none of --durable-share
    #[arg(long, default_value_t = 0.0, value_parser = parse_share)]
    pub session_share: f64,
    /// What to do where a tier is full
    #[arg(long, value_enum, default_value = "best-effort")]
    pub retention: RetentionArg,
    /// Which clock the policy is given
    #[arg(long, value_enum, default_value = "none")]
    pub policy_clock: PolicyClockArg,
    /// When requests are sent
    #[arg(long, value_enum, default_value = "asap")]
    pub pace: PaceArg,
    /// Seed of the workload without a trace
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Sessions of the workload without a trace
    #[arg(long, default_value_t = 200)]
    pub sessions: u32,
    /// Mean turns of a session of the workload without a trace
    #[arg(long, default_value_t = 5.0)]
    pub turns: f64,
    /// Namespace; the default names the shape of the blocks, so that the same replay again finds what is there
    #[arg(long)]
    pub namespace: Option<String>,
    /// Seconds that the server may be away before the replay gives up
    #[arg(long, default_value_t = 60)]
    pub outage_s: u64,
    /// Bytes of one get
    #[arg(long, default_value = "16MiB")]
    pub get_batch_bytes: ByteSize,
    /// Bytes of one put
    #[arg(long, default_value = "16MiB")]
    pub put_batch_bytes: ByteSize,
}

/// A checked replay.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The flags.
    pub args: ReplayArgs,
    /// The format that blocks are put under.
    pub format: Format,
    /// The namespace's name.
    pub namespace: String,
    /// What the ids of kept sessions begin with: the workload, so that the same one again finds its own.
    pub session_prefix: String,
    /// How long the server may be away.
    pub outage: Duration,
}

impl ReplayArgs {
    /// Opens the workload.
    pub fn workload(&self) -> anyhow::Result<Workload> {
        match &self.trace {
            Some(path) => reader::open(path),
            None => Ok(synthetic::workload(Shape {
                sessions: self.sessions,
                turns_mean: self.turns,
                tokens_per_block: 512,
                seed: self.seed,
            })),
        }
    }

    fn session_prefix(&self) -> String {
        match self.trace.as_ref().and_then(|path| path.file_name()) {
            Some(name) => {
                name.to_string_lossy().chars().filter(char::is_ascii_graphic).take(SESSION_PREFIX_MAX).collect()
            }
            None => format!("seed-{}-{}x{}", self.seed, self.sessions, self.turns),
        }
    }

    /// Checks the flags; `tokens_per_block` is the workload's.
    pub fn plan(&self, tokens_per_block: u32) -> anyhow::Result<Plan> {
        ensure!((1..=ENGINES_MAX).contains(&self.engines), "--engines is 1 to {ENGINES_MAX}");
        ensure!(self.groups >= 1 && usize::from(self.groups) <= GROUPS_MAX, "--groups is 1 to {GROUPS_MAX}");
        ensure!((1..=SHARDS_MAX).contains(&self.shards), "--shards is 1 to {SHARDS_MAX}");
        ensure!(
            self.durable_share + self.session_share <= 1.0,
            "--durable-share and --session-share are over 1 together"
        );
        let group = |i: u16| Group {
            rule: match i {
                0 => Rule::All,
                i if i % 2 == 1 => Rule::Window { tokens: WINDOW_POSITIONS * tokens_per_block },
                _ => Rule::State,
            },
            tokens_per_block,
            shards: self.shards,
            replicated: false,
            size: SizeRule::Exact(self.block_bytes.0),
        };
        let format = Format {
            model: "kvkeep-bench".into(),
            dtype: "bf16".into(),
            layout: "generated".into(),
            hash_algorithm: "siphash128x2".into(),
            hash_seed: "0".into(),
            tokens_per_key: tokens_per_block,
            topology: Topology { canonical: false, tp: self.shards, pp: 1, cp: 1 },
            groups: (0..self.groups).map(group).collect(),
            prefill_us_per_token: 0,
            prefill_doubles_at_tokens: 0,
        };
        format.validate().map_err(|e| anyhow::anyhow!("{e}"))?;
        let namespace = self.namespace.clone().unwrap_or_else(|| {
            format!("replay-{}-g{}-s{}-t{tokens_per_block}", self.block_bytes, self.groups, self.shards)
        });
        let outage = Duration::from_secs(self.outage_s);
        Ok(Plan { args: self.clone(), format, namespace, session_prefix: self.session_prefix(), outage })
    }
}

impl Plan {
    /// What a session's puts ask for.
    pub fn class(&self, session: SessionId) -> Class {
        match self.args.class {
            ClassArg::Durable => Class::Durable,
            ClassArg::Cache if draw(session) < self.args.durable_share => Class::Durable,
            ClassArg::Cache => Class::Cache,
        }
    }

    /// Whether the store has a durable session of it: those behind the share whose puts are durable.
    pub fn is_kept(&self, session: SessionId) -> bool {
        let from = self.args.durable_share;
        (from..from + self.args.session_share).contains(&draw(session))
    }

    /// The id of its session in the store.
    pub fn session_id(&self, session: SessionId) -> String {
        format!("{}-{}", self.session_prefix, session.0)
    }

    /// For the client.
    pub fn retention(&self) -> Retention {
        match self.args.retention {
            RetentionArg::BestEffort => Retention::BestEffort,
            RetentionArg::Keep => Retention::Keep,
        }
    }

    /// Tokens that one key covers.
    pub fn tokens_per_block(&self) -> u32 {
        self.format.tokens_per_key
    }

    /// Bytes of one part.
    pub fn part_bytes(&self) -> u64 {
        self.args.block_bytes.0
    }

    /// Parts of a position.
    pub fn parts_per_position(&self) -> usize {
        usize::from(self.args.groups) * usize::from(self.args.shards)
    }

    /// Positions whose parts fit `batch`; at least 1.
    pub fn positions_per_batch(&self, batch: ByteSize) -> usize {
        let position = self.part_bytes().saturating_mul(self.parts_per_position() as u64).max(1);
        usize::try_from(batch.0 / position).unwrap_or(usize::MAX).max(1)
    }

    /// The parts that the rules need of position `index` to load the first `boundary` positions.
    pub fn needed_parts(&self, index: u32, boundary: u32) -> impl Iterator<Item = (GroupId, ShardId)> + '_ {
        let tokens_per_block = self.tokens_per_block();
        self.format.parts_at(index).filter(move |(group, _)| match self.format.groups[usize::from(group.0)].rule {
            Rule::All => true,
            Rule::Window { tokens } => index + tokens.div_ceil(tokens_per_block) >= boundary,
            Rule::State => index + 1 == boundary,
        })
    }

    /// Whether a prefix of what matched can be used when its end is lost: only where every group keeps all.
    pub fn prefixes_are_usable(&self) -> bool {
        self.format.groups.iter().all(|g| g.rule == Rule::All)
    }
}

/// 0 to 1, always the same one for a session.
fn draw(session: SessionId) -> f64 {
    let mut h = SipHasher13::new();
    h.write_u64(session.0);
    h.finish() as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        replay: ReplayArgs,
    }

    fn plan(flags: &str) -> anyhow::Result<Plan> {
        let words = std::iter::once("bench").chain(flags.split_whitespace());
        Flags::try_parse_from(words)?.replay.plan(512)
    }

    #[test]
    fn the_rules_say_which_parts_a_boundary_needs() {
        let plan = plan("--groups 3 --shards 2").unwrap();
        let needed = |i| plan.needed_parts(i, 10).map(|(g, _)| g.0).collect::<Vec<_>>();
        assert_eq!(needed(0), [0, 0]);
        assert_eq!(needed(5), [0, 0]);
        assert_eq!(needed(6), [0, 0, 1, 1]);
        assert_eq!(needed(9), [0, 0, 1, 1, 2, 2]);
        assert!(!plan.prefixes_are_usable());
    }

    #[test]
    fn bad_flags_are_refused() {
        for bad in ["--groups 0", "--shards 0", "--engines 0", "--block-bytes 1", "--block-bytes 1GiB"] {
            assert!(plan(bad).is_err(), "{bad}");
        }
        assert!(plan("--durable-share 1.5").is_err());
        assert!(plan("--durable-share 0.5 --session-share 0.6").is_err());
    }

    #[test]
    fn the_durable_share_is_about_that_share_of_sessions() {
        let plan = plan("--durable-share 0.25").unwrap();
        let durable = (0..1000).filter(|n| plan.class(SessionId(*n)) == Class::Durable).count();
        assert!((200..300).contains(&durable), "{durable}");
    }

    /// The append is what makes a kept session's blocks durable, so their puts are not.
    #[test]
    fn kept_sessions_are_about_their_share_and_none_whose_puts_are_durable() {
        let plan = plan("--durable-share 0.25 --session-share 0.25").unwrap();
        let kept: Vec<_> = (0..1000).map(SessionId).filter(|s| plan.is_kept(*s)).collect();
        assert!((200..300).contains(&kept.len()), "{}", kept.len());
        assert!(kept.iter().all(|s| plan.class(*s) == Class::Cache));
        assert_eq!(plan.session_id(SessionId(7)), "seed-1-200x5-7");
    }
}
