//! The server dies in each step of each verb with a client attached: misses at worst, no wrong byte, nothing leaks, and the
//! next life goes on.

use std::time::Duration;

use kvkeep_client::{Call, Client, GetItem, Lost, MatchQuery, Namespace, Place, Put, PutPosition, Region};
use kvkeep_core::{Class, RequestId};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

const BYTES: usize = 300_000;
const BLOCKS: usize = 6;

/// Whatever an engine does, once; every byte that is given back must be right.
async fn everything(client: &Client, ns: &Namespace, chain: u64) {
    let keys = payload::chain(chain, BLOCKS as u64);
    let call = Call::of(RequestId::new(&chain.to_be_bytes()).unwrap()).within(Duration::from_secs(20));
    let region = Region::new(2 * BLOCKS * BYTES.next_multiple_of(4096)).unwrap();
    // SAFETY: every place is given to one call at a time, and looked at when that was answered.
    let place = |n: usize| -> Place { unsafe { region.place(n * BYTES.next_multiple_of(4096), BYTES) } };
    let positions = keys[..3].iter().enumerate().map(|(n, key)| {
        region.write(n * BYTES.next_multiple_of(4096), &payload::block(key, BYTES));
        PutPosition::of(key.clone(), place(n))
    });
    let put = Put { positions: positions.collect(), ..Put::default() };
    ns.put_from(&put, &call).await.unwrap();
    let rest =
        Put { parent: Some(keys[2].clone()), first_position: 3, ..super::put_of(&keys[3..], BYTES, Class::Durable) };
    ns.put(&rest, &call).await.unwrap();
    let query = MatchQuery::of(keys.clone()).leased(Duration::from_secs(20));
    let mapped = ns.match_mapped(&query, &call).await.unwrap();
    for part in &mapped.parts {
        let mut bytes = vec![0; BYTES];
        if let Some(block) = &part.block
            && block.copy_to(&mut bytes)
        {
            assert!(bytes[..] == payload::block(&keys[part.item], BYTES)[..], "mapped");
        }
    }
    ns.lease(&keys, None, &call).await.unwrap();
    ns.touch(&keys, &call).await.unwrap();
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    for (key, part) in keys.iter().zip(ns.get(&items, None, &call).await.unwrap()) {
        assert!(!part.is_hit() || part.data == payload::block(key, BYTES), "got");
    }
    let places: Vec<_> = (0..BLOCKS).map(|n| place(BLOCKS + n)).collect();
    let got = ns.get_into_region(&items, &places, None, &call).await.unwrap();
    for (n, got) in got.iter().enumerate() {
        let mut bytes = vec![0; BYTES];
        region.read((BLOCKS + n) * BYTES.next_multiple_of(4096), &mut bytes);
        assert!(!got.is_hit() || bytes[..] == payload::block(&keys[n], BYTES)[..], "into a region");
    }
    client.release(&[], std::slice::from_ref(&call.request_id), &call).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_any_step_costs_misses_at_worst() {
    for (round, name) in kvkeep_node_failpoints().iter().enumerate() {
        println!("failpoint {name}");
        let mut node = Node::new(Options { limits: "instance_grace_ms = 300\n".into(), ..Options::default() });
        node.restart();
        let handle = super::namespace(&node.client().await, &formats::any_size(1 << 20)).await.handle;
        node.kill();
        node.options_mut().environment = vec![("KVKEEP_FAILPOINT".into(), name.clone())];
        // `hello.said` dies in the client's connect; the client is one that does not need it.
        node.restart();
        node.options_mut().listen = node.endpoint();
        let config = kvkeep_client::ClientConfig {
            lost: Lost::Misses,
            patience: Duration::from_secs(2),
            ..kvkeep_client::ClientConfig::to(node.endpoint())
        };
        let client = Client::lazy(config).unwrap();
        let ns = client.attach(handle);
        let chain = round as u64 * 10;
        everything(&client, &ns, chain).await;
        assert!(node.has_ended(), "{name} was not passed");
        node.options_mut().environment.clear();
        node.kill();
        node.restart();
        // The next life: right bytes or misses, and everything can be stored.
        let watcher = node.client().await;
        let theirs = super::namespace(&watcher, &formats::any_size(1 << 20)).await;
        super::found(&theirs, &payload::chain(chain, BLOCKS as u64), BYTES).await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        everything(&client, &ns, chain + 1).await;
        assert_eq!(super::found(&theirs, &payload::chain(chain + 1, BLOCKS as u64), BYTES).await, BLOCKS, "{name}");
        drop((ns, client));
        leaks::nothing_is_held(&watcher).await;
        leaks::eventually(&watcher, "nothing is mapped or registered", |s| {
            s.counters["kvkeep_mapped_slots"] == 0
                && s.counters["kvkeep_mapped_orphaned_bytes"] == 0
                && s.counters["kvkeep_regions"] == 0
        })
        .await;
    }
}

/// The names stand in the node's source; these tests know the binary only.
fn kvkeep_node_failpoints() -> Vec<String> {
    let source = include_str!("../../../kvstore/node/src/failpoint.rs");
    let list = source.split_once("NAMES: &[&str] = &[").unwrap().1.split_once("];").unwrap().0;
    let names: Vec<_> = list.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(names.len() > 15, "{names:?}");
    names
}
