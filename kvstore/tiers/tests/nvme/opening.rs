//! What an open finds after things went wrong while the store was down.

use std::ops::ControlFlow;

use kvkeep_core::error::ErrorKind;
use kvkeep_core::words::Class;
use kvkeep_tiers::nvme::entry::{INDEX_KEY_BYTES, IndexKey};
use kvkeep_tiers::nvme::{Heat, Index, IndexEntry, Keep, NvmeStore, Read, SegmentNo};

use crate::harness::{Block, Rig, SEGMENT_BYTES, block, check, first_segment};

async fn filled(rig: &Rig, blocks: u32) -> Vec<(Block, kvkeep_core::NvmePlace)> {
    let store = rig.open();
    let mut all = Vec::new();
    for n in 0..blocks {
        let b = block(n, 1, 60_000, Class::Durable);
        let place = b.put(&store).await.unwrap();
        all.push((b, place));
    }
    store.close().await.unwrap();
    all
}

fn entries(rig: &Rig) -> Vec<(IndexKey, Vec<u8>)> {
    let mut all = Vec::new();
    rig.index
        .scan(&[], &mut |k, v| {
            if k.len() == INDEX_KEY_BYTES {
                all.push((k.try_into().unwrap(), v.to_vec()));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    all
}

async fn readable(store: &NvmeStore, blocks: &[(Block, kvkeep_core::NvmePlace)]) -> usize {
    let mut right = 0;
    for (b, place) in blocks {
        match b.get(store, *place).await {
            Read::Ok { .. } => right += 1,
            Read::Stale => {}
            other => panic!("{other:?}"),
        }
    }
    right
}

#[tokio::test]
async fn every_block_is_shown_once_with_all_that_is_known_of_it() {
    let rig = Rig::new(4, 1);
    let blocks = filled(&rig, 10).await;
    let store = rig.open();
    let (b, place) = &blocks[4];
    let heat = Heat { accesses: 7, age_s: 3600 };
    assert_eq!(store.set_heat(&[(b.copy_at(*place), heat)]).await.unwrap(), 1);
    store.close().await.unwrap();
    drop(store);
    let mut shown: Vec<IndexEntry> = Vec::new();
    let (store, report) = rig.open_with(&mut |e| {
        shown.push(e.clone());
        Keep::Yes
    });
    assert_eq!((report.entries, shown.len()), (10, 10));
    assert!(shown.is_sorted_by_key(IndexEntry::index_key));
    for (n, (b, place)) in blocks.iter().enumerate() {
        let e = shown.iter().find(|e| e.id == b.meta.id).unwrap();
        assert_eq!((e.place, e.len, e.version, &e.key), (*place, b.meta.len, b.meta.version, &b.meta.key));
        assert_eq!(e.heat, if n == 4 { heat } else { Heat::default() });
        b.must_read(&store, *place).await;
    }
}

#[tokio::test]
async fn losing_the_index_empties_the_device() {
    let rig = Rig::new(4, 1);
    let blocks = filled(&rig, 10).await;
    let empty = Rig { index: Default::default(), disk: rig.disk.clone(), config: rig.config.clone() };
    let (store, report) = empty.open_with(&mut |_| panic!("a block came back from its header"));
    assert_eq!((report.entries, report.segments), (0, 3));
    assert_eq!(store.usage().free_bytes, 3 * SEGMENT_BYTES);
    assert_eq!(readable(&store, &blocks).await, 0);
}

#[tokio::test]
async fn a_segment_deleted_while_down_takes_its_blocks_and_no_others() {
    let rig = Rig::new(4, 1);
    let blocks = filled(&rig, 10).await;
    rig.disk.lose(&first_segment());
    let (store, report) = rig.open_with(&mut |_| Keep::Yes);
    assert_eq!((report.dropped_out_of_range, report.entries), (4, 6));
    assert_eq!(readable(&store, &blocks).await, 6);
    // Its number is used again; nothing of the past is there.
    for n in 20..24 {
        block(n, 1, 60_000, Class::Cache).put(&store).await.unwrap();
    }
    assert_eq!(readable(&store, &blocks).await, 6);
    check(&store);
}

#[tokio::test]
async fn a_segment_truncated_while_down_keeps_what_it_still_has() {
    let rig = Rig::new(4, 1);
    let blocks = filled(&rig, 10).await;
    rig.disk.truncate(&first_segment(), SEGMENT_BYTES / 2 + 512);
    let (store, report) = rig.open_with(&mut |_| Keep::Yes);
    assert_eq!((report.dropped_out_of_range, report.entries), (2, 8));
    assert_eq!(readable(&store, &blocks).await, 8);
    check(&store);
    drop(store);
    rig.disk.truncate(&first_segment(), 100);
    let (store, report) = rig.open_with(&mut |_| Keep::Yes);
    assert_eq!((report.dropped_out_of_range, report.segments), (2, 2));
    assert_eq!(readable(&store, &blocks).await, 6);
}

#[tokio::test]
async fn a_flipped_bit_in_an_index_value_loses_that_block_only() {
    let rig = Rig::new(4, 1);
    let blocks = filled(&rig, 6).await;
    for (key, value) in entries(&rig) {
        for bit in [0, 17, 64, 130, 200, 300, 8 * value.len() - 1] {
            let mut flipped = value.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            rig.index.tamper(&key, Some(flipped));
            let (store, report) = rig.open_with(&mut |_| Keep::Yes);
            assert_eq!((report.dropped_damaged, report.entries), (1, 5), "bit {bit}");
            assert_eq!(readable(&store, &blocks).await, 5);
            drop(store);
            rig.index.tamper(&key, Some(value.clone()));
        }
    }
    let store = rig.open();
    assert_eq!(readable(&store, &blocks).await, 6);
}

/// The leftover of a freed block over an extent that was given to another: the newer one stays, whichever comes first.
#[tokio::test]
async fn a_stale_entry_over_a_reused_extent_yields_to_the_block_that_is_there() {
    for stale in 0..8u32 {
        let rig = Rig::new(1, 1);
        let store = rig.open();
        let old = block(stale, 1, 60_000, Class::Durable);
        let old_place = old.put(&store).await.unwrap();
        let leftover = entries(&rig).remove(0);
        store.free(&[old.copy_at(old_place)]).await.unwrap();
        // Two small ones now lie where the old one was.
        let mut blocks = Vec::new();
        for n in 10..12 {
            let b = block(n, 2, 25_000, Class::Durable);
            let place = b.put(&store).await.unwrap();
            blocks.push((b, place));
        }
        store.close().await.unwrap();
        drop(store);
        rig.index.tamper(&leftover.0, Some(leftover.1));

        let mut shown = Vec::new();
        let (store, report) = rig.open_with(&mut |e| {
            shown.push(e.id);
            Keep::Yes
        });
        assert_eq!((report.dropped_overlapping, report.entries), (1, 2));
        assert_eq!(readable(&store, &blocks).await, 2);
        assert!(matches!(old.get(&store, old_place).await, Read::Stale));
        // Whoever was shown the leftover is told to forget it.
        let shown_stale = shown.contains(&old.meta.id);
        assert_eq!(report.retracted.iter().map(|c| c.id).collect::<Vec<_>>(), vec![old.meta.id; shown_stale as usize]);
        check(&store);
        drop(store);
        assert_eq!(rig.open_with(&mut |_| Keep::Yes).1.dropped_overlapping, 0, "it is gone for good");
    }
}

/// The same leftover, found by a read because nothing overlaps it: another valid header is no corruption.
#[tokio::test]
async fn a_stale_entry_that_a_read_finds_is_dropped_without_quarantine() {
    let rig = Rig::new(1, 1);
    let store = rig.open();
    let old = block(1, 1, 60_000, Class::Durable);
    let old_place = old.put(&store).await.unwrap();
    let leftover = entries(&rig).remove(0);
    store.free(&[old.copy_at(old_place)]).await.unwrap();
    let new = block(2, 2, 60_000, Class::Durable);
    let new_place = new.put(&store).await.unwrap();
    store.free(&[new.copy_at(new_place)]).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    rig.index.tamper(&leftover.0, Some(leftover.1));
    let store = rig.open();
    assert!(old.entry(&store).is_some());
    assert!(matches!(old.get(&store, old_place).await, Read::Stale));
    assert!(old.entry(&store).is_none());
    let u = store.usage();
    assert_eq!((u.entries, u.used_bytes, u.quarantined_bytes), (0, 0, 0));
}

#[tokio::test]
async fn blocks_of_a_namespace_that_is_gone_are_dropped_at_open() {
    let rig = Rig::new(4, 1);
    let blocks = filled(&rig, 6).await;
    let gone = blocks[2].0.meta.id;
    let (store, report) = rig.open_with(&mut |e| if e.id == gone { Keep::Drop } else { Keep::Yes });
    assert_eq!((report.dropped_unwanted, report.entries), (1, 5));
    assert!(matches!(blocks[2].0.get(&store, blocks[2].1).await, Read::Stale));
    assert_eq!(readable(&store, &blocks).await, 5);
}

#[tokio::test]
async fn a_device_of_a_newer_version_is_refused_by_name() {
    let rig = Rig::new(4, 1);
    filled(&rig, 1).await;
    let mut record = rig.index.get(b"d").unwrap().unwrap();
    record[0] = 2;
    rig.index.tamper(b"d", Some(record));
    let e = rig.try_open_with(&mut |_| Keep::Yes).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Config);
    assert!(e.to_string().contains("newer"), "{e}");
}

#[tokio::test]
async fn files_that_are_not_segments_are_left_alone() {
    use kvkeep_tiers::io::Disk;
    let rig = Rig::new(4, 1);
    rig.disk.create("notes.txt", 4096).unwrap();
    filled(&rig, 2).await;
    let (_store, report) = rig.open_with(&mut |_| Keep::Yes);
    assert_eq!(report.segments, 1);
    assert!(rig.disk.list().unwrap().iter().any(|(name, _)| name == "notes.txt"));
    assert_eq!(kvkeep_tiers::nvme::config::segment_no("notes.txt"), None::<SegmentNo>);
}

#[tokio::test]
async fn a_closed_store_takes_no_puts_and_still_reads() {
    let rig = Rig::new(4, 1);
    let store = rig.open();
    let b = block(1, 1, 60_000, Class::Cache);
    let place = b.put(&store).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(b.put(&store).await.unwrap_err().kind(), ErrorKind::Unavailable);
    b.must_read(&store, place).await;
    assert_eq!(store.close().await.unwrap_err().kind(), ErrorKind::Unavailable);
}
