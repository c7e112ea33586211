//! The verbs on sessions.

use std::collections::BTreeMap;
use std::time::Duration;

use kvkeep_client::sessions::{Append, ContentPart, ListSessions, OpenSession, Parent, Progress, Restore};
use kvkeep_client::{Call, ErrorKind, Namespace, Put, PutPosition, SessionHint, SessionState};
use kvkeep_core::{Class, ErrorKind as CoreKind, Tier};
use kvkeep_proto::v1;
use tonic::Status;

use crate::support::{Fake, Fault, content, key};

/// Puts the first `n` positions.
async fn put(ns: &Namespace, n: usize) {
    let positions = (0..n).map(|i| PutPosition::of(key(i), content(i, 100))).collect();
    ns.put(&Put { positions, ..Put::default() }, &Call::default()).await.expect("the fake takes everything");
}

fn append(positions: std::ops::Range<usize>) -> Append {
    let (from_token, end) = (positions.start as u64 * 16, positions.end as u32 * 16);
    Append {
        from_position: positions.start as u64,
        keys: positions.map(key).collect(),
        from_token,
        token_ids: (from_token as u32..end).collect(),
        content: Vec::new(),
    }
}

#[tokio::test]
async fn a_session_is_opened_appended_to_and_read_page_by_page() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    put(&ns, 11).await;
    let open = OpenSession {
        parent: None,
        class: Some(Class::Durable),
        ttl: Some(Duration::from_secs(90 * 86_400)),
        priority: -2,
        attributes: BTreeMap::from([("user".to_owned(), "u1".to_owned())]),
    };
    let (session, created) = sessions.open("a", &open, &call).await.unwrap();
    assert!(created);
    assert_eq!((session.class, session.ttl, session.priority), (Class::Durable, open.ttl, -2));
    assert_eq!((&session.attributes, session.parent, session.pinned), (&open.attributes, None, None));
    assert!(!sessions.open("a", &open, &call).await.unwrap().1);

    // More keys than one call takes.
    let mut first = append(0..9);
    let image = ContentPart { first_token: 60, tokens: 4, content_id: key(99) };
    first.content.push(image.clone());
    let done = sessions.append("a", &first, &call).await.unwrap();
    assert_eq!((done.positions, done.tokens, done.repeated), (9, 144, false));
    assert!(sessions.append("a", &first, &call).await.unwrap().repeated);
    assert_eq!(sessions.append("a", &append(9..11), &call).await.unwrap().positions, 11);
    let e = sessions.append("a", &Append { from_position: 3, ..append(9..11) }, &call).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Conflict));

    let manifest = sessions.manifest_all("a", &call).await.unwrap();
    let keys: Vec<_> = manifest.iter().map(|p| p.key.clone().unwrap()).collect();
    assert_eq!(keys, (0..11).map(key).collect::<Vec<_>>());
    assert!(manifest.iter().all(|p| p.is_here() && p.tier == Some(Tier::Dram) && p.bytes == 100));
    let tokens = sessions.tokens_all("a", &call).await.unwrap();
    assert_eq!((tokens.ids, tokens.content, tokens.damaged), ((0..176).collect(), vec![image], false));
    assert_eq!(fake.calls("session_manifest"), 4);
    assert_eq!(fake.calls("session_tokens"), 4);
}

