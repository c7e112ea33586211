//! An honest answer, then the same answer bent in every way we can think of.

use super::*;
use kvkeep_core::ids::{GroupId, ShardId, Version};
use proptest::prelude::*;

const BOUNDS: Bounds = Bounds { chunk_bytes: 100_000, block_bytes: 1 << 20 };

/// What is stored: one part per item.
#[derive(Clone, Debug)]
struct Stored {
    data: Bytes,
    offset: u64,
    length: u64,
}

impl Stored {
    fn item(&self) -> GetItem {
        GetItem {
            key: Bytes::from_static(b"k"),
            group: GroupId(0),
            shard: ShardId(0),
            offset: self.offset,
            length: self.length,
            version: None,
        }
    }

    fn end(&self) -> u64 {
        if self.length == 0 { self.data.len() as u64 } else { self.offset + self.length }
    }

    fn asked(&self) -> Bytes {
        self.data.slice(self.offset as usize..self.end() as usize)
    }

    /// The bytes of the range that lie in 64 KiB chunks which the range covers whole: those that sums vouch for.
    fn vouched(&self, got: &[u8]) -> Vec<u8> {
        let sum = SUM_CHUNK_BYTES as u64;
        let whole = |at: u64| {
            let start = at / sum * sum;
            start >= self.offset && (start + sum).min(self.data.len() as u64) <= self.end()
        };
        got.iter().enumerate().filter(|(i, _)| whole(self.offset + *i as u64)).map(|(_, b)| *b).collect()
    }
}

fn stored() -> impl Strategy<Value = Stored> {
    (1usize..200_000, any::<u32>(), 0.0..1.0f64, 0.0..1.0f64, any::<bool>()).prop_map(|(len, seed, a, b, whole)| {
        let data: Bytes = (0..len as u32).map(|i| (i.wrapping_mul(seed | 1) >> 13) as u8).collect();
        let (a, b) = ((a * len as f64) as u64, (b * len as f64) as u64);
        let (offset, length) = if whole || a == b { (0, 0) } else { (a.min(b), a.abs_diff(b)) };
        Stored { data, offset, length }
    })
}

fn honest(all: &[Stored], chunk: usize) -> Vec<v1::GetReply> {
    let mut replies = Vec::new();
    for (i, s) in all.iter().enumerate() {
        let asked = s.asked();
        let mut at = 0;
        while at < asked.len() {
            let end = asked.len().min(at + chunk);
            let mut reply = v1::GetReply {
                item: i as u32,
                status: v1::PartStatus::Hit as i32,
                offset: s.offset + at as u64,
                data: asked.slice(at..end),
                last: end == asked.len(),
                ..Default::default()
            };
            if at == 0 {
                reply.part_bytes = s.data.len() as u64;
                reply.version = 7 + i as u64;
                reply.crc32 = ChunkSums::of(&s.data).as_slice().to_vec();
                reply.tier = v1::Tier::Dram as i32;
            }
            replies.push(reply);
            at = end;
        }
    }
    replies
}

/// Feeds until the end or a violation; answers headers and bytes.
fn run(all: &[Stored], replies: Vec<v1::GetReply>) -> (Vec<(Header, Bytes)>, Option<Violation>, u64) {
    let items: Vec<_> = all.iter().map(Stored::item).collect();
    let mut landing = Owned::new(items.len());
    let mut assembly = Assembly::new(&items, BOUNDS);
    let mut violation = None;
    for reply in replies {
        if assembly.is_complete() {
            break;
        }
        if let Err(v) = assembly.feed(0, reply, &mut landing) {
            assembly.quarantine(&mut landing);
            violation = Some(v);
            break;
        }
    }
    let bad_sums = assembly.bad_sums;
    let headers = assembly.finish(MissReason::Io, &mut landing);
    assert_eq!(headers.len(), items.len());
    let got = headers.into_iter().enumerate().map(|(i, h)| (h, landing.take(i))).collect();
    (got, violation, bad_sums)
}

