//! Room: segments as they are needed, floors, the write budget, and frees of every kind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvkeep_core::error::ErrorKind;
use kvkeep_core::words::Class;
use kvkeep_tiers::nvme::Admission;

use crate::harness::{Rig, SEGMENT_BYTES, block, check, settle};

#[tokio::test]
async fn segments_are_made_as_they_are_needed_up_to_the_capacity() {
    let mut rig = Rig::new(4, 1);
    rig.config.capacity_bytes = 2 * SEGMENT_BYTES + SEGMENT_BYTES / 2;
    let store = rig.open();
    assert_eq!(store.usage().segments, 0);
    let mut stored = 0;
    let e = loop {
        assert!(stored < 100);
        match block(stored, 1, 60_000, Class::Cache).put(&store).await {
            Ok(_) => stored += 1,
            Err(e) => break e,
        }
    };
    assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::Full, true));
    assert_eq!((stored, store.usage().segments), (4 + 4 + 2, 3), "the last segment is half as large");
    assert_eq!(store.usage().segment_bytes, rig.config.capacity_bytes);
    assert_eq!(store.admit(60_000, Class::Durable), Admission::Full);
    check(&store);
}

#[tokio::test]
async fn the_filesystem_keeps_its_floor() {
    let mut rig = Rig::new(4, 1);
    // The simulated disk has twice the capacity.
    rig.config.keep_free_bytes = 8 * SEGMENT_BYTES - 2 * SEGMENT_BYTES - 1;
    let store = rig.open();
    block(1, 1, 200_000, Class::Cache).put(&store).await.unwrap();
    block(2, 1, 200_000, Class::Cache).put(&store).await.unwrap();
    let e = block(3, 1, 200_000, Class::Cache).put(&store).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Full);
    assert_eq!(store.usage().segments, 2);
}

#[tokio::test]
async fn a_block_larger_than_a_segment_can_never_be_stored() {
    let rig = Rig::new(4, 1);
    let store = rig.open();
    let e = block(1, 1, SEGMENT_BYTES as u32, Class::Cache).put(&store).await.unwrap_err();
    assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::TooLarge, false));
}

#[tokio::test]
async fn freed_room_is_used_again_without_end() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let mut live = std::collections::VecDeque::new();
    for n in 0..200 {
        let b = block(n, 1, 1000 + (n % 7) * 9000, Class::Cache);
        loop {
            match b.put(&store).await {
                Ok(place) => break live.push_back((b, place)),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Full);
                    let (b, place): (crate::harness::Block, _) = live.pop_front().expect("an empty device has room");
                    assert_eq!(store.free(&[b.copy_at(place)]).await.unwrap(), 1);
                }
            }
        }
    }
    for (b, place) in &live {
        b.must_read(&store, *place).await;
    }
    let copies: Vec<_> = live.iter().map(|(b, place)| b.copy_at(*place)).collect();
    assert_eq!(store.free(&copies).await.unwrap(), copies.len() as u64);
    let u = store.usage();
    assert_eq!((u.entries, u.used_bytes, u.free_bytes), (0, 0, u.segment_bytes));
    assert_eq!(u.largest_free_bytes, SEGMENT_BYTES, "everything merged again");
    check(&store);
}

#[tokio::test]
async fn a_copy_is_freed_once() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 1, 60_000, Class::Cache);
    let place = b.put(&store).await.unwrap();
    let copy = b.copy_at(place);
    assert_eq!(store.free(&[copy, copy]).await.unwrap(), 1);
    assert_eq!(store.free(&[copy]).await.unwrap(), 0);
    assert_eq!(store.set_class(&[copy], Class::Durable, kvkeep_core::words::Keeper::Caller).await.unwrap(), 0);
    check(&store);
}

#[tokio::test]
async fn many_durable_puts_share_a_sync() {
    let rig = Rig::new(40, 1);
    let store = rig.open();
    block(999, 1, 1, Class::Durable).put(&store).await.unwrap();
    let (syncs, flushes, writes) = (rig.index.syncs(), rig.disk.counts().flushes, rig.disk.counts().writes);
    // A sync takes until all of them are written: they come to the index while it lasts.
    rig.index.hold_syncs(true);
    let puts: Vec<_> = (0..64)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { block(n, 1, 20_000, Class::Durable).put(&store).await })
        })
        .collect();
    while rig.disk.counts().writes - writes < 64 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    rig.index.hold_syncs(false);
    for put in puts {
        put.await.unwrap().unwrap();
    }
    assert!(rig.index.syncs() - syncs < 64, "{} syncs", rig.index.syncs() - syncs);
    assert!(rig.disk.counts().flushes - flushes < 64 + 40, "one flush for each put, and one for each new segment");
    settle(&store).await;
    check(&store);
}

#[tokio::test]
async fn the_write_budget_refuses_what_can_wait_and_nothing_durable() {
    let mut rig = Rig::new(8, 1);
    let now = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&now);
    rig.config.clock = Arc::new(move || Duration::from_secs(clock.load(Ordering::Relaxed)));
    rig.config.write_budget_bytes_per_day = Some(24 * 130 * 1024);
    let store = rig.open();
    let mut admitted = 0;
    while store.admit(60_000, Class::Cache) == Admission::Yes {
        block(admitted, 1, 60_000, Class::Cache).put(&store).await.unwrap();
        admitted += 1;
        assert!(admitted < 10);
    }
    assert_eq!(admitted, 3, "an hour's part is 130 KiB, and a block begins as long as any of it is left");
    assert_eq!(store.admit(60_000, Class::Cache), Admission::OverBudget);
    assert_eq!(store.admit(60_000, Class::Replicated), Admission::OverBudget);
    assert_eq!(store.admit(60_000, Class::Durable), Admission::Yes);
    block(50, 1, 60_000, Class::Durable).put(&store).await.unwrap();
    assert_eq!(store.usage().budget_left_bytes, Some(0));
    now.store(2 * 3600, Ordering::Relaxed);
    assert_eq!(store.admit(60_000, Class::Cache), Admission::Yes);
}

/// Whoever asked goes away in the middle: the put ends all the same, and its extent is either the block's or free.
#[tokio::test]
async fn a_put_whose_caller_goes_away_leaks_nothing() {
    for polls in 0..12 {
        let rig = Rig::new(2, polls);
        let store = rig.open();
        let b = block(1, 1, 60_000, Class::Durable);
        let mut put = Box::pin(b.put(&store));
        for _ in 0..polls {
            tokio::select! { biased; _ = &mut put => break, () = tokio::task::yield_now() => {} }
        }
        drop(put);
        store.close().await.unwrap();
        check(&store);
        if let Some(e) = b.entry(&store) {
            b.must_read(&store, e.place).await;
        }
    }
}

#[tokio::test]
async fn a_read_whose_caller_goes_away_leaks_nothing() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 1, 60_000, Class::Cache);
    let place = b.put(&store).await.unwrap();
    {
        let mut get = Box::pin(b.get(&store, place));
        tokio::select! { biased; _ = &mut get => {}, () = tokio::task::yield_now() => {} }
    }
    assert_eq!(store.free(&[b.copy_at(place)]).await.unwrap(), 1);
    let u = store.usage();
    assert_eq!((u.leaving_bytes, u.free_bytes), (0, u.segment_bytes));
}
