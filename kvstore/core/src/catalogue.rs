//! What a store must remember beside blocks: its digest secret, its tenants, its namespaces and their revisions.
//!
//! Deterministic: the same commands in the same order make the same catalogue, on one node today and on every voter of raft
//! group 0 later. It reads no clock and draws no random number; the secret is given when it is made. Who keeps it, and how a
//! command comes to all, is not its business: it is taken apart ([`Catalogue::parts`]) and put together again.

use std::collections::{BTreeMap, BTreeSet};

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

/// Version of the layout that [`Parts::from_old_file`] reads; another one is refused.
const OLD_FILE_VERSION: u32 = 1;

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
#[serde(rename_all = "snake_case", deny_unknown_fields)]
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

/// All of a catalogue, as it is kept. [`Catalogue::from_parts`] checks it as a whole.
#[derive(Clone, Debug)]
pub struct Parts {
    /// What keys the store's digests.
    pub secret: DigestKey,
    /// The number that the next namespace is given.
    pub next_namespace: u32,
    /// Names of tenants; index = tenant id.
    pub tenants: Vec<String>,
    /// In any order.
    pub namespaces: Vec<Namespace>,
}

impl Parts {
    /// From the file in which a catalogue was kept before it came into a raft group: JSON, `version` first. Read once more,
    /// when such a store moves over.
    pub fn from_old_file(json: &[u8]) -> Result<Self> {
        let s: OldFile = serde_json::from_slice(json).map_err(|e| corrupt("it cannot be read").with("cause", e))?;
        if s.version != OLD_FILE_VERSION {
            return Err(corrupt("it is of another version").with("version", s.version));
        }
        Ok(Self {
            secret: DigestKey::from_bytes(s.secret),
            next_namespace: s.next_namespace,
            tenants: s.tenants,
            namespaces: s.namespaces,
        })
    }
}

#[derive(Deserialize)]
struct OldFile {
    version: u32,
    secret: [u8; 16],
    tenants: Vec<String>,
    next_namespace: u32,
    namespaces: Vec<Namespace>,
}

