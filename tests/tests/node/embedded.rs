//! The private server of an endpoint `local:`: who starts it, what happens to it, and what outlives it.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvkeep_client::embedded::{KVKEEPD_VARIABLE, LocalEndpoint, ensure};
use kvkeep_client::{Call, Client, ClientConfig, ErrorKind};
use kvkeep_core::Class;
use kvkeep_tests::{formats, leaks, node, payload, rounds, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// What a process of these tests connects to; set by [`Private::process`].
const ENDPOINT_VARIABLE: &str = "KVKEEP_TEST_ENDPOINT";
/// Longest wait for a process to come or go.
const PATIENCE: Duration = Duration::from_secs(30);
const BYTES: usize = 20_000;
/// Small and quick.
const SMALL: &str = "dram=128MiB&nvme=256MiB";

/// A folder for a private server. At its end every process that was started over it is killed, and nothing is left.
struct Private {
    folder: TempDir,
}

impl Private {
    fn new() -> Self {
        Self { folder: node::disk_folder() }
    }

    /// Made by whoever starts the server.
    fn data_dir(&self) -> PathBuf {
        self.folder.path().join("kv")
    }

    fn endpoint(&self, parameters: &str) -> String {
        format!("local:{}?{parameters}", self.data_dir().display())
    }

    fn local(&self, parameters: &str) -> LocalEndpoint {
        self.endpoint(parameters).parse().unwrap()
    }

    async fn client(&self, parameters: &str) -> Client {
        let config = ClientConfig::to(self.endpoint(parameters));
        Client::connect(config).await.unwrap_or_else(|e| panic!("{e}\n{}", self.log()))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.data_dir().join("kvkeepd.log")).unwrap_or_default()
    }

    /// Every process that was told to use this folder.
    fn processes(&self) -> Vec<Pid> {
        let wanted = self.data_dir();
        let ours = |pid: &i32| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = arguments.split(|b| *b == 0);
            words.any(|w| w == b"--data-dir") && words.next() == Some(wanted.as_os_str().as_encoded_bytes())
        };
        let all = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        all.filter(ours).filter_map(Pid::from_raw).collect()
    }

    /// Those of them that are a `kvkeepd`, and not about to become one.
    fn servers(&self) -> Vec<Pid> {
        let is_server = |pid: &Pid| {
            let exe = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
            exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name == "kvkeepd"))
        };
        self.processes().into_iter().filter(is_server).collect()
    }

    /// Another process that connects, and says what came of it.
    fn process(&self, parameters: &str, kvkeepd: Option<&str>) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "embedded::a_process_of_its_own", "--nocapture"]);
        command.env(ENDPOINT_VARIABLE, self.endpoint(parameters));
        command.envs(kvkeepd.map(|program| (KVKEEPD_VARIABLE, program)));
        Process(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// A script that becomes `kvkeepd` after so long.
    fn slow_kvkeepd(&self, seconds: f32) -> String {
        use std::os::unix::fs::PermissionsExt as _;
        let script = self.folder.path().join("slow-kvkeepd");
        let text = format!("#!/bin/sh\nsleep {seconds}\nexec '{}' \"$@\"\n", node::binary("kvkeepd").display());
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        script.display().to_string()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the private server ---\n{}---", self.log());
        }
        let since = Instant::now();
        loop {
            let left = self.processes();
            for pid in &left {
                let _ = kill_process(*pid, Signal::KILL); // it may have ended by itself
            }
            if left.is_empty() || since.elapsed() > PATIENCE {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // What a killed server leaves in memory; a server names its folder there after its data folder.
        if let Ok(folder) = fs::canonicalize(self.data_dir()) {
            let hash = crc32fast::hash(folder.as_os_str().as_encoded_bytes());
            let name = format!("kvkeep-{}-{hash:08x}", rustix::process::getuid().as_raw());
            let _ = fs::remove_dir_all(PathBuf::from("/dev/shm").join(name)); // not there after a clean stop
        }
    }
}

/// A process of these tests; killed at its end.
struct Process(Child);

impl Process {
    /// What it said: `epoch N` of the server that it found, or `failed: why`.
    fn said(mut self) -> String {
        use std::io::Read as _;
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        self.0.wait().unwrap();
        let said = text.lines().find_map(|line| line.split_once("said: ")).map(|(_, said)| said.to_owned());
        said.unwrap_or_else(|| panic!("the process said nothing of itself: {text}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it has usually ended
        let _ = self.0.wait();
    }
}

async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < PATIENCE, "it does not come true that {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// No test by itself: what [`Private::process`] runs. Without the variable there is nothing to do.
#[tokio::test]
async fn a_process_of_its_own() {
    let Ok(endpoint) = std::env::var(ENDPOINT_VARIABLE) else { return };
    match Client::connect(ClientConfig::to(endpoint)).await {
        Ok(client) => {
            client.stats(&Call::default()).await.unwrap();
            println!("said: epoch {}", client.server_epoch());
        }
        Err(error) => println!("said: failed: {}", error.to_string().replace('\n', " ")),
    }
}

/// Each of eight processes is told the epoch of the server that it found, and an epoch is drawn at every start: one epoch is
/// one server. The log says how often a server became ready, and that none was started in vain.
#[test]
fn eight_processes_that_race_start_one_server() {
    let private = Private::new();
    let processes: Vec<_> = (0..8).map(|_| private.process(SMALL, None)).collect();
    let said: Vec<_> = processes.into_iter().map(Process::said).collect();
    assert!(said[0].starts_with("epoch ") && said.iter().all(|s| *s == said[0]), "{said:?}");
    assert_eq!(private.servers().len(), 1);
    let log = private.log();
    assert_eq!(log.matches("kvkeepd ready listen=unix:").count(), 1, "{log}");
    assert!(!log.contains("another kvkeepd"), "{log}");
}

/// The starter is killed while its server is a script that still sleeps: a server of ours must serve meanwhile, with its own
/// epoch until the end, and the late one must find the folder taken, which its process list and the log show.
#[tokio::test]
async fn a_server_that_comes_late_finds_the_folder_taken() {
    let private = Private::new();
    let starter = private.process(SMALL, Some(&private.slow_kvkeepd(1.5)));
    wait_until("a server is on its way", || !private.processes().is_empty()).await;
    drop(starter); // SIGKILL
    let late = private.processes();
    assert_eq!(late.len(), 1, "a server outlives its starter");
    let client = private.client(SMALL).await;
    let epoch = client.server_epoch();
    wait_until("the late server has ended", || !private.processes().contains(&late[0])).await;
    assert!(private.log().contains("another kvkeepd has this data folder open"), "{}", private.log());
    client.stats(&Call::default()).await.unwrap();
    assert_eq!((client.server_epoch(), private.servers().len()), (epoch, 1));
}

/// The data folder is held as by a server that starts or stops and does not serve: as long as it is, no process may appear;
/// once it is free, one does.
#[tokio::test]
async fn a_server_that_does_not_answer_yet_is_waited_for() {
    let private = Private::new();
    fs::create_dir(private.data_dir()).unwrap();
    let lock = File::create(private.data_dir().join("lock")).unwrap();
    lock.lock().unwrap();
    let local = private.local(SMALL);
    let waiting = tokio::spawn(async move { ensure(&local).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished());
    assert_eq!(private.processes(), [], "no server is started in vain");
    drop(lock);
    assert_eq!(waiting.await.unwrap().unwrap(), private.data_dir().join("kvkeepd.sock"));
    assert_eq!(private.servers().len(), 1);
}

/// A starter is killed after a random time, many times over: whatever it had done, the next one must find or make exactly
/// one server that answers.
#[tokio::test]
async fn a_starter_may_be_killed_at_any_moment() {
    let mut rng = StdRng::seed_from_u64(seed("embedded::a_starter_may_be_killed_at_any_moment"));
    for round in 0..rounds(6) {
        let private = Private::new();
        let starter = private.process(SMALL, None);
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..150))).await;
        drop(starter);
        let client = private.client(SMALL).await;
        client.stats(&Call::default()).await.unwrap();
        wait_until("one server is left", || private.processes().len() == 1).await;
        assert_eq!(private.servers().len(), 1, "round {round}");
    }
}

/// With a client the server stays longer than its idle time; without one it ends, seen by its process and its socket; the
/// blocks of the next life are compared byte for byte. With NVMe and with memory alone.
#[tokio::test]
async fn an_idle_server_ends_and_the_next_one_has_its_blocks() {
    for parameters in ["dram=128MiB&nvme=256MiB&idle=1", "dram=128MiB&nvme=off&idle=1"] {
        let private = Private::new();
        let client = private.client(parameters).await;
        let namespace = super::namespace(&client, &formats::any_size(1 << 20)).await;
        let keys = payload::chain(1, 40);
        super::store(&namespace, &keys, BYTES, Class::Cache).await;
        let first = private.servers();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(private.servers(), first, "{parameters}: a client is connected");
        let epoch = client.server_epoch();
        drop((namespace, client));
        wait_until("the idle server has ended", || private.processes().is_empty()).await;
        assert!(private.log().contains("nobody is connected"), "{}", private.log());
        assert!(!private.data_dir().join("kvkeepd.sock").exists());

        let client = private.client(parameters).await;
        assert_ne!(client.server_epoch(), epoch);
        let namespace = super::namespace(&client, &formats::any_size(1 << 20)).await;
        assert!(!namespace.created);
        assert_eq!(super::found(&namespace, &keys, BYTES).await, 40, "{parameters}");
    }
}

/// Clients come at the very moment at which the server ends of idleness, some before and some after: each must be served.
#[tokio::test]
async fn a_client_that_comes_as_the_server_ends_is_served() {
    let mut rng = StdRng::seed_from_u64(seed("embedded::a_client_that_comes_as_the_server_ends_is_served"));
    let private = Private::new();
    let parameters = "dram=128MiB&nvme=256MiB&idle=1";
    for _ in 0..rounds(6) {
        let client = private.client(parameters).await;
        client.stats(&Call::default()).await.unwrap();
        drop(client);
        tokio::time::sleep(Duration::from_millis(970 + rng.random_range(0..50))).await;
    }
    let client = private.client(parameters).await;
    client.stats(&Call::default()).await.unwrap();
    assert_eq!(private.servers().len(), 1);
    // Shown when it fails, or with --nocapture: how many of the clients came too late.
    println!("the server was started {} times", private.log().matches("kvkeepd ready").count());
}

/// A server that has just decided to end takes two connections (the look, and the one for the hello), answers neither and is
/// gone, its lock with it; played here, because the moment is too short to be hit. The client must be served by another.
#[tokio::test]
async fn a_server_that_is_gone_before_the_hello_is_replaced() {
    let private = Private::new();
    fs::create_dir(private.data_dir()).unwrap();
    let lock = File::create(private.data_dir().join("lock")).unwrap();
    lock.lock().unwrap();
    let listener = UnixListener::bind(private.data_dir().join("kvkeepd.sock")).unwrap();
    let ending = std::thread::spawn(move || {
        let taken = [listener.accept().unwrap(), listener.accept().unwrap()];
        drop((listener, lock));
        drop(taken);
    });
    let client = private.client(SMALL).await;
    ending.join().unwrap();
    client.stats(&Call::default()).await.unwrap();
    assert_eq!(private.servers().len(), 1);
}

/// The server is killed under a client: the client's next call is answered, by a server of another epoch.
#[tokio::test]
async fn a_client_starts_its_server_again() {
    let private = Private::new();
    let client = private.client(SMALL).await;
    let epoch = client.server_epoch();
    let namespace = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 8);
    super::store(&namespace, &keys, 4096, Class::Durable).await;
    private.servers().into_iter().for_each(|pid| kill_process(pid, Signal::KILL).unwrap());
    wait_until("the server is gone", || private.processes().is_empty()).await;
    assert_eq!(super::found(&namespace, &keys, 4096).await, 8);
    assert_ne!(client.server_epoch(), epoch);
    assert_eq!(client.counters().restarts, 1);
}

