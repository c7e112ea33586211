//! What was learned, as bytes that a later life of the node can begin with.
//!
//! ```text
//! "KVSAGE" 6 | version u16 | clients u32 | used f32 x classes x buckets | lost f32 x classes x buckets
//!            | accesses f32, requests f32
//!            | per client: id u64, estimates f32, close f32 x noises, ends f32, false ends f32 | crc32 of all before u32
//! ```
//! All little-endian. Times are not in it: what was seen is as old as the life that begins with it. Bytes that are not
//! exactly this begin nothing: learning starts anew, which costs minutes.

use std::array;

use super::ages::BUCKETS;
use super::classes::{CLASSES, NOISES};
use super::clients::{CLIENTS_MAX, Client};
use super::hazards::{PerBucket, Requests};

const MAGIC: &[u8; 6] = b"KVSAGE";
/// Goes up with every change of classes or buckets, for then the numbers mean something else. 2: `accesses`, `requests`.
const VERSION: u16 = 2;

/// What a snapshot holds.
pub(super) struct Learned {
    pub used: Box<[PerBucket; CLASSES]>,
    pub lost: Box<[PerBucket; CLASSES]>,
    pub requests: Requests,
    pub clients: Vec<(u64, Client)>,
}

impl Learned {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.clients.len() as u32).to_le_bytes());
        let mut number = |n: f64| out.extend_from_slice(&(n as f32).to_le_bytes());
        self.used.iter().chain(self.lost.iter()).flatten().for_each(|n| number(*n));
        [self.requests.accesses, self.requests.requests].into_iter().for_each(number);
        for (id, client) in &self.clients {
            out.extend_from_slice(&id.to_le_bytes());
            let numbers = [client.estimates].into_iter().chain(client.close).chain([client.ends, client.false_ends]);
            numbers.for_each(|n| out.extend_from_slice(&(n as f32).to_le_bytes()));
        }
        let sum = crc32fast::hash(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// `None`: not what this version writes.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (bytes, sum) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(bytes) != u32::from_le_bytes(*sum) {
            return None;
        }
        let mut rest = Rest(bytes);
        if rest.take::<6>()? != MAGIC || u16::from_le_bytes(*rest.take()?) != VERSION {
            return None;
        }
        let clients = u32::from_le_bytes(*rest.take()?) as usize;
        if clients > CLIENTS_MAX + 1 {
            return None;
        }
        let (used, lost) = (rest.table()?, rest.table()?);
        let requests = Requests { accesses: rest.number()?, requests: rest.number()? };
        let clients = (0..clients).map(|_| rest.client()).collect::<Option<Vec<_>>>()?;
        rest.0.is_empty().then_some(Self { used, lost, requests, clients })
    }
}

/// What of the bytes is still to be read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(first)
    }

    /// A count; one that is none makes the whole unusable.
    fn number(&mut self) -> Option<f64> {
        let n = f32::from_le_bytes(*self.take()?);
        (n.is_finite() && n >= 0.0).then_some(f64::from(n))
    }

    fn table(&mut self) -> Option<Box<[PerBucket; CLASSES]>> {
        let mut table = Box::new([[0.0; BUCKETS]; CLASSES]);
        for n in table.iter_mut().flatten() {
            *n = self.number()?;
        }
        Some(table)
    }

    fn client(&mut self) -> Option<(u64, Client)> {
        let id = u64::from_le_bytes(*self.take()?);
        let mut numbers = [0.0; 3 + NOISES];
        for n in &mut numbers {
            *n = self.number()?;
        }
        let mut client = Client::default();
        client.estimates = numbers[0];
        client.close = array::from_fn(|i| numbers[1 + i]);
        (client.ends, client.false_ends) = (numbers[1 + NOISES], numbers[2 + NOISES]);
        Some((id, client))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn learned() -> Learned {
        let table = |factor: f64| {
            let mut table = Box::new([[0.0; BUCKETS]; CLASSES]);
            table.iter_mut().flatten().enumerate().for_each(|(i, n)| *n = (i % 1000) as f64 * factor);
            table
        };
        let mut client = Client::default();
        (client.estimates, client.ends, client.false_ends) = (5.0, 4.0, 3.0);
        client.close = array::from_fn(|i| i as f64);
        Learned {
            used: table(0.5),
            lost: table(2.0),
            requests: Requests { accesses: 300.0, requests: 2.0 },
            clients: vec![(7, client), (u64::MAX, Client::default())],
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let written = learned();
        let read = Learned::from_bytes(&written.to_bytes()).expect("just written");
        assert_eq!((&read.used, &read.lost, read.requests), (&written.used, &written.lost, written.requests));
        let client = read.clients[0].1;
        assert_eq!((client.estimates, client.close, client.ends, client.false_ends), (5.0, [0.0, 1.0, 2.0], 4.0, 3.0));
        assert_eq!((read.clients[0].0, read.clients[1].0), (7, u64::MAX));
    }

    /// With a right sum, but of another version, or with a count that is none.
    #[test]
    fn other_versions_and_impossible_counts_are_nothing() {
        let resum = |mut bytes: Vec<u8>| {
            let end = bytes.len() - 4;
            let sum = crc32fast::hash(&bytes[..end]);
            bytes[end..].copy_from_slice(&sum.to_le_bytes());
            bytes
        };
        let good = learned().to_bytes();
        assert!(Learned::from_bytes(&resum(good.clone())).is_some());
        let with = |at: usize, new: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            resum(bytes)
        };
        for bad in [
            with(6, &(VERSION + 1).to_le_bytes()),
            with(6, &(VERSION - 1).to_le_bytes()),
            with(8, &u32::MAX.to_le_bytes()),
            with(8, &1u32.to_le_bytes()),
            with(12, &f32::NAN.to_le_bytes()),
            with(12, &(-1f32).to_le_bytes()),
        ] {
            assert!(Learned::from_bytes(&bad).is_none());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_bytes_are_nothing(bytes: Vec<u8>) {
            prop_assert!(Learned::from_bytes(&bytes).is_none());
        }

        #[test]
        fn damaged_bytes_are_nothing(at: prop::sample::Index, bit in 0u8..8, cut: prop::sample::Index) {
            let good = learned().to_bytes();
            let mut bad = good.clone();
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
            prop_assert!(Learned::from_bytes(&bad).is_none());
            prop_assert!(Learned::from_bytes(&good[..cut.index(good.len())]).is_none());
        }
    }
}
