//! What a store must remember beside blocks: its digest secret, its tenants, its namespaces and their revisions.
//!
//! A deterministic state machine: the same commands in the same order make the same catalogue, on one node today and on
//! every voter of group 0 later. It reads no clock and draws no random number; the secret is given when it is made.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Fingerprint, Format, TEXT_BYTES_MAX};
use crate::ids::{DigestKey, Handle, KeyDomain, NamespaceId, Revision, TenantId};

/// Most tenants of one store.
pub const TENANTS_MAX: usize = 1024;
/// Most namespaces of one tenant.
pub const NAMESPACES_PER_TENANT_MAX: usize = 1024;
/// Name of tenant 0, which every store has.
pub const DEFAULT_TENANT: &str = "default";

/// Version of the snapshot's layout; another one is refused.
const SNAPSHOT_VERSION: u32 = 1;

/// A deterministic state machine, as a replicated log drives it.
pub trait StateMachine: Sized {
    /// What changes it.
    type Command;
    /// What a command answers.
    type Outcome;

    /// Applies one command. An error leaves the state as it was, and is as deterministic as an outcome.
    fn apply(&mut self, command: Self::Command) -> Result<Self::Outcome>;

    /// The whole state, as [`StateMachine::restore`] reads it.
    fn snapshot(&self) -> Vec<u8>;

    /// Back from a snapshot. Refuses one that is damaged or of another version.
    fn restore(snapshot: &[u8]) -> Result<Self>;
}

/// A registered (tenant, format, name) and the revision of its weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its number, never reused.
    pub id: NamespaceId,
    /// Whose it is.
    pub tenant: TenantId,
    /// Unique within its tenant.
    pub name: String,
    /// How its KV looks.
    pub format: Format,
    /// Of `format`.
    pub fingerprint: Fingerprint,
    /// The current revision.
    pub revision: Revision,
    /// Digest of the weights and adapters of the current revision, as the engine names them.
    pub revision_digest: String,
    /// Refuse an acknowledgement that stands on fewer copies than its class asks.
    pub require_full: bool,
}

impl Namespace {
    /// What clients of the current weights name.
    pub fn handle(&self) -> Handle {
        Handle { namespace: self.id, revision: self.revision }
    }
}

/// What changes a catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Makes the tenant unless it is there.
    EnsureTenant {
        /// 1 to 256 bytes.
        name: String,
    },
    /// Makes the namespace unless it is there with the same format.
    RegisterNamespace {
        /// Whose.
        tenant: TenantId,
        /// 1 to 256 bytes.
        name: String,
        /// How its KV looks.
        format: Format,
        /// Of the caller's weights, 1 to 256 bytes.
        revision_digest: String,
        /// Used when the namespace is new.
        require_full: bool,
    },
    /// The weights changed: handles of older revisions get misses from now on.
    AdvanceRevision {
        /// The caller's.
        tenant: TenantId,
        /// What the caller believes to be current (compare-and-set).
        from: Handle,
        /// Of the new weights, 1 to 256 bytes.
        revision_digest: String,
    },
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// To [`Command::EnsureTenant`].
    Tenant(TenantId),
    /// To [`Command::RegisterNamespace`].
    Registered(Registered),
    /// To [`Command::AdvanceRevision`]: the current handle.
    Advanced(Handle),
}

/// Answer to a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// At the namespace's current revision.
    pub handle: Handle,
    /// It is new.
    pub created: bool,
    /// The caller computes with the current revision's weights. If not: advance, or use another namespace.
    pub revision_matches: bool,
}

/// Tenants, namespaces and the digest secret of one store.
#[derive(Clone, Debug)]
pub struct Catalogue {
    secret: DigestKey,
    /// Index = tenant id.
    tenants: Vec<String>,
    namespaces: BTreeMap<NamespaceId, Namespace>,
    by_name: BTreeMap<(TenantId, String), NamespaceId>,
    next_namespace: u32,
}

