//! A program that drives one peer: started once, asked for a window a line, killed with everything that it started.

use std::path::{Path as FilePath, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::path::{Measuring, Path, PathId, Sample, Way};

/// Longest wait for a peer to come up: it loads libraries, starts servers and fills them.
const READY_WAIT: Duration = Duration::from_secs(180);
/// Longest wait for an answer beyond the window that was asked for.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// Longest line that a program may answer with: the times of a window's calls.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Most paths of one program.
const PATHS_MAX: usize = 64;
/// Lines of a log shown when a program fails.
const LOG_LINES: usize = 5;

/// How to start one.
#[derive(Clone, Debug)]
pub struct Program {
    /// The interpreter.
    pub python: PathBuf,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// Where its standard error goes.
    pub log: PathBuf,
}

/// What a program says first.
#[derive(Deserialize)]
#[serde(untagged)]
enum Hello {
    Ready { version: String, paths: Vec<Described> },
    Missing { missing: String },
}

#[derive(Deserialize)]
struct Described {
    path: String,
    way: Way,
    batch: u32,
}

/// What it answers to a request.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Measured { bytes: u64, seconds: f64, cpu_seconds: f64, latencies_us: Vec<f64> },
    Failed { error: String },
}

/// What came of starting a program.
pub enum Started {
    /// It serves these paths.
    Ready {
        /// Name and version of the peer.
        version: String,
        /// Its paths.
        paths: Vec<(PathId, Box<dyn Path>)>,
    },
    /// It says what is not installed.
    Missing(String),
}

struct Running {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    log: PathBuf,
    // Answers are in step with requests only as long as none was given up.
    in_step: bool,
}

struct Scripted {
    number: usize,
    running: Arc<Mutex<Running>>,
}

impl Program {
    /// Starts it and waits until it serves.
    pub async fn start(&self) -> anyhow::Result<Started> {
        let log = std::fs::File::create(&self.log).with_context(|| format!("log {}", self.log.display()))?;
        let mut child = Command::new(&self.python)
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Its servers are in its group; they all end together, see `Drop`.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", self.python.display()))?;
        let stdin = child.stdin.take().context("its input is piped")?;
        let lines = BufReader::new(child.stdout.take().context("its output is piped")?).lines();
        let mut running = Running { child, stdin, lines, log: self.log.clone(), in_step: true };
        let hello = timeout(READY_WAIT, running.line()).await.context("it does not come up")??;
        match serde_json::from_str(&hello).context("its first words")? {
            Hello::Missing { missing } => Ok(Started::Missing(missing)),
            Hello::Ready { version, paths } => {
                ensure!(paths.len() <= PATHS_MAX, "it has {} paths", paths.len());
                let running = Arc::new(Mutex::new(running));
                let path = |(number, described): (usize, Described)| {
                    let id = PathId { batch: described.batch, ..PathId::single(&described.path, described.way) };
                    (id, Box::new(Scripted { number, running: Arc::clone(&running) }) as Box<dyn Path>)
                };
                Ok(Started::Ready { version, paths: paths.into_iter().enumerate().map(path).collect() })
            }
        }
    }
}

impl Running {
    async fn line(&mut self) -> anyhow::Result<String> {
        let line = self.lines.next_line().await.context("its output")?;
        let Some(line) = line else { bail!("it ended; its last words: {}", last_words(&self.log)) };
        ensure!(line.len() <= ANSWER_BYTES_MAX, "it answers {} bytes", line.len());
        Ok(line)
    }

