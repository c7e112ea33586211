//! Regions of clients: registered by one instance, used by all its connections, gone with it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::{Error, ErrorKind, InstanceId, Result};
use kvkeep_proto::v1;
use kvkeep_tiers::region::Region;
use parking_lot::Mutex;

use super::Store;
use crate::connection::Via;
use crate::failpoint;

/// How long an unregistration waits for calls that use the region.
const UNREGISTER_WAIT: Duration = Duration::from_secs(10);

/// All regions of a node.
#[derive(Default)]
pub struct Regions(Mutex<HashMap<InstanceId, Registered>>);

impl Regions {
    fn take(&self, instance: InstanceId, id: u32) -> Option<Arc<Region>> {
        let mut all = self.0.lock();
        let registered = all.get_mut(&instance)?;
        let region = registered.regions.remove(&id)?;
        registered.bytes -= region.len();
        Some(region)
    }
}

/// A registration that its instance does not know of yet. Dropped, it never was: an instance that gave up waiting
/// registers the same memory again.
pub struct Untold {
    store: Arc<Store>,
    instance: InstanceId,
    reply: v1::RegisterRegionReply,
    told: bool,
}

impl Untold {
    /// What to tell it.
    pub fn reply(&self) -> v1::RegisterRegionReply {
        self.reply
    }

    /// It was told.
    pub fn told(mut self) {
        self.told = true;
    }
}

impl Drop for Untold {
    fn drop(&mut self) {
        if !self.told {
            drop(self.store.regions.take(self.instance, self.reply.region_id));
        }
    }
}

#[derive(Default)]
struct Registered {
    regions: HashMap<u32, Arc<Region>>,
    last_id: u32,
    bytes: u64,
}

impl Store {
    /// Takes a descriptor as a region of this instance. Blocks: every page is entered into the page table.
    ///
    /// # Errors
    /// As [`Region::new`]; `TooLarge` and `Throttled` name the bound.
    pub fn register_region(
        self: &Arc<Self>,
        instance: InstanceId,
        via: Via,
        offset: u64,
        length: u64,
        descriptor: Option<OwnedFd>,
    ) -> Result<Untold> {
        if !matches!(via, Via::Unix { .. }) {
            return Err(Error::new(ErrorKind::Denied, "regions are registered on the Unix socket"));
        }
        let descriptor = descriptor
            .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "a region's descriptor comes beside its message"))?;
        let limits = &self.config.limits;
        let may = |registered: Option<&Registered>| {
            let (count, bytes) = registered.map_or((0, 0), |r| (r.regions.len(), r.bytes));
            if count >= limits.regions_max as usize {
                return Err(Error::new(ErrorKind::Throttled, "this instance has too many regions; unregister some")
                    .with("limits.regions_max", limits.regions_max));
            }
            if bytes.saturating_add(length) > limits.region_bytes_max.0 {
                return Err(Error::new(ErrorKind::TooLarge, "this instance registers too much memory")
                    .with("limits.region_bytes_max", limits.region_bytes_max)
                    .with("registered_bytes", bytes)
                    .with("length", length));
            }
            Ok(())
        };
        // Asked before the memory is mapped, and again when it is.
        may(self.regions.0.lock().get(&instance))?;
        let region = Arc::new(Region::new(descriptor, offset, length, via.may_map(&self.config.auth))?);
        let mapped = region.is_mapped();
        failpoint::at("register_region.mapped");
        let mut all = self.regions.0.lock();
        may(all.get(&instance))?;
        let registered = all.entry(instance).or_default();
        registered.last_id += 1;
        registered.bytes += length;
        registered.regions.insert(registered.last_id, region);
        let reply = v1::RegisterRegionReply { region_id: registered.last_id, mapped };
        Ok(Untold { store: Arc::clone(self), instance, reply, told: false })
    }

    /// A region of this instance.
    pub fn region(&self, instance: InstanceId, id: u32) -> Result<Arc<Region>> {
        let all = self.regions.0.lock();
        all.get(&instance).and_then(|r| r.regions.get(&id)).cloned().ok_or_else(|| {
            Error::new(ErrorKind::Expired, "no such region of this instance: register it again").with("region_id", id)
        })
    }

    /// Forgets a region; answers when no call touches it any more.
    ///
    /// # Errors
    /// `Expired` where there is none; `Unavailable` where calls went on using it.
    pub async fn unregister_region(&self, instance: InstanceId, id: u32) -> Result<()> {
        let region = {
            self.regions.take(instance, id).ok_or_else(|| {
                Error::new(ErrorKind::Expired, "no such region of this instance").with("region_id", id)
            })?
        };
        let until = Instant::now() + UNREGISTER_WAIT;
        while Arc::strong_count(&region) > 1 {
            if Instant::now() >= until {
                return Err(Error::new(ErrorKind::Unavailable, "calls still use the region").with("region_id", id));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    pub(super) fn end_regions(&self, instance: InstanceId) {
        let gone = self.regions.0.lock().remove(&instance);
        // Outside of the lock: unmapping takes its time.
        drop(gone);
    }

    /// How many regions are registered, and their bytes.
    pub fn region_usage(&self) -> (u64, u64) {
        let all = self.regions.0.lock();
        (all.values().map(|r| r.regions.len() as u64).sum(), all.values().map(|r| r.bytes).sum())
    }
}
