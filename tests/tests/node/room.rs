//! More than fits: bounded, refused with a reason, or evicted; nothing leaks.

use std::time::Duration;

use kvkeep_client::convert::Retention;
use kvkeep_client::{Call, Put};
use kvkeep_core::{Class, Tier};
use kvkeep_proto::v1;
use kvkeep_tests::raw::{self, Raw};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn of_8192_reserves_of_1_mib_on_a_small_arena_a_prefix_is_granted_and_nothing_leaks() {
    let node = Node::start(Options { limits: "instance_grace_ms = 200\n".into(), ..Options::default() });
    let client = node.client().await;
    let mut raw = Raw::connect(&node).await;
    let handle = raw.namespace("test", &formats::plain(MIB)).await;
    let keys = payload::chain(1, 8192);
    let reserve = async |raw: &mut Raw| {
        let part = v1::PutPart { group: 0, shard: 0, length: MIB };
        let positions =
            keys.iter().map(|key| v1::PutPosition { key: key.clone(), parts: vec![part], token_ids: Vec::new() });
        let request = v1::ReserveRequest {
            ctx: Some(v1::CallContext { deadline_ms: 2000, ..Default::default() }),
            handle: Some(kvkeep_client::convert::handle_to_proto(handle)),
            positions: positions.collect(),
            ..Default::default()
        };
        raw.blocks.reserve(request).await.expect("a reserve is answered").into_inner()
    };
    let reply = reserve(&mut raw).await;
    let slots = raw::slots(&reply);
    assert!((1..=128).contains(&slots.len()), "{} slots of 1 MiB on an arena of 128 MiB", slots.len());
    assert_eq!(reply.granted_positions as usize, reply.answers.len(), "what is answered is a prefix");
    let stats = client.stats(&Call::default()).await.unwrap();
    assert_eq!((stats.reservations as usize, stats.reserved_bytes), (slots.len(), slots.len() as u64 * MIB));

    // While they are held another client gets a reason, not a slot.
    let mut other = Raw::connect(&node).await;
    let more = payload::chain(2, 1);
    let refused = other.reserve(handle, &more, MIB);
    let refused = tokio::time::timeout(Duration::from_secs(60), refused).await.expect("it is answered").unwrap();
    match &refused.answers[0].answer {
        Some(v1::part_answer::Answer::Refused(detail)) => {
            assert!(["throttled", "full"].contains(&detail.kind.as_str()) && detail.retry_after_ms > 0, "{detail:?}");
        }
        // The bound on reservations may leave room for one more.
        Some(v1::part_answer::Answer::Slot(_)) => {}
        answer => panic!("{answer:?}"),
    }

    // Released ones come back at once, forgotten ones with their instance.
    let release = v1::ReleaseRequest { reservation_ids: slots.clone(), ..Default::default() };
    assert_eq!(raw.blocks.release(release).await.unwrap().into_inner().released as usize, slots.len());
    assert!(!raw::slots(&reserve(&mut raw).await).is_empty());
    drop((raw, other));
    leaks::nothing_is_left(&client).await;
}

#[tokio::test]
async fn an_abandoned_reservation_frees_at_its_deadline() {
    let node = Node::start(Options { limits: "reservation_ms = 300\n".into(), ..Options::default() });
    let client = node.client().await;
    let mut raw = Raw::connect(&node).await;
    let handle = raw.namespace("test", &formats::plain(MIB)).await;
    let keys = payload::chain(1, 8);
    let slots = raw::slots(&raw.reserve(handle, &keys, MIB).await.unwrap());
    assert_eq!(slots.len(), 8);
    raw.write(vec![(slots[0], 0, payload::block(&keys[0], 4096))]).await.unwrap();
    leaks::nothing_is_left(&client).await;
    let result = raw.commit(vec![(slots[0], Vec::new())]).await.unwrap().results.remove(0);
    assert_eq!(result.error.map(|e| e.kind).as_deref(), Some("expired"));
}

