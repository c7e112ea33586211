//! One prompt, as an engine sees it: how much of it is here, get that, compute the rest, store it.
//!
//! `cargo run -p kvkeep-client --example engine` against a server (`KVKEEP_ENDPOINT`, or one with defaults on this machine).
//! The second run finds everything. The README shows `prefill`.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::{Call, Client, ClientConfig, GetItem, MatchQuery, Namespace, Put, PutPosition, Result};
use kvkeep_core::{Format, Group, RequestId, Rule, SizeRule, Topology};

/// Bytes of one block of this model.
const BLOCK_BYTES: usize = 256 * 1024;
/// Blocks of the prompt.
const BLOCKS: u32 = 8;

async fn prefill(ns: &Namespace, keys: &[Bytes], request: &[u8]) -> Result<usize> {
    let call = Call::of(RequestId::new(request).expect("at most 64 bytes")).within(Duration::from_millis(500));
    // How much of the prompt is here? What is, stays readable for the term of the lease.
    let query = MatchQuery::of(keys.to_vec()).leased(Duration::from_secs(30));
    let found = ns.match_chain(&query, &call).await?;
    let items: Vec<_> = keys[..found.boundary_positions as usize].iter().cloned().map(GetItem::of).collect();
    let parts = ns.get(&items, found.lease_id(), &call).await?;
    // A part that is no hit ends the prefix: what comes after it is computed.
    let hits = parts.iter().take_while(|part| part.is_hit()).count();
    parts[..hits].iter().enumerate().for_each(|(i, part)| load_into_gpu(i, &part.data));
    let positions = (hits..keys.len()).map(|i| PutPosition::of(keys[i].clone(), compute(i))).collect();
    let parent = hits.checked_sub(1).map(|last| keys[last].clone());
    ns.put(&Put { parent, first_position: hits as u32, positions, ..Put::default() }, &call).await?;
    ns.release(found.lease_id().as_slice(), &[], &call).await?;
    Ok(hits)
}

/// Where an engine copies the block to its device.
fn load_into_gpu(position: usize, block: &[u8]) {
    assert_eq!(block, compute(position), "the bytes are those that were put");
}

/// Where an engine runs the model.
fn compute(position: usize) -> Bytes {
    vec![position as u8; BLOCK_BYTES].into()
}

/// How the KV of this model looks: one group of layers, full attention, one shard, 256 tokens a block.
fn format() -> Format {
    Format {
        model: "example-8b".into(),
        dtype: "bf16".into(),
        layout: "example".into(),
        hash_algorithm: "example".into(),
        hash_seed: String::new(),
        tokens_per_key: 256,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 256,
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
    let client = Client::connect(ClientConfig::from_env()).await?;
    let ns = client.register_namespace("example", &format(), "digest of the weights").await?;
    assert!(ns.revision_matches, "the store holds KV of other weights: advance the revision");
    // An engine's keys are hashes of the tokens up to the end of each block.
    let keys: Vec<Bytes> = (0..BLOCKS).map(|i| Bytes::from(format!("prompt 1, block {i}"))).collect();
    for request in [&b"request 1"[..], b"request 2"] {
        let hits = prefill(&ns, &keys, request).await?;
        println!("{hits} of {} blocks were here", keys.len());
    }
    Ok(())
}
