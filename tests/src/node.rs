//! A real `kvkeepd`, its folders, and what can happen to it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvkeep_client::{Client, ClientConfig, WayWish, Wire};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

/// A server that is not ready by then has failed.
const READY_MAX: Duration = Duration::from_secs(60);
/// A port that somebody has for a moment is waited for so long.
const PORT_WAIT: Duration = Duration::from_secs(30);
/// A server that has not stopped by then has failed.
const STOP_MAX: Duration = Duration::from_secs(60);
/// How long clients of tests wait for a sign of life, unless the test is about that.
const PATIENCE: Duration = Duration::from_secs(10);
/// Has every client of the tests go one way: `grpc`, `socket` or `port`.
pub const WAY_VARIABLE: &str = "KVKEEP_TEST_WAY";
/// Lines of a server's log shown with a failure.
const LOG_LINES: usize = 40;

/// How a node is set up. [`Options::default`] is small and quick.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: String,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// Bytes of the NVMe store.
    pub nvme_bytes: u64,
    /// Use `pread/pwrite` where io_uring would work.
    pub no_io_uring: bool,
    /// Lines of `tenant token [admin]`; none: everybody is the tenant `default`.
    pub tokens: Vec<String>,
    /// More of the `[arena]` table, in TOML.
    pub arena: String,
    /// More of the `[limits]` table, in TOML.
    pub limits: String,
    /// More of the `[nvme]` table, in TOML.
    pub nvme: String,
    /// More of the environment.
    pub environment: Vec<(String, String)>,
    /// A command that the server's path and arguments are appended to, and that ends by running it (`exec`).
    pub wrapper: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            arena_bytes: 128 << 20,
            nvme_bytes: 256 << 20,
            no_io_uring: false,
            tokens: Vec::new(),
            arena: String::new(),
            limits: String::new(),
            nvme: String::new(),
            environment: Vec::new(),
            wrapper: Vec::new(),
        }
    }
}

/// A node, running or not. Its folders live as long as this does; a server that still runs then is killed.
pub struct Node {
    options: Options,
    /// Holds everything but the arena; on a disk.
    folder: TempDir,
    /// On tmpfs where there is one.
    memory: TempDir,
    child: Option<Child>,
    address: Option<SocketAddr>,
    lives: u32,
}

/// The way that clients of tests go: [`WAY_VARIABLE`], or the fastest.
///
/// # Panics
/// If the variable names no way.
pub fn way() -> WayWish {
    match std::env::var(WAY_VARIABLE).as_deref() {
        Err(_) => WayWish::Fastest,
        Ok("grpc") => WayWish::Only(Wire::Grpc),
        Ok("socket") => WayWish::Only(Wire::Socket),
        Ok("port") => WayWish::Only(Wire::Port),
        Ok(other) => panic!("{WAY_VARIABLE} is grpc, socket or port, not {other:?}"),
    }
}

