//! Processes that a bench starts: a `kvkeepd` beside this program, or this program itself as the bare service.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::measure::cpu_seconds;

/// Longest wait for a process to say that it serves.
const READY_WAIT: Duration = Duration::from_secs(120);
/// Longest wait for a process to end after SIGTERM.
const DRAIN_WAIT: Duration = Duration::from_secs(60);
/// What a process prints before its address when it serves.
const READY: &str = " ready listen=";
/// Lines of a log shown when a process does not come up.
const LOG_LINES: usize = 20;

/// How to start a process again and again.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The program.
    pub program: PathBuf,
    /// Its arguments but the address.
    pub args: Vec<OsString>,
    /// Where its standard error goes, appended.
    pub log: PathBuf,
}

/// A running process that serves; killed when dropped.
pub struct Node {
    child: Child,
    pid: u32,
    /// `host:port`.
    pub listen: String,
    /// From its start to its readiness.
    pub start_took: Duration,
}

/// The program of this name beside this one, unless another is named.
pub fn beside(name: &str, named: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe().context("where is this program?")?.with_file_name(name),
    };
    if !path.is_file() {
        bail!("there is no {}: build it (`make build`), or name another", path.display());
    }
    Ok(path)
}

impl Recipe {
    /// A `kvkeepd` over a data folder.
    pub fn kvkeepd(named: Option<&Path>, data: &DataDir, more: &[String]) -> anyhow::Result<Self> {
        let mut args: Vec<OsString> = vec!["--data-dir".into(), data.path().into()];
        if let DataDir::Fresh { arena: Some(arena), .. } = data {
            args.extend(["--arena-dir".into(), arena.path().into()]);
        }
        args.extend(more.iter().map(OsString::from));
        Ok(Self { program: beside("kvkeepd", named)?, args, log: data.path().join("kvkeepd.log") })
    }

    /// Starts it on `listen` and waits until it serves.
    pub async fn start(&self, listen: &str) -> anyhow::Result<Node> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("log {}", self.log.display()))?;
        let began = Instant::now();
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .args(["--listen", listen])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        let pid = child.id().context("the process is gone")?;
        let mut lines = BufReader::new(child.stdout.take().context("its output is piped")?).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if let Some((_, listen)) = line.split_once(READY) {
                    return Ok(listen.trim().to_owned());
                }
            }
            bail!("it ended before it served")
        };
        let listen = match tokio::time::timeout(READY_WAIT, ready).await {
            Ok(Ok(listen)) => listen,
            Ok(Err(e)) => return Err(e.context(self.failed())),
            Err(_) => bail!("not ready after {READY_WAIT:?}. {}", self.failed()),
        };
        // Whatever else it prints is taken from it, so that it never waits for a reader.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Node { child, pid, listen, start_took: began.elapsed() })
    }

    fn failed(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        format!("{} does not come up; its last words:\n{tail}", self.program.display())
    }
}

impl Node {
    /// For a client.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// CPU seconds it has used.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid).unwrap_or_default()
    }

    /// SIGKILL; returns when it is gone.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("SIGKILL")
    }

    /// SIGTERM; returns when it is gone.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw).context("its process id")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("SIGTERM")?;
        match tokio::time::timeout(DRAIN_WAIT, self.child.wait()).await {
            Ok(status) => {
                let status = status.context("wait for its end")?;
                if !status.success() {
                    bail!("it ended with {status} after SIGTERM");
                }
                Ok(())
            }
            Err(_) => bail!("it did not end within {DRAIN_WAIT:?} of SIGTERM"),
        }
    }
}

/// A folder for a node's data: the one that was named, else a new one beside this program (a disk, where the system's
/// folder for temporary files may be memory), removed at the end.
pub enum DataDir {
    /// Kept.
    Named(PathBuf),
    /// Removed with this value.
    Fresh {
        /// On a disk.
        data: tempfile::TempDir,
        /// In memory, for the arena: a killed node leaves its files there.
        arena: Option<tempfile::TempDir>,
    },
}

/// Where Linux has a file system in memory.
const SHARED_MEMORY: &str = "/dev/shm";
/// What our folders begin with.
const PREFIX: &str = "kvkeep-bench-";

impl DataDir {
    /// Makes it.
    pub fn open(named: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(path) = named {
            std::fs::create_dir_all(path).with_context(|| format!("folder {}", path.display()))?;
            return Ok(Self::Named(path.to_owned()));
        }
        let own = std::env::current_exe().context("where is this program?")?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        let data = match own.parent().map(|folder| builder.tempdir_in(folder)) {
            Some(Ok(dir)) => dir,
            _ => builder.tempdir().context("a folder for the node's data")?,
        };
        // Without one the node finds a place of its own.
        Ok(Self::Fresh { data, arena: builder.tempdir_in(SHARED_MEMORY).ok() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Named(path) => path,
            Self::Fresh { data, .. } => data.path(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_ends_at_once_is_told_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), "echo no such disk >&2".into()],
            log: dir.path().join("log"),
        };
        let why = format!("{:#}", recipe.start("127.0.0.1:0").await.err().unwrap());
        assert!(why.contains("no such disk"), "{why}");
    }

    #[tokio::test]
    async fn a_process_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), "echo it ready listen=127.0.0.1:7; exec sleep 1000".into()],
            log: dir.path().join("log"),
        };
        let node = recipe.start("127.0.0.1:0").await.unwrap();
        assert_eq!(node.endpoint(), "http://127.0.0.1:7");
        let pid = node.pid;
        node.kill().await.unwrap();
        assert!(cpu_seconds(pid).is_none());
    }
}
