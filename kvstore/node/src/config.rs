//! Configuration: defaults < TOML file < environment < flags. Every limit has a unit in its name; the relations between
//! fields are checked once, at start.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_core::{Error, ErrorKind, PolicyKind, Result};
use serde::{Deserialize, Serialize};

use crate::address::{self, BlockListen, TcpListen};
use crate::machine;
use crate::size::ByteSize;

/// Where the policy's clock comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum PolicyClock {
    /// This host's monotonic clock.
    #[default]
    Monotonic,
    /// `policy_clock_ms` of the requests: a trace replays faster than it happened. For tests and benches.
    Request,
}

/// Everything a node can be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this node in answers, logs and metrics.
    pub node_name: String,
    /// Everything that must survive a restart.
    pub data_dir: PathBuf,
    /// What decides which block goes next: `sage` (learned) or `lru`.
    pub policy: PolicyKind,
    /// Where the policy's clock comes from.
    pub policy_clock: PolicyClock,
    /// Who may connect, and where.
    pub listen: Listen,
    /// Who is who.
    pub auth: Auth,
    /// L2.
    pub arena: ArenaSection,
    /// L3.
    pub nvme: NvmeSection,
    /// Sessions.
    pub sessions: SessionsSection,
    /// Bounds on what clients may ask.
    pub limits: LimitsSection,
}

/// Listeners.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// gRPC over TCP. Off loopback it needs TLS and tokens. `off`: the Unix socket only.
    pub grpc: TcpListen,
    /// The block protocol over TCP, with the TLS of `grpc`. `auto`: on the address of `grpc`, one port higher (where that is
    /// 0: any; where it is `off`: nowhere). `off`: none.
    pub block: BlockListen,
    /// gRPC and the block protocol over a Unix socket; peers are known by their uid. `auto`: `kvkeepd.sock` in the data
    /// folder, which lets in only the server's own user and root. Empty or `off`: none. Resolved: an absolute path, or empty.
    pub unix: PathBuf,
    /// Prometheus metrics over HTTP; loopback only, no authentication. Absent: none.
    pub metrics: Option<SocketAddr>,
    /// TLS certificate chain (PEM).
    pub tls_cert: Option<PathBuf>,
    /// TLS private key (PEM, mode 0600).
    pub tls_key: Option<PathBuf>,
    /// Serve beyond loopback without TLS or without tokens. Said loudly at start.
    pub insecure_off_loopback: bool,
    /// Connections at a time.
    pub connections_max: u32,
    /// Stop, as by SIGTERM, when no connection has been open for so long, counted from the start as well, ms; 0: never.
    pub exit_when_idle_ms: u32,
}

/// Tokens and peers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// File of `tenant token [admin]` lines, mode 0600. Absent: every loopback client is the tenant `default` and admin.
    pub tokens_file: Option<PathBuf>,
    /// User ids beside the server's own that may use the Unix socket, as the tenant `default`.
    pub unix_uids: BTreeSet<u32>,
    /// Of these, those that may map the arena read-only, beside the server's own user and root. A process that may map sees
    /// every block of its tenant.
    pub map_uids: BTreeSet<u32>,
}

/// The arena.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ArenaSection {
    /// Size; 0: 25 % of min(available memory, cgroup limit).
    pub bytes: ByteSize,
    /// Folder on tmpfs (or hugetlbfs) that holds a folder per node.
    pub dir: PathBuf,
    /// Ask for huge pages.
    pub huge_pages: bool,
    /// Empty memory that is kept populated ahead of demand, two files at least: what comes into it does not wait for the kernel to
    /// clear pages. As much as `bytes`: all of it, from the start on.
    pub ready_bytes: ByteSize,
    /// Evict ahead of demand when less than this share of the arena is free, percent.
    pub low_watermark_percent: u8,
    /// ... until this share is free, percent.
    pub high_watermark_percent: u8,
    /// Bytes committed and not yet on NVMe; beyond it puts that asked to keep everything wait, others are not written.
    /// 0: a quarter of the arena.
    pub dirty_bytes_max: ByteSize,
    /// Kept free for blocks that come up from NVMe, so that puts cannot starve reads. 0: 1/64 of the arena.
    pub l3_read_reserve_bytes: ByteSize,
    /// How fast a background scrub checks DRAM copies, bytes per second; 0: no scrub.
    pub scrub_bytes_per_s: ByteSize,
    /// How much of a block is compared with its sums on the way from DRAM into a region of the same host. What leaves for a
    /// socket is always compared.
    pub verify_dram: VerifyDram,
}

