//! The gRPC services: the wire around [`crate::verbs`].
//!
//! Here: whose connection a call came on. Then [`blocks`] (every verb) -> [`sessions`] -> [`admin`] (what operators ask).

pub mod admin;
pub mod blocks;
mod events;
pub mod sessions;
mod streams;

use std::sync::Arc;

use kvkeep_client::convert;
use tonic::{Extensions, Status};

use crate::connection::{Connection, Hello};
use crate::store::Store;

/// The connection of a request.
fn connection(extensions: &Extensions) -> Result<Arc<Connection>, Status> {
    extensions.get::<Arc<Connection>>().cloned().ok_or_else(|| Status::internal("the request has no connection"))
}

/// The hello of a request's connection.
fn hello(store: &Store, extensions: &Extensions) -> Result<Hello, Status> {
    let connection = connection(extensions)?;
    connection.hello().cloned().ok_or_else(|| {
        store.counters.denied_calls.one();
        convert::status_from_detail(&convert::hello_required())
    })
}
