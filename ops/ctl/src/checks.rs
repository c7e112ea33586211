//! What the doctor looks at on this machine. Finding and judging are apart, so that the judging can be tested.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::process::{Resource, getrlimit};

use crate::units;

/// Smallest arena worth having, bytes: one file of the arena.
const ARENA_BYTES_MIN: u64 = 64 << 20;
/// Less free disk than this is too little to start with, bytes.
const DISK_BYTES_MIN: u64 = 1 << 30;
/// Less free disk than this is not much, bytes.
const DISK_BYTES_LOW: u64 = 10 << 30;
/// Open files that a busy node wants: connections, segments, the index.
const FILES_WANTED: u64 = 4096;
/// Alignment of a direct write, bytes.
const DIRECT_BYTES: usize = 4096;

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok,
    Warn,
    Bad,
}

impl Level {
    /// The word that is shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }
}

/// One line of the doctor's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do, where something should be done.
    pub advice: Option<String>,
}

impl Check {
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), advice: None }
    }

    pub fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, level: Level::Warn, found: found.into(), advice: Some(advice.into()) }
    }

    pub fn bad(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, level: Level::Bad, found: found.into(), advice: Some(advice.into()) }
    }
}

/// Everything about this machine.
pub fn machine(data_dir: &Path, arena_dir: &Path) -> Vec<Check> {
    let memory = available_memory();
    let arena = memory / 4;
    vec![
        judge_memory(memory),
        io_uring(),
        judge_memlock(getrlimit(Resource::Memlock).current, may_lock(), arena),
        arena_space(arena_dir, arena),
        huge_pages(),
        disk(data_dir),
        direct(data_dir),
        judge_files(getrlimit(Resource::Nofile).current),
    ]
}

/// What may be used: available memory, or less where a control group says so.
fn available_memory() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo_bytes(&meminfo, "MemAvailable").unwrap_or(0);
    let group = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok());
    available.min(group.unwrap_or(u64::MAX))
}

fn meminfo_bytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn judge_memory(available: u64) -> Check {
    let arena = available / 4;
    let found = format!("{} usable; the default arena is {}", units::bytes(available), units::bytes(arena));
    if arena < ARENA_BYTES_MIN {
        Check::bad("memory", found, "free memory, or raise the control group's limit: an arena needs at least 64 MiB")
    } else {
        Check::ok("memory", found)
    }
}

fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    const FALLBACK: &str = "kvkeepd will use pread/pwrite and more CPU";
    let ring = match io_uring::IoUring::new(8) {
        Ok(ring) => ring,
        Err(e) => {
            let advice = format!("{FALLBACK}; allow io_uring_setup (sysctl kernel.io_uring_disabled, seccomp profile)");
            return Check::warn(NAME, format!("not available: {e}"), advice);
        }
    };
    let mut probe = io_uring::Probe::new();
    let fixed = ring.submitter().register_probe(&mut probe).is_ok()
        && probe.is_supported(io_uring::opcode::ReadFixed::CODE)
        && probe.is_supported(io_uring::opcode::WriteFixed::CODE);
    if fixed {
        Check::ok(NAME, "available, with registered buffers")
    } else {
        Check::warn(NAME, "available, without registered buffers", "use Linux 5.10 or newer")
    }
}

/// CAP_IPC_LOCK: io_uring then counts no registered memory against the limit.
fn may_lock() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok())
        .is_some_and(|caps| caps >> CAP_IPC_LOCK & 1 == 1)
}

fn judge_memlock(limit: Option<u64>, may_lock: bool, arena: u64) -> Check {
    const NAME: &str = "locked memory";
    match limit {
        None => Check::ok(NAME, "unlimited"),
        Some(_) if may_lock => Check::ok(NAME, "this user may lock memory (CAP_IPC_LOCK)"),
        Some(n) if n >= arena => Check::ok(NAME, format!("limit {}", units::bytes(n))),
        Some(n) => Check::warn(
            NAME,
            format!("limit {}, the default arena is {}", units::bytes(n), units::bytes(arena)),
            "the arena will not be registered with io_uring (more CPU per byte); set `ulimit -l unlimited` \
             (systemd: LimitMEMLOCK=infinity)",
        ),
    }
}

