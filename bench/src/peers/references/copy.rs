//! Copies within one process: what moving a block costs where nobody has to be asked.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;

use super::{Memory, range};
use crate::peers::memory::{can_stream, copy_streaming};
use crate::peers::path::{BLOCK_BYTES, BLOCKS, Entry, Group, Kind, Measuring, Path, PathId, Sample, Stretch, Way};

/// The path that everything is held against.
pub const MEMCPY: &str = "memcpy";
/// Copies that go around the cache.
pub const MEMCPY_STREAM: &str = "memcpy_stream";

struct Copy {
    memory: Arc<Memory>,
    copy: fn(&mut [u8], &[u8]),
    at: usize,
}

/// The two copies; the streaming one only where the CPU can.
pub fn entries(memory: &Arc<Memory>) -> Vec<Entry> {
    let entry = |name, what: &str, copy| Entry {
        id: PathId::single(name, Way::Copy),
        what: what.to_owned(),
        kind: Kind::Reference,
        group: Group::SameHost,
        path: Box::new(Copy { memory: Arc::clone(memory), copy, at: 0 }),
    };
    let mut entries = vec![entry(MEMCPY, "copy_nonoverlapping, cold to cold, one thread", <[u8]>::copy_from_slice)];
    if can_stream() {
        entries.push(entry(MEMCPY_STREAM, "the same with non-temporal stores", copy_streaming));
    }
    entries
}

impl Copy {
    fn run(&mut self, window: Duration) -> anyhow::Result<Sample> {
        let mut landing = self.memory.landing()?;
        let mut stretch = Stretch::begin(window, &[]);
        while stretch.going() {
            let (to, from) = (&mut landing[range(self.at)], &self.memory.source[range(self.at)]);
            stretch.call(BLOCK_BYTES, || (self.copy)(to, from));
            std::hint::black_box(&mut landing[self.at * BLOCK_BYTES]);
            self.at = (self.at + 1) % BLOCKS;
        }
        let last = range((self.at + BLOCKS - 1) % BLOCKS);
        ensure!(landing[last.clone()] == self.memory.source[last], "wrong bytes landed");
        Ok(stretch.end())
    }
}

impl Path for Copy {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(async move { tokio::task::block_in_place(|| self.run(window)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_copy_lands_every_block() {
        let memory = Memory::new();
        for entry in &mut entries(&memory) {
            memory.landing().unwrap().fill(0);
            let mut moved = 0;
            while moved < crate::peers::path::WORKING_SET_BYTES as u64 {
                let sample = entry.path.measure(Duration::from_millis(20)).await.unwrap();
                assert_eq!(sample.bytes, (sample.latencies.len() * BLOCK_BYTES) as u64);
                moved += sample.bytes;
            }
            assert!(memory.landing().unwrap()[..] == memory.source);
        }
    }
}
