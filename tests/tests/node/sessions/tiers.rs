//! Where the blocks of a session are: raised, pinned, restored, and of other weights.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::sessions::{Append, Restore, SessionHint};
use kvkeep_client::{Call, Namespace, Put, PutPosition};
use kvkeep_core::{Class, ErrorKind, MissReason, Tier};
use kvkeep_tests::powercut::{Cut, PowerCut};
use kvkeep_tests::{Node, Options, formats, leaks, payload};

use super::super::{found, is_refused};
use super::{BYTES, append, filled, keys_of, namespace, open, says};

/// Blocks of a durable session and of a cache session were put alike.
#[tokio::test]
async fn what_a_durable_session_names_survives_a_kill_although_it_was_put_as_cache() {
    let mut node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let kept = filled(&ns, "durable", Class::Durable, 1, 20).await;
    let manifest = ns.sessions().manifest_all("durable", &Call::default()).await.unwrap();
    assert!(manifest.iter().all(|p| p.class == Class::Durable && p.is_here()), "{manifest:?}");
    filled(&ns, "cache", Class::Cache, 2, 20).await;
    let manifest = ns.sessions().manifest_all("cache", &Call::default()).await.unwrap();
    assert!(manifest.iter().all(|p| p.class == Class::Cache), "nobody asked for more: {manifest:?}");
    node.kill();
    super::super::restart::forget_memory(&node);
    node.restart();
    let ns = namespace(&node).await;
    assert_eq!(found(&ns, &kept, BYTES).await, 20);
    assert_eq!(keys_of(&ns, "durable").await, kept);
}

/// With the power goes everything that no flush covered: all of the cache session's blocks, none of the durable one's.
#[tokio::test]
async fn what_a_durable_session_names_survives_a_power_cut_although_it_was_put_as_cache() {
    let mut node = Node::new(Options::default());
    let power = match PowerCut::under(&mut node) {
        Ok(power) => power,
        Err(why) => return kvkeep_tests::skipped("what_a_durable_session_names_survives_a_power_cut", why),
    };
    node.restart();
    for round in 0..4 {
        let ns = namespace(&node).await;
        let (durable, cache) = (format!("durable-{round}"), format!("cache-{round}"));
        let kept = filled(&ns, &durable, Class::Durable, 10 + round, 20).await;
        let cached = filled(&ns, &cache, Class::Cache, 20 + round, 20).await;
        power.cut(&mut node, Cut::Everything);
        node.restart();
        let ns = namespace(&node).await;
        assert_eq!(keys_of(&ns, &durable).await, kept);
        assert_eq!(found(&ns, &kept, BYTES).await, 20);
        // The cache session is there, and says of each position what has become of it.
        let here = found(&ns, &cached, BYTES).await;
        let manifest = ns.sessions().manifest_all(&cache, &Call::default()).await.unwrap();
        assert_eq!((manifest.len(), manifest.iter().filter(|p| p.is_here()).count()), (20, here));
        assert!(manifest.iter().all(|p| p.is_here() == p.why.is_empty()), "{manifest:?}");
    }
}

/// Much more than the arena holds, and nothing of it is asked to stay.
async fn pressure(ns: &Namespace, chain: u64) {
    pressure_of(ns, chain, 9).await;
}

/// So many chains of ten blocks of 1 MiB.
async fn pressure_of(ns: &Namespace, chain: u64, chains: u64) {
    for n in 0..chains {
        let keys = payload::chain(chain + n, 10);
        let positions = keys.iter().map(|k| PutPosition::of(k.clone(), payload::block(k, 1 << 20))).collect();
        let put = Put { positions, class: Some(Class::Cache), ..Put::default() };
        let outcomes = ns.put(&put, &Call::default().within(Duration::from_secs(60))).await.unwrap();
        assert!(outcomes.iter().all(|o| o.is_kept()), "{outcomes:?}");
    }
}

async fn in_dram(ns: &Namespace, id: &str) -> usize {
    let manifest = ns.sessions().manifest_all(id, &Call::default()).await.unwrap();
    manifest.iter().filter(|p| p.tier == Some(Tier::Dram)).count()
}

