//! What one process has of an engine: the I/O thread, the client, the queues. A forked child begins another one.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvkeep_core::RequestId;
use kvkeep_core::ids::LeaseId;
use tokio::runtime::Runtime;

use super::config::EngineConfig;
use super::io::Io;
use super::jobs::{Answer, Job, Jobs, alone, answer};
use super::queue::Queue;
use crate::client::Client;
use crate::config::Lost;
use crate::error::{Error, Result};
use crate::process;
use crate::region::{Region, WeakRegion};

/// Name of the I/O thread.
const THREAD_NAME: &str = "kvkeep-engine";
/// Calls that are in flight when an engine is dropped get so long to take their memory back.
const LAND_MAX: Duration = Duration::from_millis(50);
/// The I/O thread is waited for so long when an engine is dropped; then it ends alone.
const STOP_MAX: Duration = Duration::from_secs(1);
/// And of that, what other threads of its runtime (a name being looked up) get.
const RUNTIME_STOP_MAX: Duration = Duration::from_millis(100);
/// Leases and requests that wait to be released; more are dropped, and end by themselves.
const RELEASES_MAX: usize = 64 << 10;
/// Of these, in one call: any server takes so many.
const RELEASES_PER_CALL: usize = 128;
/// Regions that are remembered for [`super::Engine::describe`].
const REGIONS_KEPT: usize = 256;

pub(super) struct Life {
    /// Forks between the process that opened the engine and this one; wraps.
    pub(super) generation: u16,
    pub(super) io: Arc<Io>,
    pub(super) queues: Vec<Arc<Queue>>,
    pub(super) jobs: Arc<Jobs<Io>>,
    /// Whether the thread runs, for those who look without a lock.
    started: AtomicBool,
    thread: Mutex<Thread>,
    releases: Arc<Mutex<Releases>>,
    regions: Mutex<Vec<WeakRegion>>,
}

enum Thread {
    Waiting(Runtime),
    Running {
        thread: JoinHandle<()>,
        ended: mpsc::Receiver<()>,
    },
    /// It could not be started, or was waited for.
    Gone,
}

#[derive(Default)]
struct Releases {
    leases: Vec<LeaseId>,
    requests: Vec<RequestId>,
    /// A task is sending some.
    sending: bool,
}

impl Life {
    /// Everything but the thread. `before`: of the process that this one was forked from.
    ///
    /// # Errors
    /// `config` where the configuration is wrong, or where this process can have no more descriptors.
    pub(super) fn begin(config: &Arc<EngineConfig>, before: Option<&Self>) -> Result<Self> {
        let mut client = config.client.clone();
        client.lost = Lost::Misses;
        if before.is_some() {
            client.instance = process::fresh_instance();
        }
        let generation = before.map_or(0, |b| b.generation.wrapping_add(1));
        let queue = |index| Queue::new(generation, index, config.in_flight_max).map(Arc::new);
        let queues = (0..config.queues).map(queue).collect::<Result<_>>()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .thread_name(THREAD_NAME)
            .build()
            .map_err(|e| Error::config("no runtime is to be had for an engine").caused_by(e))?;
        // The channels of gRPC are tasks, which wait for the thread.
        let entered = runtime.enter();
        let client = Client::lazy(client);
        drop(entered);
        match client {
            Ok(client) => Ok(Self {
                generation,
                io: Arc::new(Io::new(client, Arc::clone(config))),
                queues,
                jobs: Arc::default(),
                started: AtomicBool::new(false),
                thread: Mutex::new(Thread::Waiting(runtime)),
                releases: Arc::default(),
                regions: Mutex::default(),
            }),
            Err(e) => {
                // Never waits, as a runtime that is dropped would: perhaps this is a thread of another one.
                runtime.shutdown_background();
                Err(e)
            }
        }
    }

    /// Hands a job to the I/O thread, which is started where it does not run yet; `false`: it cannot run (any more).
    pub(super) fn post(&self, job: Job<Io>) -> bool {
        if !self.started.load(Ordering::Acquire) {
            self.start();
        }
        self.jobs.post(job)
    }

    fn start(&self) {
        let mut thread = alone(&self.thread);
        if let Thread::Waiting(_) = &*thread
            && let Thread::Waiting(runtime) = std::mem::replace(&mut *thread, Thread::Gone)
        {
            let (jobs, io) = (Arc::clone(&self.jobs), Arc::clone(&self.io));
            let (ends, ended) = mpsc::channel();
            let run = move || run(runtime, &Serving { jobs, _ends: ends }, &io);
            match std::thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(run) {
                Ok(running) => *thread = Thread::Running { thread: running, ended },
                // Nobody will ever do anything: every call is a miss.
                Err(_) => self.jobs.close(),
            }
        }
        self.started.store(true, Ordering::Release);
    }

    /// Has a future run by the I/O thread and waits for its answer, at most so long. `None`: none came.
    pub(super) fn ask<T, F>(&self, within: Duration, work: impl FnOnce(Arc<Io>) -> F + Send + 'static) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.begin_asking(work).wait(within)
    }

