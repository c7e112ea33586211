//! What the device does wrong, one fault at a time: nothing wrong is returned, and what can go on goes on.

use kvkeep_core::error::ErrorKind;
use kvkeep_core::words::Class;
use kvkeep_tiers::io::sim::{Fault, FaultRates, SimOp};
use kvkeep_tiers::nvme::mem::MemFault;
use kvkeep_tiers::nvme::{Admission, Doubt, Keep, Read};

use crate::harness::{Block, Rig, block, check, first_segment, settle};

fn durable(n: u32) -> Block {
    block(n, u64::from(n) + 1, 100_000, Class::Durable)
}

#[tokio::test]
async fn a_write_error_fails_the_put_and_takes_its_units_out_of_use() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    rig.disk.inject(SimOp::Write, 0, Fault::Error);
    let e = durable(1).put(&store).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io);
    assert_eq!(store.usage().quarantined_bytes, 26 * 4096);
    let place = durable(1).put(&store).await.unwrap();
    durable(1).must_read(&store, place).await;
    check(&store);
}

#[tokio::test]
async fn a_full_device_fails_the_put_and_leaves_no_trace() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    rig.disk.inject(SimOp::Write, 0, Fault::NoSpace);
    let e = durable(1).put(&store).await.unwrap_err();
    assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::Full, true));
    let u = store.usage();
    assert_eq!((u.used_bytes, u.quarantined_bytes, u.entries), (0, 0, 0));
}

#[tokio::test]
async fn a_segment_that_cannot_be_made_is_full_and_tried_again_later() {
    let mut rig = Rig::new(2, 1);
    let now = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let clock = now.clone();
    rig.config.clock =
        std::sync::Arc::new(move || std::time::Duration::from_secs(clock.load(std::sync::atomic::Ordering::Relaxed)));
    let store = rig.open();
    rig.disk.inject(SimOp::Create, 0, Fault::NoSpace);
    assert_eq!(durable(1).put(&store).await.unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(store.admit(100_000, Class::Cache), Admission::Full);
    assert_eq!(durable(1).put(&store).await.unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(rig.disk.counts().creates, 1, "the filesystem was asked once");
    now.store(2, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(store.admit(100_000, Class::Cache), Admission::Yes);
    durable(1).put(&store).await.unwrap();
}

#[tokio::test]
async fn a_failed_flush_ends_writing_and_not_reading() {
    let mut rig = Rig::new(2, 1);
    let store = rig.open();
    let place = durable(1).put(&store).await.unwrap();
    rig.disk.inject(SimOp::Flush, 0, Fault::Error);
    assert_eq!(durable(2).put(&store).await.unwrap_err().kind(), ErrorKind::Io);
    assert!(store.usage().poisoned);
    assert_eq!(store.admit(1000, Class::Durable), Admission::Poisoned);
    for refused in [
        durable(3).put(&store).await.map(drop),
        block(4, 1, 1000, Class::Cache).put(&store).await.map(drop),
        store.free(&[durable(1).copy_at(place)]).await.map(drop),
        store
            .set_class(&[durable(1).copy_at(place)], Class::Durable, kvkeep_core::words::Keeper::Caller)
            .await
            .map(drop),
        store.flush_all().await,
    ] {
        let e = refused.unwrap_err();
        assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::Io, false), "{e}");
    }
    durable(1).must_read(&store, place).await;
    assert!(store.close().await.is_err());
    // A new life, after whatever the device kept: what was acknowledged is there, and writing goes on.
    rig.cut(store, 3);
    let store = rig.open();
    durable(1).must_read(&store, place).await;
    durable(2).put(&store).await.unwrap();
}

#[tokio::test]
async fn a_failed_log_sync_or_index_write_ends_writing_and_not_reading() {
    for fault in [MemFault::Sync, MemFault::Write] {
        let rig = Rig::new(2, 1);
        let store = rig.open();
        let place = durable(1).put(&store).await.unwrap();
        rig.index.fail_next(fault);
        assert_eq!(durable(2).put(&store).await.unwrap_err().kind(), ErrorKind::Io, "{fault:?}");
        assert!(store.usage().poisoned, "{fault:?}");
        assert_eq!(durable(3).put(&store).await.unwrap_err().kind(), ErrorKind::Io, "{fault:?}");
        durable(1).must_read(&store, place).await;
    }
}

#[tokio::test]
async fn an_index_that_cannot_be_read_fails_the_put_and_gives_its_extent_back() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    durable(1).put(&store).await.unwrap();
    rig.index.fail_next(MemFault::Get);
    assert_eq!(durable(2).put(&store).await.unwrap_err().kind(), ErrorKind::Io);
    assert!(!store.usage().poisoned);
    check(&store);
    durable(2).put(&store).await.unwrap();
}

