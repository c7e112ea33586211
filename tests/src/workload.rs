//! A seeded client: chains of small blocks are put, read back, extended and removed, and every byte that comes back is
//! compared. It goes on until it is told to stop or the server is gone, and remembers what it was told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::{Call, Client, Error, ErrorKind, GetItem, MatchQuery, Namespace, PartOutcome, Put, PutPosition};
use kvkeep_core::{Class, ErrorKind as CoreKind, Format, MissReason, PartStatus, RequestId};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::ledger::{BLOCK_BYTES_MAX, Fate, Ledger, block, block_bytes};
use crate::{formats, payload};

/// Blocks of one put at most.
const PUT_BLOCKS_MAX: u64 = 12;
/// Keys of one chain at most.
const CHAIN_KEYS_MAX: u64 = 40;
/// Bytes that a client keeps `durable` at most; then it removes its oldest chain.
const DURABLE_BYTES_MAX: u64 = 24 << 20;

/// The namespace that workloads use.
pub const NAMESPACE: &str = "workload";

/// Its format.
pub fn format() -> Format {
    formats::any_size(BLOCK_BYTES_MAX)
}

/// One client, its chains and what it was told. Lives through restarts of the server.
#[derive(Debug)]
pub struct Workload {
    rng: StdRng,
    /// Chains: number, keys tried so far, class.
    chains: Vec<Chain>,
    next_chain: u64,
    /// What was acknowledged.
    pub ledger: Ledger,
    /// What was done.
    pub done: Done,
}

#[derive(Clone, Copy, Debug)]
struct Chain {
    number: u64,
    keys: u64,
    class: Class,
}

/// What a workload has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Blocks acknowledged.
    pub blocks_put: u64,
    /// Blocks read back as hits and compared.
    pub blocks_read: u64,
    /// Blocks removed.
    pub blocks_removed: u64,
    /// Blocks refused for want of room.
    pub blocks_refused: u64,
}