    /// Has a future run by the I/O thread; its answer is waited for by the caller.
    pub(super) fn begin_asking<T, F>(&self, work: impl FnOnce(Arc<Io>) -> F + Send + 'static) -> Answer<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (asked, answer) = answer();
        let job = move |io: &Arc<Io>| {
            let io = Arc::clone(io);
            tokio::spawn(async move { asked.give(work(io).await) });
        };
        // Where nobody is there to do it, the job is dropped, and waiting ends at once.
        self.post(Box::new(job));
        answer
    }

    /// Has leases ended soon; `false`: too many wait already, and these end by themselves.
    pub(super) fn release(&self, leases: Vec<LeaseId>, requests: Vec<RequestId>) -> bool {
        {
            let mut waiting = alone(&self.releases);
            let all = waiting.leases.len() + waiting.requests.len() + leases.len() + requests.len();
            if all > RELEASES_MAX {
                return false;
            }
            waiting.leases.extend(leases);
            waiting.requests.extend(requests);
            if std::mem::replace(&mut waiting.sending, true) {
                return true;
            }
        }
        let releases = Arc::clone(&self.releases);
        let job = move |io: &Arc<Io>| {
            let io = Arc::clone(io);
            tokio::spawn(async move {
                while let Some((leases, requests)) = next_releases(&releases) {
                    io.release(leases, requests).await;
                }
            });
        };
        self.post(Box::new(job))
    }

    /// Remembers the regions of some places, for who asks.
    pub(super) fn note<'a>(&self, regions: impl Iterator<Item = &'a Region>) {
        let mut known = alone(&self.regions);
        for region in regions {
            if known.last().is_some_and(|k| k.is(region)) || known.iter().any(|k| k.is(region)) {
                continue;
            }
            if known.len() >= REGIONS_KEPT {
                known.retain(|k| k.upgrade().is_some());
                known.truncate(REGIONS_KEPT - 1);
            }
            known.push(region.downgrade());
        }
    }

    /// The regions that were used and are there still.
    pub(super) fn regions(&self) -> Vec<Region> {
        alone(&self.regions).iter().filter_map(WeakRegion::upgrade).collect()
    }

    /// In a child of the process whose life this is: closes the child's copies of its sockets, so that the server sees the
    /// parent go. Nothing else of it may be used.
    pub(super) fn close_in_child(&self) {
        // SAFETY: `PerProcess` hands out what was inherited as such only in a child, and never drops it there; the child's own
        // life has a client and sockets of its own, so nobody uses these again.
        unsafe { self.io.client.shared.sockets.close_inherited() };
    }
}

/// The next leases and requests to release; `None`: all are sent.
fn next_releases(releases: &Mutex<Releases>) -> Option<(Vec<LeaseId>, Vec<RequestId>)> {
    let mut waiting = alone(releases);
    let leases = waiting.leases.len().min(RELEASES_PER_CALL);
    let requests = waiting.requests.len().min(RELEASES_PER_CALL - leases);
    if leases + requests == 0 {
        waiting.sending = false;
        // What a burst needed is not kept.
        (waiting.leases, waiting.requests) = Default::default();
        return None;
    }
    let leases = last(&mut waiting.leases, leases);
    Some((leases, last(&mut waiting.requests, requests)))
}

/// The last `n` of a list, taken out of it.
fn last<T>(list: &mut Vec<T>, n: usize) -> Vec<T> {
    let from = list.len() - n;
    list.split_off(from)
}

/// As long as it lives, jobs are done. Dropped whatever ends the thread.
struct Serving {
    jobs: Arc<Jobs<Io>>,
    /// Who waits for the end of the thread hears of it when this is dropped.
    _ends: mpsc::Sender<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.jobs.close();
    }
}

fn run(runtime: Runtime, serving: &Serving, io: &Arc<Io>) {
    runtime.block_on(poll_fn(|cx| serving.jobs.poll(cx, io)));
    // The calls that were in flight have been taken back: see them give their memory back.
    let landed = async {
        while io.flying.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = runtime.block_on(async { tokio::time::timeout(LAND_MAX, landed).await }); // late: dropped with the runtime
    runtime.shutdown_timeout(RUNTIME_STOP_MAX);
}

impl Drop for Life {
    fn drop(&mut self) {
        match std::mem::replace(&mut *alone(&self.thread), Thread::Gone) {
            // Never waits: perhaps this is a thread of another runtime.
            Thread::Waiting(runtime) => runtime.shutdown_background(),
            Thread::Running { thread, ended } => {
                let flights: Vec<_> = self.queues.iter().flat_map(|q| q.flights(None)).collect();
                self.jobs.post(Box::new(move |_| {
                    flights.iter().filter(|f| f.take_back()).for_each(|f| f.cancel.notify_one());
                }));
                self.jobs.stop();
                // Nothing is ever sent; what comes is that the other end is gone.
                if ended.recv_timeout(STOP_MAX) == Err(mpsc::RecvTimeoutError::Disconnected) {
                    let _ = thread.join(); // a panic of it was printed
                }
            }
            Thread::Gone => {}
        }
    }
}
