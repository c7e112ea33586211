//! The unkind disk is unkind in the ways it says, and in no others: what the other tests build on.

use proptest::prelude::*;

use super::*;
use crate::io::sim::{Dice, Fault, FaultRates, SimOp};

const PAGES: usize = 16;
const SECTOR: usize = 512;

fn setup(seed: u64) -> (SimDisk, FileId) {
    let sim = SimDisk::new(1 << 20, seed);
    let file = sim.create("a.seg", (PAGES * PAGE) as u64).unwrap();
    (sim, file)
}

fn write(sim: &SimDisk, file: FileId, page: usize, buf: IoBuf) -> std::io::Result<usize> {
    wait(sim.write(file, (page * PAGE) as u64, buf)).1
}

fn read(sim: &SimDisk, file: FileId, page: usize, pages: usize) -> std::io::Result<Vec<u8>> {
    let (buf, result) = wait(sim.read(file, (page * PAGE) as u64, IoBuf::alloc(pages * PAGE)));
    result.map(|bytes| buf.as_slice()[..bytes].to_vec())
}

#[test]
fn a_page_that_was_not_flushed_is_found_old_new_or_torn() {
    let (mut old, mut new, mut torn) = (0, 0, 0);
    for seed in 0..64 {
        let (sim, file) = setup(1);
        write(&sim, file, 0, filled(PAGES, 1)).unwrap();
        wait(sim.flush(file)).unwrap();
        write(&sim, file, 0, filled(PAGES, 2)).unwrap();
        let found = sim.cut(seed).contents("a.seg");
        let (before, after) = (filled(PAGES, 1), filled(PAGES, 2));
        for page in 0..PAGES {
            let at = |buf: &IoBuf| buf.as_slice()[page * PAGE..][..PAGE].to_vec();
            match &found[page * PAGE..][..PAGE] {
                found if found == at(&before) => old += 1,
                found if found == at(&after) => new += 1,
                _ => torn += 1,
            }
        }
    }
    assert!(old > 100 && new > 100 && torn > 100, "old {old}, new {new}, torn {torn} of 1024");
}

#[derive(Clone, Debug)]
enum Op {
    Write { page: usize, pages: usize, tag: u32 },
    Abandon { page: usize, tag: u32 },
    Flush,
}

fn script() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..PAGES, 1..=4usize, any::<u32>())
            .prop_map(|(page, pages, tag)| Op::Write { page, pages: pages.min(PAGES - page), tag }),
        1 => (0..PAGES, any::<u32>()).prop_map(|(page, tag)| Op::Abandon { page, tag }),
        1 => Just(Op::Flush),
    ];
    prop::collection::vec(op, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Flushed pages are found exactly; any other page is made, sector by sector, of versions written since its flush
    /// or of the flushed one, and of nothing else.
    #[test]
    fn after_a_cut_every_sector_is_one_that_was_written(script in script(), seed in any::<u64>()) {
        let (sim, file) = setup(seed);
        let mut candidates: Vec<Vec<Vec<u8>>> = vec![vec![vec![0; PAGE]]; PAGES];
        // Nobody knows when these end: perhaps only after the flush that follows.
        let mut abandoned: Vec<Vec<Vec<u8>>> = vec![Vec::new(); PAGES];
        wait(async {
            for op in script {
                match op {
                    Op::Write { page, pages, tag } => {
                        let buf = filled(pages, tag);
                        for (n, bytes) in buf.as_slice().chunks(PAGE).enumerate() {
                            candidates[page + n].push(bytes.to_vec());
                        }
                        sim.write(file, (page * PAGE) as u64, buf).await.1.unwrap();
                    }
                    Op::Abandon { page, tag } => {
                        sim.hold(&[SimOp::Write]);
                        let mut write = sim.write(file, (page * PAGE) as u64, filled(1, tag));
                        std::future::poll_fn(|cx| {
                            let _ = write.as_mut().poll(cx);
                            std::task::Poll::Ready(())
                        }).await;
                        drop(write);
                        abandoned[page].push(filled(1, tag).as_slice().to_vec());
                        if tag % 2 == 0 {
                            sim.release();
                        } else {
                            sim.hold(&[]);
                        }
                    }
                    Op::Flush => {
                        sim.hold(&[]);
                        sim.flush(file).await.unwrap();
                        let now = sim.contents("a.seg");
                        for (page, versions) in candidates.iter_mut().enumerate() {
                            if abandoned[page].is_empty() {
                                *versions = vec![now[page * PAGE..][..PAGE].to_vec()];
                            }
                        }
                    }
                }
            }
        });
        let found = sim.cut(seed).contents("a.seg");
        for (n, sector) in found.chunks(SECTOR).enumerate() {
            let (page, at) = (n * SECTOR / PAGE, n * SECTOR % PAGE);
            prop_assert!(candidates[page].iter().chain(&abandoned[page]).any(|version| &version[at..][..SECTOR] == sector), "sector {n}");
        }
    }
}