fn is_memory_fs(f_type: u64) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    const HUGETLBFS: u64 = 0x9584_58f6;
    [TMPFS, RAMFS, HUGETLBFS].contains(&f_type)
}

/// The file system that a folder is on, or that its nearest parent that exists is on: (in memory, size, free), bytes.
fn space(dir: &Path) -> std::io::Result<(bool, u64, u64)> {
    let there = dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/"));
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    let fs = rustix::fs::statfs(there)?;
    let vfs = rustix::fs::statvfs(there)?;
    Ok((is_memory_fs(fs.f_type as u64), vfs.f_blocks * vfs.f_frsize, vfs.f_bavail * vfs.f_frsize))
}

fn arena_space(dir: &Path, arena: u64) -> Check {
    const NAME: &str = "arena folder";
    match space(dir) {
        Ok((memory, size, free)) => judge_arena_space(&dir.display().to_string(), memory, size, free, arena),
        Err(e) => Check::bad(NAME, format!("{}: {e}", dir.display()), "name a folder on tmpfs with --arena-dir"),
    }
}

fn judge_arena_space(dir: &str, memory: bool, size: u64, free: u64, arena: u64) -> Check {
    const NAME: &str = "arena folder";
    let found = format!("{dir}: {} of {} free", units::bytes(free), units::bytes(size));
    if !memory {
        return Check::bad(
            NAME,
            format!("{dir} is not in memory"),
            "use a folder on tmpfs or hugetlbfs, such as /dev/shm",
        );
    }
    let advice = format!(
        "mount -o remount,size={} {dir} (container: --shm-size), or configure a smaller arena",
        arena.next_multiple_of(ARENA_BYTES_MIN)
    );
    match free {
        n if n < ARENA_BYTES_MIN => Check::bad(NAME, found, advice),
        n if n < arena => {
            Check::warn(NAME, format!("{found}, less than the default arena of {}", units::bytes(arena)), advice)
        }
        _ => Check::ok(NAME, found),
    }
}

fn huge_pages() -> Check {
    let shmem = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = meminfo.lines().find_map(|l| l.strip_prefix("HugePages_Free:")?.trim().parse::<u64>().ok());
    judge_huge_pages(&shmem, free.unwrap_or(0))
}

