//! Looking at a store: stats, list, explain, status.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::catalogue::Namespace;
use kvkeep_core::directory::PositionView;
use kvkeep_core::{Error, ErrorKind, Handle, Key, MissReason, PartStatus, RequestId, Result, Tier};
use kvkeep_proto::v1;

use super::put::Caller;
use super::{SLICE_KEYS, Store};

/// Positions of one page where the caller names no size.
const PAGE_DEFAULT: usize = 256;
/// Positions of one page at most.
const PAGE_MAX: usize = 4096;
/// Positions looked at for one page: a rare prefix in a large namespace answers in short pages.
const LOOK_MAX: usize = 65_536;
/// History entries of one explain.
const EXPLAIN_HISTORY: usize = 32;

impl Store {
    /// Counts and sizes.
    pub fn stats(&self) -> v1::StatsReply {
        let (totals, leases, leased_positions) = {
            let d = self.directory.lock();
            (d.totals(), d.lease_count(), d.leased_positions())
        };
        let usage = self.arena.usage();
        let (dram_rate, nvme_rate) = self.rates.read();
        let mut tiers = vec![v1::TierStats {
            tier: convert::tier_to_proto(Tier::Dram),
            capacity_bytes: usage.capacity_bytes,
            used_bytes: usage.used_bytes,
            free_bytes: usage.free_bytes,
            stranded_bytes: usage.stranded.total(),
            positions: usage.blocks,
            state: "ok".into(),
            read_bytes_per_s: dram_rate,
            write_bytes_per_s: 0,
        }];
        if let Some(nvme) = &self.nvme {
            let usage = nvme.usage();
            let state = if usage.poisoned { "read_only" } else { "ok" };
            tiers.push(v1::TierStats {
                tier: convert::tier_to_proto(Tier::Nvme),
                capacity_bytes: usage.capacity_bytes,
                used_bytes: usage.used_bytes,
                free_bytes: usage
                    .capacity_bytes
                    .saturating_sub(usage.used_bytes + usage.leaving_bytes + usage.quarantined_bytes),
                stranded_bytes: usage.quarantined_bytes,
                positions: usage.entries,
                state: state.into(),
                read_bytes_per_s: nvme_rate,
                write_bytes_per_s: 0,
            });
        }
        let (reservations, reserved_bytes) = {
            let r = self.reservations.lock();
            (r.count() as u32, r.bytes())
        };
        let mut counters = HashMap::new();
        self.counters.each(|name, value| {
            counters.insert(name, value);
        });
        counters.insert("kvkeep_dirty_bytes".into(), self.behind.dirty_bytes());
        counters.insert("kvkeep_arena_pinned_bytes".into(), usage.pinned_bytes);
        counters.insert("kvkeep_arena_quarantined_bytes".into(), usage.quarantined_bytes);
        let (mapped, (regions, region_bytes)) = (self.mapped_usage(), self.region_usage());
        counters.insert("kvkeep_mapped_slots".into(), mapped.slots);
        counters.insert("kvkeep_mapped_bytes".into(), mapped.bytes);
        counters.insert("kvkeep_mapped_orphaned_bytes".into(), mapped.orphaned_bytes);
        counters.insert("kvkeep_regions".into(), regions);
        counters.insert("kvkeep_region_bytes".into(), region_bytes);
        let (sessions, session_positions, pinned) = self.session_usage();
        counters.insert("kvkeep_sessions".into(), sessions as u64);
        counters.insert("kvkeep_session_positions".into(), session_positions);
        counters.insert("kvkeep_pinned_positions".into(), pinned as u64);
        v1::StatsReply {
            positions: totals.positions,
            blocks: totals.parts,
            tiers,
            leases: leases as u32,
            leased_positions,
            reservations,
            reserved_bytes,
            counters,
            uptime_ms: u64::try_from(self.clock.uptime().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// What operators ask first.
    pub fn status(&self) -> v1::StatusReply {
        let mut warnings = self.report.warnings.clone();
        if self.nvme.as_ref().is_some_and(|n| n.usage().poisoned) {
            warnings.push("nvme: a flush failed, the device takes no more writes; restart after checking it".into());
        }
        if let Some(error) = self.catalogue.failure() {
            warnings.push(format!(
                "raft: namespaces can be neither made nor changed; restart after checking the disk: {error}"
            ));
        }
        if let Some(error) = self.sessions.failure() {
            warnings.push(format!("raft: sessions cannot be changed; restart after checking the disk: {error}"));
        }
        v1::StatusReply {
            node: self.config.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            state: if self.stopping.is_cancelled() { "draining" } else { "serving" }.into(),
            uptime_ms: u64::try_from(self.clock.uptime().as_millis()).unwrap_or(u64::MAX),
            data_dir: self.config.data_dir.display().to_string(),
            server_epoch: self.epoch,
            stats: Some(self.stats()),
            warnings,
            start_to_first_hit_ms: self.first_hit_ms.load(Ordering::Relaxed),
            arena_page_bytes: self.report.arena_page_bytes,
            io_engine: self.report.io_engine.clone(),
            adopted_slots: self.report.adopted_slots,
            index_entries_at_open: self.report.index_entries,
            index_open_ms: self.report.index_open_ms,
        }
    }

    /// One page of the positions of a handle whose key starts with a prefix.
    pub async fn list(
        &self,
        handle: Handle,
        prefix: &[u8],
        page_token: &[u8],
        page_size: u32,
        deadline: tokio::time::Instant,
    ) -> Result<(Vec<v1::PositionInfo>, Bytes)> {
        let page = if page_size == 0 { PAGE_DEFAULT } else { (page_size as usize).min(PAGE_MAX) };
        let mut cursor = if page_token.is_empty() {
            0
        } else {
            let raw: [u8; 4] = page_token
                .try_into()
                .map_err(|_| Error::new(ErrorKind::InvalidArgument, "the page token is not one of this server's"))?;
            u32::from_le_bytes(raw)
        };
        let mut out = Vec::new();
        let mut looked = 0;
        loop {
            let count = (page - out.len()).min(SLICE_KEYS);
            let (views, next) = self.scan(handle, cursor, count);
            looked += count;
            let positions: Vec<_> = views.iter().map(|v| (v.digest, handle)).collect();
            for (view, key) in views.iter().zip(self.keys_of(&positions).await) {
                if let Some(key) = key.filter(|k| k.as_bytes().starts_with(prefix)) {
                    out.push(self.position_info(view, &key));
                }
            }
            let Some(next) = next else { return Ok((out, Bytes::new())) };
            cursor = next;
            if out.len() >= page || looked >= LOOK_MAX || tokio::time::Instant::now() >= deadline {
                return Ok((out, Bytes::copy_from_slice(&cursor.to_le_bytes())));
            }
        }
    }

    fn position_info(&self, view: &PositionView, key: &Key) -> v1::PositionInfo {
        let idle = self.clock.policy().since(view.last_access);
        v1::PositionInfo {
            key: Bytes::copy_from_slice(key.as_bytes()),
            position: view.position,
            parts: view
                .parts
                .iter()
                .map(|p| v1::PartInfo {
                    group: u32::from(p.group.0),
                    shard: u32::from(p.shard.0),
                    bytes: u64::from(p.len),
                    version: p.version.0,
                    tiers: [(p.dram, Tier::Dram), (p.nvme, Tier::Nvme)]
                        .into_iter()
                        .filter(|(here, _)| *here)
                        .map(|(_, tier)| convert::tier_to_proto(tier))
                        .collect(),
                })
                .collect(),
            class: convert::class_to_proto(view.class),
            leases: view.leases,
            accesses: view.accesses,
            idle_ms: u64::try_from(idle.as_millis()).unwrap_or(u64::MAX),
            digest: Bytes::copy_from_slice(view.digest.as_bytes()),
            index_value: self.directory.lock().index_value(&view.digest, self.clock.policy()),
        }
    }

    /// Why a position is, or is not, here.
    pub async fn explain(&self, caller: Caller, handle: Handle, key: &Key) -> Result<v1::ExplainReply> {
        let (namespace, current) = self.namespace_of(caller, handle)?;
        let digest = self.digests(caller, handle, [key.as_bytes()])[0];
        let view = self.directory.lock().view(&digest).filter(|v| !v.parts.is_empty());
        let history: Vec<_> = self
            .journal
            .history(&digest, EXPLAIN_HISTORY)
            .into_iter()
            .map(|e| v1::HistoryEntry {
                unix_ms: e.unix_ms,
                what: e.what.word().into(),
                tier: convert::tier_opt_to_proto(e.tier),
                why: e.why.map_or_else(String::new, |w| w.word().into()),
                index_value: e.index_value,
            })
            .collect();
        let (status, reason, summary) = match &view {
            _ if !current => (
                PartStatus::Miss,
                Some(MissReason::Revision),
                format!(
                    "the handle is at revision {} and the namespace at {}: the weights have changed",
                    handle.revision, namespace.revision
                ),
            ),
            Some(view) => {
                let wanted = namespace.format.parts_at(view.position).count();
                if view.parts.len() < wanted {
                    (
                        PartStatus::Miss,
                        Some(MissReason::Incomplete),
                        format!("{} of {wanted} parts are here", view.parts.len()),
                    )
                } else {
                    let dram = view.parts.iter().filter(|p| p.dram).count();
                    let nvme = view.parts.iter().filter(|p| p.nvme).count();
                    let summary = format!("here: {} parts, {dram} in dram, {nvme} on nvme", view.parts.len());
                    (PartStatus::Hit, None, summary)
                }
            }
            None => {
                let reason = self.journal.why_absent(&digest).unwrap_or(MissReason::NeverStored);
                let summary = match reason {
                    MissReason::NeverStored => {
                        "never stored, as far as this node remembers (its history is bounded and starts with the node)"
                            .into()
                    }
                    other => format!("not here: {other}"),
                };
                (PartStatus::Miss, Some(reason), summary)
            }
        };
        Ok(v1::ExplainReply {
            status: convert::status_to_proto(status),
            reason: convert::reason_opt_to_proto(reason),
            position: view.as_ref().map(|v| self.position_info(v, key)),
            history,
            summary,
            misses: Vec::new(),
        })
    }

    /// What a recent request missed, and why.
    pub fn explain_request(&self, caller: Caller, request: &RequestId) -> v1::ExplainReply {
        let misses: Vec<_> = self
            .requests
            .of(caller.tenant, request)
            .into_iter()
            .map(|m| v1::RequestMiss {
                verb: m.verb.into(),
                handle: Some(convert::handle_to_proto(m.handle)),
                keys: m.keys,
                hits: m.hits,
                key: Bytes::copy_from_slice(m.key.as_bytes()),
                reason: convert::reason_to_proto(m.reason),
                why: super::sessions::manifest::sentence(m.reason).into(),
                unix_ms: m.unix_ms,
            })
            .collect();
        let summary = if misses.is_empty() {
            "this request missed nothing, as far as this node remembers (it remembers a bounded number of misses)"
                .into()
        } else {
            format!("{} misses", misses.len())
        };
        v1::ExplainReply { misses, summary, ..v1::ExplainReply::default() }
    }

    /// Namespaces with what they hold.
    pub fn namespaces(&self) -> Vec<v1::NamespaceInfo> {
        let tenants: HashMap<_, _> = self.report.tenants.iter().map(|(name, id)| (*id, name)).collect();
        let directory = self.directory.lock();
        let spell = |n: &Namespace| {
            let usage = directory.usage(n.handle());
            v1::NamespaceInfo {
                namespace_id: n.id.0,
                tenant: tenants.get(&n.tenant).map_or_else(|| n.tenant.to_string(), |name| (*name).clone()),
                name: n.name.clone(),
                format: Some(convert::format_to_proto(&n.format)),
                revision: n.revision.0,
                revision_digest: n.revision_digest.clone(),
                fingerprint: Bytes::copy_from_slice(&n.fingerprint.0),
                positions: usage.positions,
                dram_bytes: usage.dram_bytes,
                nvme_bytes: usage.nvme_bytes,
            }
        };
        self.views.all().iter().map(|n| spell(n)).collect()
    }

    /// Leases, at most `limit` of them, and how many there are.
    pub fn leases(&self, limit: usize) -> (Vec<v1::LeaseInfo>, u32) {
        let now = self.clock.monotonic();
        let directory = self.directory.lock();
        let leases = directory
            .leases(limit)
            .into_iter()
            .map(|l| v1::LeaseInfo {
                lease_id: l.id.0,
                instance_id: Bytes::copy_from_slice(&l.instance.0),
                request_id: Bytes::copy_from_slice(l.request.as_bytes()),
                handle: Some(convert::handle_to_proto(l.handle)),
                positions: l.positions,
                ttl_ms: convert::millis_to_proto(l.ends.since(now)),
                age_ms: u64::try_from(now.since(l.begun).as_millis()).unwrap_or(u64::MAX),
            })
            .collect();
        (leases, directory.lease_count() as u32)
    }

    /// Scrubs a tier once from start to end; runs on even when nobody waits.
    pub async fn scrub(self: &Arc<Self>, tier: Tier) -> Result<v1::ScrubReply> {
        let mut reply = v1::ScrubReply::default();
        match (tier, &self.nvme) {
            (Tier::Dram, _) => {
                let before = self.counters.corrupt_copies.get();
                let slots: Vec<_> = self.arena.slots().collect();
                for slice in slots.chunks(16) {
                    reply.checked_bytes += self.scrub_aside(slice).await;
                    reply.checked_blocks += slice.len() as u64;
                }
                reply.bad_blocks = self.counters.corrupt_copies.get() - before;
            }
            (Tier::Nvme, Some(nvme)) => {
                let mut cursor = None;
                loop {
                    let report = nvme.scrub(cursor, 64).await?;
                    reply.bad_blocks += self.take_scrub(&report);
                    reply.checked_blocks += report.checked;
                    reply.checked_bytes += report.bytes;
                    cursor = report.next;
                    if cursor.is_none() {
                        break;
                    }
                }
            }
            _ => return Err(Error::new(ErrorKind::InvalidArgument, "this node has no such tier").with("tier", tier)),
        }
        reply.done = true;
        Ok(reply)
    }
}
