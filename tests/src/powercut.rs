//! The loss of power, played with the real binary.
//!
//! A server runs with the shim of `tests/powercut/shim.c`, which logs how to undo every change of its files. After it was
//! killed, [`PowerCut::cut`] takes back a seeded part of what no flush covered. What is left is a disk that a device
//! without power loss protection could show after a cut at that moment: pages of 4 KiB that arrived or did not, in any
//! mixture; sizes and names as of some moment since the last flush of the file and of its folder.

mod log;
mod undo;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::Node;
pub use undo::Lost;

/// Source of the shim.
const SHIM: &str = include_str!("../powercut/shim.c");

/// How long a flush takes in a server under the shim, microseconds: long enough that a cut often falls into one.
const FLUSH_US: u32 = 300;

/// A node whose power can be cut.
pub struct PowerCut {
    log: PathBuf,
    watched: PathBuf,
}

/// The compiled shim.
///
/// # Errors
/// Why there is none: no C compiler.
pub fn shim() -> Result<&'static Path, &'static str> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    LIBRARY.get_or_init(compile).as_deref().map_err(String::as_str)
}

/// Compiles the shim to a file that is named by its source and stays: test binaries share it, and replace it as a whole.
fn compile() -> Result<PathBuf, String> {
    let folder = crate::node::disk_folder();
    let (source, built) = (folder.path().join("shim.c"), folder.path().join("shim.so"));
    fs::write(&source, SHIM).expect("the shim's source can be written");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let arguments = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"];
    let run = Command::new(&compiler).args(arguments).arg(&built).arg(&source).output();
    let output = run.map_err(|e| format!("no C compiler ({compiler}: {e})"))?;
    // A compiler that is there and refuses is a bug of the shim, not a reason to skip.
    assert!(output.status.success(), "the shim does not compile: {}", String::from_utf8_lossy(&output.stderr));
    let name = format!("powercut-{:08x}.so", SHIM.bytes().fold(0, |h, b| crate::payload::mix(h ^ u64::from(b))) as u32);
    let library = folder.path().with_file_name(name);
    fs::rename(built, &library).expect("the shim can be moved");
    Ok(library)
}

impl PowerCut {
    /// Puts the shim under a node that does not run yet. The node uses `pread/pwrite`, which the shim sees.
    ///
    /// # Errors
    /// Why there is no shim.
    ///
    /// # Panics
    /// If the node's folders cannot be made.
    pub fn under(node: &mut Node) -> Result<Self, &'static str> {
        let shim = shim()?;
        fs::create_dir_all(node.data_dir()).expect("the data folder can be made");
        let watched = fs::canonicalize(node.data_dir()).expect("the data folder is there");
        let log = node.beside("undo.log");
        let text = |path: &Path| path.display().to_string();
        let options = node.options_mut();
        options.no_io_uring = true;
        options.environment = vec![
            ("LD_PRELOAD".into(), text(shim)),
            ("KVKEEP_POWERCUT_DIR".into(), text(&watched)),
            ("KVKEEP_POWERCUT_LOG".into(), text(&log)),
            ("KVKEEP_POWERCUT_FLUSH_US".into(), FLUSH_US.to_string()),
        ];
        Ok(Self { log, watched })
    }

    /// From the next start on the device lies: flushes of files whose path contains one of `paths` (ends with it, where it
    /// ends with `$`; both of two with `*` between them) succeed and keep nothing.
    pub fn ignore_flushes_of(&self, node: &mut Node, paths: &str) {
        node.options_mut().environment.push(("KVKEEP_POWERCUT_IGNORE_FSYNC".into(), paths.into()));
    }

    /// Prepares the failures of [`Self::fail`], of files whose path contains `path`, from the next start on.
    pub fn may_fail(&self, node: &mut Node, path: &str) {
        node.options_mut().environment.push(("KVKEEP_POWERCUT_FAIL".into(), path.into()));
    }

    /// From now on, or no longer, such calls end with EIO.
    ///
    /// # Panics
    /// If the order cannot be written.
    pub fn fail(&self, call: Fails, failing: bool) {
        let mut order = self.log.clone().into_os_string();
        order.push(format!(".fail-{}", call.word()));
        match failing {
            true => fs::write(order, []).expect("an order to the shim can be written"),
            false => fs::remove_file(order).expect("an order to the shim can be withdrawn"),
        }
    }

    /// SIGKILL, then takes back of what no flush covered as much as `cut` says. DRAM is gone too. Every life of the server
    /// since [`Self::under`] must have ended in a cut.
    ///
    /// # Panics
    /// If the log cannot be read, or something in it cannot be undone.
    pub fn cut(&self, node: &mut Node, cut: Cut) -> Lost {
        node.kill();
        let lost = take_back(&self.log, &self.watched, cut);
        for arena in crate::leaks::names(node.arena_dir()) {
            fs::remove_dir_all(node.arena_dir().join(arena)).expect("arena files can be removed");
        }
        lost
    }
}

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fails {
    /// Reads at an offset.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
}

