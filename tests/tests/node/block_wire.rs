//! The block protocol in the hands of somebody who means harm, or is broken: no crash, no leak, no wrong byte, and the others
//! go on.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::{Class, Handle, InstanceId};
use kvkeep_proto::v1;
use kvkeep_proto::v1::Envelope;
use kvkeep_proto::v1::envelope::Message;
use kvkeep_tests::raw_block::{RawBlock, register};
use kvkeep_tests::{Node, Options, formats, leaks, payload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

const BYTES: usize = 1 << 20;

fn instance(n: u8) -> InstanceId {
    InstanceId([n; 16])
}

fn options() -> Options {
    Options { limits: "instance_grace_ms = 300\n".into(), ..Options::default() }
}

fn memfd(bytes: u64, sealed: bool) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    if bytes > 0 {
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes).unwrap();
    }
    if sealed {
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    }
    fd
}

/// A node with four blocks, and one who watches over them.
async fn with_blocks() -> (Node, kvkeep_client::Client, kvkeep_client::Namespace, Vec<Bytes>) {
    let node = Node::start(options());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, BYTES, Class::Cache).await;
    (node, client, ns, keys)
}

fn get_into(handle: Handle, key: &Bytes, runs: Vec<v1::RegionRuns>, word: Option<v1::CallWord>) -> Message {
    let get = v1::GetRequest {
        handle: Some(convert::handle_to_proto(handle)),
        items: vec![v1::GetItem { key: key.clone(), ..Default::default() }],
        ..Default::default()
    };
    Message::GetInto(v1::GetIntoRequest { get: Some(get), into: vec![v1::Scatter { runs }], want_sums: false, word })
}

fn whole(region_id: u32) -> Vec<v1::RegionRuns> {
    vec![v1::RegionRuns { region_id, offset: 0, run_bytes: BYTES as u64, stride: 0, count: 1 }]
}

/// Random bytes on the socket and on the port, some of them behind a good hello, some of them almost right.
#[tokio::test]
async fn garbage_closes_its_connection_and_nothing_else() {
    let seed = seed("garbage_closes_its_connection_and_nothing_else");
    let mut rng = StdRng::seed_from_u64(seed);
    let (node, client, ns, keys) = with_blocks().await;
    for round in 0..60u8 {
        let mut block = if round % 2 == 0 { RawBlock::unix(&node).await } else { RawBlock::tcp(&node).await };
        if round % 3 == 0 {
            block = block.greeted(instance(round)).await;
        }
        let mut garbage = vec![0; rng.random_range(16..5000)];
        rng.fill_bytes(&mut garbage);
        if round % 7 == 0 {
            // A length beyond every bound: a small one might only say that the rest is still to come.
            garbage[3] |= 0x80;
        }
        if round % 5 == 0 {
            // A believable head, then nonsense.
            garbage[..1].fill(200);
            garbage.iter_mut().take(8).skip(1).for_each(|b| *b = 0);
        }
        let _ = block.bytes(&garbage).await; // the server may close in the middle of it
        if round % 7 == 0 {
            assert!(round % 5 == 0 || block.is_closed().await, "seed {seed} round {round}");
        }
    }
    assert_eq!(super::found(&ns, &keys, BYTES).await, 4);
    leaks::nothing_is_held(&client).await;
    leaks::eventually(&client, "violations are counted", |s| s.counters["kvkeep_block_violations_total"] > 5).await;
}

#[tokio::test]
async fn a_call_before_hello_and_a_flood_of_hellos_lose_their_connection() {
    let (node, client, ns, keys) = with_blocks().await;
    let mut early = RawBlock::unix(&node).await;
    let answer = early.call(Message::Touch(v1::TouchRequest::default())).await.unwrap();
    assert_eq!(answer.error.unwrap().kind, "hello_required");
    assert!(early.is_closed().await);

    let mut flood = RawBlock::tcp(&node).await;
    for _ in 0..100 {
        if flood.send(Message::Hello(kvkeep_tests::raw::hello(instance(7))), &[], None).await.is_err() {
            break;
        }
    }
    assert!(flood.is_closed().await);
    // Many connections that say nothing: each is closed after a while, and the rest of the world goes on.
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(RawBlock::tcp(&node).await);
    }
    assert_eq!(super::found(&ns, &keys, BYTES).await, 4);
    for mut one in silent {
        assert!(one.is_closed().await);
    }
    leaks::nothing_is_held(&client).await;
}

