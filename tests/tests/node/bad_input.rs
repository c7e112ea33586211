//! What clients must not do, each answered with an error of its own kind, and nothing else harmed.

use bytes::Bytes;
use kvkeep_client::{Call, PartOutcome, Put, PutPosition, convert};
use kvkeep_core::{Class, ErrorKind, Handle, InstanceId, NamespaceId, Revision};
use kvkeep_proto::v1;
use kvkeep_proto::v1::blocks_client::BlocksClient;
use kvkeep_tests::raw::{self, Raw};
use kvkeep_tests::{Node, Options, formats, leaks, payload};
use tokio::io::AsyncWriteExt as _;

const BYTES: usize = 100_000;

fn kind_of(status: tonic::Status) -> String {
    raw::detail(&status).kind
}

fn write_error(reply: &v1::WriteReply) -> Option<&str> {
    reply.results[0].error.as_ref().map(|e| e.kind.as_str())
}

#[tokio::test]
async fn keys_of_0_and_of_129_bytes_are_refused_by_every_verb() {
    let node = Node::start(Options::default());
    let mut raw = Raw::connect(&node).await;
    let handle = Some(convert::handle_to_proto(raw.namespace("ns", &formats::plain(4096)).await));
    for key in [Bytes::new(), Bytes::from(vec![7; 129])] {
        let keys = vec![payload::key(1, 0), key.clone()];
        let query = v1::MatchQuery { handle, keys: keys.clone(), ..Default::default() };
        let reply = raw.blocks.r#match(v1::MatchRequest { ctx: None, queries: vec![query] }).await.unwrap();
        assert_eq!(reply.into_inner().results[0].error.as_ref().map(|e| e.kind.as_str()), Some("invalid_argument"));
        let item = v1::GetItem { key: key.clone(), ..Default::default() };
        let get = v1::GetRequest { handle, items: vec![item], ..Default::default() };
        assert_eq!(raw.blocks.get(get).await.map(|_| ()).map_err(kind_of), Err("invalid_argument".into()));
        let part = v1::PutPart { group: 0, shard: 0, length: 4096 };
        let position = v1::PutPosition { key: key.clone(), parts: vec![part], token_ids: Vec::new() };
        let reserve = v1::ReserveRequest { handle, positions: vec![position], ..Default::default() };
        assert_eq!(raw.blocks.reserve(reserve).await.map_err(kind_of).err().as_deref(), Some("invalid_argument"));
        let lease = v1::LeaseRequest { handle, keys: keys.clone(), ..Default::default() };
        assert_eq!(raw.blocks.lease(lease).await.map_err(kind_of).err().as_deref(), Some("invalid_argument"));
        let touch = v1::TouchRequest { ctx: None, handle, keys: keys.clone() };
        assert_eq!(raw.blocks.touch(touch).await.map_err(kind_of).err().as_deref(), Some("invalid_argument"));
        let remove = v1::RemoveRequest { ctx: None, handle, keys: keys.clone() };
        assert_eq!(raw.blocks.remove(remove).await.map_err(kind_of).err().as_deref(), Some("invalid_argument"));
        let prefetch = v1::PrefetchRequest { handle, keys, ..Default::default() };
        assert_eq!(raw.blocks.prefetch(prefetch).await.map_err(kind_of).err().as_deref(), Some("invalid_argument"));
        let explain = v1::ExplainRequest { ctx: None, handle, key, ..Default::default() };
        assert_eq!(raw.blocks.explain(explain).await.map_err(kind_of).err().as_deref(), Some("invalid_argument"));
    }
}

#[tokio::test]
async fn a_block_of_the_wrong_size_is_refused_and_the_others_of_its_put_are_stored() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 3);
    let sizes = [4096, 4095, 4096];
    let positions = keys.iter().zip(sizes).map(|(k, n)| PutPosition::of(k.clone(), payload::block(k, n)));
    let outcomes = ns.put(&Put { positions: positions.collect(), ..Put::default() }, &Call::default()).await.unwrap();
    assert!(outcomes[0].is_kept() && outcomes[2].is_kept(), "{outcomes:?}");
    let PartOutcome::Refused(error) = &outcomes[1] else { panic!("{outcomes:?}") };
    assert_eq!(error.kind(), kvkeep_client::ErrorKind::Refused(ErrorKind::WrongSize), "{error}");
    assert_eq!(super::found(&ns, &keys, 4096).await, 2);
    leaks::nothing_is_held(&client).await;
}

