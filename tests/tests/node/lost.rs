//! A server that is dead, stopped, or never answers: engines get misses, at once, and hits again when it is back.

use std::time::{Duration, Instant};

use kvkeep_client::{
    BreakerState, Call, Client, ClientConfig, Fault, GetItem, GotInto, Lost, MatchQuery, Namespace, PartOutcome, Place,
    Put, PutPosition, Region, WayWish, Wire,
};
use kvkeep_core::{Class, MissReason, RequestId};
use kvkeep_tests::{Node, Options, formats, payload};

const BYTES: usize = 1 << 20;
/// The promise is 100 ms without a sign of life; a machine that runs other tests meanwhile gets this much more.
const SLACK: Duration = Duration::from_millis(900);
/// Hits again this soon after the server is back; with the same slack.
const BACK_WITHIN: Duration = Duration::from_secs(2);

/// As an engine is configured: defaults.
async fn engine(node: &Node) -> (Client, Namespace) {
    let client = node.client_with(|c| (c.lost, c.patience) = (Lost::Misses, kvkeep_client::config::PATIENCE)).await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    (client, ns)
}

fn places(region: &Region, blocks: usize) -> Vec<Place> {
    // SAFETY: each test gives a place to one call at a time.
    (0..blocks).map(|n| unsafe { region.place(n * BYTES, BYTES) }).collect()
}

/// Every hot verb once; each must be a miss, and none may take long.
async fn all_misses(ns: &Namespace, keys: &[bytes::Bytes]) {
    let region = Region::new(keys.len() * BYTES).unwrap();
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    let began = Instant::now();
    let quick = |what: &str, since: Instant| {
        let took = since.elapsed();
        assert!(took < Duration::from_millis(100) + SLACK, "{what} took {took:?}");
    };
    let found =
        ns.match_chain(&MatchQuery::of(keys.to_vec()).leased(Duration::from_secs(9)), &Call::default()).await.unwrap();
    assert_eq!((found.boundary_positions, found.lease), (0, None));
    assert_eq!(found.reason, Some(MissReason::Unreachable));
    quick("match", began);
    let since = Instant::now();
    let parts = ns.get(&items, None, &Call::default()).await.unwrap();
    assert!(parts.iter().all(|p| p.reason == Some(MissReason::Unreachable)), "{parts:?}");
    quick("get", since);
    let since = Instant::now();
    let got = ns.get_into_region(&items, &places(&region, keys.len()), None, &Call::default()).await.unwrap();
    assert!(got.iter().all(|g| !g.is_hit()), "{got:?}");
    quick("get_into_region", since);
    let since = Instant::now();
    let outcomes = ns.put(&super::put_of(keys, BYTES, Class::Cache), &Call::default()).await.unwrap();
    assert!(
        outcomes.len() == keys.len() && outcomes.iter().all(|o| matches!(o, PartOutcome::Refused(_))),
        "{outcomes:?}"
    );
    quick("put", since);
    let since = Instant::now();
    let positions =
        keys.iter().cloned().zip(places(&region, keys.len())).map(|(key, place)| PutPosition::of(key, place)).collect();
    let outcomes = ns.put_from(&Put { positions, ..Put::default() }, &Call::default()).await.unwrap();
    assert!(outcomes.iter().all(|o| matches!(o, PartOutcome::Refused(_))), "{outcomes:?}");
    quick("put_from", since);
    let since = Instant::now();
    let mapped = ns.match_mapped(&MatchQuery::of(keys.to_vec()).leased(Duration::from_secs(9)), &Call::default()).await;
    assert!(mapped.unwrap().parts.is_empty());
    assert_eq!(ns.touch(keys, &Call::default()).await.unwrap(), 0);
    ns.release(&[], &[RequestId::new(b"r").unwrap()], &Call::default()).await.unwrap();
    assert_eq!(ns.lease(keys, None, &Call::default()).await.unwrap().0, None);
    quick("the rest", since);
}

