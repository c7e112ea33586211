//! Who calls, until when, and within which bounds.

use std::sync::Arc;
use std::time::Duration;

use kvkeep_client::convert::{self, Context};
use kvkeep_core::{Error, ErrorKind};
use kvkeep_proto::v1;
use tokio::time::Instant;
use tonic::{Extensions, Status};

use crate::connection::{Connection, Hello};
use crate::store::Store;
use crate::store::put::Caller;

/// What every verb needs to know of its call.
pub struct Call {
    /// Who.
    pub caller: Caller,
    /// Until when an answer is of use.
    pub deadline: Instant,
    /// Request id, policy info and the rest.
    pub context: Context,
}

/// The connection of a request.
pub fn connection(extensions: &Extensions) -> Result<Arc<Connection>, Status> {
    extensions.get::<Arc<Connection>>().cloned().ok_or_else(|| Status::internal("the request has no connection"))
}

/// The hello of a request's connection.
pub fn hello(store: &Store, extensions: &Extensions) -> Result<Hello, Status> {
    let connection = connection(extensions)?;
    connection.hello().cloned().ok_or_else(|| {
        store.counters.denied_calls.one();
        convert::status_from_detail(&convert::hello_required())
    })
}

impl Call {
    /// Reads a call's context; tells the policy's clock.
    pub fn open(store: &Store, extensions: &Extensions, ctx: Option<v1::CallContext>) -> Result<Self, Status> {
        let hello = hello(store, extensions)?;
        let context = convert::context_from_proto(ctx).map_err(|e| convert::status_from_error(&e))?;
        if let Some(told) = context.policy_clock {
            store.clock.tell(told.0);
        }
        let limits = &store.config.limits;
        let max = Duration::from_millis(u64::from(limits.deadline_ms_max));
        let default = Duration::from_millis(u64::from(limits.deadline_ms_default));
        let deadline = Instant::now() + context.deadline.unwrap_or(default).min(max);
        Ok(Self { caller: Caller { instance: hello.instance, tenant: hello.tenant }, deadline, context })
    }
}

/// Refuses a batch over a named bound.
pub fn within(name: &'static str, count: usize, max: u32) -> Result<(), Status> {
    if count <= max as usize {
        return Ok(());
    }
    let error = Error::new(ErrorKind::TooLarge, "the batch is over this server's limit; split it")
        .with("limit", name)
        .with("max", max)
        .with("asked", count);
    Err(convert::status_from_error(&error))
}

/// Shorthand: a core error as a status.
pub fn refuse(error: Error) -> Status {
    convert::status_from_error(&error)
}
