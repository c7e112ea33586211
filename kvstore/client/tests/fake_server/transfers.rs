//! Bytes through a server that is honest, one that lies, and one that goes away.

use std::time::Duration;

use crate::support::{BATCH_KEYS, Fake, Fault, Step, content, key, refusal};
use kvkeep_client::{Call, ErrorKind, GetItem, MatchQuery, PartOutcome, Put, PutPart, PutPosition};
use kvkeep_core::ids::{GroupId, ShardId};
use kvkeep_core::{ErrorKind as CoreKind, MissReason, PartStatus};
use tonic::Status;

fn put_of(parts: std::ops::Range<usize>, len: usize) -> Put {
    Put { positions: parts.map(|i| PutPosition::of(key(i), content(i, len))).collect(), ..Put::default() }
}

fn items(parts: std::ops::Range<usize>) -> Vec<GetItem> {
    parts.map(|i| GetItem::of(key(i))).collect()
}

async fn stored(parts: usize, len: usize) -> (Fake, kvkeep_client::Client, kvkeep_client::Namespace) {
    let (fake, addr) = Fake::start().await;
    let (client, ns) = Fake::client(&addr, |c| c.deadline = Duration::from_secs(5)).await;
    ns.put(&put_of(0..parts, len), &Call::default()).await.expect("an honest put");
    (fake, client, ns)
}

#[tokio::test]
async fn what_is_put_in_granted_prefixes_comes_back_whole_and_in_order() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |c| c.connections = 3).await;
    // Parts of 0.4 MB against a grant of 1 MiB and 4 keys a call: several steps, several chunks each.
    let put = Put { parent: Some(key(100)), first_position: 7, ..put_of(0..11, 400_000) };
    let outcomes = ns.put(&put, &Call::default()).await.unwrap();
    assert_eq!(outcomes.len(), 11);
    assert!(outcomes.iter().all(|o| matches!(o, PartOutcome::Stored { copies: 1, degraded: false, .. })));
    let got = ns.get(&items(0..12), None, &Call::default()).await.unwrap();
    for (i, part) in got.iter().take(11).enumerate() {
        assert!(part.is_hit() && part.sums_ok && part.data == content(i, 400_000), "part {i}");
    }
    assert_eq!((got[11].status, got[11].reason), (PartStatus::Miss, Some(MissReason::NeverStored)));
    let state = fake.state.lock();
    assert!(state.largest_batch <= BATCH_KEYS as usize);
    // Each step names the key before it and its place in the chain.
    let mut expected = (7, key(100));
    for reserve in &state.reserves {
        assert_eq!((reserve.first_position, &reserve.parent_key), (expected.0, &expected.1));
        let granted = 2.min(reserve.positions.len());
        expected = (expected.0 + granted as u32, reserve.positions[granted - 1].key.clone());
    }
}

#[tokio::test]
async fn parts_that_are_there_are_not_sent_again() {
    let (fake, _, ns) = stored(3, 1000).await;
    let writes = fake.calls("write");
    let outcomes = ns.put(&put_of(0..3, 1000), &Call::default()).await.unwrap();
    assert!(outcomes.iter().all(|o| matches!(o, PartOutcome::AlreadyPresent { version: Some(_), .. })));
    assert_eq!(fake.calls("write"), writes);
    assert_eq!(fake.calls("release"), 1, "the lease over what was present is given back");
}

#[tokio::test]
async fn shards_of_a_position_have_outcomes_of_their_own() {
    let (_, _, ns) = stored(1, 1000).await;
    let shard = |s| PutPart { group: GroupId(0), shard: ShardId(s), data: content(s.into(), 1000) };
    let position = PutPosition { key: key(0), parts: vec![shard(0), shard(1)], token_ids: vec![1, 2] };
    let outcomes = ns.put(&Put { positions: vec![position], ..Put::default() }, &Call::default()).await.unwrap();
    assert!(matches!(outcomes[..], [PartOutcome::AlreadyPresent { .. }, PartOutcome::Stored { .. }]));
}

