//! What sessions refuse, whom they refuse it, and what goes on when they cannot change.

use kvkeep_client::Call;
use kvkeep_client::sessions::{Append, ListSessions, OpenSession, Restore};
use kvkeep_core::{Class, ErrorKind, Tier};
use kvkeep_proto::v1;
use kvkeep_tests::powercut::{Fails, PowerCut};
use kvkeep_tests::raw::{self, Raw};
use kvkeep_tests::{Node, Options, formats, payload};

use super::super::{found, is_refused, store};
use super::{BYTES, append, filled, keys_of, namespace, open};

#[tokio::test]
async fn ids_attributes_and_names_beyond_their_bounds_are_refused() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    for bad in ["", "a\nb", &"x".repeat(257)] {
        is_refused(sessions.open(bad, &OpenSession::default(), &call).await, ErrorKind::InvalidArgument);
        is_refused(sessions.fork("a", bad, None, &call).await, ErrorKind::InvalidArgument);
    }
    let longest = "x".repeat(256);
    assert!(sessions.open(&longest, &OpenSession::default(), &call).await.unwrap().1);
    let attributes = |bytes: usize| OpenSession {
        attributes: [("k".to_owned(), "v".repeat(bytes - 1))].into(),
        ..OpenSession::default()
    };
    let refused = is_refused(sessions.open("a", &attributes(1025), &call).await, ErrorKind::TooLarge);
    assert_eq!(super::says(&refused, "attributes_bytes_max"), "1024");
    sessions.open("a", &attributes(1024), &call).await.unwrap();
    let format = formats::plain(4096);
    let client = node.client().await;
    for name in ["system/sessions", "system/x"] {
        is_refused(client.register_namespace(name, &format, "w").await, ErrorKind::InvalidArgument);
    }
}

/// Token ids lie in a namespace of the store's own: whoever guesses its handle gets nothing by it.
#[tokio::test]
async fn the_namespace_of_token_ids_is_unknown_to_clients() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = namespace(&node).await;
    let call = Call::default();
    let watch = kvkeep_client::Watch { handle: None, snapshot: true, after_sequence: 0 };
    let mut events = client.watch_events(&watch, &call).await.unwrap();
    open(&ns, "a", Class::Cache).await;
    let tokens = Append { token_ids: vec![1, 2, 3], ..Append::default() };
    ns.sessions().append("a", &tokens, &call).await.unwrap();
    let listed = client.admin().namespaces(&call).await.unwrap();
    let system = listed.iter().find(|n| n.name == "system/sessions").expect("an operator sees it");
    let handle = kvkeep_core::Handle {
        namespace: kvkeep_core::NamespaceId(system.namespace_id),
        revision: kvkeep_core::Revision(system.revision),
    };
    let guessed = client.attach(handle);
    let keys = payload::chain(1, 2);
    let unknown = ErrorKind::UnknownNamespace;
    is_refused(guessed.list(&bytes::Bytes::new(), 10, &call).await, unknown);
    is_refused(guessed.remove(&keys, &call).await, unknown);
    is_refused(guessed.put(&super::super::put_of(&keys, 1024, Class::Cache), &call).await, unknown);
    is_refused(guessed.get(&[kvkeep_client::GetItem::of(keys[0].clone())], None, &call).await, unknown);
    is_refused(guessed.advance_revision("x", &call).await, unknown);
    is_refused(guessed.sessions().open("b", &OpenSession::default(), &call).await, unknown);
    // Nor do engines hear of its blocks: the first they hear of is their own.
    store(&ns, &keys, 1024, Class::Cache).await;
    let heard = loop {
        let batch = events.next_batch().await.unwrap().unwrap();
        if let Some(event) = batch.events.first() {
            break event.key.clone();
        }
    };
    assert_eq!(heard, keys[0]);
    assert_eq!(ns.sessions().tokens_all("a", &call).await.unwrap().ids, [1, 2, 3]);
}