impl Workload {
    /// Client `number` of a run with this seed.
    pub fn new(seed: u64, number: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(payload::mix(seed ^ payload::mix(number))),
            chains: Vec::new(),
            next_chain: (seed << 16 | number) << 24,
            ledger: Ledger::default(),
            done: Done::default(),
        }
    }

    /// Works until `stop`, or until the server does not answer any more.
    ///
    /// # Panics
    /// If a byte is wrong, a durable block is missing, or an answer is one that a healthy server does not give.
    pub async fn run(&mut self, client: &Client, stop: Arc<AtomicBool>) {
        let namespace = match client.register_namespace(NAMESPACE, &format(), "weights-1").await {
            Ok(namespace) => namespace,
            Err(e) => return gone(&e),
        };
        while !stop.load(Ordering::Relaxed) {
            let step = match self.rng.random_range(0..100) {
                0..55 => self.put(&namespace).await,
                55..75 => self.read_some(&namespace).await,
                75..92 => self.come_back(&namespace).await,
                _ => self.remove(&namespace).await,
            };
            if let Err(e) = step {
                return gone(&e);
            }
        }
    }

    fn call(&mut self) -> Call {
        let request = RequestId::new(&self.rng.random::<[u8; 16]>()).expect("16 bytes are within the bound");
        Call::of(request).within(Duration::from_secs(20))
    }

    /// A new chain, or the next turn of one.
    async fn put(&mut self, namespace: &Namespace) -> Result<(), Error> {
        if self.durable_bytes() > DURABLE_BYTES_MAX {
            return self.remove(namespace).await;
        }
        let which = self.rng.random_range(0..=self.chains.len().min(12));
        let open = self.chains.len().checked_sub(which + 1).filter(|i| self.chains[*i].keys < CHAIN_KEYS_MAX);
        let index = open.unwrap_or_else(|| {
            let class = if self.rng.random_bool(0.6) { Class::Durable } else { Class::Cache };
            self.chains.push(Chain { number: self.next_chain, keys: 0, class });
            self.next_chain += 1;
            self.chains.len() - 1
        });
        let chain = self.chains[index];
        let blocks = self.rng.random_range(1..=PUT_BLOCKS_MAX);
        let keys: Vec<_> = (chain.keys..chain.keys + blocks).map(|n| payload::key(chain.number, n)).collect();
        self.chains[index].keys += blocks;
        keys.iter().for_each(|key| self.ledger.note(key, Fate::Unknown));
        let put = Put {
            parent: chain.keys.checked_sub(1).map(|n| payload::key(chain.number, n)),
            first_position: chain.keys as u32,
            positions: keys.iter().map(|key| PutPosition::of(key.clone(), block(key))).collect(),
            class: Some(chain.class),
            ..Put::default()
        };
        let call = self.call();
        for (key, outcome) in keys.iter().zip(namespace.put(&put, &call).await?) {
            match outcome {
                PartOutcome::Stored { class, copies, .. } => {
                    assert!(class >= chain.class && copies == 1, "{class} on {copies} copies");
                    self.ledger.note(key, Fate::Acknowledged(chain.class));
                    self.done.blocks_put += 1;
                }
                PartOutcome::AlreadyPresent { class, .. } => {
                    assert!(class >= chain.class, "present at {class}, asked for {}", chain.class);
                    self.ledger.note(key, Fate::Acknowledged(chain.class));
                }
                PartOutcome::InProgressElsewhere { .. } => {}
                PartOutcome::Refused(e) if is_full(&e) => self.done.blocks_refused += 1,
                PartOutcome::Refused(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Blocks picked anywhere.
    async fn read_some(&mut self, namespace: &Namespace) -> Result<(), Error> {
        if self.ledger.is_empty() {
            return Ok(());
        }
        let keys: Vec<_> = (0..16)
            .filter_map(|_| {
                let chain = self.chains.get(self.rng.random_range(0..self.chains.len().max(1)))?;
                Some(payload::key(chain.number, self.rng.random_range(0..chain.keys)))
            })
            .collect();
        self.read(namespace, &keys, None).await
    }

    /// A conversation that comes back: match with a lease, read what matched, release.
    async fn come_back(&mut self, namespace: &Namespace) -> Result<(), Error> {
        let Some(chain) = self.chains.get(self.rng.random_range(0..self.chains.len().max(1))).copied() else {
            return Ok(());
        };
        let keys = payload::chain(chain.number, chain.keys);
        let call = self.call();
        let found = namespace.match_chain(&MatchQuery::of(keys.clone()).leased(Duration::from_secs(5)), &call).await?;
        let matched = &keys[..found.boundary_positions as usize];
        self.read(namespace, matched, found.lease_id()).await?;
        if let Some(lease) = found.lease_id() {
            namespace.release(&[lease], &[], &call).await?;
        }
        Ok(())
    }

    async fn read(
        &mut self,
        namespace: &Namespace,
        keys: &[Bytes],
        lease: Option<kvkeep_core::LeaseId>,
    ) -> Result<(), Error> {
        let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
        let call = self.call();
        for (key, part) in keys.iter().zip(namespace.get(&items, lease, &call).await?) {
            if part.is_hit() {
                assert!(part.data == block(key), "wrong bytes for {}", crate::ledger::hex(key));
                self.done.blocks_read += 1;
            } else if part.status == PartStatus::Miss
                && self.ledger.fate(key) == Some(Fate::Acknowledged(Class::Durable))
            {
                // A server that goes away in the middle of an answer leaves the rest of it with these reasons.
                let gone = matches!(part.reason, Some(MissReason::Unreachable | MissReason::Late));
                assert!(gone, "durable block {} is not there: {:?}", crate::ledger::hex(key), part.reason);
            }
        }
        Ok(())
    }

    /// Removes the oldest chain, or one picked at random.
    async fn remove(&mut self, namespace: &Namespace) -> Result<(), Error> {
        if self.chains.len() < 4 {
            return Ok(());
        }
        let index = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(0..self.chains.len()) };
        let chain = self.chains.remove(index);
        let keys = payload::chain(chain.number, chain.keys);
        keys.iter().for_each(|key| self.ledger.note(key, Fate::Unknown));
        let call = self.call();
        self.done.blocks_removed += u64::from(namespace.remove(&keys, &call).await?.removed);
        Ok(())
    }

    /// Removes everything that was ever tried.
    ///
    /// # Panics
    /// If the server does not do it.
    pub async fn remove_everything(&mut self, namespace: &Namespace) {
        self.chains.clear();
        let keys: Vec<_> = self.ledger.keys().cloned().collect();
        namespace.remove(&keys, &Call::default()).await.expect("a healthy node removes");
        self.ledger = Ledger::default();
    }

    fn durable_bytes(&self) -> u64 {
        self.chains
            .iter()
            .filter(|c| c.class == Class::Durable)
            .flat_map(|c| payload::chain(c.number, c.keys))
            .map(|key| block_bytes(&key) as u64)
            .sum()
    }
}

fn is_full(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused(CoreKind::Full | CoreKind::Throttled))
}

/// The only ways in which a call may fail: the server is gone, or it had no room in time.
fn gone(e: &Error) {
    let expected = matches!(
        e.kind(),
        ErrorKind::Unreachable
            | ErrorKind::Late
            | ErrorKind::Refused(CoreKind::Unavailable | CoreKind::Full | CoreKind::Throttled)
    );
    assert!(expected, "a call failed in a way that no crash explains: {e}");
}
