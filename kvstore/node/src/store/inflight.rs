//! One read of a block serves all who wait for it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use kvkeep_core::{BlockId, MissReason, PartStatus, Version};
use kvkeep_tiers::dram::Pinned;
use parking_lot::Mutex;
use tokio::sync::watch;

/// What came of a read.
#[derive(Clone, Debug)]
pub enum Flight {
    /// The bytes, verified.
    Ready(Pinned),
    /// The copy was not what it was taken for: look the block up again.
    Again,
    /// No bytes.
    No(PartStatus, MissReason),
}

type Waiters = HashMap<(BlockId, Version), watch::Receiver<Option<Flight>>>;

/// Reads under way.
#[derive(Default)]
pub struct Flights(Arc<Mutex<Waiters>>);

impl Flights {
    /// How many reads are under way.
    pub fn under_way(&self) -> usize {
        self.0.lock().len()
    }

    /// Joins the read of this block that is under way, or starts it. The read runs in a task of its own: a caller that
    /// goes away does not take it from the others.
    pub async fn join<F, Fut>(&self, id: BlockId, version: Version, start: F) -> Flight
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Flight> + Send + 'static,
    {
        let mut waiter = {
            let mut flights = self.0.lock();
            match flights.get(&(id, version)) {
                Some(waiter) => waiter.clone(),
                None => {
                    let (tell, waiter) = watch::channel(None);
                    flights.insert((id, version), waiter.clone());
                    let landing = Landing { flights: Arc::clone(&self.0), key: (id, version) };
                    let read = start();
                    tokio::spawn(async move {
                        let result = read.await;
                        drop(landing);
                        tell.send_replace(Some(result));
                    });
                    waiter
                }
            }
        };
        match waiter.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Flight::Again),
            // The task was cancelled with its runtime: the node is stopping.
            Err(_) => Flight::No(PartStatus::Miss, MissReason::Late),
        }
    }
}

/// Takes a read off the list, whatever became of it.
struct Landing {
    flights: Arc<Mutex<Waiters>>,
    key: (BlockId, Version),
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
    }
}
