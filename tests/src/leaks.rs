//! What must be true of a node that nobody uses any more.

use std::time::{Duration, Instant};

use kvkeep_client::{Call, Client};
use kvkeep_core::Tier;
use kvkeep_proto::v1;

use crate::Node;

/// Longest wait for what frees itself: grace periods and deadlines in tests are shorter.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until nothing is reserved and nothing is leased.
///
/// # Panics
/// If that does not happen.
pub async fn nothing_is_held(client: &Client) {
    eventually(client, "reservations and leases end", |s| {
        s.reservations == 0 && s.reserved_bytes == 0 && s.leases == 0 && s.leased_positions == 0
    })
    .await;
}

/// Waits until nothing is held and no tier has a byte in use.
///
/// # Panics
/// If that does not happen.
pub async fn nothing_is_left(client: &Client) {
    nothing_is_held(client).await;
    eventually(client, "every slot and every extent comes back", |s| {
        s.positions == 0 && s.blocks == 0 && s.tiers.iter().all(|t| t.used_bytes == 0)
    })
    .await;
}

/// Waits until the numbers of the server are as wanted.
///
/// # Panics
/// If they are not in time.
pub async fn eventually(client: &Client, what: &str, wanted: impl Fn(&v1::StatsReply) -> bool) {
    let since = Instant::now();
    loop {
        let stats = client.stats(&Call::default()).await.expect("a healthy node tells its numbers");
        if wanted(&stats) {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "it does not come true that {what}: {stats:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One tier's numbers.
///
/// # Panics
/// If the server does not tell them.
pub fn tier(stats: &v1::StatsReply, tier: Tier) -> &v1::TierStats {
    let number = i32::from(tier.code());
    stats.tiers.iter().find(|t| t.tier == number).unwrap_or_else(|| panic!("no numbers for {tier}: {stats:?}"))
}

/// Nothing lies in the data folder but what a node keeps there.
///
/// # Panics
/// If something else does.
pub fn no_stray_files(node: &Node) {
    const KNOWN: [&str; 6] = ["lock", "raft", "nvme", "warm-set", "policy", "kvkeepd.sock"];
    for name in names(&node.data_dir()) {
        assert!(KNOWN.contains(&name.as_str()), "a stray file in the data folder: {name}");
    }
    let segments = node.segments_dir();
    let bytes: u64 = names(&segments)
        .iter()
        .map(|name| std::fs::metadata(segments.join(name)).expect("a segment can be measured").len())
        .sum();
    let capacity = node.options().nvme_bytes;
    assert!(bytes <= capacity, "segment files take {bytes} bytes, more than the {capacity} that were allowed");
    let arenas = names(node.arena_dir());
    assert!(arenas.len() <= 1, "one node has one folder of arena files, not {arenas:?}");
}

/// The names in a folder; none where it does not exist.
pub fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}