/// Asks until it hits.
async fn hits_again(ns: &Namespace, keys: &[bytes::Bytes], since: Instant) {
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    loop {
        let parts = ns.get(&items, None, &Call::default()).await.unwrap();
        if parts.iter().zip(keys).all(|(p, key)| p.is_hit() && p.data == payload::block(key, BYTES)) {
            return;
        }
        assert!(since.elapsed() < BACK_WITHIN + 4 * SLACK, "no hits although the server is back: {parts:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// SIGSTOP: connections are taken by the kernel and nothing answers. Misses within 100 ms, and most calls at once; hits again
/// after SIGCONT.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_misses_and_then_hits_again() {
    let node = Node::start(Options::default());
    let (client, ns) = engine(&node).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, BYTES, Class::Cache).await;
    node.pause();
    all_misses(&ns, &keys).await;
    assert_ne!(client.breaker(), BreakerState::Closed);
    let (calls, began) = (1000, Instant::now());
    for _ in 0..calls {
        ns.match_chain(&MatchQuery::of(keys.clone()), &Call::default()).await.unwrap();
    }
    let each = began.elapsed() / calls;
    assert!(each < Duration::from_millis(5), "a call to a server that is known to be lost took {each:?}");
    let counters = client.counters();
    assert!(counters.breaker_opened >= 1 && counters.lost_calls >= u64::from(calls), "{counters:?}");
    node.resume();
    hits_again(&ns, &keys, Instant::now()).await;
    assert_eq!(client.breaker(), BreakerState::Closed);
}

/// SIGKILL and a new start on another port: the same client finds it.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_misses_and_its_next_life_hits() {
    // The port must be known again in the next life: an engine's endpoint does not change.
    let mut node = Node::start(Options { listen: kvkeep_tests::address_to_keep(), ..Options::default() });
    let (client, ns) = engine(&node).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, BYTES, Class::Durable).await;
    node.kill();
    all_misses(&ns, &keys).await;
    node.restart();
    hits_again(&ns, &keys, Instant::now()).await;
    let region = Region::new(4 * BYTES).unwrap();
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    let got = ns.get_into_region(&items, &places(&region, 4), None, &Call::default()).await.unwrap();
    assert!(got.iter().all(|g| g.is_hit()), "regions are registered with the new life: {got:?}");
    assert!(client.counters().restarts >= 1);
}

/// Nobody has ever answered: a client that connects at its first call has misses, and hits once a server is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_yet_is_misses() {
    let mut node = Node::start(Options { listen: kvkeep_tests::address_to_keep(), ..Options::default() });
    let (_, ns) = engine(&node).await;
    let keys = payload::chain(1, 2);
    super::store(&ns, &keys, BYTES, Class::Durable).await;
    let (endpoint, handle) = (node.endpoint(), ns.handle);
    node.kill();
    let client = Client::lazy(ClientConfig::to(endpoint)).unwrap();
    let ns = client.attach(handle);
    all_misses(&ns, &keys).await;
    assert_eq!(client.way(), None);
    node.restart();
    hits_again(&ns, &keys, Instant::now()).await;
    assert!(client.way().is_some());
}

/// A black hole takes connections and says nothing, ever: each call ends by itself, and no connection piles up.
#[tokio::test(flavor = "multi_thread")]
async fn a_black_hole_is_misses() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = Client::lazy(ClientConfig::to(listener.local_addr().unwrap().to_string())).unwrap();
    let ns = client
        .attach(kvkeep_core::Handle { namespace: kvkeep_core::NamespaceId(1), revision: kvkeep_core::Revision(1) });
    all_misses(&ns, &payload::chain(1, 2)).await;
    let began = Instant::now();
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let ns = ns.clone();
            tokio::spawn(async move { ns.match_chain(&MatchQuery::of(payload::chain(1, 8)), &Call::default()).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().boundary_positions, 0);
    }
    assert!(began.elapsed() < Duration::from_millis(500) + 4 * SLACK, "{:?}", began.elapsed());
}

/// The switch for users' own tests does what a lost server does.
#[tokio::test]
async fn a_fault_can_be_played() {
    let node = Node::start(Options::default());
    let (client, ns) = engine(&node).await;
    let keys = payload::chain(1, 2);
    super::store(&ns, &keys, BYTES, Class::Cache).await;
    for fault in [Fault::Refused, Fault::Silent, Fault::Miss] {
        client.inject(fault);
        all_misses(&ns, &keys).await;
        client.inject(Fault::None);
        hits_again(&ns, &keys, Instant::now()).await;
    }
}

/// A get of one block that its client gave up.
struct GivenUp {
    node: Node,
    client: Client,
    ns: Namespace,
    keys: Vec<bytes::Bytes>,
    region: Region,
    got: GotInto,
}

/// A server that stops at this place of the get.
async fn stopped_during_a_get(failpoint: &str) -> GivenUp {
    let environment = vec![("KVKEEP_FAILPOINT".into(), format!("{failpoint}:1:stop"))];
    let node = Node::start(Options { environment, ..Options::default() });
    let (client, ns) = engine(&node).await;
    let keys = payload::chain(1, 1);
    super::store(&ns, &keys, BYTES, Class::Cache).await;
    let region = Region::new(BYTES).unwrap();
    let items = [GetItem::of(keys[0].clone())];
    let got = ns.get_into_region(&items, &places(&region, 1), None, &Call::default()).await.unwrap().remove(0);
    GivenUp { node, client, ns, keys, region, got }
}