#[tokio::test]
async fn get_into_lands_in_the_callers_buffers_and_ranges_are_ranges() {
    let (_, _, ns) = stored(3, 300_000).await;
    let mut memory = vec![vec![0u8; 300_000]; 2];
    memory.push(vec![0u8; 10]);
    let mut wanted = items(0..3);
    (wanted[1].offset, wanted[1].length) = (70_001, 150_000);
    let mut buffers: Vec<&mut [u8]> = memory.iter_mut().map(Vec::as_mut_slice).collect();
    let got = ns.get_into(&wanted, &mut buffers, None, &Call::default()).await.unwrap();
    assert!(got[0].is_hit() && got[0].len == 300_000 && got[0].sums_ok && memory[0] == content(0, 300_000));
    assert!(got[1].is_hit() && got[1].len == 150_000 && !got[1].sums_ok);
    assert_eq!(memory[1][..150_000], content(1, 300_000)[70_001..220_001]);
    assert_eq!(got[2].reason, Some(MissReason::Format), "a part that does not fit its buffer");
    assert!(ns.get_into(&wanted, &mut [], None, &Call::default()).await.is_err());
}

/// Every way that a server can break the rules of a get.
#[tokio::test]
async fn a_lying_server_gets_misses_and_is_not_asked_again() {
    type Lie = fn(Vec<kvkeep_proto::v1::GetReply>) -> Vec<kvkeep_proto::v1::GetReply>;
    let lies: &[(&str, Lie)] = &[
        ("truncated", |mut r| {
            r.pop();
            r
        }),
        ("duplicated", |mut r| {
            r.insert(1, r[1].clone());
            r
        }),
        ("reordered", |mut r| {
            r.swap(0, 1);
            r
        }),
        ("oversized", |mut r| {
            r[1].data = vec![0; 200_000].into();
            r
        }),
        ("overrun", |mut r| {
            r[0].part_bytes = 150_000;
            r
        }),
        ("of another item", |mut r| {
            r[1].item = 1;
            r
        }),
        ("of no item", |mut r| {
            r[0].item = u32::MAX;
            r
        }),
        ("without sums", |mut r| {
            r[0].crc32.clear();
            r
        }),
        ("empty for ever", |mut r| {
            r[1].data.clear();
            r
        }),
        ("of impossible size", |mut r| {
            r[0].part_bytes = u64::MAX;
            r
        }),
    ];
    for (name, lie) in lies {
        let (fake, client, ns) = stored(1, 300_000).await;
        fake.bend(move |replies| lie(replies).into_iter().map(Step::Reply).collect());
        let got = ns.get(&items(0..1), None, &Call::default()).await.unwrap();
        assert_eq!(got.len(), 1);
        assert_eq!((got[0].status, got[0].reason), (PartStatus::Miss, Some(MissReason::Quarantined)), "{name}");
        assert!(got[0].data.is_empty(), "{name}");
        assert_eq!((fake.calls("get"), client.counters().violations), (1, 1), "{name}");
    }
}

#[tokio::test]
async fn a_flipped_bit_is_a_counted_miss_and_the_rest_is_read() {
    let (fake, client, ns) = stored(3, 300_000).await;
    fake.bend(|mut replies| {
        let bad = replies.iter_mut().filter(|r| r.item == 1).nth(1).unwrap();
        let mut data = bad.data.to_vec();
        data[77] ^= 4;
        bad.data = data.into();
        replies.into_iter().map(Step::Reply).collect()
    });
    let got = ns.get(&items(0..3), None, &Call::default()).await.unwrap();
    let hits: Vec<_> = got.iter().map(|p| p.is_hit()).collect();
    assert_eq!(hits, [true, false, true]);
    assert_eq!(got[1].reason, Some(MissReason::Quarantined));
    assert_eq!((client.counters().bad_sums, client.counters().violations), (1, 0));
}

#[tokio::test]
async fn at_the_deadline_the_prefix_that_arrived_is_the_answer() {
    let (fake, client, ns) = stored(4, 200_000).await;
    fake.bend(|replies| {
        let mut steps: Vec<_> = replies.into_iter().map(Step::Reply).collect();
        steps.truncate(3); // two chunks of the first part, one of the second
        steps.push(Step::Stall);
        steps
    });
    let call = Call::default().within(Duration::from_secs(3));
    let got = ns.get(&items(0..4), None, &call).await.unwrap();
    assert!(got[0].is_hit() && got[0].data == content(0, 200_000));
    for part in &got[1..] {
        assert_eq!((part.status, part.reason), (PartStatus::Miss, Some(MissReason::Late)));
        assert!(part.data.is_empty());
    }
    assert_eq!(client.counters().late_parts, 3);
}

