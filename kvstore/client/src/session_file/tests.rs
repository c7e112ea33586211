//! Files that are whole, cut, bent, and nonsense.

use bytes::Bytes;
use kvkeep_core::ids::{GroupId, ShardId};
use kvkeep_core::{Group, MissReason, Rule, SizeRule, Topology};
use proptest::prelude::*;

use super::reader::FileReader;
use super::record::Record;
use super::writer::FileWriter;
use super::*;
use crate::sessions::ContentPart;

/// Two groups: every position has two shards of the first, every second one a part of the second, which is a window.
fn format() -> Format {
    let group = |rule, tokens_per_block, shards| Group {
        rule,
        tokens_per_block,
        shards,
        replicated: false,
        size: SizeRule::UpTo(4096),
    };
    Format {
        model: "m".into(),
        dtype: "bf16".into(),
        layout: "l".into(),
        hash_algorithm: "h".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: false, tp: 2, pp: 1, cp: 1 },
        groups: vec![group(Rule::All, 16, 2), group(Rule::Window { tokens: 64 }, 32, 1)],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

fn header(positions: u64, tokens: u64) -> FileHeader {
    FileHeader {
        what: WHAT.to_owned(),
        written_by: "a test".to_owned(),
        namespace: "n".to_owned(),
        format: format(),
        fingerprint: format().fingerprint().to_string(),
        revision_digest: "r1".to_owned(),
        session: FileSession {
            id: "conversation".to_owned(),
            class: Class::Durable,
            closed: false,
            ttl_ms: 5,
            priority: -1,
            attributes: BTreeMap::from([("user".to_owned(), "u".to_owned())]),
            positions,
            tokens,
            created_unix_ms: 1,
            changed_unix_ms: 2,
        },
    }
}

fn position(index: u32, parts: u32) -> Record {
    let reason = (parts == 0).then_some(MissReason::Evicted);
    Record::Position { index, parts, reason, digest: [index as u8; 16], key: Bytes::from(format!("key-{index}")) }
}

fn part(group: u16, shard: u16, byte: u8) -> Record {
    Record::Part { group: GroupId(group), shard: ShardId(shard), data: Bytes::from(vec![byte; 40]) }
}

/// A session of four positions: whole, whole, without its window, missing.
fn records() -> Vec<Record> {
    let content = ContentPart { first_token: 30, tokens: 5, content_id: Bytes::from_static(b"image") };
    vec![
        Record::Tokens { first: 0, ids: (0..40).collect() },
        Record::Content(content),
        Record::Tokens { first: 40, ids: (40..70).collect() },
        position(0, 2),
        part(0, 0, 1),
        part(0, 1, 2),
        position(1, 3),
        part(0, 0, 3),
        part(0, 1, 4),
        part(1, 0, 5),
        position(2, 2),
        part(0, 0, 6),
        part(0, 1, 7),
        position(3, 0),
    ]
}

fn wait<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn file(header: &FileHeader, records: &[Record]) -> Result<Vec<u8>> {
    wait(async {
        let mut file = Vec::new();
        let mut writer = FileWriter::begin(&mut file, header).await?;
        for record in records {
            writer.record(record).await?;
        }
        writer.end().await?;
        Ok(file)
    })
}

fn read(mut file: &[u8]) -> Result<FileContents> {
    wait(inspect(&mut file, &mut |_| ()))
}

#[test]
fn a_file_comes_back_as_it_went() {
    let file = file(&header(4, 70), &records()).unwrap();
    let contents = read(&file).unwrap();
    assert_eq!(contents.header, header(4, 70));
    let counts = FileCounts { positions: 4, missing: 1, incomplete: 0, parts: 7, bytes: 280, tokens: 70, content: 1 };
    assert_eq!(contents.counts, counts);
    assert_eq!(contents.keys, (0..4).map(|i| Bytes::from(format!("key-{i}"))).collect::<Vec<_>>());
    assert_eq!(contents.tokens.ids, (0..70).collect::<Vec<_>>());
    assert!(!contents.tokens.damaged);
    assert_eq!(contents.usable_positions, 3);
    let mut from = &file[..];
    let back = wait(async {
        let (mut reader, _) = FileReader::begin(&mut from).await.unwrap();
        let mut back = Vec::new();
        while let Some(record) = reader.next().await.unwrap() {
            back.push(record);
        }
        back
    });
    assert_eq!(back[..back.len() - 1], records());
}

#[test]
fn a_position_without_a_part_that_every_block_needs_ends_what_is_usable() {
    let mut records = records();
    records.splice(6..10, [position(1, 2), part(0, 1, 4), part(1, 0, 5)]);
    let contents = read(&file(&header(4, 70), &records).unwrap()).unwrap();
    assert_eq!((contents.counts.incomplete, contents.usable_positions), (1, 1));
    // Without a part of the window alone it is incomplete, and of use.
    let mut records = self::records();
    records.splice(6..10, [position(1, 2), part(0, 0, 3), part(0, 1, 4)]);
    let contents = read(&file(&header(4, 70), &records).unwrap()).unwrap();
    assert_eq!((contents.counts.incomplete, contents.usable_positions), (1, 3));
}

#[test]
fn token_ids_that_were_damaged_are_fewer_and_content_behind_them_is_left_out() {
    let records = [Record::Tokens { first: 0, ids: (0..32).collect() }, records()[1].clone()];
    let contents = read(&file(&header(0, 70), &records).unwrap()).unwrap();
    assert_eq!((contents.tokens.ids.len(), contents.tokens.total, contents.tokens.damaged), (32, 70, true));
    assert!(contents.tokens.content.is_empty());
}

#[test]
fn a_record_that_may_not_stand_somewhere_is_neither_written_nor_read() {
    type Bend<'a> = &'a dyn Fn(&mut Vec<Record>);
    let bent: [Bend<'_>; 10] = [
        &|r| drop(r.remove(0)),
        &|r| drop(r.remove(3)),
        &|r| drop(r.remove(4)),
        &|r| drop(r.pop()),
        &|r| r.swap(4, 5),
        &|r| r.insert(3, part(0, 0, 1)),
        &|r| r.push(Record::Tokens { first: 70, ids: vec![1] }),
        &|r| r.push(position(4, 0)),
        &|r| r[4] = part(2, 0, 1),
        &|r| r[4] = Record::Part { group: GroupId(0), shard: ShardId(0), data: Bytes::from(vec![0; 5000]) },
    ];
    for (i, bend) in bent.iter().enumerate() {
        let mut records = records();
        bend(&mut records);
        let e = file(&header(4, 70), &records).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Corrupt), "{i}: {e}");
    }
}

