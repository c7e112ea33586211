//! The server dies in each step of each verb with a client attached: misses at worst, no wrong byte, nothing leaks, and the
//! next life goes on.

use std::time::Duration;

use kvkeep_client::sessions::{Append, OpenSession};
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
    for (round, name) in kvkeep_node_failpoints().iter().filter(|name| !name.starts_with("session.")).enumerate() {
        println!("failpoint {name}");
        let listen = kvkeep_tests::address_to_keep();
        let mut node = Node::new(Options { limits: "instance_grace_ms = 300\n".into(), listen, ..Options::default() });
        node.restart();
        let handle = super::namespace(&node.client().await, &formats::any_size(1 << 20)).await.handle;
        node.kill();
        node.options_mut().environment = vec![("KVKEEP_FAILPOINT".into(), name.clone())];
        // `hello.said` dies in the client's connect; the client is one that does not need it.
        node.restart();
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

/// Killed before the append is proposed and behind its being applied: it is there whole, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_that_the_server_dies_in_is_there_whole_or_not_at_all() {
    let names: Vec<_> = kvkeep_node_failpoints().into_iter().filter(|name| name.starts_with("session.")).collect();
    assert_eq!(names, ["session.append.ready", "session.append.applied"]);
    for (name, applied) in names.iter().zip([false, true]) {
        // The second append is the one that it dies in.
        let mut node = Node::new(Options::default());
        node.options_mut().environment = vec![("KVKEEP_FAILPOINT".into(), format!("{name}:2"))];
        node.restart();
        let client = node.client_with(|c| c.retry.attempts_max = 1).await;
        let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
        let open = OpenSession { class: Some(Class::Durable), ..OpenSession::default() };
        let call = Call::default();
        ns.sessions().open("a", &open, &call).await.unwrap();
        let keys = payload::chain(1, 80);
        super::store(&ns, &keys, 4096, Class::Cache).await;
        let part = |from: usize, to: usize| Append {
            from_position: from as u64,
            keys: keys[from..to].to_vec(),
            from_token: from as u64 * 16,
            token_ids: (from as u32 * 16..to as u32 * 16).collect(),
            ..Append::default()
        };
        ns.sessions().append("a", &part(0, 37), &call).await.unwrap();
        ns.sessions().append("a", &part(37, 80), &call).await.expect_err("the server dies in it");
        assert!(node.has_ended(), "{name} was not passed");
        node.options_mut().environment.clear();
        node.kill();
        super::restart::forget_memory(&node);
        node.restart();
        let client = node.client().await;
        let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
        let positions = if applied { 80 } else { 37 };
        let now = ns.sessions().get("a", &call).await.unwrap();
        assert_eq!((now.positions, now.tokens), (positions, positions * 16), "{name}");
        let manifest = ns.sessions().manifest_all("a", &call).await.unwrap();
        assert!(manifest.iter().map(|p| p.key.as_ref()).eq(keys[..positions as usize].iter().map(Some)), "{name}");
        let tokens = ns.sessions().tokens_all("a", &call).await.unwrap();
        assert!(!tokens.damaged && tokens.ids.iter().copied().eq(0..positions as u32 * 16), "{name}");
        // What was raised for an append that was not proposed is named by nobody, and goes.
        client.admin().fsck(true, &call).await.unwrap();
        let found = client.admin().fsck(true, &call).await.unwrap();
        assert_eq!((found.missing_positions, found.missing_token_blocks), (0, 0), "{name}: {found:?}");
        assert_eq!((found.unreferenced_blocks, found.overdue_blocks), (0, 0), "{name}: {found:?}");
        assert_eq!((found.swept_blocks > 0, found.durable_blocks), (!applied, positions + 1 + u64::from(applied)));
        assert_eq!(super::found(&ns, &keys[..positions as usize], 4096).await, positions as usize, "{name}");
        // The engine tries again, and it is there once.
        super::store(&ns, &keys[positions as usize..], 4096, Class::Cache).await;
        let again = ns.sessions().append("a", &part(37, 80), &call).await.unwrap();
        assert_eq!((again.positions, again.tokens, again.repeated), (80, 1280, applied), "{name}");
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