/// Too few bytes, too many, a chunk twice, chunks in the wrong order: the block is not stored, its memory comes back, and
/// a block written in the same stream is not harmed.
#[tokio::test]
async fn truncated_oversized_duplicated_and_reordered_chunks_store_nothing() {
    let options = Options { limits: "reservation_ms = 1500\n".into(), ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let mut raw = Raw::connect(&node).await;
    let half = BYTES / 2;
    type Cut = fn(Bytes) -> Vec<(u64, Bytes)>;
    let cases: [(&str, Cut, &str); 5] = [
        ("truncated", |b| vec![(0, b.slice(..BYTES - 1))], ""),
        ("oversized", |b| vec![(0, b.clone()), (BYTES as u64, b.slice(..1))], "wrong_size"),
        ("duplicated", |b| vec![(0, b.slice(..BYTES / 2)), (0, b.slice(..BYTES / 2))], "invalid_argument"),
        (
            "reordered",
            |b| vec![((BYTES / 2) as u64, b.slice(BYTES / 2..)), (0, b.slice(..BYTES / 2))],
            "invalid_argument",
        ),
        ("beyond every number", |b| vec![(u64::MAX - 3, b.slice(..8))], "invalid_argument"),
    ];
    for (nth, (name, cut, expected)) in cases.into_iter().enumerate() {
        let (bad, good) = (payload::key(nth as u64, 0), payload::key(nth as u64, 1));
        let (bad_slot, good_slot) =
            (raw.slot(ns.handle, &bad, BYTES as u64).await, raw.slot(ns.handle, &good, BYTES as u64).await);
        let good_block = payload::block(&good, BYTES);
        let mut chunks: Vec<_> =
            cut(payload::block(&bad, BYTES)).into_iter().map(|(at, data)| (bad_slot, at, data)).collect();
        chunks.insert(1, (good_slot, 0, good_block.slice(..half)));
        chunks.push((good_slot, half as u64, good_block.slice(half..)));
        let reply = raw.write(chunks).await.unwrap();
        assert_eq!(write_error(&reply).unwrap_or_default(), expected, "{name}");
        let results = raw.commit(vec![(bad_slot, Vec::new()), (good_slot, Vec::new())]).await.unwrap().results;
        assert!(results[0].error.is_some(), "{name}: {results:?}");
        assert!(results[1].error.is_none(), "{name}: {results:?}");
        assert_eq!(super::found(&ns, &[bad], BYTES).await, 0, "{name}");
        assert_eq!(super::found(&ns, &[good], BYTES).await, 1, "{name}");
    }
    leaks::nothing_is_held(&client).await;
}

#[tokio::test]
async fn bytes_that_are_not_those_the_client_summed_are_not_stored() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let mut raw = Raw::connect(&node).await;
    let key = payload::key(1, 0);
    let block = payload::block(&key, BYTES);
    let sums: Vec<_> = block.chunks(64 << 10).map(crc32fast::hash).collect();
    let mut other = sums.clone();
    other[1] ^= 1;
    for wrong in [other, sums[..1].to_vec()] {
        let slot = raw.slot(ns.handle, &key, BYTES as u64).await;
        raw.write(vec![(slot, 0, block.clone())]).await.unwrap();
        let result = raw.commit(vec![(slot, wrong)]).await.unwrap().results.remove(0);
        assert_eq!(result.error.map(|e| e.kind).as_deref(), Some("checksum"));
        assert_eq!(super::found(&ns, std::slice::from_ref(&key), BYTES).await, 0);
    }
    let slot = raw.slot(ns.handle, &key, BYTES as u64).await;
    raw.write(vec![(slot, 0, block)]).await.unwrap();
    assert!(raw.commit(vec![(slot, sums)]).await.unwrap().results[0].error.is_none());
    assert_eq!(super::found(&ns, &[key], BYTES).await, 1);
    leaks::nothing_is_held(&client).await;
}