/// A dead server's socket lies in the folder: connecting to it is refused, and yet a client gets in.
#[tokio::test]
async fn a_stale_socket_is_replaced() {
    let private = Private::new();
    fs::create_dir(private.data_dir()).unwrap();
    drop(UnixListener::bind(private.data_dir().join("kvkeepd.sock")).unwrap()); // leaves its file
    let client = private.client(SMALL).await;
    client.stats(&Call::default()).await.unwrap();
}

/// What `kvkeepd` refuses comes back with its own words; what the endpoint cannot mean, before anything is made; a server
/// that cannot start is not started again at once, which the number of its refusals in the log shows.
#[tokio::test]
async fn what_is_wrong_is_said_and_leaves_nothing() {
    let private = Private::new();
    let error = Client::connect(ClientConfig::to(private.endpoint("drum=1GiB"))).await.err().unwrap();
    assert!(error.to_string().contains("drum"), "{error}");
    assert!(!private.data_dir().exists());

    let local = private.local("dram=1MiB&nvme=256MiB");
    for _ in 0..3 {
        let error = ensure(&local).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unreachable);
        let said = error.to_string();
        assert!(said.contains("arena.bytes is at least 64MiB") && said.contains("kvkeepd.log"), "{said}");
    }
    assert_eq!(private.log().matches("arena.bytes is at least").count(), 1, "{}", private.log());
    assert_eq!(private.processes(), []);
    // Another client with what the folder can be used with is not held up.
    private.client(SMALL).await;

    let said = private.process(SMALL, Some("/nowhere/kvkeepd")).said();
    assert!(said.starts_with("epoch "), "the program is not needed where a server answers: {said}");
    let other = Private::new();
    let said = other.process(SMALL, Some("/nowhere/kvkeepd")).said();
    assert!(said.contains("KVKEEP_KVKEEPD") && said.contains("/nowhere/kvkeepd"), "{said}");
}