/// One way to bend an answer.
#[derive(Clone, Debug)]
enum Bend {
    Drop(usize),
    Repeat(usize),
    Swap(usize, usize),
    Cut(usize, usize),
    Grow(usize, usize),
    Flip(usize, usize, u8),
    FlipSum(usize, u32),
    Offset(usize, u64),
    Item(usize, u32),
    Last(usize),
    PartBytes(usize, u64),
    Version(usize, u64),
    Status(usize, i32),
    End(usize),
}

fn bend() -> impl Strategy<Value = Bend> {
    let n = any::<usize>;
    prop_oneof![
        n().prop_map(Bend::Drop),
        n().prop_map(Bend::Repeat),
        (n(), n()).prop_map(|(a, b)| Bend::Swap(a, b)),
        (n(), n()).prop_map(|(a, b)| Bend::Cut(a, b)),
        (n(), 1usize..200_000).prop_map(|(a, b)| Bend::Grow(a, b)),
        (n(), n(), 0u8..8).prop_map(|(a, b, c)| Bend::Flip(a, b, c)),
        (n(), any::<u32>()).prop_map(|(a, b)| Bend::FlipSum(a, b)),
        (n(), prop_oneof![any::<u64>(), 0u64..200_000]).prop_map(|(a, b)| Bend::Offset(a, b)),
        (n(), prop_oneof![any::<u32>(), 0u32..4]).prop_map(|(a, b)| Bend::Item(a, b)),
        n().prop_map(Bend::Last),
        (n(), prop_oneof![any::<u64>(), 0u64..200_000]).prop_map(|(a, b)| Bend::PartBytes(a, b)),
        (n(), 0u64..3).prop_map(|(a, b)| Bend::Version(a, b)),
        (n(), -1i32..8).prop_map(|(a, b)| Bend::Status(a, b)),
        n().prop_map(Bend::End),
    ]
}

fn apply(replies: &mut Vec<v1::GetReply>, bend: &Bend) {
    if replies.is_empty() {
        return;
    }
    let n = replies.len();
    let bytes = |r: &v1::GetReply| r.data.to_vec();
    match *bend {
        Bend::Drop(i) => drop(replies.remove(i % n)),
        Bend::Repeat(i) => replies.insert(i % n, replies[i % n].clone()),
        Bend::Swap(i, j) => replies.swap(i % n, j % n),
        Bend::Cut(i, k) => {
            let r = &mut replies[i % n];
            let keep = k % (r.data.len() + 1);
            r.data.truncate(keep);
        }
        Bend::Grow(i, k) => {
            let r = &mut replies[i % n];
            let mut data = bytes(r);
            data.resize(data.len() + k, 0xa5);
            r.data = data.into();
        }
        Bend::Flip(i, k, bit) => {
            let r = &mut replies[i % n];
            let mut data = bytes(r);
            if !data.is_empty() {
                let at = k % data.len();
                data[at] ^= 1 << bit;
            }
            r.data = data.into();
        }
        Bend::FlipSum(i, x) => replies[i % n].crc32.iter_mut().for_each(|c| *c ^= x),
        Bend::Offset(i, x) => replies[i % n].offset = x,
        Bend::Item(i, x) => replies[i % n].item = x,
        Bend::Last(i) => replies[i % n].last ^= true,
        Bend::PartBytes(i, x) => replies[i % n].part_bytes = x,
        Bend::Version(i, x) => replies[i % n].version = x,
        Bend::Status(i, x) => replies[i % n].status = x,
        Bend::End(i) => replies.truncate(i % (n + 1)),
    }
}

