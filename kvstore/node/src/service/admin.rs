//! What operators ask. Every call needs the admin right.

use std::sync::Arc;
use std::time::Duration;

use kvkeep_client::convert;
use kvkeep_core::{Error, ErrorKind};
use kvkeep_proto::v1;
use tonic::{Request, Response, Status};

use super::hello;
use crate::store::Store;

/// Leases of one answer.
const LEASES_MAX: usize = 10_000;
/// Longest wait for a scrub.
const SCRUB_WAIT_MAX: Duration = Duration::from_secs(600);

/// The service.
#[derive(Clone)]
pub struct Admin {
    store: Arc<Store>,
}

impl Admin {
    /// Over this store.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if hello(&self.store, request.extensions())?.admin {
            return Ok(());
        }
        self.store.counters.denied_calls.one();
        Err(convert::status_from_error(&Error::new(ErrorKind::Denied, "this needs a token with the admin right")))
    }
}

#[tonic::async_trait]
impl v1::admin_server::Admin for Admin {
    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        self.check(&request)?;
        Ok(Response::new(self.store.status()))
    }

    async fn list_namespaces(
        &self,
        request: Request<v1::ListNamespacesRequest>,
    ) -> Result<Response<v1::ListNamespacesReply>, Status> {
        self.check(&request)?;
        Ok(Response::new(v1::ListNamespacesReply { namespaces: self.store.namespaces() }))
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Result<Response<v1::ListLeasesReply>, Status> {
        self.check(&request)?;
        let limit = match request.into_inner().limit {
            0 => LEASES_MAX,
            n => (n as usize).min(LEASES_MAX),
        };
        let (leases, total) = self.store.leases(limit);
        Ok(Response::new(v1::ListLeasesReply { leases, total }))
    }

    async fn fsck(&self, request: Request<v1::FsckRequest>) -> Result<Response<v1::FsckReply>, Status> {
        self.check(&request)?;
        // To its end, whoever waits: a sweep that was begun is finished.
        let (store, sweep) = (Arc::clone(&self.store), request.into_inner().sweep);
        let checking = tokio::spawn(async move { store.fsck(sweep).await });
        checking.await.map(Response::new).map_err(|_| Status::internal("the check was cut short"))
    }

    async fn scrub(&self, request: Request<v1::ScrubRequest>) -> Result<Response<v1::ScrubReply>, Status> {
        self.check(&request)?;
        let wish = request.into_inner();
        let tier = convert::tier_from_proto(wish.tier).map_err(|e| convert::status_from_error(&e))?;
        let store = Arc::clone(&self.store);
        let scrubbing = tokio::spawn(async move { store.scrub(tier).await });
        let wait = Duration::from_millis(u64::from(wish.wait_ms)).min(SCRUB_WAIT_MAX);
        match tokio::time::timeout(wait, scrubbing).await {
            Ok(Ok(result)) => Ok(Response::new(result.map_err(|e| convert::status_from_error(&e))?)),
            Ok(Err(_)) => Err(Status::internal("the scrub was cut short")),
            Err(_) => Ok(Response::new(v1::ScrubReply::default())),
        }
    }
}
