//! Memory that two processes share, and copies that go around the cache. All `unsafe` of this crate is here.

use std::fs::File;
use std::io::Write as _;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;

use anyhow::{Context as _, ensure};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Where buffers begin at a multiple. Not for neatness: the kernel's copies between socket and buffer take half as much CPU
/// again when the two are 16 bytes apart (seen on Zen 4).
const PAGE_BYTES: usize = 4096;

/// Bytes in whole pages, all of them touched.
pub struct Pages {
    bytes: Vec<u8>,
    range: Range<usize>,
}

impl Pages {
    /// So many bytes.
    pub fn new(len: usize) -> Self {
        // Not 0: zeroes would come from the system as one page that is shared until it is written.
        let bytes = vec![1; len + PAGE_BYTES];
        let first = bytes.as_ptr().align_offset(PAGE_BYTES).min(PAGE_BYTES);
        Self { bytes, range: first..first + len }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.range.clone()]
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// What keeps a file of memory as it is for ever.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// A file of memory with these bytes that nobody can change any more.
pub fn sealed_file(bytes: &[u8]) -> anyhow::Result<File> {
    let fd = rustix::fs::memfd_create("kvkeep-bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .context("memory to share")?;
    let mut file = File::from(fd);
    file.write_all(bytes).context("fill shared memory")?;
    rustix::fs::fcntl_add_seals(&file, SEALS).context("seal shared memory")?;
    Ok(file)
}

/// A sealed file, mapped for reading.
pub struct Mapped {
    address: *const u8,
    len: usize,
}

impl Mapped {
    /// Maps it, with all its pages.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("shared memory {}", path.display()))?;
        let seals = rustix::fs::fcntl_get_seals(&file).context("seals of shared memory")?;
        ensure!(seals.contains(SEALS), "the shared memory is not sealed");
        let len = usize::try_from(file.metadata()?.len())?;
        ensure!(len > 0, "the shared memory is empty");
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping, at an address that the kernel chooses, of an open file.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, &file, 0) };
        Ok(Self { address: address.context("map shared memory")?.cast_const().cast(), len })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` lives; the seals keep everybody from changing or shortening it.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the whole mapping of `open`, which nobody can refer to any more.
        // If it fails the mapping stays until the process ends, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.address.cast_mut().cast(), self.len) };
    }
}

/// Whether [`copy_streaming`] goes around the cache here.
pub fn can_stream() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Copies with stores that do not read the destination first, where the CPU can ([`can_stream`]); plainly where not.
///
/// # Panics
/// If the lengths differ.
pub fn copy_streaming(to: &mut [u8], from: &[u8]) {
    assert_eq!(to.len(), from.len(), "a copy fills its destination");
    #[cfg(target_arch = "x86_64")]
    if can_stream() {
        // SAFETY: the CPU has AVX2.
        unsafe { stream(to, from) };
        return;
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn stream(to: &mut [u8], from: &[u8]) {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    // SAFETY: any bytes are a valid `__m256i`, and it has no padding.
    let (head, lines, _) = unsafe { to.align_to_mut::<__m256i>() };
    let (head, whole) = (head.len(), size_of_val(lines));
    for (line, from) in lines.iter_mut().zip(from[head..].as_chunks::<32>().0) {
        // SAFETY: both have 32 bytes, and `align_to_mut` aligned `line`.
        unsafe { _mm256_stream_si256(line, _mm256_loadu_si256(from.as_ptr().cast())) };
    }
    // The stores above are not ordered with those that follow, unless told so.
    _mm_sfence();
    to[..head].copy_from_slice(&from[..head]);
    to[head + whole..].copy_from_slice(&from[head + whole..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn streamed_copies_of_any_alignment_are_copies() {
        let from: Vec<u8> = (0..1000).map(|n| (n % 251) as u8).collect();
        for (first, len) in [(0, 0), (0, 1000), (1, 31), (3, 997), (7, 64), (31, 33)] {
            let mut to = vec![0xee; 1000];
            copy_streaming(&mut to[first..first + len], &from[1000 - len..]);
            assert_eq!(to[first..first + len], from[1000 - len..]);
            assert!(to[..first].iter().chain(&to[first + len..]).all(|b| *b == 0xee));
        }
    }

    #[test]
    fn pages_begin_where_pages_do() {
        let mut pages = Pages::new(5000);
        assert_eq!((pages.len(), pages.as_ptr().addr() % PAGE_BYTES), (5000, 0));
        pages[4999] = 7;
        assert_eq!(pages.last(), Some(&7));
    }

    #[test]
    fn sealed_memory_is_read_elsewhere_and_written_by_nobody() {
        let mut file = sealed_file(b"blocks").unwrap();
        assert!(file.write_all(b"more").is_err());
        let mapped = Mapped::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).unwrap();
        assert_eq!(mapped.bytes(), b"blocks");
    }

    #[test]
    fn memory_that_may_change_is_not_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"bytes").unwrap();
        assert!(Mapped::open(&path).is_err());
    }
}
