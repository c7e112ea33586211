//! What a client was told, block by block: the oracle of the crash tests.
//!
//! A block is here at the class it was acknowledged at, until its removal is asked for; from then on it may be here or
//! not. A block whose put got no answer may be here or not. Whatever is here has the bytes that follow from its key.

use std::collections::BTreeMap;

use bytes::Bytes;
use kvkeep_client::{Call, GetItem, Namespace};
use kvkeep_core::{Class, MissReason};

use crate::payload;

/// What the client knows of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its put or its removal got no answer, or it was removed: it may be here.
    Unknown,
    /// It was acknowledged at this class.
    Acknowledged(Class),
}

/// Every block that one client ever tried to store. Each block is written by one client only.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    blocks: BTreeMap<Bytes, Fate>,
}

/// What a look at every block of a ledger found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Blocks looked at.
    pub blocks: u64,
    /// Of these, acknowledged `durable`.
    pub durable: u64,
    /// Found, with the right bytes.
    pub found: u64,
    /// Bytes compared.
    pub bytes_verified: u64,
    /// Acknowledged `durable` and not found.
    pub durable_lost: u64,
    /// Found with other bytes.
    pub wrong: u64,
    /// Acknowledged `cache` and not found: allowed.
    pub cache_lost: u64,
}

impl std::ops::AddAssign for Account {
    fn add_assign(&mut self, o: Self) {
        self.blocks += o.blocks;
        self.durable += o.durable;
        self.found += o.found;
        self.bytes_verified += o.bytes_verified;
        self.durable_lost += o.durable_lost;
        self.wrong += o.wrong;
        self.cache_lost += o.cache_lost;
    }
}

/// Bytes of the block under a key: 1 to 48 KiB, odd sizes included. Follows from the key.
pub fn block_bytes(key: &[u8]) -> usize {
    let drawn = key.iter().fold(7, |h, b| payload::mix(h ^ u64::from(*b)));
    1024 + (drawn % (47 * 1024)) as usize
}

/// Largest of [`block_bytes`].
pub const BLOCK_BYTES_MAX: u64 = 48 * 1024;

/// Lost blocks that are printed by name.
const SHOWN_MAX: u64 = 3;

/// The block under a key.
pub fn block(key: &[u8]) -> Bytes {
    payload::block(key, block_bytes(key))
}

impl Ledger {
    /// Notes what is known of a block from now on.
    pub fn note(&mut self, key: &Bytes, fate: Fate) {
        self.blocks.insert(key.clone(), fate);
    }

    /// What is known of a block; `None` for one that was never tried.
    pub fn fate(&self, key: &Bytes) -> Option<Fate> {
        self.blocks.get(key).copied()
    }

    /// Every key ever tried, in order.
    pub fn keys(&self) -> impl Iterator<Item = &Bytes> {
        self.blocks.keys()
    }

    /// How many keys.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing was ever tried.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Forgets what is known: from now on each block may be here or not. After a loss that breaks the promise.
    pub fn forget_promises(&mut self) {
        self.blocks.values_mut().for_each(|fate| *fate = Fate::Unknown);
    }

    /// Reads every block ever tried and compares every byte. Blocks that are gone are noted as such.
    ///
    /// # Panics
    /// If a read fails as a call.
    pub async fn check(&mut self, namespace: &Namespace) -> Account {
        let mut account = Account::default();
        let all: Vec<_> = self.blocks.iter().map(|(key, fate)| (key.clone(), *fate)).collect();
        for some in all.chunks(256) {
            let items: Vec<_> = some.iter().map(|(key, _)| GetItem::of(key.clone())).collect();
            let got = namespace.get(&items, None, &Call::default()).await.expect("a healthy node answers a get");
            for ((key, fate), part) in some.iter().zip(got) {
                assert_ne!(part.reason, Some(MissReason::Late), "a healthy node answers in time");
                let durable = *fate == Fate::Acknowledged(Class::Durable);
                account.blocks += 1;
                account.durable += u64::from(durable);
                if !part.is_hit() {
                    account.durable_lost += u64::from(durable);
                    account.cache_lost += u64::from(!durable && *fate != Fate::Unknown);
                    if durable && account.durable_lost <= SHOWN_MAX {
                        println!("lost: durable block {} ({:?}, {:?})", hex(key), part.status, part.reason);
                    }
                    self.note(key, Fate::Unknown);
                } else if part.data == block(key) {
                    account.found += 1;
                    account.bytes_verified += part.data.len() as u64;
                } else {
                    println!("wrong: block {} has {} bytes that are not its own", hex(key), part.data.len());
                    account.wrong += 1;
                }
            }
        }
        account
    }
}

/// A key as logs and `explain` show it.
pub fn hex(key: &[u8]) -> String {
    key.iter().map(|b| format!("{b:02x}")).collect()
}
