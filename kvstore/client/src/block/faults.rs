//! A switch for tests of programs that use this SDK: what a lost server does to them, without a server that is lost.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// What happens to the hot verbs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None = 0,
    /// Connections are refused, as by a server that is dead.
    Refused = 1,
    /// Calls go out and nothing comes back, as from a server that is stopped.
    Silent = 2,
    /// Every part is a miss.
    Miss = 3,
}

/// Where the switch stands.
#[derive(Debug, Default)]
pub(crate) struct Faults(AtomicU8);

impl Faults {
    pub(crate) fn set(&self, fault: Fault) {
        self.0.store(fault as u8, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Fault {
        match self.0.load(Ordering::Relaxed) {
            1 => Fault::Refused,
            2 => Fault::Silent,
            3 => Fault::Miss,
            _ => Fault::None,
        }
    }

    /// Before a connection is made.
    pub(crate) async fn dial(&self) -> Result<()> {
        match self.get() {
            Fault::Refused => Err(refused()),
            _ => Ok(()),
        }
    }

    /// Before a call is sent; `patience`: how long a silent server is waited for.
    pub(crate) async fn call(&self, patience: std::time::Duration) -> Result<()> {
        match self.get() {
            Fault::None => Ok(()),
            Fault::Refused => Err(refused()),
            Fault::Silent => {
                tokio::time::sleep(patience).await;
                Err(Error::new(ErrorKind::Unreachable, "the server gave no sign of life (injected)").may_be_done())
            }
            Fault::Miss => Err(Error::new(ErrorKind::Unreachable, "a miss (injected)").final_word()),
        }
    }
}

fn refused() -> Error {
    Error::new(ErrorKind::Unreachable, "the connection was refused (injected)")
}
