//! What every engine does alike. Each test runs over all of them, so that the simulated disk is as good a stand-in as it
//! is unkind.

use std::io::ErrorKind as IoErrorKind;

use kvkeep_core::ErrorKind;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::task::JoinSet;

use super::*;
use crate::io::disk::DEFAULT_QUEUE_DEPTH;
use crate::io::file::Folder;
use crate::io::sim::FaultRates;

/// Every engine, by name, on a folder of its own. What this host refuses is left out and said.
fn engines(queue_depth: u32) -> Vec<(&'static str, Arc<dyn Disk>, tempfile::TempDir)> {
    let options = DiskOptions { queue_depth };
    let dir = || tempfile::tempdir().unwrap();
    let mut engines: Vec<(_, Arc<dyn Disk>, _)> = Vec::new();

    let at = dir();
    engines.push(("pread", Arc::new(PreadDisk::open(at.path(), options).unwrap()), at));
    let at = dir();
    let cached = Folder::with_direct(at.path(), false);
    engines.push(("pread, page cache", Arc::new(PreadDisk::with_folder(cached, options).unwrap()), at));
    let at = dir();
    match UringDisk::open(at.path(), options) {
        Ok(disk) => {
            engines.push(("uring", Arc::new(disk), at));
            let at = dir();
            let cached = Folder::with_direct(at.path(), false);
            engines.push(("uring, page cache", Arc::new(UringDisk::with_folder(cached, options).unwrap()), at));
            let at = dir();
            let shared = FlushCoordinator::new(UringDisk::open(at.path(), options).unwrap());
            engines.push(("uring, coordinated", Arc::new(shared), at));
        }
        Err(e) => eprintln!("uring is left out: {e}"),
    }
    engines.push(("sim", Arc::new(SimDisk::with_options(1 << 30, 1, options)), dir()));
    let unkind = || {
        let sim = SimDisk::with_options(1 << 30, 2, options);
        sim.set_rates(FaultRates { interrupted: 200, short: 300, delayed: 300, ..FaultRates::default() });
        sim
    };
    engines.push(("sim, interrupted, short and late", Arc::new(unkind()), dir()));
    engines.push(("sim, coordinated", Arc::new(FlushCoordinator::new(unkind())), dir()));
    engines
}

fn each(test: impl Fn(Arc<dyn Disk>)) {
    for (name, disk, _dir) in engines(DEFAULT_QUEUE_DEPTH) {
        eprintln!("engine: {name}");
        test(disk);
    }
}

#[test]
fn what_was_written_is_read_back() {
    each(|disk| {
        wait(async {
            let file = disk.create("a.seg", 64 * PAGE as u64).unwrap();
            for (at, pages) in [(0, 1), (3, 17), (40, 24)] {
                let (back, result) = disk.write(file, (at * PAGE) as u64, filled(pages, at as u32)).await;
                assert_eq!((result.unwrap(), back.len()), (pages * PAGE, pages * PAGE));
            }
            for (at, pages) in [(3, 17), (0, 1), (40, 24)] {
                let (buf, result) = disk.read(file, (at * PAGE) as u64, IoBuf::alloc(pages * PAGE)).await;
                assert_eq!(result.unwrap(), pages * PAGE);
                assert!(buf.as_slice() == filled(pages, at as u32).as_slice());
            }
            let (buf, result) = disk.read(file, PAGE as u64, IoBuf::alloc(PAGE)).await;
            assert_eq!(result.unwrap(), PAGE);
            assert!(buf.as_slice().iter().all(|b| *b == 0), "what was never written reads as zeros");
        });
    });
}