impl Fails {
    const fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// How much of what no flush covered is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Everything.
    Everything,
    /// What this seed draws.
    Seeded(u64),
}

/// Takes back what the log has, below `watched`; then the log is gone.
fn take_back(log: &Path, watched: &Path, cut: Cut) -> Lost {
    let mut graves = log.to_owned().into_os_string();
    graves.push(".graves");
    let graves = PathBuf::from(graves);
    let records = log::read(log);
    let lost = undo::undo(&records, watched, &graves, cut);
    fs::remove_file(log).expect("the log can be removed");
    fs::remove_dir_all(graves).expect("the graves can be removed");
    lost
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    const FOLDER: &str = "KVKEEP_POWERCUT_CHILD";
    const PAGE: usize = 4096;

    /// What a process under the shim does to the folder before its power is cut. Not a test of its own: the test below
    /// runs this executable again for it.
    #[test]
    #[ignore = "the other test runs it"]
    fn child() {
        let Ok(folder) = std::env::var(FOLDER) else { return };
        let at = |name: &str| Path::new(&folder).join(name);
        let sync_names = || File::open(&folder).unwrap().sync_all().unwrap();
        let new = |name: &str, data: &[u8]| {
            let mut file = File::create(at(name)).unwrap();
            file.write_all(data).unwrap();
            file
        };
        // Flushed, names too.
        let pages = new("pages", &[b'a'; 2 * PAGE]);
        pages.sync_data().unwrap();
        new("renamed", b"old").sync_all().unwrap();
        new("removed", b"kept").sync_all().unwrap();
        sync_names();
        // Not flushed.
        pages.write_all_at(&[b'b'; PAGE], 0).unwrap();
        pages.write_all_at(&[b'c'; PAGE], 2 * PAGE as u64).unwrap();
        new("nameless", b"flushed under a name that is not").sync_all().unwrap();
        new("renamed.new", b"new").sync_all().unwrap();
        fs::rename(at("renamed.new"), at("renamed")).unwrap();
        fs::remove_file(at("removed")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        std::process::abort();
    }

    /// The state of the folder after a cut, in words.
    fn after(cut: Cut) -> Result<BTreeSet<String>, &'static str> {
        let shim = shim()?;
        let folder = crate::node::disk_folder();
        let (watched, log) = (folder.path().join("watched"), folder.path().join("log"));
        fs::create_dir(&watched).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "powercut::tests::child", "--ignored", "--nocapture"])
            .env(FOLDER, &watched)
            .env("LD_PRELOAD", shim)
            .env("KVKEEP_POWERCUT_DIR", &watched)
            .env("KVKEEP_POWERCUT_LOG", &log)
            .output()
            .unwrap()
            .status;
        assert!(status.code().is_none(), "the child aborts, it does not fail: {status}");
        take_back(&log, &watched, cut);
        let mut state = BTreeSet::new();
        for name in crate::leaks::names(&watched) {
            let data = fs::read(watched.join(&name)).unwrap_or_default();
            let pages: String = data.chunks(PAGE).map(|page| char::from(page[0])).collect();
            assert!(
                data.chunks(PAGE).all(|page| page.len() < PAGE || page.iter().all(|b| *b == page[0])),
                "a torn page"
            );
            state.insert(format!(
                "{name}={}",
                if name == "pages" { &pages } else { std::str::from_utf8(&data).unwrap() }
            ));
        }
        Ok(state)
    }

    #[test]
    fn the_shim_loses_what_no_flush_covered_and_nothing_else() {
        let everything = match after(Cut::Everything) {
            Ok(state) => state,
            Err(why) => return crate::skipped("the_shim_loses_what_no_flush_covered", why),
        };
        assert_eq!(everything, ["pages=aa", "removed=kept", "renamed=old"].map(String::from).into());
        let mut all = BTreeSet::new();
        for seed in 0..48 {
            all.extend(after(Cut::Seeded(seed)).expect("there is a shim"));
        }
        // Each change alone, and none that was not made. `\0`: a page of a file that grew and whose bytes did not arrive.
        let expected = [
            "folder=",
            "nameless=flushed under a name that is not",
            "pages=aa",
            "pages=aac",
            "pages=aa\0",
            "pages=ba",
            "pages=bac",
            "pages=ba\0",
            "removed=kept",
            "renamed.new=new",
            "renamed=new",
            "renamed=old",
        ];
        assert_eq!(all, expected.map(String::from).into());
    }
}