proptest! {
    #[test]
    fn an_honest_answer_is_every_byte(all in proptest::collection::vec(stored(), 1..4), chunk in 1000usize..100_000) {
        let (got, violation, bad_sums) = run(&all, honest(&all, chunk));
        prop_assert_eq!((violation, bad_sums), (None, 0));
        for ((header, data), s) in got.iter().zip(&all) {
            prop_assert_eq!(header.status, PartStatus::Hit);
            prop_assert_eq!(header.sums_ok, s.offset == 0 && s.end() == s.data.len() as u64);
            prop_assert!(data == &s.asked());
        }
    }

    #[test]
    fn a_bent_answer_never_becomes_a_hit_with_other_bytes(
        all in proptest::collection::vec(stored(), 1..4),
        chunk in 20_000usize..150_000,
        bends in proptest::collection::vec(bend(), 1..4),
    ) {
        let mut replies = honest(&all, chunk);
        bends.iter().for_each(|b| apply(&mut replies, b));
        let (got, _, _) = run(&all, replies);
        for ((header, data), s) in got.iter().zip(&all) {
            if header.status == PartStatus::Hit {
                prop_assert_eq!(data.len(), s.asked().len());
                prop_assert!(s.vouched(data) == s.vouched(&s.asked()), "wrong bytes in a hit");
            } else {
                prop_assert!(data.is_empty(), "bytes beside a miss");
            }
        }
    }

    #[test]
    fn a_caller_s_buffer_is_never_left(
        all in proptest::collection::vec(stored(), 1..3),
        room in 0usize..200_000,
        bends in proptest::collection::vec(bend(), 0..3),
    ) {
        let mut replies = honest(&all, 50_000);
        bends.iter().for_each(|b| apply(&mut replies, b));
        let items: Vec<_> = all.iter().map(Stored::item).collect();
        let mut memory = vec![vec![0; room]; items.len()];
        let mut buffers: Vec<&mut [u8]> = memory.iter_mut().map(Vec::as_mut_slice).collect();
        let mut landing = Lent(&mut buffers);
        let mut assembly = Assembly::new(&items, BOUNDS);
        for reply in replies {
            if assembly.is_complete() || assembly.feed(0, reply, &mut landing).is_err() {
                break;
            }
        }
        let headers = assembly.finish(MissReason::Io, &mut landing);
        for ((header, memory), s) in headers.iter().zip(&memory).zip(&all) {
            if header.status == PartStatus::Hit {
                let got = &memory[..s.asked().len()];
                prop_assert!(s.vouched(got) == s.vouched(&s.asked()));
            }
        }
    }
}

fn one(len: usize) -> Stored {
    Stored { data: (0..len).map(|i| (i * 7 + i / 251) as u8).collect(), offset: 0, length: 0 }
}

#[test]
fn a_bad_sum_spoils_its_part_and_no_other() {
    let all = [one(70_000), one(70_000), one(70_000)];
    let mut replies = honest(&all, 40_000);
    let second = replies.iter_mut().find(|r| r.item == 1).unwrap();
    second.crc32[0] ^= 1;
    let (got, violation, bad_sums) = run(&all, replies);
    assert_eq!((violation, bad_sums), (None, 1));
    assert_eq!(got[0].0.status, PartStatus::Hit);
    assert_eq!(got[1].0.reason, Some(MissReason::Quarantined));
    assert_eq!(got[2].0.status, PartStatus::Hit);
}

#[test]
fn another_version_than_was_asked_for_is_a_miss() {
    let s = one(1000);
    let items = [GetItem { version: Some(Version(8)), ..s.item() }];
    let mut landing = Owned::new(1);
    let mut assembly = Assembly::new(&items, BOUNDS);
    for reply in honest(&[s], 1000) {
        assembly.feed(0, reply, &mut landing).unwrap();
    }
    assert_eq!(assembly.finish(MissReason::Io, &mut landing)[0].reason, Some(MissReason::Quarantined));
}

#[test]
fn a_part_said_to_be_huge_takes_no_memory() {
    let s = one(1000);
    let mut replies = honest(std::slice::from_ref(&s), 1000);
    replies[0].part_bytes = u64::MAX;
    let (got, violation, _) = run(&[s], replies);
    assert!(violation.is_some());
    assert_eq!(got[0].0.reason, Some(MissReason::Quarantined));
}

#[test]
fn a_single_chunk_is_handed_on_without_a_copy() {
    let s = one(1000);
    let replies = honest(std::slice::from_ref(&s), 1000);
    let sent = replies[0].data.as_ptr();
    let (got, ..) = run(&[s], replies);
    assert_eq!(got[0].1.as_ptr(), sent);
}
