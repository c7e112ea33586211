//! Opening, appending, forking, truncating.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvkeep_client::Call;
use kvkeep_client::sessions::{Append, OpenSession, Parent, SessionState};
use kvkeep_core::{Class, ErrorKind};
use kvkeep_tests::{Node, Options, payload};

use super::super::is_refused;
use super::{BYTES, append, filled, keys_of, namespace, open, says};

#[tokio::test]
async fn opening_again_finds_the_session_and_another_class_is_a_conflict() {
    let mut node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let wish = OpenSession {
        class: Some(Class::Durable),
        priority: 4,
        attributes: [("user".to_owned(), "u1".to_owned())].into(),
        ..OpenSession::default()
    };
    let (made, created) = sessions.open("a", &wish, &call).await.unwrap();
    assert!(created && made.state == SessionState::Open && made.class == Class::Durable && made.revision_matches);
    let (again, created) = sessions.open("a", &OpenSession::default(), &call).await.unwrap();
    assert!(!created);
    assert_eq!(again, made, "nothing was said, nothing has changed");
    let other = OpenSession { class: Some(Class::Cache), ..OpenSession::default() };
    is_refused(sessions.open("a", &other, &call).await, ErrorKind::Conflict);
    // What is said again replaces what was said before, and a restart keeps it.
    let more = OpenSession { priority: 9, ..OpenSession::default() };
    let said = sessions.open("a", &more, &call).await.unwrap().0;
    assert_eq!((said.priority, &said.attributes, said.uid), (9, &made.attributes, made.uid));
    node.kill();
    node.restart();
    let ns = namespace(&node).await;
    assert_eq!(ns.sessions().get("a", &call).await.unwrap(), said);
    is_refused(ns.sessions().get("b", &call).await, ErrorKind::UnknownSession);
}

#[tokio::test]
async fn an_append_is_a_compare_and_set_and_its_repetition_changes_nothing() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let call = Call::default();
    let keys = filled(&ns, "a", Class::Durable, 1, 40).await;
    let again = append(&ns, "a", 0, &keys).await.unwrap();
    assert!(again.repeated && again.positions == 40);
    // Part of it, anywhere, is there already.
    assert!(append(&ns, "a", 10, &keys[10..20]).await.unwrap().repeated);
    let more = payload::chain(2, 4);
    super::super::store(&ns, &more, BYTES, Class::Cache).await;
    for from in [0, 39, 41] {
        let refused = is_refused(append(&ns, "a", from, &more).await, ErrorKind::Conflict);
        assert_eq!(says(&refused, "positions"), "40", "from {from}");
    }
    // The token ids are compared and set, too.
    let tokens =
        Append { from_position: 40, keys: more.clone(), from_token: 1, token_ids: vec![7], ..Append::default() };
    let refused = is_refused(ns.sessions().append("a", &tokens, &call).await, ErrorKind::Conflict);
    assert_eq!((says(&refused, "tokens"), says(&refused, "from_token")), ("0".into(), "1".into()));
    assert_eq!(ns.sessions().get("a", &call).await.unwrap().appends, 1);
    let done = append(&ns, "a", 40, &more).await.unwrap();
    assert!(!done.repeated && done.positions == 44);
    assert_eq!(keys_of(&ns, "a").await, [keys, more].concat());
    is_refused(append(&ns, "b", 0, &payload::chain(2, 4)).await, ErrorKind::UnknownSession);
}

#[tokio::test]
async fn what_was_never_put_is_not_appended_and_named() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    for (id, class) in [("a", Class::Durable), ("b", Class::Cache)] {
        open(&ns, id, class).await;
        let keys = payload::chain(class.code().into(), 300);
        let here = [&keys[..270], &keys[271..]].concat();
        super::super::store(&ns, &here, 1024, Class::Cache).await;
        let refused = is_refused(append(&ns, id, 0, &keys).await, ErrorKind::Conflict);
        assert_eq!(says(&refused, "index_in_append"), "270");
        assert_eq!(ns.sessions().get(id, &Call::default()).await.unwrap().positions, 0, "all of it or nothing");
        super::super::store(&ns, &keys[270..271], 1024, Class::Cache).await;
        assert_eq!(append(&ns, id, 0, &keys).await.unwrap().positions, 300);
    }
}

/// More than one call takes, in one append of the SDK.
#[tokio::test]
async fn a_long_append_goes_in_several_calls_and_is_whole() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let keys = payload::chain(1, 10_000);
    for some in keys.chunks(1000) {
        super::super::store(&ns, some, 100, Class::Cache).await;
    }
    open(&ns, "a", Class::Cache).await;
    let token_ids: Vec<u32> = (0..160_000).collect();
    let wish = Append { keys: keys.clone(), token_ids: token_ids.clone(), ..Append::default() };
    let done = ns.sessions().append("a", &wish, &Call::default()).await.unwrap();
    assert_eq!((done.positions, done.tokens, done.repeated), (10_000, 160_000, false));
    assert_eq!(keys_of(&ns, "a").await, keys);
    assert_eq!(ns.sessions().tokens_all("a", &Call::default()).await.unwrap().ids, token_ids);
    assert!(ns.sessions().append("a", &wish, &Call::default()).await.unwrap().repeated);
}

