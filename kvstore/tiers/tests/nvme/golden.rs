//! A header that version 1 wrote, kept for ever: whoever changes the format meets it here.

use kvkeep_core::block::BlockMeta;
use kvkeep_core::checksum::ChunkSums;
use kvkeep_core::ids::{BlockId, Digest, GroupId, Handle, Key, NamespaceId, Revision, ShardId, TenantId, Version};
use kvkeep_core::words::{Class, Fidelity};
use kvkeep_tiers::nvme::Sequence;
use kvkeep_tiers::nvme::header::{Header, HeaderError, Shape};

const GOLDEN: &[u8] = include_bytes!("../fixtures/block_header_v1.bin");

fn golden() -> Header {
    let bytes: Vec<u8> = (0..150_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    Header {
        meta: BlockMeta {
            id: BlockId {
                digest: Digest::from_slice(b"0123456789abcdef").unwrap(),
                group: GroupId(0x0102),
                shard: ShardId(0x0304),
            },
            tenant: TenantId(0x0506_0708),
            handle: Handle { namespace: NamespaceId(0x090a_0b0c), revision: Revision(0x0d0e_0f10) },
            key: Key::new(b"the key of an engine").unwrap(),
            version: Version(0x1112_1314_1516_1718),
            class: Class::Durable,
            keeper: kvkeep_core::words::Keeper::Caller,
            fidelity: Fidelity::Near,
            position: 0x191a_1b1c,
            parent: Some(Digest::from_slice(b"fedcba9876543210").unwrap()),
            len: 150_000,
            sums: ChunkSums::of(&bytes),
        },
        sequence: Sequence(0x1d1e_1f20_2122_2324),
    }
}

#[test]
fn the_header_of_version_1_is_read() {
    assert_eq!(Header::decode(GOLDEN), Ok(golden()));
}

#[test]
fn the_header_of_version_1_is_still_what_is_written() {
    let header = golden();
    let mut pages = vec![0xff; Shape::of(header.meta.len).header_bytes()];
    header.encode(&mut pages);
    if std::env::var_os("KVKEEP_WRITE_FIXTURES").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/block_header_v1.bin"), &pages).unwrap();
    }
    assert!(pages == GOLDEN, "the format changed: give it a new version and keep the old fixture");
}

#[test]
fn another_version_is_no_header_of_this_device() {
    let mut pages = GOLDEN.to_vec();
    pages[8] = 2;
    assert_eq!(Header::decode(&pages), Err(HeaderError::Version(2)));
}
