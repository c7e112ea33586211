//! What is known of one stored block beside its bytes: the same facts in an arena's slot table, in an NVMe header and in
//! the index, so that a copy can be recognised wherever it is found.

use std::fmt;
use std::num::NonZeroU64;

use crate::checksum::ChunkSums;
use crate::ids::{BlockId, Digest, Handle, Key, TenantId, Version};
use crate::words::{Class, Fidelity, Keeper};

/// Everything but the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMeta {
    /// Which block this is.
    pub id: BlockId,
    /// Its isolation domain.
    pub tenant: TenantId,
    /// Its namespace and revision.
    pub handle: Handle,
    /// The engine's key, whole: compared before a byte is served.
    pub key: Key,
    /// Of the put that made these bytes.
    pub version: Version,
    /// At write; the index holds the one that counts.
    pub class: Class,
    /// On whose word it stays, if it is durable; as with the class, the index holds what counts.
    pub keeper: Keeper,
    /// Whether the bytes are those of the put.
    pub fidelity: Fidelity,
    /// Index of its position in its chain, 0-based.
    pub position: u32,
    /// The position before it in the chain; `None` at the start of a chain and where no order was given.
    pub parent: Option<Digest>,
    /// Raw payload, bytes.
    pub len: u32,
    /// Of the raw payload.
    pub sums: ChunkSums,
}

macro_rules! place {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(NonZeroU64);

        impl $name {
            /// From the packed form; `None` for 0.
            pub const fn from_raw(raw: u64) -> Option<Self> {
                match NonZeroU64::new(raw) { Some(n) => Some(Self(n)), None => None }
            }

            /// The packed form, never 0. Only the tier that made it knows what the bits mean.
            pub const fn raw(self) -> u64 {
                self.0.get()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

place!(
    /// Where a block lies in the arena: file, offset and generation, packed by `kvkeep-tiers`.
    SlotRef
);
place!(
    /// Where a block lies on NVMe: segment and 4 KiB unit, packed by `kvkeep-tiers`.
    NvmePlace
);
