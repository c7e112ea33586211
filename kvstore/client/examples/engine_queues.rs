//! An engine's step over queues, with a server (`KVKEEP_ENDPOINT`, or one with defaults here) or without: then all is computed.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::engine::{Engine, EngineConfig, Outcome};
use kvkeep_client::{Call, ClientConfig, Geometry, GetItem, MatchQuery, Put, PutPosition, Region, Result};
use kvkeep_core::{Format, Group, RequestId, Rule, SizeRule, Topology};

const LAYERS: usize = 32;
const RUN_BYTES: usize = 8192;
const BLOCKS: usize = 8;

fn main() -> Result<()> {
    let size = SizeRule::Exact((LAYERS * RUN_BYTES) as u64);
    let group = Group { rule: Rule::All, tokens_per_block: 256, shards: 1, replicated: false, size };
    let format = Format {
        model: "example-8b".into(),
        dtype: "bf16".into(),
        layout: "by-layer".into(),
        hash_algorithm: "example".into(),
        hash_seed: String::new(),
        tokens_per_key: 256,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![group],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    };
    let config = EngineConfig::new("example-queues", format, "digest of the weights");
    let engine = Engine::open(EngineConfig { client: ClientConfig::from_env(), ..config })?;
    engine.ready(Duration::from_secs(2))?; // or not: then the first calls are misses
    let kv = Region::new(LAYERS * BLOCKS * RUN_BYTES)?;
    // SAFETY: each block is given to one call at a time, and touched only when that call has ended.
    let blocks = unsafe {
        let base = kv.strided(0, RUN_BYTES, BLOCKS * RUN_BYTES, LAYERS as u32);
        Geometry::new([(base, RUN_BYTES as u64)], BLOCKS as u32)?
    };
    let keys: Vec<Bytes> = (0..BLOCKS).map(|i| Bytes::from(format!("prompt 1, block {i}"))).collect();
    let call = Call::of(RequestId::new(b"request 1")?).within(Duration::from_millis(500));
    let found = engine.match_chain(MatchQuery::of(keys.clone()).leased(Duration::from_secs(30)), &call)?;
    let here = found.boundary_positions;
    let items = keys[..here as usize].iter().cloned().map(GetItem::of).collect();
    let places = blocks.places(&(0..here).collect::<Vec<_>>())?;
    let _busy_is_a_miss = engine.submit_get(0, items, places, found.lease_id(), call.clone())?;
    let mut hits = 0;
    for done in engine.wait(0, 64, Duration::from_secs(1))? {
        // an engine polls once per step instead
        if let Outcome::Got(parts) = done.outcome {
            hits = parts.iter().take_while(|part| part.is_hit()).count();
        }
    }
    engine.release(found.lease_id().into_iter().collect(), vec![])?;
    println!("{hits} of {BLOCKS} blocks were here; the others are computed now");
    let position = |i: usize| Ok(PutPosition::of(keys[i].clone(), blocks.place(i as u32)?));
    let positions = (hits..BLOCKS).map(position).collect::<Result<_>>()?;
    let parent = hits.checked_sub(1).map(|last| keys[last].clone());
    let put = Put { parent, first_position: hits as u32, positions, ..Put::default() };
    let kept = engine.put(put, &call)?.iter().filter(|part| part.is_kept()).count();
    println!("{kept} were stored\n{}", engine.describe()?);
    Ok(())
}
