//! What this machine has: processors, memory that may be used, disk that is free.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use kvkeep_core::{Error, ErrorKind, Result};

use crate::size::ByteSize;

/// Processors that this process may use, at least 1. Asked once: the answer comes out of files of the cgroup and takes 45 us,
/// a fifth of the time of a whole get.
pub fn cores() -> usize {
    static CORES: LazyLock<usize> =
        LazyLock::new(|| std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get));
    *CORES
}

/// min(available memory, what is left of the cgroup's limit).
pub fn memory_for_us() -> Result<ByteSize> {
    let text = fs::read_to_string("/proc/meminfo")
        .map_err(|e| Error::new(ErrorKind::Config, "/proc/meminfo cannot be read: set arena.bytes").with("cause", e))?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .ok_or_else(|| Error::new(ErrorKind::Config, "/proc/meminfo has no MemAvailable: set arena.bytes"))?
        * 1024;
    Ok(ByteSize(available.min(cgroup_room().unwrap_or(u64::MAX))))
}

/// What the cgroup (version 2) of this process still allows; `None` where it has no limit.
fn cgroup_room() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?.trim_start_matches('/');
    let folder = Path::new("/sys/fs/cgroup").join(path);
    let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

/// Free bytes of the file system that holds `path`, or its nearest parent that exists.
pub fn disk_free(path: &Path) -> Result<ByteSize> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let there = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(v) => Ok(ByteSize(v.f_bavail * v.f_frsize)),
        Err(e) => Err(Error::new(ErrorKind::Config, "free disk space cannot be read")
            .with("path", path.display())
            .with("cause", e)),
    }
}

/// Sum of the sizes of the files in a folder; 0 where it is not there.
pub fn folder_bytes(path: &Path) -> u64 {
    fs::read_dir(path)
        .map(|entries| {
            entries.filter_map(|e| e.ok()?.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
        })
        .unwrap_or(0)
}
