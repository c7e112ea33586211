//! What routers and operators see: events, lists, explanations.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::{Call, Client, EventStream, Put, Watch};
use kvkeep_core::Class;
use kvkeep_proto::v1;
use kvkeep_proto::v1::event::What;
use kvkeep_tests::{Node, Options, formats, leaks, payload};

async fn watch(client: &Client, snapshot: bool, after_sequence: u64) -> EventStream {
    let watch = Watch { handle: None, snapshot, after_sequence };
    client.watch_events(&watch, &Call::default()).await.expect("watching is allowed")
}

async fn next(events: &mut EventStream) -> v1::EventBatch {
    let next = tokio::time::timeout(Duration::from_secs(20), events.next_batch()).await.expect("something is told");
    next.expect("the stream goes on").expect("the stream is well")
}

/// The snapshot of a new watcher.
async fn snapshot(events: &mut EventStream) -> Vec<v1::Event> {
    let mut seen = Vec::new();
    loop {
        let batch = next(events).await;
        seen.extend(batch.events);
        if batch.snapshot_end {
            return seen;
        }
    }
}

#[tokio::test]
async fn a_watcher_gets_what_is_here_and_then_every_change() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 6);
    super::store(&ns, &keys[..3], 4096, Class::Cache).await;

    let mut events = watch(&client, true, 0).await;
    let here = snapshot(&mut events).await;
    let stored: HashSet<_> = here.iter().filter(|e| e.what() == What::Stored).map(|e| e.key.clone()).collect();
    assert_eq!(stored, keys[..3].iter().cloned().collect());

    let mut put = super::put_of(&keys[3..], 4096, Class::Cache);
    put.parent = Some(keys[2].clone());
    put.first_position = 3;
    put.positions.iter_mut().for_each(|p| p.token_ids = vec![1, 2, 3]);
    ns.put(&put, &Call::default()).await.unwrap();
    ns.remove(&keys[4..], &Call::default()).await.unwrap();
    let mut told: HashMap<Bytes, Vec<v1::Event>> = HashMap::new();
    let mut last = 0;
    let removed =
        |told: &HashMap<Bytes, Vec<v1::Event>>| told.values().flatten().filter(|e| e.what() == What::Removed).count();
    while removed(&told) < 2 {
        for event in next(&mut events).await.events {
            assert!(event.sequence > last, "events come in order");
            last = event.sequence;
            told.entry(event.key.clone()).or_default().push(event);
        }
    }
    for (nth, key) in keys.iter().enumerate().skip(3) {
        let stored = told[key].iter().find(|e| e.what() == What::Stored).expect("each is told");
        assert_eq!((stored.parent_key.as_ref(), stored.position), (keys[nth - 1].as_ref(), nth as u32));
        assert_eq!((stored.token_ids.as_slice(), stored.bytes), (&[1, 2, 3][..], 4096));
        assert_eq!(told[key].last().unwrap().what() == What::Removed, nth >= 4);
    }

    // Whoever comes back with the last number misses nothing in between.
    drop(events);
    let new = payload::chain(2, 1);
    super::store(&ns, &new, 4096, Class::Cache).await;
    let mut again = watch(&client, false, last).await;
    loop {
        let batch = next(&mut again).await;
        assert!(!batch.gap && batch.events.iter().all(|e| e.sequence > last));
        if batch.events.iter().any(|e| e.key == new[0]) {
            break;
        }
    }
}

#[tokio::test]
async fn a_watcher_that_comes_too_late_is_told_of_the_gap() {
    let node = Node::start(Options { limits: "events_max = 16\n".into(), ..Options::default() });
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    super::store(&ns, &payload::chain(1, 200), 4096, Class::Cache).await;
    let mut events = watch(&client, false, 1).await;
    assert!(next(&mut events).await.gap);
    // What follows the advice sees everything.
    let mut events = watch(&client, true, 0).await;
    let seen: HashSet<_> = snapshot(&mut events).await.into_iter().map(|e| e.key).collect();
    assert_eq!(seen.len(), 200);
}