fn judge_huge_pages(shmem: &str, free: u64) -> Check {
    const NAME: &str = "huge pages";
    let setting = shmem.split_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']')).unwrap_or("unknown");
    let found = format!("transparent ones for tmpfs: {setting}; reserved and free: {free}");
    match setting {
        "always" | "within_size" | "advise" | "force" => Check::ok(NAME, found),
        _ if free > 0 => Check::ok(NAME, found),
        _ => Check::warn(
            NAME,
            found,
            "4 KiB pages cost TLB misses and slow starts: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

fn disk(dir: &Path) -> Check {
    const NAME: &str = "disk";
    match space(dir) {
        Ok((memory, _, free)) => judge_disk(&dir.display().to_string(), memory, free),
        Err(e) => Check::bad(NAME, format!("{}: {e}", dir.display()), "name a folder on a disk with --data-dir"),
    }
}

fn judge_disk(dir: &str, memory: bool, free: u64) -> Check {
    const NAME: &str = "disk";
    let found = format!("{dir}: {} free", units::bytes(free));
    match free {
        _ if memory => Check::warn(NAME, format!("{found}, in memory"), "durable blocks need a real disk: --data-dir"),
        n if n < DISK_BYTES_MIN => Check::bad(NAME, found, "free at least 1 GiB, or use another disk"),
        n if n < DISK_BYTES_LOW => Check::warn(NAME, found, "the store will be small; free space, or use another disk"),
        _ => Check::ok(NAME, found),
    }
}

fn direct(dir: &Path) -> Check {
    const NAME: &str = "direct I/O";
    match try_direct(dir) {
        Ok(()) => Check::ok(NAME, format!("works in {}", dir.display())),
        Err(e) => Check::bad(
            NAME,
            format!("{}: {e}", dir.display()),
            "use a folder that can be written, on a file system with O_DIRECT (ext4, xfs)",
        ),
    }
}

/// Writes one block past the page cache and removes the file.
fn try_direct(dir: &Path) -> std::io::Result<()> {
    let there = dir.ancestors().find(|d| d.is_dir()).unwrap_or(Path::new("."));
    let scratch = tempfile::Builder::new().prefix(".kvkeep-doctor-").tempdir_in(there)?;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(scratch.path().join("block"))?;
    // Aligned by taking the aligned part of twice as much.
    let memory = vec![0x5a_u8; 2 * DIRECT_BYTES];
    let start = memory.as_ptr().align_offset(DIRECT_BYTES);
    let block = memory.get(start..start + DIRECT_BYTES).ok_or_else(|| std::io::Error::other("no aligned memory"))?;
    file.write_all(block)?;
    file.sync_data()
}

fn judge_files(limit: Option<u64>) -> Check {
    const NAME: &str = "open files";
    match limit {
        None => Check::ok(NAME, "unlimited"),
        Some(n) if n >= FILES_WANTED => Check::ok(NAME, format!("limit {n}")),
        Some(n) => Check::warn(
            NAME,
            format!("limit {n}"),
            format!("set `ulimit -n {FILES_WANTED}` or more (systemd: LimitNOFILE)"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn locked_memory_is_enough_when_the_arena_fits_or_the_user_may() {
        assert_eq!(judge_memlock(None, false, GIB).level, Level::Ok);
        assert_eq!(judge_memlock(Some(8 << 20), true, GIB).level, Level::Ok);
        assert_eq!(judge_memlock(Some(GIB), false, GIB).level, Level::Ok);
        assert_eq!(judge_memlock(Some(8 << 20), false, GIB).level, Level::Warn);
    }

    #[test]
    fn an_arena_folder_is_in_memory_and_large_enough() {
        let judge = |memory, free| judge_arena_space("/dev/shm", memory, 8 * GIB, free, 4 * GIB).level;
        assert_eq!(judge(false, 8 * GIB), Level::Bad);
        assert_eq!(judge(true, 8 * GIB), Level::Ok);
        assert_eq!(judge(true, GIB), Level::Warn);
        assert_eq!(judge(true, 1 << 20), Level::Bad);
    }

    #[test]
    fn the_setting_of_huge_pages_is_the_word_in_brackets() {
        assert_eq!(judge_huge_pages("always within_size [advise] never deny force\n", 0).level, Level::Ok);
        assert_eq!(judge_huge_pages("always within_size advise [never] deny force\n", 0).level, Level::Warn);
        assert_eq!(judge_huge_pages("always within_size advise [never] deny force\n", 512).level, Level::Ok);
        assert_eq!(judge_huge_pages("", 0).level, Level::Warn);
    }

    #[test]
    fn a_disk_has_room_and_is_no_memory() {
        assert_eq!(judge_disk("d", true, 100 * GIB).level, Level::Warn);
        assert_eq!(judge_disk("d", false, 100 * GIB).level, Level::Ok);
        assert_eq!(judge_disk("d", false, 5 * GIB).level, Level::Warn);
        assert_eq!(judge_disk("d", false, GIB / 2).level, Level::Bad);
    }

    #[test]
    fn memory_is_read_from_the_right_line() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   12000000 kB\n";
        assert_eq!(meminfo_bytes(text, "MemAvailable"), Some(12_000_000 * 1024));
        assert_eq!(meminfo_bytes(text, "MemFree"), None);
    }

    #[test]
    fn everything_wrong_comes_with_advice() {
        for check in machine(Path::new("/nonexistent/data"), Path::new("/proc")) {
            assert_eq!(check.level != Level::Ok, check.advice.is_some(), "{check:?}");
        }
    }
}