/// What of a block is compared on its way into a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum VerifyDram {
    /// Nothing; the scrub covers DRAM.
    Never,
    /// 64 KiB of each block, another 64 KiB each time.
    #[default]
    Sampled,
    /// All of it.
    Always,
}

/// The NVMe store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NvmeSection {
    /// Turn L3 off: blocks live in memory only (a restart of the server finds them again, one of the machine does not), and
    /// durable puts are refused.
    pub off: bool,
    /// Size; 0: half of what is free beyond `keep_free_bytes`, at most 64 GiB.
    pub bytes: ByteSize,
    /// Never fill the file system beyond this.
    pub keep_free_bytes: ByteSize,
    /// One segment file.
    pub segment_bytes: ByteSize,
    /// Bytes a day that may be written below class durable; 0: unlimited.
    pub write_budget_bytes_per_day: ByteSize,
    /// Operations in flight on the device.
    pub queue_depth_max: u32,
    /// Use `pread/pwrite` even where io_uring works.
    pub no_io_uring: bool,
    /// Blocks being written in the background at a time.
    pub write_behind_depth: u32,
    /// How fast the warm set comes back after a start, bytes per second; 0: not at all.
    pub warm_bytes_per_s: ByteSize,
    /// Background scrub, bytes per second; 0: none.
    pub scrub_bytes_per_s: ByteSize,
    /// A block that is read from NVMe into a region goes there straight, and is not brought up to DRAM before this use of it
    /// since it was stored or opened; 0: never.
    pub promote_at_use: u32,
}

/// Sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionsSection {
    /// Between two sweeps for durable blocks that no session names any more, ms. The second sweep that finds a block removes it.
    pub sweep_every_ms: u64,
}

/// Bounds on what clients may ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsSection {
    /// Keys of one call.
    pub batch_keys_max: u32,
    /// Chains of one match.
    pub match_queries_max: u32,
    /// One block.
    pub block_bytes_max: ByteSize,
    /// Data of one write or get message.
    pub chunk_bytes_max: u32,
    /// Slots granted by one reserve.
    pub reserve_bytes_max: ByteSize,
    /// Reserved and not yet committed, all clients together. 0: a quarter of the arena.
    pub reserved_bytes_max: ByteSize,
    /// A reservation not committed by then is abandoned, ms.
    pub reservation_ms: u32,
    /// Leases of one engine instance.
    pub leases_per_instance_max: u32,
    /// Positions leased by one engine instance.
    pub leased_positions_per_instance_max: u32,
    /// Longest lease term, ms.
    pub lease_ttl_ms_max: u32,
    /// Lease term where the client names none, ms.
    pub lease_ttl_ms_default: u32,
    /// However often it is renewed, ms.
    pub lease_life_ms_max: u32,
    /// Longest deadline a call may have, ms.
    pub deadline_ms_max: u32,
    /// Deadline of a call that names none, ms.
    pub deadline_ms_default: u32,
    /// An engine instance ends so long after its last connection closed, ms.
    pub instance_grace_ms: u32,
    /// Positions tracked.
    pub positions_max: u32,
    /// Positions that the policy remembers after they left, at 32 bytes each.
    pub ghosts_max: u32,
    /// Positions of one tenant in pinned sessions.
    pub pinned_positions_max: u32,
    /// Events kept for watchers.
    pub events_max: u32,
    /// Watchers at a time.
    pub watchers_max: u32,
    /// History entries kept for `explain`.
    pub history_max: u32,
    /// Prefetched blocks under way or waiting.
    pub prefetch_queue_max: u32,
    /// NVMe reads of one get under way, in bytes.
    pub get_read_ahead_bytes: ByteSize,
    /// Memory that one engine instance may register, all its regions together. 0: half of what is available.
    pub region_bytes_max: ByteSize,
    /// Regions of one engine instance.
    pub regions_max: u32,
    /// Runs of memory that one call may name.
    pub runs_max: u32,
    /// Slots held for the mapped reads of one engine instance, in bytes. 0: a quarter of the arena.
    pub mapped_bytes_max: ByteSize,
    /// Block protocol: calls in flight on one connection.
    pub calls_per_connection_max: u32,
    /// Block protocol: bytes of one envelope.
    pub envelope_bytes_max: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: "node-0".into(),
            data_dir: PathBuf::from("kvkeep-data"),
            policy: PolicyKind::Sage,
            policy_clock: PolicyClock::Monotonic,
            listen: Listen::default(),
            auth: Auth::default(),
            arena: ArenaSection::default(),
            nvme: NvmeSection::default(),
            sessions: SessionsSection::default(),
            limits: LimitsSection::default(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            grpc: TcpListen::At(SocketAddr::from(([127, 0, 0, 1], 7070))),
            block: BlockListen::default(),
            unix: PathBuf::from(address::AUTO),
            metrics: None,
            tls_cert: None,
            tls_key: None,
            insecure_off_loopback: false,
            connections_max: 1024,
            exit_when_idle_ms: 0,
        }
    }
}