impl Catalogue {
    /// An empty catalogue with the `default` tenant. `secret` is drawn once per store.
    ///
    /// Where namespace numbers begin follows from the secret: a client that keeps its handle while its server is exchanged for
    /// another, or starts with an empty data folder, names a namespace that is not there, rather than somebody else's.
    pub fn new(secret: DigestKey) -> Self {
        Self {
            secret,
            tenants: vec![DEFAULT_TENANT.to_string()],
            namespaces: BTreeMap::new(),
            by_name: BTreeMap::new(),
            next_namespace: first_namespace(secret),
        }
    }

    /// What keys this store's digests.
    pub fn digest_key(&self) -> DigestKey {
        self.secret
    }

    /// The tenant's id.
    pub fn tenant(&self, name: &str) -> Option<TenantId> {
        self.tenants.iter().position(|t| t == name).map(|i| TenantId(i as u32))
    }

    /// The tenant's name.
    pub fn tenant_name(&self, id: TenantId) -> Option<&str> {
        self.tenants.get(id.0 as usize).map(String::as_str)
    }

    /// A namespace by number, whoever's it is. Requests go through [`Catalogue::check`].
    pub fn namespace(&self, id: NamespaceId) -> Option<&Namespace> {
        self.namespaces.get(&id)
    }

    /// All namespaces, by number.
    pub fn namespaces(&self) -> impl ExactSizeIterator<Item = &Namespace> {
        self.namespaces.values()
    }

    /// The namespace a request of `tenant` names. Another tenant's is as unknown as one that was never registered. The
    /// revision is not judged: [`Catalogue::is_current`] does that.
    pub fn check(&self, tenant: TenantId, handle: Handle) -> Result<&Namespace> {
        self.namespaces.get(&handle.namespace).filter(|n| n.tenant == tenant).ok_or_else(|| {
            Error::new(ErrorKind::UnknownNamespace, "no such namespace; register it first")
                .with("namespace", handle.namespace)
        })
    }

    /// Whether `handle` is its namespace's current revision.
    pub fn is_current(&self, handle: Handle) -> bool {
        self.namespaces.get(&handle.namespace).is_some_and(|n| n.revision == handle.revision)
    }

    fn ensure_tenant(&mut self, name: String) -> Result<TenantId> {
        check_text("tenant", &name)?;
        if let Some(id) = self.tenant(&name) {
            return Ok(id);
        }
        if self.tenants.len() >= TENANTS_MAX {
            return Err(Error::new(ErrorKind::TooLarge, "the store has as many tenants as it may have")
                .with("tenants_max", TENANTS_MAX));
        }
        self.tenants.push(name);
        Ok(TenantId(self.tenants.len() as u32 - 1))
    }

    fn register(
        &mut self,
        tenant: TenantId,
        name: String,
        format: Format,
        revision_digest: String,
        require_full: bool,
    ) -> Result<Registered> {
        if self.tenant_name(tenant).is_none() {
            return Err(Error::new(ErrorKind::InvalidArgument, "no such tenant").with("tenant", tenant));
        }
        check_text("name", &name)?;
        check_text("revision_digest", &revision_digest)?;
        format.validate()?;
        let place = (tenant, name);
        if let Some(known) = self.by_name.get(&place).and_then(|id| self.namespaces.get(id)) {
            let differing = known.format.differences(&format);
            if !differing.is_empty() {
                return Err(Error::new(ErrorKind::FormatMismatch, "this name is taken by a different format")
                    .with("namespace", &known.name)
                    .with("fields", differing.join(",")));
            }
            return Ok(Registered {
                handle: known.handle(),
                created: false,
                revision_matches: known.revision_digest == revision_digest,
            });
        }
        let owned = self.namespaces.values().filter(|n| n.tenant == tenant).count();
        if owned >= NAMESPACES_PER_TENANT_MAX {
            return Err(Error::new(ErrorKind::TooLarge, "the tenant has as many namespaces as it may have")
                .with("namespaces_per_tenant_max", NAMESPACES_PER_TENANT_MAX));
        }
        let id = NamespaceId(self.next_namespace);
        self.next_namespace = self
            .next_namespace
            .checked_add(1)
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "the store has given out all namespace numbers"))?;
        let namespace = Namespace {
            id,
            tenant,
            name: place.1.clone(),
            fingerprint: format.fingerprint(),
            format,
            revision: Revision(1),
            revision_digest,
            require_full,
        };
        let handle = namespace.handle();
        self.by_name.insert(place, id);
        self.namespaces.insert(id, namespace);
        Ok(Registered { handle, created: true, revision_matches: true })
    }

    fn advance(&mut self, tenant: TenantId, from: Handle, revision_digest: String) -> Result<Handle> {
        check_text("revision_digest", &revision_digest)?;
        self.check(tenant, from)?;
        let namespace = self.namespaces.get_mut(&from.namespace).expect("checked one line above");
        // Whoever asks for what already is gets it: engines that move over one by one all send the same advance.
        if namespace.revision_digest == revision_digest && from.revision <= namespace.revision {
            return Ok(namespace.handle());
        }
        if from.revision != namespace.revision {
            return Err(Error::new(ErrorKind::StaleRevision, "another caller advanced the revision first")
                .with("from", from.revision)
                .with("current", namespace.revision)
                .with("current_digest", &namespace.revision_digest));
        }
        let next = namespace.revision.0.checked_add(1).ok_or_else(|| {
            Error::new(ErrorKind::TooLarge, "the namespace has had all its revisions; register another name")
        })?;
        namespace.revision = Revision(next);
        namespace.revision_digest = revision_digest;
        Ok(namespace.handle())
    }
}

