//! A private server: `local:DIR` starts a `kvkeepd` over a folder where none answers, and is from then on a server like any
//! other, reached over its Unix socket. Programs that name the same folder share it; when the last has gone it ends by
//! itself, and the next start finds its blocks.
//!
//! ```text
//! socket answers? -> done
//! start.lock (flock: one starter at a time, dropped by the kernel with its holder)
//!   socket answers? -> done, another was faster
//!   lock of the data folder held? -> a server is starting or stopping: wait for it
//!   else spawn kvkeepd, wait until it answers, or until it ends: then its last words are the error
//! ```
//! The data folder's own lock, taken by the server, is what makes two servers impossible; `start.lock` only keeps starters
//! from spawning servers in vain.

mod binary;
mod start;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::size::ByteSize;
use parking_lot::Mutex;
use tokio::net::UnixStream;

use crate::endpoint::{self, fits};
use crate::error::{Error, ErrorKind, Result};

pub use binary::KVKEEPD_VARIABLE;
pub use start::START_MAX;

/// What a local endpoint begins with.
pub(crate) const SCHEME: &str = "local:";
/// Name of the socket in the folder.
const SOCKET: &str = "kvkeepd.sock";
/// A private server ends when nobody has been connected for so long, where the endpoint does not say, s.
const IDLE_DEFAULT_S: u32 = 30;
/// Longest such time that an endpoint may name, s: 30 days.
const IDLE_MAX_S: u32 = 30 * 24 * 3600;
/// Longest wait for a socket that exists to take a connection.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// A start that failed is not tried again by the same client before so long: a server that cannot start must not cost an
/// engine a process for every call.
const START_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// `local:DIR?dram=4GiB&nvme=50GiB&idle=30`: a folder, and the server that is started over it.
///
/// | parameter | meaning | where it is left out |
/// |---|---|---|
/// | `dram` | memory for blocks | what `kvkeepd` chooses: a quarter of what is available |
/// | `nvme` | disk for blocks; `off`: none | what `kvkeepd` chooses: half of what is free, at most 64 GiB |
/// | `idle` | seconds without a connection after which the server ends; 0: never | 30 |
///
/// They count for the server that is started; one that runs already stays as it is, and a difference is logged.
#[derive(Clone)]
pub struct LocalEndpoint {
    folder: PathBuf,
    dram: Option<ByteSize>,
    nvme: Option<Nvme>,
    idle_s: Option<u32>,
    /// When the last start failed, and why; shared by the connections of a client.
    failed: Arc<Mutex<Option<(Instant, Error)>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nvme {
    Off,
    Bytes(ByteSize),
}

impl FromStr for LocalEndpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text).map_err(|e| e.with("endpoint", text))
    }
}

impl LocalEndpoint {
    fn parse(text: &str) -> Result<Self> {
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| Error::config("a local endpoint begins with local:"))?;
        let (folder, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        let folder = match folder.strip_prefix("//") {
            Some(path) if path.starts_with('/') => path,
            Some(_) => return Err(Error::config("a local endpoint names no host: local:/path/of/folder")),
            None => folder,
        };
        if folder.is_empty() {
            return Err(Error::config("a local endpoint names a folder: local:/path/of/folder"));
        }
        if folder.starts_with('~') {
            return Err(Error::config("nothing expands ~ in an endpoint: write the folder's whole path"));
        }
        let folder = std::path::absolute(folder)
            .map_err(|e| Error::config("the folder is relative, and there is no current folder").caused_by(e))?;
        let mut endpoint = Self { folder, dram: None, nvme: None, idle_s: None, failed: Arc::default() };
        fits(&endpoint.socket())?;
        let mut seen = Vec::new();
        for parameter in parameters.split('&').filter(|p| !p.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            if seen.contains(&name) {
                return Err(Error::config("a parameter is named twice").with("parameter", name));
            }
            seen.push(name);
            endpoint.set(name, value)?;
        }
        Ok(endpoint)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let size = || {
            let wrong = |why: String| Error::config("a parameter is no size").with(name.to_owned(), why);
            match value.parse::<ByteSize>().map_err(wrong)? {
                ByteSize(0) => Err(Error::config("a size is more than 0; without the parameter the server chooses")
                    .with("parameter", name)),
                size => Ok(size),
            }
        };
        match name {
            "dram" => self.dram = Some(size()?),
            "nvme" if value == "off" => self.nvme = Some(Nvme::Off),
            "nvme" => self.nvme = Some(Nvme::Bytes(size()?)),
            "idle" => {
                let seconds = value.parse().ok().filter(|s| *s <= IDLE_MAX_S);
                self.idle_s = Some(seconds.ok_or_else(|| {
                    Error::config("idle is a whole number of seconds, at most 30 days; 0: the server never ends")
                        .with("idle", value)
                })?);
            }
            _ => {
                return Err(
                    Error::config("a local endpoint has the parameters dram, nvme and idle").with("unknown", name)
                );
            }
        }
        Ok(())
    }