/// Frames whose lengths lie, and calls that ask for more than a limit allows.
#[tokio::test]
async fn lies_about_lengths_are_refused_by_name() {
    let (node, client, ns, keys) = with_blocks().await;
    for head in [[0xff; 8], [0, 0, 0, 1, 0, 0, 0, 0], [4, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f], [4, 0, 0, 0, 1, 0, 0, 0]] {
        let mut block = RawBlock::tcp(&node).await.greeted(instance(1)).await;
        block.bytes(&head).await.unwrap();
        block.bytes(&[0x08, 1, 0x10, 1]).await.unwrap();
        assert!(block.is_closed().await, "{head:?}");
    }
    let mut block = RawBlock::unix(&node).await.greeted(instance(2)).await;
    let region = register(&mut block, Some(memfd(2 * BYTES as u64, true).as_fd()), 0, 2 * BYTES as u64).await.unwrap();
    assert!(region.mapped);
    let run = |offset, run_bytes, stride, count| {
        vec![v1::RegionRuns { region_id: region.region_id, offset, run_bytes, stride, count }]
    };
    for (runs, kind) in [
        (run(u64::MAX, 1, 0, 1), "invalid_argument"),
        (run(2 * BYTES as u64 - 1, 2, 0, 1), "invalid_argument"),
        (run(0, BYTES as u64, 1, 2), "invalid_argument"),
        (run(0, 1, 1, u32::MAX), "too_large"),
        (run(0, 0, 0, 1), "invalid_argument"),
        (vec![v1::RegionRuns { region_id: 99, run_bytes: 1, ..Default::default() }], "expired"),
    ] {
        let answer = block.call(get_into(ns.handle, &keys[0], runs, None)).await.unwrap();
        assert_eq!(answer.error.expect("it is refused").kind, kind);
    }
    // A place that is too small is a miss of that part.
    let answer = block.call(get_into(ns.handle, &keys[0], run(0, 4096, 0, 1), None)).await.unwrap();
    let Some(Message::GetIntoReply(reply)) = answer.message else { panic!("{answer:?}") };
    assert_eq!(reply.items[0].reason, v1::MissReason::Format as i32);
    // A word outside of every region.
    let word = Some(v1::CallWord { region_id: region.region_id, offset: 2 * BYTES as u64 });
    let answer = block.call(get_into(ns.handle, &keys[0], whole(region.region_id), word)).await.unwrap();
    assert_eq!(answer.error.unwrap().kind, "invalid_argument");
    assert_eq!(super::found(&ns, &keys, BYTES).await, 4);
    drop(block);
    leaks::nothing_is_held(&client).await;
}

/// What is no memory is refused by name; so is too much of it, and a descriptor on TCP.
#[tokio::test]
async fn only_memory_is_a_region() {
    let node = Node::start(Options {
        limits: "instance_grace_ms = 300\nregions_max = 3\nregion_bytes_max = \"4MiB\"\n".into(),
        ..Options::default()
    });
    let client = node.client().await;
    let mut block = RawBlock::unix(&node).await.greeted(instance(1)).await;
    let folder = std::fs::File::open("/").unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let empty = memfd(0, true);
    for (descriptor, says) in [(folder.as_fd(), "memfd"), (socket.as_fd(), "memfd"), (empty.as_fd(), "shorter")] {
        let (kind, message) = register(&mut block, Some(descriptor), 0, 4096).await.unwrap_err();
        assert!(kind == "invalid_argument" && message.contains(says), "{kind}: {message}");
    }
    assert_eq!(register(&mut block, None, 0, 4096).await.unwrap_err().0, "invalid_argument");
    let good = memfd(1 << 20, true);
    assert_eq!(register(&mut block, Some(good.as_fd()), 0, 8 << 20).await.unwrap_err().0, "too_large");
    for _ in 0..3 {
        register(&mut block, Some(good.as_fd()), 0, 1 << 20).await.unwrap();
    }
    assert_eq!(register(&mut block, Some(good.as_fd()), 0, 4096).await.unwrap_err().0, "throttled");
    let mut tcp = RawBlock::tcp(&node).await.greeted(instance(2)).await;
    assert_eq!(register(&mut tcp, None, 0, 4096).await.unwrap_err().0, "denied");
    // A descriptor that nobody asked for.
    block.send(Message::Touch(v1::TouchRequest::default()), &[], Some(good.as_fd())).await.unwrap();
    assert!(block.is_closed().await);
    drop((block, tcp));
    leaks::eventually(&client, "regions end with their instance", |s| s.counters["kvkeep_regions"] == 0).await;
}