/// 1 to 2^31: 0 means "all of the tenant's" to watchers, and as many numbers again are left to go on with.
fn first_namespace(secret: DigestKey) -> u32 {
    let nobody = Handle { namespace: NamespaceId(0), revision: Revision(0) };
    let digest = secret.digest(KeyDomain(0), nobody, b"first namespace");
    let [a, b, c, d, ..] = *digest.as_bytes();
    (u32::from_le_bytes([a, b, c, d]) >> 1) + 1
}

fn check_text(field: &'static str, text: &str) -> Result<()> {
    if text.is_empty() || text.len() > TEXT_BYTES_MAX {
        return Err(Error::new(ErrorKind::InvalidArgument, "a name or revision digest has 1 to 256 bytes")
            .with("field", field)
            .with("bytes", text.len()));
    }
    Ok(())
}

impl StateMachine for Catalogue {
    type Command = Command;
    type Outcome = Outcome;

    fn apply(&mut self, command: Command) -> Result<Outcome> {
        match command {
            Command::EnsureTenant { name } => self.ensure_tenant(name).map(Outcome::Tenant),
            Command::RegisterNamespace { tenant, name, format, revision_digest, require_full } => {
                self.register(tenant, name, format, revision_digest, require_full).map(Outcome::Registered)
            }
            Command::AdvanceRevision { tenant, from, revision_digest } => {
                self.advance(tenant, from, revision_digest).map(Outcome::Advanced)
            }
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let snapshot = Snapshot {
            version: SNAPSHOT_VERSION,
            secret: self.secret.to_bytes(),
            tenants: self.tenants.clone(),
            next_namespace: self.next_namespace,
            namespaces: self.namespaces.values().cloned().collect(),
        };
        serde_json::to_vec(&snapshot).expect("numbers, strings and lists always become JSON")
    }

    fn restore(snapshot: &[u8]) -> Result<Self> {
        let corrupt = |what: &'static str| Error::new(ErrorKind::Corrupt, what);
        let s: Snapshot = serde_json::from_slice(snapshot)
            .map_err(|e| corrupt("the catalogue's snapshot cannot be read").with("cause", e))?;
        if s.version != SNAPSHOT_VERSION {
            return Err(corrupt("the catalogue's snapshot is of another version").with("version", s.version));
        }
        if s.tenants.first().map(String::as_str) != Some(DEFAULT_TENANT) {
            return Err(corrupt("the catalogue's snapshot lacks the default tenant"));
        }
        let mut catalogue = Catalogue {
            secret: DigestKey::from_bytes(s.secret),
            tenants: s.tenants,
            next_namespace: s.next_namespace,
            ..Catalogue::new(DigestKey::from_bytes(s.secret))
        };
        for n in s.namespaces {
            let fits = n.id.0 < catalogue.next_namespace
                && catalogue.tenant_name(n.tenant).is_some()
                && n.format.fingerprint() == n.fingerprint
                && n.format.validate().is_ok();
            let place = (n.tenant, n.name.clone());
            if !fits
                || catalogue.by_name.insert(place, n.id).is_some()
                || catalogue.namespaces.insert(n.id, n).is_some()
            {
                return Err(corrupt("a namespace of the catalogue's snapshot contradicts the rest"));
            }
        }
        Ok(catalogue)
    }
}

/// The snapshot as it stands in the file: JSON, `version` first.
#[derive(Serialize, Deserialize)]
struct Snapshot {
    version: u32,
    secret: [u8; 16],
    tenants: Vec<String>,
    next_namespace: u32,
    namespaces: Vec<Namespace>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Group, Rule, SizeRule, Topology};

