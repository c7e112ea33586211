//! What operators ask of a node. Answers are the wire's own messages: they are made to be shown.

use std::time::Duration;

use kvkeep_core::Tier;
use kvkeep_proto::v1;

use crate::call::Call;
use crate::client::{Client, Safety};
use crate::connection::admin;
use crate::convert;
use crate::error::Result;

/// The operator's verbs of one node. They need the admin right.
#[derive(Clone)]
pub struct Admin {
    pub(crate) client: Client,
}

impl Admin {
    /// How the node does.
    pub async fn status(&self, call: &Call) -> Result<v1::StatusReply> {
        self.client
            .shared
            .unary(
                "status",
                call,
                Safety::Repeatable,
                |_| v1::StatusRequest {},
                |wire, r| async move { admin(wire).status(r).await },
            )
            .await
    }

    /// Every namespace of the node.
    pub async fn namespaces(&self, call: &Call) -> Result<Vec<v1::NamespaceInfo>> {
        let reply = self
            .client
            .shared
            .unary(
                "list_namespaces",
                call,
                Safety::Repeatable,
                |_| v1::ListNamespacesRequest {},
                |wire, r| async move { admin(wire).list_namespaces(r).await },
            )
            .await?;
        Ok(reply.namespaces)
    }

    /// Leases that are held, at most `limit` of them, and how many there are.
    pub async fn leases(&self, limit: u32, call: &Call) -> Result<v1::ListLeasesReply> {
        self.client
            .shared
            .unary(
                "list_leases",
                call,
                Safety::Repeatable,
                |_| v1::ListLeasesRequest { limit },
                |wire, r| async move { admin(wire).list_leases(r).await },
            )
            .await
    }

    /// Checks every block of a tier against its checksums, in the background; waits up to `wait` for the end.
    pub async fn scrub(&self, tier: Tier, wait: Duration, call: &Call) -> Result<v1::ScrubReply> {
        self.client
            .shared
            .unary(
                "scrub",
                call,
                Safety::Repeatable,
                |_| v1::ScrubRequest { tier: convert::tier_to_proto(tier), wait_ms: convert::millis_to_proto(wait) },
                |wire, r| async move { admin(wire).scrub(r).await },
            )
            .await
    }

    /// Compares what sessions name with what is here. With `sweep` what no session names any more is reclaimed first.
    pub async fn fsck(&self, sweep: bool, call: &Call) -> Result<v1::FsckReply> {
        self.client
            .shared
            .unary(
                "fsck",
                call,
                Safety::Repeatable,
                |_| v1::FsckRequest { sweep },
                |wire, r| async move { admin(wire).fsck(r).await },
            )
            .await
    }
}