/// The SDK cuts large appends; who speaks the wire by hand is told.
#[tokio::test]
async fn more_than_one_call_takes_is_refused() {
    let node = Node::start(Options { limits: "batch_keys_max = 512\n".into(), ..Options::default() });
    let mut raw = Raw::connect(&node).await;
    let handle = raw.namespace("test", &formats::plain(4096)).await;
    let name = || {
        Some(v1::SessionName { handle: Some(kvkeep_client::convert::handle_to_proto(handle)), session_id: "a".into() })
    };
    raw.sessions.open(v1::OpenSessionRequest { name: name(), ..Default::default() }).await.unwrap();
    let tokens = v1::AppendSessionRequest { name: name(), token_ids: vec![7; (1 << 18) + 1], ..Default::default() };
    let keys = v1::AppendSessionRequest { name: name(), keys: payload::chain(1, 513), ..Default::default() };
    let part = |n| v1::ContentPart { first_token: n, tokens: 1, content_id: "x".into() };
    let content = v1::AppendSessionRequest {
        name: name(),
        token_ids: vec![7; 2000],
        content: (0..1025).map(part).collect(),
        ..Default::default()
    };
    for wish in [tokens, keys, content] {
        let status = raw.sessions.append(wish).await.unwrap_err();
        assert_eq!(raw::detail(&status).kind, "too_large", "{status:?}");
    }
    let nameless = raw.sessions.append(v1::AppendSessionRequest::default()).await.unwrap_err();
    assert_eq!(raw::detail(&nameless).kind, "invalid_argument");
    let most = v1::AppendSessionRequest { name: name(), token_ids: vec![7; 1 << 18], ..Default::default() };
    assert_eq!(raw.sessions.append(most).await.unwrap().into_inner().tokens, 1 << 18);
    let page = v1::ListSessionsRequest { page_token: vec![1, 2].into(), ..Default::default() };
    assert_eq!(raw::detail(&raw.sessions.list(page).await.unwrap_err()).kind, "invalid_argument");
}

/// Not even whether it exists.
#[tokio::test]
async fn another_tenant_sees_and_changes_nothing_of_a_session() {
    const ACME: &str = "acme-0123456789abcdef";
    const ZENO: &str = "zeno-0123456789abcdef";
    let tokens = vec![format!("acme {ACME}"), format!("zeno {ZENO}")];
    let node = Node::start(Options { tokens, ..Options::default() });
    let acme = node.client_with(|c| c.token = Some(ACME.into())).await;
    let zeno = node.client_with(|c| c.token = Some(ZENO.into())).await;
    let call = Call::default();
    let format = formats::any_size(1 << 20);
    let ours = acme.register_namespace("ns", &format, "w").await.unwrap();
    let keys = filled(&ours, "a", Class::Durable, 1, 10).await;
    let tokens = Append { from_position: 10, token_ids: vec![1, 2, 3], ..Append::default() };
    ours.sessions().append("a", &tokens, &call).await.unwrap();
    let before = ours.sessions().get("a", &call).await.unwrap();

    // Under the same names there is nothing.
    let theirs = zeno.register_namespace("ns", &format, "w").await.unwrap();
    let sessions = theirs.sessions();
    let all = ListSessions { all_namespaces: true, ..ListSessions::default() };
    assert!(sessions.list(&all, 100, &call).await.unwrap().0.is_empty());
    is_refused(sessions.get("a", &call).await, ErrorKind::UnknownSession);
    is_refused(sessions.tokens_all("a", &call).await, ErrorKind::UnknownSession);
    is_refused(append(&theirs, "a", 10, &keys).await, ErrorKind::UnknownSession);
    // Blocks of another tenant are not here for it.
    open(&theirs, "a", Class::Durable).await;
    is_refused(append(&theirs, "a", 0, &keys).await, ErrorKind::Conflict);

    // Nor with a handle that was not given to it.
    let stolen = zeno.attach(ours.handle);
    let sessions = stolen.sessions();
    let unknown = ErrorKind::UnknownNamespace;
    for id in ["a", "never"] {
        is_refused(sessions.open(id, &OpenSession::default(), &call).await, unknown);
        is_refused(append(&stolen, id, 10, &keys).await, unknown);
        is_refused(sessions.get(id, &call).await, unknown);
        is_refused(sessions.manifest(id, 0, 0, &call).await, unknown);
        is_refused(sessions.tokens(id, 0, 0, &call).await, unknown);
        is_refused(sessions.fork(id, "b", None, &call).await, unknown);
        is_refused(sessions.truncate(id, 0, false, &call).await, unknown);
        is_refused(sessions.pin(id, Tier::Dram, &call).await, unknown);
        is_refused(sessions.unpin(id, &call).await, unknown);
        is_refused(sessions.hint(id, &[kvkeep_client::sessions::SessionHint::Finished], &call).await, unknown);
        is_refused(sessions.close(id, &call).await, unknown);
        is_refused(sessions.delete(id, &call).await, unknown);
        is_refused(sessions.restore(id, &Restore::default(), &call).await.unwrap().finish().await, unknown);
    }
    is_refused(sessions.list(&ListSessions::default(), 100, &call).await, unknown);
    is_refused(zeno.admin().fsck(true, &call).await, ErrorKind::Denied);
    assert_eq!(ours.sessions().get("a", &call).await.unwrap(), before);
    assert_eq!(keys_of(&ours, "a").await, keys);
}

