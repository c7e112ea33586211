//! Put: reserve, write, commit.
//!
//! Floor of one 1 MiB part over gRPC, beyond what the library costs: one copy (message -> slot), one pass for the sums, no
//! syscall, no fsync for class `cache`. Class `durable` adds one O_DIRECT write of header and payload, a share of a device
//! flush, one index insert and a share of a WAL sync.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use kvkeep_core::catalogue::Namespace;
use kvkeep_core::checksum::RunningSums;
use kvkeep_core::directory::{Inserted, Placed, RemovedPart};
use kvkeep_core::{
    BlockId, BlockMeta, ChunkSums, Class, Digest, Error, ErrorKind, Fidelity, Format, GroupId, Handle, InstanceId,
    Keeper, Key, LeaseId, MissReason, NvmePlace, RequestId, RequestInfo, Result, ShardId, SlotRef, TenantId, Tier,
    Version,
};
use kvkeep_tiers::nvme::BlockCopy;

use super::Store;
use super::behind::Wanted;
use super::reservations::{Reservation, ReservationId};
use crate::failpoint;

/// Who calls.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Its instance.
    pub instance: InstanceId,
    /// Its tenant.
    pub tenant: TenantId,
}

/// One part to be put.
#[derive(Clone, Copy, Debug)]
pub struct PartWish {
    /// Group of the format.
    pub group: GroupId,
    /// Shard of the group.
    pub shard: ShardId,
    /// Bytes.
    pub len: u32,
}

/// One position to be put.
#[derive(Clone, Debug)]
pub struct PositionWish {
    /// The engine's key.
    pub key: Key,
    /// The parts this caller has.
    pub parts: Vec<PartWish>,
    /// For watchers.
    pub token_ids: Arc<[u32]>,
}

/// A reserve.
#[derive(Clone, Debug)]
pub struct ReserveWish {
    /// Namespace and revision.
    pub handle: Handle,
    /// The request that it serves.
    pub request: RequestId,
    /// What it says of itself.
    pub info: RequestInfo,
    /// Key of the position before the first.
    pub parent: Option<Key>,
    /// Index of the first position.
    pub first_position: u32,
    /// In chain order unless `unordered`.
    pub positions: Vec<PositionWish>,
    /// Each key stands alone.
    pub unordered: bool,
    /// To acknowledge at.
    pub class: Class,
    /// On whose word it then stays.
    pub keeper: Keeper,
    /// Of the bytes.
    pub fidelity: Fidelity,
    /// Back-pressure wins over dropping.
    pub keep: bool,
    /// At most so many bytes of slots; 0: the server's bound.
    pub bytes_max: u64,
    /// After commit.
    pub ttl: Option<Duration>,
}

/// Answer to one part.
#[derive(Clone, Debug)]
pub enum PartAnswer {
    /// Here already, at the class and fidelity asked.
    Present {
        /// Fastest tier that has it.
        tier: Tier,
        /// Its class.
        class: Class,
        /// Its version.
        version: Version,
    },
    /// Bytes are here; commit without writing and the class is raised.
    Upgrade(ReservationId),
    /// Somebody else is writing it.
    InProgress {
        /// When to ask again.
        retry_after: Duration,
    },
    /// Write here.
    Slot(ReservationId),
    /// No.
    Refused(Error),
}

/// Answer to a reserve.
#[derive(Debug, Default)]
pub struct Reserves {
    /// Per part, in the order of the wish.
    pub answers: Vec<PartAnswer>,
    /// Positions answered: a prefix of the wish.
    pub granted_positions: u32,
    /// Holds the present ones.
    pub lease: Option<LeaseId>,
}

/// What one commit brought.
#[derive(Debug)]
pub struct Committed {
    /// Of the copy that is kept.
    pub version: Version,
    /// Reached.
    pub class: Class,
    /// Another writer committed first.
    pub superseded: bool,
}

/// How soon to ask again for a block that another is writing.
const IN_PROGRESS_RETRY: Duration = Duration::from_millis(20);
/// How soon to try again after a refusal for want of room.
pub const NO_ROOM_RETRY: Duration = Duration::from_millis(50);
/// A put that did not ask to keep everything waits so long for room at most.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(2);
/// Durable writes of one commit under way.
const DURABLE_WRITES_PER_COMMIT_MAX: usize = 32;