#[test]
fn head_and_body_lie_behind_each_other() {
    each(|disk| {
        wait(async {
            let file = disk.create("a.seg", 16 * PAGE as u64).unwrap();
            let (head, body, result) = disk.write2(file, PAGE as u64, filled(2, 1), filled(5, 2)).await;
            result.unwrap();
            assert_eq!((head.len(), body.len()), (2 * PAGE, 5 * PAGE));
            let (buf, result) = disk.read(file, PAGE as u64, IoBuf::alloc(7 * PAGE)).await;
            assert_eq!(result.unwrap(), 7 * PAGE);
            assert!(buf.as_slice()[..2 * PAGE] == *filled(2, 1).as_slice());
            assert!(buf.as_slice()[2 * PAGE..] == *filled(5, 2).as_slice());
        });
    });
}

#[test]
fn a_read_ends_where_the_file_ends() {
    each(|disk| {
        wait(async {
            let file = disk.create("a.seg", 4 * PAGE as u64).unwrap();
            disk.write(file, 0, filled(4, 9)).await.1.unwrap();
            let (buf, result) = disk.read(file, PAGE as u64, IoBuf::alloc(8 * PAGE)).await;
            assert_eq!(result.unwrap(), 3 * PAGE);
            assert!(buf.as_slice()[..3 * PAGE] == filled(4, 9).as_slice()[PAGE..]);
            assert_eq!(disk.read(file, 9 * PAGE as u64, IoBuf::alloc(PAGE)).await.1.unwrap(), 0);
        });
    });
}

#[test]
fn what_is_not_whole_pages_is_refused_and_the_buffer_comes_back() {
    each(|disk| {
        wait(async {
            let file = disk.create("a.seg", 4 * PAGE as u64).unwrap();
            let refused =
                |result: std::io::Result<usize>| assert_eq!(result.unwrap_err().kind(), IoErrorKind::InvalidInput);
            let (buf, result) = disk.read(file, 512, IoBuf::alloc(PAGE)).await;
            assert_eq!(buf.len(), PAGE);
            refused(result);
            refused(disk.write(file, 0, IoBuf::alloc(100)).await.1);
            refused(disk.write(file, 0, IoBuf::alloc(2 * PAGE).slice(512, PAGE)).await.1);
            refused(disk.write2(file, 0, IoBuf::alloc(512), IoBuf::alloc(PAGE)).await.2.map(|()| 0));
            refused(disk.read(file, u64::MAX - 4095, IoBuf::alloc(PAGE)).await.1);
        });
    });
}

