//! The choice of an engine, made once at start and said why.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use kvkeep_core::{Error, ErrorKind, Result};

use super::disk::{Disk, DiskOptions};
use super::pread::PreadDisk;
use super::uring::UringDisk;

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel lets us, plain system calls otherwise.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Plain system calls.
    Pread,
}

impl EngineChoice {
    /// The word in configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Pread => "pread",
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for EngineChoice {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        [Self::Auto, Self::Uring, Self::Pread].into_iter().find(|choice| choice.word() == word).ok_or_else(|| {
            Error::new(ErrorKind::Config, "a disk engine is 'auto', 'uring' or 'pread'").with("engine", word)
        })
    }
}

/// A disk that was opened, and why with this engine.
pub struct Opened {
    /// The disk, without a flush coordinator around it.
    pub disk: Arc<dyn Disk>,
    /// One sentence for the log: the engine, its limits, and what was refused.
    pub said: String,
}

/// Opens the folder at `path`, which must exist, with the engine chosen, and logs what came of it.
///
/// # Errors
/// Those of [`UringDisk::open`] and [`PreadDisk::open`]; with [`EngineChoice::Auto`] only of the latter.
pub fn open(path: &Path, choice: EngineChoice, options: DiskOptions) -> Result<Opened> {
    let (disk, why): (Arc<dyn Disk>, _) = match choice {
        EngineChoice::Pread => (Arc::new(PreadDisk::open(path, options)?), "as configured".to_owned()),
        EngineChoice::Uring => (Arc::new(UringDisk::open(path, options)?), "as configured".to_owned()),
        EngineChoice::Auto => match UringDisk::open(path, options) {
            Ok(disk) => (Arc::new(disk), "the best that this kernel offers".to_owned()),
            Err(refused) if refused.kind() == ErrorKind::Unavailable => {
                (Arc::new(PreadDisk::open(path, options)?), refused.to_string())
            }
            Err(e) => return Err(e),
        },
    };
    let said = format!("{} ({why})", disk.engine());
    tracing::info!(folder = %path.display(), engine = %said, "disk opened");
    Ok(Opened { disk, said })
}
