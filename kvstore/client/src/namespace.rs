//! A namespace at one revision: the verbs on blocks that take one call each.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ids::LeaseId;
use kvkeep_core::{Handle, PartStatus, RequestId, Tier};
use kvkeep_proto::v1;

use crate::call::Call;
use crate::client::{Client, Safety};
use crate::connection::blocks;
use crate::convert;
use crate::error::Result;
use crate::sessions::Sessions;

/// A registered namespace at the revision it had when it was opened. Cheap to clone.
#[derive(Clone)]
pub struct Namespace {
    /// What every verb names.
    pub handle: Handle,
    /// Whether the registration made it.
    pub created: bool,
    /// Of its format, as the server computed it.
    pub fingerprint: [u8; 16],
    /// `false`: the store holds KV of other weights. Advance the revision, or use another namespace.
    pub revision_matches: bool,
    /// The digest of the revision that the store holds.
    pub revision_digest: String,
    pub(crate) client: Client,
}

/// A lease that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// It ends so long after the answer was made.
    pub ttl: Duration,
    /// Positions it holds.
    pub positions: u32,
}

impl Lease {
    pub(crate) fn from_proto(lease: v1::GrantedLease) -> Option<Self> {
        Some(Self {
            id: convert::lease_from_proto(lease.lease_id)?,
            ttl: Duration::from_millis(u64::from(lease.ttl_ms)),
            positions: lease.positions,
        })
    }
}

impl Namespace {
    /// The client it came from.
    pub fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn wire_handle(&self) -> Option<v1::Handle> {
        Some(convert::handle_to_proto(self.handle))
    }

    /// Its sessions.
    pub fn sessions(&self) -> Sessions {
        Sessions { ns: self.clone() }
    }

    /// The weights changed. Compare-and-set on this handle's revision; answers the namespace at its new one. Old handles get
    /// misses from then on.
    pub async fn advance_revision(&self, revision_digest: &str, call: &Call) -> Result<Namespace> {
        let reply = self
            .client
            .shared
            .unary(
                "advance_revision",
                call,
                Safety::Once,
                |ctx| v1::AdvanceRevisionRequest {
                    ctx: Some(ctx),
                    from: self.wire_handle(),
                    revision_digest: revision_digest.to_owned(),
                },
                |wire, r| async move { blocks(wire).advance_revision(r).await },
            )
            .await?;
        Ok(Namespace {
            handle: convert::handle_from_proto(reply.handle)?,
            created: false,
            revision_matches: true,
            revision_digest: revision_digest.to_owned(),
            ..self.clone()
        })
    }

    /// Takes a lease over positions, named by the call's request id, or extends that request's lease. `ttl` `None`: the
    /// server's default. Answers the lease, if any position could be leased, and each position's status.
    pub async fn lease(
        &self,
        keys: &[Bytes],
        ttl: Option<Duration>,
        call: &Call,
    ) -> Result<(Option<Lease>, Vec<PartStatus>)> {
        self.lease_call(0, keys, ttl, call).await
    }

    /// Renews a lease. Fails with `expired` where it has ended.
    pub async fn renew(&self, lease: LeaseId, ttl: Option<Duration>, call: &Call) -> Result<Option<Lease>> {
        Ok(self.lease_call(lease.0, &[], ttl, call).await?.0)
    }

