//! Lists of sessions.

use std::collections::BTreeSet;

use bytes::Bytes;
use kvkeep_client::sessions::{ListSessions, OpenSession, SessionState, Sessions};
use kvkeep_client::{Call, Client};
use kvkeep_core::Class;
use kvkeep_tests::{Node, Options, formats};

use super::namespace;

/// Ids of all pages, none of them twice; how many pages there were.
async fn pages(sessions: &Sessions, which: &ListSessions, size: u32) -> (Vec<String>, usize) {
    let (mut ids, mut token, mut pages) = (Vec::new(), Bytes::new(), 0);
    loop {
        let page = sessions.list_page(which, &token, size, &Call::default()).await.unwrap();
        assert!(page.sessions.len() <= size as usize);
        ids.extend(page.sessions.into_iter().map(|s| s.id));
        pages += 1;
        token = page.next_page_token;
        if token.is_empty() {
            assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "a session twice");
            return (ids, pages);
        }
    }
}

#[tokio::test]
async fn pages_have_every_session_once_and_filters_leave_out_the_rest() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let id = |n: u32| format!("{}-{n:03}", if n.is_multiple_of(3) { "chat" } else { "doc" });
    let mut all = Vec::new();
    for n in 0..230 {
        let wish = OpenSession {
            class: Some(if n % 5 == 0 { Class::Durable } else { Class::Cache }),
            attributes: [("user".to_owned(), format!("u{}", n % 4)), ("lang".to_owned(), "en".to_owned())].into(),
            ..OpenSession::default()
        };
        sessions.open(&id(n), &wish, &call).await.unwrap();
        if n % 10 == 0 {
            sessions.close(&id(n), &call).await.unwrap();
        }
        all.push(n);
    }
    let wanted = |keep: &dyn Fn(u32) -> bool| {
        let mut ids: Vec<_> = all.iter().copied().filter(|n| keep(*n)).map(id).collect();
        ids.sort_unstable();
        ids
    };
    let any = ListSessions::default();
    for size in [1, 7, 100, 229, 230, 231] {
        let (ids, _) = pages(&sessions, &any, size).await;
        assert_eq!(ids, wanted(&|_| true), "pages of {size}");
    }
    assert_eq!(pages(&sessions, &any, 230).await.1, 1, "a last page is known to be the last");
    let prefix = ListSessions { id_prefix: "chat-".into(), ..any.clone() };
    assert_eq!(pages(&sessions, &prefix, 10).await.0, wanted(&|n| n % 3 == 0));
    let class = ListSessions { class: Some(Class::Durable), ..any.clone() };
    assert_eq!(pages(&sessions, &class, 10).await.0, wanted(&|n| n % 5 == 0));
    let state = ListSessions { state: Some(SessionState::Closed), ..any.clone() };
    assert_eq!(pages(&sessions, &state, 10).await.0, wanted(&|n| n % 10 == 0));
    let attributes = [("user".to_owned(), "u3".to_owned()), ("lang".to_owned(), "en".to_owned())].into();
    let everything = ListSessions {
        id_prefix: "doc-".into(),
        class: Some(Class::Cache),
        state: Some(SessionState::Open),
        attributes,
        ..any.clone()
    };
    let keep = |n: u32| !n.is_multiple_of(3) && !n.is_multiple_of(5) && n % 4 == 3;
    assert_eq!(pages(&sessions, &everything, 10).await.0, wanted(&keep));
    // Sessions that come and go between two pages harm no other.
    let first = sessions.list_page(&any, &Bytes::new(), 100, &call).await.unwrap();
    for session in &first.sessions[50..] {
        sessions.delete(&session.id, &call).await.unwrap();
    }
    let second = sessions.list_page(&any, &first.next_page_token, 1000, &call).await.unwrap();
    let ids: Vec<_> = first.sessions.into_iter().chain(second.sessions).map(|s| s.id).collect();
    assert_eq!(ids, wanted(&|_| true));
}

async fn tenant(node: &Node, token: &str) -> Client {
    node.client_with(|c| c.token = Some(token.into())).await
}

/// Not even from where a list ends.
#[tokio::test]
async fn a_list_of_all_namespaces_tells_nothing_of_other_tenants() {
    const ACME: &str = "acme-0123456789abcdef";
    const ZENO: &str = "zeno-0123456789abcdef";
    let tokens = vec![format!("acme {ACME}"), format!("zeno {ZENO}")];
    let node = Node::start(Options { tokens, ..Options::default() });
    let (acme, zeno) = (tenant(&node, ACME).await, tenant(&node, ZENO).await);
    let (format, call) = (formats::plain(4096), Call::default());
    // Namespaces of the two by turns.
    let mut mine = Vec::new();
    for n in 0..3 {
        for (client, ids) in [(&zeno, &["z1", "z2"]), (&acme, &["a1", "a2"])] {
            let ns = client.register_namespace(&format!("ns-{n}"), &format, "w").await.unwrap();
            for id in ids {
                ns.sessions().open(id, &OpenSession::default(), &call).await.unwrap();
            }
            mine.push(ns);
        }
    }
    let all = ListSessions { all_namespaces: true, ..ListSessions::default() };
    let count = async |sessions: Sessions, size: u32| {
        let (mut found, mut token) = (Vec::new(), Bytes::new());
        loop {
            let page = sessions.list_page(&all, &token, size, &call).await.unwrap();
            found.extend(page.sessions.into_iter().map(|s| (s.handle, s.id)));
            token = page.next_page_token;
            if token.is_empty() {
                return found;
            }
        }
    };
    let [zeno_ns, acme_ns, ..] = &mine[..] else { panic!("six namespaces") };
    for size in [1, 2, 3, 6, 100] {
        for (ns, letter) in [(zeno_ns, 'z'), (acme_ns, 'a')] {
            let found = count(ns.sessions(), size).await;
            assert!(found.len() == 6 && found.iter().all(|(_, id)| id.starts_with(letter)), "{found:?}");
        }
    }
    // The last of zeno's sessions is the end, although acme's come behind it.
    let page = zeno_ns.sessions().list_page(&all, &Bytes::new(), 6, &call).await.unwrap();
    assert_eq!((page.sessions.len(), page.next_page_token.len()), (6, 0));
}
