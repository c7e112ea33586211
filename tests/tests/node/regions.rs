//! Bytes that do not travel: regions that the server fills and empties itself, and slots that clients read in place.

use std::time::Duration;

use kvkeep_client::{Call, GetItem, MatchQuery, Place, Put, PutPosition, Region, WayWish, Wire};
use kvkeep_core::{Class, RequestId, Tier};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

const BYTES: usize = 1 << 20;

/// A region with one block per place.
fn region(blocks: usize) -> (Region, Vec<Place>) {
    let region = Region::new(blocks * BYTES).unwrap();
    // SAFETY: each test gives a place to one call at a time and looks at the bytes when it is answered.
    let places = (0..blocks).map(|n| unsafe { region.place(n * BYTES, BYTES) }).collect();
    (region, places)
}

fn block_at(region: &Region, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    region.read(n * BYTES, &mut bytes);
    bytes
}

/// Put out of a region, get into another, on every way; every byte is compared.
#[tokio::test]
async fn blocks_go_out_of_a_region_and_into_another() {
    let node = Node::start(Options::default());
    for (chain, wire) in [(1, Wire::Socket), (2, Wire::Port), (3, Wire::Grpc)] {
        let client = node.client_with(|c| c.way = WayWish::Only(wire)).await;
        assert_eq!(client.way().unwrap().wire, wire);
        let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
        let keys = payload::chain(chain, 6);
        let (from, places) = region(6);
        for (n, key) in keys.iter().enumerate() {
            from.write(n * BYTES, &payload::block(key, BYTES));
        }
        let positions = keys.iter().cloned().zip(places).map(|(key, place)| PutPosition::of(key, place)).collect();
        let outcomes = ns.put_from(&Put { positions, ..Put::default() }, &Call::default()).await.unwrap();
        assert!(outcomes.len() == 6 && outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
        assert_eq!(super::found(&ns, &keys, BYTES).await, 6);
        let (into, places) = region(6);
        let mut items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
        items[5] = GetItem::of(payload::key(99, 99));
        let got = ns.get_into_region(&items, &places, None, &Call::default()).await.unwrap();
        for n in 0..5 {
            assert!(got[n].is_hit() && got[n].len == BYTES && !got[n].in_doubt, "{:?}", got[n]);
            assert!(block_at(&into, n) == payload::block(&keys[n], BYTES), "block {n} over {wire:?}");
        }
        assert!(!got[5].is_hit());
        assert!(block_at(&into, 5).iter().all(|b| *b == 0), "a miss touches nothing");
        leaks::nothing_is_held(&client).await;
    }
}

/// A block of many pieces, as an engine has it: two areas, a run per layer each.
#[tokio::test]
async fn a_block_lies_in_runs() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let (run, layers) = (8192, 64);
    let area = |region: &Region, block: usize| {
        // SAFETY: as in `region`.
        unsafe {
            region.strided(block * run, run, 2 * run, layers).and(region.strided(
                BYTES + block * run,
                run,
                2 * run,
                layers,
            ))
        }
    };
    let keys = payload::chain(1, 2);
    let (from, into) = (Region::new(2 * BYTES).unwrap(), Region::new(2 * BYTES).unwrap());
    let blocks: Vec<_> = keys.iter().map(|key| payload::block(key, BYTES)).collect();
    for (block, bytes) in blocks.iter().enumerate() {
        for (n, piece) in bytes.chunks(run).enumerate() {
            let (half, layer) = (n / layers as usize, n % layers as usize);
            from.write(half * BYTES + layer * 2 * run + block * run, piece);
        }
    }
    let positions = keys.iter().enumerate().map(|(n, key)| PutPosition::of(key.clone(), area(&from, n))).collect();
    let outcomes = ns.put_from(&Put { positions, ..Put::default() }, &Call::default()).await.unwrap();
    assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    assert_eq!(super::found(&ns, &keys, BYTES).await, 2);
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    let places = [area(&into, 0), area(&into, 1)];
    let got = ns.get_into_region(&items, &places, None, &Call::default()).await.unwrap();
    assert!(got.iter().all(|g| g.is_hit()), "{got:?}");
    let (mut a, mut b) = (vec![0; 2 * BYTES], vec![1; 2 * BYTES]);
    from.read(0, &mut a);
    into.read(0, &mut b);
    assert!(a == b);
}