    /// Everything of the server: its data, its socket, its log.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The server's Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    /// The same server as a plain endpoint, `unix:/...`: reaches it, and never starts it.
    pub fn plain(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// How `kvkeepd` is started.
    fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["--data-dir".into(), (&self.folder).into(), "--unix-socket".into(), self.socket().into()];
        arguments.extend(["--listen", "off", "--detached"].map(OsString::from));
        let idle_unless_named = self.idle_s.is_none().then(|| idle_flag(IDLE_DEFAULT_S));
        for (flag, value) in idle_unless_named.into_iter().chain(self.settings()) {
            arguments.push(flag.into());
            arguments.extend(value.map(OsString::from));
        }
        arguments
    }

    /// The flags that follow from the parameters that were named, with their values.
    fn settings(&self) -> Vec<(&'static str, Option<String>)> {
        let mut settings: Vec<_> = self.idle_s.map(idle_flag).into_iter().collect();
        settings.extend(self.dram.map(|bytes| ("--arena-bytes", Some(bytes.0.to_string()))));
        settings.extend(self.nvme.map(|nvme| match nvme {
            Nvme::Off => ("--no-nvme", None),
            Nvme::Bytes(bytes) => ("--nvme-bytes", Some(bytes.0.to_string())),
        }));
        settings
    }

    /// The parameters of this endpoint that a server with these arguments does not run with: `flag: asked, runs with`.
    fn differences(&self, running: &[String]) -> Vec<String> {
        let runs_with = |flag: &str| running.iter().position(|a| a == flag).map(|at| running.get(at + 1).cloned());
        let differs = |(flag, asked): (&'static str, Option<String>)| match (runs_with(flag), asked) {
            (Some(_), None) => None,
            (Some(Some(value)), Some(asked)) if value == asked => None,
            (runs, asked) => Some(format!(
                "{flag}: asked for {}, it runs with {}",
                asked.as_deref().unwrap_or("it"),
                runs.flatten().as_deref().unwrap_or("nothing of it")
            )),
        };
        self.settings().into_iter().filter_map(differs).collect()
    }
}

fn idle_flag(seconds: u32) -> (&'static str, Option<String>) {
    ("--exit-when-idle-ms", Some((u64::from(seconds) * 1000).to_string()))
}

impl fmt::Debug for LocalEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalEndpoint")
            .field("folder", &self.folder)
            .field("dram", &self.dram)
            .field("nvme", &self.nvme)
            .field("idle_s", &self.idle_s)
            .finish_non_exhaustive()
    }
}

/// Makes sure that the private server runs, and answers the path of its socket. One connection where it answers; else it is
/// started, by whoever comes first of all processes that ask, within [`START_MAX`]. May be called at any time, and its
/// future dropped: a start that is under way then goes on, and the next caller finds it.
///
/// Fails where `kvkeepd` is not found or does not start, with its last words; tried again only after some seconds.
pub async fn ensure(local: &LocalEndpoint) -> Result<PathBuf> {
    if let Some(stream) = answers(local).await? {
        warn_of_differences(local, stream).await;
        return Ok(local.socket());
    }
    if let Some((when, error)) = local.failed.lock().as_ref()
        && when.elapsed() < START_AGAIN_AFTER
    {
        return Err(error.clone());
    }
    let result = start::start(local).await;
    *local.failed.lock() = result.as_ref().err().map(|e| (Instant::now(), e.clone()));
    if let Some(stream) = result? {
        warn_of_differences(local, stream).await;
    }
    Ok(local.socket())
}

/// A connection to the private server, started where it does not answer.
pub(crate) async fn dial(local: &LocalEndpoint, within: Duration) -> Result<UnixStream> {
    let socket = local.socket();
    match endpoint::dial(&socket, within).await {
        Err(e) if e.kind() == ErrorKind::Unreachable => {}
        result => return result,
    }
    ensure(local).await?;
    endpoint::dial(&socket, within).await
}