#[tokio::test]
async fn watchers_are_bounded_and_give_their_place_back() {
    let node = Node::start(Options { limits: "watchers_max = 2\n".into(), ..Options::default() });
    let client = node.client().await;
    let held = (watch(&client, true, 0).await, watch(&client, true, 0).await);
    let call = Call::default().within(Duration::from_millis(500));
    let refused = client.watch_events(&Watch { snapshot: true, ..Watch::default() }, &call).await;
    super::is_refused(refused, kvkeep_core::ErrorKind::Throttled);
    drop(held);
    let since = std::time::Instant::now();
    while client.watch_events(&Watch { snapshot: true, ..Watch::default() }, &call).await.is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "a closed stream gives its place back");
    }
}

#[tokio::test]
async fn a_list_shows_every_position_once_in_pages() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::sharded(2, 4096)).await;
    let mut all = HashSet::new();
    for chain in 1..4 {
        let keys = payload::chain(chain, 50);
        for shard in 0..2 {
            let position = |key: &Bytes| kvkeep_client::PutPosition {
                key: key.clone(),
                parts: vec![kvkeep_client::PutPart {
                    group: kvkeep_core::GroupId(0),
                    shard: kvkeep_core::ShardId(shard),
                    data: payload::block(key, 4096),
                }],
                token_ids: Vec::new(),
            };
            let put = Put { positions: keys.iter().map(position).collect(), ..Put::default() };
            ns.put(&put, &Call::default()).await.unwrap();
        }
        all.extend(keys);
    }
    let (positions, more) = ns.list(&Bytes::new(), 10_000, &Call::default()).await.unwrap();
    assert!(!more);
    assert_eq!(positions.len(), 150);
    assert_eq!(positions.iter().map(|p| p.key.clone()).collect::<HashSet<_>>(), all);
    assert!(positions.iter().all(|p| p.parts.len() == 2 && p.parts.iter().all(|part| part.bytes == 4096)));

    // One chain's keys begin alike.
    let prefix = Bytes::copy_from_slice(&2u64.to_be_bytes());
    let (mut token, mut seen, mut pages) = (Bytes::new(), Vec::new(), 0);
    loop {
        let page = ns.list_page(&prefix, &token, 7, &Call::default()).await.unwrap();
        assert!(page.positions.len() <= 7);
        seen.extend(page.positions.into_iter().map(|p| p.key));
        pages += 1;
        assert!(pages < 1000, "paging ends");
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), 50);
    assert_eq!(seen.into_iter().collect::<HashSet<_>>(), payload::chain(2, 50).into_iter().collect());
}

#[tokio::test]
async fn explain_says_why_a_position_is_here_or_not() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 3);
    super::store(&ns, &keys[..2], 4096, Class::Durable).await;
    ns.remove(&keys[1..2], &Call::default()).await.unwrap();
    let explain = async |key: &Bytes| ns.explain(key, &Call::default()).await.unwrap();

    let here = explain(&keys[0]).await;
    assert_eq!(here.status(), v1::PartStatus::Hit);
    let position = here.position.clone().expect("what is here is described");
    assert_eq!(
        (position.key, position.class, position.parts[0].bytes),
        (keys[0].clone(), v1::Class::Durable as i32, 4096)
    );
    assert!(here.history.iter().any(|h| h.what == "stored"), "{here:?}");

    let removed = explain(&keys[1]).await;
    assert_eq!((removed.status(), removed.reason()), (v1::PartStatus::Miss, v1::MissReason::Removed));
    assert!(removed.history.iter().any(|h| h.what == "removed"), "{removed:?}");

    let never = explain(&keys[2]).await;
    assert_eq!((never.status(), never.reason()), (v1::PartStatus::Miss, v1::MissReason::NeverStored));
    for reply in [here, removed, never] {
        assert!(!reply.summary.is_empty());
    }
}

#[tokio::test]
async fn what_has_a_time_to_live_goes_when_it_is_over() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 3);
    let put = Put { ttl: Some(Duration::from_millis(300)), ..super::put_of(&keys, 4096, Class::Cache) };
    ns.put(&put, &Call::default()).await.unwrap();
    leaks::nothing_is_left(&client).await;
    let reply = ns.explain(&keys[0], &Call::default()).await.unwrap();
    assert_eq!(reply.reason(), v1::MissReason::Expired, "{reply:?}");
}
