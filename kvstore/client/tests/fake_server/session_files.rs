//! Sessions into files and back.

use std::collections::BTreeMap;
use std::io::Cursor;

use bytes::Bytes;
use kvkeep_client::session_file::{Export, Exported, Import, Imported, Origin, inspect};
use kvkeep_client::sessions::{Append, ContentPart, OpenSession, Restore};
use kvkeep_client::{Call, Error, ErrorKind, Namespace, Put, PutPart, PutPosition};
use kvkeep_core::ids::{GroupId, ShardId};
use kvkeep_core::{Class, ErrorKind as CoreKind};
use tonic::Status;

use crate::support::{Fake, Fault, content, format, key, refusal};

const POSITIONS: usize = 9;

fn origin() -> Origin {
    Origin { namespace: "n".to_owned(), format: format(), revision_digest: "r1".to_owned() }
}

fn into() -> Import {
    Import { into: origin(), id: None, tokens_only: false }
}

async fn a_session(ns: &Namespace) {
    let part = |i: usize, shard: u16| PutPart {
        group: GroupId(0),
        shard: ShardId(shard),
        data: content(2 * i + usize::from(shard), 3000 + i),
    };
    let position = |i| PutPosition { key: key(i), parts: vec![part(i, 0), part(i, 1)], token_ids: Vec::new() };
    let put = Put { positions: (0..POSITIONS).map(position).collect(), ..Put::default() };
    let call = Call::default();
    ns.put(&put, &call).await.expect("the fake takes everything");
    let open = OpenSession {
        class: Some(Class::Durable),
        priority: 4,
        attributes: BTreeMap::from([("user".to_owned(), "u".to_owned())]),
        ..OpenSession::default()
    };
    ns.sessions().open("a", &open, &call).await.expect("a session");
    let append = Append {
        keys: (0..POSITIONS).map(key).collect(),
        token_ids: (0..POSITIONS as u32 * 16 + 3).collect(),
        content: vec![ContentPart { first_token: 45, tokens: 10, content_id: Bytes::from_static(b"image") }],
        ..Append::default()
    };
    ns.sessions().append("a", &append, &call).await.expect("it is as long as it should be");
}

async fn export(ns: &Namespace, complete: bool) -> Result<(Exported, Vec<u8>), Error> {
    let (mut file, mut seen) = (Vec::new(), Vec::new());
    let export = Export { origin: origin(), complete };
    let mut progress = |p: kvkeep_client::session_file::FileProgress| seen.push(p.positions);
    let exported = ns.sessions().export("a", &export, &mut file, &Call::default(), &mut progress).await?;
    assert!(seen.is_sorted() && seen.last() == Some(&exported.session.positions), "{seen:?}");
    Ok((exported, file))
}

async fn import(ns: &Namespace, import: &Import, file: &[u8]) -> Result<Imported, Error> {
    ns.sessions().import(import, &mut Cursor::new(file), &Call::default(), &mut |_| ()).await
}

#[tokio::test]
async fn a_session_goes_into_a_file_and_into_another_store_byte_for_byte() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    a_session(&ns).await;
    let (exported, file) = export(&ns, true).await.unwrap();
    assert_eq!((exported.counts.parts, exported.counts.missing, exported.counts.content), (18, 0, 1));
    assert_eq!(inspect(&mut &file[..], &mut |_| ()).await.unwrap().counts, exported.counts);

    let (other, addr) = Fake::start().await;
    let (_, there) = Fake::client(&addr, |_| ()).await;
    let imported = import(&there, &into(), &file).await.unwrap();
    assert!(imported.created);
    assert_eq!((imported.positions, imported.tokens), (9, 147));
    assert_eq!((imported.session.class, imported.session.priority), (Class::Durable, 4));
    assert_eq!(other.state.lock().blocks, fake.state.lock().blocks);
    {
        let state = other.state.lock();
        let (a, b) = (&state.sessions["a"], &fake.state.lock().sessions["a"]);
        assert_eq!((&a.keys, &a.tokens, &a.content), (&b.keys, &b.tokens, &b.content));
        assert!(state.reserves.iter().all(|r| r.class == Class::Durable.code() as i32));
        let last = state.reserves.last().unwrap();
        assert_eq!((last.first_position, &last.parent_key), (8, &key(7)), "one chain, in batches");
    }
    // The same once more changes nothing; something else of that name is not touched.
    assert!(!import(&there, &into(), &file).await.unwrap().created);
    there.sessions().truncate("a", 3, false, &Call::default()).await.unwrap();
    let e = import(&there, &into(), &file).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Conflict), "{e}");
    let renamed = Import { id: Some("b".to_owned()), ..into() };
    assert_eq!(import(&there, &renamed, &file).await.unwrap().session.id, "b");
}

