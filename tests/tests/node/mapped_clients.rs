//! Clients in processes of their own that are stopped or killed while they hold leases, slots and regions.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use kvkeep_client::{Call, Client, ClientConfig, GetItem, MatchQuery, Region};
use kvkeep_core::{Class, RequestId};
use kvkeep_tests::{Node, Options, formats, leaks, payload};
use rustix::process::{Pid, Signal, kill_process};

const BYTES: usize = 1 << 20;
const BLOCKS: u64 = 8;
/// Where the client process finds the server, and what it shall do.
const ROLE_VARIABLE: &str = "KVKEEP_TEST_CLIENT";

/// A client process; killed when dropped.
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(role: &str, node: &Node) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "mapped_clients::a_client_process", "--nocapture"])
            .env(ROLE_VARIABLE, format!("{role} {}", node.endpoint()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, stdin, stdout }
    }

    /// Waits for this word on a line of its own.
    fn says(&mut self, word: &str) {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the client ended without saying {word:?}");
            if line.trim() == word {
                return;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

/// What a client process does. Run as a test of its own it has nothing to do.
#[tokio::test]
async fn a_client_process() {
    let Ok(role) = std::env::var(ROLE_VARIABLE) else { return };
    let (role, endpoint) = role.split_once(' ').unwrap();
    let client = Client::connect(ClientConfig::to(endpoint)).await.unwrap();
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let keys = payload::chain(1, BLOCKS);
    let say = |word: &str| {
        println!("\n{word}");
        std::io::stdout().flush().unwrap();
    };
    let wait = || drop(std::io::stdin().read_line(&mut String::new()));
    match role {
        "reader" => {
            let query = MatchQuery::of(keys.clone()).leased(Duration::from_millis(300));
            let mapped = ns.match_mapped(&query, &Call::of(RequestId::new(b"m").unwrap())).await.unwrap();
            assert_eq!(mapped.parts.len(), BLOCKS as usize);
            say("mapped");
            wait();
            // The lease is long over, the blocks are evicted, their memory is as it was.
            for part in &mapped.parts {
                let block = part.block.as_ref().unwrap();
                let mut bytes = vec![0; BYTES];
                let there = block.copy_to(&mut bytes);
                assert!(!there, "an evicted block says so");
                assert!(
                    bytes[..] == payload::block(&keys[part.item], BYTES)[..],
                    "memory was used again under a reader"
                );
            }
            say("right");
            wait();
        }
        "hoarder" => {
            let queries: Vec<_> = (0..1000u32)
                .map(|n| MatchQuery {
                    request_id: RequestId::new(&n.to_be_bytes()).unwrap(),
                    ..MatchQuery::of(keys.clone()).leased(Duration::from_secs(60))
                })
                .collect();
            for some in queries.chunks(100) {
                ns.match_many(some, &Call::default()).await.unwrap();
            }
            let query = MatchQuery::of(keys.clone()).leased(Duration::from_secs(60));
            ns.match_mapped(&query, &Call::of(RequestId::new(b"m").unwrap())).await.unwrap();
            let region = Region::new(BYTES).unwrap();
            // SAFETY: nobody else knows the region.
            let place = [unsafe { region.place(0, BYTES) }];
            ns.get_into_region(&[GetItem::of(keys[0].clone())], &place, None, &Call::default()).await.unwrap();
            say("holding");
            wait();
        }
        other => panic!("{other}"),
    }
}

async fn node_with_blocks() -> (Node, Client, kvkeep_client::Namespace) {
    let node = Node::start(Options {
        arena_bytes: 64 << 20,
        nvme_bytes: 512 << 20,
        limits: "instance_grace_ms = 300\n".into(),
        ..Options::default()
    });
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    super::store(&ns, &payload::chain(1, BLOCKS), BYTES, Class::Durable).await;
    (node, client, ns)
}

/// The client maps eight blocks and is stopped. Its lease ends, the blocks are evicted under pressure; when it wakes up its
/// memory still holds them. The slots come back when it has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_stopped_past_its_lease_never_sees_other_bytes() {
    let (node, client, ns) = node_with_blocks().await;
    let mut reader = Process::start("reader", &node);
    reader.says("mapped");
    reader.signal(Signal::STOP);
    leaks::eventually(&client, "its lease ends", |s| s.leases == 0).await;
    for chain in 2..20 {
        super::store(&ns, &payload::chain(chain, 8), BYTES, Class::Durable).await;
    }
    let stats = client.stats(&Call::default()).await.unwrap();
    assert_eq!(stats.counters["kvkeep_mapped_bytes"], BLOCKS * BYTES as u64, "held for as long as the process lives");
    reader.signal(Signal::CONT);
    writeln!(reader.stdin).unwrap();
    reader.says("right");
    // Killed without a word: its connections close, its instance ends, its process is gone.
    drop(reader);
    leaks::eventually(&client, "its slots come back", |s| {
        s.counters["kvkeep_mapped_bytes"] == 0 && s.counters["kvkeep_mapped_orphaned_bytes"] == 0
    })
    .await;
    leaks::nothing_is_held(&client).await;
}

/// A client is killed with a thousand leases, mapped slots and a region: all of it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_killed_with_a_thousand_leases_leaves_nothing() {
    let (node, client, ns) = node_with_blocks().await;
    let mut hoarder = Process::start("hoarder", &node);
    hoarder.says("holding");
    let stats = client.stats(&Call::default()).await.unwrap();
    assert!(stats.leases > 1000 && stats.counters["kvkeep_regions"] >= 1, "{stats:?}");
    hoarder.signal(Signal::KILL);
    drop(hoarder);
    leaks::nothing_is_held(&client).await;
    leaks::eventually(&client, "slots and regions come back", |s| {
        ["kvkeep_mapped_bytes", "kvkeep_mapped_orphaned_bytes", "kvkeep_regions"]
            .iter()
            .all(|name| s.counters[*name] == 0)
    })
    .await;
    ns.remove(&payload::chain(1, BLOCKS), &Call::default()).await.unwrap();
    leaks::nothing_is_left(&client).await;
}