/// Stored, pushed out of DRAM, read into a region: the block is served from NVMe without being brought up.
#[tokio::test]
async fn a_block_on_nvme_goes_straight_into_its_region() {
    let node = Node::start(Options { arena_bytes: 64 << 20, nvme_bytes: 512 << 20, ..Options::default() });
    let client = node.client_with(|c| c.way = WayWish::Only(Wire::Socket)).await;
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let keys = payload::chain(1, 8);
    super::store(&ns, &keys, BYTES, Class::Durable).await;
    for chain in 2..14 {
        super::store(&ns, &payload::chain(chain, 8), BYTES, Class::Durable).await;
    }
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    let (into, places) = region(8);
    let got = ns.get_into_region(&items, &places, None, &Call::default()).await.unwrap();
    for n in 0..8 {
        assert!(got[n].is_hit(), "{:?}", got[n]);
        assert!(block_at(&into, n) == payload::block(&keys[n], BYTES), "block {n}");
    }
    let straight = client.stats(&Call::default()).await.unwrap().counters["kvkeep_get_straight_parts_total"];
    let below = got.iter().filter(|g| g.tier == Some(Tier::Nvme)).count();
    assert!(straight > 0 && straight as usize == below, "{straight} of {below} past the arena");
}

/// What a mapped block shows is what was put; it is held under its lease, and let go with it.
#[tokio::test]
async fn blocks_are_read_in_place() {
    let node = Node::start(Options::default());
    let client = node.client_with(|c| c.way = WayWish::Only(Wire::Socket)).await;
    let way = client.way().unwrap();
    assert!(way.mapped && way.wire == Wire::Socket, "{way:?}");
    let ns = super::namespace(&client, &formats::plain(BYTES as u64)).await;
    let keys = payload::chain(1, 9);
    super::store(&ns, &keys[..8], BYTES, Class::Cache).await;
    let call = Call::of(RequestId::new(b"mapped").unwrap());
    let query = MatchQuery::of(keys.clone()).leased(Duration::from_secs(30));
    let mapped = ns.match_mapped(&query, &call).await.unwrap();
    assert_eq!((mapped.found.boundary_positions, mapped.parts.len()), (8, 8));
    for part in &mapped.parts {
        let block = part.block.as_ref().expect("everything is in DRAM");
        let mut bytes = vec![0; block.len()];
        assert!(block.copy_to(&mut bytes));
        assert!(bytes[..] == payload::block(&keys[part.item], BYTES)[..], "block {}", part.item);
    }
    let gauge = |s: &kvkeep_client::wire::StatsReply| s.counters["kvkeep_mapped_bytes"];
    assert_eq!(gauge(&client.stats(&Call::default()).await.unwrap()), 8 * BYTES as u64);
    // A match that ends another lease first, and holds half as much.
    let half = MatchQuery { release: mapped.found.lease_id(), ..MatchQuery::of(keys[..4].to_vec()) };
    let call = Call::of(RequestId::new(b"then").unwrap());
    let then = ns.match_mapped(&half.leased(Duration::from_secs(30)), &call).await.unwrap();
    assert_eq!(then.parts.len(), 4);
    let stats = client.stats(&Call::default()).await.unwrap();
    assert_eq!((gauge(&stats), stats.leases), (4 * BYTES as u64, 1));
    client.post_release(then.found.lease_id().unwrap(), &call).await;
    leaks::eventually(&client, "the slots are let go", |s| gauge(s) == 0).await;
    leaks::nothing_is_held(&client).await;
}
