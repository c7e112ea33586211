//! What goes with a session, and what stays.

use std::time::{Duration, Instant};

use kvkeep_client::Call;
use kvkeep_client::sessions::{Append, OpenSession};
use kvkeep_core::{Class, ErrorKind};
use kvkeep_tests::{Node, Options, payload};

use super::super::{found, is_refused, store};
use super::{BYTES, append, filled, namespace, open, sweep};

#[tokio::test]
async fn two_sweeps_after_a_deletion_reclaim_what_no_other_session_names_and_nothing_else() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    let keys = filled(&ns, "a", Class::Durable, 1, 40).await;
    let tokens = Append { from_position: 40, token_ids: (0..640).collect(), ..Append::default() };
    sessions.append("a", &tokens, &call).await.unwrap();
    sessions.fork("a", "b", Some(25), &call).await.unwrap();
    let other = filled(&ns, "c", Class::Durable, 2, 10).await;
    // 50 blocks of positions, 1 of token ids.
    let before = sweep(&client).await;
    assert_eq!((before.sessions, before.positions, before.durable_blocks), (3, 50, 51), "{before:?}");
    assert_eq!((before.unreferenced_blocks, before.swept_blocks), (0, 0), "{before:?}");

    assert!(sessions.delete("a", &call).await.unwrap());
    assert!(!sessions.delete("a", &call).await.unwrap());
    is_refused(sessions.get("a", &call).await, ErrorKind::UnknownSession);
    let first = sweep(&client).await;
    assert_eq!((first.unreferenced_blocks, first.swept_blocks, first.overdue_blocks), (15, 0, 0), "{first:?}");
    assert_eq!(found(&ns, &keys, BYTES).await, 40, "one sweep alone takes nothing");
    let second = sweep(&client).await;
    assert_eq!((second.unreferenced_blocks, second.swept_blocks, second.overdue_blocks), (0, 15, 0), "{second:?}");
    assert_eq!(
        (second.durable_blocks, second.missing_positions, second.missing_token_blocks),
        (36, 0, 0),
        "{second:?}"
    );
    assert_eq!(found(&ns, &keys[..25], BYTES).await, 25, "the fork keeps what it shares");
    assert_eq!(found(&ns, &keys[25..], BYTES).await, 0);
    assert_eq!(found(&ns, &other, BYTES).await, 10);
    assert_eq!(sessions.tokens_all("b", &call).await.unwrap().ids, (0..400).collect::<Vec<_>>());

    // With the fork go the rest and the token ids.
    sessions.delete("b", &call).await.unwrap();
    sweep(&client).await;
    let last = sweep(&client).await;
    assert_eq!((last.sessions, last.durable_blocks, last.unreferenced_blocks), (1, 10, 0), "{last:?}");
    assert_eq!(found(&ns, &keys, BYTES).await, 0);
}

#[tokio::test]
async fn blocks_that_a_caller_put_as_durable_stay_whatever_sessions_do() {
    let mut node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let call = Call::default();
    let alone = payload::chain(1, 10);
    store(&ns, &alone, BYTES, Class::Durable).await;
    // Put as durable, and named by a session that goes.
    let named = payload::chain(2, 10);
    store(&ns, &named, BYTES, Class::Durable).await;
    open(&ns, "a", Class::Durable).await;
    append(&ns, "a", 0, &named).await.unwrap();
    // Put as cache, raised by the session, and then put as durable by a caller.
    let both = filled(&ns, "b", Class::Durable, 3, 10).await;
    ns.put(&super::super::put_of(&both, BYTES, Class::Durable), &call).await.unwrap();
    let only = filled(&ns, "c", Class::Durable, 4, 10).await;
    for id in ["a", "b", "c"] {
        ns.sessions().delete(id, &call).await.unwrap();
    }
    // Whose word it is outlives a restart.
    node.kill();
    super::super::restart::forget_memory(&node);
    node.restart();
    let (client, ns) = (node.client().await, namespace(&node).await);
    for _ in 0..3 {
        sweep(&client).await;
    }
    for (keys, stay) in [(&alone, 10), (&named, 10), (&both, 10), (&only, 0)] {
        assert_eq!(found(&ns, keys, BYTES).await, stay);
    }
    let last = sweep(&client).await;
    assert_eq!((last.durable_blocks, last.unreferenced_blocks, last.swept_blocks), (30, 0, 10), "{last:?}");
}

