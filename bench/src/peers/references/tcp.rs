//! Blocks over loopback TCP by blocking sockets, one call in flight per connection, summed by whoever receives them.

use std::io::{self, IoSlice, Read, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kvkeep_core::{ChunkSums, SUM_CHUNK_BYTES};

use super::server::{Reference, answer};
use super::{ANSWER_BYTES, CONNECTIONS, GET, HEADER_BYTES, Memory, PUT, REQUEST_BYTES, range, request};
use crate::peers::path::{BLOCK_BYTES, BLOCKS, Entry, Group, Kind, Measuring, Path, PathId, Sample, Way};
use crate::peers::processor::Processor;

/// Its name.
pub const RAW_TCP: &str = "raw_tcp";

struct Raw {
    memory: Arc<Memory>,
    reference: Arc<Reference>,
    way: Way,
    lanes: Vec<Lane>,
}

/// One connection and the blocks that it goes through.
struct Lane {
    socket: TcpStream,
    first: usize,
    blocks: usize,
    at: usize,
}

/// Both ways over each number of connections.
pub fn entries(memory: &Arc<Memory>, reference: &Arc<Reference>) -> anyhow::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for connections in CONNECTIONS {
        for (way, what) in [
            (Way::Get, "blocking sockets, summed by the client as it arrives"),
            (Way::Put, "blocking sockets, summed by the server as it arrives"),
        ] {
            let blocks = BLOCKS / connections as usize;
            let lane = |n: u32| -> anyhow::Result<Lane> {
                Ok(Lane { socket: reference.connect_tcp()?, first: n as usize * blocks, blocks, at: 0 })
            };
            entries.push(Entry {
                id: PathId::single(RAW_TCP, way).over(connections),
                what: what.to_owned(),
                kind: Kind::Reference,
                group: Group::Network,
                path: Box::new(Raw {
                    memory: Arc::clone(memory),
                    reference: Arc::clone(reference),
                    way,
                    lanes: (0..connections).map(lane).collect::<anyhow::Result<_>>()?,
                }),
            });
        }
    }
    Ok(entries)
}

impl Raw {
    fn run(&mut self, window: Duration) -> anyhow::Result<Sample> {
        let memory = &self.memory;
        let mut landing = memory.landing()?;
        let way = self.way;
        let processor = Processor::of(&[self.reference.pid()]);
        let cpu = processor.seconds();
        let began = Instant::now();
        let ends = began + window;
        let lanes = landing.chunks_mut(self.lanes[0].blocks * BLOCK_BYTES).zip(&mut self.lanes);
        let calls = std::thread::scope(|scope| {
            let threads: Vec<_> =
                lanes.map(|(landing, lane)| scope.spawn(move || lane.run(way, memory, landing, ends))).collect();
            let joined = threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a client panicked"))?);
            joined.collect::<anyhow::Result<Vec<_>>>()
        })?;
        let latencies = calls.concat();
        Ok(Sample {
            bytes: (latencies.len() * BLOCK_BYTES) as u64,
            elapsed: began.elapsed(),
            cpu_seconds: processor.seconds() - cpu,
            latencies,
        })
    }
}

impl Lane {
    fn run(&mut self, way: Way, memory: &Memory, landing: &mut [u8], ends: Instant) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        while latencies.is_empty() || Instant::now() < ends {
            let (number, place) = (self.first + self.at, range(self.at));
            let began = Instant::now();
            match way {
                Way::Get => self.get(number, &memory.sums[number], &mut landing[place])?,
                _ => self.put(number, &memory.sums[number], &memory.source[range(number)])?,
            }
            latencies.push(began.elapsed());
            self.at = (self.at + 1) % self.blocks;
        }
        Ok(latencies)
    }

    fn get(&mut self, number: usize, sums: &ChunkSums, landing: &mut [u8]) -> anyhow::Result<()> {
        self.socket.write_all(&request(GET, number)).context("ask for a block")?;
        let came = receive_summed(&mut self.socket, landing).context("receive a block")?;
        ensure!(came == *sums, "wrong bytes came");
        Ok(())
    }

    fn put(&mut self, number: usize, sums: &ChunkSums, block: &[u8]) -> anyhow::Result<()> {
        let mut header = [0; HEADER_BYTES];
        header[..REQUEST_BYTES].copy_from_slice(&request(PUT, number));
        // Header and block leave in one call, as long as the socket takes both.
        let mut parts: &mut [IoSlice<'_>] = &mut [IoSlice::new(&header), IoSlice::new(block)];
        while !parts.is_empty() {
            let sent = self.socket.write_vectored(parts).context("send a block")?;
            ensure!(sent > 0, "the reference takes no more bytes");
            IoSlice::advance_slices(&mut parts, sent);
        }
        let mut said = [0; ANSWER_BYTES];
        self.socket.read_exact(&mut said).context("answer to a put")?;
        ensure!(said == answer(sums), "the reference received other bytes");
        Ok(())
    }
}

impl Path for Raw {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(async move { tokio::task::block_in_place(|| self.run(window)) })
    }
}

/// Receives a block, as much with each call as has come, and sums each chunk while it is in the cache.
pub(super) fn receive_summed(from: &mut impl Read, block: &mut [u8]) -> io::Result<ChunkSums> {
    let mut sums = Vec::with_capacity(block.len().div_ceil(SUM_CHUNK_BYTES));
    let (mut came, mut summed) = (0, 0);
    while came < block.len() {
        match from.read(&mut block[came..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => came += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        while summed < came {
            let to = block.len().min(summed + SUM_CHUNK_BYTES);
            if to > came {
                break;
            }
            sums.push(crc32fast::hash(&block[summed..to]));
            summed = to;
        }
    }
    Ok(ChunkSums::from_slice(&sums))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives few bytes at a time.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(into.len()).min(self.0.len());
            into[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    #[test]
    fn sums_do_not_depend_on_how_bytes_come() {
        let block: Vec<u8> = (0..3 * SUM_CHUNK_BYTES + 77).map(|n| (n * 7 % 253) as u8).collect();
        for step in [1000, SUM_CHUNK_BYTES, SUM_CHUNK_BYTES + 1, usize::MAX] {
            let mut landed = vec![0; block.len()];
            let sums = receive_summed(&mut Trickle(&block, step), &mut landed).unwrap();
            assert_eq!(sums, ChunkSums::of(&block));
            assert_eq!(landed, block);
        }
        let short = receive_summed(&mut Trickle(&block[1..], 1000), &mut vec![0; block.len()]);
        assert_eq!(short.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