#[tokio::test]
async fn a_call_without_hello_is_refused_and_so_is_another_major_version() {
    let node = Node::start(Options::default());
    let mut blocks = BlocksClient::new(raw::channel(&node).await);
    let refused = blocks.stats(v1::StatsRequest { ctx: None }).await.unwrap_err();
    assert_eq!(kind_of(refused), convert::HELLO_REQUIRED);
    let mut future = raw::hello(InstanceId([1; 16]));
    future.major += 1;
    assert_eq!(kind_of(blocks.hello(future).await.unwrap_err()), "invalid_argument");
    for instance in [vec![], vec![1; 15], vec![1; 17]] {
        let hello = v1::HelloRequest { instance_id: instance.into(), ..raw::hello(InstanceId([1; 16])) };
        assert_eq!(kind_of(blocks.hello(hello).await.unwrap_err()), "invalid_argument");
    }
    blocks.hello(raw::hello(InstanceId([1; 16]))).await.unwrap();
    blocks.hello(raw::hello(InstanceId([1; 16]))).await.expect("hello is idempotent");
    assert_eq!(kind_of(blocks.hello(raw::hello(InstanceId([2; 16]))).await.unwrap_err()), "conflict");
    blocks.stats(v1::StatsRequest { ctx: None }).await.unwrap();
}

#[tokio::test]
async fn what_was_never_given_out_is_refused_by_its_kind() {
    let node = Node::start(Options::default());
    let mut raw = Raw::connect(&node).await;
    let handle = raw.namespace("ns", &formats::plain(4096)).await;
    let result = raw.commit(vec![(12345, Vec::new())]).await.unwrap().results.remove(0);
    assert_eq!(result.error.map(|e| e.kind).as_deref(), Some("expired"));
    let reply = raw.write(vec![(12345, 0, Bytes::from_static(b"x"))]).await.unwrap();
    assert_eq!(write_error(&reply), Some("expired"));
    let nowhere = Handle { namespace: NamespaceId(999), revision: Revision(1) };
    let refused = raw.reserve(nowhere, &[payload::key(1, 0)], 4096).await.unwrap_err();
    assert_eq!(kind_of(refused), "unknown_namespace");
    let part = v1::PutPart { group: 3, shard: 0, length: 4096 };
    let position = v1::PutPosition { key: payload::key(1, 0), parts: vec![part], token_ids: Vec::new() };
    let request = v1::ReserveRequest {
        handle: Some(convert::handle_to_proto(handle)),
        positions: vec![position],
        ..Default::default()
    };
    let reply = raw.blocks.reserve(request).await.unwrap().into_inner();
    let Some(v1::part_answer::Answer::Refused(detail)) = &reply.answers[0].answer else { panic!("{reply:?}") };
    assert_eq!(detail.kind, "invalid_argument");
}

#[tokio::test]
async fn a_batch_over_a_limit_names_the_limit() {
    let node =
        Node::start(Options { limits: "batch_keys_max = 64\nchunk_bytes_max = 65536\n".into(), ..Options::default() });
    let mut raw = Raw::connect(&node).await;
    let handle = raw.namespace("ns", &formats::any_size(1 << 20)).await;
    let keys = payload::chain(1, 65);
    let touch = v1::TouchRequest { ctx: None, handle: Some(convert::handle_to_proto(handle)), keys: keys.clone() };
    let refused = raw::detail(&raw.blocks.touch(touch).await.unwrap_err());
    assert_eq!(refused.kind, "too_large");
    assert_eq!(refused.fields.get("limit").map(String::as_str), Some("limits.batch_keys_max"), "{refused:?}");
    let slot = raw.slot(handle, &keys[0], 100_000).await;
    let refused = raw.write(vec![(slot, 0, Bytes::from(vec![0; 65_537]))]).await.unwrap_err();
    assert_eq!(kind_of(refused), "too_large");

    // The SDK knows the limits and splits by them.
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let keys = payload::chain(2, 200);
    super::store(&ns, &keys, 100_000, Class::Cache).await;
    assert_eq!(super::found(&ns, &keys, 100_000).await, 200);
}

/// Bytes that are no HTTP/2 at all, and HTTP/2 that is no protobuf, close their connection and nothing else.
#[tokio::test]
async fn garbage_on_the_port_harms_nobody() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, 4096, Class::Cache).await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\x16\x03\x01\x02",
        &[0xff; 4096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff",
    ] {
        let mut stream = tokio::net::TcpStream::connect(node.endpoint()).await.unwrap();
        let _ = stream.write_all(garbage).await; // the server may close first
        let _ = stream.shutdown().await;
    }
    assert_eq!(super::found(&ns, &keys, 4096).await, 4);
    leaks::nothing_is_held(&client).await;
}
