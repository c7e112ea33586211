//! Every sync and flush of the store has a test here that loses something when it is left out, and does not when it runs.

use kvkeep_core::words::Class;
use kvkeep_tiers::io::sim::SimOp;
use kvkeep_tiers::nvme::config::SyncPoint;
use kvkeep_tiers::nvme::header::{Header, PAGE_BYTES};
use kvkeep_tiers::nvme::{Keep, Read};

use crate::harness::{Rig, SEGMENT_BYTES, block, first_segment, settle};

const SEEDS: u64 = 24;

/// Runs `story` over many seeds, with the sync and without it. It says whether the promise was kept.
async fn red_without<F: Future<Output = bool>>(point: SyncPoint, story: impl Fn(Rig, u64) -> F) {
    for seed in 0..SEEDS {
        assert!(story(Rig::new(2, seed), seed).await, "seed {seed}: the promise is broken with every sync in place");
    }
    for seed in 0..SEEDS {
        if !story(Rig::new(2, seed).without(point), seed).await {
            return;
        }
    }
    panic!("nothing was lost without {point:?} in {SEEDS} seeds: the test does not see it");
}

#[tokio::test]
async fn a_durable_put_flushes_the_device() {
    red_without(SyncPoint::PutFlush, async |mut rig, seed| {
        let store = rig.open();
        let b = block(1, 1, 50_000, Class::Durable);
        let place = b.put(&store).await.unwrap();
        rig.cut(store, seed);
        matches!(b.get(&rig.open(), place).await, Read::Ok { .. })
    })
    .await;
}

#[tokio::test]
async fn a_durable_put_syncs_the_index() {
    red_without(SyncPoint::PutSync, async |mut rig, seed| {
        let store = rig.open();
        // The first put of a life syncs the sequence mark; the second shows its own sync.
        block(0, 1, 5_000, Class::Cache).put(&store).await.unwrap();
        let b = block(1, 1, 50_000, Class::Durable);
        let place = b.put(&store).await.unwrap();
        rig.cut(store, seed);
        matches!(b.get(&rig.open(), place).await, Read::Ok { .. })
    })
    .await;
}

#[tokio::test]
async fn a_class_that_rises_flushes_the_device() {
    red_without(SyncPoint::ClassFlush, async |mut rig, seed| {
        let store = rig.open();
        let b = block(1, 1, 50_000, Class::Cache);
        let place = b.put(&store).await.unwrap();
        store.set_class(&[b.copy_at(place)], Class::Durable, kvkeep_core::words::Keeper::Caller).await.unwrap();
        rig.cut(store, seed);
        matches!(b.get(&rig.open(), place).await, Read::Ok { .. })
    })
    .await;
}

#[tokio::test]
async fn a_class_that_rises_syncs_the_index() {
    red_without(SyncPoint::ClassSync, async |mut rig, seed| {
        let store = rig.open();
        let b = block(1, 1, 50_000, Class::Cache);
        let place = b.put(&store).await.unwrap();
        store.set_class(&[b.copy_at(place)], Class::Durable, kvkeep_core::words::Keeper::Caller).await.unwrap();
        rig.cut(store, seed);
        b.entry(&rig.open()).is_some_and(|e| e.class == Class::Durable)
    })
    .await;
}

/// Without the sync the freed block is back after the cut, in an extent that was given to another one meanwhile.
#[tokio::test]
async fn a_free_syncs_the_index_before_the_extent_is_reused() {
    red_without(SyncPoint::FreeSync, async |mut rig, seed| {
        let store = rig.open();
        let old = block(1, 1, 50_000, Class::Durable);
        let place = old.put(&store).await.unwrap();
        assert_eq!(store.free(&[old.copy_at(place)]).await.unwrap(), 1);
        let new = block(2, 2, 50_000, Class::Cache);
        new.put(&store).await.unwrap();
        rig.cut_index_short(store, seed);
        old.entry(&rig.open()).is_none()
    })
    .await;
}

