//! A server process of our own, for the demo.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::failure::{Failure, Outcome};

/// Longest wait for a server to say that it serves.
const READY_WAIT: Duration = Duration::from_secs(60);
/// What a server prints, once, when it serves; the address follows.
const READY: &str = "kvkeepd ready listen=";
/// Lines of the server's log that are shown when it does not start.
const LOG_LINES: usize = 12;

/// The server to start: the one that was named, else the one beside this program.
pub fn find(named: Option<&Path>) -> Outcome<PathBuf> {
    let (path, advice) = match named {
        Some(path) => (path.to_owned(), "--kvkeepd names no file"),
        None => {
            let own = std::env::current_exe().map_err(|e| Failure::failed(format!("where is this program? {e}")))?;
            (own.with_file_name("kvkeepd"), "build it (`make build`), or name it with --kvkeepd")
        }
    };
    if path.is_file() { Ok(path) } else { Err(Failure::failed(format!("no {}", path.display())).advise(advice)) }
}

/// A running server. Dropping it kills it.
pub struct Kvkeepd {
    child: Child,
    /// Where it serves.
    pub listen: String,
    /// Its process id.
    pub pid: u32,
}

impl Kvkeepd {
    /// Starts it and waits until it serves. What it says on standard error goes to `log`.
    pub async fn start(program: &Path, args: &[String], log: &Path) -> Outcome<Self> {
        let log_file = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        // What the shell says to servers is not meant for this one.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("KVKEEP_") {
                command.env_remove(name);
            }
        }
        let mut child = command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Failure::failed(format!("{} does not start: {e}", program.display())))?;
        let pid = child.id().unwrap_or_default();
        let stdout = child.stdout.take().ok_or_else(|| Failure::failed("the server has no standard output"))?;
        let mut lines = BufReader::new(stdout).lines();
        let ready = async {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(listen) = line.strip_prefix(READY) {
                    return Some(listen.trim().to_owned());
                }
            }
            None
        };
        let listen = match tokio::time::timeout(READY_WAIT, ready).await {
            Ok(Some(listen)) => listen,
            Ok(None) => return Err(Failure::failed("kvkeepd ended before it served").advise(tail(log))),
            Err(_) => return Err(Failure::failed("kvkeepd does not come up").advise(tail(log))),
        };
        // Whatever else it prints is taken from it until it ends, so that it never waits for a reader.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { child, listen, pid })
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(mut self) -> Outcome {
        self.child.kill().await.map_err(|e| Failure::failed(format!("kvkeepd cannot be killed: {e}")))
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