#[test]
fn a_killed_process_loses_no_write_that_had_ended() {
    let (sim, file) = setup(1);
    write(&sim, file, 0, filled(PAGES, 1)).unwrap();
    let found = sim.kill(1);
    assert!(found.contents("a.seg") == filled(PAGES, 1).as_slice());
    assert_ne!(found.cut(1).contents("a.seg"), filled(PAGES, 1).as_slice(), "though nothing was flushed");
    assert!(sim.list().is_err() && read(&sim, file, 0, 1).is_err(), "the old process is gone");
}

#[test]
fn what_is_in_flight_at_the_cut_is_answered_with_an_error() {
    let (sim, file) = setup(1);
    wait(async {
        sim.hold(&[SimOp::Write]);
        let mut write = sim.write(file, 0, filled(1, 1));
        std::future::poll_fn(|cx| std::task::Poll::Ready(write.as_mut().poll(cx).is_ready())).await;
        assert_eq!(sim.held(), 1);
        let _after = sim.cut(1);
        assert!(write.await.1.is_err());
    });
}

#[test]
fn a_held_operation_keeps_its_memory_though_its_caller_has_gone() {
    let (sim, file) = setup(1);
    let drops = Arc::new(AtomicUsize::new(0));
    wait(async {
        sim.hold(&[SimOp::Read]);
        for _ in 0..3 {
            let mut read = sim.read(file, 0, watched(1, &drops));
            std::future::poll_fn(|cx| std::task::Poll::Ready(read.as_mut().poll(cx).is_ready())).await;
        }
        assert_eq!((sim.held(), drops.load(Ordering::SeqCst)), (3, 0));
        sim.release();
        assert_eq!((sim.held(), drops.load(Ordering::SeqCst)), (0, 3));
    });
}

#[test]
fn a_flush_after_one_that_failed_saves_nothing() {
    let lost = (0..32).filter(|seed| {
        let (sim, file) = setup(1);
        write(&sim, file, 0, filled(PAGES, 1)).unwrap();
        sim.inject(SimOp::Flush, 0, Fault::Error);
        assert!(wait(sim.flush(file)).is_err());
        assert!(wait(sim.flush(file)).is_ok(), "this is what the kernel does");
        assert!(read(&sim, file, 0, PAGES).unwrap() == filled(PAGES, 1).as_slice());
        sim.cut(*seed).contents("a.seg") != filled(PAGES, 1).as_slice()
    });
    assert!(lost.count() > 0);
}

#[test]
fn a_flush_that_lies_saves_nothing() {
    let (sim, file) = setup(1);
    write(&sim, file, 0, filled(PAGES, 1)).unwrap();
    sim.inject(SimOp::Flush, 0, Fault::Lost);
    wait(sim.flush(file)).unwrap();
    assert_ne!(sim.cut(1).contents("a.seg"), filled(PAGES, 1).as_slice());
}

