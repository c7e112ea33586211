//! Stops, crashes and starts.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kvkeep_client::{Call, MatchQuery};
use kvkeep_core::{Class, MissReason, RequestId, Tier};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

const BYTES: usize = 20_000;

#[tokio::test]
async fn after_a_clean_stop_everything_is_there_and_the_warm_set_comes_back() {
    let mut node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let (cached, durable) = (payload::chain(1, 40), payload::chain(2, 40));
    super::store(&ns, &cached, BYTES, Class::Cache).await;
    super::store(&ns, &durable, BYTES, Class::Durable).await;
    for _ in 0..2 {
        node.terminate().await;
        leaks::no_stray_files(&node);
        node.restart();
        let client = node.client().await;
        let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
        assert!(!ns.created && ns.revision_matches);
        leaks::eventually(&client, "the warm set comes back", |s| leaks::tier(s, Tier::Dram).positions == 80).await;
        assert_eq!(super::found(&ns, &cached, BYTES).await + super::found(&ns, &durable, BYTES).await, 80);
        let found = ns.match_chain(&MatchQuery::of(durable.clone()), &Call::default()).await.unwrap();
        assert_eq!(found.boundary_positions, 40);
    }
}

#[tokio::test]
async fn after_sigkill_durable_blocks_are_there_and_memory_is_adopted() {
    let mut node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let (cached, durable) = (payload::chain(1, 40), payload::chain(2, 40));
    super::store(&ns, &durable, BYTES, Class::Durable).await;
    super::store(&ns, &cached, BYTES, Class::Cache).await;
    node.kill();
    node.restart();
    let client = node.client().await;
    let status = client.admin().status(&Call::default()).await.unwrap();
    assert_eq!(status.adopted_slots, 80, "every slot outlives the server that filled it");
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    assert_eq!(super::found(&ns, &durable, BYTES).await, 40);
    assert_eq!(super::found(&ns, &cached, BYTES).await, 40);

    // What was adopted is written down like anything else: it outlives the loss of memory, too.
    leaks::eventually(&client, "adopted blocks reach NVMe", |s| leaks::tier(s, Tier::Nvme).positions == 80).await;
    node.kill();
    forget_memory(&node);
    node.restart();
    let client = node.client().await;
    assert_eq!(client.admin().status(&Call::default()).await.unwrap().adopted_slots, 0);
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    assert_eq!(super::found(&ns, &durable, BYTES).await + super::found(&ns, &cached, BYTES).await, 80);
}

/// The arena is gone, as after a reboot.
pub fn forget_memory(node: &Node) {
    for name in leaks::names(node.arena_dir()) {
        fs::remove_dir_all(node.arena_dir().join(name)).unwrap();
    }
}

#[tokio::test]
async fn leases_and_reservations_end_with_the_server() {
    let mut node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 4);
    super::store(&ns, &keys, 4096, Class::Durable).await;
    let call = Call::of(RequestId::new(b"request").unwrap());
    let query = MatchQuery::of(keys.clone()).leased(Duration::from_secs(60));
    let lease = ns.match_chain(&query, &call).await.unwrap().lease_id().unwrap();
    let mut raw = kvkeep_tests::raw::Raw::connect(&node).await;
    let slot = raw.slot(ns.handle, &payload::key(2, 0), 4096).await;
    let epoch = client.server_epoch();
    node.kill();
    node.restart();
    let client = node.client().await;
    assert_ne!(client.server_epoch(), epoch);
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    super::is_refused(ns.renew(lease, None, &call).await, kvkeep_core::ErrorKind::Expired);
    let mut raw = kvkeep_tests::raw::Raw::connect(&node).await;
    let result = raw.commit(vec![(slot, Vec::new())]).await.unwrap().results.remove(0);
    assert_eq!(result.error.map(|e| e.kind).as_deref(), Some("expired"));
    leaks::nothing_is_held(&client).await;
}

/// What was removed stays removed, and its room is used again.
#[tokio::test]
async fn a_removal_outlives_a_crash_and_gives_its_room_back() {
    let options = Options { nvme_bytes: 64 << 20, ..Options::default() };
    let mut node = Node::start(options);
    for round in 0..6 {
        let client = node.client().await;
        let ns = super::namespace(&client, &formats::plain(1 << 20)).await;
        let keys = payload::chain(round, 30);
        super::store(&ns, &keys, 1 << 20, Class::Durable).await;
        assert_eq!(ns.remove(&keys, &Call::default()).await.unwrap().removed, 30);
        node.kill();
        forget_memory(&node);
        node.restart();
        let client = node.client().await;
        let ns = super::namespace(&client, &formats::plain(1 << 20)).await;
        assert_eq!(super::found(&ns, &keys, 1 << 20).await, 0);
        leaks::nothing_is_left(&client).await;
    }
    node.terminate().await;
    leaks::no_stray_files(&node);
}

#[tokio::test]
async fn an_old_revision_does_not_come_back_with_a_restart() {
    let mut node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 8);
    super::store(&ns, &keys, 4096, Class::Durable).await;
    let new = ns.advance_revision("weights-2", &Call::default()).await.unwrap();
    node.kill();
    node.restart();
    let client = node.client().await;
    for handle in [ns.handle, new.handle] {
        assert_eq!(super::found(&client.attach(handle), &keys, 4096).await, 0);
    }
    leaks::nothing_is_left(&client).await;
    super::store(&client.attach(new.handle), &keys, 4096, Class::Durable).await;
}