    async fn lease_call(
        &self,
        lease_id: u64,
        keys: &[Bytes],
        ttl: Option<Duration>,
        call: &Call,
    ) -> Result<(Option<Lease>, Vec<PartStatus>)> {
        let reply = self
            .client
            .shared
            .hot(
                "lease",
                call,
                |ctx| v1::LeaseRequest {
                    ctx: Some(ctx),
                    lease_id,
                    handle: self.wire_handle(),
                    keys: keys.to_vec(),
                    ttl_ms: ttl.map_or(0, convert::millis_to_proto),
                },
                |wire, r| async move { blocks(wire).lease(r).await },
            )
            .await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(e) => {
                self.client.shared.miss(e)?;
                return Ok((None, vec![PartStatus::Miss; keys.len()]));
            }
        };
        Ok((reply.lease.and_then(Lease::from_proto), convert::statuses_from_proto(&reply.statuses)))
    }

    /// Ends leases of this client. Idempotent.
    pub async fn release(&self, leases: &[LeaseId], requests: &[RequestId], call: &Call) -> Result<u32> {
        self.client.release(leases, requests, call).await
    }

    /// Counts as an access to each position, moves no bytes. Answers how many are here.
    pub async fn touch(&self, keys: &[Bytes], call: &Call) -> Result<u32> {
        let mut touched = 0;
        for keys in keys.chunks(self.batch()) {
            let reply = self
                .client
                .shared
                .hot(
                    "touch",
                    call,
                    |ctx| v1::TouchRequest { ctx: Some(ctx), handle: self.wire_handle(), keys: keys.to_vec() },
                    |wire, r| async move { blocks(wire).touch(r).await },
                )
                .await;
            match reply {
                Ok(reply) => touched += reply.touched,
                Err(e) => drop(self.client.shared.miss(e)?),
            }
        }
        Ok(touched)
    }

    /// Asks for promotion to a faster tier; answers at once with what was started, what was there, what was refused.
    pub async fn prefetch(&self, keys: &[Bytes], to: Tier, call: &Call) -> Result<v1::PrefetchReply> {
        let mut sum = v1::PrefetchReply::default();
        for keys in keys.chunks(self.batch()) {
            let reply = self
                .client
                .shared
                .unary(
                    "prefetch",
                    call,
                    Safety::Repeatable,
                    |ctx| v1::PrefetchRequest {
                        ctx: Some(ctx),
                        handle: self.wire_handle(),
                        keys: keys.to_vec(),
                        to: convert::tier_to_proto(to),
                    },
                    |wire, r| async move { blocks(wire).prefetch(r).await },
                )
                .await?;
            sum.started += reply.started;
            sum.already += reply.already;
            sum.refused += reply.refused;
        }
        Ok(sum)
    }

    /// Deletes positions. Those that somebody leases or reads are unreadable at once and give their space back later.
    pub async fn remove(&self, keys: &[Bytes], call: &Call) -> Result<v1::RemoveReply> {
        let mut sum = v1::RemoveReply::default();
        for keys in keys.chunks(self.batch()) {
            let reply = self
                .client
                .shared
                .unary(
                    "remove",
                    call,
                    Safety::Repeatable,
                    |ctx| v1::RemoveRequest { ctx: Some(ctx), handle: self.wire_handle(), keys: keys.to_vec() },
                    |wire, r| async move { blocks(wire).remove(r).await },
                )
                .await?;
            sum.removed += reply.removed;
            sum.absent += reply.absent;
            sum.held += reply.held;
        }
        Ok(sum)
    }

    /// One page of the positions whose key starts with `prefix`. `page_token`: empty at first, then the last page's
    /// `next_page_token` until that is empty. `page_size` 0: the server's default.
    pub async fn list_page(
        &self,
        prefix: &Bytes,
        page_token: &Bytes,
        page_size: u32,
        call: &Call,
    ) -> Result<v1::ListReply> {
        self.client
            .shared
            .unary(
                "list",
                call,
                Safety::Repeatable,
                |ctx| v1::ListRequest {
                    ctx: Some(ctx),
                    handle: self.wire_handle(),
                    key_prefix: prefix.clone(),
                    page_token: page_token.clone(),
                    page_size,
                },
                |wire, r| async move { blocks(wire).list(r).await },
            )
            .await
    }

    /// The first `limit` positions whose key starts with `prefix`, page by page, and whether there are more.
    pub async fn list(&self, prefix: &Bytes, limit: usize, call: &Call) -> Result<(Vec<v1::PositionInfo>, bool)> {
        let (mut positions, mut token) = (Vec::new(), Bytes::new());
        loop {
            let want = u32::try_from(limit - positions.len()).unwrap_or(u32::MAX);
            let page = self.list_page(prefix, &token, want, call).await?;
            positions.extend(page.positions);
            token = page.next_page_token;
            let more = !token.is_empty() || positions.len() > limit;
            positions.truncate(limit);
            if positions.len() == limit || !more {
                return Ok((positions, more));
            }
        }
    }

    /// Why a position is, or is not, here.
    pub async fn explain(&self, key: &Bytes, call: &Call) -> Result<v1::ExplainReply> {
        self.client
            .shared
            .unary(
                "explain",
                call,
                Safety::Repeatable,
                |ctx| v1::ExplainRequest {
                    ctx: Some(ctx),
                    handle: self.wire_handle(),
                    key: key.clone(),
                    request_id: Bytes::new(),
                },
                |wire, r| async move { blocks(wire).explain(r).await },
            )
            .await
    }

    /// Keys of one call; at least 1.
    pub(crate) fn batch(&self) -> usize {
        self.client.hello().limits.batch_keys_max.max(1)
    }
}
