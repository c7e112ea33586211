//! A conversation that outlives the process, the node and the weights. Each run is one turn: what the store has of the
//! conversation comes back and is compared, then the turn is computed, put and appended.
//!
//! `cargo run -p kvkeep-client --example memory` against a server (`KVKEEP_ENDPOINT`, or one with defaults on this machine);
//! `KVKEEP_WEIGHTS=weights-2` says that the model has other weights from now on. The README goes through it.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::sessions::{Append, OpenSession, Restore};
use kvkeep_client::{Call, Client, ClientConfig, GetItem, Lost, Namespace, Put, PutPosition, Result};
use kvkeep_core::{Class, Format, Group, Rule, SizeRule, Topology};

/// The conversation.
const SESSION: &str = "conversation-7";
/// Bytes of one block of this model.
const BLOCK_BYTES: usize = 256 * 1024;
/// Tokens of one block.
const BLOCK_TOKENS: usize = 256;
/// Tokens of one turn: not a multiple of a block's.
const TURN_TOKENS: usize = 1000;

async fn turn(ns: &Namespace) -> Result<()> {
    let (sessions, call) = (ns.sessions(), Call::default());
    // Durable: what an append acknowledged survives a power cut.
    let open = OpenSession {
        class: Some(Class::Durable),
        attributes: [("user".to_owned(), "alice".to_owned())].into(),
        ..OpenSession::default()
    };
    let (session, is_new) = sessions.open(SESSION, &open, &call).await?;
    let mut tokens = sessions.tokens_all(SESSION, &call).await?.ids;
    assert_eq!(tokens, tokens_until(tokens.len()), "the token ids are those that were appended");
    println!("{SESSION}: {}, {} token ids are kept", if is_new { "new" } else { "found" }, tokens.len());

    if !session.revision_matches {
        // KV of other weights is of no use; the token ids are: begin anew with them, and compute everything again.
        sessions.truncate(SESSION, 0, true, &call).await?;
        println!("its KV is of other weights: computed again from its token ids");
    }
    let wish = Restore { lease: Some(Duration::from_secs(30)), ..Restore::default() };
    let restored =
        sessions.restore(SESSION, &wish, &call.clone().within(Duration::from_secs(60))).await?.finish().await?;
    let have = restored.usable_positions as usize;
    let items: Vec<_> = (0..have).map(|i| GetItem::of(key(i))).collect();
    for (i, part) in ns.get(&items, restored.lease, &call).await?.iter().enumerate() {
        assert!(part.is_hit() && part.data == compute(i), "block {i} is the one that was put");
    }
    println!("{have} blocks came back, every byte as it was put; compute from token {}", restored.compute_from_token);

    // The turn: what the user said and what the model answers.
    let before = tokens.len();
    tokens = tokens_until(before + TURN_TOKENS);
    let blocks = tokens.len() / BLOCK_TOKENS;
    let positions = (have..blocks).map(|i| PutPosition::of(key(i), compute(i))).collect();
    let parent = have.checked_sub(1).map(key);
    ns.put(&Put { parent, first_position: have as u32, positions, ..Put::default() }, &call).await?;
    // Answered when these blocks, put as class cache, are durable. The token ids run ahead of the last whole block.
    let append = Append {
        from_position: have as u64,
        keys: (have..blocks).map(key).collect(),
        from_token: before as u64,
        token_ids: tokens[before..].to_vec(),
        content: Vec::new(),
    };
    let appended = sessions.append(SESSION, &append, &call).await?;
    println!("appended: {} blocks and {} token ids are durable", appended.positions, appended.tokens);
    ns.release(restored.lease.as_slice(), &[], &call).await?;
    Ok(())
}

/// An engine's keys are hashes of the tokens up to the end of each block.
fn key(block: usize) -> Bytes {
    Bytes::from(format!("{SESSION}, block {block}"))
}

/// Where an engine runs the model.
fn compute(block: usize) -> Bytes {
    vec![block as u8; BLOCK_BYTES].into()
}

/// What was said, as token ids.
fn tokens_until(end: usize) -> Vec<u32> {
    (0..end as u32).map(|i| i * 7919 % 32_000).collect()
}

/// How the KV of this model looks: one group of layers, full attention, one shard.
fn format() -> Format {
    Format {
        model: "example-8b".into(),
        dtype: "bf16".into(),
        layout: "example".into(),
        hash_algorithm: "example".into(),
        hash_seed: String::new(),
        tokens_per_key: BLOCK_TOKENS as u32,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: BLOCK_TOKENS as u32,
            shards: 1,
            replicated: false,
            size: SizeRule::Exact(BLOCK_BYTES as u64),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::connect(ClientConfig { lost: Lost::Errors, ..ClientConfig::from_env() }).await?;
    let weights = std::env::var("KVKEEP_WEIGHTS").unwrap_or_else(|_| "weights-1".to_owned());
    let mut ns = client.register_namespace("memory", &format(), &weights).await?;
    if !ns.revision_matches {
        // From here on the blocks of the weights before are misses, and their space is given back.
        ns = ns.advance_revision(&weights, &Call::default()).await?;
        println!("the namespace is of {weights} now");
    }
    turn(&ns).await
}