#[tokio::test]
async fn a_fork_shares_what_was_before_and_nothing_that_comes_after() {
    let mut node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let keys = filled(&ns, "a", Class::Durable, 1, 40).await;
    let token_ids: Vec<u32> = (0..645).collect();
    let tokens = Append { from_position: 40, token_ids: token_ids.clone(), ..Append::default() };
    sessions.append("a", &tokens, &call).await.unwrap();

    let (fork, created) = sessions.fork("a", "b", Some(33), &call).await.unwrap();
    assert!(created && fork.class == Class::Durable);
    assert_eq!((fork.positions, fork.tokens, fork.parent), (33, 528, Some(Parent { id: "a".into(), positions: 33 })));
    assert!(!sessions.fork("a", "b", Some(33), &call).await.unwrap().1, "it is there already");
    is_refused(sessions.fork("a", "b", Some(32), &call).await, ErrorKind::Conflict);
    is_refused(sessions.fork("a", "c", Some(41), &call).await, ErrorKind::InvalidArgument);
    is_refused(sessions.fork("none", "c", None, &call).await, ErrorKind::UnknownSession);
    let whole = sessions.fork("a", "whole", None, &call).await.unwrap().0;
    assert_eq!((whole.positions, whole.tokens), (40, 645));
    // A fork of no stronger class: nobody raised what it would name.
    let parent = Some(Parent { id: "a".into(), positions: 3 });
    let weaker = OpenSession { class: Some(Class::Cache), parent: parent.clone(), ..OpenSession::default() };
    assert_eq!(sessions.open("weaker", &weaker, &call).await.unwrap().0.positions, 3);
    let parent = Some(Parent { id: "weaker".into(), positions: 3 });
    let stronger = OpenSession { class: Some(Class::Durable), parent, ..OpenSession::default() };
    is_refused(sessions.open("stronger", &stronger, &call).await, ErrorKind::InvalidArgument);

    let more = payload::chain(2, 5);
    super::super::store(&ns, &more, BYTES, Class::Cache).await;
    append(&ns, "b", 33, &more).await.unwrap();
    assert!(sessions.delete("a", &call).await.unwrap());
    node.kill();
    node.restart();
    let ns = namespace(&node).await;
    assert_eq!(keys_of(&ns, "b").await, [&keys[..33], &more].concat(), "it does not hang on its parent");
    assert_eq!(ns.sessions().tokens_all("b", &call).await.unwrap().ids, token_ids[..528]);
    assert_eq!(keys_of(&ns, "whole").await, keys);
}

#[tokio::test]
async fn a_truncated_session_goes_on_from_where_it_was_cut() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let keys = filled(&ns, "a", Class::Durable, 1, 40).await;
    let token_ids: Vec<u32> = (0..640).collect();
    let tokens = Append { from_position: 40, token_ids: token_ids.clone(), ..Append::default() };
    sessions.append("a", &tokens, &call).await.unwrap();
    is_refused(sessions.truncate("a", 41, false, &call).await, ErrorKind::InvalidArgument);
    let cut = sessions.truncate("a", 30, true, &call).await.unwrap();
    assert_eq!((cut.positions, cut.tokens), (30, 640));
    let cut = sessions.truncate("a", 21, false, &call).await.unwrap();
    assert_eq!((cut.positions, cut.tokens), (21, 336));
    let other = payload::chain(2, 5);
    super::super::store(&ns, &other, BYTES, Class::Cache).await;
    let wish = Append {
        from_position: 21,
        keys: other.clone(),
        from_token: 336,
        token_ids: (9000..9080).collect(),
        ..Append::default()
    };
    sessions.append("a", &wish, &call).await.unwrap();
    assert_eq!(keys_of(&ns, "a").await, [&keys[..21], &other].concat());
    let now = sessions.tokens_all("a", &call).await.unwrap().ids;
    assert_eq!(now, [&token_ids[..336], &(9000..9080).collect::<Vec<_>>()].concat());
}

#[tokio::test]
async fn a_closed_session_takes_no_append_until_it_is_opened_again() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let keys = filled(&ns, "a", Class::Cache, 1, 4).await;
    assert_eq!(sessions.close("a", &call).await.unwrap().state, SessionState::Closed);
    let more = payload::chain(2, 2);
    super::super::store(&ns, &more, BYTES, Class::Cache).await;
    is_refused(append(&ns, "a", 4, &more).await, ErrorKind::Conflict);
    assert!(append(&ns, "a", 0, &keys).await.unwrap().repeated, "what is there is there");
    assert_eq!(open(&ns, "a", Class::Cache).await.state, SessionState::Open);
    assert_eq!(append(&ns, "a", 4, &more).await.unwrap().positions, 6);
}

