//! The promises of one node, asked of the real binary.
//!
//! `put_get`, `regions`, `engine` and `namespaces` are what an engine does; `bad_input` and `block_wire` what it must not do; `lost`
//! what it sees of a server that is gone; `ways_in`, `leases`, `tenants`,
//! `events` and `room` what surrounds blocks; `embedded` a server that a client starts for itself; `clients_die`, `restart`,
//! `damage`, `eio`, `failpoints`, `kill_loop` and `powercut` what can go wrong; `sessions` conversations as objects, and
//! `session_loop` what crashes do to them.

#![expect(clippy::unwrap_used, reason = "everything here is a test: an unwrap is an assertion")]

mod bad_input;
mod block_wire;
mod clients_die;
mod damage;
mod eio;
mod embedded;
mod engine;
mod events;
mod failpoints;
mod kill_loop;
mod leases;
mod lost;
mod mapped_clients;
mod namespaces;
mod powercut;
mod put_get;
mod regions;
mod restart;
mod room;
mod session_loop;
mod sessions;
mod tenants;
mod ways_in;

use bytes::Bytes;
use kvkeep_client::{Call, Client, GetItem, Namespace, PartOutcome, Put, PutPosition};
use kvkeep_core::{Class, ErrorKind, Format};
use kvkeep_tests::payload;

/// A namespace of this test.
async fn namespace(client: &Client, format: &Format) -> Namespace {
    client.register_namespace("test", format, "weights-1").await.expect("a namespace can be registered")
}

/// A put of whole blocks whose bytes follow from their keys.
fn put_of(keys: &[Bytes], bytes: usize, class: Class) -> Put {
    let positions = keys.iter().map(|key| PutPosition::of(key.clone(), payload::block(key, bytes))).collect();
    Put { positions, class: Some(class), ..Put::default() }
}

/// Stores blocks whose bytes follow from their keys; each must be stored.
async fn store(namespace: &Namespace, keys: &[Bytes], bytes: usize, class: Class) {
    let outcomes = namespace.put(&put_of(keys, bytes, class), &Call::default()).await.expect("a put is answered");
    assert_eq!(outcomes.len(), keys.len());
    for outcome in outcomes {
        assert!(matches!(outcome, PartOutcome::Stored { .. }), "{outcome:?}");
    }
}

/// How many of the blocks are here; those that are must have the right bytes.
async fn found(namespace: &Namespace, keys: &[Bytes], bytes: usize) -> usize {
    let items: Vec<_> = keys.iter().map(|key| GetItem::of(key.clone())).collect();
    let parts = namespace.get(&items, None, &Call::default()).await.expect("a get is answered");
    let hits = keys.iter().zip(parts).filter(|(key, part)| {
        assert!(!part.is_hit() || part.data == payload::block(key, bytes), "wrong bytes");
        part.is_hit()
    });
    hits.count()
}

/// The server refused with this kind.
fn is_refused<T>(result: kvkeep_client::Result<T>, kind: ErrorKind) -> kvkeep_client::Error {
    let Err(error) = result else { panic!("the server was to refuse with {}", kind.word()) };
    assert_eq!(error.kind(), kvkeep_client::ErrorKind::Refused(kind), "{error}");
    error
}
