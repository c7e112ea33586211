//! What a read compares, and what it does not touch.

use kvkeep_core::checksum::SUM_CHUNK_BYTES;
use kvkeep_core::error::ErrorKind;
use kvkeep_core::ids::{GroupId, Key, Revision, Version};
use kvkeep_core::words::Class;
use kvkeep_core::{BlockMeta, NvmePlace};
use kvkeep_tiers::io::IoBuf;
use kvkeep_tiers::nvme::{Expect, Read, padded};

use crate::harness::{Rig, block};

#[tokio::test]
async fn blocks_of_every_shape_come_back() {
    let rig = Rig::new(8, 1);
    let store = rig.open();
    for (n, len) in [1, 1023, 3776, 3777, 4096, 65_535, 65_536, 65_537, 200_000].into_iter().enumerate() {
        let b = block(n as u32, 1, len, Class::Cache);
        let place = b.put(&store).await.unwrap();
        b.must_read(&store, place).await;
    }
}

#[tokio::test]
async fn a_part_of_a_block_is_read_and_checked_alone() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 1, 200_000, Class::Durable);
    let place = b.put(&store).await.unwrap();
    for chunks in [0..1, 1..3, 2..4, 3..4, 0..4] {
        let (from, to) = (chunks.start * SUM_CHUNK_BYTES, (chunks.end * SUM_CHUNK_BYTES).min(200_000));
        let into = IoBuf::alloc(padded((to - from) as u32));
        let Read::Ok { payload, .. } = store.get_chunks(&b.expect(), place, chunks.clone(), into).await else {
            panic!("{chunks:?}")
        };
        assert!(payload.as_slice()[..to - from] == b.bytes[from..to], "{chunks:?}");
    }
    // Damage elsewhere does not touch what is asked for.
    rig.disk.flip_bit(&crate::harness::first_segment(), (4096 + 10) * 8);
    let into = || IoBuf::alloc(2 * SUM_CHUNK_BYTES);
    assert!(matches!(store.get_chunks(&b.expect(), place, 1..3, into()).await, Read::Ok { .. }));
    assert!(matches!(store.get_chunks(&b.expect(), place, 0..2, into()).await, Read::Corrupt(_)));
}

#[tokio::test]
async fn a_buffer_or_range_that_does_not_fit_is_refused() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 1, 100_000, Class::Cache);
    let place = b.put(&store).await.unwrap();
    for (chunks, bytes) in [(0..2, 4096), (0..3, 102_400), (1..1, 0), (5..9, 0), (0..usize::MAX, 102_400)] {
        let read = store.get_chunks(&b.expect(), place, chunks.clone(), IoBuf::alloc(bytes)).await;
        assert!(matches!(&read, Read::Io(e) if e.kind() == ErrorKind::InvalidArgument), "{chunks:?}: {read:?}");
    }
    b.must_read(&store, place).await;
}

/// A caller that is wrong about a block is told so, and the block is none the worse for it.
#[tokio::test]
async fn a_read_that_expects_another_block_is_stale_and_harms_nothing() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 5, 60_000, Class::Cache);
    let place = b.put(&store).await.unwrap();
    let right = b.expect();
    let mut other_id = right.id;
    other_id.group = GroupId(9);
    let mut other_handle = right.handle;
    other_handle.revision = Revision(2);
    let wrongs = [
        Expect { id: other_id, ..right.clone() },
        Expect { handle: other_handle, ..right.clone() },
        Expect { key: Some(Key::new(b"another").unwrap()), ..right.clone() },
        Expect { version: Version(6), ..right.clone() },
        Expect { len: right.len - 1, ..right.clone() },
    ];
    for wrong in wrongs {
        let read = store.get(&wrong, place, IoBuf::alloc(padded(wrong.len))).await;
        assert!(matches!(read, Read::Stale), "{wrong:?}: {read:?}");
    }
    b.must_read(&store, place).await;
    let no_key = Expect { key: None, ..right };
    assert!(matches!(store.get(&no_key, place, IoBuf::alloc(padded(60_000))).await, Read::Ok { .. }));
}

#[tokio::test]
async fn a_place_that_no_store_made_is_stale() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let b = block(1, 1, 60_000, Class::Cache);
    let place = b.put(&store).await.unwrap();
    for raw in [1, u64::MAX, place.raw() + 1, place.raw() + (1 << 26), place.raw() + (1 << 48)] {
        let read = b.get(&store, NvmePlace::from_raw(raw).unwrap()).await;
        assert!(matches!(read, Read::Stale), "{raw:#x}: {read:?}");
    }
    b.must_read(&store, place).await;
}

#[tokio::test]
async fn a_superseded_copy_is_stale_and_the_new_one_is_read() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let old = block(1, 1, 60_000, Class::Durable);
    let new = block(1, 2, 60_000, Class::Cache);
    let old_place = old.put(&store).await.unwrap();
    let new_place = new.put(&store).await.unwrap();
    assert!(matches!(old.get(&store, old_place).await, Read::Stale));
    new.must_read(&store, new_place).await;
    assert_eq!(new.entry(&store).unwrap().class, Class::Durable, "what was promised of the key holds");
    assert_eq!(store.free(&[old.copy_at(old_place)]).await.unwrap(), 0, "a late free of the old copy");
    new.must_read(&store, new_place).await;
}

/// Of a class that is never flushed: lost with the power is not damaged.
#[tokio::test]
async fn a_cache_block_torn_by_a_cut_is_a_miss_without_quarantine() {
    let mut torn = 0;
    for seed in 0..20 {
        let mut rig = Rig::new(2, seed);
        let store = rig.open();
        let b = block(1, 1, 60_000, Class::Cache);
        let place = b.put(&store).await.unwrap();
        // The index survives: a durable block elsewhere syncs it.
        let other = block(2, 1, 1, Class::Cache);
        let at = other.put(&store).await.unwrap();
        store.set_class(&[other.copy_at(at)], Class::Replicated, kvkeep_core::words::Keeper::Caller).await.unwrap();
        rig.disk = rig.disk.cut(seed);
        drop(store);
        let store = rig.open();
        match b.get(&store, place).await {
            Read::Ok { .. } => {}
            Read::Stale => torn += 1,
            other => panic!("{other:?}"),
        }
        assert_eq!(store.usage().quarantined_bytes, 0);
    }
    assert!(torn > 5, "the disk tears");
}

#[tokio::test]
async fn two_blocks_of_one_key_in_two_groups_are_two_blocks() {
    let rig = Rig::new(2, 1);
    let store = rig.open();
    let a = block(1, 1, 60_000, Class::Cache);
    let mut b = block(1, 2, 50_000, Class::Cache);
    b.meta = BlockMeta { id: kvkeep_core::BlockId { group: GroupId(1), ..b.meta.id }, ..b.meta };
    let (pa, pb) = (a.put(&store).await.unwrap(), b.put(&store).await.unwrap());
    a.must_read(&store, pa).await;
    b.must_read(&store, pb).await;
}
