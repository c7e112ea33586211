//! The state machine of group 0: commands and state of the catalogue as bytes.
//!
//! | key | value, behind its version (1) |
//! |---|---|
//! | `h` | secret 16, number of the next namespace 4 |
//! | `n`, id 4 | the namespace, JSON |
//! | `t`, id 4 | name of the tenant |
//!
//! Ids in keys are big-endian, the number in `h` is little-endian. A registration writes one namespace and `h`.
//!
//! A command is its version (1) and JSON. Whatever changes what a command does raises that version: a member that does not
//! know it stands still, for one that guessed would have another state than the rest.

use std::sync::Arc;

use kvkeep_core::catalogue::{Catalogue, Command, Namespace, Outcome, Parts};
use kvkeep_core::{DigestKey, Handle, NamespaceId, Result, TenantId};
use kvkeep_raft::{Committed, Refusal, Reply, StateMachine, Writes};
use parking_lot::RwLock;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::consensus::FirstState;
use crate::store::namespaces::Views;

const COMMAND_VERSION: u8 = 1;
const VALUE_VERSION: u8 = 1;

const HEAD_KEY: &[u8] = b"h";
const NAMESPACE_TAG: u8 = b'n';
const TENANT_TAG: u8 = b't';
const HEAD_BYTES: usize = 20;

/// What the machine and those who read share.
pub struct Shared {
    /// As applied. Changed by the machine alone.
    pub catalogue: RwLock<Catalogue>,
    views: Arc<Views>,
}

impl Shared {
    /// Nothing yet: the group brings its state when it is opened.
    pub fn new(views: Arc<Views>) -> Self {
        Self { catalogue: RwLock::new(Catalogue::new(DigestKey::from_bytes([0; 16]))), views }
    }
}

/// Applies commands of group 0.
pub struct Machine {
    shared: Arc<Shared>,
    loading: Loading,
}

/// What was loaded so far. The state that is served stays until it is whole.
#[derive(Default)]
struct Loading {
    head: Option<([u8; 16], u32)>,
    tenants: Vec<String>,
    namespaces: Vec<Namespace>,
}

impl Machine {
    /// Keeps the catalogue and the views of `shared`.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, loading: Loading::default() }
    }
}

impl StateMachine for Machine {
    fn clear(&mut self) {
        self.loading = Loading::default();
    }

    fn load(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let value = unversioned(value, VALUE_VERSION).ok_or_else(|| refusal("a value of another version", key))?;
        match key.split_first() {
            Some((_, [])) if key == HEAD_KEY => {
                let (secret, next) = value.split_first_chunk::<16>().ok_or_else(|| refusal("no secret", key))?;
                let next = next.try_into().map_err(|_| refusal("no number of the next namespace", key))?;
                self.loading.head = Some((*secret, u32::from_le_bytes(next)));
            }
            Some((&NAMESPACE_TAG, id)) => {
                let namespace: Namespace = from_json(value).map_err(|e| refusal(&e, key))?;
                if namespace.id.0.to_be_bytes() != id {
                    return Err(refusal("another namespace", key));
                }
                self.loading.namespaces.push(namespace);
            }
            Some((&TENANT_TAG, id)) => {
                // In order of the keys: a gap is a tenant that is lost.
                if (self.loading.tenants.len() as u32).to_be_bytes() != id {
                    return Err(refusal("not the next tenant", key));
                }
                let name = String::from_utf8(value.to_vec()).map_err(|_| refusal("no name", key))?;
                self.loading.tenants.push(name);
            }
            _ => return Err(refusal("an unknown kind of key", key)),
        }
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), Refusal> {
        let Loading { head, tenants, namespaces } = std::mem::take(&mut self.loading);
        let (secret, next_namespace) = head.ok_or_else(|| refusal("it is missing", HEAD_KEY))?;
        let parts = Parts { secret: DigestKey::from_bytes(secret), next_namespace, tenants, namespaces };
        let catalogue = Catalogue::from_parts(parts).map_err(|e| Refusal(e.to_string()))?;
        let mut served = self.shared.catalogue.write();
        self.shared.views.replace(catalogue.namespaces());
        *served = catalogue;
        Ok(())
    }

