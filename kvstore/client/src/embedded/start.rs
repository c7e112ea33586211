//! Starting a private server: one starter at a time, whatever happens to the one before.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::{LocalEndpoint, answers, binary};
use crate::error::{Error, ErrorKind, Result};

/// Longest wait for a private server to answer: for another starter, for a server that is still writing down what it holds
/// (a minute at the longest), and for one that opens a large device.
pub const START_MAX: Duration = Duration::from_secs(120);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Servers that one start spawns at most: one may find that another was faster and has ended since.
const SPAWNS_MAX: u32 = 3;
/// A log longer than this is put aside at the next start, bytes.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// What is read of the end of a log for an error, bytes.
const LOG_TAIL_BYTES: u64 = 16 << 10;
/// Lines of it that the error shows.
const LOG_TAIL_LINES: usize = 12;
/// Stack of the thread that waits for the end of a server, bytes.
const REAPER_STACK_BYTES: usize = 64 << 10;

/// Waits for its turn and for a server that answers, starting one where there is none. Answers a connection to a server that
/// somebody else started, and `None` to one of ours: that one runs as it was asked to.
pub(super) async fn start(local: &LocalEndpoint) -> Result<Option<UnixStream>> {
    let until = Instant::now() + START_MAX;
    let lock = blocking({
        let folder = local.folder().to_path_buf();
        move || open_folder(&folder)
    })
    .await?;
    let _turn = Turn::wait(local, lock, until).await?;
    let mut ours: Option<Ours> = None;
    let mut spawned = 0;
    loop {
        if let Some(stream) = answers(local).await? {
            return Ok(ours.is_none().then_some(stream));
        }
        if let Some(status) = ours.as_mut().and_then(Ours::ended) {
            // It may have found that another server has the folder open, one whose starter is gone: that one is as good.
            // Else it ended for a reason of its own, and says which.
            let said = ours.take().map(|o| o.said_from).unwrap_or_default();
            if !status.success() && !is_open(local.folder()) {
                return Err(failed("the private server ended before it served: see what it said", local, said)
                    .with("status", status));
            }
        }
        if ours.is_none() && !is_open(local.folder()) {
            if spawned == SPAWNS_MAX {
                return Err(failed("private servers end as soon as they are started: see what they said", local, 0));
            }
            let local = local.clone();
            ours = Some(blocking(move || spawn(&local)).await?);
            spawned += 1;
        }
        if Instant::now() >= until {
            let holder = holder(&local.folder().join("lock"));
            return Err(failed(
                "the private server does not answer: wait for it, or end it (kill its process) and connect again",
                local,
                0,
            )
            .with("process", holder.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Runs what touches the file system or starts a process beside the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(Error::new(ErrorKind::Unreachable, "the runtime is shutting down: no server is started").caused_by(e))
    })
}

/// Makes the folder, for this user alone, and opens its `start.lock`.
fn open_folder(folder: &Path) -> Result<File> {
    let refused = |what: &'static str, e: io::Error| Error::config(what).with("folder", folder.display()).caused_by(e);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|e| refused("the folder of the private server cannot be made: choose another", e))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(|e| {
        refused("the folder of the private server cannot be made private (mode 0700): choose one of your own", e)
    })?;
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(folder.join("start.lock"))
        .map_err(|e| refused("the folder of the private server cannot be written to: choose another", e))
}

/// The right to start a server; ends with this value, or with the process.
struct Turn(File);

impl Turn {
    async fn wait(local: &LocalEndpoint, lock: File, until: Instant) -> Result<Self> {
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self(lock)),
                Err(TryLockError::WouldBlock) if Instant::now() < until => tokio::time::sleep(LOOK_EVERY).await,
                Err(TryLockError::WouldBlock) => {
                    let path = local.folder().join("start.lock");
                    let holder = holder(&path).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                    return Err(failed("another process has been starting the private server for too long", local, 0)
                        .with("process", holder));
                }
                Err(TryLockError::Error(e)) => {
                    return Err(Error::config(
                        "the file system of the private server's folder has no locks: choose another",
                    )
                    .with("folder", local.folder().display())
                    .caused_by(e));
                }
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Said aloud: a child that this process forked meanwhile has the file open as well, and would keep the lock.
        let _ = self.0.unlock(); // closing it does the same in every other case
    }
}

