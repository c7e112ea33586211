//! Formats, namespaces, revisions.

use kvkeep_client::{Call, GetItem, MatchQuery};
use kvkeep_core::{Class, ErrorKind, Format, MissReason, Rule, SizeRule};
use kvkeep_tests::{Node, Options, formats, payload};

#[tokio::test]
async fn a_format_with_one_field_changed_is_refused_with_that_field() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let format = formats::hybrid(4096);
    let first = client.register_namespace("ns", &format, "w").await.unwrap();
    let again = client.register_namespace("ns", &format, "w").await.unwrap();
    assert!(first.created && !again.created && again.revision_matches);
    assert_eq!((first.handle, first.fingerprint), (again.handle, again.fingerprint));
    type Change = (&'static str, fn(&mut Format));
    let changes: [Change; 12] = [
        ("model", |f| f.model.push('x')),
        ("dtype", |f| f.dtype = "fp8".into()),
        ("layout", |f| f.layout.push('x')),
        ("hash_algorithm", |f| f.hash_algorithm = "xxh3".into()),
        ("hash_seed", |f| f.hash_seed = "1".into()),
        ("tokens_per_key", |f| f.tokens_per_key = 8),
        ("topology", |f| {
            f.topology.canonical = false;
            f.topology.tp = 2;
        }),
        ("groups", |f| f.groups.truncate(2)),
        ("groups[1].rule", |f| f.groups[1].rule = Rule::Window { tokens: 80 }),
        ("groups[2].tokens_per_block", |f| f.groups[2].tokens_per_block *= 2),
        ("groups[0].shards", |f| f.groups[0].shards = 4),
        ("groups[0].size", |f| f.groups[0].size = SizeRule::Exact(8192)),
    ];
    for (field, change) in changes {
        let mut other = format.clone();
        change(&mut other);
        let refused = super::is_refused(client.register_namespace("ns", &other, "w").await, ErrorKind::FormatMismatch);
        assert!(refused.to_string().contains(field), "{field} is not named: {refused}");
        // Under a name of its own it is as good as any.
        let own = client.register_namespace(field, &other, "w").await.unwrap();
        assert!(own.created && own.fingerprint != first.fingerprint && own.handle.namespace != first.handle.namespace);
    }
}

/// Two namespaces with the same keys never see each other's bytes.
#[tokio::test]
async fn a_key_means_nothing_outside_of_its_namespace() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let format = formats::plain(4096);
    let one = client.register_namespace("one", &format, "w").await.unwrap();
    let two = client.register_namespace("two", &format, "w").await.unwrap();
    let keys = payload::chain(1, 4);
    super::store(&one, &keys, 4096, Class::Durable).await;
    assert_eq!(super::found(&two, &keys, 4096).await, 0);
    assert_eq!(two.match_chain(&MatchQuery::of(keys.clone()), &Call::default()).await.unwrap().boundary_positions, 0);
    assert_eq!(two.remove(&keys, &Call::default()).await.unwrap().removed, 0);
    assert_eq!(super::found(&one, &keys, 4096).await, 4);
}

#[tokio::test]
async fn after_the_weights_changed_an_old_handle_gets_no_byte_and_stores_none() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let format = formats::plain(4096);
    let old = client.register_namespace("ns", &format, "weights-1").await.unwrap();
    let late = client.register_namespace("ns", &format, "weights-2").await.unwrap();
    assert!(!late.revision_matches && late.revision_digest == "weights-1" && late.handle == old.handle);
    let keys = payload::chain(1, 8);
    super::store(&old, &keys[..6], 4096, Class::Durable).await;

    // Two engines find out at the same time: one advances, the other hears that somebody did.
    let call = Call::default();
    let (a, b) = tokio::join!(old.advance_revision("weights-2", &call), late.advance_revision("weights-2", &call));
    let new = match (a, b) {
        (Ok(new), Err(e)) | (Err(e), Ok(new)) => {
            assert_eq!(e.kind(), kvkeep_client::ErrorKind::Refused(ErrorKind::StaleRevision), "{e}");
            new
        }
        (Ok(a), Ok(b)) => {
            assert_eq!(a.handle, b.handle, "the same step taken twice is one step");
            a
        }
        (a, b) => panic!("nobody could advance: {:?} {:?}", a.err(), b.err()),
    };
    assert!(new.handle.revision > old.handle.revision && new.handle.namespace == old.handle.namespace);

    // Both handles in flight: the old one gets misses and its puts are refused, the new one starts empty.
    for handle in [&old, &new] {
        assert_eq!(super::found(handle, &keys, 4096).await, 0);
        let found = handle.match_chain(&MatchQuery::of(keys.clone()), &Call::default()).await.unwrap();
        assert_eq!(found.boundary_positions, 0);
    }
    let part = &old.get(&[GetItem::of(keys[0].clone())], None, &Call::default()).await.unwrap()[0];
    assert_eq!(part.reason, Some(MissReason::Revision));
    let put = super::put_of(&keys, 4096, Class::Cache);
    super::is_refused(old.put(&put, &Call::default()).await, ErrorKind::StaleRevision);
    super::store(&new, &keys, 4096, Class::Cache).await;
    assert_eq!((super::found(&new, &keys, 4096).await, super::found(&old, &keys, 4096).await), (8, 0));

    // Old bytes go without being asked for.
    kvkeep_tests::leaks::eventually(&client, "old bytes are reclaimed", |s| s.positions == 8 && s.blocks == 8).await;
}

/// A put that was reserved before the weights changed does not commit after it.
#[tokio::test]
async fn a_put_under_way_while_the_weights_change_is_not_stored() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let format = formats::plain(4096);
    let old = client.register_namespace("ns", &format, "weights-1").await.unwrap();
    let mut raw = kvkeep_tests::raw::Raw::connect(&node).await;
    let handle = raw.namespace("ns", &format).await;
    let key = payload::key(1, 0);
    let slot = raw.slot(handle, &key, 4096).await;
    raw.write(vec![(slot, 0, payload::block(&key, 4096))]).await.unwrap();
    let new = old.advance_revision("weights-2", &Call::default()).await.unwrap();
    let result = raw.commit(vec![(slot, Vec::new())]).await.unwrap().results.remove(0);
    assert_eq!(result.error.map(|e| e.kind).as_deref(), Some("stale_revision"));
    for handle in [&old, &new] {
        assert_eq!(super::found(handle, std::slice::from_ref(&key), 4096).await, 0);
    }
    kvkeep_tests::leaks::nothing_is_left(&client).await;
}