    fn format() -> Format {
        Format {
            model: "m".into(),
            dtype: "bf16".into(),
            layout: "l".into(),
            hash_algorithm: "sha256".into(),
            hash_seed: String::new(),
            tokens_per_key: 16,
            topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
            groups: vec![Group {
                rule: Rule::All,
                tokens_per_block: 16,
                shards: 1,
                replicated: false,
                size: SizeRule::Exact(4096),
            }],
            prefill_us_per_token: 0,
        }
    }

    fn catalogue() -> Catalogue {
        Catalogue::new(DigestKey::from_bytes([7; 16]))
    }

    fn register(c: &mut Catalogue, tenant: u32, name: &str, format: Format, digest: &str) -> Result<Registered> {
        let command = Command::RegisterNamespace {
            tenant: TenantId(tenant),
            name: name.into(),
            format,
            revision_digest: digest.into(),
            require_full: false,
        };
        match c.apply(command)? {
            Outcome::Registered(r) => Ok(r),
            other => panic!("{other:?}"),
        }
    }

    fn advance(c: &mut Catalogue, from: Handle, digest: &str) -> Result<Handle> {
        match c.apply(Command::AdvanceRevision { tenant: TenantId(0), from, revision_digest: digest.into() })? {
            Outcome::Advanced(h) => Ok(h),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_same_declaration_is_the_same_namespace() {
        let mut c = catalogue();
        let first = register(&mut c, 0, "n", format(), "w1").unwrap();
        let second = register(&mut c, 0, "n", format(), "w2").unwrap();
        assert!(first.created && first.revision_matches);
        assert_eq!(second, Registered { created: false, revision_matches: false, ..first });
    }

    #[test]
    fn a_different_format_under_one_name_is_refused_with_the_fields() {
        let mut c = catalogue();
        register(&mut c, 0, "n", format(), "w1").unwrap();
        let other = Format { dtype: "fp8".into(), tokens_per_key: 8, ..format() };
        let e = register(&mut c, 0, "n", other, "w1").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FormatMismatch);
        assert!(e.context().contains(&("fields", "dtype,tokens_per_key".to_string())), "{e}");
    }

    #[test]
    fn another_tenants_namespace_is_as_unknown_as_none() {
        let mut c = catalogue();
        c.apply(Command::EnsureTenant { name: "b".into() }).unwrap();
        let mine = register(&mut c, 0, "n", format(), "w").unwrap().handle;
        let theirs = register(&mut c, 1, "n", format(), "w").unwrap().handle;
        assert_ne!(mine.namespace, theirs.namespace);
        let never = Handle { namespace: NamespaceId(theirs.namespace.0 + 99), ..theirs };
        let (a, b) = (c.check(TenantId(0), theirs).unwrap_err(), c.check(TenantId(0), never).unwrap_err());
        assert_eq!((a.kind(), a.message()), (b.kind(), b.message()));
        assert_eq!(a.kind(), ErrorKind::UnknownNamespace);
        assert_eq!(c.check(TenantId(0), mine).unwrap().id, mine.namespace);
    }

    #[test]
    fn advancing_is_a_compare_and_set_that_may_be_repeated() {
        let mut c = catalogue();
        let one = register(&mut c, 0, "n", format(), "w1").unwrap().handle;
        assert_eq!(advance(&mut c, one, "w1").unwrap(), one, "nothing changed, nothing advances");
        let two = advance(&mut c, one, "w2").unwrap();
        assert_eq!(two.revision, Revision(2));
        assert_eq!(advance(&mut c, one, "w2").unwrap(), two);
        assert_eq!(advance(&mut c, one, "w3").unwrap_err().kind(), ErrorKind::StaleRevision);
        assert!(c.is_current(two) && !c.is_current(one));
        let ahead = Handle { revision: Revision(9), ..two };
        assert_eq!(advance(&mut c, ahead, "w2").unwrap_err().kind(), ErrorKind::StaleRevision);
    }

    #[test]
    fn tenants_and_namespaces_are_bounded() {
        let mut c = catalogue();
        for i in 1..TENANTS_MAX {
            c.apply(Command::EnsureTenant { name: format!("t{i}") }).unwrap();
        }
        let e = c.apply(Command::EnsureTenant { name: "one more".into() }).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TooLarge);
        assert_eq!(c.apply(Command::EnsureTenant { name: "t5".into() }).unwrap(), Outcome::Tenant(TenantId(5)));
        for i in 0..NAMESPACES_PER_TENANT_MAX {
            register(&mut c, 0, &format!("n{i}"), format(), "w").unwrap();
        }
        assert_eq!(register(&mut c, 0, "one more", format(), "w").unwrap_err().kind(), ErrorKind::TooLarge);
        assert!(register(&mut c, 1, "n", format(), "w").is_ok());
    }

