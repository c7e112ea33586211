//! Places where a test may have the server die: each step of each verb that clients see. Compiled into debug builds only.
//!
//! `KVKEEP_FAILPOINT=name` ends the process, as SIGKILL would, the first time that the place of this name is passed;
//! `name:3` the third time; `name:3:stop` stops it there, as SIGSTOP would.

/// Every name there is.
pub const NAMES: &[&str] = &[
    "hello.said",
    "match.answered",
    "lease.taken",
    "release.asked",
    "touch.asked",
    "get.fetched",
    "get.chunk_sent",
    "reserve.granted",
    "write.landing",
    "write.ended",
    "commit.asked",
    "commit.published",
    "commit.visible",
    "register_region.mapped",
    "get_into.begun",
    "get_into.copied",
    "put_from.reserved",
    "put_from.copied",
    "put_from.committed",
    "map.told",
    "open_file.sent",
    "copy.guarded",
    "session.append.ready",
    "session.append.applied",
];

/// A place was passed.
#[cfg(debug_assertions)]
pub fn at(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    static ARMED: OnceLock<Option<(String, AtomicU32, bool)>> = OnceLock::new();
    debug_assert!(NAMES.contains(&name), "{name} is not listed");
    let armed = ARMED.get_or_init(|| {
        let text = std::env::var("KVKEEP_FAILPOINT").ok()?;
        let mut words = text.split(':');
        let (name, times) = (words.next()?, words.next().and_then(|n| n.parse().ok()).unwrap_or(1));
        Some((name.to_owned(), AtomicU32::new(times), words.next() == Some("stop")))
    });
    if let Some((armed, left, stop)) = armed
        && armed == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        let signal = if *stop { rustix::process::Signal::STOP } else { rustix::process::Signal::KILL };
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        if !stop {
            std::process::abort();
        }
        // The signal is the process's: this thread may run on for a moment, and must not run past the place.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// A place was passed.
#[cfg(not(debug_assertions))]
pub fn at(_name: &'static str) {}