#[tokio::test]
async fn a_get_that_broke_goes_on_where_it_broke() {
    let (fake, client, ns) = stored(4, 200_000).await;
    let mut times = 0;
    fake.bend(move |replies| {
        times += 1;
        let mut steps: Vec<_> = replies.into_iter().map(Step::Reply).collect();
        if times == 1 {
            steps.truncate(3);
            steps.push(Step::Fail(Status::unavailable("connection reset")));
        }
        steps
    });
    let got = ns.get(&items(0..4), None, &Call::default()).await.unwrap();
    assert!(got.iter().enumerate().all(|(i, p)| p.is_hit() && p.data == content(i, 200_000)));
    assert_eq!((fake.calls("get"), client.counters().retries), (2, 1));
}

#[tokio::test]
async fn a_server_that_is_lost_leaves_what_arrived() {
    let (fake, _, ns) = stored(4, 200_000).await;
    let mut times = 0;
    fake.bend(move |replies| {
        times += 1;
        let keep = if times == 1 { 3 } else { 0 };
        let mut steps: Vec<_> = replies.into_iter().map(Step::Reply).collect();
        steps.truncate(keep);
        steps.push(Step::Fail(Status::unavailable("connection reset")));
        steps
    });
    let got = ns.get(&items(0..4), None, &Call::default()).await.unwrap();
    let reasons: Vec<_> = got.iter().map(|p| p.reason).collect();
    let lost = Some(MissReason::Unreachable);
    assert_eq!(reasons, [None, lost, lost, lost]);
    assert!(got[0].data == content(0, 200_000));

    let none = ns.get(&items(0..4), None, &Call::default()).await.unwrap_err();
    assert_eq!(none.kind(), ErrorKind::Unreachable, "nothing arrived at all");
}

#[tokio::test]
async fn a_put_whose_commit_was_lost_is_made_again_and_stores_once() {
    for fault in [Fault::Refuse(Status::unavailable("x")), Fault::LoseAnswer(Status::unavailable("x"))] {
        let (fake, addr) = Fake::start().await;
        let (_, ns) = Fake::client(&addr, |_| ()).await;
        fake.fault("commit", fault);
        let outcomes = ns.put(&put_of(0..2, 1000), &Call::default()).await.unwrap();
        assert!(outcomes.iter().all(PartOutcome::is_kept), "{outcomes:?}");
        let state = fake.state.lock();
        assert_eq!(state.blocks.len(), 2);
        assert!(state.reservations.is_empty(), "reservations of the lost try were given back");
    }
}

#[tokio::test]
async fn a_restart_between_reserve_and_commit_stores_on_the_second_try() {
    let (fake, addr) = Fake::start().await;
    let (client, ns) = Fake::client(&addr, |_| ()).await;
    fake.fault("write", Fault::Refuse(Status::unavailable("gone")));
    fake.forget_everyone();
    let outcomes = ns.put(&put_of(0..2, 1000), &Call::default()).await.unwrap();
    assert!(outcomes.iter().all(PartOutcome::is_kept), "{outcomes:?}");
    assert_eq!(client.server_epoch(), 2);
}

#[tokio::test]
async fn a_put_that_fails_late_says_what_was_stored() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let put = put_of(0..6, 1000);
    // 4 keys a call: the first step passes, the second is refused.
    let first = ns.put(&put_of(0..4, 1000), &Call::default()).await.unwrap();
    assert_eq!(first.len(), 4);
    fake.fault("reserve", Fault::LoseAnswer(refusal(CoreKind::Denied)));
    assert_eq!(ns.put(&put, &Call::default()).await.unwrap_err().kind(), ErrorKind::Refused(CoreKind::Denied));
    fake.fault("commit", Fault::Refuse(refusal(CoreKind::Io)));
    let outcomes = ns.put(&put, &Call::default()).await.unwrap();
    assert!(outcomes[..4].iter().all(PartOutcome::is_kept));
    assert!(outcomes[4..].iter().all(|o| matches!(o, PartOutcome::Refused(_))), "{outcomes:?}");
}

#[tokio::test]
async fn a_match_covers_what_is_there() {
    let (fake, _, ns) = stored(3, 100).await;
    let query = |n: usize| MatchQuery::of((0..n).map(key).collect());
    let found = ns.match_chain(&query(4), &Call::default()).await.unwrap();
    assert_eq!((found.boundary_positions, found.boundary_tokens), (3, 48));
    let many = ns.match_many(&[query(1), query(2), query(2), query(4)], &Call::default()).await.unwrap();
    let boundaries: Vec<_> = many.into_iter().map(|m| m.unwrap().boundary_positions).collect();
    assert_eq!(boundaries, [1, 2, 2, 3]);
    assert_eq!(fake.calls("match"), 4, "two queries and four keys a call at most");
}
