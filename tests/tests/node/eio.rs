//! A device that fails while the node runs: what is promised stays true, and the node says what happened.

use kvkeep_client::{Call, GetItem, Namespace, PartOutcome};
use kvkeep_core::{Class, MissReason, PartStatus, Tier};
use kvkeep_tests::powercut::{Fails, PowerCut};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

use super::restart::forget_memory;

const BYTES: usize = 20_000;

/// A node whose segment files can be made to fail; `None` where there is no shim.
fn node(test: &str) -> Option<(Node, PowerCut)> {
    failing(test, "/segments/")
}

/// A node whose files with this in their path can be made to fail.
fn failing(test: &str, path: &str) -> Option<(Node, PowerCut)> {
    let mut node = Node::new(Options::default());
    match PowerCut::under(&mut node) {
        Ok(power) => {
            power.may_fail(&mut node, path);
            node.restart();
            Some((node, power))
        }
        Err(why) => {
            kvkeep_tests::skipped(test, why);
            None
        }
    }
}

async fn refused(ns: &Namespace, keys: &[bytes::Bytes]) {
    let call = Call::default().within(std::time::Duration::from_secs(2));
    match ns.put(&super::put_of(keys, BYTES, Class::Durable), &call).await {
        Ok(outcomes) => assert!(outcomes.iter().all(|o| matches!(o, PartOutcome::Refused(_))), "{outcomes:?}"),
        Err(e) => assert!(e.to_string().contains("io") || e.to_string().contains("unavailable"), "{e}"),
    }
}

/// After a failed flush nobody knows what is on the device: it takes no more writes, is read as before, and says so.
#[tokio::test]
async fn a_failed_flush_ends_all_writing_and_is_told_and_a_restart_has_what_was_acknowledged() {
    let Some((mut node, power)) = node("a_failed_flush_ends_all_writing") else { return };
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let kept = payload::chain(1, 8);
    super::store(&ns, &kept, BYTES, Class::Durable).await;
    power.fail(Fails::Flush, true);
    refused(&ns, &payload::chain(2, 2)).await;
    power.fail(Fails::Flush, false);
    // The next flush would succeed, and would save nothing of what was lost.
    refused(&ns, &payload::chain(3, 2)).await;
    let stats = client.stats(&Call::default()).await.unwrap();
    assert_eq!(leaks::tier(&stats, Tier::Nvme).state, "read_only");
    let status = client.admin().status(&Call::default()).await.unwrap();
    assert!(status.warnings.iter().any(|w| w.contains("flush failed")), "{:?}", status.warnings);
    // What needs no device goes on.
    let cached = payload::chain(4, 4);
    super::store(&ns, &cached, BYTES, Class::Cache).await;
    assert_eq!(super::found(&ns, &kept, BYTES).await + super::found(&ns, &cached, BYTES).await, 12);
    leaks::nothing_is_held(&client).await;
    node.kill();
    forget_memory(&node);
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    assert_eq!(super::found(&ns, &kept, BYTES).await, 8);
    super::store(&ns, &payload::chain(5, 4), BYTES, Class::Durable).await;
}

#[tokio::test]
async fn a_failed_write_refuses_its_put_and_harms_no_other_block() {
    let Some((mut node, power)) = node("a_failed_write_refuses_its_put") else { return };
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let kept = payload::chain(1, 8);
    super::store(&ns, &kept, BYTES, Class::Durable).await;
    power.fail(Fails::Write, true);
    refused(&ns, &payload::chain(2, 2)).await;
    power.fail(Fails::Write, false);
    leaks::nothing_is_held(&client).await;
    assert_eq!(super::found(&ns, &kept, BYTES).await, 8);
    node.kill();
    forget_memory(&node);
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    assert_eq!(super::found(&ns, &kept, BYTES).await, 8);
    super::store(&ns, &payload::chain(2, 2), BYTES, Class::Durable).await;
}

/// A read that fails is a miss of this moment, with its reason; the block is not given up.
#[tokio::test]
async fn a_failed_read_is_a_miss_and_the_block_is_there_when_the_device_is_well_again() {
    let Some((mut node, power)) = node("a_failed_read_is_a_miss") else { return };
    node.options_mut().nvme = "warm_bytes_per_s = 0\nscrub_bytes_per_s = 0\n".into();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    let kept = payload::chain(1, 8);
    super::store(&ns, &kept, BYTES, Class::Durable).await;
    node.kill();
    forget_memory(&node);
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &formats::any_size(1 << 20)).await;
    power.fail(Fails::Read, true);
    let items: Vec<_> = kept.iter().map(|key| GetItem::of(key.clone())).collect();
    for part in ns.get(&items, None, &Call::default()).await.unwrap() {
        assert_eq!((part.status, part.reason), (PartStatus::Miss, Some(MissReason::Io)));
    }
    power.fail(Fails::Read, false);
    assert_eq!(super::found(&ns, &kept, BYTES).await, 8);
    leaks::nothing_is_held(&client).await;
}

/// The raft log fails: no namespace is made or changed until the next start, and the node says so. What was registered is
/// served, and may be registered again.
#[tokio::test]
async fn a_failed_raft_log_ends_registrations_and_nothing_else() {
    let Some((mut node, power)) = failing("a_failed_raft_log_ends_registrations", "/raft/") else { return };
    let client = node.client().await;
    let format = formats::any_size(1 << 20);
    let ns = super::namespace(&client, &format).await;
    let kept = payload::chain(1, 8);
    super::store(&ns, &kept, BYTES, Class::Durable).await;
    let refuses = async || {
        let e = client.register_namespace("another", &format, "w").await.err().expect("it cannot be made");
        assert!(e.to_string().contains("io") || e.to_string().contains("unavailable"), "{e}");
    };
    power.fail(Fails::Flush, true);
    refuses().await;
    power.fail(Fails::Flush, false);
    refuses().await;
    let status = client.admin().status(&Call::default()).await.unwrap();
    assert!(status.warnings.iter().any(|w| w.starts_with("raft:")), "{:?}", status.warnings);
    let again = super::namespace(&client, &format).await;
    assert!(!again.created && again.handle == ns.handle);
    super::store(&ns, &payload::chain(2, 4), BYTES, Class::Durable).await;
    assert_eq!(super::found(&ns, &kept, BYTES).await, 8);
    node.terminate().await;
    node.restart();
    let client = node.client().await;
    let ns = super::namespace(&client, &format).await;
    assert!(!ns.created);
    assert_eq!(super::found(&ns, &kept, BYTES).await, 8);
    client.register_namespace("another", &format, "w").await.unwrap();
}
