//! Block connections of a client: which way they go, who uses them, and what happens when they are lost.
//!
//! A call borrows a connection for itself and gives it back when it is answered. A call that is dropped early, or lost,
//! takes its connection with it: nobody else could tell what still comes on it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

use super::breaker::{Breaker, BreakerState};
use super::conn::{Address, Conn};
use super::sockets::Sockets;
use crate::config::ClientConfig;
use crate::connection::Hello;
use crate::error::{Error, ErrorKind, Result};

/// Which way the hot verbs go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wire {
    /// gRPC, as all other verbs.
    Grpc,
    /// The block protocol on the Unix socket: descriptors, regions, mapped reads.
    Socket,
    /// The block protocol over TCP.
    Port,
}

impl Wire {
    /// The word used in logs, JSON and the CLI.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Socket => "socket",
            Self::Port => "port",
        }
    }
}

/// The way a client goes, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Of the hot verbs.
    pub wire: Wire,
    /// Bytes can go straight between the server's memory and registered regions.
    pub regions: bool,
    /// Blocks can be read in place.
    pub mapped: bool,
    /// Where it leads: a path or an address.
    pub to: String,
    /// Why not a faster one; empty where there is none.
    pub why: String,
}

/// Connections, all to one server.
pub(crate) struct Pool {
    address: RwLock<Option<Address>>,
    idle: Mutex<VecDeque<Conn>>,
    permits: Arc<Semaphore>,
    pub(crate) breaker: Breaker,
    faults: Arc<super::faults::Faults>,
    sockets: Arc<Sockets>,
}

/// A connection in use. Dropped without [`Lent::give_back`] it is closed.
pub(crate) struct Lent<'a> {
    pool: &'a Pool,
    conn: Option<Conn>,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Pool {
    pub(crate) fn new(connections_max: usize, faults: Arc<super::faults::Faults>, sockets: Arc<Sockets>) -> Self {
        Self {
            address: RwLock::new(None),
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(connections_max)),
            breaker: Breaker::default(),
            faults,
            sockets,
        }
    }

    /// Where its connections go; `None`: there is no such way.
    pub(crate) fn address(&self) -> Option<Address> {
        self.address.read().clone()
    }

    /// From now on they go there. Those of before are closed.
    pub(crate) fn set_address(&self, address: Option<Address>) {
        *self.address.write() = address;
        self.idle.lock().clear();
    }

    /// Borrows a connection; answers what the server said if it was asked just now.
    pub(crate) async fn lend(&self, config: &ClientConfig) -> Result<(Lent<'_>, Option<Arc<Hello>>)> {
        let address = self.address().ok_or_else(|| Error::new(ErrorKind::Unreachable, "no block way is known"))?;
        // Bounded by the calls that wait, each with its deadline; nothing is queued for a server that is gone.
        let opened = self.breaker.counts().0;
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        self.may_still(opened)?;
        let permit = permit.map_err(|_| Error::new(ErrorKind::Unreachable, "the client is closing"))?;
        if let Some(conn) = self.idle.lock().pop_back() {
            return Ok((Lent { pool: self, conn: Some(conn), _permit: permit }, None));
        }
        self.faults.dial().await?;
        let conn = Conn::dial(&address, config, &self.sockets).await?;
        let hello = Arc::clone(&conn.hello);
        Ok((Lent { pool: self, conn: Some(conn), _permit: permit }, Some(hello)))
    }

    /// Whether a call may go out.
    pub(crate) fn may(&self) -> Result<()> {
        if self.breaker.may(Instant::now()) {
            return Ok(());
        }
        Err(Error::not_asked())
    }

    /// Whether a call that had to wait may go out: not where the server was lost meanwhile, or each of those that waited would
    /// wait for the server once more, one after the other. `opened`: of [`Breaker::counts`] when it began to wait.
    pub(crate) fn may_still(&self, opened: u64) -> Result<()> {
        let lost = self.breaker.counts().0 != opened && self.breaker.state() != BreakerState::Closed;
        if lost { Err(Error::not_asked()) } else { Ok(()) }
    }

    /// Closes what is idle: after a loss, what was connected to the same server is worth nothing.
    pub(crate) fn drop_idle(&self) {
        self.idle.lock().clear();
    }
}

impl Lent<'_> {
    /// The connection.
    pub(crate) fn conn(&mut self) -> &mut Conn {
        self.conn.as_mut().expect("it is given back only by value")
    }

    /// Whether regions may be registered on it.
    pub(crate) fn may_register(&self) -> bool {
        self.conn.as_ref().is_some_and(|c| c.hello.ways.may_register)
    }

    /// Whether the arena may be mapped over it.
    pub(crate) fn may_map(&self) -> bool {
        self.conn.as_ref().is_some_and(|c| c.hello.ways.may_map)
    }

    /// The call was answered to its last frame.
    pub(crate) fn give_back(mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.idle.lock().push_back(conn);
        }
    }
}
