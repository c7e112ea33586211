//! What an engine says of itself: for people, for metrics, for `doctor`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvkeep_core::{Handle, InstanceId};

use super::Engine;
use super::contact::Standing;
use super::io::Io;
use crate::block::breaker::BreakerState;
use crate::block::pool::Way;
use crate::client::Counters;
use crate::error::Result;

/// Longest wait for the I/O thread to say how it stands.
const ANSWER_MAX: Duration = Duration::from_millis(200);

/// What an engine has counted in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineCounters {
    /// Calls taken into a queue.
    pub submitted: u64,
    /// Of these, calls that have a completion.
    pub completed: u64,
    /// Calls that a full queue did not take.
    pub busy_refused: u64,
    /// Calls that ended because they were taken back.
    pub cancelled: u64,
    /// Calls answered with misses because the server was lost, or too late.
    pub lost: u64,
    /// Parts whose memory a server may still have been writing when they were answered.
    pub in_doubt: u64,
    /// Other lives of the server that were met.
    pub restarts: u64,
    /// Forks between the process that opened the engine and this one.
    pub forks: u64,
    /// Leases and requests that were not released, because too many waited to be; they end by themselves.
    pub releases_dropped: u64,
}

/// How full a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLengths {
    /// Calls under way.
    pub in_flight: usize,
    /// Completions that wait to be polled.
    pub waiting: usize,
}

/// A region that was used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionState {
    /// Bytes.
    pub bytes: usize,
    /// This life of the server knows it by this number.
    pub registered: Option<u32>,
}

/// How an engine stands.
#[derive(Clone, Debug)]
pub struct Description {
    /// This process.
    pub process: u32,
    /// Its name to the server.
    pub instance: InstanceId,
    /// Where it connects to.
    pub endpoint: String,
    /// Name of the namespace.
    pub namespace: String,
    /// What the namespace is to the server, once it is registered.
    pub handle: Option<Handle>,
    /// `unknown` (nobody has called yet), `ready`, `lost`, `refused`; `stuck` where the I/O thread does not answer.
    pub standing: &'static str,
    /// Why it is lost or refused.
    pub why: Option<String>,
    /// Which way the hot verbs go, and why not a faster one; `None`: none is known.
    pub way: Option<Way>,
    /// What the circuit breaker lets out.
    pub breaker: Option<BreakerState>,
    /// Name and version of the server, and its life.
    pub server: Option<(String, u64)>,
    /// What was counted here.
    pub counters: EngineCounters,
    /// What the client below has counted.
    pub client: Counters,
    /// Each queue.
    pub queues: Vec<QueueLengths>,
    /// Regions that were used and are there still.
    pub regions: Vec<RegionState>,
}

struct Stand {
    standing: Standing,
    way: Option<Way>,
    breaker: BreakerState,
    server: (String, u64),
    client: Counters,
}

impl Stand {
    fn of(io: &Io) -> Self {
        let hello = io.client.hello();
        Self {
            standing: io.contact.standing(),
            way: io.client.way(),
            breaker: io.client.breaker(),
            server: (hello.server.clone(), hello.server_epoch),
            client: io.client.counters(),
        }
    }
}

impl Engine {
    /// What was counted in this process.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn counters(&self) -> Result<EngineCounters> {
        Ok(self.describe()?.counters)
    }

    /// How it stands: which way it goes and why, the breaker, the counters, queues and regions. Asks the I/O thread, and waits
    /// for it no longer than 200 ms.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn describe(&self) -> Result<Description> {
        let life = self.life()?;
        // The client is the I/O thread's alone: see `jobs`.
        let stand = life.ask(ANSWER_MAX, |io: Arc<Io>| async move { Stand::of(&io) });
        let (instance, counts) = (life.io.client.config().instance, &life.io.counts);
        let client = stand.as_ref().map(|s| s.client).unwrap_or_default();
        let (standing, why, handle) = match stand.as_ref().map(|s| &s.standing) {
            None => ("stuck", None, None),
            Some(Standing::Unknown) => ("unknown", None, None),
            Some(Standing::Ready(namespace, _)) => ("ready", None, Some(namespace.handle)),
            Some(Standing::Lost(e)) => ("lost", Some(e.to_string()), None),
            Some(Standing::Refused(e)) => ("refused", Some(e.to_string()), None),
        };
        let server = stand.as_ref().map(|s| s.server.clone()).filter(|(_, epoch)| *epoch != 0);
        let epoch = server.as_ref().map_or(0, |(_, epoch)| *epoch);
        let get = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        Ok(Description {
            process: std::process::id(),
            instance,
            endpoint: self.config.client.endpoint.clone(),
            namespace: self.config.namespace.clone(),
            handle,
            standing,
            why,
            way: stand.as_ref().and_then(|s| s.way.clone()),
            breaker: stand.as_ref().map(|s| s.breaker),
            server,
            counters: EngineCounters {
                submitted: get(&counts.submitted),
                completed: get(&counts.completed),
                busy_refused: get(&counts.busy),
                cancelled: get(&counts.cancelled),
                lost: get(&counts.lost) + client.lost_calls,
                in_doubt: get(&counts.in_doubt),
                restarts: client.restarts,
                forks: u64::from(life.generation),
                releases_dropped: get(&counts.releases_dropped),
            },
            client,
            queues: life
                .queues
                .iter()
                .map(|queue| queue.lengths())
                .map(|(in_flight, waiting)| QueueLengths { in_flight, waiting })
                .collect(),
            regions: life
                .regions()
                .iter()
                .map(|region| RegionState { bytes: region.len(), registered: region.known_as(instance, epoch) })
                .collect(),
        })
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "engine     process {}, instance {:?}", self.process, self.instance)?;
        write!(f, "server     {} at {}", self.standing, self.endpoint)?;
        if let Some((server, epoch)) = &self.server {
            write!(f, ", {server}, life {epoch:x}")?;
        }
        if let Some(why) = &self.why {
            write!(f, ": {why}")?;
        }
        write!(f, "\nnamespace  {}", self.namespace)?;
        if let Some(handle) = self.handle {
            write!(f, ", number {}, revision {}", handle.namespace, handle.revision)?;
        }
        match &self.way {
            None => write!(f, "\nway        none is known")?,
            Some(way) => {
                write!(f, "\nway        {} to {}", way.wire.word(), way.to)?;
                write!(f, ", {}", if way.regions { "into regions" } else { "no regions" })?;
                if !way.why.is_empty() {
                    write!(f, " ({})", way.why)?;
                }
            }
        }
        if let Some(breaker) = self.breaker {
            write!(f, "\nbreaker    {breaker:?}, opened {} times", self.client.breaker_opened)?;
        }
        let c = &self.counters;
        write!(
            f,
            "\ncalls      submitted {}, completed {}, busy {}, cancelled {}, lost {}, parts in doubt {}, restarts {}, forks {}",
            c.submitted, c.completed, c.busy_refused, c.cancelled, c.lost, c.in_doubt, c.restarts, c.forks
        )?;
        for (n, queue) in self.queues.iter().enumerate() {
            write!(f, "\nqueue {n:<4} {} in flight, {} waiting to be polled", queue.in_flight, queue.waiting)?;
        }
        for region in &self.regions {
            let known = if region.registered.is_some() { "registered" } else { "not registered" };
            write!(f, "\nregion     {} bytes, {known}", region.bytes)?;
        }
        Ok(())
    }
}