    fn apply(&mut self, committed: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal> {
        let command = decode_command(committed.command)?;
        // Held until the views are set: nobody finds one without the other.
        let mut catalogue = self.shared.catalogue.write();
        // It may have come to be so since it was proposed.
        let changes = matches!(catalogue.answer(&command), Ok(None));
        let outcome = catalogue.apply(command);
        if let (true, Ok(outcome)) = (changes, &outcome) {
            self.keep(&catalogue, outcome, writes);
        }
        Ok(Box::new(outcome))
    }
}

impl Machine {
    /// Writes what a command has changed, and shows it.
    fn keep(&self, catalogue: &Catalogue, outcome: &Outcome, writes: &mut Writes<'_>) {
        match outcome {
            Outcome::Tenant(id) => {
                if let Some(name) = catalogue.tenant_name(*id) {
                    writes.put(&tenant_key(*id), &versioned(VALUE_VERSION, name.as_bytes()));
                }
            }
            Outcome::Registered(registered) => {
                writes.put(HEAD_KEY, &head(catalogue));
                self.keep_namespace(catalogue, registered.handle, writes);
            }
            Outcome::Advanced(handle) => self.keep_namespace(catalogue, *handle, writes),
        }
    }

    fn keep_namespace(&self, catalogue: &Catalogue, handle: Handle, writes: &mut Writes<'_>) {
        if let Some(namespace) = catalogue.namespace(handle.namespace) {
            writes.put(&namespace_key(namespace.id), &to_json(VALUE_VERSION, namespace));
            self.shared.views.set(namespace.clone());
        }
    }
}

/// A catalogue as keys and values: what the group begins with, and what its writes add up to.
pub fn first_state(catalogue: &Catalogue) -> FirstState {
    let Parts { tenants, namespaces, .. } = catalogue.parts();
    let tenants = (0u32..).zip(tenants);
    std::iter::once((HEAD_KEY.to_vec(), head(catalogue)))
        .chain(namespaces.iter().map(|n| (namespace_key(n.id), to_json(VALUE_VERSION, n))))
        .chain(tenants.map(|(id, name)| (tenant_key(TenantId(id)), versioned(VALUE_VERSION, name.as_bytes()))))
        .collect()
}

/// A command as it stands in the log.
pub fn encode_command(command: &Command) -> Vec<u8> {
    to_json(COMMAND_VERSION, command)
}

fn decode_command(bytes: &[u8]) -> Result<Command, Refusal> {
    let json = unversioned(bytes, COMMAND_VERSION).ok_or_else(|| Refusal("a command of another version".into()))?;
    from_json(json).map_err(Refusal)
}

fn head(catalogue: &Catalogue) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEAD_BYTES);
    value.extend_from_slice(&catalogue.digest_key().to_bytes());
    value.extend_from_slice(&catalogue.next_namespace().to_le_bytes());
    versioned(VALUE_VERSION, &value)
}

fn namespace_key(id: NamespaceId) -> Vec<u8> {
    tagged(NAMESPACE_TAG, id.0)
}

fn tenant_key(id: TenantId) -> Vec<u8> {
    tagged(TENANT_TAG, id.0)
}

fn tagged(tag: u8, id: u32) -> Vec<u8> {
    let mut key = vec![tag];
    key.extend_from_slice(&id.to_be_bytes());
    key
}

fn versioned(version: u8, value: &[u8]) -> Vec<u8> {
    let mut whole = Vec::with_capacity(1 + value.len());
    whole.push(version);
    whole.extend_from_slice(value);
    whole
}

fn unversioned(value: &[u8], version: u8) -> Option<&[u8]> {
    value.strip_prefix(&[version])
}

fn to_json(version: u8, value: &impl Serialize) -> Vec<u8> {
    let mut whole = vec![version];
    serde_json::to_writer(&mut whole, value).expect("numbers, strings and lists always become JSON");
    whole
}

fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    serde_json::from_slice(json).map_err(|e| e.to_string())
}

fn refusal(why: &str, key: &[u8]) -> Refusal {
    Refusal(format!("the catalogue cannot be read at the key {}: {why}", key.escape_ascii()))
}