/// A second client asks for another size: it gets the same server, by its epoch, and no second process.
#[tokio::test]
async fn other_parameters_get_the_server_that_runs() {
    let private = Private::new();
    let first = private.client(SMALL).await;
    let second = private.client("dram=64MiB&nvme=off&idle=7").await;
    assert_eq!(second.server_epoch(), first.server_epoch());
    assert_eq!(private.processes().len(), 1);
}

/// The server has nothing of its starter: a session of its own, none of its variables, none of its open files, though one
/// was open for inheritance.
#[tokio::test]
async fn a_private_server_inherits_nothing() {
    let private = Private::new();
    let held = private.folder.path().join("held");
    let file = File::create(&held).unwrap();
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let _client = private.client(SMALL).await;
    let pid = private.servers()[0].as_raw_nonzero();
    // The sixth word after the name, which stands in brackets, is the session.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string());
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(!environment.split(|b| *b == 0).any(|variable| variable.starts_with(b"KVKEEP_")));
    let open: Vec<_> = leaks::names(format!("/proc/{pid}/fd").as_ref())
        .into_iter()
        .filter_map(|fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok())
        .collect();
    assert!(!open.is_empty() && !open.contains(&held), "{open:?}");
}

/// A server with `--listen off` says where its socket is, serves blocks on it through the SDK, and none of its sockets is
/// among those that listen on TCP.
#[tokio::test]
async fn a_server_without_tcp_serves_on_its_socket() {
    use std::io::BufRead as _;
    let private = Private::new();
    let mut command = Command::new(node::binary("kvkeepd"));
    command.arg("--data-dir").arg(private.data_dir());
    command.args(["--listen", "off", "--arena-bytes", "128MiB", "--nvme-bytes", "256MiB"]);
    let mut server = Process(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    std::io::BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let socket = private.data_dir().join("kvkeepd.sock");
    assert_eq!(line, format!("kvkeepd ready listen=unix:{}\n", socket.display()));

    let client = Client::connect(ClientConfig::to(format!("unix:{}", socket.display()))).await.unwrap();
    let namespace = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 8);
    super::store(&namespace, &keys, 4096, Class::Durable).await;
    assert_eq!(super::found(&namespace, &keys, 4096).await, 8);

    let pid = server.0.id();
    let listening: Vec<String> = ["tcp", "tcp6"]
        .iter()
        .flat_map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")))
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter(|words| words.get(3).is_some_and(|state| state == "0A"))
        .filter_map(|words| words.get(9).map(|inode| format!("socket:[{inode}]")))
        .collect();
    for fd in leaks::names(format!("/proc/{pid}/fd").as_ref()) {
        if let Ok(link) = fs::read_link(format!("/proc/{pid}/fd/{fd}")) {
            assert!(!listening.contains(&link.display().to_string()), "{link:?} listens on TCP");
        }
    }
    // The private endpoint of the same folder finds it, and starts none of its own.
    let found = private.client("").await;
    assert_eq!(found.server_epoch(), client.server_epoch());
}
