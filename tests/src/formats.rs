//! Formats that tests use.

use kvkeep_core::{Format, Group, Rule, SizeRule, Topology};

/// Tokens of one key in every format here.
pub const TOKENS_PER_KEY: u32 = 16;

/// One group that needs every block, one shard, blocks of exactly so many bytes.
pub fn plain(block_bytes: u64) -> Format {
    of(vec![group(Rule::All, 1, 1, SizeRule::Exact(block_bytes))])
}

/// One group that needs every block, one shard, blocks of any size up to so many bytes.
pub fn any_size(block_bytes_max: u64) -> Format {
    of(vec![group(Rule::All, 1, 1, SizeRule::UpTo(block_bytes_max))])
}

/// One group that needs every block, cut into so many shards.
pub fn sharded(shards: u16, block_bytes: u64) -> Format {
    of(vec![group(Rule::All, 1, shards, SizeRule::Exact(block_bytes))])
}

/// A hybrid model: full attention over two shards, a window of four keys, and a state every second key.
pub fn hybrid(block_bytes: u64) -> Format {
    of(vec![
        group(Rule::All, 1, 2, SizeRule::Exact(block_bytes)),
        group(Rule::Window { tokens: 4 * TOKENS_PER_KEY }, 1, 1, SizeRule::MultipleOf { step: 512, max: block_bytes }),
        group(Rule::State, 2, 1, SizeRule::UpTo(block_bytes)),
    ])
}

/// Any groups.
pub fn of(groups: Vec<Group>) -> Format {
    Format {
        model: "test-model".into(),
        dtype: "bf16".into(),
        layout: "test-NHD".into(),
        hash_algorithm: "sha256".into(),
        hash_seed: "0".into(),
        tokens_per_key: TOKENS_PER_KEY,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups,
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

fn group(rule: Rule, keys_per_block: u32, shards: u16, size: SizeRule) -> Group {
    Group { rule, tokens_per_block: keys_per_block * TOKENS_PER_KEY, shards, replicated: false, size }
}
