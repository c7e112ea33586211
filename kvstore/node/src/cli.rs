//! The command line of `kvkeepd`.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use kvkeep_core::PolicyKind;
use tokio_util::sync::CancellationToken;

use crate::address::{BlockListen, TcpListen};
use crate::config::{Config, PolicyClock};
use crate::connection::Instances;
use crate::size::ByteSize;
use crate::store::Store;
use crate::{detach, idle, server};

/// One storage node of KVKeep, the store for attention KV.
///
/// With no configuration it is a complete single node on loopback with safe defaults, printed at start.
#[derive(Debug, Parser)]
#[command(name = "kvkeepd", version)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look at the configuration without starting.
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum ConfigCommand {
    /// Check it; prints what is wrong and exits with 1.
    Check,
    /// Print it as TOML, defaults and choices for this machine filled in.
    Show,
}

/// Flags win over the environment, the environment over the file, the file over the defaults.
#[derive(Debug, Args)]
struct Flags {
    /// Configuration file (TOML).
    #[arg(long, env = "KVKEEP_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Everything that must survive a restart [default: ./kvkeep-data].
    #[arg(long, env = "KVKEEP_DATA_DIR", global = true)]
    data_dir: Option<PathBuf>,
    /// gRPC over TCP [default: 127.0.0.1:7070]; port 0 picks one, `off`: the Unix socket only.
    #[arg(long, env = "KVKEEP_LISTEN", global = true)]
    listen: Option<TcpListen>,
    /// The block protocol over TCP: address:port, `auto` (one port above gRPC's) or `off` [default: auto].
    #[arg(long, env = "KVKEEP_BLOCK_LISTEN", global = true)]
    block_listen: Option<BlockListen>,
    /// gRPC and the block protocol over a Unix socket at this path [default: auto, which is kvkeepd.sock in the data folder];
    /// `off`: none.
    #[arg(long, env = "KVKEEP_UNIX_SOCKET", global = true)]
    unix_socket: Option<OsString>,
    /// Stop when no connection has been open for so long, in ms [default: 0, never].
    #[arg(long, env = "KVKEEP_EXIT_WHEN_IDLE_MS", global = true)]
    exit_when_idle_ms: Option<u32>,
    /// Prometheus metrics over HTTP, loopback only.
    #[arg(long, env = "KVKEEP_METRICS_LISTEN", global = true)]
    metrics_listen: Option<SocketAddr>,
    /// Name of this node.
    #[arg(long, env = "KVKEEP_NODE_NAME", global = true)]
    node_name: Option<String>,
    /// DRAM for blocks [default: 25 % of what is available].
    #[arg(long, env = "KVKEEP_ARENA_BYTES", global = true)]
    arena_bytes: Option<ByteSize>,
    /// Folder on tmpfs for the arena [default: /dev/shm].
    #[arg(long, env = "KVKEEP_ARENA_DIR", global = true)]
    arena_dir: Option<PathBuf>,
    /// NVMe for blocks [default: half of what is free beyond the keep-free floor, at most 64GiB].
    #[arg(long, env = "KVKEEP_NVME_BYTES", global = true)]
    nvme_bytes: Option<ByteSize>,
    /// Never fill the file system beyond this [default: 4GiB].
    #[arg(long, env = "KVKEEP_KEEP_FREE_BYTES", global = true)]
    keep_free_bytes: Option<ByteSize>,
    /// No L3: blocks live in memory only. A restart of the server finds them again, a restart of the machine does not.
    #[arg(long, env = "KVKEEP_NO_NVME", global = true)]
    no_nvme: bool,
    /// Use pread/pwrite even where io_uring works.
    #[arg(long, env = "KVKEEP_NO_IO_URING", global = true)]
    no_io_uring: bool,
    /// What decides which block goes next: sage (learned) or lru.
    #[arg(long, env = "KVKEEP_POLICY", global = true)]
    policy: Option<PolicyKind>,
    /// Where the policy's clock comes from.
    #[arg(long, env = "KVKEEP_POLICY_CLOCK", global = true, value_enum)]
    policy_clock: Option<PolicyClock>,
    /// File of `tenant token [admin]` lines, mode 0600.
    #[arg(long, env = "KVKEEP_TOKENS_FILE", global = true)]
    tokens_file: Option<PathBuf>,
    /// TLS certificate chain (PEM).
    #[arg(long, env = "KVKEEP_TLS_CERT", global = true)]
    tls_cert: Option<PathBuf>,
    /// TLS private key (PEM, mode 0600).
    #[arg(long, env = "KVKEEP_TLS_KEY", global = true)]
    tls_key: Option<PathBuf>,
    /// Serve beyond loopback without TLS or tokens.
    #[arg(long, env = "KVKEEP_INSECURE_OFF_LOOPBACK", global = true)]
    insecure_off_loopback: bool,
    /// A program started this server for itself: leave its session, and close what was inherited from it.
    #[arg(long, hide = true)]
    detached: bool,
}

