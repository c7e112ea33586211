//! `kvkeepctl session` against a real server.

use std::path::Path;
use std::process::{Command, Output};

use bytes::Bytes;
use kvkeep_client::sessions::{Append, OpenSession};
use kvkeep_client::{Call, GetItem, Namespace, Put, PutPosition};
use kvkeep_core::Class;
use kvkeep_tests::node::{Node, Options};
use kvkeep_tests::{formats, payload};
use serde_json::Value;

const BLOCK_BYTES: usize = 16 << 10;
const POSITIONS: u64 = 40;
const CHAIN: u64 = 7;

fn ctl(node: &Node, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeepctl"));
    for name in ["KVKEEP_ENDPOINT", "KVKEEP_TOKEN", "KVKEEP_CA"] {
        command.env_remove(name);
    }
    command.args(["--endpoint", &node.endpoint()]).args(args).output().expect("the program starts")
}

/// The answer of a command that succeeds, as JSON of this schema.
fn ask(node: &Node, schema: &str, args: &[&str]) -> Value {
    let output = ctl(node, &[&["--json"], args].concat());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(answer["schema"], format!("kvkeepctl/{schema}"));
    answer
}

/// What a person reads.
fn read(node: &Node, args: &[&str]) -> String {
    let output = ctl(node, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The exit code of a command that fails, and its error as JSON.
fn fails(node: &Node, args: &[&str]) -> (i32, Value) {
    let output = ctl(node, &[&["--json"], args].concat());
    let error = serde_json::from_slice(&output.stderr).expect("one JSON object");
    (output.status.code().expect("it ends by itself"), error)
}

async fn namespace(node: &Node) -> Namespace {
    let format = formats::plain(BLOCK_BYTES as u64);
    node.client().await.register_namespace("chat", &format, "weights-1").await.expect("a namespace")
}

/// A durable session of [`POSITIONS`] positions and three token ids more.
async fn a_session(node: &Node, id: &str) -> Namespace {
    let ns = namespace(node).await;
    let call = Call::default();
    let keys = payload::chain(CHAIN, POSITIONS);
    let positions = keys.iter().map(|k| PutPosition::of(k.clone(), payload::block(k, BLOCK_BYTES))).collect();
    let put = Put { positions, class: Some(Class::Durable), ..Put::default() };
    let outcomes = ns.put(&put, &call).await.expect("a put");
    assert!(outcomes.iter().all(|outcome| outcome.is_kept()), "{outcomes:?}");
    let open = OpenSession {
        class: Some(Class::Durable),
        priority: 3,
        attributes: [("user".to_owned(), "u1".to_owned())].into(),
        ..OpenSession::default()
    };
    ns.sessions().open(id, &open, &call).await.expect("a session");
    let token_ids = (0..POSITIONS as u32 * formats::TOKENS_PER_KEY + 3).collect();
    let append = Append { keys, token_ids, ..Append::default() };
    ns.sessions().append(id, &append, &call).await.expect("an append");
    ns
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_listed_shown_changed_and_deleted() {
    let node = Node::start(Options::default());
    a_session(&node, "a").await;

    let list = ask(&node, "sessions", &["session", "list", "--attribute", "user=u1", "--class", "durable"]);
    assert_eq!((list["sessions"].as_array().map(Vec::len), &list["more"]), (Some(1), &Value::Bool(false)));
    assert_eq!(
        ask(&node, "sessions", &["session", "list", "--attribute", "user=u2"])["sessions"],
        Value::Array(vec![])
    );
    assert_eq!(ask(&node, "sessions", &["session", "list", "--state", "closed"])["sessions"], Value::Array(vec![]));

    let shown = ask(&node, "session", &["session", "show", "a"]);
    assert_eq!((&shown["positions"], &shown["tokens"]), (&POSITIONS.into(), &643.into()));
    assert_eq!((&shown["missing_positions"], &shown["priority"]), (&0.into(), &3.into()));
    let held: u64 = shown["tiers"].as_array().expect("tiers").iter().filter_map(|t| t["positions"].as_u64()).sum();
    assert_eq!(held, POSITIONS);
    assert!(read(&node, &["session", "show", "a"]).contains("attribute  user=u1"));
    let explained = ask(&node, "session_explain", &["session", "explain", "a"]);
    let runs = explained["runs"].as_array().expect("runs");
    assert_eq!(runs.iter().filter_map(|r| r["positions"].as_u64()).sum::<u64>(), POSITIONS);
    assert!(runs.iter().all(|r| r["class"] == "durable"), "{explained}");

    assert_eq!(ask(&node, "session", &["session", "pin", "a", "--tier", "dram"])["pinned"], "dram");
    assert_eq!(ask(&node, "session", &["session", "unpin", "a"])["pinned"], Value::Null);
    let fork = ask(&node, "session", &["session", "fork", "a", "b", "--at", "10"]);
    assert_eq!((&fork["positions"], &fork["parent"]["session_id"]), (&10.into(), &"a".into()));
    assert_eq!(ask(&node, "session", &["session", "truncate", "b", "4"])["positions"], 4);
    assert_eq!(ask(&node, "session_hint", &["session", "hint", "b", "--due-in-s", "60"])["positions"], 4);
    assert_eq!(ask(&node, "session", &["session", "close", "b"])["state"], "closed");

    let (code, error) = fails(&node, &["session", "delete", "b"]);
    assert_eq!((code, &error["kind"]), (2, &"usage".into()), "nobody is there to be asked");
    assert_eq!(ask(&node, "session_delete", &["session", "delete", "b", "--yes"])["deleted"], true);
    assert_eq!(ask(&node, "session_delete", &["session", "delete", "b", "--yes"])["deleted"], false);
    let (code, error) = fails(&node, &["session", "show", "b"]);
    assert_eq!((code, &error["kind"]), (1, &"unknown_session".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_says_what_is_missing_and_where_to_compute() {
    let mut node = Node::start(Options::default());
    let ns = a_session(&node, "a").await;
    drop(ns);
    node.kill();
    node.restart();
    let restored = ask(&node, "session_restore", &["session", "restore", "a"]);
    assert_eq!((&restored["whole"], &restored["positions"]), (&true.into(), &POSITIONS.into()));
    assert_eq!(restored["compute_from_token"], 640);

    let lost: Vec<Bytes> = (20..23).map(|n| payload::key(CHAIN, n)).collect();
    namespace(&node).await.remove(&lost, &Call::default()).await.expect("a removal");
    let output = ctl(&node, &["--json", "session", "restore", "a"]);
    assert_eq!(output.status.code(), Some(1));
    let restored: Value = serde_json::from_slice(&output.stdout).expect("the answer");
    assert_eq!((&restored["usable_positions"], &restored["compute_from_token"]), (&20.into(), &320.into()));
    assert_eq!(restored["missing"][0]["first_position"], 20);
    assert_eq!(restored["missing"][0]["positions"], 3);
    let explained = ask(&node, "session_explain", &["session", "explain", "a"]);
    let runs = explained["runs"].as_array().expect("runs");
    let gone = runs.iter().find(|r| r["first_position"] == 20).expect("a run that begins at 20");
    assert_eq!((&gone["positions"], &gone["status"], &gone["reason"]), (&3.into(), &"miss".into(), &"removed".into()));
    assert_ne!(gone["why"], "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_carried_to_another_server_byte_for_byte() {
    let (here, there) = (Node::start(Options::default()), Node::start(Options::default()));
    a_session(&here, "a").await;
    let path = here.beside("a.kvsession");
    let file = path.to_str().expect("a path in UTF-8");
    let exported = ask(&here, "session_export", &["session", "export", "a", file, "--complete"]);
    assert_eq!((&exported["parts"], &exported["tokens"]), (&POSITIONS.into(), &643.into()));
    assert_eq!(exported["file_bytes"], Path::new(file).metadata().expect("the file").len());
    let (code, _) = fails(&here, &["session", "export", "a", file]);
    assert_eq!(code, 1, "a file that is there is not replaced unasked");

    let (code, _) = fails(&there, &["session", "import", file]);
    assert_eq!(code, 1, "there is no such namespace");
    let imported = ask(&there, "session_import", &["session", "import", file, "--register"]);
    assert_eq!((&imported["imported_positions"], &imported["created"]), (&POSITIONS.into(), &true.into()));
    assert_eq!(imported["attributes"]["user"], "u1");
    assert_eq!(ask(&there, "session_import", &["session", "import", file])["created"], false);

    let (ns, call) = (namespace(&there).await, Call::default());
    let keys = payload::chain(CHAIN, POSITIONS);
    let items: Vec<_> = keys.iter().cloned().map(GetItem::of).collect();
    for (key, part) in keys.iter().zip(ns.get(&items, None, &call).await.expect("a get")) {
        assert_eq!(part.data, payload::block(key, BLOCK_BYTES));
    }
    let tokens = ns.sessions().tokens_all("a", &call).await.expect("token ids");
    assert_eq!(tokens.ids, (0..643).collect::<Vec<_>>());

    // Damage is refused by name, and leaves nothing.
    let mut bytes = std::fs::read(file).expect("the file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).expect("the file");
    let (code, error) = fails(&there, &["session", "import", file, "--id", "c"]);
    assert_eq!((code, &error["kind"]), (1, &"corrupt".into()));
    assert_eq!(fails(&there, &["session", "show", "c"]).1["kind"], "unknown_session");
}

#[tokio::test(flavor = "multi_thread")]
async fn fsck_finds_what_a_durable_session_lacks() {
    let node = Node::start(Options::default());
    let ns = a_session(&node, "a").await;
    let sound = ask(&node, "fsck", &["fsck"]);
    assert_eq!((&sound["sessions"], &sound["positions"]), (&1.into(), &POSITIONS.into()));
    assert_eq!((&sound["missing_positions"], &sound["unreferenced_blocks"]), (&0.into(), &0.into()));
    ns.remove(&[payload::key(CHAIN, 5)], &Call::default()).await.expect("a removal");
    let output = ctl(&node, &["--json", "fsck", "--sweep"]);
    assert_eq!(output.status.code(), Some(1));
    let bad: Value = serde_json::from_slice(&output.stdout).expect("the answer");
    assert_eq!(bad["missing_positions"], 1);
    assert_eq!((&bad["missing"][0]["session_id"], &bad["missing"][0]["position"]), (&"a".into(), &5.into()));
}
