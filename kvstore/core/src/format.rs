//! How the KV of one model looks: the declaration a namespace is registered with.
//!
//! ```text
//! Format ─┬─ model, dtype, layout, hash algorithm and seed, tokens per key, topology
//!         └─ Group 0..n ─┬─ rule: all | window(tokens) | state
//!                        ├─ tokens per block (a multiple of tokens per key)
//!                        └─ shards, replicated?, size per shard
//! ```
//! A group whose blocks span `k` keys has its part at every `k`-th position of a chain.

use std::fmt;
use std::hash::Hasher as _;

use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher24};

use crate::error::{Error, ErrorKind, Result};
use crate::ids::{GroupId, ShardId};

/// Smallest block, in bytes.
pub const BLOCK_BYTES_MIN: u64 = 1024;
/// Largest block, in bytes.
pub const BLOCK_BYTES_MAX: u64 = 128 * 1024 * 1024;
/// Most groups of one format.
pub const GROUPS_MAX: usize = 64;
/// Most shards of one group.
pub const SHARDS_MAX: u16 = 1024;
/// Most tokens per key.
pub const TOKENS_PER_KEY_MAX: u32 = 65_536;
/// Longest text field, in bytes.
pub const TEXT_BYTES_MAX: usize = 256;

/// Which blocks of a group a boundary needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Every block from the start (full attention, MLA).
    All,
    /// The blocks that cover the last so many tokens (sliding window).
    Window {
        /// Tokens of the window.
        tokens: u32,
    },
    /// The one block that ends at the boundary (recurrent state).
    State,
}

/// What sizes a shard's block may have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SizeRule {
    /// Always this size.
    Exact(u64),
    /// Any multiple of `step` up to `max` (partly filled blocks).
    MultipleOf {
        /// Bytes of one unit.
        step: u64,
        /// Largest size.
        max: u64,
    },
    /// Anything up to this.
    UpTo(u64),
}

impl SizeRule {
    /// Largest size the rule allows, in bytes.
    pub fn max(self) -> u64 {
        match self {
            Self::Exact(n) | Self::UpTo(n) | Self::MultipleOf { max: n, .. } => n,
        }
    }

    /// Whether a block of `len` bytes obeys it.
    pub fn allows(self, len: u64) -> bool {
        len > 0
            && match self {
                Self::Exact(n) => len == n,
                Self::MultipleOf { step, max } => len <= max && len.is_multiple_of(step),
                Self::UpTo(n) => len <= n,
            }
    }
}

impl fmt::Display for SizeRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(n) => write!(f, "exactly {n} bytes"),
            Self::MultipleOf { step, max } => write!(f, "a multiple of {step} up to {max} bytes"),
            Self::UpTo(n) => write!(f, "1 to {n} bytes"),
        }
    }
}

/// How the model was cut for the engine that made the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Topology {
    /// Bytes do not depend on the cut: engines of different sizes share them. The sizes are then 1.
    pub canonical: bool,
    /// Tensor-parallel size.
    pub tp: u16,
    /// Pipeline-parallel size.
    pub pp: u16,
    /// Context-parallel size.
    pub cp: u16,
}

/// One group of layers that share a rule and a block size.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// Which blocks a boundary needs.
    pub rule: Rule,
    /// Tokens of one block; a multiple of the format's tokens per key.
    pub tokens_per_block: u32,
    /// Parts per position: one per rank, or 1 where `replicated`.
    pub shards: u16,
    /// Every rank holds the same bytes (MLA): stored once, as shard 0.
    pub replicated: bool,
    /// Sizes of one shard's block.
    pub size: SizeRule,
}

/// The declaration of one model's KV. Never holds a rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Format {
    /// Model id, as the engine names it.
    pub model: String,
    /// Element type of the cached bytes (`bf16`, `fp8_e4m3` ...).
    pub dtype: String,
    /// Engine and layout of one block (`vllm-BLHNC` ...).
    pub layout: String,
    /// What makes the keys (`sha256_cbor`, `xxh3_128` ...).
    pub hash_algorithm: String,
    /// The hash's seed, as text.
    pub hash_seed: String,
    /// Tokens that one key covers.
    pub tokens_per_key: u32,
    /// How the model was cut.
    pub topology: Topology,
    /// The groups, in the order that [`GroupId`] counts.
    pub groups: Vec<Group>,
    /// Declared cost of computing one token, in microseconds; 0: not said. Not part of the fingerprint.
    #[serde(default)]
    pub prefill_us_per_token: u32,
    /// Tokens of context at which one more token costs twice as much to compute as the first one does; 0: not said, the same
    /// everywhere. (Attention: about `2 x parameters / (4 x layers x width)`, 30,000 for a model of 8 billion.) Not part of the
    /// fingerprint.
    #[serde(default)]
    pub prefill_doubles_at_tokens: u32,
}

