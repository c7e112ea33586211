//! The verbs, apart from any wire: they check what came in, call the [`crate::store`], and spell the answer in messages of
//! `kvkeep.v1`. gRPC ([`crate::service`]) and the block protocol ([`crate::block`]) carry the same ones.
//!
//! Here: who calls, until when, within which bounds, and how a call fails. Then [`hello`] -> [`namespaces`] -> [`lookup`]
//! (match, lease, release, touch, prefetch) -> [`get`] -> [`put`] (reserve, commit) ->
//! [`sessions`].

pub mod get;
pub mod hello;
pub mod lookup;
pub mod namespaces;
pub mod put;
pub mod sessions;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::convert::{self, Context};
use kvkeep_core::{Digest, Error, ErrorKind, Handle, Key};
use kvkeep_proto::v1;
use tokio::time::Instant;

use crate::connection::Hello;
use crate::store::Store;
use crate::store::put::Caller;

/// Why a call has no answer. Every wire has its own spelling.
#[derive(Debug)]
pub enum Refusal {
    /// The store said no, or a check before it.
    Error(Error),
    /// The call's deadline passed; it may still be done.
    Late(&'static str),
    /// Work was cut short, as by the node's stop.
    Cut(&'static str),
    /// The connection has not said hello.
    HelloRequired,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Refusal {
    /// As a failed gRPC call.
    pub fn into_status(self) -> tonic::Status {
        match self {
            Self::Error(e) => convert::status_from_error(&e),
            Self::Late(why) => tonic::Status::deadline_exceeded(why),
            Self::Cut(why) => tonic::Status::internal(why),
            Self::HelloRequired => convert::status_from_detail(&convert::hello_required()),
        }
    }

    /// As it stands in an envelope of the block protocol.
    pub fn into_detail(self) -> v1::ErrorDetail {
        match self {
            Self::Error(e) => convert::error_to_proto(&e),
            Self::Late(why) => convert::late(why),
            Self::Cut(why) => convert::error_to_proto(&Error::new(ErrorKind::Unavailable, why)),
            Self::HelloRequired => convert::hello_required(),
        }
    }
}

/// What a verb comes to.
pub type Answer<T> = Result<T, Refusal>;

/// What every verb needs to know of its call.
#[derive(Clone)]
pub struct Call {
    /// Who.
    pub caller: Caller,
    /// Until when an answer is of use.
    pub deadline: Instant,
    /// Request id, policy info and the rest.
    pub context: Context,
}

/// The verbs over one store.
#[derive(Clone)]
pub struct Verbs {
    /// What they work on.
    pub store: Arc<Store>,
}

/// Keys of one call, as the store knows them.
pub(crate) struct Batch {
    pub(crate) handle: Handle,
    /// The handle is at its namespace's revision.
    pub(crate) current: bool,
    pub(crate) digests: Vec<Digest>,
}

impl Verbs {
    /// Reads a call's context; tells the policy's clock.
    pub fn call(&self, hello: &Hello, ctx: Option<v1::CallContext>) -> Answer<Call> {
        let mut context = convert::context_from_proto(ctx)?;
        // Whose hints these are: an engine's, as long as it lives.
        let [a, b, c, d, e, f, g, h, ..] = hello.instance.0;
        context.info.client = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        if let Some(told) = context.policy_clock {
            self.store.clock.tell(told.0);
        }
        let limits = &self.store.config.limits;
        let max = Duration::from_millis(u64::from(limits.deadline_ms_max));
        let default = Duration::from_millis(u64::from(limits.deadline_ms_default));
        let deadline = Instant::now() + context.deadline.unwrap_or(default).min(max);
        Ok(Call { caller: Caller { instance: hello.instance, tenant: hello.tenant }, deadline, context })
    }

    pub(crate) fn keys_within(&self, count: usize) -> Answer<()> {
        within("limits.batch_keys_max", count, self.store.config.limits.batch_keys_max)
    }

    /// A batch of keys under one handle, checked.
    pub(crate) fn batch(&self, call: &Call, handle: Option<v1::Handle>, keys: &[Bytes]) -> Answer<Batch> {
        self.keys_within(keys.len())?;
        check_keys(keys)?;
        let handle = convert::handle_from_proto(handle)?;
        let (_, current) = self.store.namespace_of(call.caller, handle)?;
        let digests = self.store.digests(call.caller, handle, keys.iter().map(|k| &k[..]));
        Ok(Batch { handle, current, digests })
    }

    pub(crate) fn lease_term(&self, ttl_ms: u32) -> Duration {
        let limits = &self.store.config.limits;
        let ms = if ttl_ms == 0 { limits.lease_ttl_ms_default } else { ttl_ms.min(limits.lease_ttl_ms_max) };
        Duration::from_millis(u64::from(ms))
    }
}

/// Refuses a batch over a named bound.
pub(crate) fn within(name: &'static str, count: usize, max: u32) -> Answer<()> {
    if count <= max as usize {
        return Ok(());
    }
    Err(Error::new(ErrorKind::TooLarge, "the batch is over this server's limit; split it")
        .with("limit", name)
        .with("max", max)
        .with("asked", count)
        .into())
}

fn check_keys(raw: &[Bytes]) -> Result<(), Error> {
    raw.iter().try_for_each(|k| match k.len() {
        1..=kvkeep_core::ids::KEY_BYTES_MAX => Ok(()),
        // The error names the length as `Key::new` does.
        _ => Key::new(k).map(|_| ()),
    })
}

pub(crate) fn narrow<T: TryFrom<u32>>(name: &'static str, n: u32) -> Result<T, Error> {
    T::try_from(n).map_err(|_| {
        Error::new(ErrorKind::InvalidArgument, "a number is out of range").with("field", name).with("value", n)
    })
}