/// The server stops before it copies; the client gives the call up and uses its memory; the server wakes up and copies
/// nothing, because the client took its memory back.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_wakes_up_late_does_not_write_into_memory_that_was_taken_back() {
    let GivenUp { node, client, ns, keys, region, got } = stopped_during_a_get("get_into.begun").await;
    assert!(!got.is_hit() && !got.in_doubt, "no copy was under way: {got:?}");
    let ours = vec![0xa5; BYTES];
    region.write(0, &ours);
    node.resume();
    hits_again(&ns, &keys, Instant::now()).await;
    let mut now = vec![0; BYTES];
    region.read(0, &mut now);
    assert!(now == ours, "memory of a call that was given up was written");
    let until = Instant::now() + Duration::from_secs(10);
    while client.stats(&Call::default()).await.unwrap().counters["kvkeep_revoked_copies_total"] != 1 {
        assert!(Instant::now() < until, "nothing was revoked: {}", node.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The server stops in the middle of a copy: the part is a miss, and its memory is in doubt until the copy has ended.
#[tokio::test(flavor = "multi_thread")]
async fn memory_under_a_copy_that_stopped_is_in_doubt_until_it_ends() {
    let GivenUp { node, client, ns, keys, region: _region, got } = stopped_during_a_get("copy.guarded").await;
    assert!(!got.is_hit() && got.in_doubt, "{got:?}");
    assert!(!client.settle(Duration::from_millis(50)).await);
    node.resume();
    assert!(client.settle(Duration::from_secs(20)).await);
    hits_again(&ns, &keys, Instant::now()).await;
    assert_eq!(client.counters().doubtful_parts, 1);
}

/// The server stops while it takes a region, and its client gives up: the next try does not count beside the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_that_nobody_waits_for_any_more_is_none() {
    let environment = vec![("KVKEEP_FAILPOINT".into(), "register_region.mapped:1:stop".into())];
    let node = Node::start(Options { environment, ..Options::default() });
    let (client, ns) = engine(&node).await;
    let keys = payload::chain(1, 1);
    super::store(&ns, &keys, BYTES, Class::Cache).await;
    let region = Region::new(BYTES).unwrap();
    let get = async || {
        let items = [GetItem::of(keys[0].clone())];
        ns.get_into_region(&items, &places(&region, 1), None, &Call::default()).await.unwrap().remove(0)
    };
    assert!(!get().await.is_hit());
    node.resume();
    let until = Instant::now() + Duration::from_secs(20);
    while !get().await.is_hit() {
        assert!(Instant::now() < until, "{}", node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let registered = client.stats(&Call::default()).await.unwrap().counters["kvkeep_region_bytes"];
    assert!(registered < 2 * region.len() as u64, "{registered} bytes, the words of its calls among them");
}

/// The server stops in the middle of copying a put's bytes; the client gives up and changes them; nothing is stored under the
/// key, least of all the mixture.
#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_was_given_up_under_its_copy_is_not_stored() {
    let environment = vec![("KVKEEP_FAILPOINT".into(), "copy.guarded:1:stop".into())];
    let node = Node::start(Options { environment, ..Options::default() });
    let (_, ns) = engine(&node).await;
    let keys = payload::chain(1, 1);
    let region = Region::new(BYTES).unwrap();
    region.write(0, &payload::block(&keys[0], BYTES));
    let put = Put { positions: vec![PutPosition::of(keys[0].clone(), places(&region, 1).remove(0))], ..Put::default() };
    let outcomes = ns.put_from(&put, &Call::default()).await.unwrap();
    assert!(matches!(outcomes[0], PartOutcome::Refused(_)), "{outcomes:?}");
    region.write(0, &vec![0x5a; BYTES]);
    node.resume();
    let watcher = node.client().await;
    kvkeep_tests::leaks::nothing_is_held(&watcher).await;
    let theirs = super::namespace(&watcher, &formats::plain(BYTES as u64)).await;
    assert_eq!(super::found(&theirs, &keys, BYTES).await, 0, "stored although it was given up");
}

/// A client that only reads notices as well that nobody is there.
#[tokio::test(flavor = "multi_thread")]
async fn gets_over_grpc_open_the_breaker() {
    let mut node = Node::start(Options::default());
    let change = |c: &mut ClientConfig| (c.lost, c.way) = (Lost::Misses, WayWish::Only(Wire::Grpc));
    let client = node.client_with(change).await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let items = [GetItem::of(payload::chain(1, 1).remove(0))];
    node.kill();
    let got = ns.get(&items, None, &Call::default()).await.unwrap();
    assert_eq!(got[0].reason, Some(MissReason::Unreachable));
    assert!(client.counters().breaker_opened > 0, "{:?}", client.counters());
}
