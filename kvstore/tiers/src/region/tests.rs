use std::os::fd::{AsFd as _, OwnedFd};

use kvkeep_core::call_word::{begin_copy, end_copy, is_settled, revoke};
use kvkeep_core::checksum::ChunkSums;
use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::*;

const BYTES: u64 = 1 << 20;

fn memfd(bytes: u64, allocate: bool, seal: SealFlags) -> OwnedFd {
    let fd = memfd_create("region-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    if allocate {
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    }
    fcntl_add_seals(&fd, seal).unwrap();
    fd
}

fn message(descriptor: OwnedFd, offset: u64, length: u64) -> String {
    let error = Region::new(descriptor, offset, length, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    error.to_string()
}

#[test]
fn what_is_no_memory_is_refused_by_name() {
    let dir = std::fs::File::open("/").unwrap();
    assert!(message(dir.into(), 0, 4096).contains("Directory"));
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(message(socket.into(), 0, 4096).contains("Socket"));
    assert!(message(memfd(0, false, SealFlags::SHRINK), 0, 4096).contains("shorter"));
    assert!(message(memfd(4096, true, SealFlags::SHRINK), 0, 0).contains("at least one byte"));
    assert!(message(memfd(4096, true, SealFlags::SHRINK), u64::MAX, 2).contains("at least one byte"));
    assert!(message(memfd(BYTES, false, SealFlags::SHRINK), 0, BYTES).contains("not allocated"));
    assert!(message(memfd(BYTES, true, SealFlags::SHRINK), 512, 4096).contains("page"));
    assert!(message(memfd(BYTES, true, SealFlags::SHRINK | SealFlags::WRITE), 0, BYTES).contains("sealed"));
    let read_only = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(read_only.path(), [0; 8192]).unwrap();
    assert!(message(std::fs::File::open(read_only.path()).unwrap().into(), 0, 4096).contains("reading and writing"));
}

#[test]
fn bytes_go_in_and_come_out_mapped_and_not() {
    for seal in [SealFlags::SHRINK, SealFlags::empty()] {
        let region = Region::new(memfd(BYTES, true, seal), 4096, BYTES - 4096, false).unwrap();
        assert_eq!(region.is_mapped(), seal.contains(SealFlags::SHRINK));
        let bytes: Vec<u8> = (0..100_000u32).map(|n| n as u8 ^ 0x5a).collect();
        region.write(777, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        let mut sums = RunningSums::default();
        region.read(777, &mut back, &mut sums).unwrap();
        assert!(back == bytes);
        assert_eq!(sums.finish(), ChunkSums::of(&bytes));
        assert!(region.write(BYTES - 4096 - 10, &bytes).is_err());
        assert!(region.read(u64::MAX - 3, &mut back, &mut RunningSums::default()).is_err());
    }
}

/// The descriptor is not sealed, so the client can truncate it under the server: system calls say so, and no signal comes.
#[test]
fn a_region_that_was_truncated_is_an_error() {
    let fd = memfd(BYTES, true, SealFlags::empty());
    let region = Region::new(fd.as_fd().try_clone_to_owned().unwrap(), 0, BYTES, false).unwrap();
    ftruncate(&fd, 4096).unwrap();
    assert_eq!(region.read(8192, &mut [0; 4096], &mut RunningSums::default()).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(region.write(8192, &[1; 4096]).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn runs_outside_or_across_each_other_are_refused() {
    let region = Region::new(memfd(BYTES, true, SealFlags::SHRINK), 0, BYTES, false).unwrap();
    let runs = |offset, bytes, stride, count| Runs { offset, bytes, stride, count };
    assert_eq!(region.check(runs(0, 4096, 8192, 128)).unwrap(), 128 * 4096);
    assert_eq!(region.check(runs(BYTES - 1, 1, 0, 1)).unwrap(), 1);
    for bad in [
        runs(0, 4096, 8192, 129),
        runs(0, 4096, 4095, 2),
        runs(0, 0, 1, 1),
        runs(BYTES, 1, 0, 1),
        runs(u64::MAX, 2, 0, 1),
        runs(0, u64::MAX, 1, 3),
        runs(0, 1, u64::MAX, u32::MAX),
        runs(0, 4096, 8192, 0),
    ] {
        assert!(region.check(bad).is_err(), "{bad:?}");
    }
    assert_eq!(runs(10, 2, 5, 3).each().collect::<Vec<_>>(), [(10, 2), (15, 2), (20, 2)]);
}

#[test]
fn a_word_is_shared_with_whoever_has_the_memory() {
    let fd = memfd(BYTES, true, SealFlags::SHRINK);
    let ours = Region::new(fd.as_fd().try_clone_to_owned().unwrap(), 0, BYTES, false).unwrap().word(64).unwrap();
    let theirs = Region::new(fd, 0, BYTES, false).unwrap().word(64).unwrap();
    assert!(begin_copy(&ours));
    assert!(!revoke(&theirs));
    assert!(!end_copy(&ours));
    assert!(is_settled(&theirs));
    let region = Region::new(memfd(BYTES, true, SealFlags::SHRINK), 0, BYTES, false).unwrap();
    assert!(region.word(2).is_err() && region.word(BYTES).is_err() && region.word(BYTES - 2).is_err());
    let unmapped = Region::new(memfd(BYTES, true, SealFlags::empty()), 0, BYTES, false).unwrap();
    assert!(unmapped.word(0).is_err());
}

#[test]
fn only_whole_pages_of_a_mapped_region_take_a_devices_read() {
    let region = Region::new(memfd(BYTES, true, SealFlags::SHRINK), 0, BYTES, false).unwrap();
    let mut buf = region.io_buf(4096, 8192).unwrap();
    buf.as_mut_slice().fill(9);
    let mut seen = [0; 1];
    region.read(4096 + 8191, &mut seen, &mut RunningSums::default()).unwrap();
    assert_eq!(seen, [9]);
    assert!(
        region.io_buf(4096, 100).is_none() && region.io_buf(1, 4096).is_none() && region.io_buf(BYTES, 4096).is_none()
    );
}
