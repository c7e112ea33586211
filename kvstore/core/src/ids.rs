//! Names and numbers that must not be swapped, each with a type of its own.

use std::fmt;
use std::hash::Hasher as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher24};

use crate::error::{Error, ErrorKind, Result};

/// Longest key an engine may use, in bytes.
pub const KEY_BYTES_MAX: usize = 128;
/// Longest request id, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 64;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number!(
    /// A tenant: the isolation domain of memory, quota and authentication. 0 is the `default` tenant.
    TenantId(u32)
);
number!(
    /// A registered (tenant, format, name). Never reused.
    NamespaceId(u32)
);
number!(
    /// How many times the weights behind a namespace have changed. Starts at 1; state of the namespace, not of its
    /// format.
    Revision(u32)
);
number!(
    /// Whose key material a block hangs on: the tenant, or one private session. Nothing is shared across domains.
    KeyDomain(u64)
);
number!(
    /// Index of a group in its format.
    GroupId(u16)
);
number!(
    /// A shard of a group: which part of the heads or layers (a tensor-parallel rank, usually).
    ShardId(u16)
);
number!(
    /// A random number drawn at commit that travels with every copy of that put. Never 0.
    Version(u64)
);
number!(
    /// A lease handed out by this server; random enough not to be guessed.
    LeaseId(u64)
);

/// What a client names when it reads or writes: a namespace at one revision of its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Handle {
    /// The namespace.
    pub namespace: NamespaceId,
    /// The revision the client computes with; not the newest one: misses, and its puts are refused.
    pub revision: Revision,
}

/// An engine's key: 1 to [`KEY_BYTES_MAX`] opaque bytes. Never interpreted.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Box<[u8]>);

impl Key {
    /// The only way in. Refuses an empty key and one over [`KEY_BYTES_MAX`].
    pub fn new(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() || bytes.len() > KEY_BYTES_MAX {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "a key has 1 to 128 bytes").with("key_bytes", bytes.len())
            );
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes as the engine gave them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

/// 128-bit keyed hash of (key domain, namespace, revision, key): what the index, placement and the policy work on.
/// The full key is stored with the data and compared before a byte is served.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest([u8; 16]);

impl Digest {
    /// The 16 bytes, as they stand in files.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Rejects anything that is not exactly 16 bytes.
    pub fn from_slice(bytes: &[u8]) -> Result<Self> {
        bytes.try_into().map(Self).map_err(|_| {
            Error::new(ErrorKind::InvalidArgument, "a digest has 16 bytes").with("digest_bytes", bytes.len())
        })
    }

    /// First 8 bytes, little-endian: uniformly distributed, good as a table hash.
    pub fn as_table_hash(&self) -> u64 {
        let mut b = [0; 8];
        b.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(b)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The secret of one store (later: of one cluster) that keys its digests, so that no tenant can aim a key at another's
/// digest. Drawn once, kept in the catalogue.
#[derive(Clone, Copy)]
pub struct DigestKey([u8; 16]);

impl DigestKey {
    /// From 16 random bytes.
    pub fn from_bytes(secret: [u8; 16]) -> Self {
        Self(secret)
    }

    /// The secret, to be kept with the catalogue and for nothing else.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// SipHash-2-4 with 128 bits out (Aumasson and Bernstein) over domain, namespace, revision and key.
    pub fn digest(&self, domain: KeyDomain, handle: Handle, key: &[u8]) -> Digest {
        let mut prefix = [0u8; 16];
        prefix[..8].copy_from_slice(&domain.0.to_le_bytes());
        prefix[8..12].copy_from_slice(&handle.namespace.0.to_le_bytes());
        prefix[12..].copy_from_slice(&handle.revision.0.to_le_bytes());
        let mut h = SipHasher24::new_with_key(&self.0);
        h.write(&prefix);
        h.write(key);
        Digest(h.finish128().as_bytes())
    }
}

impl fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DigestKey(secret)")
    }
}

/// One block: one part of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId {
    /// The position.
    pub digest: Digest,
    /// Which group of the format.
    pub group: GroupId,
    /// Which shard of the group.
    pub shard: ShardId,
}

/// A 16-byte id a client makes for itself and sends in every hello.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub [u8; 16]);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

/// A client's name for one request: 0 to [`REQUEST_ID_BYTES_MAX`] opaque bytes; empty where the caller has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(Box<[u8]>);

impl RequestId {
    /// Refuses ids over [`REQUEST_ID_BYTES_MAX`].
    pub fn new(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > REQUEST_ID_BYTES_MAX {
            return Err(
                Error::new(ErrorKind::InvalidArgument, "a request id has at most 64 bytes").with("bytes", bytes.len())
            );
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes as the client gave them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Milliseconds on the policy's clock: monotonic since some start, or taken from the requests (`--policy-clock=request`).
/// Never compared between two hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// How long since `earlier`; zero if that is not in the past.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// This much later.
    pub fn after(self, d: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h(namespace: u32, revision: u32) -> Handle {
        Handle { namespace: NamespaceId(namespace), revision: Revision(revision) }
    }

    #[test]
    fn a_key_of_0_or_129_bytes_is_refused() {
        assert!(Key::new(&[]).is_err());
        assert!(Key::new(&[7; 129]).is_err());
        assert_eq!(Key::new(&[7; 128]).unwrap().as_bytes().len(), 128);
    }

    /// Every field that separates two blocks changes the digest; the same fields give the same digest.
    #[test]
    fn the_digest_depends_on_every_field() {
        let k = DigestKey::from_bytes([1; 16]);
        let base = k.digest(KeyDomain(1), h(1, 1), b"key");
        assert_eq!(base, k.digest(KeyDomain(1), h(1, 1), b"key"));
        for other in [
            k.digest(KeyDomain(2), h(1, 1), b"key"),
            k.digest(KeyDomain(1), h(2, 1), b"key"),
            k.digest(KeyDomain(1), h(1, 2), b"key"),
            k.digest(KeyDomain(1), h(1, 1), b"kez"),
            DigestKey::from_bytes([2; 16]).digest(KeyDomain(1), h(1, 1), b"key"),
        ] {
            assert_ne!(base, other);
        }
    }
}
