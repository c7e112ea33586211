//! A seeded multi-turn workload: sessions that share a few system prompts, come back after a pause with everything said so
//! far, and end. Same seed and shape, same requests.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use kvkeep_core::RequestKind;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::{Request, SessionId, Source, Workload};
use crate::keys::PrefixId;

/// Most sessions of one workload; their states are kept in memory.
pub const SESSIONS_MAX: u32 = 1 << 20;
/// System prompts that sessions choose from.
const SYSTEM_PROMPTS: u32 = 4;
/// Tokens of a system prompt: the first number, plus the second for each further prompt.
const SYSTEM_TOKENS: (u32, u32) = (1024, 512);
/// Mean tokens that a person (or a tool) adds per turn.
const INPUT_TOKENS_MEAN: f64 = 1500.0;
/// Mean tokens that the model answers per turn.
const OUTPUT_TOKENS_MEAN: f64 = 400.0;
/// Mean pause between two turns, milliseconds.
const PAUSE_MS_MEAN: f64 = 30_000.0;
/// Mean time between the starts of two sessions, milliseconds.
const START_MS_MEAN: f64 = 2_000.0;
/// Most turns of one session.
const TURNS_MAX: u32 = 64;
/// Bit that sets ids of partly filled last blocks apart: each is its own.
const TAIL: u64 = 1 << 63;

/// How large a workload is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Sessions, 1 to [`SESSIONS_MAX`].
    pub sessions: u32,
    /// Mean turns of a session (geometric, at most 64).
    pub turns_mean: f64,
    /// Tokens that one id covers.
    pub tokens_per_block: u32,
    /// Of everything drawn.
    pub seed: u64,
}

struct Session {
    /// Tokens of everything said so far.
    tokens: u32,
    system: u32,
    turns_left: u32,
}

/// Makes the workload; requests are made as they are asked for.
pub fn workload(shape: Shape) -> Workload {
    let mut rng = StdRng::seed_from_u64(shape.seed);
    let sessions_wanted = shape.sessions.clamp(1, SESSIONS_MAX);
    let stop = 1.0 / shape.turns_mean.max(1.0);
    let mut sessions = Vec::with_capacity(sessions_wanted as usize);
    let mut due = BinaryHeap::with_capacity(sessions_wanted as usize);
    let (mut total, mut start_ms) = (0, 0.0);
    for number in 0..sessions_wanted {
        let mut turns = 1;
        while turns < TURNS_MAX && rng.random::<f64>() > stop {
            turns += 1;
        }
        total += u64::from(turns);
        let system = rng.random_range(0..SYSTEM_PROMPTS);
        sessions.push(Session { tokens: system_tokens(system), system, turns_left: turns });
        due.push(Reverse((start_ms as u64, number)));
        start_ms += exponential(&mut rng, START_MS_MEAN);
    }
    let mut number = 0;
    let requests = std::iter::from_fn(move || {
        let Reverse((at_ms, id)) = due.pop()?;
        let session = &mut sessions[id as usize];
        session.tokens += 1 + exponential(&mut rng, INPUT_TOKENS_MEAN) as u32;
        let output_tokens = 1 + exponential(&mut rng, OUTPUT_TOKENS_MEAN) as u32;
        let request = Request {
            number,
            at_ms,
            session: SessionId(u64::from(id)),
            kind: RequestKind::Chat,
            input_tokens: session.tokens,
            output_tokens,
            blocks: blocks(session, id, number, shape.tokens_per_block),
        };
        number += 1;
        session.tokens += output_tokens;
        session.turns_left -= 1;
        if session.turns_left > 0 {
            due.push(Reverse((at_ms + exponential(&mut rng, PAUSE_MS_MEAN) as u64, id)));
        }
        Some(Ok(request))
    });
    let source = Source {
        format: "synthetic",
        name: format!("seed {} sessions {sessions_wanted} turns {}", shape.seed, shape.turns_mean),
        tokens_per_block: shape.tokens_per_block,
    };
    Workload { source, requests: Box::new(requests), total: Some(total) }
}

fn system_tokens(system: u32) -> u32 {
    SYSTEM_TOKENS.0 + SYSTEM_TOKENS.1 * system
}

/// Ids of a session's prefix blocks: the system prompt's, then its own, then one for a partly filled end.
fn blocks(session: &Session, id: u32, number: u64, tokens_per_block: u32) -> Vec<PrefixId> {
    let full = session.tokens / tokens_per_block;
    let shared = system_tokens(session.system) / tokens_per_block;
    let mut blocks: Vec<_> = (0..full)
        .map(|i| {
            let owner = if i < shared { u64::from(session.system) } else { u64::from(SYSTEM_PROMPTS + id) };
            PrefixId(owner << 32 | u64::from(i))
        })
        .collect();
    if !session.tokens.is_multiple_of(tokens_per_block) {
        blocks.push(PrefixId(TAIL | number));
    }
    blocks
}

fn exponential(rng: &mut StdRng, mean: f64) -> f64 {
    -mean * (1.0 - rng.random::<f64>()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn requests(seed: u64) -> Vec<Request> {
        let shape = Shape { sessions: 50, turns_mean: 4.0, tokens_per_block: 512, seed };
        let workload = workload(shape);
        let total = workload.total.unwrap();
        let requests: Vec<_> = workload.requests.map(Result::unwrap).collect();
        assert_eq!(requests.len() as u64, total);
        requests
    }

    #[test]
    fn the_same_seed_gives_the_same_requests() {
        assert_eq!(requests(1), requests(1));
        assert_ne!(requests(1), requests(2));
    }

    /// Each turn repeats all full blocks of the turn before, and ids name whole prefixes: one parent each.
    #[test]
    fn a_turn_extends_the_turn_before_and_every_id_has_one_parent() {
        let mut last: HashMap<SessionId, Request> = HashMap::new();
        let mut parents: HashMap<PrefixId, Option<PrefixId>> = HashMap::new();
        let all = requests(3);
        assert!(all.is_sorted_by_key(|r| r.at_ms));
        for request in all {
            assert_eq!(request.blocks.len() as u32, request.input_tokens.div_ceil(512));
            for (i, block) in request.blocks.iter().enumerate() {
                let parent = i.checked_sub(1).map(|i| request.blocks[i]);
                assert_eq!(*parents.entry(*block).or_insert(parent), parent);
            }
            if let Some(before) = last.insert(request.session, request.clone()) {
                let full = (before.input_tokens / 512) as usize;
                assert_eq!(before.blocks[..full], request.blocks[..full]);
            }
        }
    }
}