#[expect(clippy::derivable_impls, reason = "defaults of every section stand together, spelled out")]
impl Default for Auth {
    fn default() -> Self {
        Self { tokens_file: None, unix_uids: BTreeSet::new(), map_uids: BTreeSet::new() }
    }
}

impl Default for ArenaSection {
    fn default() -> Self {
        Self {
            bytes: ByteSize(0),
            dir: PathBuf::from("/dev/shm"),
            huge_pages: false,
            ready_bytes: ByteSize(0),
            low_watermark_percent: 8,
            high_watermark_percent: 12,
            dirty_bytes_max: ByteSize(0),
            l3_read_reserve_bytes: ByteSize(0),
            scrub_bytes_per_s: ByteSize::mib(16),
            verify_dram: VerifyDram::Sampled,
        }
    }
}

impl Default for NvmeSection {
    fn default() -> Self {
        Self {
            off: false,
            bytes: ByteSize(0),
            keep_free_bytes: ByteSize::gib(4),
            segment_bytes: ByteSize::gib(1),
            write_budget_bytes_per_day: ByteSize(0),
            queue_depth_max: 64,
            no_io_uring: false,
            write_behind_depth: 16,
            warm_bytes_per_s: ByteSize::mib(512),
            scrub_bytes_per_s: ByteSize::mib(8),
            promote_at_use: 3,
        }
    }
}

impl Default for SessionsSection {
    fn default() -> Self {
        Self { sweep_every_ms: 600_000 }
    }
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            batch_keys_max: 8192,
            match_queries_max: 256,
            block_bytes_max: ByteSize(BLOCK_BYTES_MAX),
            chunk_bytes_max: 1 << 20,
            reserve_bytes_max: ByteSize::mib(256),
            reserved_bytes_max: ByteSize(0),
            reservation_ms: 30_000,
            leases_per_instance_max: 16_384,
            leased_positions_per_instance_max: 1 << 20,
            lease_ttl_ms_max: 60_000,
            lease_ttl_ms_default: 10_000,
            lease_life_ms_max: 900_000,
            deadline_ms_max: 120_000,
            deadline_ms_default: 30_000,
            instance_grace_ms: 5_000,
            positions_max: 50_000_000,
            ghosts_max: 4 * 1024 * 1024,
            pinned_positions_max: 1 << 18,
            events_max: 65_536,
            watchers_max: 64,
            history_max: 65_536,
            prefetch_queue_max: 4_096,
            get_read_ahead_bytes: ByteSize::mib(32),
            region_bytes_max: ByteSize(0),
            regions_max: 64,
            runs_max: 65_536,
            mapped_bytes_max: ByteSize(0),
            calls_per_connection_max: 64,
            envelope_bytes_max: 4 << 20,
        }
    }
}