/// A truncation, and an append that failed after its token ids were written, leave blocks that nobody names.
#[tokio::test]
async fn what_a_truncation_or_a_refused_append_leaves_is_reclaimed() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = namespace(&node).await;
    let call = Call::default();
    let keys = filled(&ns, "a", Class::Durable, 1, 20).await;
    let refused = Append { from_position: 19, token_ids: vec![1, 2, 3], ..Append::default() };
    is_refused(ns.sessions().append("a", &refused, &call).await, ErrorKind::Conflict);
    ns.sessions().truncate("a", 5, false, &call).await.unwrap();
    sweep(&client).await;
    let found_here = sweep(&client).await;
    assert_eq!((found_here.durable_blocks, found_here.unreferenced_blocks), (5, 0), "{found_here:?}");
    assert_eq!((found(&ns, &keys[..5], BYTES).await, found(&ns, &keys[5..], BYTES).await), (5, 0));
}

/// A lease keeps what is read from being swept away.
#[tokio::test]
async fn a_sweep_takes_nothing_that_is_leased() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = namespace(&node).await;
    let call = Call::default();
    let keys = filled(&ns, "a", Class::Durable, 1, 8).await;
    let lease = ns.lease(&keys, Some(Duration::from_secs(60)), &call).await.unwrap().0.expect("all of it is here");
    ns.sessions().delete("a", &call).await.unwrap();
    for _ in 0..3 {
        sweep(&client).await;
    }
    assert_eq!(found(&ns, &keys, BYTES).await, 8);
    ns.release(&[lease.id], &[], &call).await.unwrap();
    for _ in 0..2 {
        sweep(&client).await;
    }
    assert_eq!(found(&ns, &keys, BYTES).await, 0);
}

#[tokio::test]
async fn a_session_whose_time_has_come_is_gone_and_one_that_changes_stays() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    for (id, ttl) in [("short", Some(1)), ("long", Some(3600)), ("changing", Some(3)), ("ever", None)] {
        let wish = OpenSession { ttl: ttl.map(Duration::from_secs), ..OpenSession::default() };
        let info = sessions.open(id, &wish, &call).await.unwrap().0;
        assert_eq!((info.ttl, info.expires_in.is_some()), (wish.ttl, wish.ttl.is_some()), "{id}");
    }
    let since = Instant::now();
    while sessions.get("short", &call).await.is_ok() {
        assert!(since.elapsed() < Duration::from_secs(20), "it is there after its time");
        sessions.close("changing", &call).await.unwrap();
        sessions.open("changing", &OpenSession::default(), &call).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    is_refused(sessions.get("short", &call).await, ErrorKind::UnknownSession);
    for id in ["long", "changing", "ever"] {
        sessions.get(id, &call).await.unwrap();
    }
    // Of the same name another one can be made.
    assert!(sessions.open("short", &OpenSession::default(), &call).await.unwrap().1);
}

/// fsck sees what is lost of a durable session, even if one that promises nothing names it first.
#[tokio::test]
async fn fsck_names_what_a_durable_session_has_lost() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = namespace(&node).await;
    let call = Call::default();
    let keys = filled(&ns, "b-durable", Class::Durable, 1, 10).await;
    open(&ns, "a-cache", Class::Cache).await;
    append(&ns, "a-cache", 0, &keys).await.unwrap();
    ns.remove(&keys[4..5], &call).await.unwrap();
    let fsck = client.admin().fsck(false, &call).await.unwrap();
    assert_eq!((fsck.missing_positions, fsck.positions), (1, 10), "{fsck:?}");
    assert_eq!((&*fsck.missing[0].session_id, fsck.missing[0].position), ("b-durable", 4));
}
