//! Clients that go away in the middle: nothing stays behind.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::{Class, InstanceId};
use kvkeep_proto::v1;
use kvkeep_proto::v1::blocks_client::BlocksClient;
use kvkeep_tests::raw::{self, Raw};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

const BYTES: u64 = 4 << 20;

fn options() -> Options {
    Options { limits: "instance_grace_ms = 300\nreservation_ms = 60000\n".into(), ..Options::default() }
}

/// The connection breaks while bytes are on their way: the reservations end with the instance, long before their deadline.
#[tokio::test]
async fn a_client_killed_in_the_middle_of_a_put_leaves_nothing() {
    let node = Node::start(options());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES)).await;
    let keys = payload::chain(1, 4);
    let mut raw = Raw::connect(&node).await;
    let slots = raw::slots(&raw.reserve(ns.handle, &keys, BYTES).await.unwrap());
    assert_eq!(slots.len(), 4);
    raw.write(vec![(slots[0], 0, payload::block(&keys[0], 1 << 20))]).await.unwrap();
    // A stream that never ends: one whole block, half of another, then silence.
    let (chunks, stream) = tokio::sync::mpsc::channel(8);
    let mut blocks = raw.blocks.clone();
    let writing = tokio::spawn(async move { blocks.write(tokio_stream::wrappers::ReceiverStream::new(stream)).await });
    let chunk = |slot: usize, offset: u64| v1::WriteRequest {
        reservation_id: slots[slot],
        offset,
        data: Bytes::from(vec![7; 1 << 20]),
    };
    for n in 0..4 {
        chunks.send(chunk(1, n << 20)).await.unwrap();
    }
    chunks.send(chunk(2, 0)).await.unwrap();
    leaks::eventually(&client, "the reservations are seen", |s| s.reservations == 4).await;
    writing.abort();
    drop((raw, chunks));
    let _ = writing.await; // aborted, as it was told to
    leaks::nothing_is_left(&client).await;
    assert_eq!(super::found(&ns, &keys, BYTES as usize).await, 0);
    super::store(&ns, &keys, BYTES as usize, Class::Cache).await;
}

#[tokio::test]
async fn a_client_killed_in_the_middle_of_a_get_leaves_nothing() {
    let node = Node::start(options());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES)).await;
    let keys = payload::chain(1, 12);
    super::store(&ns, &keys, BYTES as usize, Class::Cache).await;
    let mut raw = Raw::connect(&node).await;
    let query = v1::MatchQuery {
        request_id: Bytes::from_static(b"request"),
        handle: Some(convert::handle_to_proto(ns.handle)),
        keys: keys.clone(),
        lease: Some(v1::LeaseWish { ttl_ms: 60_000 }),
        ..Default::default()
    };
    let found = raw.blocks.r#match(v1::MatchRequest { ctx: None, queries: vec![query] }).await.unwrap().into_inner();
    let lease_id = found.results[0].lease.expect("a lease was asked for").lease_id;
    let items = keys.iter().map(|key| v1::GetItem { key: key.clone(), ..Default::default() });
    let get = v1::GetRequest {
        handle: Some(convert::handle_to_proto(ns.handle)),
        items: items.collect(),
        lease_id,
        ..Default::default()
    };
    let mut replies = raw.blocks.get(get).await.unwrap().into_inner();
    assert!(replies.message().await.unwrap().is_some());
    assert_eq!(client.stats(&kvkeep_client::Call::default()).await.unwrap().leases, 1);
    drop((replies, raw));
    leaks::nothing_is_held(&client).await;
    ns.remove(&keys, &kvkeep_client::Call::default()).await.unwrap();
    leaks::nothing_is_left(&client).await;
}

/// Many clients come, take something, and vanish: connections, too, are given back.
#[tokio::test]
async fn connections_that_break_are_given_back() {
    let node = Node::start(options());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    for round in 0..8u64 {
        let mut held = Vec::new();
        for n in 0..16u64 {
            let mut raw = Raw::connect(&node).await;
            raw.slot(ns.handle, &payload::key(round, n), 4096).await;
            held.push(raw);
        }
        // Half of them without a word, half in the middle of a hello.
        drop(held);
        let mut blocks = BlocksClient::new(raw::channel(&node).await);
        let hello = blocks.hello(raw::hello(InstanceId([round as u8; 16])));
        drop(tokio::time::timeout(Duration::from_micros(50), hello).await);
    }
    leaks::nothing_is_left(&client).await;
}

/// A server that is stopped and goes on is slow, not wrong: calls of that time end by their deadline, later ones succeed.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_stopped_for_a_while_goes_on() {
    let node = Node::start(options());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 8);
    super::store(&ns, &keys, 4096, Class::Durable).await;
    node.pause();
    let brief = kvkeep_client::Call::default().within(Duration::from_millis(300));
    let items = [kvkeep_client::GetItem::of(keys[0].clone())];
    let asked = ns.get(&items, None, &brief).await;
    assert!(asked.map_or(true, |parts| !parts[0].is_hit()), "a stopped server answers nothing");
    node.resume();
    assert_eq!(super::found(&ns, &keys, 4096).await, 8);
    leaks::nothing_is_held(&client).await;
}
