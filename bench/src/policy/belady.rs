//! Belady's MIN: evicts what is used again last. It needs the future, so nothing can do better in block hits; the policies
//! are measured by it.

use std::collections::BinaryHeap;

use super::replay::Prepared;

/// Not used again.
const NEVER: u32 = u32::MAX;

/// Tokens that are hits with `capacity` blocks; ties leave deeper first.
pub fn replay(trace: &Prepared, capacity: usize, tick: &mut dyn FnMut()) -> u64 {
    let mut last = vec![NEVER; trace.unique];
    // Per block of each turn, the turn that uses it next.
    let mut next: Vec<Vec<u32>> = vec![Vec::new(); trace.turns.len()];
    for (number, turn) in trace.turns.iter().enumerate().rev() {
        next[number] =
            turn.blocks.iter().map(|block| std::mem::replace(&mut last[*block as usize], number as u32)).collect();
    }
    // Of resident blocks, when they are used next; of others `None`.
    let mut due: Vec<Option<u32>> = vec![None; trace.unique];
    // Entries that do not tell what `due` does are of the past.
    let mut order: BinaryHeap<(u32, u32, u32)> = BinaryHeap::new();
    let (mut resident, mut hit_tokens) = (0, 0);
    for (turn, next) in trace.turns.iter().zip(&next) {
        let hits = turn.blocks.iter().take_while(|block| due[**block as usize].is_some()).count();
        hit_tokens += trace.tokens(turn, hits);
        for (depth, (block, next)) in turn.blocks.iter().zip(next).enumerate() {
            resident += usize::from(due[*block as usize].is_none());
            due[*block as usize] = Some(*next);
            order.push((*next, depth as u32, *block));
        }
        while resident > capacity {
            let Some((next, _, block)) = order.pop() else { break };
            if due[block as usize] == Some(next) {
                due[block as usize] = None;
                resident -= 1;
            }
        }
        tick();
    }
    hit_tokens
}