/// Smallest arena that can work: one file, its tables, and room to evict ahead.
const ARENA_BYTES_MIN: u64 = 64 << 20;
/// Smallest NVMe store.
const NVME_BYTES_MIN: u64 = 64 << 20;
/// Shortest idleness that ends a node, ms: a client that has just started it must get the time to connect.
const EXIT_WHEN_IDLE_MS_MIN: u32 = 100;
/// Longest one, ms: 30 days.
const EXIT_WHEN_IDLE_MS_MAX: u32 = 30 * 24 * 3_600_000;
/// Largest NVMe store that is chosen without being asked for.
const NVME_BYTES_DEFAULT_MAX: u64 = 64 << 30;

impl Config {
    /// Reads a TOML file. An unknown field is an error: a misspelt limit must not be ignored.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::new(ErrorKind::Config, "the configuration file cannot be read")
                .with("path", path.display())
                .with("cause", e)
        })?;
        Self::from_toml(&text).map_err(|e| e.with("path", path.display()))
    }

    /// Parses TOML text.
    pub fn from_toml(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            Error::new(ErrorKind::Config, "the configuration does not parse")
                .with("cause", e.to_string().replace('\n', " "))
        })
    }

    /// As TOML, every field spelled out.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every field is a table, number, text or list")
    }

    /// Puts numbers in the place of "0: choose for me", from what this machine has, and a path in the place of `auto`.
    pub fn resolve(mut self) -> Result<Self> {
        self.listen.unix = address::unix_socket(&self.listen.unix, &self.data_dir);
        if self.arena.bytes.0 == 0 {
            let quarter = machine::memory_for_us()?.0 / 4;
            self.arena.bytes = ByteSize(quarter / (1 << 20) * (1 << 20));
        }
        if self.arena.dirty_bytes_max.0 == 0 {
            self.arena.dirty_bytes_max = ByteSize(self.arena.bytes.0 / 4);
        }
        if self.arena.l3_read_reserve_bytes.0 == 0 {
            self.arena.l3_read_reserve_bytes = ByteSize(self.arena.bytes.0 / 64);
        }
        if self.limits.region_bytes_max.0 == 0 {
            self.limits.region_bytes_max = ByteSize(machine::memory_for_us()?.0 / 2 / (1 << 20) * (1 << 20));
        }
        if self.limits.mapped_bytes_max.0 == 0 {
            self.limits.mapped_bytes_max = ByteSize(self.arena.bytes.0 / 4);
        }
        if self.limits.reserved_bytes_max.0 == 0 {
            self.limits.reserved_bytes_max = ByteSize(self.arena.bytes.0 / 4);
        }
        if !self.nvme.off && self.nvme.bytes.0 == 0 {
            let free = machine::disk_free(&self.data_dir)?.0.saturating_sub(self.nvme.keep_free_bytes.0);
            // What an earlier run preallocated is ours again.
            let ours = machine::folder_bytes(&self.data_dir.join("nvme").join("segments"));
            self.nvme.bytes = ByteSize(((free + ours) / 2).min(NVME_BYTES_DEFAULT_MAX) / (1 << 20) * (1 << 20));
        }
        // A file of the arena holds the largest block, and an arena of a few files serves a few tenants.
        self.limits.block_bytes_max =
            ByteSize(self.limits.block_bytes_max.0.min((self.arena.bytes.0 / 8).max(1 << 20)));
        self.limits.reserve_bytes_max = ByteSize(self.limits.reserve_bytes_max.0.min(self.limits.reserved_bytes_max.0));
        // Segments are whole: a small store has smaller ones, so that freeing and filling one never takes all of it.
        self.nvme.segment_bytes =
            ByteSize(self.nvme.segment_bytes.0.min((self.nvme.bytes.0 / 4).next_multiple_of(1 << 20)).max(16 << 20));
        // One lease may not be longer than a lease may live, and so on: the relations are checked, not bent.
        self.check()?;
        Ok(self)
    }

    /// Checks every relation between fields of a resolved configuration; the error names the two that disagree.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &'static str| Error::new(ErrorKind::Config, what);
        let l = &self.limits;
        if self.node_name.is_empty() || self.node_name.len() > 64 {
            return Err(bad("node_name has 1 to 64 bytes"));
        }
        if self.arena.bytes.0 < ARENA_BYTES_MIN {
            return Err(bad("arena.bytes is at least 64MiB").with("arena.bytes", self.arena.bytes));
        }
        let (low, high) = (self.arena.low_watermark_percent, self.arena.high_watermark_percent);
        if low == 0 || low >= high || high > 75 {
            return Err(bad("arena watermarks are 0 < low_watermark_percent < high_watermark_percent <= 75")
                .with("arena.low_watermark_percent", low)
                .with("arena.high_watermark_percent", high));
        }
        if self.arena.ready_bytes.0 > self.arena.bytes.0 {
            return Err(
                bad("arena.ready_bytes is at most arena.bytes").with("arena.ready_bytes", self.arena.ready_bytes)
            );
        }
        if self.arena.dirty_bytes_max.0 > self.arena.bytes.0 {
            return Err(bad("arena.dirty_bytes_max is at most arena.bytes")
                .with("arena.dirty_bytes_max", self.arena.dirty_bytes_max));
        }
        if self.arena.l3_read_reserve_bytes.0 > self.arena.bytes.0 / 4 {
            return Err(bad("arena.l3_read_reserve_bytes is at most a quarter of arena.bytes")
                .with("arena.l3_read_reserve_bytes", self.arena.l3_read_reserve_bytes));
        }
        if !self.nvme.off {
            if self.nvme.bytes.0 < NVME_BYTES_MIN {
                return Err(bad(
                    "nvme.bytes is at least 64MiB; free disk space, lower nvme.keep_free_bytes, or set nvme.off",
                )
                .with("nvme.bytes", self.nvme.bytes)
                .with("nvme.keep_free_bytes", self.nvme.keep_free_bytes));
            }
            if self.nvme.queue_depth_max == 0 || self.nvme.queue_depth_max > 4096 || self.nvme.write_behind_depth == 0 {
                return Err(bad("nvme.queue_depth_max is 1 to 4096 and nvme.write_behind_depth at least 1"));
            }
        }
        if l.block_bytes_max.0 > BLOCK_BYTES_MAX || l.block_bytes_max.0 < 1024 {
            return Err(
                bad("limits.block_bytes_max is 1KiB to 128MiB").with("limits.block_bytes_max", l.block_bytes_max)
            );
        }
        if l.reserve_bytes_max.0 < l.block_bytes_max.0.min(self.arena.bytes.0 / 4) {
            return Err(bad("limits.reserve_bytes_max holds at least one block")
                .with("limits.reserve_bytes_max", l.reserve_bytes_max)
                .with("limits.block_bytes_max", l.block_bytes_max));
        }
        if l.reserved_bytes_max.0 > self.arena.bytes.0 / 2 {
            return Err(bad("limits.reserved_bytes_max is at most half of arena.bytes")
                .with("limits.reserved_bytes_max", l.reserved_bytes_max)
                .with("arena.bytes", self.arena.bytes));
        }
        if !(4096..=(4 << 20)).contains(&l.chunk_bytes_max) {
            return Err(bad("limits.chunk_bytes_max is 4KiB to 4MiB").with("limits.chunk_bytes_max", l.chunk_bytes_max));
        }
        for (name, value, max) in [
            ("limits.batch_keys_max", l.batch_keys_max, 65_536),
            ("limits.match_queries_max", l.match_queries_max, 4_096),
            ("limits.leases_per_instance_max", l.leases_per_instance_max, 1 << 20),
            ("limits.leased_positions_per_instance_max", l.leased_positions_per_instance_max, 1 << 26),
            ("limits.positions_max", l.positions_max, 1 << 30),
            ("limits.ghosts_max", l.ghosts_max, 1 << 30),
            ("limits.pinned_positions_max", l.pinned_positions_max, 1 << 24),
            ("limits.events_max", l.events_max, 1 << 24),
            ("limits.watchers_max", l.watchers_max, 4_096),
            ("limits.history_max", l.history_max, 1 << 24),
            ("limits.prefetch_queue_max", l.prefetch_queue_max, 1 << 20),
            ("limits.reservation_ms", l.reservation_ms, 600_000),
            ("listen.connections_max", self.listen.connections_max, 65_536),
        ] {
            if value == 0 || value > max {
                return Err(bad("a limit is at least 1 and has an upper end").with(name, value).with("max", max));
            }
        }
        if l.lease_ttl_ms_default > l.lease_ttl_ms_max
            || l.lease_ttl_ms_max > l.lease_life_ms_max
            || l.lease_ttl_ms_default == 0
        {
            return Err(bad("lease terms are 0 < lease_ttl_ms_default <= lease_ttl_ms_max <= lease_life_ms_max")
                .with("limits.lease_ttl_ms_default", l.lease_ttl_ms_default)
                .with("limits.lease_ttl_ms_max", l.lease_ttl_ms_max)
                .with("limits.lease_life_ms_max", l.lease_life_ms_max));
        }
        if l.calls_per_connection_max == 0 || !(64 << 10..=64 << 20).contains(&l.envelope_bytes_max) || l.runs_max == 0
        {
            return Err(bad(
                "limits.calls_per_connection_max and limits.runs_max are at least 1, limits.envelope_bytes_max 64KiB to 64MiB",
            )
            .with("limits.envelope_bytes_max", l.envelope_bytes_max));
        }
        if l.mapped_bytes_max.0 > self.arena.bytes.0 / 2 {
            return Err(bad("limits.mapped_bytes_max is at most half of arena.bytes")
                .with("limits.mapped_bytes_max", l.mapped_bytes_max)
                .with("arena.bytes", self.arena.bytes));
        }
        if !(1_000..=86_400_000).contains(&self.sessions.sweep_every_ms) {
            return Err(bad("sessions.sweep_every_ms is 1000 (a second) to 86400000 (a day)")
                .with("sessions.sweep_every_ms", self.sessions.sweep_every_ms));
        }
        if l.deadline_ms_default > l.deadline_ms_max || l.deadline_ms_default == 0 {
            return Err(bad("deadlines are 0 < deadline_ms_default <= deadline_ms_max")
                .with("limits.deadline_ms_default", l.deadline_ms_default)
                .with("limits.deadline_ms_max", l.deadline_ms_max));
        }
        self.check_listeners()
    }

    fn check_listeners(&self) -> Result<()> {
        let bad = |what: &'static str| Error::new(ErrorKind::Config, what);
        let l = &self.listen;
        if l.tls_cert.is_some() != l.tls_key.is_some() {
            return Err(bad("listen.tls_cert and listen.tls_key come together"));
        }
        if let Some(m) = l.metrics
            && !m.ip().is_loopback()
        {
            return Err(bad("listen.metrics has no authentication: loopback only; put a proxy in front")
                .with("listen.metrics", m));
        }
        let guarded = l.tls_cert.is_some() && self.auth.tokens_file.is_some();
        if let BlockListen::At(block) = l.block
            && !block.ip().is_loopback()
            && !guarded
            && !l.insecure_off_loopback
        {
            return Err(bad("beyond loopback TLS and tokens are required for the block port as well")
                .with("listen.block", block));
        }
        if let Some(uid) = self.auth.map_uids.difference(&self.auth.unix_uids).next() {
            return Err(
                bad("who may map must be let in: auth.map_uids are among auth.unix_uids").with("auth.map_uids", uid)
            );
        }
        let grpc = l.grpc.address();
        if grpc.is_none() && l.unix.as_os_str().is_empty() {
            return Err(bad(
                "nothing to listen on: listen.grpc (--listen) is an address, or listen.unix (--unix-socket) a path",
            ));
        }
        address::fits(&l.unix)?;
        if l.exit_when_idle_ms != 0 && !(EXIT_WHEN_IDLE_MS_MIN..=EXIT_WHEN_IDLE_MS_MAX).contains(&l.exit_when_idle_ms) {
            return Err(bad("listen.exit_when_idle_ms is 0 (never), or 100 ms to 30 days")
                .with("listen.exit_when_idle_ms", l.exit_when_idle_ms));
        }
        if grpc.is_some_and(|a| !a.ip().is_loopback()) && !guarded && !l.insecure_off_loopback {
            return Err(bad(
                "beyond loopback TLS (listen.tls_cert, listen.tls_key) and tokens (auth.tokens_file) are required; \
                 listen.insecure_off_loopback = true overrides",
            )
            .with("listen.grpc", l.grpc));
        }
        Ok(())
    }

    /// [`Listen::exit_when_idle_ms`] as a duration; `None`: never.
    pub fn exit_when_idle(&self) -> Option<Duration> {
        Some(self.listen.exit_when_idle_ms).filter(|ms| *ms != 0).map(|ms| Duration::from_millis(u64::from(ms)))
    }

    /// [`LimitsSection::instance_grace_ms`] as a duration.
    pub fn instance_grace(&self) -> Duration {
        Duration::from_millis(u64::from(self.limits.instance_grace_ms))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn resolved() -> Config {
        let mut c = Config { data_dir: std::env::temp_dir(), ..Config::default() };
        c.arena.bytes = ByteSize::mib(256);
        c.nvme.bytes = ByteSize::gib(1);
        c.resolve().unwrap()
    }

    #[test]
    fn what_is_shown_can_be_read_back() {
        let c = resolved();
        assert!(c.listen.unix.is_absolute(), "{:?}", c.listen.unix);
        assert_eq!(Config::from_toml(&c.to_toml()).unwrap(), c);
        let mut c = resolved();
        c.listen.grpc = TcpListen::Off;
        c.listen.exit_when_idle_ms = 30_000;
        assert_eq!(Config::from_toml(&c.to_toml()).unwrap().resolve().unwrap(), c);
        c.listen.grpc = Listen::default().grpc;
        c.listen.unix = PathBuf::new();
        assert_eq!(Config::from_toml(&c.to_toml()).unwrap().resolve().unwrap(), c, "what is off stays off");
    }

    #[test]
    fn a_misspelt_field_is_refused() {
        let e = Config::from_toml("[limits]\nbatch_key_max = 3\n").unwrap_err();
        assert!(e.to_string().contains("batch_key_max"), "{e}");
    }

    #[test]
    fn beyond_loopback_without_tls_or_tokens_is_refused_unless_told_so() {
        let mut c = resolved();
        c.listen.grpc = "0.0.0.0:7070".parse().unwrap();
        assert!(c.check().unwrap_err().to_string().contains("TLS"));
        c.listen.insecure_off_loopback = true;
        c.check().unwrap();
    }

    /// Breaks one relation at a time: each is refused with the name of a field in it.
    #[test]
    fn broken_relations_name_their_fields() {
        type Change = fn(&mut Config);
        let cases: [(&str, Change); 11] = [
            ("low_watermark_percent", |c| c.arena.low_watermark_percent = 40),
            ("lease_ttl_ms_max", |c| c.limits.lease_ttl_ms_max = 1),
            ("deadline_ms_default", |c| c.limits.deadline_ms_default = u32::MAX),
            ("batch_keys_max", |c| c.limits.batch_keys_max = 0),
            ("reserved_bytes_max", |c| c.limits.reserved_bytes_max = ByteSize::gib(9)),
            ("arena.bytes", |c| c.arena.bytes = ByteSize(1)),
            ("tls_key", |c| c.listen.tls_cert = Some("x".into())),
            ("listen.unix", |c| {
                c.listen.grpc = TcpListen::Off;
                c.listen.unix = PathBuf::new();
            }),
            ("listen.unix", |c| c.listen.unix = PathBuf::from(format!("/{}", "s".repeat(107)))),
            ("exit_when_idle_ms", |c| c.listen.exit_when_idle_ms = 99),
            ("exit_when_idle_ms", |c| c.listen.exit_when_idle_ms = u32::MAX),
        ];
        for (field, change) in cases {
            let mut c = resolved();
            change(&mut c);
            let e = c.check().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Config);
            assert!(e.to_string().contains(field), "{field}: {e}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
            let _ = Config::from_toml(&text);
        }
    }
}
