//! Namespaces as the hot paths see them: shared, immutable views of the catalogue.

use std::collections::HashMap;
use std::sync::Arc;

use kvkeep_core::catalogue::Namespace;
use kvkeep_core::{Digest, DigestKey, Error, ErrorKind, Handle, KeyDomain, NamespaceId, Result, TenantId};
use parking_lot::RwLock;

use super::sessions::SYSTEM_PREFIX;

/// The namespaces by id; a view is replaced when its namespace changes.
#[derive(Default)]
pub struct Views(RwLock<HashMap<NamespaceId, Arc<Namespace>>>);

impl Views {
    /// Puts a view in the place of the last.
    pub fn set(&self, namespace: Namespace) {
        self.0.write().insert(namespace.id, Arc::new(namespace));
    }

    /// Puts these in the place of all.
    pub fn replace<'a>(&self, namespaces: impl Iterator<Item = &'a Namespace>) {
        let all = namespaces.map(|n| (n.id, Arc::new(n.clone()))).collect();
        *self.0.write() = all;
    }

    /// The namespace if it is this tenant's; its revision is not looked at.
    pub fn get(&self, tenant: TenantId, id: NamespaceId) -> Result<Arc<Namespace>> {
        // Another tenant's namespace and none at all are one answer.
        self.any(id).filter(|n| n.tenant == tenant).ok_or_else(|| unknown(id))
    }

    /// The same for a handle that a client gave: the store's own namespaces are none of a client's.
    pub fn of_client(&self, tenant: TenantId, id: NamespaceId) -> Result<Arc<Namespace>> {
        self.get(tenant, id).and_then(|n| if n.name.starts_with(SYSTEM_PREFIX) { Err(unknown(id)) } else { Ok(n) })
    }

    /// The namespace, whoever's it is.
    pub fn any(&self, id: NamespaceId) -> Option<Arc<Namespace>> {
        self.0.read().get(&id).cloned()
    }

    /// Whether the handle is at its namespace's current revision.
    pub fn is_current(&self, handle: Handle) -> bool {
        self.0.read().get(&handle.namespace).is_some_and(|n| n.revision == handle.revision)
    }

    /// All of them, by id.
    pub fn all(&self) -> Vec<Arc<Namespace>> {
        let mut all: Vec<_> = self.0.read().values().cloned().collect();
        all.sort_by_key(|n| n.id);
        all
    }
}

fn unknown(id: NamespaceId) -> Error {
    Error::new(ErrorKind::UnknownNamespace, "no such namespace: register it first").with("namespace_id", id)
}

/// Key domain of everything that is not a private session: the tenant.
pub fn domain_of(tenant: TenantId) -> KeyDomain {
    KeyDomain(u64::from(tenant.0))
}

/// Digests of a batch of keys.
pub fn digests<'a>(
    secret: DigestKey,
    tenant: TenantId,
    handle: Handle,
    keys: impl IntoIterator<Item = &'a [u8]>,
) -> Vec<Digest> {
    let domain = domain_of(tenant);
    keys.into_iter().map(|key| secret.digest(domain, handle, key)).collect()
}
