//! What is put comes back, byte for byte, or it is no hit.

use std::collections::HashMap;

use kvkeep_client::{Call, GetItem, MatchQuery, PartOutcome, Put, PutPart, PutPosition};
use kvkeep_core::{Class, Format, GroupId, MissReason, PartStatus, ShardId, SizeRule};
use kvkeep_tests::{Node, Options, formats, payload};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// A size that the rule allows.
fn size(rule: SizeRule, rng: &mut StdRng) -> usize {
    (match rule {
        SizeRule::Exact(n) => n,
        SizeRule::UpTo(n) => rng.random_range(1..=n),
        SizeRule::MultipleOf { step, max } => step * rng.random_range(1..=max / step),
    }) as usize
}

/// A whole chain with every part that its format has at each position.
fn whole_chain(format: &Format, chain: u64, keys: u64, rng: &mut StdRng) -> Put {
    let positions = (0..keys).map(|n| {
        let key = payload::key(chain, n);
        let parts = format.parts_at(n as u32).map(|(group, shard)| {
            let bytes = size(format.groups[usize::from(group.0)].size, rng);
            PutPart { group, shard, data: payload::part(&key, group, shard, 0, bytes) }
        });
        PutPosition { parts: parts.collect(), key: key.clone(), token_ids: vec![n as u32; 16] }
    });
    Put { positions: positions.collect(), ..Put::default() }
}

#[tokio::test]
async fn every_part_comes_back_under_every_rule_shard_and_size() {
    let mut rng = StdRng::seed_from_u64(kvkeep_tests::seed("every_part_comes_back"));
    let node = Node::start(Options::default());
    let client = node.client().await;
    for (nth, format) in
        [formats::hybrid(40_960), formats::sharded(8, 65_537), formats::any_size(300_000)].iter().enumerate()
    {
        let name = format!("rules-{nth}");
        let ns = client.register_namespace(&name, format, "weights-1").await.unwrap();
        for class in [Class::Cache, Class::Durable] {
            let put = Put { class: Some(class), ..whole_chain(format, class.code().into(), 12, &mut rng) };
            let outcomes = ns.put(&put, &Call::default()).await.unwrap();
            assert!(
                outcomes.iter().all(|o| matches!(o, PartOutcome::Stored { class: c, .. } if *c >= class)),
                "{outcomes:?}"
            );
            let keys: Vec<_> = put.positions.iter().map(|p| p.key.clone()).collect();
            let found = ns.match_chain(&MatchQuery::of(keys), &Call::default()).await.unwrap();
            assert_eq!((found.boundary_positions, found.boundary_tokens, found.reason), (12, 192, None));
            let (mut items, mut wanted) = (Vec::new(), Vec::new());
            for position in &put.positions {
                for part in &position.parts {
                    items.push(GetItem::part(position.key.clone(), part.group, part.shard));
                    wanted.push(part.data.clone());
                }
            }
            let got = ns.get(&items, None, &Call::default()).await.unwrap();
            for ((item, wanted), got) in items.iter().zip(&wanted).zip(&got) {
                assert!(got.is_hit() && got.sums_ok, "{item:?}: {:?} {:?}", got.status, got.reason);
                assert!(got.data == *wanted, "{item:?} has other bytes");
            }
        }
    }
}

/// `state` blocks stand at every second key: an odd boundary has none.
#[tokio::test]
async fn the_boundary_is_the_largest_that_all_groups_can_use() {
    let mut rng = StdRng::seed_from_u64(7);
    let format = formats::hybrid(4096);
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &format).await;
    let boundary =
        async |keys| ns.match_chain(&MatchQuery::of(keys), &Call::default()).await.unwrap().boundary_positions;

    let odd = whole_chain(&format, 1, 11, &mut rng);
    ns.put(&odd, &Call::default()).await.unwrap();
    assert_eq!(boundary(payload::chain(1, 11)).await, 10);

    // Behind the window of the boundary its blocks are not needed, and the full-attention ones are.
    let mut sparse = whole_chain(&format, 2, 12, &mut rng);
    sparse.positions[3].parts.retain(|p| p.group != GroupId(1));
    ns.put(&sparse, &Call::default()).await.unwrap();
    assert_eq!(boundary(payload::chain(2, 12)).await, 12);
    let mut broken = whole_chain(&format, 3, 12, &mut rng);
    broken.positions[5].parts.retain(|p| p.group != GroupId(0));
    ns.put(&broken, &Call::default()).await.unwrap();
    assert_eq!(boundary(payload::chain(3, 12)).await, 4);
    // Position 11 lacks its window block: 10 is the largest boundary whose window is whole.
    let mut late = whole_chain(&format, 4, 12, &mut rng);
    late.positions[11].parts.retain(|p| p.group != GroupId(1));
    ns.put(&late, &Call::default()).await.unwrap();
    assert_eq!(boundary(payload::chain(4, 12)).await, 10);
}