#[test]
fn the_folder_keeps_its_files() {
    each(|disk| {
        let a = disk.create("a.seg", 2 * PAGE as u64).unwrap();
        let b = disk.create("b.seg", 4 * PAGE as u64).unwrap();
        assert_ne!(a, b);
        assert_eq!(disk.open("a.seg").unwrap(), (a, 2 * PAGE as u64), "an open file keeps its id");
        assert_eq!(
            disk.list().unwrap(),
            [("a.seg".to_owned(), 2 * PAGE as u64), ("b.seg".to_owned(), 4 * PAGE as u64)]
        );
        assert_eq!(disk.create("a.seg", PAGE as u64).unwrap_err().kind(), ErrorKind::Conflict);
        assert_eq!(disk.create("c.seg", 100).unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(disk.create("c.seg", 0).unwrap_err().kind(), ErrorKind::InvalidArgument);
        for name in ["", ".", "..", ".hidden", "a/b", "../a", "a\0", "ä", &"x".repeat(129)] {
            assert_eq!(disk.create(name, PAGE as u64).unwrap_err().kind(), ErrorKind::InvalidArgument, "{name:?}");
            assert_eq!(disk.open(name).unwrap_err().kind(), ErrorKind::InvalidArgument, "{name:?}");
            assert_eq!(disk.remove(name).unwrap_err().kind(), ErrorKind::InvalidArgument, "{name:?}");
        }
        assert_eq!(disk.open("c.seg").unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(disk.remove("c.seg").unwrap_err().kind(), ErrorKind::Io);
        assert!(!disk.is_poisoned(), "a file that is not there is no failed flush");
        let space = disk.space().unwrap();
        assert!(space.free > 0 && space.free <= space.total);
        disk.remove("a.seg").unwrap();
        assert_eq!(disk.list().unwrap().len(), 1);
        assert_eq!(wait(disk.read(a, 0, IoBuf::alloc(PAGE))).1.unwrap_err().kind(), IoErrorKind::NotFound);
        let again = disk.create("a.seg", PAGE as u64).unwrap();
        assert_ne!(again, a, "ids are not used again");
        assert_eq!(wait(disk.read(again, 0, IoBuf::alloc(PAGE))).1.unwrap(), PAGE);
    });
}

#[test]
fn more_room_than_there_is_is_refused_and_leaves_nothing() {
    each(|disk| {
        let too_much = disk.space().unwrap().total.next_multiple_of(PAGE as u64) + (1 << 30);
        assert_eq!(disk.create("a.seg", too_much).unwrap_err().kind(), ErrorKind::Full);
        assert!(disk.list().unwrap().is_empty());
    });
}

#[test]
fn a_crowd_behind_a_short_queue_is_served() {
    for (name, disk, _dir) in engines(2) {
        eprintln!("engine: {name}");
        wait(async {
            let file = disk.create("a.seg", 64 * PAGE as u64).unwrap();
            let mut crowd = JoinSet::new();
            for n in 0..64 {
                let disk = Arc::clone(&disk);
                crowd.spawn(async move {
                    disk.write(file, n * PAGE as u64, filled(1, n as u32)).await.1.unwrap();
                    disk.flush(file).await.unwrap();
                    let (buf, result) = disk.read(file, n * PAGE as u64, IoBuf::alloc(PAGE)).await;
                    assert_eq!(result.unwrap(), PAGE);
                    assert!(buf.as_slice() == filled(1, n as u32).as_slice());
                });
            }
            while let Some(ended) = crowd.join_next().await {
                ended.unwrap();
            }
        });
    }
}

/// Polls a future once, as a task does that is cancelled at its first await.
async fn begin<T>(future: &mut (impl Future<Output = T> + Unpin)) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_ready())).await
}

#[test]
fn an_operation_whose_caller_has_gone_still_ends_and_then_lets_go_of_its_memory() {
    for (name, disk, _dir) in engines(8) {
        eprintln!("engine: {name}");
        let drops = Arc::new(AtomicUsize::new(0));
        wait(async {
            let file = disk.create("a.seg", 64 * PAGE as u64).unwrap();
            for n in 0..32u32 {
                let mut buf = watched(2, &drops);
                buf.as_mut_slice().copy_from_slice(filled(2, n).as_slice());
                let mut write = disk.write(file, u64::from(n) * 2 * PAGE as u64, buf);
                // The queue is short: some of these have begun, others were still waiting for room.
                let _ = begin(&mut write).await;
                drop(write);
                let mut read = disk.read(file, 0, watched(64, &drops));
                let _ = begin(&mut read).await;
            }
            // Room for as many operations as the queue is deep comes only when all the forgotten ones have ended.
            let mut crowd = JoinSet::new();
            for _ in 0..64 {
                crowd.spawn(disk.read(file, 0, IoBuf::alloc(PAGE)));
            }
            while let Some(ended) = crowd.join_next().await {
                ended.unwrap().1.unwrap();
            }
            for n in 0..32u32 {
                let (buf, result) = disk.read(file, u64::from(n) * 2 * PAGE as u64, IoBuf::alloc(2 * PAGE)).await;
                result.unwrap();
                let whole = buf.as_slice() == filled(2, n).as_slice();
                assert!(whole || buf.as_slice().iter().all(|b| *b == 0), "write {n} is done whole or was never begun");
            }
        });
        drop(disk);
        assert_eq!(drops.load(Ordering::SeqCst), 64, "every buffer was let go of, once");
    }
}