    async fn measure(&mut self, number: usize, window: Duration) -> anyhow::Result<Sample> {
        ensure!(self.in_step, "it did not answer before");
        self.in_step = false;
        let asked = format!("measure {number} {}\n", window.as_secs_f64());
        self.stdin.write_all(asked.as_bytes()).await.context("ask it")?;
        let line = timeout(window + ANSWER_WAIT, self.line()).await.context("it does not answer")??;
        self.in_step = true;
        match serde_json::from_str(&line).context("its answer")? {
            Answer::Failed { error } => bail!("{error}; its last words: {}", last_words(&self.log)),
            Answer::Measured { bytes, seconds, cpu_seconds, latencies_us } => {
                let elapsed = Duration::try_from_secs_f64(seconds).context("its answer")?;
                ensure!(bytes > 0 && !elapsed.is_zero() && !latencies_us.is_empty(), "it measured nothing");
                let latency = |us: f64| Duration::try_from_secs_f64(us / 1e6).context("its answer");
                let latencies = latencies_us.into_iter().map(latency).collect::<anyhow::Result<_>>()?;
                Ok(Sample { bytes, elapsed, cpu_seconds, latencies })
            }
        }
    }
}

fn last_words(log: &FilePath) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join(" | ")
}

impl Drop for Running {
    fn drop(&mut self) {
        // A child that has not been waited for keeps its number, so nobody else's group can have it. Errors: it is gone.
        if let Some(group) = self.child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

impl Path for Scripted {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(async move { self.running.lock().await.measure(self.number, window).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &FilePath, script: &str) -> Program {
        Program { python: "/bin/sh".into(), args: vec!["-c".into(), script.into()], log: dir.join("log") }
    }

    const HELLO: &str = r#"echo '{"ready":true,"version":"Sh 1","paths":[{"path":"p","way":"get","batch":64}]}'; "#;

    async fn start(dir: &FilePath, script: &str) -> anyhow::Result<Started> {
        program(dir, script).start().await
    }

    async fn only_path(dir: &FilePath, script: &str) -> Box<dyn Path> {
        match start(dir, &format!("{HELLO}{script}")).await.unwrap() {
            Started::Ready { version, mut paths } => {
                assert_eq!(version, "Sh 1");
                let (id, path) = paths.pop().unwrap();
                assert_eq!(id, PathId::single("p", Way::Get).batched());
                path
            }
            Started::Missing(why) => panic!("{why}"),
        }
    }

    #[tokio::test]
    async fn answers_become_samples_and_errors_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let script = r#"read a; echo '{"bytes":9,"seconds":0.5,"cpu_seconds":0.25,"latencies_us":[500000]}'
            read a; echo "broken" >&2; echo '{"error":"disk on fire"}'; read a"#;
        let mut path = only_path(dir.path(), script).await;
        let sample = path.measure(Duration::from_millis(1)).await.unwrap();
        assert_eq!((sample.bytes, sample.cpu_seconds), (9, 0.25));
        assert_eq!(sample.latencies, [Duration::from_millis(500)]);
        let error = path.measure(Duration::from_millis(1)).await.unwrap_err().to_string();
        assert!(error.contains("disk on fire") && error.contains("broken"), "{error}");
    }

    #[tokio::test]
    async fn what_is_not_installed_is_no_error_and_what_ends_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let started = start(dir.path(), r#"echo '{"missing":"no module x"}'"#).await.unwrap();
        assert!(matches!(started, Started::Missing(why) if why == "no module x"));
        let error = start(dir.path(), "echo no such library >&2").await.err().unwrap();
        assert!(format!("{error:#}").contains("no such library"));
    }

    #[tokio::test]
    async fn a_program_that_is_let_go_takes_its_children_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let number = dir.path().join("pid");
        let script =
            format!("sleep 100 & echo $! > {}; read a; echo '{{\"error\":\"asked\"}}'; read a", number.display());
        let mut path = only_path(dir.path(), &script).await;
        path.measure(Duration::ZERO).await.unwrap_err();
        let child = std::fs::read_to_string(&number).unwrap();
        drop(path);
        let state = format!("/proc/{}/stat", child.trim());
        for _ in 0..100 {
            match std::fs::read_to_string(&state) {
                Ok(stat) if !stat.contains(") Z") => tokio::time::sleep(Duration::from_millis(20)).await,
                _ => return,
            }
        }
        panic!("its child lives on");
    }
}