#[tokio::test]
async fn a_position_without_one_of_its_eight_shards_is_a_miss() {
    let format = formats::sharded(8, 4096);
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &format).await;
    let mut put = whole_chain(&format, 1, 4, &mut StdRng::seed_from_u64(1));
    let late = put.positions[2].parts.remove(5);
    ns.put(&put, &Call::default()).await.unwrap();
    let query = MatchQuery { statuses: true, ..MatchQuery::of(payload::chain(1, 4)) };
    let found = ns.match_chain(&query, &Call::default()).await.unwrap();
    assert_eq!(found.boundary_positions, 2);
    assert_eq!(found.reason, Some(MissReason::Incomplete));
    assert_eq!(found.statuses[..3], [PartStatus::Hit, PartStatus::Hit, PartStatus::Miss]);
    let missing = GetItem::part(payload::key(1, 2), GroupId(0), ShardId(5));
    assert!(!ns.get(&[missing], None, &Call::default()).await.unwrap()[0].is_hit());

    // Another rank brings it: the position is whole.
    let position = PutPosition { key: payload::key(1, 2), parts: vec![late], token_ids: Vec::new() };
    let put = Put { parent: Some(payload::key(1, 1)), first_position: 2, positions: vec![position], ..Put::default() };
    ns.put(&put, &Call::default()).await.unwrap();
    assert_eq!(ns.match_chain(&query, &Call::default()).await.unwrap().boundary_positions, 4);
}

#[tokio::test]
async fn a_range_is_what_the_whole_block_has_there() {
    const BYTES: usize = 300_001;
    let mut rng = StdRng::seed_from_u64(kvkeep_tests::seed("a_range_is"));
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let key = payload::key(1, 0);
    super::store(&ns, std::slice::from_ref(&key), BYTES, Class::Durable).await;
    let whole = payload::block(&key, BYTES);
    let version = ns.get(&[GetItem::of(key.clone())], None, &Call::default()).await.unwrap()[0].version;
    let items: Vec<_> = (0..64)
        .map(|_| {
            let offset = rng.random_range(0..BYTES as u64);
            let length = rng.random_range(0..=BYTES as u64 - offset);
            GetItem { offset, length, version, ..GetItem::of(key.clone()) }
        })
        .collect();
    for (item, part) in items.iter().zip(ns.get(&items, None, &Call::default()).await.unwrap()) {
        let end = if item.length == 0 { BYTES } else { (item.offset + item.length) as usize };
        assert!(part.is_hit() && part.data == whole[item.offset as usize..end], "{item:?}");
        assert_eq!((part.part_bytes, part.version), (BYTES as u64, version));
    }
    // Of another version there is nothing.
    let other = GetItem { version: version.map(|v| kvkeep_core::Version(v.0 ^ 1)), ..GetItem::of(key) };
    assert!(!ns.get(&[other], None, &Call::default()).await.unwrap()[0].is_hit());
}

#[tokio::test]
async fn blocks_of_1_kib_and_of_128_mib_come_back() {
    let node = Node::start(Options { arena_bytes: 1 << 30, nvme_bytes: 1 << 30, ..Options::default() });
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(128 << 20)).await;
    for (chain, bytes, class) in [(1, 1024, Class::Cache), (2, 128 << 20, Class::Durable), (3, 1, Class::Durable)] {
        let keys = payload::chain(chain, 1);
        super::store(&ns, &keys, bytes, class).await;
        assert_eq!(super::found(&ns, &keys, bytes).await, 1, "{bytes} bytes");
    }
}