#[tokio::test]
async fn a_read_error_says_nothing_of_the_block() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let place = durable(1).put(&store).await.unwrap();
    rig.disk.inject(SimOp::Read, 0, Fault::Error);
    assert!(matches!(durable(1).get(&store, place).await, Read::Io(e) if e.kind() == ErrorKind::Io));
    durable(1).must_read(&store, place).await;
}

#[tokio::test]
async fn short_and_interrupted_transfers_are_finished() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    rig.disk.set_rates(FaultRates { interrupted: 300, short: 300, delayed: 300, ..FaultRates::default() });
    for n in 0..10 {
        let place = durable(n).put(&store).await;
        if let Ok(place) = place {
            durable(n).must_read(&store, place).await;
        }
    }
}

/// The device is right and the way to it was wrong, once: the second look finds the block.
#[tokio::test]
async fn a_bit_that_flips_on_the_way_costs_nothing() {
    for skip in 0..2 {
        for fault in [Fault::BitFlip, Fault::Misdirected] {
            let rig = Rig::new(2, 1);
            let store = rig.open();
            let place = durable(1).put(&store).await.unwrap();
            rig.disk.inject(SimOp::Read, skip, fault);
            durable(1).must_read(&store, place).await;
        }
    }
}

#[tokio::test]
async fn a_bit_that_flipped_on_the_device_is_corruption_and_its_extent_stays_out_of_use() {
    // Those of the version, too: a device of another version is not opened, so within one it is damage.
    let (version_bit, header_bit, payload_bit) = (8 * 8 + 1, 100 * 8, (4096 + 70_000) * 8 + 3);
    for (bit, chunk) in [(version_bit, None), (header_bit, None), (payload_bit, Some(1))] {
        let rig = Rig::new(2, 1);
        let store = rig.open();
        let place = durable(1).put(&store).await.unwrap();
        rig.disk.flip_bit(&first_segment(), bit);
        match durable(1).get(&store, place).await {
            Read::Corrupt(Doubt::Header(_)) => assert_eq!(chunk, None),
            Read::Corrupt(Doubt::Chunk(n)) => assert_eq!(chunk, Some(n)),
            other => panic!("bit {bit} is {other:?}"),
        }
        assert!(matches!(durable(1).get(&store, place).await, Read::Stale));
        assert_eq!(store.free(&[durable(1).copy_at(place)]).await.unwrap(), 0);
        let u = store.usage();
        assert_eq!((u.entries, u.quarantined_bytes, u.used_bytes), (0, 26 * 4096, 0));
        check(&store);

        // It stays so over restarts, until the operator says otherwise.
        store.close().await.unwrap();
        drop(store);
        let (store, report) = rig.open_with(&mut |_| panic!("a quarantined block is shown"));
        assert_eq!((report.quarantined, store.usage().quarantined_bytes), (1, 26 * 4096));
        assert_eq!(store.clear_quarantine().await.unwrap(), 1);
        assert_eq!(store.usage().quarantined_bytes, 0);
        check(&store);
        drop(store);
        assert_eq!(rig.open_with(&mut |_| Keep::Yes).1.quarantined, 0);
    }
}

#[tokio::test]
async fn a_flipped_bit_behind_a_small_payload_harms_nobody() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 1, 1000, Class::Durable);
    let place = b.put(&store).await.unwrap();
    rig.disk.flip_bit(&first_segment(), 4000 * 8);
    b.must_read(&store, place).await;
    rig.disk.flip_bit(&first_segment(), 700 * 8);
    assert!(matches!(b.get(&store, place).await, Read::Corrupt(Doubt::Chunk(0))));
}

/// The device swallowed the write, or put it elsewhere: never wrong bytes, and a scrub finds it.
#[tokio::test]
async fn a_lost_or_misdirected_write_is_never_a_hit() {
    for fault in [Fault::Lost, Fault::Misdirected, Fault::BitFlip] {
        let rig = Rig::new(2, 7);
        let store = rig.open();
        let mut places = Vec::new();
        for n in 0..4 {
            if n == 2 {
                rig.disk.inject(SimOp::Write, 0, fault);
            }
            places.push(durable(n).put(&store).await.unwrap());
        }
        let report = store.scrub(None, 100).await.unwrap();
        assert_eq!(report.checked, 4);
        assert!(!report.faults.is_empty(), "{fault:?} was not found");
        for (n, place) in places.iter().enumerate() {
            let b = durable(n as u32);
            let faulty = report.faults.iter().any(|(copy, _)| copy.id == b.meta.id);
            let read = b.get(&store, *place).await;
            assert_eq!(matches!(read, Read::Ok { .. }), !faulty, "block {n}: {read:?} after {fault:?}");
        }
        check(&store);
    }
}