impl Flags {
    fn config(self) -> kvkeep_core::Result<Config> {
        let mut c = match &self.config {
            Some(path) => Config::from_file(path)?,
            None => Config::default(),
        };
        macro_rules! set {
            ($($flag:ident => $($field:ident).+),+ $(,)?) => {
                $(if let Some(value) = self.$flag { c.$($field).+ = value; })+
            };
        }
        set!(
            data_dir => data_dir,
            listen => listen.grpc,
            block_listen => listen.block,
            exit_when_idle_ms => listen.exit_when_idle_ms,
            node_name => node_name,
            arena_bytes => arena.bytes,
            arena_dir => arena.dir,
            nvme_bytes => nvme.bytes,
            keep_free_bytes => nvme.keep_free_bytes,
            policy => policy,
            policy_clock => policy_clock,
        );
        c.listen.unix = self.unix_socket.map(PathBuf::from).unwrap_or(c.listen.unix);
        c.listen.metrics = self.metrics_listen.or(c.listen.metrics);
        c.auth.tokens_file = self.tokens_file.or(c.auth.tokens_file);
        c.listen.tls_cert = self.tls_cert.or(c.listen.tls_cert);
        c.listen.tls_key = self.tls_key.or(c.listen.tls_key);
        c.nvme.off |= self.no_nvme;
        c.nvme.no_io_uring |= self.no_io_uring;
        c.listen.insecure_off_loopback |= self.insecure_off_loopback;
        c.resolve()
    }
}

/// Parses, runs, reports.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Before anything is opened: what is open now was inherited.
    if cli.flags.detached
        && let Err(error) = detach::detach()
    {
        eprintln!("kvkeepd: cannot let go of what was inherited: {error}");
        return ExitCode::FAILURE;
    }
    log_to_stderr();
    let run = match cli.command {
        Some(Command::Config { what }) => look(cli.flags, what),
        None => cli.flags.config().map_err(anyhow::Error::from).and_then(start),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvkeepd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn look(flags: Flags, what: ConfigCommand) -> anyhow::Result<()> {
    let config = flags.config()?;
    match what {
        ConfigCommand::Check => println!("the configuration is good"),
        ConfigCommand::Show => print!("{}", config.to_toml()),
    }
    Ok(())
}

/// Warnings of the configuration are told in the log as well: it is set up first.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVKEEP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

fn start(config: Config) -> anyhow::Result<()> {
    if let Some(address) = config.listen.metrics {
        metrics_exporter_prometheus::PrometheusBuilder::new()
            .with_http_listener(address)
            .install()
            .with_context(|| format!("cannot serve metrics on {address}"))?;
    }
    if let Some(listen) = config.listen.grpc.address()
        && !listen.ip().is_loopback()
        && config.listen.insecure_off_loopback
    {
        tracing::warn!(%listen, "serving beyond loopback without TLS or tokens, as told");
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    stop_on_signals(stop.clone())?;
    tracing::info!(
        data_dir = %config.data_dir.display(),
        arena = %config.arena.bytes,
        nvme = %if config.nvme.off { "off".to_string() } else { config.nvme.bytes.to_string() },
        keep_free = %config.nvme.keep_free_bytes,
        tls = config.listen.tls_cert.is_some(),
        tokens = config.auth.tokens_file.is_some(),
        "starting"
    );
    // The index is read and old arena files are verified on this thread; nobody is served yet.
    let (store, background) = tokio::task::spawn_blocking(move || Store::open(config)).await??;
    store.start(background);
    let bound = match server::bind(std::sync::Arc::clone(&store)).await {
        Ok(bound) => bound,
        Err(error) => {
            // Nothing of a start that failed stays behind, in memory least of all.
            store.close().await;
            return Err(error);
        }
    };
    let report = &store.report;
    tracing::info!(
        io = %report.io_engine,
        arena_page_bytes = report.arena_page_bytes,
        index_entries = report.index_entries,
        adopted_slots = report.adopted_slots,
        "open"
    );
    report.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    // Scripts wait for this line.
    println!("kvkeepd ready listen={}", bound.ready()?);
    if let Some(after) = store.config.exit_when_idle() {
        tokio::spawn(stop_when_idle(std::sync::Arc::clone(&store.instances), after, stop.clone()));
    }
    let served = bound.serve(stop).await;
    tracing::info!("draining");
    store.close().await;
    tracing::info!("stopped");
    served
}

async fn stop_when_idle(instances: std::sync::Arc<Instances>, after: Duration, stop: CancellationToken) {
    let idle = idle::idle(&instances, after).await;
    tracing::info!(idle_ms = idle.as_millis(), "stopping: nobody is connected (listen.exit_when_idle_ms)");
    stop.cancel();
}

fn stop_on_signals(stop: CancellationToken) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        stop.cancel();
    });
    Ok(())
}
