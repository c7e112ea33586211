//! What can be typed.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use kvkeep_core::Tier;

use crate::key::KeyArg;
use crate::sessions::args::SessionCommand;

const EXIT_CODES: &str = "\
Keys are hexadecimal (optionally with 0x), or text:ANY TEXT.

Exit codes:
  0  ok
  1  failed: the server refused, something was found bad, or it is not there
  2  usage: the command line makes no sense
  3  unreachable: no answer from the endpoint

Environment: KVKEEP_ENDPOINT, KVKEEP_TOKEN, KVKEEP_CA";

/// Asks a KVKeep node what an operator wants to know.
#[derive(Debug, Parser)]
#[command(name = "kvkeepctl", version, after_help = EXIT_CODES, propagate_version = true, max_term_width = 120)]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
    /// Print JSON instead of tables; each object names its schema and version
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// Which node, and as whom.
#[derive(Debug, ClapArgs)]
pub struct Connection {
    /// The node: http://host:port, https://host:port or host:port
    #[arg(long, global = true, env = "KVKEEP_ENDPOINT", default_value = kvkeep_client::config::DEFAULT_ENDPOINT)]
    pub endpoint: String,
    /// Bearer token; better given by the environment, where other users cannot see it
    #[arg(long, global = true, env = "KVKEEP_TOKEN", hide_env_values = true)]
    pub token: Option<Secret>,
    /// PEM file of the certificate authority of an https endpoint
    #[arg(long, global = true, env = "KVKEEP_CA", value_name = "FILE")]
    pub ca: Option<String>,
    /// Longest wait for an answer, in milliseconds
    #[arg(long, global = true, default_value_t = 10_000, value_name = "MS",
          value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub timeout_ms: u64,
}

/// Text that is never shown.
#[derive(Clone)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("secret")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// How the node does
    Status,
    /// Namespaces: models and their formats
    #[command(subcommand)]
    Namespace(NamespaceCommand),
    /// Stored positions and their parts
    #[command(subcommand)]
    Block(BlockCommand),
    /// Sessions: conversations, documents and agents
    #[command(subcommand)]
    Session(SessionCommand),
    /// DRAM and NVMe
    #[command(subcommand)]
    Tier(TierCommand),
    /// Leases that clients hold
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Why a position is, or is not, here
    Explain {
        #[command(flatten)]
        namespace: NamespaceArg,
        /// The position's key
        #[arg(required_unless_present = "request")]
        key: Option<KeyArg>,
        /// What this request missed, and why, instead of one position: its id, written as keys are
        #[arg(long, value_name = "ID", conflicts_with = "key")]
        request: Option<KeyArg>,
    },
    /// What is here (a snapshot), or with --follow the events that the node remembers and those to come
    Events(EventsArgs),
    /// Checks stored blocks against their checksums
    Scrub {
        /// Only this tier
        #[arg(long)]
        tier: Option<TierArg>,
        /// Wait at most so many seconds for the end; the check goes on in the background
        #[arg(long, default_value_t = 600, value_name = "S")]
        wait_s: u32,
    },
    /// Compares what sessions name with what is stored
    Fsck {
        /// First reclaim blocks that no session names any more
        #[arg(long)]
        sweep: bool,
        /// Wait at most so many seconds for the answer
        #[arg(long, default_value_t = 600, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=86_400))]
        wait_s: u32,
    },
    /// Starts a node of its own, stores blocks, kills it with SIGKILL, and reads them back
    Demo(DemoArgs),
    /// Checks this machine for running a node, and whether the endpoint answers
    Doctor(DoctorArgs),
}

#[derive(Debug, Subcommand)]
pub enum NamespaceCommand {
    /// All of them
    List,
    /// One, with its format
    Show {
        /// Its name, tenant/name, or its number
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum BlockCommand {
    /// Positions of a namespace
    List {
        #[command(flatten)]
        namespace: NamespaceArg,
        /// Only keys that begin with this
        #[arg(long)]
        prefix: Option<KeyArg>,
        /// At most so many
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        limit: u32,
    },
    /// One position and where its parts are
    Show {
        #[command(flatten)]
        namespace: NamespaceArg,
        /// The position's key
        key: KeyArg,
    },
}

#[derive(Debug, Subcommand)]
pub enum TierCommand {
    /// All of them
    List,
    /// One
    Show {
        /// Which
        tier: TierArg,
    },
}

#[derive(Debug, Subcommand)]
pub enum LeaseCommand {
    /// Those held now
    List {
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

#[derive(Debug, ClapArgs)]
pub struct NamespaceArg {
    /// Its name, tenant/name, or its number; may be left out where there is only one
    #[arg(long, short)]
    namespace: Option<String>,
}

impl NamespaceArg {
    pub fn name(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

#[derive(Debug, ClapArgs)]
pub struct EventsArgs {
    /// Only this namespace
    #[arg(long, short)]
    pub namespace: Option<String>,
    /// The events that the node still remembers, then those to come, until interrupted
    #[arg(long, short)]
    pub follow: bool,
    /// With --follow: begin with what is here instead
    #[arg(long, requires = "follow")]
    pub snapshot: bool,
    /// With --follow: begin after this event
    #[arg(long, requires = "follow", conflicts_with = "snapshot", value_name = "SEQUENCE")]
    pub after: Option<u64>,
    /// End after so many events
    #[arg(long)]
    pub limit: Option<u64>,
}

#[derive(Debug, ClapArgs)]
pub struct DemoArgs {
    /// The server to start; by default the one beside this program
    #[arg(long, value_name = "FILE")]
    pub kvkeepd: Option<PathBuf>,
    /// Positions of the session
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub positions: u32,
}

#[derive(Debug, ClapArgs)]
pub struct DoctorArgs {
    /// Where the node keeps its data; by default what the endpoint says, else this folder
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where the node keeps its arena
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub arena_dir: PathBuf,
    /// Look at this machine only
    #[arg(long)]
    pub offline: bool,
}

/// A tier of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TierArg {
    /// The arena
    Dram,
    /// The segment files
    Nvme,
}

impl From<TierArg> for Tier {
    fn from(tier: TierArg) -> Self {
        match tier {
            TierArg::Dram => Tier::Dram,
            TierArg::Nvme => Tier::Nvme,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn help_tells_the_exit_codes_and_never_the_token() {
        let help = Args::command().render_long_help().to_string();
        assert!(help.contains("3  unreachable"));
        let args = Args::parse_from(["kvkeepctl", "--token", "hunter2", "status"]);
        assert!(!format!("{args:?}").contains("hunter2"));
    }
}