impl Format {
    /// Declared time to compute the first `tokens` of a prompt, microseconds; 0: not declared.
    #[must_use]
    pub fn prefill_us(&self, tokens: u64) -> u64 {
        let linear = tokens.saturating_mul(u64::from(self.prefill_us_per_token));
        match u64::from(self.prefill_doubles_at_tokens) {
            0 => linear,
            doubles => {
                // The sum of 1 + i / doubles over i below tokens.
                let growth = u128::from(linear) * u128::from(tokens.saturating_sub(1)) / (2 * u128::from(doubles));
                linear.saturating_add(u64::try_from(growth).unwrap_or(u64::MAX))
            }
        }
    }

    /// Bytes that one token takes in all groups and shards, blocks counted as large as they may be.
    #[must_use]
    pub fn bytes_per_token(&self) -> f64 {
        let of = |g: &Group| g.size.max() as f64 * f64::from(g.shards) / f64::from(g.tokens_per_block);
        self.groups.iter().map(of).sum()
    }
}

/// 128-bit digest of everything in a format but its declared cost.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 16]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl Format {
    /// Checks every field and the relations between them; the error names what disagrees.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: &'static str| Error::new(ErrorKind::InvalidArgument, what);
        for (name, text, required) in [
            ("model", &self.model, true),
            ("dtype", &self.dtype, true),
            ("layout", &self.layout, true),
            ("hash_algorithm", &self.hash_algorithm, true),
            ("hash_seed", &self.hash_seed, false),
        ] {
            if (required && text.is_empty()) || text.len() > TEXT_BYTES_MAX {
                return Err(bad("a text field of the format has 1 to 256 bytes")
                    .with("field", name)
                    .with("bytes", text.len()));
            }
        }
        if self.tokens_per_key == 0 || self.tokens_per_key > TOKENS_PER_KEY_MAX {
            return Err(bad("tokens_per_key is 1 to 65536").with("tokens_per_key", self.tokens_per_key));
        }
        let t = self.topology;
        if t.tp == 0 || t.pp == 0 || t.cp == 0 {
            return Err(bad("topology sizes are at least 1"));
        }
        if t.canonical && (t.tp, t.pp, t.cp) != (1, 1, 1) {
            return Err(bad("a canonical topology has sizes 1").with("tp", t.tp).with("pp", t.pp).with("cp", t.cp));
        }
        if self.groups.is_empty() || self.groups.len() > GROUPS_MAX {
            return Err(bad("a format has 1 to 64 groups").with("groups", self.groups.len()));
        }
        for (i, g) in self.groups.iter().enumerate() {
            self.validate_group(g).map_err(|e| e.with("group", i))?;
        }
        Ok(())
    }

    fn validate_group(&self, g: &Group) -> Result<()> {
        let bad = |what: &'static str| Error::new(ErrorKind::InvalidArgument, what);
        if g.tokens_per_block == 0 || !g.tokens_per_block.is_multiple_of(self.tokens_per_key) {
            return Err(bad("tokens_per_block is a multiple of tokens_per_key")
                .with("tokens_per_block", g.tokens_per_block)
                .with("tokens_per_key", self.tokens_per_key));
        }
        if g.shards == 0 || g.shards > SHARDS_MAX || (g.replicated && g.shards != 1) {
            return Err(bad("a group has 1 to 1024 shards, a replicated one exactly 1").with("shards", g.shards));
        }
        if let Rule::Window { tokens: 0 } = g.rule {
            return Err(bad("a window has at least 1 token"));
        }
        if let SizeRule::MultipleOf { step, max } = g.size
            && (step == 0 || !max.is_multiple_of(step))
        {
            return Err(bad("max size is a multiple of the step, which is at least 1")
                .with("step", step)
                .with("max", max));
        }
        let max = g.size.max();
        if !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&max) {
            return Err(bad("the largest block of a group has 1 KiB to 128 MiB").with("bytes", max));
        }
        Ok(())
    }

    /// The digest that says whether two declarations are the same.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut h = SipHasher24::new();
        for text in [&self.model, &self.dtype, &self.layout, &self.hash_algorithm, &self.hash_seed] {
            h.write(&(text.len() as u64).to_le_bytes());
            h.write(text.as_bytes());
        }
        let t = self.topology;
        let mut words: Vec<u64> = vec![
            u64::from(self.tokens_per_key),
            u64::from(t.canonical),
            u64::from(t.tp),
            u64::from(t.pp),
            u64::from(t.cp),
        ];
        for g in &self.groups {
            words.extend(match g.rule {
                Rule::All => [1, 0],
                Rule::Window { tokens } => [2, u64::from(tokens)],
                Rule::State => [3, 0],
            });
            words.extend([u64::from(g.tokens_per_block), u64::from(g.shards), u64::from(g.replicated)]);
            words.extend(match g.size {
                SizeRule::Exact(n) => [1, n, 0],
                SizeRule::MultipleOf { step, max } => [2, step, max],
                SizeRule::UpTo(n) => [3, n, 0],
            });
        }
        words.iter().for_each(|w| h.write(&w.to_le_bytes()));
        Fingerprint(h.finish128().as_bytes())
    }

    /// Names of the fields in which `self` and `other` differ; empty when their fingerprints agree.
    pub fn differences(&self, other: &Format) -> Vec<String> {
        let mut out = Vec::new();
        let mut note = |name: &str, differs: bool| {
            if differs {
                out.push(name.to_string());
            }
        };
        note("model", self.model != other.model);
        note("dtype", self.dtype != other.dtype);
        note("layout", self.layout != other.layout);
        note("hash_algorithm", self.hash_algorithm != other.hash_algorithm);
        note("hash_seed", self.hash_seed != other.hash_seed);
        note("tokens_per_key", self.tokens_per_key != other.tokens_per_key);
        note("topology", self.topology != other.topology);
        note("groups", self.groups.len() != other.groups.len());
        for (i, (a, b)) in self.groups.iter().zip(&other.groups).enumerate() {
            note(&format!("groups[{i}].rule"), a.rule != b.rule);
            note(&format!("groups[{i}].tokens_per_block"), a.tokens_per_block != b.tokens_per_block);
            note(&format!("groups[{i}].shards"), a.shards != b.shards);
            note(&format!("groups[{i}].replicated"), a.replicated != b.replicated);
            note(&format!("groups[{i}].size"), a.size != b.size);
        }
        out
    }

    /// Positions that one block of group `g` spans (its `k`); at least 1.
    pub fn positions_per_block(&self, g: &Group) -> u32 {
        (g.tokens_per_block / self.tokens_per_key.max(1)).max(1)
    }

    /// The parts of position `index` of a chain (0-based), in (group, shard) order: those of every group with a block
    /// ending there.
    pub fn parts_at(&self, index: u32) -> impl Iterator<Item = (GroupId, ShardId)> + '_ {
        let end = u64::from(index) + 1;
        self.groups
            .iter()
            .enumerate()
            .filter(move |(_, g)| end.is_multiple_of(u64::from(self.positions_per_block(g))))
            .flat_map(|(i, g)| (0..g.shards).map(move |s| (GroupId(i as u16), ShardId(s))))
    }

    /// The group, or a clear error.
    pub fn group(&self, id: GroupId) -> Result<&Group> {
        self.groups.get(usize::from(id.0)).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, "the format has no such group")
                .with("group", id)
                .with("groups", self.groups.len())
        })
    }

    /// Checks that a part with these coordinates and length may stand at position `index`.
    pub fn check_part(&self, index: u32, group: GroupId, shard: ShardId, len: u64) -> Result<()> {
        let g = self.group(group)?;
        if shard.0 >= g.shards {
            return Err(Error::new(ErrorKind::InvalidArgument, "the group has no such shard")
                .with("group", group)
                .with("shard", shard)
                .with("shards", g.shards));
        }
        if !(u64::from(index) + 1).is_multiple_of(u64::from(self.positions_per_block(g))) {
            return Err(Error::new(ErrorKind::InvalidArgument, "no block of this group ends at this position")
                .with("group", group)
                .with("position", index)
                .with("positions_per_block", self.positions_per_block(g)));
        }
        if !g.size.allows(len) {
            return Err(Error::new(ErrorKind::WrongSize, "the part's size is not what its format says")
                .with("group", group)
                .with("bytes", len)
                .with("allowed", g.size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format() -> Format {
        Format {
            model: "m".into(),
            dtype: "bf16".into(),
            layout: "l".into(),
            hash_algorithm: "sha256".into(),
            hash_seed: String::new(),
            tokens_per_key: 16,
            topology: Topology { canonical: false, tp: 2, pp: 1, cp: 1 },
            groups: vec![
                Group {
                    rule: Rule::All,
                    tokens_per_block: 16,
                    shards: 2,
                    replicated: false,
                    size: SizeRule::Exact(4096),
                },
                Group {
                    rule: Rule::Window { tokens: 64 },
                    tokens_per_block: 64,
                    shards: 1,
                    replicated: true,
                    size: SizeRule::MultipleOf { step: 512, max: 8192 },
                },
            ],
            prefill_us_per_token: 0,
            prefill_doubles_at_tokens: 0,
        }
    }

    type Change = Box<dyn Fn(&mut Format)>;

    /// Changes every field once: each change is named and changes the fingerprint.
    #[test]
    fn any_changed_field_is_named_and_changes_the_fingerprint() {
        let base = format();
        base.validate().unwrap();
        let changes: Vec<(&str, Change)> = vec![
            ("model", Box::new(|f| f.model = "n".into())),
            ("dtype", Box::new(|f| f.dtype = "fp8".into())),
            ("layout", Box::new(|f| f.layout = "k".into())),
            ("hash_algorithm", Box::new(|f| f.hash_algorithm = "x".into())),
            ("hash_seed", Box::new(|f| f.hash_seed = "1".into())),
            ("tokens_per_key", Box::new(|f| f.tokens_per_key = 8)),
            ("topology", Box::new(|f| f.topology.tp = 4)),
            ("groups", Box::new(|f| f.groups.truncate(1))),
            ("groups[1].rule", Box::new(|f| f.groups[1].rule = Rule::State)),
            ("groups[1].tokens_per_block", Box::new(|f| f.groups[1].tokens_per_block = 32)),
            ("groups[0].shards", Box::new(|f| f.groups[0].shards = 3)),
            ("groups[1].replicated", Box::new(|f| f.groups[1].replicated = false)),
            ("groups[0].size", Box::new(|f| f.groups[0].size = SizeRule::UpTo(4096))),
        ];
        for (field, change) in changes {
            let mut other = base.clone();
            change(&mut other);
            assert_eq!(base.differences(&other), vec![field.to_string()]);
            assert_ne!(base.fingerprint(), other.fingerprint(), "{field}");
        }
        let mut cost = base.clone();
        (cost.prefill_us_per_token, cost.prefill_doubles_at_tokens) = (7, 1000);
        assert_eq!(base.fingerprint(), cost.fingerprint());
    }

    /// Against the sum, token by token.
    #[test]
    fn the_declared_cost_of_a_prompt_grows_with_its_context() {
        let mut f = format();
        assert_eq!(f.prefill_us(1000), 0);
        f.prefill_us_per_token = 60;
        assert_eq!(f.prefill_us(1000), 60_000);
        f.prefill_doubles_at_tokens = 500;
        let sum: f64 = (0..1000).map(|i| 60.0 * (1.0 + f64::from(i) / 500.0)).sum();
        assert_eq!(f.prefill_us(1000), sum as u64);
        assert_eq!(f.prefill_us(u64::MAX), u64::MAX);
        // 2 x 4,096 bytes for 16 tokens, 8,192 for 64.
        assert_eq!(f.bytes_per_token(), 640.0);
    }

    /// A group with blocks of four keys has its part at every fourth position.
    #[test]
    fn parts_stand_where_their_blocks_end() {
        let f = format();
        assert_eq!(f.parts_at(0).count(), 2);
        assert_eq!(f.parts_at(3).count(), 3);
        assert!(f.check_part(0, GroupId(1), ShardId(0), 512).is_err());
        assert!(f.check_part(3, GroupId(1), ShardId(0), 512).is_ok());
        assert_eq!(f.check_part(3, GroupId(0), ShardId(1), 4095).unwrap_err().kind(), ErrorKind::WrongSize);
        assert!(f.check_part(3, GroupId(0), ShardId(2), 4096).is_err());
    }
}
