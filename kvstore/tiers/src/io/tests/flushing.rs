//! The flush coordinator, over the simulated disk, where flushes can be held, counted and failed.

use tokio::task::JoinSet;

use super::*;
use crate::io::sim::{Fault, SimOp};

const FILE: u64 = 16 * PAGE as u64;

fn setup() -> (SimDisk, Arc<FlushCoordinator<SimDisk>>, FileId) {
    let sim = SimDisk::new(1 << 20, 7);
    let disk = Arc::new(FlushCoordinator::new(sim.clone()));
    let file = disk.create("a.seg", FILE).unwrap();
    (sim, disk, file)
}

async fn settle() {
    for _ in 0..64 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn a_crowd_shares_one_flush() {
    let (sim, disk, file) = setup();
    wait(async {
        disk.write(file, 0, filled(1, 1)).await.1.unwrap();
        sim.hold(&[SimOp::Flush]);
        let mut crowd = JoinSet::new();
        for _ in 0..100 {
            crowd.spawn(disk.flush(file));
        }
        settle().await;
        sim.release();
        while let Some(ended) = crowd.join_next().await {
            ended.unwrap().unwrap();
        }
        assert_eq!(sim.counts().flushes, 1);
        disk.flush(file).await.unwrap();
        assert_eq!(sim.counts().flushes, 1, "nothing was written since");
    });
}

#[test]
fn a_flush_that_began_before_my_write_ended_does_not_cover_it() {
    for seed in 0..32 {
        let (sim, disk, file) = setup();
        wait(async {
            disk.write(file, 0, filled(1, 1)).await.1.unwrap();
            sim.hold(&[SimOp::Flush]);
            let early = tokio::spawn(disk.flush(file));
            settle().await;
            let mut mine = JoinSet::new();
            for n in 1..10 {
                disk.write(file, n * PAGE as u64, filled(1, 2)).await.1.unwrap();
                mine.spawn(disk.flush(file));
            }
            settle().await;
            sim.release();
            early.await.unwrap().unwrap();
            while let Some(ended) = mine.join_next().await {
                ended.unwrap().unwrap();
            }
            assert_eq!(sim.counts().flushes, 2, "the one that ran, and one for all who came meanwhile");
            let found = sim.cut(seed).contents("a.seg");
            for n in 1..10 {
                assert!(found[n * PAGE..][..PAGE] == *filled(1, 2).as_slice(), "page {n}, seed {seed}");
            }
        });
    }
}

#[test]
fn files_do_not_wait_for_each_other() {
    let (sim, disk, a) = setup();
    let b = disk.create("b.seg", FILE).unwrap();
    wait(async {
        disk.write(a, 0, filled(1, 1)).await.1.unwrap();
        disk.write(b, 0, filled(1, 1)).await.1.unwrap();
        sim.hold(&[SimOp::Flush]);
        let (first, second) = (tokio::spawn(disk.flush(a)), tokio::spawn(disk.flush(b)));
        settle().await;
        assert_eq!(sim.held(), 2);
        sim.release();
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
    });
}

#[test]
fn a_file_that_a_previous_process_wrote_is_flushed_once() {
    let (sim, disk, file) = setup();
    wait(disk.write(file, 0, filled(1, 1))).1.unwrap();
    let sim = sim.kill(1);
    let disk = FlushCoordinator::new(sim.clone());
    let (file, _) = disk.open("a.seg").unwrap();
    wait(disk.flush(file)).unwrap();
    wait(disk.flush(file)).unwrap();
    assert_eq!(sim.counts().flushes, 1);
    assert!(sim.cut(3).contents("a.seg")[..PAGE] == *filled(1, 1).as_slice());
}

#[test]
fn a_failed_flush_ends_all_writing_and_no_reading() {
    let (sim, disk, file) = setup();
    let other = disk.create("b.seg", FILE).unwrap();
    wait(async {
        disk.write(file, 0, filled(1, 1)).await.1.unwrap();
        disk.write(other, 0, filled(1, 1)).await.1.unwrap();
        sim.inject(SimOp::Flush, 0, Fault::Error);
        assert!(!disk.is_poisoned());
        assert_eq!(disk.flush(file).await.unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(disk.is_poisoned());
        let refused = std::io::ErrorKind::ReadOnlyFilesystem;
        assert_eq!(disk.flush(file).await.unwrap_err().kind(), refused, "the kernel would say that all is well");
        assert_eq!(disk.flush(other).await.unwrap_err().kind(), refused);
        let (buf, result) = disk.write(other, 0, filled(1, 2)).await;
        assert_eq!((buf.len(), result.unwrap_err().kind()), (PAGE, refused));
        assert_eq!(disk.write2(other, 0, filled(1, 2), filled(1, 2)).await.2.unwrap_err().kind(), refused);
        assert!(disk.create("c.seg", FILE).is_err());
        assert!(disk.remove("b.seg").is_err());
        let (buf, result) = disk.read(file, 0, IoBuf::alloc(PAGE)).await;
        assert_eq!(result.unwrap(), PAGE);
        assert!(buf.as_slice() == filled(1, 1).as_slice());
    });
}

#[test]
fn everyone_who_waits_for_a_flush_that_fails_is_told() {
    let (sim, disk, file) = setup();
    wait(async {
        disk.write(file, 0, filled(1, 1)).await.1.unwrap();
        sim.inject(SimOp::Flush, 0, Fault::Error);
        sim.hold(&[SimOp::Flush]);
        let mut crowd = JoinSet::new();
        for _ in 0..10 {
            crowd.spawn(disk.flush(file));
        }
        settle().await;
        sim.release();
        while let Some(ended) = crowd.join_next().await {
            assert!(ended.unwrap().is_err());
        }
        assert_eq!(sim.counts().flushes, 1);
    });
}

/// The kernel tells of a lost page once. If whoever asked has gone by then, the next one must hear it.
#[test]
fn a_failure_is_heard_though_its_caller_has_gone() {
    let (sim, disk, file) = setup();
    wait(async {
        disk.write(file, 0, filled(1, 1)).await.1.unwrap();
        sim.inject(SimOp::Flush, 0, Fault::Error);
        sim.hold(&[SimOp::Flush]);
        let gone = tokio::spawn(disk.flush(file));
        settle().await;
        gone.abort();
        settle().await;
        sim.release();
        assert!(disk.flush(file).await.is_err());
        assert!(disk.is_poisoned());
        assert_eq!(sim.counts().flushes, 1);
    });
}

#[test]
fn a_failed_flush_inside_create_or_remove_poisons_too() {
    for on in [SimOp::Create, SimOp::Remove] {
        let (sim, disk, _) = setup();
        sim.inject(on, 0, Fault::Error);
        let failed =
            if on == SimOp::Create { disk.create("b.seg", FILE).is_err() } else { disk.remove("a.seg").is_err() };
        assert!(failed && disk.is_poisoned());
    }
    let (sim, disk, _) = setup();
    sim.inject(SimOp::Create, 0, Fault::NoSpace);
    assert!(disk.create("b.seg", FILE).is_err());
    assert!(!disk.is_poisoned(), "a full disk is no broken disk");
}

#[test]
fn failed_reads_and_writes_do_not_poison() {
    let (sim, disk, file) = setup();
    wait(async {
        sim.inject(SimOp::Read, 0, Fault::Error);
        sim.inject(SimOp::Write, 0, Fault::NoSpace);
        assert!(disk.read(file, 0, IoBuf::alloc(PAGE)).await.1.is_err());
        assert_eq!(disk.write(file, 0, filled(1, 1)).await.1.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        assert!(!disk.is_poisoned());
        disk.write(file, 0, filled(1, 1)).await.1.unwrap();
        disk.flush(file).await.unwrap();
    });
}