/// The built binary `name`.
///
/// # Panics
/// If it was not built.
pub fn binary(name: &str) -> PathBuf {
    let path = profile_folder().join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build -p kvkeep-node` (or `make test`) first", path.display());
    path
}

/// `target/<profile>`.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.parent().and_then(Path::parent).expect("a test lies in target/<profile>/deps");
    folder.to_owned()
}

/// An address for a node that will come back on it: with the port of the block protocol above it, and below those that the
/// kernel gives to whoever asks for any, so that nobody has taken it meanwhile.
///
/// # Panics
/// If none is free.
pub fn address_to_keep() -> String {
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let tries = std::iter::repeat_with(|| rand::random_range(10_000..16_000) * 2).take(1000);
    let port = tries.into_iter().find(|port| is_free(*port) && is_free(port + 1)).expect("two free ports");
    format!("127.0.0.1:{port}")
}

/// A fresh folder on a disk: beside the build, because `/tmp` may be memory.
///
/// # Panics
/// If it cannot be made.
pub fn disk_folder() -> TempDir {
    let tests = profile_folder().join("../tmp");
    fs::create_dir_all(&tests).expect("target/tmp can be made");
    let tests = fs::canonicalize(tests).expect("target/tmp is there");
    tempfile::Builder::new().prefix("kvkeep-").tempdir_in(tests).expect("a folder can be made in target/tmp")
}

impl Node {
    /// A node with fresh folders, not started.
    ///
    /// # Panics
    /// If the folders cannot be made.
    pub fn new(options: Options) -> Self {
        let shm = Path::new("/dev/shm");
        let folder = disk_folder();
        let memory = match shm.is_dir() {
            true => tempfile::Builder::new().prefix("kvkeep-test-").tempdir_in(shm),
            false => tempfile::tempdir_in(folder.path()),
        };
        Self {
            options,
            memory: memory.expect("a folder for the arena can be made"),
            folder,
            child: None,
            address: None,
            lives: 0,
        }
    }

    /// A node with fresh folders, running.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(options: Options) -> Self {
        let mut node = Self::new(options);
        node.restart();
        node
    }

    /// Everything that must survive a restart.
    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Segment files.
    pub fn segments_dir(&self) -> PathBuf {
        self.data_dir().join("nvme/segments")
    }

    /// RocksDB.
    pub fn index_dir(&self) -> PathBuf {
        self.data_dir().join("nvme/index")
    }

    /// Where arena files lie, in a folder of their own.
    pub fn arena_dir(&self) -> &Path {
        self.memory.path()
    }

    /// A path beside the data folder, on its file system.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The setup.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The setup, to be changed before the next start.
    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    /// `host:port`.
    ///
    /// # Panics
    /// If the server does not run.
    pub fn endpoint(&self) -> String {
        self.address.expect("the server runs").to_string()
    }

    /// TCP port of the block protocol.
    ///
    /// # Panics
    /// If the server does not say.
    pub async fn block_port(&self) -> u16 {
        let port = self.client().await.hello().ways.block_port;
        assert_ne!(port, 0, "the server has no block port");
        port
    }

    /// A client with defaults.
    ///
    /// # Panics
    /// If it cannot connect.
    pub async fn client(&self) -> Client {
        self.client_with(|_| {}).await
    }

    /// A client, its configuration changed by `change`.
    ///
    /// # Panics
    /// If it cannot connect.
    pub async fn client_with(&self, change: impl FnOnce(&mut ClientConfig)) -> Client {
        let mut config = ClientConfig::to(self.endpoint());
        // A test wants to hear of a server that was lost, and a busy machine is no lost server.
        config.lost = kvkeep_client::Lost::Errors;
        config.patience = PATIENCE;
        config.way = way();
        change(&mut config);
        Client::connect(config).await.unwrap_or_else(|e| panic!("cannot connect: {e}\n{}", self.log()))
    }

    /// The command that starts it, without its output.
    fn command(&self) -> Command {
        let config = self.write_config();
        let server = binary("kvkeepd");
        let mut command = match self.options.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(server);
                command
            }
            None => Command::new(server),
        };
        command.arg("--config").arg(config);
        command.arg("--data-dir").arg(self.data_dir());
        command.arg("--arena-dir").arg(self.memory.path());
        command.args(["--listen", &self.options.listen]);
        command.arg("--arena-bytes").arg(self.options.arena_bytes.to_string());
        command.arg("--nvme-bytes").arg(self.options.nvme_bytes.to_string());
        command.args(["--keep-free-bytes", "0"]);
        command.args(self.options.no_io_uring.then_some("--no-io-uring"));
        // Nothing of the caller's environment may change a test.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("KVKEEP_")) {
            command.env_remove(name);
        }
        command.env("KVKEEP_LOG", "info").env("RUST_BACKTRACE", "1");
        command.envs(self.options.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    fn write_config(&self) -> PathBuf {
        let mut text = String::new();
        if !self.options.tokens.is_empty() {
            let tokens = self.beside("tokens");
            fs::write(&tokens, self.options.tokens.join("\n")).expect("the tokens file can be written");
            fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).expect("its mode can be set");
            let _ = writeln!(text, "[auth]\ntokens_file = {:?}", tokens.display().to_string());
        }
        let _ = writeln!(
            text,
            "[arena]\n{}\n[nvme]\n{}\n[limits]\n{}",
            self.options.arena, self.options.nvme, self.options.limits
        );
        let path = self.beside("config.toml");
        fs::write(&path, text).expect("the configuration can be written");
        path
    }

    /// Starts the server, and waits until it is ready.
    ///
    /// # Panics
    /// If it runs already, or does not become ready.
    pub fn restart(&mut self) {
        let until = Instant::now() + PORT_WAIT;
        loop {
            match self.try_restart() {
                Ok(()) => return,
                // A port that it had before, or that lies beside its own, is somebody's for a moment: of a test's connection.
                Err(why) if why.contains("Address already in use") && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(why) => panic!("{why}"),
            }
        }
    }

    /// Starts the server and waits until it is ready, or says why it did not become so.
    ///
    /// # Errors
    /// How it ended, and the end of its log.
    ///
    /// # Panics
    /// If it runs already.
    pub fn try_restart(&mut self) -> Result<(), String> {
        assert!(self.child.is_none(), "the server runs already");
        self.lives += 1;
        let log = File::create(self.log_path()).expect("the log can be made");
        let mut child =
            self.command().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().expect("kvkeepd can be run");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let (told, ready) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads to the end, so that the server never waits for us.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("kvkeepd ready listen=") {
                    let _ = told.send(address.parse::<SocketAddr>().expect("the server names its address"));
                }
            }
        });
        match ready.recv_timeout(READY_MAX) {
            Ok(address) => {
                self.child = Some(child);
                self.address = Some(address);
                Ok(())
            }
            Err(why) => {
                let _ = child.kill(); // it may have ended by itself
                let status = child.wait().expect("a child can be waited for");
                Err(format!("kvkeepd did not become ready ({why}), {status}\n{}", self.log()))
            }
        }
    }

    fn log_path(&self) -> PathBuf {
        self.beside(&format!("kvkeepd-{}.log", self.lives))
    }

    /// The end of the server's log, of its last life.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
        format!("--- end of kvkeepd's log ---\n{}\n---", tail.join("\n"))
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("the server runs"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the server can be signalled");
    }

    /// Whether it has ended by itself, within some seconds.
    ///
    /// # Panics
    /// If it was not started.
    pub fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut().expect("the server was started");
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(5) {
            if child.try_wait().expect("a child can be waited for").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the server runs");
        self.address = None;
        child.kill().expect("the server can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// SIGTERM, and waits until it has stopped by itself.
    ///
    /// # Panics
    /// If it does not run, or does not stop with success.
    pub async fn terminate(&mut self) {
        self.signal(Signal::TERM);
        let mut child = self.child.take().expect("the server runs");
        self.address = None;
        let since = Instant::now();
        let status: ExitStatus = loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if since.elapsed() > STOP_MAX {
                let _ = child.kill();
                let _ = child.wait();
                panic!("kvkeepd did not stop\n{}", self.log());
            }
            // Clients of this test must be able to hear that the server closes.
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(status.success(), "kvkeepd stopped with {status}\n{}", self.log());
    }

    /// SIGSTOP, and waits until every thread has stopped.
    ///
    /// # Panics
    /// If it does not run.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        // Tells of the stop, and reaps nothing.
        let told = waitpid(Some(self.pid()), WaitOptions::UNTRACED).expect("a child can be waited for");
        assert!(told.is_some_and(|(_, status)| status.stopped()), "the server stops, it does not end");
    }

    /// SIGCONT.
    ///
    /// # Panics
    /// If it does not run.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// A second server on the same folders: answers how it ended and what it said.
    ///
    /// # Panics
    /// If it does not end.
    pub fn second(&self, more: &[&str]) -> (ExitStatus, String) {
        run_to_end(self.command().args(more))
    }
}

/// Runs a server that is expected to refuse: answers how it ended and what it said.
///
/// # Panics
/// If it becomes ready.
pub fn run_to_end(command: &mut Command) -> (ExitStatus, String) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("kvkeepd can be run");
    let since = Instant::now();
    while child.try_wait().expect("a child can be waited for").is_none() {
        if since.elapsed() > READY_MAX {
            let _ = child.kill();
            let _ = child.wait();
            panic!("kvkeepd was to refuse and runs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("its output can be read");
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}
