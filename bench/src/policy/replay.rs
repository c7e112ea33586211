//! A trace through the directory and the policy of a node, block by block, without a node: what would have been hits.
//!
//! Time is the trace's. A request hits its longest resident prefix; then all its blocks are touched or inserted, and
//! victims leave until the capacity holds (a block of the request itself may be one). Output tokens are not inserted:
//! they come back as the next turn's input.

use std::collections::HashMap;

use kvkeep_core::directory::{Directory, DirectoryLimits, Inserted, Placed};
use kvkeep_core::{
    BlockId, BlockMeta, ChunkSums, Class, Digest, DigestKey, Fidelity, Format, Group, GroupId, Handle, Instant, Key,
    KeyDomain, MissReason, NamespaceId, PolicyKind, RequestInfo, Revision, Rule, ShardId, SizeRule, SlotRef, TenantId,
    Tier, Topology, Version,
};

const HANDLE: Handle = Handle { namespace: NamespaceId(1), revision: Revision(1) };
/// Bytes of one token: those of a model of 8 billion parameters. Any number does, all blocks are alike.
const TOKEN_BYTES: u32 = 131_072;
/// What its prefill takes on one GPU, microseconds a token at the start of a prompt.
const PREFILL_US: u32 = 64;
/// Context at which a token takes twice that.
const PREFILL_DOUBLES_AT: u32 = 32_768;

/// One request of a prepared trace.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Milliseconds on the trace's clock.
    pub at_ms: u64,
    /// Dense number of its session.
    pub session: u32,
    /// What its client says with it.
    pub info: RequestInfo,
    /// Dense numbers of its prefix blocks.
    pub blocks: Vec<u32>,
}

/// A trace in memory, its ids made dense.
pub struct Prepared {
    /// In the order of time.
    pub turns: Vec<Turn>,
    /// Different blocks.
    pub unique: usize,
    /// Tokens that one block covers.
    pub tokens_per_block: u32,
    /// Of all requests together.
    pub input_tokens: u64,
    digests: Vec<Digest>,
}

impl Prepared {
    /// Of requests given as turns with any block ids and sessions.
    pub fn new(tokens_per_block: u32, requests: impl Iterator<Item = (u64, u64, RequestInfo, Vec<u64>)>) -> Self {
        let mut dense: HashMap<u64, u32> = HashMap::new();
        let mut sessions: HashMap<u64, u32> = HashMap::new();
        let mut turns = Vec::new();
        for (at_ms, session, info, ids) in requests {
            let next = sessions.len() as u32;
            let session = *sessions.entry(session).or_insert(next);
            let blocks = ids.into_iter().map(|id| {
                let next = dense.len() as u32;
                *dense.entry(id).or_insert(next)
            });
            turns.push(Turn { at_ms, session, info, blocks: blocks.collect() });
        }
        let key = DigestKey::from_bytes([7; 16]);
        let digest = |n: u32| key.digest(KeyDomain(0), HANDLE, &n.to_le_bytes());
        Self {
            unique: dense.len(),
            digests: (0..dense.len() as u32).map(digest).collect(),
            input_tokens: turns.iter().map(|t| u64::from(t.info.input_tokens)).sum(),
            turns,
            tokens_per_block,
        }
    }

    /// So many blocks are `percent` % of the different ones; one at least.
    pub fn blocks(&self, percent: f64) -> usize {
        ((self.unique as f64 * percent / 100.0).round() as usize).max(1)
    }

    /// What names a block in a directory.
    pub(crate) fn digest(&self, block: u32) -> &Digest {
        &self.digests[block as usize]
    }

    /// Makes `meta` that of the block at `position` of a turn.
    pub(crate) fn describe(&self, turn: &Turn, position: usize, meta: &mut BlockMeta) {
        meta.id.digest = *self.digest(turn.blocks[position]);
        meta.position = position as u32;
        meta.parent = position.checked_sub(1).map(|before| *self.digest(turn.blocks[before]));
    }

    /// Tokens that the first `blocks` blocks of a turn cover.
    pub fn tokens(&self, turn: &Turn, blocks: usize) -> u64 {
        (blocks as u64 * u64::from(self.tokens_per_block)).min(u64::from(turn.info.input_tokens))
    }
}