fn corrupt(why: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, "the catalogue is not what was written").with("why", why)
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

    /// Back from what [`Catalogue::parts`] gave. Refuses parts that contradict each other.
    pub fn from_parts(parts: Parts) -> Result<Self> {
        let Parts { secret, next_namespace, tenants, namespaces } = parts;
        if tenants.first().map(String::as_str) != Some(DEFAULT_TENANT) {
            return Err(corrupt("the default tenant is missing"));
        }
        if tenants.iter().collect::<BTreeSet<_>>().len() != tenants.len() {
            return Err(corrupt("two tenants have one name"));
        }
        let mut catalogue = Self { tenants, next_namespace, ..Self::new(secret) };
        for n in namespaces {
            let fits = n.id.0 < catalogue.next_namespace
                && catalogue.tenant_name(n.tenant).is_some()
                && n.format.fingerprint() == n.fingerprint
                && n.format.validate().is_ok();
            let place = (n.tenant, n.name.clone());
            if !fits
                || catalogue.by_name.insert(place, n.id).is_some()
                || catalogue.namespaces.insert(n.id, n).is_some()
            {
                return Err(corrupt("a namespace contradicts the rest"));
            }
        }
        Ok(catalogue)
    }

    /// All of it, to be kept.
    pub fn parts(&self) -> Parts {
        Parts {
            secret: self.secret,
            next_namespace: self.next_namespace,
            tenants: self.tenants.clone(),
            namespaces: self.namespaces.values().cloned().collect(),
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

    /// The number that the next namespace is given.
    pub fn next_namespace(&self) -> u32 {
        self.next_namespace
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

    /// What a command comes to where it changes nothing: somebody asked for what already is. `None` where it would change
    /// something; an error where the rules refuse it.
    pub fn answer(&self, command: &Command) -> Result<Option<Outcome>> {
        match command {
            Command::EnsureTenant { name } => self.find_tenant(name).map(|found| found.map(Outcome::Tenant)),
            Command::RegisterNamespace { tenant, name, format, revision_digest, .. } => {
                self.find_namespace(*tenant, name, format, revision_digest).map(|found| found.map(Outcome::Registered))
            }
            Command::AdvanceRevision { tenant, from, revision_digest } => {
                self.find_revision(*tenant, *from, revision_digest).map(|found| found.map(Outcome::Advanced))
            }
        }
    }

    /// Applies one command. An error leaves the catalogue as it was, and is as deterministic as an outcome.
    pub fn apply(&mut self, command: Command) -> Result<Outcome> {
        if let Some(known) = self.answer(&command)? {
            return Ok(known);
        }
        match command {
            Command::EnsureTenant { name } => {
                self.tenants.push(name);
                Ok(Outcome::Tenant(TenantId(self.tenants.len() as u32 - 1)))
            }
            Command::RegisterNamespace { tenant, name, format, revision_digest, require_full } => {
                self.register(tenant, name, format, revision_digest, require_full).map(Outcome::Registered)
            }
            Command::AdvanceRevision { from, revision_digest, .. } => {
                self.advance(from, revision_digest).map(Outcome::Advanced)
            }
        }
    }

    fn find_tenant(&self, name: &str) -> Result<Option<TenantId>> {
        check_text("tenant", name)?;
        let found = self.tenant(name);
        if found.is_none() && self.tenants.len() >= TENANTS_MAX {
            return Err(Error::new(ErrorKind::TooLarge, "the store has as many tenants as it may have")
                .with("tenants_max", TENANTS_MAX));
        }
        Ok(found)
    }

    fn find_namespace(
        &self,
        tenant: TenantId,
        name: &str,
        format: &Format,
        revision_digest: &str,
    ) -> Result<Option<Registered>> {
        if self.tenant_name(tenant).is_none() {
            return Err(Error::new(ErrorKind::InvalidArgument, "no such tenant").with("tenant", tenant));
        }
        check_text("name", name)?;
        check_text("revision_digest", revision_digest)?;
        format.validate()?;
        let place = (tenant, name.to_owned());
        if let Some(known) = self.by_name.get(&place).and_then(|id| self.namespaces.get(id)) {
            let differing = known.format.differences(format);
            if !differing.is_empty() {
                return Err(Error::new(ErrorKind::FormatMismatch, "this name is taken by a different format")
                    .with("namespace", &known.name)
                    .with("fields", differing.join(",")));
            }
            return Ok(Some(Registered {
                handle: known.handle(),
                created: false,
                revision_matches: known.revision_digest == revision_digest,
            }));
        }
        let owned = self.by_name.range((tenant, String::new())..).take_while(|((of, _), _)| *of == tenant).count();
        if owned >= NAMESPACES_PER_TENANT_MAX {
            return Err(Error::new(ErrorKind::TooLarge, "the tenant has as many namespaces as it may have")
                .with("namespaces_per_tenant_max", NAMESPACES_PER_TENANT_MAX));
        }
        Ok(None)
    }

    fn register(
        &mut self,
        tenant: TenantId,
        name: String,
        format: Format,
        revision_digest: String,
        require_full: bool,
    ) -> Result<Registered> {
        let id = NamespaceId(self.next_namespace);
        self.next_namespace = self
            .next_namespace
            .checked_add(1)
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "the store has given out all namespace numbers"))?;
        let namespace = Namespace {
            id,
            tenant,
            name: name.clone(),
            fingerprint: format.fingerprint(),
            format,
            revision: Revision(1),
            revision_digest,
            require_full,
        };
        let handle = namespace.handle();
        self.by_name.insert((tenant, name), id);
        self.namespaces.insert(id, namespace);
        Ok(Registered { handle, created: true, revision_matches: true })
    }

    fn find_revision(&self, tenant: TenantId, from: Handle, revision_digest: &str) -> Result<Option<Handle>> {
        check_text("revision_digest", revision_digest)?;
        let namespace = self.check(tenant, from)?;
        // Whoever asks for what already is gets it: engines that move over one by one all send the same advance.
        if namespace.revision_digest == revision_digest && from.revision <= namespace.revision {
            return Ok(Some(namespace.handle()));
        }
        if from.revision != namespace.revision {
            return Err(Error::new(ErrorKind::StaleRevision, "another caller advanced the revision first")
                .with("from", from.revision)
                .with("current", namespace.revision)
                .with("current_digest", &namespace.revision_digest));
        }
        Ok(None)
    }

    fn advance(&mut self, from: Handle, revision_digest: String) -> Result<Handle> {
        let namespace = self.namespaces.get_mut(&from.namespace).expect("found by `find_revision`");
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
            prefill_doubles_at_tokens: 0,
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
    fn its_parts_make_it_again_and_numbers_go_on() {
        let mut c = catalogue();
        c.apply(Command::EnsureTenant { name: "b".into() }).unwrap();
        let one = register(&mut c, 0, "n", format(), "w1").unwrap().handle;
        advance(&mut c, one, "w2").unwrap();
        register(&mut c, 1, "n", format(), "w").unwrap();
        let mut back = Catalogue::from_parts(c.parts()).unwrap();
        assert_eq!((back.parts().tenants, back.parts().namespaces), (c.parts().tenants, c.parts().namespaces));
        assert_eq!(back.digest_key().to_bytes(), [7; 16]);
        let next = register(&mut back, 1, "m", format(), "w").unwrap().handle;
        assert_eq!(next.namespace, NamespaceId(one.namespace.0 + 2));
    }

    /// What is answered without a change is what applying would answer, and applying it changes nothing.
    #[test]
    fn what_already_is_has_an_answer_without_a_change() {
        let mut c = catalogue();
        let command = |name: &str, digest: &str| Command::RegisterNamespace {
            tenant: TenantId(0),
            name: name.into(),
            format: format(),
            revision_digest: digest.into(),
            require_full: false,
        };
        let advance =
            |from, digest: &str| Command::AdvanceRevision { tenant: TenantId(0), from, revision_digest: digest.into() };
        assert_eq!(c.answer(&command("n", "w1")).unwrap(), None);
        let one = register(&mut c, 0, "n", format(), "w1").unwrap().handle;
        assert_eq!(c.answer(&advance(one, "w2")).unwrap(), None);
        assert_eq!(c.answer(&Command::EnsureTenant { name: "b".into() }).unwrap(), None);
        let known = [
            command("n", "w1"),
            command("n", "other weights"),
            advance(one, "w1"),
            Command::EnsureTenant { name: DEFAULT_TENANT.into() },
        ];
        for command in known {
            let before = format!("{:?}", c.parts());
            let answer = c.answer(&command).unwrap().unwrap();
            assert_eq!(c.apply(command).unwrap(), answer);
            assert_eq!(format!("{:?}", c.parts()), before);
        }
        let refused = Command::EnsureTenant { name: String::new() };
        assert_eq!(c.answer(&refused), c.apply(refused).map(Some));
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
    fn parts_that_contradict_each_other_are_refused() {
        let mut c = catalogue();
        c.apply(Command::EnsureTenant { name: "b".into() }).unwrap();
        register(&mut c, 0, "n", format(), "w1").unwrap();
        assert!(Catalogue::from_parts(c.parts()).is_ok());
        let bad: [fn(&mut Parts); 6] = [
            |p| p.tenants.clear(),
            |p| p.tenants[1] = DEFAULT_TENANT.into(),
            |p| p.next_namespace = 1,
            |p| p.namespaces[0].format.dtype = "fp8".into(),
            |p| p.namespaces[0].tenant = TenantId(2),
            |p| {
                let twin = Namespace { id: NamespaceId(p.namespaces[0].id.0 - 1), ..p.namespaces[0].clone() };
                p.namespaces.push(twin);
            },
        ];
        for (n, spoil) in bad.into_iter().enumerate() {
            let mut parts = c.parts();
            spoil(&mut parts);
            assert_eq!(Catalogue::from_parts(parts).unwrap_err().kind(), ErrorKind::Corrupt, "{n}");
        }
    }

    /// As an earlier version wrote it, byte by byte.
    #[test]
    fn the_old_file_is_read_and_its_damage_refused() {
        let mut c = catalogue();
        let one = register(&mut c, 0, "n", format(), "w1").unwrap().handle;
        let namespace = serde_json::to_string(c.namespace(one.namespace).unwrap()).unwrap();
        let good = format!(
            "{{\"version\":1,\"secret\":{:?},\"tenants\":[\"default\"],\"next_namespace\":{},\"namespaces\":[{namespace}]}}",
            [7; 16],
            one.namespace.0 + 1
        );
        let back = Catalogue::from_parts(Parts::from_old_file(good.as_bytes()).unwrap()).unwrap();
        assert_eq!(back.parts().namespaces, c.parts().namespaces);
        assert_eq!((back.next_namespace(), back.digest_key().to_bytes()), (c.next_namespace(), [7; 16]));
        let newer = good.replacen("\"version\":1", "\"version\":2", 1);
        for bad in [newer.as_bytes(), &good.as_bytes()[..good.len() - 1], b""] {
            assert_eq!(Parts::from_old_file(bad).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