/// Without the sync the index may name the superseded copy again, which a third block has overwritten.
#[tokio::test]
async fn a_superseded_copy_is_gone_from_the_index_before_its_extent_is_reused() {
    red_without(SyncPoint::SupersedeSync, async |mut rig, seed| {
        let store = rig.open();
        let (old, new) = (block(1, 1, 50_000, Class::Cache), block(1, 2, 50_000, Class::Cache));
        let old_place = old.put(&store).await.unwrap();
        store.flush_all().await.unwrap();
        new.put(&store).await.unwrap();
        settle(&store).await;
        let third = block(3, 3, 50_000, Class::Cache);
        let third_place = third.put(&store).await.unwrap();
        let reused = third_place.raw() >> 26 == old_place.raw() >> 26;
        assert!(reused, "the third block lies where the first one was");
        rig.cut_index_short(store, seed);
        old.entry(&rig.open()).is_none_or(|e| e.place != old_place)
    })
    .await;
}

/// An entry that the owner did not want at open must not be back at the next one.
#[tokio::test]
async fn an_open_syncs_what_it_dropped() {
    red_without(SyncPoint::OpenSync, async |mut rig, seed| {
        let store = rig.open();
        let b = block(1, 1, 50_000, Class::Durable);
        b.put(&store).await.unwrap();
        store.close().await.unwrap();
        drop(store);
        let (store, report) = rig.open_with(&mut |_| Keep::Drop);
        assert_eq!(report.dropped_unwanted, 1);
        rig.cut_index_short(store, seed);
        b.entry(&rig.open()).is_none()
    })
    .await;
}

/// Headers on the device may be newer than anything the index remembers; no sequence is used twice all the same.
#[tokio::test]
async fn a_sequence_is_never_used_twice() {
    red_without(SyncPoint::MarkSync, async |mut rig, seed| {
        let store = rig.open();
        for n in 0..5 {
            block(n, 1, 30_000, Class::Cache).put(&store).await.unwrap();
        }
        rig.cut_index_short(store, seed);
        let segment = rig.disk.contents(&first_segment());
        let newest = segment.chunks(PAGE_BYTES).filter_map(|page| Header::decode(page).ok()).map(|h| h.sequence).max();
        let store = rig.open();
        let b = block(9, 1, 30_000, Class::Cache);
        b.put(&store).await.unwrap();
        newest.is_none_or(|newest| b.entry(&store).unwrap().sequence > newest)
    })
    .await;
}

#[tokio::test]
async fn flush_all_flushes_the_device() {
    red_without(SyncPoint::AllFlush, async |mut rig, seed| {
        let store = rig.open();
        let b = block(1, 1, 50_000, Class::Cache);
        let place = b.put(&store).await.unwrap();
        store.flush_all().await.unwrap();
        rig.cut(store, seed);
        matches!(b.get(&rig.open(), place).await, Read::Ok { .. })
    })
    .await;
}

#[tokio::test]
async fn flush_all_syncs_the_index() {
    red_without(SyncPoint::AllSync, async |mut rig, seed| {
        let store = rig.open();
        let b = block(1, 1, 50_000, Class::Cache);
        let place = b.put(&store).await.unwrap();
        store.flush_all().await.unwrap();
        rig.cut(store, seed);
        matches!(b.get(&rig.open(), place).await, Read::Ok { .. })
    })
    .await;
}

/// A read in flight keeps its extent: a put that comes meanwhile lies elsewhere, and the read ends with the right bytes.
#[tokio::test]
async fn a_freed_extent_is_not_reused_while_it_is_read() {
    let rig = Rig::new(1, 1);
    let store = rig.open();
    let len = (SEGMENT_BYTES / 2) as u32 - PAGE_BYTES as u32;
    let old = block(1, 1, len, Class::Cache);
    let place = old.put(&store).await.unwrap();
    rig.disk.hold(&[SimOp::Read]);
    let reading = tokio::spawn({
        let (store, old) = (store.clone(), old.clone());
        async move { old.get(&store, place).await }
    });
    while rig.disk.held() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(store.free(&[old.copy_at(place)]).await.unwrap(), 1);
    assert_eq!(store.usage().leaving_bytes, u64::from(len) + PAGE_BYTES as u64);
    let new = block(2, 2, len, Class::Cache);
    let new_place = new.put(&store).await.unwrap();
    assert_ne!(new_place.raw() >> 26, place.raw() >> 26);
    rig.disk.release();
    assert!(matches!(reading.await.unwrap(), Read::Ok { .. }));
    assert_eq!(store.usage().leaving_bytes, 0);
    // Now it is free, and the next one fits.
    block(3, 3, len, Class::Cache).put(&store).await.unwrap();
    crate::harness::check(&store);
}