#[test]
fn another_version_another_file_and_too_much_are_refused_by_name() {
    let whole = file(&header(4, 70), &records()).unwrap();
    let refused = |file: &[u8]| read(file).unwrap_err().to_string();
    let mut other = whole.clone();
    other[8] = 2;
    assert!(refused(&other).contains("version=2"));
    assert!(refused(b"not a session file at all").contains("no session file"));
    let mut longer = whole.clone();
    longer.push(0);
    assert!(refused(&longer).contains("behind its end"));
    assert!(refused(&whole[..whole.len() - 1]).contains("it was cut"));
    let e = file(&header(POSITIONS_MAX + 1, 0), &[]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::TooLarge));
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused_with_its_place() {
    let whole = file(&header(4, 70), &records()).unwrap();
    for at in 0..whole.len() {
        let mut bent = whole.clone();
        bent[at] ^= 1 << (at % 8);
        let e = read(&bent).unwrap_err();
        let place = e.context().find(|(name, _)| *name == "at_byte").map(|(_, place)| place.parse::<usize>().unwrap());
        assert!(place.is_some_and(|place| place <= at), "byte {at}: {e}");
        assert!(read(&whole[..at]).is_err());
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(read(&bytes).is_err());
    }

    /// Behind a head that is right, too.
    #[test]
    fn arbitrary_records_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0u8..7, n in 0u8..200) {
        let mut file = file(&header(4, 70), &records()).unwrap();
        let head = 16 + u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize + 4;
        file.truncate(head);
        file.extend([kind, 0, 0, 0, n, 0, 0, 0]);
        file.extend(bytes);
        prop_assert!(read(&file).is_err());
    }

    #[test]
    fn a_body_of_arbitrary_bytes_never_panics(code in 1u8..6, body in proptest::collection::vec(any::<u8>(), 5..200)) {
        let mut prefix = [code, 0, 0, 0, 0, 0, 0, 0];
        prefix[4..].copy_from_slice(&(body.len() as u32).to_le_bytes());
        if let Some((kind, _)) = super::record::Kind::read(prefix)
            && let Some(record) = Record::decode(kind, body.into())
        {
            let (head, payload) = record.encode();
            prop_assert_eq!(head[0], kind as u8);
            prop_assert!(head.len() + payload.len() > 8);
        }
    }

    /// Records whose checksums are right may not be taken from elsewhere.
    #[test]
    fn moved_bytes_are_refused(from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>(), n in 1usize..60) {
        let whole = file(&header(4, 70), &records()).unwrap();
        let (from, to) = (from.index(whole.len()), to.index(whole.len()));
        let moved = whole[from..whole.len().min(from + n)].to_vec();
        let mut bent = whole.clone();
        bent.splice(to..whole.len().min(to + n), moved);
        prop_assume!(bent != whole);
        prop_assert!(read(&bent).is_err());
    }
}
