//! A trace through the directory and the policy of a node with two tiers, the lower one inclusive, without a node.
//!
//! A request hits its longest prefix that either tier has; each block of it counts for the tier that it was found in, and
//! what was found below comes up. What was not found is put into DRAM and written to NVMe. Then victims leave, from NVMe
//! and from DRAM, until both capacities hold: a block that leaves NVMe may still be in DRAM.

use kvkeep_core::directory::{Directory, DirectoryLimits, Inserted, Placed, Victim};
use kvkeep_core::{BlockId, GroupId, Instant, MissReason, NvmePlace, PolicyKind, ShardId, SlotRef, Tier};

use super::Found;
use crate::policy::replay::{Prepared, Turn, format, meta};

/// Blocks that each tier may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The upper tier.
    pub dram: usize,
    /// The lower tier.
    pub nvme: usize,
}

/// Replays through a directory whose tiers may hold so many blocks.
///
/// # Errors
/// The directory refused a block, or had no victim: a fault of one of the two.
pub fn simulate(trace: &Prepared, kind: PolicyKind, room: Blocks, tick: &mut dyn FnMut()) -> Result<Found, String> {
    let format = format(trace.tokens_per_block);
    let mut directory = Directory::new(DirectoryLimits::default(), kind);
    let mut meta = meta(trace.tokens_per_block);
    let mut held = Blocks { dram: 0, nvme: 0 };
    let mut found = Found::default();
    for turn in &trace.turns {
        let now = Instant(turn.at_ms);
        let tiers = tiers_of(&directory, trace, turn);
        for (position, tier) in tiers.iter().enumerate() {
            found.add(trace.tokens(turn, position + 1) - trace.tokens(turn, position), *tier);
        }
        // The deepest first, as a lease does.
        for block in turn.blocks[..tiers.len()].iter().rev() {
            directory.access(trace.digest(*block), &turn.info, now);
        }
        for (position, tier) in tiers.iter().enumerate().filter(|(_, tier)| **tier == Tier::Nvme) {
            trace.describe(turn, position, &mut meta);
            if !directory.set_slot(&meta.id, meta.version, slot(turn.blocks[position])) {
                return Err(format!("a block on {tier} alone does not come up"));
            }
            held.dram += 1;
        }
        for (position, block) in turn.blocks.iter().enumerate().skip(tiers.len()) {
            trace.describe(turn, position, &mut meta);
            match directory.insert(&meta, &format, Placed::Dram(slot(*block)), &turn.info, now) {
                Ok(Inserted::Stored) => held.dram += 1,
                // Behind a hole: a chain whose head left both tiers before its tail did.
                Ok(Inserted::Exists { .. }) => continue,
                Ok(other) => return Err(format!("block {block} was here already: {other:?}")),
                Err(e) => return Err(e.to_string()),
            }
            held.nvme += usize::from(directory.set_nvme(&meta.id, meta.version, place(*block)));
        }
        while held.nvme > room.nvme {
            held.nvme -= evict(&mut directory, Tier::Nvme, now)?;
        }
        while held.dram > room.dram {
            held.dram -= evict(&mut directory, Tier::Dram, now)?;
        }
        tick();
    }
    Ok(found)
}

/// Where the longest prefix of a turn is, block by block.
fn tiers_of(directory: &Directory, trace: &Prepared, turn: &Turn) -> Vec<Tier> {
    let here = |block: &u32| {
        let found = directory.locate(trace.digest(*block), GroupId(0), ShardId(0))?;
        Some(if found.slot.is_some() { Tier::Dram } else { Tier::Nvme })
    };
    turn.blocks.iter().map_while(here).collect()
}

/// Lets the next victim of a tier go; how many copies that were.
fn evict(directory: &mut Directory, tier: Tier, now: Instant) -> Result<usize, String> {
    let Victim { digest, parts, .. } = directory.victim(tier, now).ok_or("nothing may leave a tier without leases")?;
    for part in &parts {
        let id = BlockId { digest, group: part.group, shard: part.shard };
        match (tier, part.slot, part.place) {
            (Tier::Dram, Some(slot), _) => directory.drop_slot(&id, slot, MissReason::Evicted),
            (Tier::Nvme, _, Some(place)) => directory.drop_place(&id, place, MissReason::Evicted),
            _ => return Err(format!("a victim of {tier} without a copy there")),
        };
    }
    Ok(parts.len())
}

fn slot(block: u32) -> SlotRef {
    SlotRef::from_raw(u64::from(block) + 1).expect("not zero")
}

fn place(block: u32) -> NvmePlace {
    NvmePlace::from_raw(u64::from(block) + 1).expect("not zero")
}

#[cfg(test)]
mod tests {
    use kvkeep_core::RequestInfo;

    use super::*;
    use crate::policy::replay;

    /// Two sessions in turn, of 3 blocks of 512 tokens each (the last half full), then the first one again and again.
    fn trace() -> Prepared {
        let info = RequestInfo { input_tokens: 1280, ..RequestInfo::default() };
        let first = |at_ms| (at_ms, 1, info, vec![10, 11, 12]);
        let second = |at_ms| (at_ms, 2, info, vec![20, 21, 22]);
        let turns = [first(0), second(1_000), first(2_000), second(3_000), first(4_000)];
        Prepared::new(512, turns.into_iter())
    }

    fn run(dram: usize, nvme: usize) -> Found {
        simulate(&trace(), PolicyKind::Lru, Blocks { dram, nvme }, &mut || {}).unwrap()
    }

    #[test]
    fn what_dram_does_not_hold_is_found_below() {
        assert_eq!(run(6, 6), Found { dram_tokens: 3 * 1280, nvme_tokens: 0 });
        assert_eq!(run(3, 6), Found { dram_tokens: 0, nvme_tokens: 3 * 1280 });
        // Leaf first: of the chain that goes its head stays longest.
        assert_eq!(run(4, 6), Found { dram_tokens: 3 * 512, nvme_tokens: 3 * 768 });
    }

    #[test]
    fn what_neither_holds_is_a_miss() {
        assert_eq!(run(3, 3), Found::default());
        let both = run(3, 4);
        assert_eq!(both.tokens(), 3 * 512);
    }

    /// With the same policy on both tiers the total is that of the lower one alone, and DRAM's part that of the upper one.
    #[test]
    fn each_tier_serves_what_it_would_alone() {
        let turns = (0..400u64).map(|n| {
            let session = n * 7919 % 23;
            let info = RequestInfo { input_tokens: 512 * 5, ..RequestInfo::default() };
            (n * 1_000, session, info, (0..5).map(|i| session * 10 + i).collect())
        });
        let trace = Prepared::new(512, turns);
        let alone = |blocks| replay::replay(&trace, PolicyKind::Lru, false, blocks, &mut || {}).unwrap().tokens;
        let both = simulate(&trace, PolicyKind::Lru, Blocks { dram: 40, nvme: 100 }, &mut || {}).unwrap();
        assert_eq!((both.dram_tokens, both.tokens()), (alone(40), alone(100)));
    }
}