    #[test]
    fn a_snapshot_restores_everything_and_numbers_go_on() {
        let mut c = catalogue();
        c.apply(Command::EnsureTenant { name: "b".into() }).unwrap();
        let one = register(&mut c, 0, "n", format(), "w1").unwrap().handle;
        advance(&mut c, one, "w2").unwrap();
        register(&mut c, 1, "n", format(), "w").unwrap();
        let mut back = Catalogue::restore(&c.snapshot()).unwrap();
        assert_eq!(back.snapshot(), c.snapshot());
        assert_eq!(back.digest_key().to_bytes(), [7; 16]);
        let next = register(&mut back, 1, "m", format(), "w").unwrap().handle;
        assert_eq!(next.namespace, NamespaceId(one.namespace.0 + 2));
    }

    #[test]
    fn a_handle_of_one_store_is_unknown_to_another() {
        let stores = (0..64u8).map(|n| {
            let mut c = Catalogue::new(DigestKey::from_bytes([n; 16]));
            let handles = ["a", "b", "c"].map(|name| register(&mut c, 0, name, format(), "w").unwrap().handle);
            (c, handles)
        });
        let stores: Vec<_> = stores.collect();
        for (n, (store, _)) in stores.iter().enumerate() {
            for (other, (_, handles)) in stores.iter().enumerate() {
                for handle in handles {
                    assert_eq!(store.check(TenantId(0), *handle).is_ok(), n == other, "{n} {other} {handle:?}");
                }
            }
        }
    }

    #[test]
    fn a_damaged_snapshot_is_refused() {
        let mut c = catalogue();
        register(&mut c, 0, "n", format(), "w1").unwrap();
        let good = String::from_utf8(c.snapshot()).unwrap();
        let next = format!("\"next_namespace\":{}", c.next_namespace);
        for (from, to) in [
            ("\"version\":1", "\"version\":2"),
            ("bf16", "fp8"),
            ("\"default\"", "\"other\""),
            (next.as_str(), "\"next_namespace\":1"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good);
            assert_eq!(Catalogue::restore(bad.as_bytes()).unwrap_err().kind(), ErrorKind::Corrupt, "{from}");
        }
        assert!(Catalogue::restore(&good.as_bytes()[..good.len() - 1]).is_err());
    }
}
