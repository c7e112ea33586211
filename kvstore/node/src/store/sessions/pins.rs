//! Pins: the directory is told which positions sessions want kept, and is kept in line with the sessions as they change.

use std::collections::HashMap;
use std::sync::Arc;

use kvkeep_core::Tier;
use kvkeep_core::session::{Manifest, SessionName};

use super::super::{SLICE_KEYS, Store};

/// What the directory was told, by session. Changed by one at a time.
#[derive(Default)]
pub(super) struct Pins(tokio::sync::Mutex<HashMap<SessionName, (Tier, u32, Manifest)>>);

impl Store {
    /// Brings the directory in line with a session as it is now: pinned or not, longer, shorter, gone. Whoever comes last
    /// leaves it right.
    pub(super) async fn settle_pins(self: &Arc<Self>, name: &SessionName) {
        let mut pins = self.sessions.pins.0.lock().await;
        let now = self.sessions.state().read().get(name).map(|s| (s.pinned, s.revision, s.manifest.clone(), s.tenant));
        let wanted = now.and_then(|(tier, revision, manifest, tenant)| Some((tier?, revision, manifest, tenant)));
        let before = pins.remove(name);
        let Some((tier, revision, manifest, tenant)) = wanted else {
            if let Some((tier, _, manifest)) = before {
                self.each_slice(manifest.iter(), |directory, digest| directory.unpin(digest, tier)).await;
            }
            return;
        };
        let same =
            before.as_ref().is_some_and(|(t, _, m)| *t == tier && m.iter().zip(manifest.iter()).all(|(a, b)| a == b));
        let kept = match &before {
            Some((_, _, m)) if same => m.len().min(manifest.len()),
            _ => 0,
        };
        if let Some((tier, _, old)) = &before {
            self.each_slice(old.from(kept), |directory, digest| directory.unpin(digest, *tier)).await;
        }
        self.each_slice(manifest.from(kept), |directory, digest| directory.pin(digest, tier)).await;
        if tier == Tier::Dram {
            let caller = super::super::put::Caller { instance: kvkeep_core::InstanceId([0; 16]), tenant };
            let handle = kvkeep_core::Handle { namespace: name.namespace, revision };
            let digests: Vec<_> = manifest.from(kept).collect();
            self.prefetch(caller, handle, &digests);
        }
        pins.insert(name.clone(), (tier, revision.0, manifest));
    }

    /// For each of these positions, with the directory locked for a slice at a time.
    pub(super) async fn each_slice(
        &self,
        digests: impl Iterator<Item = kvkeep_core::Digest>,
        mut each: impl FnMut(&mut kvkeep_core::Directory, &kvkeep_core::Digest),
    ) {
        let digests: Vec<_> = digests.collect();
        for slice in digests.chunks(SLICE_KEYS) {
            {
                let mut directory = self.directory.lock();
                slice.iter().for_each(|digest| each(&mut directory, digest));
            }
            tokio::task::yield_now().await;
        }
    }

    /// Tells the directory of every pinned session, after a start.
    pub(super) async fn settle_all_pins(self: &Arc<Self>) {
        let names: Vec<SessionName> = {
            let state = self.sessions.state().read();
            state.iter().filter(|(_, s)| s.pinned.is_some()).map(|(name, _)| name.clone()).collect()
        };
        for name in names {
            self.settle_pins(&name).await;
        }
    }
}