/// A connection to the server, if one takes it; `None` where there is none.
async fn answers(local: &LocalEndpoint) -> Result<Option<UnixStream>> {
    use std::io::ErrorKind as Io;
    let socket = local.socket();
    let failed = |e: std::io::Error| {
        Error::new(
            ErrorKind::Unreachable,
            "the private server cannot be reached: its folder is another user's, or it hangs",
        )
        .with("socket", socket.display())
        .caused_by(e)
    };
    match tokio::time::timeout(ANSWER_MAX, UnixStream::connect(&socket)).await {
        Ok(Ok(stream)) => Ok(Some(stream)),
        Ok(Err(e)) => match e.kind() {
            Io::NotFound | Io::ConnectionRefused | Io::NotADirectory => Ok(None),
            _ => Err(failed(e)),
        },
        Err(late) => Err(failed(late.into())),
    }
}

/// Says in the log where the server that answered was started with other parameters than these. Best effort: a server of
/// another process namespace keeps its arguments to itself.
async fn warn_of_differences(local: &LocalEndpoint, stream: UnixStream) {
    let Some(pid) = stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|pid| *pid > 0) else { return };
    let read = tokio::task::spawn_blocking(move || std::fs::read(format!("/proc/{pid}/cmdline")));
    let Ok(Ok(arguments)) = read.await else { return };
    let arguments: Vec<_> = arguments.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    let differences = local.differences(&arguments);
    if !differences.is_empty() {
        tracing::warn!(
            folder = %local.folder.display(),
            differences = differences.join("; "),
            "the private server was started with other parameters, and is used as it is; they change when it is started anew"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_folder_with_parameters() {
        let plain: LocalEndpoint = "local:/kv".parse().unwrap();
        assert_eq!((plain.folder(), plain.socket()), (Path::new("/kv"), PathBuf::from("/kv/kvkeepd.sock")));
        assert_eq!((plain.dram, plain.nvme, plain.idle_s), (None, None, None));
        assert!(plain.arguments().contains(&"30000".into()), "{:?}", plain.arguments());
        assert_eq!(plain.plain(), "unix:/kv/kvkeepd.sock");
        let full: LocalEndpoint = "local:///kv?dram=4GiB&nvme=50GiB&idle=5".parse().unwrap();
        assert_eq!(full.folder(), Path::new("/kv"));
        assert_eq!(full.dram, Some(ByteSize::gib(4)));
        assert_eq!(full.nvme, Some(Nvme::Bytes(ByteSize::gib(50))));
        assert_eq!(full.idle_s, Some(5));
        let off: LocalEndpoint = "local:kv?nvme=off&idle=0".parse().unwrap();
        assert!(off.folder().is_absolute());
        assert_eq!((off.nvme, off.idle_s), (Some(Nvme::Off), Some(0)));
    }

    #[test]
    fn what_is_wrong_with_an_endpoint_is_named() {
        let long = format!("local:/{}", "d".repeat(100));
        for (text, says) in [
            ("local:", "names a folder"),
            ("local:?dram=1GiB", "names a folder"),
            ("local:~/kv", "~"),
            ("local://host/kv", "no host"),
            ("local:/kv?drum=4GiB", "drum"),
            ("local:/kv?dram=4", ""),
            ("local:/kv?dram=many", "many"),
            ("local:/kv?dram", "dram"),
            ("local:/kv?dram=0", "more than 0"),
            ("local:/kv?dram=off", "off"),
            ("local:/kv?nvme=-1", "-1"),
            ("local:/kv?idle=soon", "soon"),
            ("local:/kv?idle=-1", "-1"),
            ("local:/kv?idle=4294967295", "30 days"),
            ("local:/kv?idle=1&idle=2", "twice"),
            (&long, "107 bytes"),
        ] {
            let result = text.parse::<LocalEndpoint>();
            if says.is_empty() {
                assert!(result.is_ok(), "{text}");
                continue;
            }
            let error = result.unwrap_err();
            assert!(error.to_string().contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_running_server_is_compared_by_what_was_asked_for_only() {
        let arguments = |text: &str| -> Vec<String> {
            let local: LocalEndpoint = text.parse().unwrap();
            local.arguments().into_iter().map(|a| a.into_string().unwrap()).collect()
        };
        let running = arguments("local:/kv?dram=1GiB&nvme=off");
        let differences = |text: &str| text.parse::<LocalEndpoint>().unwrap().differences(&running);
        assert_eq!(differences("local:/kv?dram=1024MiB&nvme=off"), [""; 0]);
        assert_eq!(differences("local:/kv"), [""; 0]);
        assert_eq!(differences("local:/kv?dram=2GiB").len(), 1);
        let all = differences("local:/kv?dram=2GiB&nvme=1GiB&idle=1");
        assert_eq!(all.len(), 3, "{all:?}");
        assert!(all.iter().any(|d| d.contains("--nvme-bytes") && d.contains("nothing of it")), "{all:?}");
    }
}