/// Whether a server has the data folder open: it is starting, serving or stopping. Only who has the [`Turn`] and no server
/// under way asks: the question takes the lock for a moment, and a server that starts then is refused.
fn is_open(folder: &Path) -> bool {
    match File::open(folder.join("lock")) {
        Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

/// The process that holds a lock on this file, for a message.
fn holder(path: &Path) -> Option<u32> {
    let inode = fs::metadata(path).ok()?.ino().to_string();
    // `1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF`: the process, then device and inode.
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find_map(|words| {
        let (pid, file) = (words.get(4)?, words.get(5)?);
        (words.get(1) == Some(&"FLOCK") && file.rsplit(':').next() == Some(&inode)).then(|| pid.parse().ok())?
    })
}

/// A server that this process spawned.
struct Ours {
    end: oneshot::Receiver<ExitStatus>,
    /// Where in the log its own words begin.
    said_from: u64,
}

impl Ours {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.end.try_recv().ok()
    }
}

fn log_path(folder: &Path) -> PathBuf {
    folder.join("kvkeepd.log")
}

/// Spawns a server that outlives this process. Nothing of ours goes with it: not the terminal, not the session, no variable
/// that is meant for another server, no open file (the server closes what it inherits, see its `--detached`).
fn spawn(local: &LocalEndpoint) -> Result<Ours> {
    let program = binary::find()?;
    let path = log_path(local.folder());
    let no_log = |e: io::Error| {
        Error::config("the log of the private server cannot be written").with("log", path.display()).caused_by(e)
    };
    if fs::metadata(&path).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
        fs::rename(&path, path.with_extension("log.1")).map_err(no_log)?;
    }
    let log = File::options().create(true).append(true).mode(0o600).open(&path).map_err(no_log)?;
    let said_from = log.metadata().map_err(no_log)?.len();
    let mut command = Command::new(&program);
    command.args(local.arguments()).current_dir(local.folder());
    command.stdin(Stdio::null()).stdout(log.try_clone().map_err(no_log)?).stderr(log);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"KVKEEP_") {
            command.env_remove(name);
        }
    }
    let mut child = command.spawn().map_err(|e| {
        Error::config("kvkeepd cannot be run: is it built for this machine, and executable?")
            .with("program", program.display())
            .caused_by(e)
    })?;
    tracing::info!(folder = %local.folder().display(), pid = child.id(), "started a private kvkeepd");
    // Somebody must take note of its end, or it stays in the list of processes. Where no thread can be had it does that; the
    // start is then waited for all the same.
    let (tell, end) = oneshot::channel();
    let reaper = std::thread::Builder::new().name("kvkeep-reaper".into()).stack_size(REAPER_STACK_BYTES);
    let waiting = reaper.spawn(move || {
        if let Ok(status) = child.wait() {
            let _ = tell.send(status); // nobody may be interested any more
        }
    });
    if let Err(error) = waiting {
        tracing::warn!(%error, "no thread to wait for the end of the private server");
    }
    Ok(Ours { end, said_from })
}

/// A start that failed, with the server's last words.
fn failed(what: &'static str, local: &LocalEndpoint, said_from: u64) -> Error {
    let path = log_path(local.folder());
    let said = tail(&path, said_from).unwrap_or_default();
    Error::new(ErrorKind::Unreachable, what).with("log", path.display()).with("said", said)
}

/// The last lines of a log from a place on.
fn tail(path: &Path, from: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let from = from.max(file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES));
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kvkeep-start-{}", rand::random::<u32>()));
        open_folder(&folder).unwrap();
        folder
    }

    #[test]
    fn the_folder_is_for_its_user_alone_whatever_it_was_before() {
        let folder = folder();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        open_folder(&folder).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        fs::remove_dir_all(&folder).unwrap();
        let error = open_folder(Path::new("/proc/no-such-folder")).unwrap_err();
        assert!(error.to_string().contains("choose another"), "{error}");
    }

    #[test]
    fn a_lock_is_seen_and_its_holder_named() {
        let folder = folder();
        assert!(!is_open(&folder), "no server was ever there");
        let lock = File::create(folder.join("lock")).unwrap();
        assert!(!is_open(&folder), "the file is nobody's");
        lock.lock().unwrap();
        assert!(is_open(&folder));
        assert_eq!(holder(&folder.join("lock")), Some(std::process::id()));
        lock.unlock().unwrap();
        assert!(!is_open(&folder));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn an_error_shows_the_end_of_what_the_last_server_said() {
        let folder = folder();
        let path = log_path(&folder);
        let lines: Vec<_> = (0..100).map(|i| format!("line {i}")).collect();
        fs::write(&path, lines.join("\n")).unwrap();
        let said = tail(&path, 0).unwrap();
        assert!(said.starts_with("line 88\n") && said.ends_with("line 99"), "{said}");
        let from = fs::metadata(&path).unwrap().len() - 7;
        assert_eq!(tail(&path, from).unwrap(), "line 99");
        assert_eq!(tail(&path, from + 7).unwrap(), "");
        fs::remove_dir_all(&folder).unwrap();
    }
}
