//! Leases: what stays readable, until when, and how many.

use std::time::Duration;

use kvkeep_client::{Call, GetItem, MatchQuery};
use kvkeep_core::{Class, ErrorKind, LeaseId, PartStatus, RequestId};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

fn request(n: u32) -> RequestId {
    RequestId::new(&n.to_be_bytes()).unwrap()
}

#[tokio::test]
async fn ten_thousand_leases_are_held_and_released() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(4096)).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, 1024, Class::Cache).await;
    for slice in (0..10_000u32).collect::<Vec<_>>().chunks(250) {
        let queries: Vec<_> = slice
            .iter()
            .map(|n| MatchQuery {
                request_id: request(*n),
                ..MatchQuery::of(keys.clone()).leased(Duration::from_secs(60))
            })
            .collect();
        for found in ns.match_many(&queries, &Call::default()).await.unwrap() {
            let lease = found.unwrap().lease.expect("a lease was asked for and something matched");
            assert_eq!(lease.positions, 4);
        }
    }
    let stats = client.stats(&Call::default()).await.unwrap();
    assert_eq!(stats.leases, 10_000);
    assert_eq!(client.admin().leases(10, &Call::default()).await.unwrap().total, 10_000);
    let requests: Vec<_> = (0..10_000).map(request).collect();
    for some in requests.chunks(5_000) {
        assert_eq!(client.release(&[], some, &Call::default()).await.unwrap(), 5_000);
    }
    assert_eq!(client.release(&[], &requests[..5_000], &Call::default()).await.unwrap(), 0, "release is idempotent");
    leaks::nothing_is_held(&client).await;
}

#[tokio::test]
async fn a_request_uses_a_position_once_whichever_verbs_it_says() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(4096)).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, 1024, Class::Cache).await;
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    let uses = async || ns.explain(&keys[2], &Call::default()).await.unwrap().position.unwrap().accesses;
    let stored = uses().await;
    // A connector matches in one process and gets in another, which does not know the lease.
    let call = Call::of(request(1));
    ns.match_chain(&MatchQuery::of(keys.clone()).leased(Duration::from_secs(60)), &call).await.unwrap();
    assert_eq!(uses().await, stored + 1);
    assert!(ns.get(&items, None, &call).await.unwrap().iter().all(|part| part.status == PartStatus::Hit));
    assert_eq!(ns.touch(&keys, &call).await.unwrap(), 4);
    ns.match_chain(&MatchQuery::of(keys.clone()).leased(Duration::from_secs(60)), &call).await.unwrap();
    assert_eq!(uses().await, stored + 1, "one request, counted more than once");
    // Another request, and one that holds nothing any more.
    assert_eq!(ns.touch(&keys, &Call::of(request(2))).await.unwrap(), 4);
    assert_eq!(uses().await, stored + 2);
    client.release(&[], &[request(1)], &call).await.unwrap();
    assert!(ns.get(&items, None, &call).await.unwrap().iter().all(|part| part.status == PartStatus::Hit));
    assert_eq!(uses().await, stored + 3);
}

#[tokio::test]
async fn an_instance_over_its_bound_of_leases_is_throttled_and_others_are_not() {
    let node = Node::start(Options { limits: "leases_per_instance_max = 100\n".into(), ..Options::default() });
    let (client, other) = (node.client().await, node.client().await);
    let ns = super::namespace(&client, &formats::any_size(4096)).await;
    let keys = payload::chain(1, 2);
    super::store(&ns, &keys, 1024, Class::Cache).await;
    let query = MatchQuery::of(keys).leased(Duration::from_secs(60));
    for n in 0..100 {
        assert!(ns.match_chain(&query, &Call::of(request(n))).await.unwrap().lease.is_some());
    }
    let brief = |n| Call::of(request(n)).within(Duration::from_millis(500));
    let refused = ns.match_chain(&query, &brief(100)).await;
    let held = match refused {
        Ok(found) => found.lease.is_some(),
        Err(e) => {
            assert_eq!(e.kind(), kvkeep_client::ErrorKind::Refused(ErrorKind::Throttled), "{e}");
            false
        }
    };
    assert!(!held, "a lease beyond the bound");
    // One of its own again is no new lease.
    assert!(ns.match_chain(&query, &brief(7)).await.unwrap().lease.is_some());
    let theirs = super::namespace(&other, &formats::any_size(4096)).await;
    assert!(theirs.match_chain(&query, &brief(100)).await.unwrap().lease.is_some());
}