impl Store {
    /// First step: what of it is needed. Waits for room until `deadline` at the longest, and then grants a prefix.
    pub async fn reserve(
        self: &Arc<Self>,
        caller: Caller,
        wish: ReserveWish,
        deadline: tokio::time::Instant,
    ) -> Result<Reserves> {
        let namespace = match wish.keeper {
            Keeper::Caller => self.views.of_client(caller.tenant, wish.handle.namespace)?,
            Keeper::Sessions => self.views.get(caller.tenant, wish.handle.namespace)?,
        };
        if namespace.revision != wish.handle.revision {
            return Err(Error::new(
                ErrorKind::StaleRevision,
                "the weights of this namespace have changed; register again",
            )
            .with("revision", wish.handle.revision)
            .with("current", namespace.revision));
        }
        if wish.class == Class::Durable && self.nvme.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "this node has no NVMe tier: class durable cannot be promised",
            ));
        }
        if namespace.require_full && self.copies_wanted(wish.class) > 1 {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "the namespace requires every copy and this cluster has one node; use class cache, or register without require_full",
            ));
        }
        let keys = wish.positions.iter().map(|p| p.key.as_bytes());
        let digests = super::namespaces::digests(self.secret, caller.tenant, wish.handle, keys);
        let first_parent = wish
            .parent
            .as_ref()
            .map(|k| self.secret.digest(super::namespaces::domain_of(caller.tenant), wish.handle, k.as_bytes()));
        let bytes_max = match wish.bytes_max {
            0 => self.config.limits.reserve_bytes_max.0,
            n => n.min(self.config.limits.reserve_bytes_max.0),
        };
        let mut out = Reserves::default();
        let mut present = Vec::new();
        let mut granted_bytes = 0u64;
        for (i, position) in wish.positions.iter().enumerate() {
            let bytes: u64 = position.parts.iter().map(|p| u64::from(p.len)).sum();
            if granted_bytes > 0 && granted_bytes + bytes > bytes_max {
                break;
            }
            let (parent, index) = match (wish.unordered, i) {
                (true, _) => (None, unordered_index(&namespace.format)),
                (false, 0) => (first_parent, wish.first_position),
                (false, _) => (Some(digests[i - 1]), wish.first_position.saturating_add(i as u32)),
            };
            let parent_key = match (wish.unordered, i) {
                (true, _) => None,
                (false, 0) => wish.parent.as_ref().map(|k| k.as_bytes().into()),
                (false, _) => Some(wish.positions[i - 1].key.as_bytes().into()),
            };
            let site = Site { namespace: &namespace, digest: digests[i], parent, parent_key, index };
            let before = out.answers.len();
            let mut no_room = None;
            // What is granted already need not wait for the rest: the caller comes back for it.
            let until = match (granted_bytes, wish.keep) {
                (0, true) => deadline,
                (0, false) => deadline.min(tokio::time::Instant::now() + ROOM_WAIT_MAX),
                _ => tokio::time::Instant::now(),
            };
            for part in &position.parts {
                match self.reserve_part(caller, &wish, position, part, &site, until).await {
                    Ok(answer) => {
                        if let PartAnswer::Slot(_) = answer {
                            granted_bytes += u64::from(part.len);
                        }
                        out.answers.push(answer);
                    }
                    Err(e) => {
                        no_room = Some(e);
                        break;
                    }
                }
            }
            if let Some(e) = no_room {
                // A position is granted whole or not at all; the first one that finds no room is refused by name.
                self.abandon_answers(caller, &mut out.answers, before);
                if i == 0 {
                    self.counters.put_refused_parts.add(position.parts.len() as u64);
                    out.answers.extend(position.parts.iter().map(|_| PartAnswer::Refused(e.clone())));
                    out.granted_positions = 1;
                }
                break;
            }
            if out.answers[before..].iter().any(|a| matches!(a, PartAnswer::Present { .. })) {
                present.push(digests[i]);
            }
            out.granted_positions += 1;
        }
        self.counters
            .put_present_parts
            .add(out.answers.iter().filter(|a| matches!(a, PartAnswer::Present { .. })).count() as u64);
        out.lease = self.lease_present(caller, &wish, &present);
        Ok(out)
    }

    async fn reserve_part(
        self: &Arc<Self>,
        caller: Caller,
        wish: &ReserveWish,
        position: &PositionWish,
        part: &PartWish,
        site: &Site<'_>,
        until: tokio::time::Instant,
    ) -> Result<PartAnswer> {
        if let Err(e) = site.namespace.format.check_part(site.index, part.group, part.shard, u64::from(part.len)) {
            return Ok(PartAnswer::Refused(e));
        }
        if u64::from(part.len) > self.config.limits.block_bytes_max.0 {
            return Ok(PartAnswer::Refused(
                Error::new(ErrorKind::TooLarge, "the block is over this server's limit")
                    .with("bytes", part.len)
                    .with("limits.block_bytes_max", self.config.limits.block_bytes_max),
            ));
        }
        let id = BlockId { digest: site.digest, group: part.group, shard: part.shard };
        let mut upgrade = false;
        let found = self.directory.lock().locate(&id.digest, id.group, id.shard);
        if let Some(found) = found.filter(|f| f.fidelity <= wish.fidelity) {
            // A block that only sessions keep, and that this caller wants for itself, is raised like any other.
            let stands = found.class > wish.class || found.class == wish.class && found.keeper >= wish.keeper;
            if stands {
                let tier = if found.slot.is_some() { Tier::Dram } else { Tier::Nvme };
                return Ok(PartAnswer::Present { tier, class: found.class, version: found.version });
            }
            upgrade = true;
        }
        if let Some(ends) = self.reservations.lock().in_progress(&id) {
            let left = ends.since(self.clock.monotonic());
            return Ok(PartAnswer::InProgress { retry_after: IN_PROGRESS_RETRY.min(left) });
        }
        let slot = if upgrade { None } else { Some(self.slot_for_put(caller.tenant, part.len, until).await?) };
        let reservation = Reservation {
            instance: caller.instance,
            meta: BlockMeta {
                id,
                tenant: caller.tenant,
                handle: wish.handle,
                key: position.key.clone(),
                version: self.new_version(),
                class: wish.class,
                keeper: wish.keeper,
                fidelity: wish.fidelity,
                position: site.index,
                parent: site.parent,
                len: part.len,
                sums: ChunkSums::default(),
            },
            class: wish.class,
            keep: wish.keep,
            ttl: wish.ttl,
            priority: wish.info.priority,
            parent_key: site.parent_key.clone(),
            token_ids: Arc::clone(&position.token_ids),
            slot,
            written: 0,
            sums: RunningSums::default(),
        };
        let ends = self.clock.monotonic().after(self.reservation_term());
        let reservation_id = ReservationId(rand::random());
        if !self.reservations.lock().add(reservation_id, reservation, ends) {
            // Somebody reserved it between the two locks.
            return Ok(PartAnswer::InProgress { retry_after: IN_PROGRESS_RETRY });
        }
        Ok(if upgrade { PartAnswer::Upgrade(reservation_id) } else { PartAnswer::Slot(reservation_id) })
    }

    fn abandon_answers(&self, caller: Caller, answers: &mut Vec<PartAnswer>, from: usize) {
        let mut reservations = self.reservations.lock();
        for answer in answers.drain(from..) {
            if let PartAnswer::Slot(id) | PartAnswer::Upgrade(id) = answer {
                reservations.abandon(id, caller.tenant);
            }
        }
    }

    /// Third step for many parts. Durable ones are written side by side, so that they share flushes and syncs.
    pub async fn commit(
        self: &Arc<Self>,
        caller: Caller,
        info: RequestInfo,
        parts: Vec<(ReservationId, Vec<u32>)>,
    ) -> Vec<(ReservationId, Result<Committed>)> {
        stream::iter(parts)
            .map(|(id, sums)| {
                let store = Arc::clone(self);
                async move { (id, store.commit_part(caller, &info, id, &sums).await) }
            })
            .buffered(DURABLE_WRITES_PER_COMMIT_MAX)
            .collect()
            .await
    }

    async fn commit_part(
        self: &Arc<Self>,
        caller: Caller,
        info: &RequestInfo,
        id: ReservationId,
        client_sums: &[u32],
    ) -> Result<Committed> {
        let mut reservation = self.reservations.lock().take(id, caller.tenant)?;
        let Some(slot) = reservation.slot.take() else {
            let result = self.commit_upgrade(&reservation).await;
            self.reservations.lock().finish(id);
            return result;
        };
        if reservation.written != reservation.meta.len {
            let (written, wanted) = (reservation.written, reservation.meta.len);
            reservation.slot = Some(slot);
            self.reservations.lock().give_back(id, reservation);
            return Err(Error::new(ErrorKind::WrongSize, "the part is not complete; write the rest, then commit")
                .with("written", written)
                .with("bytes", wanted));
        }
        let mut meta = reservation.meta.clone();
        // Made as the bytes landed in the slot, which nobody but this reservation's writer can have touched since.
        meta.sums = std::mem::take(&mut reservation.sums).finish();
        if !client_sums.is_empty() && client_sums != meta.sums.as_slice() {
            self.reservations.lock().finish(id);
            return Err(Error::new(
                ErrorKind::Checksum,
                "the bytes that landed are not those that were sent; put again",
            ));
        }
        let namespace = self.views.get(caller.tenant, meta.handle.namespace);
        let namespace = match namespace {
            Ok(n) if n.revision == meta.handle.revision => n,
            _ => {
                self.reservations.lock().finish(id);
                return Err(Error::new(
                    ErrorKind::StaleRevision,
                    "the weights of this namespace changed during the put",
                ));
            }
        };
        // Bytes first, then the entry that makes them visible.
        let published = slot.publish(&meta);
        failpoint::at("commit.published");
        let result = match published {
            Ok(at) => self.make_visible(&namespace, &reservation, &meta, at, info).await,
            Err(e) => Err(e),
        };
        failpoint::at("commit.visible");
        self.reservations.lock().finish(id);
        result
    }

    async fn make_visible(
        self: &Arc<Self>,
        namespace: &Namespace,
        reservation: &Reservation,
        meta: &BlockMeta,
        at: SlotRef,
        info: &RequestInfo,
    ) -> Result<Committed> {
        // A durable block is visible only when it is durable: else a reader could build on what a power cut takes away.
        let mut place = None;
        let mut claim = None;
        if reservation.class == Class::Durable {
            claim = Some(self.behind.claim(meta.id).await);
            match self.put_nvme(meta, at, Wanted::Durable).await {
                Ok(p) => place = Some(p),
                Err(e) => {
                    self.arena.free(at);
                    return Err(e);
                }
            }
        }
        let now = self.clock.policy();
        let info = RequestInfo { priority: reservation.priority.or(info.priority), ..*info };
        let inserted = {
            let mut directory = self.directory.lock();
            let inserted = directory.insert(meta, &namespace.format, Placed::Dram(at), &info, now);
            if let Ok(Inserted::Stored | Inserted::Superseded(_)) = &inserted {
                if let Some(place) = place {
                    directory.set_nvme(&meta.id, meta.version, place);
                }
                if let Some(ttl) = reservation.ttl {
                    directory.set_expiry(&meta.id.digest, Some(self.clock.monotonic().after(ttl)));
                }
            }
            inserted
        };
        drop(claim);
        match inserted {
            Err(e) => {
                self.drop_copies(meta, Some(at), place).await;
                Err(e)
            }
            Ok(Inserted::Exists { version, class }) => {
                self.drop_copies(meta, Some(at), place).await;
                self.counters.put_superseded_parts.one();
                Ok(Committed { version, class, superseded: true })
            }
            Ok(inserted) => {
                if let Inserted::Superseded(RemovedPart { slot, place: old, .. }) = inserted {
                    self.drop_copies(meta, slot, old).await;
                }
                self.pressure.notify_one();
                self.counters.put_parts.one();
                self.counters.put_bytes.add(u64::from(meta.len));
                self.journal.stored(meta, reservation.parent_key.clone(), Arc::clone(&reservation.token_ids));
                if place.is_none() {
                    self.write_behind(meta, at, reservation.keep).await;
                }
                Ok(Committed { version: meta.version, class: reservation.class, superseded: false })
            }
        }
    }

    async fn commit_upgrade(self: &Arc<Self>, reservation: &Reservation) -> Result<Committed> {
        let id = reservation.meta.id;
        let gone = || Error::new(ErrorKind::Expired, "the block left before its class was raised; put it again");
        let found = self.directory.lock().locate(&id.digest, id.group, id.shard).ok_or_else(gone)?;
        if reservation.class == Class::Durable {
            self.make_durable(reservation.meta.handle, id, reservation.meta.keeper).await?;
        }
        if !self.directory.lock().raise_class(&id, found.version, reservation.class, reservation.meta.keeper) {
            return Err(gone());
        }
        Ok(Committed { version: found.version, class: reservation.class, superseded: false })
    }

    /// Copies that nobody will ever be told of.
    async fn drop_copies(&self, meta: &BlockMeta, slot: Option<SlotRef>, place: Option<NvmePlace>) {
        if let Some(slot) = slot {
            self.arena.free(slot);
        }
        if let Some(place) = place {
            self.free_places(&[BlockCopy { handle: meta.handle, id: meta.id, place }]).await;
        }
    }

    /// Deletes positions. Unreadable at once; memory returns when leases and reads end.
    pub async fn remove(&self, digests: &[Digest]) -> (u32, u32) {
        let removed = self.let_go(digests, MissReason::Removed).await;
        (removed as u32, (digests.len() - removed) as u32)
    }
}

struct Site<'a> {
    namespace: &'a Namespace,
    digest: Digest,
    parent: Option<Digest>,
    parent_key: Option<Arc<[u8]>>,
    index: u32,
}

/// Where a key stands that has no place in a chain: at the first index at which every group has a block ending.
fn unordered_index(format: &Format) -> u32 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let spans = format.groups.iter().map(|g| u64::from(format.positions_per_block(g)));
    let all = spans.fold(1u64, |lcm, k| (lcm / gcd(lcm, k)).saturating_mul(k));
    u32::try_from(all - 1).unwrap_or(u32::MAX - 1)
}