/// Two engines compute other bits for the same keys and put them at the same time: one of them wins each key, both hear
/// whose bytes are kept, and no block is a mixture.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_the_first_commit_wins_and_nothing_is_mixed() {
    const BYTES: usize = 150_000;
    let node = Node::start(Options::default());
    let keys = payload::chain(1, 48);
    let write = async |writer: u64| {
        let client = node.client().await;
        let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
        let mut told = HashMap::new();
        while told.len() < keys.len() {
            // Those that the other is writing are asked for again until one of the two has them.
            let open: Vec<_> = keys.iter().filter(|key| !told.contains_key(*key)).cloned().collect();
            let data = |key: &bytes::Bytes| payload::part(key, GroupId(0), ShardId(0), writer, BYTES);
            let positions = open.iter().map(|key| PutPosition::of(key.clone(), data(key))).collect();
            let put = Put { positions, unordered: true, ..Put::default() };
            for (key, outcome) in open.iter().zip(ns.put(&put, &Call::default()).await.unwrap()) {
                match outcome {
                    PartOutcome::Stored { version, .. } => drop(told.insert(key.clone(), (true, version))),
                    PartOutcome::AlreadyPresent { version, .. } => {
                        told.insert(key.clone(), (false, version.expect("what is present has a version")));
                    }
                    PartOutcome::InProgressElsewhere { retry_after } => tokio::time::sleep(retry_after).await,
                    PartOutcome::Refused(e) => panic!("{e}"),
                }
            }
        }
        told
    };
    let (one, two) = tokio::join!(write(1), write(2));
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    for (key, part) in keys.iter().zip(ns.get(&items, None, &Call::default()).await.unwrap()) {
        let ((one_won, one_version), (two_won, two_version)) = (one[key], two[key]);
        assert!(one_won != two_won, "exactly one of two writers stored the block");
        assert_eq!((Some(one_version), one_version), (part.version, two_version));
        let winner = if one_won { 1 } else { 2 };
        assert!(part.data == payload::part(key, GroupId(0), ShardId(0), winner, BYTES), "not the winner's bytes");
    }
}

#[tokio::test]
async fn what_is_here_is_told_before_bytes_are_sent_and_a_class_is_raised_without_them() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 3);
    super::store(&ns, &keys, 4096, Class::Cache).await;
    let again = ns.put(&super::put_of(&keys, 4096, Class::Cache), &Call::default()).await.unwrap();
    assert!(again.iter().all(|o| matches!(o, PartOutcome::AlreadyPresent { class: Class::Cache, .. })), "{again:?}");
    let raised = ns.put(&super::put_of(&keys, 4096, Class::Durable), &Call::default()).await.unwrap();
    for outcome in &raised {
        let PartOutcome::Stored { class: Class::Durable, copies: 1, copies_wanted: 2, degraded: true, .. } = outcome
        else {
            panic!("one node is one copy of two: {outcome:?}");
        };
    }
    let stats = client.stats(&Call::default()).await.unwrap();
    assert_eq!((stats.positions, stats.blocks), (3, 3));
    assert_eq!(super::found(&ns, &keys, 4096).await, 3);
}

#[tokio::test]
async fn a_large_batch_is_answered_whole() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(4096)).await;
    let keys = payload::chain(1, 8192);
    super::store(&ns, &keys, 1024, Class::Cache).await;
    let found = ns.match_chain(&MatchQuery::of(keys.clone()), &Call::default()).await.unwrap();
    assert_eq!(found.boundary_positions, 8192);
    assert_eq!(super::found(&ns, &keys, 1024).await, 8192);
    assert_eq!(ns.touch(&keys, &Call::default()).await.unwrap(), 8192);
    assert_eq!(ns.remove(&keys, &Call::default()).await.unwrap().removed, 8192);
    kvkeep_tests::leaks::nothing_is_left(&client).await;
}