/// Ten times as much as DRAM holds, asked to be kept: back-pressure, and every block is there.
#[tokio::test]
async fn a_working_set_of_ten_times_dram_is_kept_whole() {
    let options = Options { arena_bytes: 64 * MIB, nvme_bytes: 1024 * MIB, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(MIB)).await;
    for chain in 0..80 {
        let put = super::put_of(&payload::chain(chain, 8), MIB as usize, Class::Cache);
        let put = Put { retention: Retention::Keep, ..put };
        let call = Call::default().within(Duration::from_secs(60));
        let outcomes = ns.put(&put, &call).await.unwrap();
        assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    }
    for chain in 0..80 {
        assert_eq!(super::found(&ns, &payload::chain(chain, 8), MIB as usize).await, 8, "chain {chain}");
    }
    for chain in 0..80 {
        ns.remove(&payload::chain(chain, 8), &Call::default()).await.unwrap();
    }
    leaks::nothing_is_left(&client).await;
}

/// Both tiers are full: what is coldest goes, tails first, and puts go on.
#[tokio::test]
async fn when_every_tier_is_full_puts_go_on_and_chains_lose_their_tails_first() {
    let options = Options { arena_bytes: 64 * MIB, nvme_bytes: 128 * MIB, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(MIB)).await;
    for chain in 0..60 {
        let put = super::put_of(&payload::chain(chain, 8), MIB as usize, Class::Cache);
        let outcomes = ns.put(&put, &Call::default().within(Duration::from_secs(60))).await.unwrap();
        assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    }
    let mut blocks = 0;
    for chain in 0..60 {
        let keys = payload::chain(chain, 8);
        let items: Vec<_> = keys.iter().map(|k| kvkeep_client::GetItem::of(k.clone())).collect();
        let hits: Vec<_> =
            ns.get(&items, None, &Call::default()).await.unwrap().iter().map(|part| part.is_hit()).collect();
        blocks += hits.iter().filter(|hit| **hit).count();
        let first_hole = hits.iter().position(|hit| !hit).unwrap_or(hits.len());
        assert!(hits[first_hole..].iter().all(|hit| !hit), "chain {chain} has a hole: {hits:?}");
    }
    let stats = client.stats(&Call::default()).await.unwrap();
    // NVMe, of which each segment holds 31 with their headers, less one batch of eviction and what 16 writers wait to write.
    assert!(blocks >= 112, "only {blocks} blocks of 192 MiB are left: {stats:?}");
}

/// Durable blocks are never evicted: a device full of them refuses more, by name, and keeps what it promised.
#[tokio::test]
async fn a_device_full_of_durable_blocks_refuses_more_and_keeps_all() {
    let options = Options { arena_bytes: 64 * MIB, nvme_bytes: 64 * MIB, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(MIB)).await;
    let (mut kept, mut refused) = (Vec::new(), 0);
    for chain in 0..96 {
        let keys = payload::chain(chain, 1);
        let put = super::put_of(&keys, MIB as usize, Class::Durable);
        match ns.put(&put, &Call::default().within(Duration::from_secs(2))).await {
            Ok(outcomes) if outcomes[0].is_kept() => kept.extend(keys),
            Ok(outcomes) => {
                let kvkeep_client::PartOutcome::Refused(e) = &outcomes[0] else { panic!("{outcomes:?}") };
                assert!(e.to_string().contains("full") || e.to_string().contains("throttled"), "{e}");
                refused += 1;
            }
            Err(e) => {
                assert!(e.is_retryable(), "{e}");
                refused += 1;
            }
        }
        if refused > 2 {
            break;
        }
    }
    assert!(refused > 0, "96 MiB do not fit on 64");
    assert!(kept.len() >= 32, "only {} MiB of 64 could be used", kept.len());
    assert_eq!(super::found(&ns, &kept, MIB as usize).await, kept.len());
    // Room comes back when something is removed.
    ns.remove(&kept[..8], &Call::default()).await.unwrap();
    super::store(&ns, &payload::chain(1000, 4), MIB as usize, Class::Durable).await;
    let stats = client.stats(&Call::default()).await.unwrap();
    let nvme = leaks::tier(&stats, Tier::Nvme);
    assert!(nvme.used_bytes <= nvme.capacity_bytes, "{nvme:?}");
}