#[test]
fn a_second_server_on_the_same_folder_is_refused_clearly() {
    let node = Node::start(Options::default());
    let (status, said) = node.second(&[]);
    assert!(!status.success());
    assert!(said.contains("another kvkeepd") && said.contains(&node.data_dir().display().to_string()), "{said}");
}

/// Without a catalogue no block can be told from another: the server says so, and with the folder `raft` of a backup
/// everything is there again.
#[tokio::test]
async fn a_damaged_raft_log_is_refused_and_its_backup_brings_everything_back() {
    let mut node = Node::start(Options::default());
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 8);
    super::store(&ns, &keys, 4096, Class::Durable).await;
    node.terminate().await;
    let (folder, backup) = (node.data_dir().join("raft"), node.beside("raft-backup"));
    copy_folder(&folder, &backup);
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("flipped tables", |folder| of_kind(folder, ".sst", |bytes| bytes.iter_mut().for_each(|b| *b ^= 4))),
        ("shorter tables", |folder| of_kind(folder, ".sst", |bytes| bytes.truncate(bytes.len() - 3))),
        ("an empty manifest", |folder| of_kind(folder, "MANIFEST", Vec::clear)),
        ("a lost table", |folder| {
            let table = leaks::names(folder).into_iter().find(|name| name.ends_with(".sst")).unwrap();
            fs::remove_file(folder.join(table)).unwrap();
        }),
        ("no pointer to the manifest", |folder| fs::remove_file(folder.join("CURRENT")).unwrap()),
        ("no folder", |folder| fs::remove_dir_all(folder).unwrap()),
    ];
    for (name, damage) in damages {
        damage(&folder);
        let said = node.try_restart().expect_err("it must not start");
        let names_it = said.contains(&folder.display().to_string()) || said.contains("restore the folder `raft`");
        assert!(names_it, "{name}: {said}");
        assert!(said.contains("backup") || said.contains("restore"), "{name}: {said}");
        if folder.exists() {
            assert_ne!(name, "no folder", "an empty log in the place of the lost one would hide that it is lost");
            fs::remove_dir_all(&folder).unwrap();
        }
        copy_folder(&backup, &folder);
    }
    node.restart();
    let client = node.client().await;
    assert_eq!(super::found(&client.attach(ns.handle), &keys, 4096).await, 8);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in leaks::names(from) {
        fs::copy(from.join(&name), to.join(name)).unwrap();
    }
}

/// Changes every file with this in its name.
fn of_kind(folder: &Path, kind: &str, change: fn(&mut Vec<u8>)) {
    let names: Vec<_> = leaks::names(folder).into_iter().filter(|name| name.contains(kind)).collect();
    assert!(!names.is_empty(), "a clean stop leaves a {kind}");
    for name in names {
        let mut bytes = fs::read(folder.join(&name)).unwrap();
        change(&mut bytes);
        fs::write(folder.join(name), bytes).unwrap();
    }
}

/// A data folder of the time when the catalogue was a file of its own.
#[tokio::test]
async fn an_old_catalogue_moves_into_the_raft_log() {
    let mut node = Node::new(Options::default());
    fs::create_dir_all(node.data_dir()).unwrap();
    let json = br#"{"version":1,"secret":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16],"tenants":["default"],"next_namespace":77,"namespaces":[]}"#;
    let mut file = b"KVC1".to_vec();
    file.extend_from_slice(&crc32fast::hash(json).to_le_bytes());
    file.extend_from_slice(&(json.len() as u64).to_le_bytes());
    file.extend_from_slice(json);
    fs::write(node.data_dir().join("catalogue"), &file).unwrap();
    for created in [true, false] {
        node.restart();
        let client = node.client().await;
        let ns = super::namespace(&client, &formats::plain(4096)).await;
        assert_eq!((ns.handle.namespace.0, ns.created), (77, created));
        assert!(!node.data_dir().join("catalogue").exists());
        assert_eq!(fs::read(node.data_dir().join("catalogue.before-raft")).unwrap(), file);
        node.kill();
    }
}

/// A server without NVMe keeps nothing over a stop and promises nothing.
#[tokio::test]
async fn without_nvme_durable_is_refused_and_a_stop_forgets() {
    let mut node = Node::start(Options { nvme: "off = true\n".into(), ..Options::default() });
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 4);
    let put = super::put_of(&keys, 4096, Class::Durable);
    super::is_refused(ns.put(&put, &Call::default()).await, kvkeep_core::ErrorKind::InvalidArgument);
    super::store(&ns, &keys, 4096, Class::Cache).await;
    assert_eq!(super::found(&ns, &keys, 4096).await, 4);
    node.kill();
    forget_memory(&node);
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::plain(4096)).await;
    assert_eq!(super::found(&ns, &keys, 4096).await, 0);
    let found = ns.match_chain(&MatchQuery::of(keys), &Call::default()).await.unwrap();
    assert!(matches!(found.reason, Some(MissReason::NeverStored | MissReason::Restart)), "{found:?}");
}