#[tokio::test]
async fn without_nvme_durable_sessions_are_refused_and_cache_sessions_work() {
    let mut node = Node::start(Options { nvme: "off = true\n".into(), ..Options::default() });
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let durable = OpenSession { class: Some(Class::Durable), ..OpenSession::default() };
    is_refused(sessions.open("a", &durable, &call).await, ErrorKind::InvalidArgument);
    let keys = filled(&ns, "a", Class::Cache, 1, 10).await;
    let tokens = Append { from_position: 10, token_ids: vec![1], ..Append::default() };
    is_refused(sessions.append("a", &tokens, &call).await, ErrorKind::InvalidArgument);
    is_refused(sessions.pin("a", Tier::Nvme, &call).await, ErrorKind::InvalidArgument);
    sessions.pin("a", Tier::Dram, &call).await.unwrap();
    let restored = sessions.restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert!(restored.is_whole(), "{restored:?}");
    assert_eq!(keys_of(&ns, "a").await, keys);
    assert_eq!(sessions.fork("a", "b", Some(5), &call).await.unwrap().0.positions, 5);
    // Manifests are in the raft log: they outlive the blocks.
    node.kill();
    super::super::restart::forget_memory(&node);
    node.restart();
    let ns = namespace(&node).await;
    assert_eq!(ns.sessions().get("a", &call).await.unwrap().positions, 10);
    let restored = ns.sessions().restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert_eq!((restored.usable_positions, restored.missing[0].count), (0, 10));
    assert!(ns.sessions().delete("a", &call).await.unwrap());
}

/// Block traffic never waits for sessions.
#[tokio::test]
async fn when_the_raft_log_has_failed_sessions_refuse_changes_and_blocks_go_on() {
    let mut node = Node::new(Options::default());
    let power = match PowerCut::under(&mut node) {
        Ok(power) => power,
        Err(why) => return kvkeep_tests::skipped("when_the_raft_log_has_failed", why),
    };
    power.may_fail(&mut node, "/raft/");
    node.restart();
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default().within(std::time::Duration::from_secs(5)));
    let keys = filled(&ns, "a", Class::Durable, 1, 10).await;
    let more = payload::chain(2, 10);
    store(&ns, &more, BYTES, Class::Cache).await;
    power.fail(Fails::Flush, true);
    let fails = |e: kvkeep_client::Error| {
        let said = e.to_string();
        assert!(said.contains("io") || said.contains("unavailable"), "{said}");
    };
    fails(append(&ns, "a", 10, &more).await.unwrap_err());
    power.fail(Fails::Flush, false);
    // The next flush would succeed, and would save nothing of what was lost.
    fails(append(&ns, "a", 10, &more).await.unwrap_err());
    fails(sessions.open("b", &OpenSession::default(), &call).await.unwrap_err());
    fails(sessions.truncate("a", 1, false, &call).await.unwrap_err());
    fails(sessions.delete("a", &call).await.unwrap_err());
    // Blocks are put and read, and what sessions are can be asked.
    store(&ns, &payload::chain(3, 10), BYTES, Class::Durable).await;
    store(&ns, &payload::chain(4, 10), BYTES, Class::Cache).await;
    for chain in 1..5 {
        assert_eq!(found(&ns, &payload::chain(chain, 10), BYTES).await, 10, "chain {chain}");
    }
    let restored = sessions.restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert!(restored.is_whole(), "{restored:?}");
    node.kill();
    node.restart();
    let ns = namespace(&node).await;
    // The first of the appends that failed may have been done, the deletion and the rest were refused.
    let now = keys_of(&ns, "a").await;
    assert!(now == keys || now == [keys, more].concat(), "{} positions", now.len());
}
