//! What a caller says with each call.

use std::time::Duration;

use kvkeep_core::{Instant, RequestId, RequestInfo};
use kvkeep_proto::v1;

use crate::convert;

/// What every verb carries beside its arguments. The default is a call of no request with the client's deadline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Calls of one request share it; leases are named by it.
    pub request_id: RequestId,
    /// For the whole call, retries included; `None`: the client's default. Bounded by the server's limit.
    pub deadline: Option<Duration>,
    /// What the policy learns from.
    pub info: RequestInfo,
    /// The policy's clock, for servers that take it from requests (replay); others ignore it.
    pub policy_clock: Option<Instant>,
    /// Accounting label, never part of a key.
    pub label: String,
}

impl Call {
    /// A call of this request.
    pub fn of(request_id: RequestId) -> Self {
        Self { request_id, ..Self::default() }
    }

    /// With this deadline.
    #[must_use]
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    pub(crate) fn to_proto(&self, left: Duration) -> v1::CallContext {
        convert::context_to_proto(&convert::Context {
            request_id: self.request_id.clone(),
            deadline: Some(left),
            info: self.info,
            policy_clock: self.policy_clock,
            label: self.label.clone(),
        })
    }
}