/// Two clients go for the same positions of one session again and again.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_racing_appends_exactly_one_wins_each_position_and_nothing_is_lost() {
    const POSITIONS: u64 = 60;
    let node = Node::start(Options::default());
    open(&namespace(&node).await, "a", Class::Durable).await;
    let race = async |writer: u64| {
        let ns = namespace(&node).await;
        let (mut won, mut next) = (Vec::new(), 0);
        while next < POSITIONS {
            let key = payload::key(10 + writer, next);
            super::super::store(&ns, std::slice::from_ref(&key), 1024, Class::Cache).await;
            let wish = Append {
                from_position: next,
                keys: vec![key.clone()],
                from_token: next,
                token_ids: vec![(writer << 16 | next) as u32],
                ..Append::default()
            };
            match ns.sessions().append("a", &wish, &Call::default()).await {
                Ok(done) => {
                    assert!(!done.repeated && done.positions == next + 1, "{done:?}");
                    won.push((next, key, wish.token_ids[0]));
                    next += 1;
                }
                Err(e) => {
                    assert_eq!(e.kind(), kvkeep_client::ErrorKind::Refused(ErrorKind::Conflict), "{e}");
                    next = says(&e, "positions").parse().unwrap();
                }
            }
        }
        won
    };
    let (one, two) = tokio::join!(race(1), race(2));
    assert!(!one.is_empty() && !two.is_empty(), "{} and {}: no race", one.len(), two.len());
    let mut all = [one, two].concat();
    all.sort();
    assert_eq!(all.iter().map(|(at, ..)| *at).collect::<Vec<_>>(), (0..POSITIONS).collect::<Vec<_>>());
    let ns = namespace(&node).await;
    assert_eq!(keys_of(&ns, "a").await, all.iter().map(|(_, key, _)| key.clone()).collect::<Vec<_>>());
    let tokens = ns.sessions().tokens_all("a", &Call::default()).await.unwrap();
    assert_eq!(tokens.ids, all.iter().map(|(.., id)| *id).collect::<Vec<_>>());
}

/// The look at the blocks and the append are two moments; the session is cut short and filled again between them.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_put_is_refused_although_the_session_changes_meanwhile() {
    const TRIES: usize = 80;
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let keys = filled(&ns, "a", Class::Cache, 1, 5).await;
    let changing = async {
        let ns = namespace(&node).await;
        let mut changes = 0;
        for _ in 0..TRIES {
            ns.sessions().truncate("a", 0, false, &Call::default()).await.unwrap();
            append(&ns, "a", 0, &keys).await.unwrap();
            changes += 2;
        }
        changes
    };
    let trying = async {
        let ns = namespace(&node).await;
        for n in 0..2 * TRIES as u64 {
            let never = payload::chain(1000 + n, 2);
            is_refused(append(&ns, "a", 0, &never).await, ErrorKind::Conflict);
        }
    };
    let (changes, ()) = tokio::join!(changing, trying);
    assert_eq!(changes, 2 * TRIES);
    assert_eq!(keys_of(&ns, "a").await, keys);
}

/// Blocks that were looked at for a cache session are not appended to a durable one that takes its place while the append
/// writes its token ids.
#[tokio::test(flavor = "multi_thread")]
async fn a_durable_session_names_only_durable_blocks_although_it_takes_the_place_of_a_cache_session() {
    const TRIES: usize = 60;
    let node = Node::start(Options::default());
    let (client, ns) = (node.client().await, namespace(&node).await);
    let stop = AtomicBool::new(false);
    let replacing = async {
        let ns = namespace(&node).await;
        for _ in 0..TRIES {
            open(&ns, "a", Class::Cache).await;
            tokio::time::sleep(Duration::from_millis(3)).await;
            ns.sessions().delete("a", &Call::default()).await.unwrap();
            open(&ns, "a", Class::Durable).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            let fsck = client.admin().fsck(false, &Call::default()).await.unwrap();
            assert_eq!(fsck.missing_positions, 0, "{fsck:?}");
            ns.sessions().delete("a", &Call::default()).await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    };
    let appending = async |chain: u64| {
        let mut done = 0;
        for n in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            // Each key once: what a durable session has raised stays raised.
            let key = payload::key(chain, n);
            super::super::store(&ns, std::slice::from_ref(&key), 1024, Class::Cache).await;
            let wish = Append { keys: vec![key], token_ids: vec![n as u32], ..Append::default() };
            match ns.sessions().append("a", &wish, &Call::default()).await {
                Ok(_) => done += 1,
                Err(e) => {
                    use kvkeep_client::ErrorKind::Refused;
                    let expected = matches!(e.kind(), Refused(ErrorKind::UnknownSession | ErrorKind::Conflict));
                    assert!(expected, "{e}");
                }
            }
        }
        done
    };
    let ((), one, two, three) = tokio::join!(replacing, appending(1), appending(2), appending(3));
    assert!(one + two + three > 0, "no append found a session");
}
