//! What only an engine on a real kernel can show.

use std::io::Write as _;

use super::*;
use crate::io::probe;
use crate::io::uring::MAX_REGISTERED_BYTES;

fn uring(dir: &tempfile::TempDir) -> Option<UringDisk> {
    match UringDisk::open(dir.path(), DiskOptions::default()) {
        Ok(disk) => Some(disk),
        Err(e) => {
            eprintln!("left out on this host: {e}");
            None
        }
    }
}

/// A part of `region` that says where it lies. The test keeps the parts disjoint.
fn part(region: &mut Option<IoBuf>, pages: usize, index: u16) -> IoBuf {
    let (part, rest) = region.take().unwrap().split_at(pages * PAGE);
    *region = Some(rest);
    part.with_fixed(index)
}

#[test]
fn registered_memory_carries_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = uring(&dir) else { return };
    let file = disk.create("a.seg", 64 * PAGE as u64).unwrap();
    let drops = Arc::new(AtomicUsize::new(0));
    let parts = watched(32, &drops);
    assert_eq!(disk.register(7, Region::of(&parts)), Registration::Fixed);
    let mut parts = Some(parts);
    wait(async {
        for index in [7, 8, 1023] {
            // 7 is right, the others name nothing: the operation works all the same.
            let mut buf = part(&mut parts, 4, index);
            buf.as_mut_slice().copy_from_slice(filled(4, 1).as_slice());
            disk.write(file, 0, buf).await.1.unwrap();
            let (buf, result) = disk.read(file, 0, part(&mut parts, 4, index)).await;
            assert_eq!(result.unwrap(), 4 * PAGE);
            assert!(buf.as_slice() == filled(4, 1).as_slice());
            let (_, _, result) = disk.write2(file, 8 * PAGE as u64, filled(1, 2), buf).await;
            result.unwrap();
        }
        let (buf, result) = disk.read(file, 8 * PAGE as u64, IoBuf::alloc(5 * PAGE)).await;
        assert_eq!(result.unwrap(), 5 * PAGE);
        assert!(buf.as_slice()[..PAGE] == *filled(1, 2).as_slice());
        assert!(buf.as_slice()[PAGE..] == *filled(4, 1).as_slice());
        // Memory that lies elsewhere but claims the index must not be taken for the registered one.
        let (buf, result) = disk.read(file, 0, IoBuf::alloc(4 * PAGE).with_fixed(7)).await;
        assert_eq!(result.unwrap(), 4 * PAGE);
        assert!(buf.as_slice() == filled(4, 1).as_slice());
    });
    drop(parts);
    assert_eq!(drops.load(Ordering::SeqCst), 0, "the registration keeps the memory");
    disk.unregister(7);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    assert_eq!(disk.register(7, Region::of(&IoBuf::alloc(PAGE))), Registration::Fixed, "the index is free again");
    disk.unregister(9);
}

#[test]
fn a_region_over_the_limit_stays_unregistered() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = uring(&dir) else { return };
    // Never touched, so it costs address space only.
    assert_eq!(disk.register(0, Region::of(&IoBuf::alloc(MAX_REGISTERED_BYTES + PAGE))), Registration::Unregistered);
    let pread = PreadDisk::open(dir.path(), DiskOptions::default()).unwrap();
    assert_eq!(pread.register(0, Region::of(&IoBuf::alloc(PAGE))), Registration::Unregistered, "it has no use for it");
}

/// Looked at from outside: the space of a removed file comes back, though the ring had the file registered.
#[test]
fn a_removed_file_is_closed_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = uring(&dir) else { return };
    let open_files = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter_map(|l| std::fs::read_link(l.path()).ok()).filter(|to| to.starts_with(dir.path())).count()
    };
    for n in 0..3 {
        let file = disk.create(&format!("{n}.seg"), 4 * PAGE as u64).unwrap();
        wait(disk.write(file, 0, filled(4, n))).1.unwrap();
        assert_eq!(open_files(), 1);
        disk.remove(&format!("{n}.seg")).unwrap();
        assert_eq!(open_files(), 0);
    }
}

#[test]
fn a_file_shortened_behind_our_back_gives_a_short_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut disks: Vec<Arc<dyn Disk>> = vec![Arc::new(PreadDisk::open(dir.path(), DiskOptions::default()).unwrap())];
    disks.extend(uring(&dir).map(|disk| Arc::new(disk) as Arc<dyn Disk>));
    for (n, disk) in disks.into_iter().enumerate() {
        let name = format!("{n}.seg");
        let file = disk.create(&name, 8 * PAGE as u64).unwrap();
        wait(disk.write(file, 0, filled(8, 5))).1.unwrap();
        std::fs::File::options()
            .write(true)
            .open(dir.path().join(&name))
            .unwrap()
            .set_len(3 * PAGE as u64 + 100)
            .unwrap();
        let (buf, result) = wait(disk.read(file, 0, IoBuf::alloc(8 * PAGE)));
        assert_eq!(result.unwrap(), 3 * PAGE + 100);
        assert!(buf.as_slice()[..3 * PAGE + 100] == filled(8, 5).as_slice()[..3 * PAGE + 100]);
    }
}

#[test]
fn what_is_not_ours_in_the_folder_is_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let disk = PreadDisk::open(dir.path(), DiskOptions::default()).unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    std::fs::File::create(dir.path().join(".hidden")).unwrap().write_all(b"x").unwrap();
    disk.create("a.seg", PAGE as u64).unwrap();
    assert_eq!(disk.list().unwrap(), [("a.seg".to_owned(), PAGE as u64)]);
}

#[test]
fn the_probe_opens_what_was_asked_for_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let opened = probe::open(dir.path(), EngineChoice::Pread, DiskOptions::default()).unwrap();
    assert_eq!(opened.disk.engine().name, "pread");
    let opened = probe::open(dir.path(), EngineChoice::Auto, DiskOptions::default()).unwrap();
    assert!(opened.said.starts_with(opened.disk.engine().name), "{}", opened.said);
    for choice in [EngineChoice::Auto, EngineChoice::Uring, EngineChoice::Pread] {
        assert_eq!(choice.word().parse::<EngineChoice>().unwrap(), choice);
    }
    assert!("aio".parse::<EngineChoice>().is_err());
    let nowhere = dir.path().join("nowhere");
    assert!(probe::open(&nowhere, EngineChoice::Auto, DiskOptions::default()).is_err());
    let endless = DiskOptions { queue_depth: 0 };
    assert!(probe::open(dir.path(), EngineChoice::Auto, endless).is_err());
}