#[tokio::test]
async fn what_is_missing_is_counted_and_behind_it_only_tokens_are_imported() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    a_session(&ns).await;
    fake.state.lock().blocks.retain(|(k, _, shard), _| *k != key(5) && !(*k == key(7) && *shard == 1));
    let e = export(&ns, true).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Conflict));
    assert!(e.context().any(|field| field == ("position", "5")), "{e}");
    let (exported, file) = export(&ns, false).await.unwrap();
    assert_eq!((exported.counts.missing, exported.counts.incomplete, exported.counts.parts), (1, 1, 15));

    let (other, addr) = Fake::start().await;
    let (_, there) = Fake::client(&addr, |_| ()).await;
    let imported = import(&there, &into(), &file).await.unwrap();
    assert_eq!((imported.positions, imported.tokens, imported.session.positions), (5, 147, 5));
    assert_eq!(other.state.lock().blocks.len(), 10);
}

#[tokio::test]
async fn a_lost_server_is_no_missing_position() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |c| c.lost = kvkeep_client::Lost::Misses).await;
    a_session(&ns).await;
    (0..200).for_each(|_| fake.fault("get", Fault::Refuse(Status::unavailable("gone"))));
    let e = export(&ns, false).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unreachable, "{e}");
}

#[tokio::test]
async fn other_weights_and_other_formats_get_token_ids_at_most() {
    let (_, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    a_session(&ns).await;
    let (_, file) = export(&ns, true).await.unwrap();
    let (other, addr) = Fake::start().await;
    let (_, there) = Fake::client(&addr, |_| ()).await;
    let mut wish = into();
    wish.into.revision_digest = "r2".to_owned();
    let e = import(&there, &wish, &file).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::StaleRevision), "{e}");
    let mut wish = into();
    wish.into.format.dtype = "fp8".to_owned();
    let e = import(&there, &wish, &file).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::FormatMismatch));
    assert!(e.context().any(|field| field == ("differ", "dtype")), "{e}");
    assert!(other.state.lock().sessions.is_empty());
    let imported = import(&there, &Import { tokens_only: true, ..wish }, &file).await.unwrap();
    assert_eq!((imported.positions, imported.tokens, imported.session.tokens), (0, 147, 147));
    assert!(other.state.lock().blocks.is_empty());
}

#[tokio::test]
async fn an_import_that_fails_leaves_no_session() {
    let (_, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    a_session(&ns).await;
    let (_, file) = export(&ns, true).await.unwrap();
    let (other, addr) = Fake::start().await;
    let (_, there) = Fake::client(&addr, |_| ()).await;

    let mut bent = file.clone();
    let last = bent.len() - 100;
    bent[last] ^= 1;
    let e = import(&there, &into(), &bent).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Corrupt), "{e}");
    assert!(other.state.lock().blocks.is_empty(), "the whole file is checked first");

    other.fault("reserve", Fault::Refuse(refusal(CoreKind::Denied)));
    let e = import(&there, &into(), &file).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Denied));
    assert_eq!(other.calls("open_session"), 0);

    // The second of several appends is refused.
    other.fault("append_session", Fault::LoseAnswer(Status::unavailable("gone")));
    other.fault("append_session", Fault::Refuse(refusal(CoreKind::Conflict)));
    let e = import(&there, &into(), &file).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Conflict));
    assert!(other.state.lock().sessions.is_empty());
    assert!(import(&there, &into(), &file).await.unwrap().created);
}

#[tokio::test]
async fn exports_imports_and_restores_go_between_threads() {
    let (_, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    a_session(&ns).await;
    let there = ns.clone();
    let file = tokio::spawn(async move { export(&there, true).await }).await.unwrap().unwrap().1;
    let there = ns.clone();
    let wish = Import { id: Some("b".to_owned()), ..into() };
    tokio::spawn(async move { import(&there, &wish, &file).await }).await.unwrap().unwrap();
    let restored = tokio::spawn(async move {
        let restoring = ns.sessions().restore("b", &Restore::default(), &Call::default()).await?;
        restoring.finish().await
    });
    assert!(restored.await.unwrap().unwrap().is_whole());
}
