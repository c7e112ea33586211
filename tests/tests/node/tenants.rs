//! Who may see what.

use std::collections::HashSet;

use kvkeep_client::{Call, Client, ClientConfig, MatchQuery, Watch};
use kvkeep_core::{Class, ErrorKind, MissReason};
use kvkeep_proto::v1;
use kvkeep_tests::{Node, Options, formats, payload};

const ACME: &str = "acme-0123456789abcdef";
const ZENO: &str = "zeno-0123456789abcdef";
const ROOT: &str = "root-0123456789abcdef";

fn options() -> Options {
    let line = |tenant: &str, token: &str, more: &str| format!("{tenant} {token} {more}");
    let tokens = vec![line("acme", ACME, ""), line("zeno", ZENO, ""), line("ops", ROOT, "admin")];
    Options { tokens, ..Options::default() }
}

async fn client(node: &Node, token: &str) -> Client {
    node.client_with(|c| c.token = Some(token.into())).await
}

#[tokio::test]
async fn without_a_token_or_with_a_wrong_one_nobody_gets_in() {
    let node = Node::start(options());
    for token in [None, Some("acme-0123456789abcdeX".to_owned())] {
        let config = ClientConfig { token, ..ClientConfig::to(node.endpoint()) };
        super::is_refused(Client::connect(config).await, ErrorKind::Denied);
    }
    assert_eq!(client(&node, ACME).await.hello().tenant, "acme");
}

/// Not even whether a key or a namespace exists.
#[tokio::test]
async fn a_tenant_sees_nothing_of_another() {
    let node = Node::start(options());
    let (acme, zeno) = (client(&node, ACME).await, client(&node, ZENO).await);
    let format = formats::plain(4096);
    let ours = acme.register_namespace("ns", &format, "w").await.unwrap();
    let keys = payload::chain(1, 4);
    super::store(&ours, &keys, 4096, Class::Durable).await;

    // The same name and format is another namespace, with nothing in it.
    let theirs = zeno.register_namespace("ns", &format, "w").await.unwrap();
    assert!(theirs.created && theirs.handle.namespace != ours.handle.namespace);
    assert_eq!(super::found(&theirs, &keys, 4096).await, 0);
    let found = theirs.match_chain(&MatchQuery::of(keys.clone()), &Call::default()).await.unwrap();
    assert_eq!((found.boundary_positions, found.reason), (0, Some(MissReason::NeverStored)));

    // A handle that was not given to it is as unknown as one that never was.
    let stolen = zeno.attach(ours.handle);
    let call = Call::default();
    super::is_refused(stolen.match_chain(&MatchQuery::of(keys.clone()), &call).await, ErrorKind::UnknownNamespace);
    let item = [kvkeep_client::GetItem::of(keys[0].clone())];
    super::is_refused(stolen.get(&item, None, &call).await, ErrorKind::UnknownNamespace);
    let put = super::put_of(&keys, 4096, Class::Cache);
    super::is_refused(stolen.put(&put, &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.remove(&keys, &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.touch(&keys, &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.lease(&keys, None, &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.list(&bytes::Bytes::new(), 10, &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.explain(&keys[0], &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.prefetch(&keys, kvkeep_core::Tier::Dram, &call).await, ErrorKind::UnknownNamespace);
    super::is_refused(stolen.advance_revision("x", &call).await, ErrorKind::UnknownNamespace);
    let watch = Watch { handle: Some(ours.handle), snapshot: true, after_sequence: 0 };
    super::is_refused(zeno.watch_events(&watch, &call).await, ErrorKind::UnknownNamespace);

    // Events of all its namespaces are of its own only.
    super::store(&theirs, &payload::chain(9, 2), 4096, Class::Cache).await;
    let watch = Watch { handle: None, snapshot: true, after_sequence: 0 };
    let mut events = zeno.watch_events(&watch, &call).await.unwrap();
    let mut seen = HashSet::new();
    loop {
        let batch = events.next_batch().await.unwrap().unwrap();
        seen.extend(batch.events.iter().map(|e| e.key.clone()));
        if batch.snapshot_end {
            break;
        }
    }
    assert_eq!(seen, payload::chain(9, 2).into_iter().collect());
    assert_eq!(super::found(&ours, &keys, 4096).await, 4);
}

#[tokio::test]
async fn only_an_admin_asks_the_admin_service() {
    let node = Node::start(options());
    let call = Call::default();
    let admin = client(&node, ACME).await.admin();
    super::is_refused(admin.status(&call).await, ErrorKind::Denied);
    super::is_refused(admin.namespaces(&call).await, ErrorKind::Denied);
    super::is_refused(admin.leases(1, &call).await, ErrorKind::Denied);
    let status: v1::StatusReply = client(&node, ROOT).await.admin().status(&call).await.unwrap();
    assert_eq!(status.state, "serving");
}

#[test]
fn beyond_loopback_without_tls_and_tokens_it_does_not_start() {
    let node = Node::new(Options { listen: "0.0.0.0:0".into(), ..Options::default() });
    let (status, said) = node.second(&[]);
    assert!(!status.success());
    assert!(said.contains("TLS") && said.contains("tokens"), "{said}");
    assert!(!node.data_dir().exists(), "a refusal leaves nothing behind");
}

#[test]
fn a_tokens_file_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let node = Node::new(Options::default());
    let tokens = node.beside("open-tokens");
    std::fs::write(&tokens, format!("acme {ACME}\n")).unwrap();
    std::fs::set_permissions(&tokens, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (status, said) = node.second(&["--tokens-file", tokens.to_str().unwrap()]);
    assert!(!status.success() && said.contains("chmod 600") && !said.contains(ACME), "{said}");
}