#[tokio::test]
async fn a_lease_that_ended_is_a_typed_error_and_a_second_match_extends_the_first() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(4096)).await;
    let keys = payload::chain(1, 8);
    super::store(&ns, &keys, 1024, Class::Cache).await;
    let call = Call::of(request(1));
    let short = MatchQuery::of(keys[..4].to_vec()).leased(Duration::from_millis(300));
    let first = ns.match_chain(&short, &call).await.unwrap().lease.unwrap();
    let long = MatchQuery::of(keys.clone()).leased(Duration::from_millis(300));
    let second = ns.match_chain(&long, &call).await.unwrap().lease.unwrap();
    assert_eq!(first.id, second.id, "one request has one lease");
    assert_eq!(client.stats(&Call::default()).await.unwrap().leased_positions, 8);
    ns.renew(first.id, Some(Duration::from_millis(300)), &call).await.unwrap();
    let item = [GetItem::of(keys[0].clone())];
    assert!(ns.get(&item, Some(first.id), &call).await.unwrap()[0].is_hit());

    leaks::nothing_is_held(&client).await;
    super::is_refused(ns.renew(first.id, None, &call).await, ErrorKind::Expired);
    super::is_refused(ns.get(&item, Some(first.id), &call).await, ErrorKind::Expired);
    super::is_refused(ns.get(&item, Some(LeaseId(77)), &call).await, ErrorKind::Expired);
    // Without the lease the blocks are as readable as before.
    assert_eq!(super::found(&ns, &keys, 1024).await, 8);
}

/// Another instance can neither use nor end a lease.
#[tokio::test]
async fn a_lease_belongs_to_its_instance() {
    let node = Node::start(Options { limits: "instance_grace_ms = 200\n".into(), ..Options::default() });
    let (client, other) = (node.client().await, node.client().await);
    let ns = super::namespace(&client, &formats::any_size(4096)).await;
    let theirs = super::namespace(&other, &formats::any_size(4096)).await;
    let keys = payload::chain(1, 2);
    super::store(&ns, &keys, 1024, Class::Cache).await;
    let lease = ns
        .match_chain(&MatchQuery::of(keys.clone()).leased(Duration::from_secs(60)), &Call::of(request(1)))
        .await
        .unwrap()
        .lease_id()
        .unwrap();
    assert_eq!(other.release(&[lease], &[request(1)], &Call::default()).await.unwrap(), 0);
    super::is_refused(theirs.renew(lease, None, &Call::default()).await, ErrorKind::Expired);

    // A second connection of the same instance can, and the lease outlives the first connection.
    let instance = client.config().instance;
    let twin = node.client_with(|c| c.instance = instance).await;
    drop((ns, client));
    tokio::time::sleep(Duration::from_millis(600)).await;
    let same = super::namespace(&twin, &formats::any_size(4096)).await;
    assert!(same.get(&[GetItem::of(keys[0].clone())], Some(lease), &Call::default()).await.unwrap()[0].is_hit());
    drop((same, twin));
    leaks::nothing_is_held(&other).await;
}

/// What is leased stays readable however much is stored after it.
#[tokio::test]
async fn pressure_does_not_take_what_is_leased() {
    let options = Options { arena_bytes: 64 << 20, nvme_bytes: 64 << 20, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(1 << 20)).await;
    let kept = payload::chain(1, 8);
    super::store(&ns, &kept, 1 << 20, Class::Cache).await;
    let query = MatchQuery::of(kept.clone()).leased(Duration::from_secs(60));
    let lease = ns.match_chain(&query, &Call::of(request(1))).await.unwrap().lease_id();
    for chain in 2..26 {
        let put = super::put_of(&payload::chain(chain, 8), 1 << 20, Class::Cache);
        let outcomes = ns.put(&put, &Call::default()).await.unwrap();
        assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    }
    let items: Vec<_> = kept.iter().map(|key| GetItem::of(key.clone())).collect();
    for (key, part) in kept.iter().zip(ns.get(&items, lease, &Call::default()).await.unwrap()) {
        assert!(part.is_hit(), "{:?} {:?}", part.status, part.reason);
        assert!(part.data == payload::block(key, 1 << 20));
    }
}