/// What a replay came to, of all requests together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hits {
    /// Input tokens that were hits.
    pub tokens: u64,
    /// Prefill time that they save, by the declared cost.
    pub saved_us: u64,
}

/// Replays through a directory that may hold `capacity` blocks; `declared`: the policy is told what prefill costs.
///
/// # Errors
/// The directory refused a block, or had no victim: a fault of one of the two.
pub fn replay(
    trace: &Prepared,
    kind: PolicyKind,
    declared: bool,
    capacity: usize,
    tick: &mut dyn FnMut(),
) -> Result<Hits, String> {
    let costly = declaring(trace.tokens_per_block);
    let format = if declared { costly.clone() } else { format(trace.tokens_per_block) };
    let mut directory = Directory::new(DirectoryLimits::default(), kind);
    let mut meta = meta(trace.tokens_per_block);
    let (mut resident, mut all) = (0, Hits::default());
    for turn in &trace.turns {
        let now = Instant(turn.at_ms);
        let here = |block: &u32| directory.locate(&trace.digests[*block as usize], GroupId(0), ShardId(0)).is_some();
        let hits = turn.blocks.iter().take_while(|block| here(block)).count();
        let tokens = trace.tokens(turn, hits);
        all.tokens += tokens;
        all.saved_us += costly.prefill_us(tokens);
        // The deepest first, as a lease does.
        for block in turn.blocks[..hits].iter().rev() {
            directory.access(&trace.digests[*block as usize], &turn.info, now);
        }
        for (position, block) in turn.blocks.iter().enumerate().skip(hits) {
            trace.describe(turn, position, &mut meta);
            let slot = SlotRef::from_raw(u64::from(*block) + 1).expect("not zero");
            match directory.insert(&meta, &format, Placed::Dram(slot), &turn.info, now) {
                Ok(Inserted::Stored) => resident += 1,
                Ok(other) => return Err(format!("block {block} was here behind a miss: {other:?}")),
                Err(e) => return Err(e.to_string()),
            }
        }
        while resident > capacity {
            let victim = directory.victim(Tier::Dram, now).ok_or("nothing may leave a tier without leases")?;
            for part in &victim.parts {
                let id = BlockId { digest: victim.digest, group: part.group, shard: part.shard };
                directory.drop_slot(&id, part.slot.ok_or("a victim without a slot")?, MissReason::Evicted);
                resident -= 1;
            }
        }
        tick();
    }
    Ok(all)
}

/// Prefill time of all requests without a hit, by the declared cost.
#[must_use]
pub fn prefill_us(trace: &Prepared) -> u64 {
    let costly = declaring(trace.tokens_per_block);
    trace.turns.iter().map(|turn| costly.prefill_us(u64::from(turn.info.input_tokens))).sum()
}

/// The format of a replay with a declared cost.
fn declaring(tokens_per_block: u32) -> Format {
    let cost = (PREFILL_US, PREFILL_DOUBLES_AT);
    Format { prefill_us_per_token: cost.0, prefill_doubles_at_tokens: cost.1, ..format(tokens_per_block) }
}

/// The format that a trace is replayed under.
pub(crate) fn format(tokens_per_block: u32) -> Format {
    Format {
        model: "replay".into(),
        dtype: "bf16".into(),
        layout: "any".into(),
        hash_algorithm: "any".into(),
        hash_seed: String::new(),
        tokens_per_key: tokens_per_block,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block,
            shards: 1,
            replicated: false,
            size: SizeRule::Exact(u64::from(TOKEN_BYTES * tokens_per_block)),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

/// What all blocks of a replay have in common.
pub(crate) fn meta(tokens_per_block: u32) -> BlockMeta {
    BlockMeta {
        id: BlockId {
            digest: DigestKey::from_bytes([0; 16]).digest(KeyDomain(0), HANDLE, b""),
            group: GroupId(0),
            shard: ShardId(0),
        },
        tenant: TenantId(0),
        handle: HANDLE,
        key: Key::new(&[1; 32]).expect("32 bytes are a key"),
        version: Version(1),
        class: Class::Cache,
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position: 0,
        parent: None,
        len: TOKEN_BYTES * tokens_per_block,
        sums: ChunkSums::default(),
    }
}
