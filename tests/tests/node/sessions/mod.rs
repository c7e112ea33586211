//! Sessions: what they promise of their lists (`appends`, `tokens`, `names`), of where their blocks are (`tiers`), of what
//! goes and what stays (`sweeps`), and what they refuse (`bounds`).

mod appends;
mod bounds;
mod names;
mod sweeps;
mod tiers;
mod tokens;

use bytes::Bytes;
use kvkeep_client::sessions::{Append, Appended, OpenSession, SessionInfo};
use kvkeep_client::{Call, Client, Error, Namespace};
use kvkeep_core::Class;
use kvkeep_proto::v1;
use kvkeep_tests::{Node, formats, payload};

/// Of every block here, unless a test says otherwise.
const BYTES: usize = 16 << 10;

async fn namespace(node: &Node) -> Namespace {
    super::namespace(&node.client().await, &formats::any_size(1 << 20)).await
}

async fn open(ns: &Namespace, id: &str, class: Class) -> SessionInfo {
    let open = OpenSession { class: Some(class), ..OpenSession::default() };
    ns.sessions().open(id, &open, &Call::default()).await.expect("a session can be opened").0
}

/// An append of positions alone.
async fn append(ns: &Namespace, id: &str, from_position: u64, keys: &[Bytes]) -> Result<Appended, Error> {
    let append = Append { from_position, keys: keys.to_vec(), ..Append::default() };
    ns.sessions().append(id, &append, &Call::default()).await
}

/// A session that has the first positions of a chain, put as `cache`.
async fn filled(ns: &Namespace, id: &str, class: Class, chain: u64, positions: u64) -> Vec<Bytes> {
    let keys = payload::chain(chain, positions);
    open(ns, id, class).await;
    super::store(ns, &keys, BYTES, Class::Cache).await;
    append(ns, id, 0, &keys).await.expect("what was put can be appended");
    keys
}

/// Keys of a whole manifest; all of it must be here.
async fn keys_of(ns: &Namespace, id: &str) -> Vec<Bytes> {
    let manifest = ns.sessions().manifest_all(id, &Call::default()).await.expect("a manifest is answered");
    manifest.into_iter().map(|p| p.key.expect("its block is here")).collect()
}

async fn sweep(client: &Client) -> v1::FsckReply {
    client.admin().fsck(true, &Call::default()).await.expect("a sweep is answered")
}

/// What the context of an error says.
fn says(error: &Error, name: &str) -> String {
    let value = error.context().find(|(n, _)| *n == name).map(|(_, value)| value.to_owned());
    value.unwrap_or_else(|| panic!("it does not say {name}: {error:?}"))
}