/// A region whose descriptor is closed goes on; one that is truncated is misses and errors, and never a signal.
#[tokio::test]
async fn a_region_that_is_truncated_or_closed_harms_nobody() {
    let (node, client, ns, keys) = with_blocks().await;
    let mut block = RawBlock::unix(&node).await.greeted(instance(1)).await;
    let closed = memfd(BYTES as u64, true);
    let region = register(&mut block, Some(closed.as_fd()), 0, BYTES as u64).await.unwrap();
    drop(closed);
    let hit = |answer: Envelope| match answer.message {
        Some(Message::GetIntoReply(reply)) => reply.items[0].status == v1::PartStatus::Hit as i32,
        other => panic!("{other:?} {:?}", answer.error),
    };
    assert!(hit(block.call(get_into(ns.handle, &keys[0], whole(region.region_id), None)).await.unwrap()));
    let cut = memfd(BYTES as u64, false);
    let region = register(&mut block, Some(cut.as_fd()), 0, BYTES as u64).await.unwrap();
    assert!(!region.mapped, "it could be truncated");
    assert!(hit(block.call(get_into(ns.handle, &keys[1], whole(region.region_id), None)).await.unwrap()));
    rustix::fs::ftruncate(&cut, 4096).unwrap();
    assert!(!hit(block.call(get_into(ns.handle, &keys[1], whole(region.region_id), None)).await.unwrap()));
    let part = v1::PutPart { group: 0, shard: 0, length: BYTES as u64 };
    let key = payload::key(5, 0);
    let reserve = v1::ReserveRequest {
        handle: Some(convert::handle_to_proto(ns.handle)),
        positions: vec![v1::PutPosition { key: key.clone(), parts: vec![part], token_ids: Vec::new() }],
        ..Default::default()
    };
    let put = v1::PutFromRequest {
        reserve: Some(reserve),
        from: vec![v1::Scatter { runs: whole(region.region_id) }],
        ..Default::default()
    };
    let answer = block.call(Message::PutFrom(put)).await.unwrap();
    let Some(Message::PutFromReply(reply)) = answer.message else { panic!("{answer:?}") };
    assert!(reply.commit.unwrap().results[0].error.is_some());
    assert_eq!(super::found(&ns, &[key], BYTES).await, 0);
    assert_eq!(super::found(&ns, &keys, BYTES).await, 4);
    drop(block);
    leaks::nothing_is_held(&client).await;
}

/// A put over the port whose client stops in the middle of a frame: the reservation ends at its deadline, the connection soon
/// after, and the slot comes back.
#[tokio::test]
async fn a_writer_that_stops_in_the_middle_of_a_frame_holds_nothing_for_long() {
    let node =
        Node::start(Options { limits: "instance_grace_ms = 300\nreservation_ms = 500\n".into(), ..Options::default() });
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let mut block = RawBlock::tcp(&node).await.greeted(instance(1)).await;
    let part = v1::PutPart { group: 0, shard: 0, length: BYTES as u64 };
    let key = payload::key(5, 0);
    let reserve = v1::ReserveRequest {
        handle: Some(convert::handle_to_proto(ns.handle)),
        positions: vec![v1::PutPosition { key: key.clone(), parts: vec![part], token_ids: Vec::new() }],
        ..Default::default()
    };
    let answer = block.call(Message::Reserve(reserve)).await.unwrap();
    let Some(Message::ReserveReply(reply)) = answer.message else { panic!("{answer:?}") };
    let [reservation_id] = kvkeep_tests::raw::slots(&reply)[..] else { panic!("{reply:?}") };
    let write = Envelope {
        call: 9,
        message: Some(Message::Write(v1::WriteRequest { reservation_id, ..Default::default() })),
        ..Default::default()
    };
    let mut head = bytes::BytesMut::new();
    kvkeep_client::block::frame::encode(&write, BYTES, &mut head);
    block.bytes(&head).await.unwrap();
    block.bytes(&vec![7; BYTES / 2]).await.unwrap();
    leaks::eventually(&client, "the frame is being read", |s| s.reservations == 1).await;
    assert!(block.is_closed().await, "a frame that does not go on loses its connection");
    leaks::nothing_is_held(&client).await;
    assert_eq!(super::found(&ns, std::slice::from_ref(&key), BYTES).await, 0);
    super::store(&ns, &[key], BYTES, Class::Cache).await;
}

/// A cancelled call is answered, and what is left of it is named.
#[tokio::test]
async fn a_cancelled_get_is_answered() {
    let (node, _client, ns, keys) = with_blocks().await;
    let mut block = RawBlock::tcp(&node).await.greeted(instance(1)).await;
    let items = std::iter::repeat_with(|| v1::GetItem { key: keys[0].clone(), ..Default::default() }).take(4000);
    let get = v1::GetRequest {
        handle: Some(convert::handle_to_proto(ns.handle)),
        items: items.collect(),
        ..Default::default()
    };
    let call = block.send(Message::Get(get), &[], None).await.unwrap();
    block.next().await.unwrap();
    block.send(Message::Cancel(v1::CancelRequest { call, request_id: Bytes::new() }), &[], None).await.unwrap();
    let mut cancelled = 0;
    loop {
        let envelope = tokio::time::timeout(Duration::from_secs(30), block.next()).await.unwrap().unwrap();
        if let Some(Message::GetReply(reply)) = &envelope.message {
            cancelled += u32::from(reply.reason == v1::MissReason::Cancelled as i32);
        }
        if envelope.end {
            break;
        }
    }
    assert!(cancelled > 100, "{cancelled} items were named as cancelled");
}