/// A session that is said to be due comes up by itself; one of which nothing is said stays where it is.
#[tokio::test]
async fn a_session_that_is_due_is_brought_up_before_it_comes() {
    let options = Options { arena_bytes: 64 << 20, nvme_bytes: 512 << 20, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::super::namespace(&client, &formats::any_size(1 << 20)).await;
    let call = Call::default();
    filled(&ns, "due", Class::Durable, 1, 12).await;
    filled(&ns, "silent", Class::Durable, 2, 12).await;
    pressure(&ns, 100).await;
    assert_eq!((in_dram(&ns, "due").await, in_dram(&ns, "silent").await), (0, 0), "there was no pressure");
    let hints = [SessionHint::DueIn(Duration::from_secs(3))];
    assert_eq!(ns.sessions().hint("due", &hints, &call).await.unwrap(), 12);
    let until = std::time::Instant::now() + Duration::from_secs(30);
    while in_dram(&ns, "due").await < 12 {
        assert!(std::time::Instant::now() < until, "it was not brought up: {}", node.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(in_dram(&ns, "silent").await, 0);
}

#[tokio::test]
async fn a_session_pinned_to_dram_stays_there_under_pressure_until_it_is_unpinned() {
    let options = Options { arena_bytes: 64 << 20, nvme_bytes: 512 << 20, ..Options::default() };
    let mut node = Node::start(options);
    let client = node.client().await;
    let ns = super::super::namespace(&client, &formats::any_size(1 << 20)).await;
    let call = Call::default();
    filled(&ns, "pinned", Class::Durable, 1, 12).await;
    filled(&ns, "other", Class::Durable, 2, 12).await;
    filled(&ns, "for a while", Class::Durable, 4, 12).await;
    ns.sessions().pin("for a while", Tier::Dram, &call).await.unwrap();
    assert_eq!(ns.sessions().pin("pinned", Tier::Dram, &call).await.unwrap().pinned, Some(Tier::Dram));
    pressure(&ns, 100).await;
    assert_eq!(in_dram(&ns, "pinned").await, 12);
    assert_eq!(in_dram(&ns, "for a while").await, 12);
    assert_eq!(in_dram(&ns, "other").await, 0, "there was no pressure");
    assert_eq!(ns.sessions().unpin("for a while", &call).await.unwrap().pinned, None);
    // What is appended to it is pinned, too.
    let more = payload::chain(3, 8);
    super::super::store(&ns, &more, BYTES, Class::Cache).await;
    append(&ns, "pinned", 12, &more).await.unwrap();
    pressure(&ns, 200).await;
    assert_eq!(in_dram(&ns, "pinned").await, 20);
    assert_eq!(in_dram(&ns, "for a while").await, 0, "it was let go");
    // It is pinned after a restart: brought up, and kept.
    node.kill();
    super::super::restart::forget_memory(&node);
    node.options_mut().nvme = "warm_bytes_per_s = 0\n".into();
    node.restart();
    let client = node.client().await;
    let ns = super::super::namespace(&client, &formats::any_size(1 << 20)).await;
    assert_eq!(ns.sessions().get("pinned", &call).await.unwrap().pinned, Some(Tier::Dram));
    leaks::eventually(&client, "it is brought up again", |s| leaks::tier(s, Tier::Dram).positions >= 20).await;
    pressure(&ns, 300).await;
    assert_eq!(in_dram(&ns, "pinned").await, 20);
    // What is cut off is not pinned any more, nor is the rest in the end.
    let pinned = async || client.stats(&call).await.unwrap().counters["kvkeep_pinned_positions"];
    assert_eq!(pinned().await, 20);
    ns.sessions().truncate("pinned", 15, false, &call).await.unwrap();
    assert_eq!(pinned().await, 15);
    assert_eq!(ns.sessions().unpin("pinned", &call).await.unwrap().pinned, None);
    assert_eq!(pinned().await, 0);
    is_refused(ns.sessions().pin("pinned", Tier::Hbm, &call).await, ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn more_pins_than_a_tenant_may_have_are_refused_by_name() {
    let node = Node::start(Options { limits: "pinned_positions_max = 30\n".into(), ..Options::default() });
    let ns = namespace(&node).await;
    let (sessions, call) = (ns.sessions(), Call::default());
    filled(&ns, "a", Class::Durable, 1, 20).await;
    filled(&ns, "b", Class::Durable, 2, 11).await;
    sessions.pin("a", Tier::Dram, &call).await.unwrap();
    let refused = is_refused(sessions.pin("b", Tier::Nvme, &call).await, ErrorKind::TooLarge);
    assert_eq!(says(&refused, "limits.pinned_positions_max"), "30");
    assert_eq!(sessions.get("b", &call).await.unwrap().pinned, None);
    // Nor may a pinned session grow beyond it.
    let more = payload::chain(3, 11);
    super::super::store(&ns, &more, BYTES, Class::Cache).await;
    let refused = is_refused(append(&ns, "a", 20, &more).await, ErrorKind::TooLarge);
    assert_eq!(says(&refused, "limits.pinned_positions_max"), "30");
    assert_eq!(append(&ns, "a", 20, &more[..10]).await.unwrap().positions, 30);
    sessions.unpin("a", &call).await.unwrap();
    append(&ns, "a", 30, &more[10..]).await.unwrap();
    sessions.pin("b", Tier::Nvme, &call).await.unwrap();
}

#[tokio::test]
async fn a_restore_after_a_restart_brings_all_of_it_to_dram_and_its_lease_holds() {
    const POSITIONS: u64 = 24;
    let options = Options {
        arena_bytes: 64 << 20,
        nvme_bytes: 512 << 20,
        nvme: "warm_bytes_per_s = 0\n".into(),
        ..Options::default()
    };
    let mut node = Node::start(options);
    let ns = namespace(&node).await;
    let keys = payload::chain(1, POSITIONS);
    open(&ns, "a", Class::Durable).await;
    super::super::store(&ns, &keys, 1 << 20, Class::Cache).await;
    let token_ids: Vec<u32> = (0..POSITIONS as u32 * formats::TOKENS_PER_KEY + 5).collect();
    let wish = Append { keys: keys.clone(), token_ids, ..Append::default() };
    ns.sessions().append("a", &wish, &Call::default()).await.unwrap();
    node.kill();
    super::super::restart::forget_memory(&node);
    node.restart();
    let ns = namespace(&node).await;
    let call = Call::default();
    assert_eq!(in_dram(&ns, "a").await, 0, "it is on NVMe only");
    let wish = Restore { lease: Some(Duration::from_secs(60)), ..Restore::default() };
    let mut restoring = ns.sessions().restore("a", &wish, &call).await.unwrap();
    let (mut told, mut last) = (0, 0);
    while let Some(progress) = restoring.progress().await.unwrap() {
        assert!(progress.positions >= last && progress.total_positions == POSITIONS, "{progress:?}");
        last = progress.positions;
        told += 1;
    }
    let restored = restoring.finish().await.unwrap();
    assert!(told > 0, "nothing was told on the way");
    assert!(restored.is_whole() && !restored.late, "{restored:?}");
    assert_eq!((restored.usable_positions, restored.progress.bytes), (POSITIONS, POSITIONS << 20));
    assert_eq!(restored.progress.total_bytes, POSITIONS << 20);
    assert_eq!((restored.compute_from_token, restored.tokens), (384, 389));
    assert_eq!(in_dram(&ns, "a").await, POSITIONS as usize);
    // Leased: it stays although much more comes.
    let lease = restored.lease.expect("a lease was asked for");
    pressure(&ns, 100).await;
    assert_eq!(in_dram(&ns, "a").await, POSITIONS as usize, "leased and gone");
    let items: Vec<_> = keys.iter().map(|k| kvkeep_client::GetItem::of(k.clone())).collect();
    assert!(ns.get(&items, Some(lease), &call).await.unwrap().iter().all(|p| p.is_hit()));
    ns.release(&[lease], &[], &call).await.unwrap();
    leaks::nothing_is_held(&node.client().await).await;
}

/// The deadline ends it: what is up by then is up, and that it is not all is said.
#[tokio::test]
async fn a_session_larger_than_dram_is_restored_as_far_as_there_is_room_and_that_is_said() {
    const POSITIONS: u64 = 90;
    let options = Options { arena_bytes: 64 << 20, nvme_bytes: 512 << 20, ..Options::default() };
    let node = Node::start(options);
    let ns = namespace(&node).await;
    open(&ns, "a", Class::Durable).await;
    let keys = payload::chain(1, POSITIONS);
    for (n, some) in keys.chunks(10).enumerate() {
        super::super::store(&ns, some, 1 << 20, Class::Cache).await;
        append(&ns, "a", n as u64 * 10, some).await.unwrap();
    }
    let wish = Restore { lease: Some(Duration::from_secs(60)), ..Restore::default() };
    let call = Call::default().within(Duration::from_secs(5));
    let restored = ns.sessions().restore("a", &wish, &call).await.unwrap().finish().await.unwrap();
    assert!(restored.late && !restored.is_whole(), "{restored:?}");
    assert!(restored.progress.positions < POSITIONS && restored.missing.is_empty(), "{restored:?}");
    assert_eq!(restored.usable_positions, POSITIONS, "all of it is here, on NVMe");
    let manifest = ns.sessions().manifest_all("a", &Call::default()).await.unwrap();
    let head = manifest.iter().take_while(|p| p.tier == Some(Tier::Dram)).count() as u64;
    assert!(head > POSITIONS / 3, "its head is in DRAM, {head} of {}", restored.progress.positions);
    assert_eq!(found(&ns, &keys, 1 << 20).await, POSITIONS as usize);
}

#[tokio::test]
async fn a_restore_without_a_block_says_which_why_and_from_which_token_to_compute() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let keys = filled(&ns, "a", Class::Durable, 1, 40).await;
    let call = Call::default();
    ns.remove(&[&keys[20..23], &keys[30..31]].concat(), &call).await.unwrap();
    let restored = ns.sessions().restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert_eq!((restored.usable_positions, restored.compute_from_token), (20, 320));
    assert_eq!((restored.progress.positions, restored.late, restored.revision_matches), (20, false, true));
    let runs: Vec<_> = restored.missing.iter().map(|r| (r.first_position, r.count, r.reason)).collect();
    assert_eq!(runs, [(20, 3, Some(MissReason::Removed)), (30, 1, Some(MissReason::Removed))]);
    assert!(restored.missing.iter().all(|r| r.why == "it was removed"), "{restored:?}");
    // Put again, it is whole: a manifest names what is put under the key.
    super::super::store(&ns, &[&keys[20..23], &keys[30..31]].concat(), BYTES, Class::Cache).await;
    let restored = ns.sessions().restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert!(restored.is_whole(), "{restored:?}");
    is_refused(
        ns.sessions().restore("none", &Restore::default(), &call).await.unwrap().finish().await,
        ErrorKind::UnknownSession,
    );
}

#[tokio::test]
async fn new_weights_take_the_token_ids_over_and_the_session_begins_anew() {
    let mut node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let call = Call::default();
    filled(&ns, "a", Class::Durable, 1, 10).await;
    let token_ids: Vec<u32> = (0..170).collect();
    let tokens = Append { from_position: 10, token_ids: token_ids.clone(), ..Append::default() };
    ns.sessions().append("a", &tokens, &call).await.unwrap();
    let new = ns.advance_revision("weights-2", &call).await.unwrap();
    let new: Namespace = ns.client().attach(new.handle);

    let sessions = new.sessions();
    let info = sessions.get("a", &call).await.unwrap();
    assert_eq!((info.revision_matches, info.positions, info.tokens), (false, 10, 170));
    let restored = sessions.restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert_eq!((restored.revision_matches, restored.usable_positions, restored.compute_from_token), (false, 0, 0));
    assert_eq!(restored.missing[0].reason, Some(MissReason::Revision));
    assert_eq!(restored.missing[0].count, 10);
    assert_eq!(sessions.tokens_all("a", &call).await.unwrap().ids, token_ids);
    let keys: Vec<Bytes> = payload::chain(7, 10);
    super::super::store(&new, &keys, BYTES, Class::Cache).await;
    is_refused(append(&new, "a", 10, &keys).await, ErrorKind::StaleRevision);
    is_refused(append(&ns, "a", 10, &keys).await, ErrorKind::StaleRevision);
    is_refused(sessions.truncate("a", 5, true, &call).await, ErrorKind::StaleRevision);
    is_refused(ns.sessions().truncate("a", 0, true, &call).await, ErrorKind::StaleRevision);

    let cut = sessions.truncate("a", 0, true, &call).await.unwrap();
    assert_eq!((cut.revision_matches, cut.positions, cut.tokens), (true, 0, 170));
    assert_eq!(append(&new, "a", 0, &keys).await.unwrap().positions, 10);
    node.kill();
    node.restart();
    let new = node.client().await.attach(new.handle);
    let restored = new.sessions().restore("a", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert!(restored.is_whole() && restored.usable_positions == 10, "{restored:?}");
    assert_eq!(new.sessions().tokens_all("a", &call).await.unwrap().ids, token_ids);
}

/// A session that has ended leaves DRAM before anybody wants its room; it stays on NVMe, and `explain` says what it was worth.
#[tokio::test]
async fn a_finished_session_goes_down_early_and_can_be_restored() {
    let options = Options { arena_bytes: 128 << 20, nvme_bytes: 512 << 20, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::super::namespace(&client, &formats::any_size(1 << 20)).await;
    let call = Call::default();
    filled(&ns, "finished", Class::Durable, 1, 12).await;
    filled(&ns, "goes on", Class::Durable, 2, 12).await;
    assert_eq!((in_dram(&ns, "finished").await, in_dram(&ns, "goes on").await), (12, 12));
    assert_eq!(ns.sessions().hint("finished", &[SessionHint::Finished], &call).await.unwrap(), 12);
    let until = std::time::Instant::now() + Duration::from_secs(30);
    while in_dram(&ns, "finished").await > 0 {
        assert!(std::time::Instant::now() < until, "it stays in DRAM: {}", node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(in_dram(&ns, "goes on").await, 12, "nobody wanted its room");
    assert_eq!(client.stats(&call).await.unwrap().counters["kvkeep_finished_positions_total"], 12);
    let explained = ns.explain(&payload::chain(1, 1)[0], &call).await.unwrap();
    let demoted = explained.history.iter().find(|h| h.what == "demoted").expect("it went down");
    assert!(demoted.index_value.is_some_and(|worth| worth >= 0.0), "{demoted:?}");
    assert!(explained.position.and_then(|p| p.index_value).is_some());

    // Restored it is in use again, and stays.
    let restored = ns.sessions().restore("finished", &Restore::default(), &call).await.unwrap().finish().await.unwrap();
    assert!(restored.is_whole(), "{restored:?}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(in_dram(&ns, "finished").await, 12);
}

/// Two sessions that are used alike: the one of a high priority stays in DRAM while the other makes room, also after a
/// restart, until its priority is taken back.
#[tokio::test]
async fn of_two_sessions_used_alike_the_one_of_a_low_priority_makes_room() {
    let options = Options { arena_bytes: 64 << 20, nvme_bytes: 512 << 20, ..Options::default() };
    let node = Node::start(options);
    let client = node.client().await;
    let ns = super::super::namespace(&client, &formats::any_size(1 << 20)).await;
    let call = Call::default();
    // The one that is to stay is the older one: by age alone it would go first.
    filled(&ns, "high", Class::Durable, 1, 8).await;
    filled(&ns, "low", Class::Durable, 2, 8).await;
    assert_eq!(ns.sessions().hint("high", &[SessionHint::Priority(1)], &call).await.unwrap(), 8);
    ns.sessions().hint("low", &[SessionHint::Priority(-1)], &call).await.unwrap();
    assert_eq!(ns.sessions().get("low", &call).await.unwrap().priority, -1);
    let worth = async |chain: u64| {
        let explained = ns.explain(&payload::chain(chain, 1)[0], &call).await.unwrap();
        explained.position.and_then(|p| p.index_value).expect("it is here")
    };
    let mut round = 100;
    while in_dram(&ns, "low").await > 0 {
        pressure_of(&ns, round, 1).await;
        round += 1;
        assert!(round < 200, "the session of a low priority never makes room");
    }
    assert_eq!(in_dram(&ns, "high").await, 8, "worth {} beside {}", worth(1).await, worth(2).await);
    // What is appended has the priority of its session.
    let more = payload::chain(3, 1);
    super::super::store(&ns, &more, BYTES, Class::Cache).await;
    let before = worth(3).await;
    append(&ns, "high", 8, &more).await.unwrap();
    assert!(worth(3).await > 2.0 * before, "{} beside {before}", worth(3).await);
}
