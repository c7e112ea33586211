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

use rand::SeedableRng as _;
use rand::rngs::StdRng;

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
    static SHIM_FILE: OnceLock<Result<(tempfile::TempDir, PathBuf), String>> = OnceLock::new();
    let built = SHIM_FILE.get_or_init(|| {
        let folder = crate::node::disk_folder();
        let (source, library) = (folder.path().join("shim.c"), folder.path().join("shim.so"));
        fs::write(&source, SHIM).expect("the shim's source can be written");
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let arguments = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"];
        let run = Command::new(&compiler).args(arguments).arg(&library).arg(&source).output();
        match run {
            Ok(output) if output.status.success() => Ok((folder, library)),
            // A compiler that is there and refuses is a bug of the shim, not a reason to skip.
            Ok(output) => panic!("the shim does not compile: {}", String::from_utf8_lossy(&output.stderr)),
            Err(e) => Err(format!("no C compiler ({compiler}: {e})")),
        }
    });
    built.as_ref().map(|(_, library)| library.as_path()).map_err(String::as_str)
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
    /// ends with `$`) succeed and keep nothing.
    pub fn ignore_flushes_of(&self, node: &mut Node, paths: &str) {
        node.options_mut().environment.push(("KVKEEP_POWERCUT_IGNORE_FSYNC".into(), paths.into()));
    }

    /// SIGKILL, then takes back what the seed says of what no flush covered. DRAM is gone too.
    ///
    /// # Panics
    /// If the log cannot be read, or something in it cannot be undone.
    pub fn cut(&self, node: &mut Node, seed: u64) -> Lost {
        node.kill();
        let records = log::read(&self.log);
        let mut rng = StdRng::seed_from_u64(seed);
        let lost = undo::undo(&records, &self.watched, &self.graves(), &mut rng);
        fs::remove_file(&self.log).expect("the log can be removed");
        fs::remove_dir_all(self.graves()).expect("the graves can be removed");
        for arena in crate::leaks::names(node.arena_dir()) {
            fs::remove_dir_all(node.arena_dir().join(arena)).expect("arena files can be removed");
        }
        lost
    }

    fn graves(&self) -> PathBuf {
        let mut name = self.log.clone().into_os_string();
        name.push(".graves");
        name.into()
    }
}