#[tokio::test]
async fn sessions_are_listed_forked_pinned_hinted_closed_and_deleted() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    put(&ns, 4).await;
    sessions.open("a", &OpenSession::default(), &call).await.unwrap();
    sessions.append("a", &append(0..4), &call).await.unwrap();
    let (fork, created) = sessions.fork("a", "b", Some(3), &call).await.unwrap();
    assert!(created);
    assert_eq!(fork.parent, Some(Parent { id: "a".to_owned(), positions: 3 }));
    assert_eq!(sessions.fork("a", "c", None, &call).await.unwrap().0.positions, 4);

    let ids = |list: Vec<kvkeep_client::SessionInfo>| list.into_iter().map(|s| s.id).collect::<Vec<_>>();
    let (list, more) = sessions.list(&ListSessions::default(), 2, &call).await.unwrap();
    assert_eq!((ids(list), more), (vec!["a".to_owned(), "b".to_owned()], true));
    let (list, more) = sessions.list(&ListSessions::default(), 3, &call).await.unwrap();
    assert_eq!((list.len(), more), (3, false));

    assert_eq!(sessions.pin("a", Tier::Nvme, &call).await.unwrap().pinned, Some(Tier::Nvme));
    assert_eq!(sessions.unpin("a", &call).await.unwrap().pinned, None);
    let hints = [SessionHint::DueIn(Duration::from_secs(60)), SessionHint::Priority(5)];
    assert_eq!(sessions.hint("a", &hints, &call).await.unwrap(), 4);
    let told: Vec<_> = fake.state.lock().sessions["a"].hints.iter().filter_map(|h| h.what).collect();
    assert_eq!(told, [v1::hint::What::DueMs(60_000), v1::hint::What::Priority(5)]);
    let short = sessions.truncate("a", 2, false, &call).await.unwrap();
    assert_eq!((short.positions, short.tokens), (2, 32));

    assert_eq!(sessions.close("a", &call).await.unwrap().state, SessionState::Closed);
    assert!(sessions.append("a", &append(2..3), &call).await.is_err());
    assert!(sessions.delete("a", &call).await.unwrap());
    assert!(!sessions.delete("a", &call).await.unwrap());
    assert_eq!(sessions.get("a", &call).await.unwrap_err().kind(), ErrorKind::Refused(CoreKind::UnknownSession));
}

#[tokio::test]
async fn a_restore_tells_how_far_it_is_and_how_it_ended() {
    let (_, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    put(&ns, 3).await;
    sessions.open("a", &OpenSession::default(), &call).await.unwrap();
    sessions.append("a", &append(0..3), &call).await.unwrap();
    let restore = Restore { lease: Some(Duration::from_millis(77)), ..Restore::default() };
    let mut restoring = sessions.restore("a", &restore, &call).await.unwrap();
    let mut seen = Vec::new();
    while let Some(progress) = restoring.progress().await.unwrap() {
        seen.push(progress.positions);
    }
    assert_eq!(seen, [0, 1, 2]);
    let restored = restoring.finish().await.unwrap();
    assert!(restored.is_whole() && !restored.late);
    assert_eq!((restored.usable_positions, restored.compute_from_token), (3, 48));
    assert_eq!(restored.lease.map(|l| l.0), Some(77));
    assert_eq!(restored.progress, Progress { positions: 3, total_positions: 3, bytes: 30, total_bytes: 30 });
    let e = sessions.restore("nobody", &restore, &call).await.err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::UnknownSession));
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_but_a_truncation_is_not_done_twice() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    put(&ns, 2).await;
    fake.fault("open_session", Fault::LoseAnswer(Status::unavailable("gone")));
    sessions.open("a", &OpenSession::default(), &call).await.unwrap();
    fake.fault("append_session", Fault::LoseAnswer(Status::unavailable("gone")));
    assert!(sessions.append("a", &append(0..2), &call).await.unwrap().repeated);
    fake.fault("truncate_session", Fault::LoseAnswer(Status::unavailable("gone")));
    let e = sessions.truncate("a", 1, false, &call).await.unwrap_err();
    assert!(e.may_have_run());
    assert_eq!((fake.calls("truncate_session"), fake.calls("append_session")), (1, 2));
}

/// Sessions are no hot verbs.
#[tokio::test]
async fn a_lost_server_is_an_error_whatever_a_miss_would_be() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    drop(listener);
    let client = kvkeep_client::Client::lazy(kvkeep_client::ClientConfig::to(addr)).unwrap();
    let handle = kvkeep_client::convert::handle_from_proto(Some(v1::Handle { namespace_id: 1, revision: 1 })).unwrap();
    let sessions = client.attach(handle).sessions();
    let e = sessions.get("a", &Call::default()).await.unwrap_err();
    assert!(e.is_loss(), "{e}");
}
