//! What a server does that a program started for itself: it lets go of what it inherited.
//!
//! Here and not in the program: between fork and exec only a fork of the whole process could do it, and an engine with
//! hundreds of GiB mapped pays for each page table that is copied. So it is started the cheap way, and cleans up itself.

use std::fs;
use std::io;

/// First descriptor that is not standard input, output or error.
const FIRST: i32 = 3;

/// Leaves the session and the terminal of whoever started it, and closes every descriptor beyond the standard three: a port
/// or the end of a pipe that a program holds open must not stay open for as long as its server lives. To be called before
/// anything was opened and any thread started.
pub fn detach() -> io::Result<()> {
    match rustix::process::setsid() {
        // The leader of a process group cannot leave it, and needs not: it was put there to be on its own.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    // Collected first: the listing is a descriptor itself, and closed before the others are.
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd >= FIRST)
        .collect();
    for fd in open {
        // SAFETY: this process has just begun and opened nothing yet but the listing above, which is closed (closing its
        // number again is an error without effect, as no thread opens anything meanwhile). What else is open was inherited,
        // and nothing here owns it.
        unsafe { rustix::io::close(fd) };
    }
    Ok(())
}