#[test]
fn faults_strike_where_the_script_says() {
    let (sim, file) = setup(1);
    let errno = |result: std::io::Result<usize>| result.unwrap_err().raw_os_error();
    sim.inject(SimOp::Write, 1, Fault::Error);
    sim.inject(SimOp::Write, 2, Fault::NoSpace);
    write(&sim, file, 0, filled(1, 1)).unwrap();
    assert_eq!(errno(write(&sim, file, 0, filled(1, 2))), Some(libc::EIO));
    assert_eq!(errno(write(&sim, file, 0, filled(1, 3))), Some(libc::ENOSPC));
    sim.inject(SimOp::Write, 0, Fault::Lost);
    write(&sim, file, 0, filled(1, 4)).unwrap();
    assert!(read(&sim, file, 0, 1).unwrap() == filled(1, 1).as_slice(), "three writes that were not");

    sim.inject(SimOp::Write, 0, Fault::Interrupted);
    sim.inject(SimOp::Write, 1, Fault::Short);
    let before = sim.counts().writes;
    assert_eq!(write(&sim, file, 0, filled(8, 5)).unwrap(), 8 * PAGE);
    assert_eq!(sim.counts().writes - before, 3, "interrupted, short, the rest");
    assert!(read(&sim, file, 0, 8).unwrap() == filled(8, 5).as_slice());

    sim.inject(SimOp::Read, 0, Fault::Error);
    assert!(read(&sim, file, 0, 1).is_err());
    sim.inject(SimOp::Read, 0, Fault::BitFlip);
    let flipped = read(&sim, file, 0, 8).unwrap();
    let wrong: u32 = flipped.iter().zip(filled(8, 5).as_slice()).map(|(a, b)| (a ^ b).count_ones()).sum();
    assert_eq!(wrong, 1);

    sim.inject(SimOp::Write, 0, Fault::Misdirected);
    let before = sim.contents("a.seg");
    write(&sim, file, 0, filled(1, 6)).unwrap();
    let after = sim.contents("a.seg");
    assert!(after[..PAGE] == before[..PAGE], "not where it belongs");
    assert!(after.chunks(PAGE).any(|page| page == filled(1, 6).as_slice()), "but somewhere");
}

#[test]
fn surgery_while_down_is_found_at_the_next_open() {
    let (sim, file) = setup(1);
    sim.create("b.seg", PAGE as u64).unwrap();
    write(&sim, file, 0, filled(PAGES, 1)).unwrap();
    let sim = sim.kill(1);
    sim.truncate("a.seg", 2 * PAGE as u64 + 100);
    sim.flip_bit("a.seg", 8 * PAGE as u64 + 3);
    sim.overwrite("a.seg", 0, b"torn");
    sim.lose("b.seg");
    assert!(sim.open("b.seg").is_err());
    let (file, bytes) = sim.open("a.seg").unwrap();
    assert_eq!(bytes, 2 * PAGE as u64 + 100);
    let found = read(&sim, file, 0, PAGES).unwrap();
    assert_eq!(found.len(), 2 * PAGE + 100);
    let written = filled(PAGES, 1);
    assert_eq!(&found[..4], b"torn");
    assert_eq!(found[4..PAGE], written.as_slice()[4..PAGE]);
    assert_eq!(found[PAGE], written.as_slice()[PAGE] ^ 8);
}

#[test]
fn a_disk_can_be_full() {
    let (sim, _) = setup(1);
    let left = sim.space().unwrap().free;
    sim.create("b.seg", left).unwrap();
    assert_eq!(sim.space().unwrap().free, 0);
    assert_eq!(sim.create("c.seg", PAGE as u64).unwrap_err().kind(), kvkeep_core::ErrorKind::Full);
    sim.remove("b.seg").unwrap();
    assert_eq!(sim.space().unwrap().free, left);
}

/// The same seeds, the same story: counts, contents, and what a cut leaves.
#[test]
fn a_story_repeats_itself() {
    let story = |seed: u64| {
        let (sim, file) = setup(seed);
        sim.set_rates(FaultRates {
            interrupted: 100,
            short: 200,
            write_error: 50,
            write_flip: 50,
            delayed: 300,
            ..FaultRates::default()
        });
        let mut dice = Dice::new(seed);
        wait(async {
            let mut running = tokio::task::JoinSet::new();
            for n in 0..100 {
                let page = dice.below(PAGES as u64 - 2);
                running.spawn(sim.write(file, page * PAGE as u64, filled(2, n)));
                if n % 10 == 9 {
                    while running.join_next().await.is_some() {}
                    if dice.one_in(2) {
                        sim.flush(file).await.unwrap();
                    }
                }
            }
        });
        (sim.counts(), sim.cut(seed).contents("a.seg"))
    };
    for seed in 0..8 {
        assert!(story(seed) == story(seed), "seed {seed}");
    }
    assert!(story(1) != story(2));
}
