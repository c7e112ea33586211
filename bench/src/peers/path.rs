//! A path: one way to move blocks, measured in windows. What it is called, what a window of it yields.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::processor::Processor;

/// Bytes of every block.
pub const BLOCK_BYTES: usize = 1 << 20;
/// Bytes that every path goes through before it comes back to where it began: eight times a cache of 32 MiB.
pub const WORKING_SET_BYTES: usize = 256 << 20;
/// Blocks of it.
pub const BLOCKS: usize = WORKING_SET_BYTES / BLOCK_BYTES;
/// Blocks of a batch.
pub const BATCH: u32 = 64;
/// Most calls of one window whose times are kept; a window of half a second stays far below.
const LATENCIES_MAX: usize = 1 << 20;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// To the client.
    Get,
    /// To the server.
    Put,
    /// Within one process.
    Copy,
    /// Nowhere: a call without blocks.
    Call,
}

/// Names a path; unique within a run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PathId {
    /// Its name.
    pub path: String,
    /// Which way.
    pub way: Way,
    /// Blocks per call.
    pub batch: u32,
    /// Connections, or threads where there are none; one call in flight on each.
    pub connections: u32,
}

impl PathId {
    /// One block a call, one connection.
    pub fn single(path: &str, way: Way) -> Self {
        Self { path: path.to_owned(), way, batch: 1, connections: 1 }
    }

    /// The same with [`BATCH`] blocks a call.
    pub fn batched(mut self) -> Self {
        self.batch = BATCH;
        self
    }

    /// The same over so many connections.
    pub fn over(mut self, connections: u32) -> Self {
        self.connections = connections;
        self
    }
}

impl fmt::Display for PathId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        let way = match self.way {
            Way::Get => "get",
            Way::Put => "put",
            // Said by the name.
            Way::Copy | Way::Call => "",
        };
        if !way.is_empty() && !self.path.ends_with(way) {
            write!(f, " {way}")?;
        }
        if self.batch > 1 {
            write!(f, " x{}", self.batch)?;
        }
        if self.connections > 1 {
            write!(f, ", {} connections", self.connections)?;
        }
        Ok(())
    }
}

/// Paths that are compared with each other are measured close to each other in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Client and server share memory.
    SameHost,
    /// They share a socket.
    Network,
}

/// Who a path belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// KVKeep.
    Ours,
    /// A few lines that do only what must be done.
    Reference,
    /// Somebody else's store.
    Peer,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ours, Self::Reference, Self::Peer];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "ours",
            Self::Reference => "references",
            Self::Peer => "peers",
        })
    }
}

/// What one window yields.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Bytes of blocks moved, or handed over where nothing moves.
    pub bytes: u64,
    /// Time that it took, preparations left out.
    pub elapsed: Duration,
    /// CPU time of client and server.
    pub cpu_seconds: f64,
    /// Of each call.
    pub latencies: Vec<Duration>,
}

/// A window that is being measured. It is polled on the bench's own thread.
pub type Measuring<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Sample>> + 'a>>;

/// One way to move blocks.
pub trait Path {
    /// Makes calls for as long as the window is, at least one; goes on where the last window ended, so that no window
    /// begins with blocks that are in a cache.
    fn measure(&mut self, window: Duration) -> Measuring<'_>;
}

/// A path of a run.
pub struct Entry {
    /// Its name.
    pub id: PathId,
    /// What it is, in a few words.
    pub what: String,
    /// Whose it is.
    pub kind: Kind,
    /// What it is measured close to.
    pub group: Group,
    /// How to measure it.
    pub path: Box<dyn Path>,
}

/// Collects the calls of one window. The clock stands still outside of [`Self::call`], CPU time is that of the whole
/// stretch less what [`Self::pause`] was given.
pub struct Stretch {
    window: Duration,
    sample: Sample,
    processor: Processor,
    began: f64,
}

impl Stretch {
    /// Begins a window; its CPU time is that of this process and of these.
    pub fn begin(window: Duration, servers: &[u32]) -> Self {
        let processor = Processor::of(servers);
        Self { window, sample: Sample::default(), began: processor.seconds(), processor }
    }

    /// Is there time left? The first call is always made.
    pub fn going(&self) -> bool {
        self.sample.elapsed < self.window || self.sample.latencies.is_empty()
    }

    /// Times a call that moves so many bytes.
    pub fn call<T>(&mut self, bytes: usize, call: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let answer = call();
        self.note(bytes, began.elapsed());
        answer
    }

    /// Times a call that is awaited.
    pub async fn wait<T>(&mut self, bytes: usize, call: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let answer = call.await;
        self.note(bytes, began.elapsed());
        answer
    }

    /// Does something between two calls that is no part of the measurement.
    pub async fn pause<T>(&mut self, aside: impl Future<Output = T>) -> T {
        let before = self.processor.seconds();
        let answer = aside.await;
        self.began += self.processor.seconds() - before;
        answer
    }

    fn note(&mut self, bytes: usize, took: Duration) {
        self.sample.bytes += bytes as u64;
        self.sample.elapsed += took;
        if self.sample.latencies.len() < LATENCIES_MAX {
            self.sample.latencies.push(took);
        }
    }

    /// Ends the window.
    pub fn end(mut self) -> Sample {
        self.sample.cpu_seconds = self.processor.seconds() - self.began;
        self.sample
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_differs_from_one_block_on_one_connection() {
        assert_eq!(PathId::single("memcpy", Way::Copy).to_string(), "memcpy");
        assert_eq!(PathId::single("region_get", Way::Get).to_string(), "region_get");
        assert_eq!(PathId::single("raw_tcp", Way::Put).over(4).to_string(), "raw_tcp put, 4 connections");
        assert_eq!(PathId::single("redis", Way::Get).batched().to_string(), "redis get x64");
    }

    #[tokio::test]
    async fn a_stretch_counts_calls_and_not_what_is_between_them() {
        let mut stretch = Stretch::begin(Duration::from_millis(2), &[]);
        while stretch.going() {
            stretch.call(10, || std::thread::sleep(Duration::from_millis(1)));
            stretch.pause(tokio::time::sleep(Duration::from_millis(5))).await;
        }
        let sample = stretch.end();
        assert!(sample.latencies.len() <= 2);
        assert_eq!(sample.bytes, 10 * sample.latencies.len() as u64);
        assert!(sample.elapsed >= Duration::from_millis(2));
    }
}