#[test]
fn a_disk_that_is_dropped_ends_what_it_has_begun() {
    for (name, disk, _dir) in engines(8) {
        eprintln!("engine: {name}");
        wait(async {
            let file = disk.create("a.seg", 8 * PAGE as u64).unwrap();
            let mut write = disk.write(file, 0, filled(8, 3));
            let begun_and_ended = begin(&mut write).await;
            drop(disk);
            if !begun_and_ended {
                assert_eq!(write.await.1.unwrap(), 8 * PAGE);
            }
        });
    }
}

/// One operation inside a stripe of pages that is its own.
#[derive(Clone, Debug)]
enum Op {
    Write { at: usize, pages: usize, tag: u32 },
    Write2 { at: usize, tag: u32 },
    Read { at: usize, pages: usize },
    Flush,
}

const STRIPE: usize = 8;
const STRIPES: usize = 6;

fn ops() -> impl Strategy<Value = Vec<Vec<Op>>> {
    let op = prop_oneof![
        (0..STRIPE, 1..=STRIPE, any::<u32>()).prop_map(|(at, pages, tag)| Op::Write {
            at,
            pages: pages.min(STRIPE - at),
            tag
        }),
        (0..STRIPE - 3, any::<u32>()).prop_map(|(at, tag)| Op::Write2 { at, tag }),
        (0..STRIPE, 1..=STRIPE).prop_map(|(at, pages)| Op::Read { at, pages: pages.min(STRIPE - at) }),
        Just(Op::Flush),
    ];
    prop::collection::vec(prop::collection::vec(op, 1..=STRIPES), 1..12)
}

/// Random rounds of concurrent operations, each on a stripe of its own, agree with a plain vector of bytes.
#[test]
fn every_engine_agrees_with_a_vector_of_bytes() {
    each(|disk| {
        let file = disk.create("a.seg", (STRIPE * STRIPES * PAGE) as u64).unwrap();
        let model = std::cell::RefCell::new(vec![0u8; STRIPE * STRIPES * PAGE]);
        let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
        let ran = runner.run(&ops(), |rounds| {
            let mut model = model.borrow_mut();
            wait(async {
                for round in rounds {
                    let mut running = JoinSet::new();
                    for (n, op) in round.into_iter().enumerate() {
                        let at = |page: usize| (n * STRIPE + page) * PAGE;
                        match op {
                            Op::Write { at: page, pages, tag } => {
                                let buf = filled(pages, tag);
                                model[at(page)..][..buf.len()].copy_from_slice(buf.as_slice());
                                let write = disk.write(file, at(page) as u64, buf);
                                running.spawn(async move { write.await.1.map(|_| ()) });
                            }
                            Op::Write2 { at: page, tag } => {
                                let (head, body) = filled(3, tag).split_at(PAGE);
                                model[at(page)..][..PAGE].copy_from_slice(head.as_slice());
                                model[at(page + 1)..][..2 * PAGE].copy_from_slice(body.as_slice());
                                let write = disk.write2(file, at(page) as u64, head, body);
                                running.spawn(async move { write.await.2 });
                            }
                            Op::Read { at: page, pages } => {
                                let expected = model[at(page)..][..pages * PAGE].to_vec();
                                let read = disk.read(file, at(page) as u64, IoBuf::alloc(pages * PAGE));
                                running.spawn(async move {
                                    let (buf, result) = read.await;
                                    assert_eq!(result?, expected.len());
                                    assert!(buf.as_slice() == expected);
                                    Ok(())
                                });
                            }
                            Op::Flush => drop(running.spawn(disk.flush(file))),
                        }
                    }
                    while let Some(ended) = running.join_next().await {
                        ended.unwrap().unwrap();
                    }
                }
                let (buf, result) = disk.read(file, 0, IoBuf::alloc(model.len())).await;
                assert_eq!(result.unwrap(), model.len());
                assert!(buf.as_slice() == *model);
            });
            Ok(())
        });
        ran.unwrap();
    });
}