#[tokio::test]
async fn bytes_that_are_not_what_was_summed_are_not_written() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = durable(1);
    let mut buf = b.buffer();
    buf.as_mut_slice()[99_999] ^= 1;
    assert_eq!(store.put(&b.meta, buf, true).await.unwrap_err().kind(), ErrorKind::Checksum);
    assert_eq!((rig.disk.counts().writes, store.usage().used_bytes), (0, 0));
}

#[tokio::test]
async fn a_put_whose_lengths_disagree_is_refused() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = durable(1);
    for wrong in [
        store.put(&b.meta, kvkeep_tiers::io::IoBuf::alloc(4096), true).await,
        store.put(&kvkeep_core::BlockMeta { len: 0, ..b.meta.clone() }, b.buffer(), true).await,
        store.put(&kvkeep_core::BlockMeta { sums: Default::default(), ..b.meta.clone() }, b.buffer(), true).await,
    ] {
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}

/// Puts, gets and frees side by side on an unkind device, then the power fails at any moment: what was acknowledged
/// durable is there and right, nothing wrong was ever returned, no unit is lost or in two blocks.
#[test]
fn operations_in_flight_at_a_cut_leave_what_was_acknowledged() {
    for seed in 0..40 {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut rig = Rig::new(6, seed);
            let store = rig.open();
            rig.disk.set_rates(FaultRates {
                interrupted: 50,
                short: 50,
                delayed: 500,
                write_error: 20,
                read_error: 20,
                ..FaultRates::default()
            });
            let mut tasks = Vec::new();
            for n in 0..16u32 {
                let store = store.clone();
                tasks.push(tokio::spawn(async move {
                    let mut acked = None;
                    for round in 0..4u64 {
                        let class = if (u64::from(n) + round) % 2 == 0 { Class::Durable } else { Class::Cache };
                        let b = block(n, round + 1, 10_000 + n * 3000, class);
                        let Ok(place) = b.put(&store).await else { continue };
                        let read = b.get(&store, place).await;
                        assert!(matches!(read, Read::Ok { .. } | Read::Io(_)), "block {n} is {read:?}");
                        acked = Some((b, place));
                        if round == 1 && n % 3 == 0 {
                            let (b, place) = acked.take().unwrap();
                            match store.free(&[b.copy_at(place)]).await {
                                Ok(freed) => assert_eq!(freed, 1),
                                Err(_) => break,
                            }
                        }
                    }
                    acked
                }));
            }
            for _ in 0..seed * 40 {
                tokio::task::yield_now().await;
            }
            let after = rig.disk.cut(seed);
            let mut acked = Vec::new();
            for task in tasks {
                acked.push(task.await.unwrap());
            }
            settle_or_poisoned(&store).await;
            check_units(&store);
            drop(store);
            rig.index.cut(0);
            rig.disk = after;
            let store = rig.open();
            for (n, acked) in acked.iter().enumerate() {
                let entry = block(n as u32, 0, 1, Class::Cache).entry(&store);
                if let Some((b, place)) = acked
                    && entry.as_ref().is_some_and(|e| e.place == *place && e.class == Class::Durable)
                {
                    b.must_read(&store, *place).await;
                } else if let Some((b, _)) = acked {
                    let lost = b.meta.class == Class::Durable && entry.is_none();
                    assert!(!lost, "seed {seed}: durable block {n} is gone");
                }
            }
            let mut cursor = None;
            loop {
                let report = store.scrub(cursor, 5).await.unwrap();
                for (copy, fault) in &report.faults {
                    assert_eq!(*fault, kvkeep_tiers::nvme::ScrubFault::Stale, "seed {seed}: {copy:?}");
                }
                cursor = report.next;
                if cursor.is_none() {
                    break;
                }
            }
            settle(&store).await;
            check(&store);
        });
    }
}

async fn settle_or_poisoned(store: &kvkeep_tiers::nvme::NvmeStore) {
    let _ = store.set_heat(&[]).await;
}

fn check_units(store: &kvkeep_tiers::nvme::NvmeStore) {
    store.check_space().unwrap();
}
