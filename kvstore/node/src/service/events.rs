//! The stream of `watch_events`: a snapshot, then what changes; after a gap the watcher is told to start again.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use kvkeep_client::convert;
use kvkeep_core::directory::PositionView;
use kvkeep_core::events::{Numbered, Read};
use kvkeep_core::words::EventKind;
use kvkeep_core::{Error, ErrorKind, Handle, NamespaceId, Result, Tier};
use kvkeep_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::store::put::Caller;
use crate::store::{SLICE_KEYS, Store};

/// Batches of one watcher.
pub type EventStream = Pin<Box<dyn Stream<Item = std::result::Result<v1::EventBatch, Status>> + Send>>;

/// Events of one batch.
const BATCH_EVENTS: usize = 256;
/// Batches that wait for a slow watcher; the ring behind them is bounded too.
const BATCHES_AHEAD: usize = 4;

type Batches = mpsc::Sender<std::result::Result<v1::EventBatch, Status>>;

/// Starts a watcher.
///
/// # Errors
/// `Throttled` where `limits.watchers_max` are watching.
pub fn watch(
    store: Arc<Store>,
    caller: Caller,
    namespace: Option<NamespaceId>,
    snapshot: bool,
    after: u64,
) -> Result<EventStream> {
    let place = Place::take(&store)?;
    let (batches, receiver) = mpsc::channel(BATCHES_AHEAD);
    tokio::spawn(async move {
        let watcher = Watcher { store, caller, namespace, batches };
        watcher.run(snapshot, after).await;
        drop(place);
    });
    Ok(ReceiverStream::new(receiver).boxed())
}

/// One of the places for watchers.
struct Place(Arc<Store>);

impl Place {
    fn take(store: &Arc<Store>) -> Result<Self> {
        let max = store.config.limits.watchers_max;
        store
            .watchers()
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < max).then_some(n + 1))
            .map(|_| Self(Arc::clone(store)))
            .map_err(|_| {
                Error::new(ErrorKind::Throttled, "as many are watching as may").with("limits.watchers_max", max)
            })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.watchers().fetch_sub(1, Ordering::Relaxed);
    }
}

struct Watcher {
    store: Arc<Store>,
    caller: Caller,
    namespace: Option<NamespaceId>,
    batches: Batches,
}

impl Watcher {
    async fn run(&self, snapshot: bool, after: u64) {
        let mut latest = self.store.journal.latest();
        // Changes during the snapshot are sent after it: seen twice at worst, never missed.
        let mut at = if snapshot { *latest.borrow_and_update() } else { after };
        if snapshot && self.snapshot(at).await.is_none() {
            return;
        }
        loop {
            match self.store.journal.events_after(at, BATCH_EVENTS) {
                Read::Gap { newest } => {
                    let gap = v1::EventBatch { events: Vec::new(), sequence: newest, gap: true, snapshot_end: false };
                    if self.batches.send(Ok(gap)).await.is_err() {
                        return;
                    }
                    at = newest;
                }
                Read::Events(events) => {
                    let Some(last) = events.last() else {
                        tokio::select! {
                            changed = latest.changed() => if changed.is_err() { return },
                            () = self.batches.closed() => return,
                            () = self.store.stopping().cancelled() => return,
                        }
                        continue;
                    };
                    at = last.sequence;
                    let events: Vec<_> = events.iter().filter(|e| self.wants(e)).map(spell).collect();
                    if events.is_empty() {
                        continue;
                    }
                    let batch = v1::EventBatch { events, sequence: at, gap: false, snapshot_end: false };
                    if self.batches.send(Ok(batch)).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn wants(&self, e: &Numbered) -> bool {
        self.namespace.is_none_or(|n| n == e.event.handle.namespace)
            && self.store.views.of_client(self.caller.tenant, e.event.handle.namespace).is_ok()
    }

    /// Sends what is here; `None` where the watcher went away.
    async fn snapshot(&self, sequence: u64) -> Option<()> {
        let ours =
            self.store.views.all().into_iter().filter(|n| self.store.views.of_client(self.caller.tenant, n.id).is_ok());
        for namespace in ours.filter(|n| self.namespace.is_none_or(|id| id == n.id)) {
            let handle = namespace.handle();
            let mut cursor = Some(0);
            while let Some(at) = cursor {
                let (views, next) = self.store.scan(handle, at, SLICE_KEYS);
                cursor = next;
                let events = self.spell_views(handle, &views).await;
                if !events.is_empty() {
                    let batch = v1::EventBatch { events, sequence, gap: false, snapshot_end: false };
                    self.batches.send(Ok(batch)).await.ok()?;
                }
            }
        }
        let end = v1::EventBatch { events: Vec::new(), sequence, gap: false, snapshot_end: true };
        self.batches.send(Ok(end)).await.ok()
    }

    async fn spell_views(&self, handle: Handle, views: &[PositionView]) -> Vec<v1::Event> {
        let own = views.iter().map(|v| (v.digest, handle));
        let parents = views.iter().filter_map(|v| Some((v.parent?, handle)));
        let positions: Vec<_> = own.chain(parents).collect();
        let keys = self.store.keys_of(&positions).await;
        let (own_keys, parent_keys) = keys.split_at(views.len());
        let mut parent_keys = parent_keys.iter();
        let mut events = Vec::with_capacity(views.len());
        for (view, key) in views.iter().zip(own_keys) {
            let parent_key = view.parent.and_then(|_| parent_keys.next()?.as_ref());
            let Some(key) = key else { continue };
            let mut groups: Vec<_> = view.parts.iter().map(|p| u32::from(p.group.0)).collect();
            groups.dedup();
            let tier = if view.parts.iter().all(|p| p.dram) { Tier::Dram } else { Tier::Nvme };
            events.push(v1::Event {
                sequence: 0,
                what: v1::event::What::Stored as i32,
                handle: Some(convert::handle_to_proto(handle)),
                key: Bytes::copy_from_slice(key.as_bytes()),
                parent_key: parent_key.map_or_else(Bytes::new, |k| Bytes::copy_from_slice(k.as_bytes())),
                position: view.position,
                token_ids: Vec::new(),
                bytes: view.parts.iter().map(|p| u64::from(p.len)).sum(),
                tier: convert::tier_to_proto(tier),
                groups,
            });
        }
        events
    }
}

fn spell(e: &Numbered) -> v1::Event {
    let event = &e.event;
    let what = match event.what {
        EventKind::Stored => v1::event::What::Stored,
        EventKind::Promoted => v1::event::What::Promoted,
        EventKind::Demoted => v1::event::What::Demoted,
        EventKind::Removed => v1::event::What::Removed,
    };
    v1::Event {
        sequence: e.sequence,
        what: what as i32,
        handle: Some(convert::handle_to_proto(event.handle)),
        key: Bytes::copy_from_slice(&event.key),
        parent_key: Bytes::copy_from_slice(&event.parent_key),
        position: event.position,
        token_ids: event.token_ids.to_vec(),
        bytes: event.bytes,
        tier: convert::tier_to_proto(event.tier),
        groups: (0..64).filter(|g| event.groups >> g & 1 == 1).collect(),
    }
}
