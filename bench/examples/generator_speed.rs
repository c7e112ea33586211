//! How fast block bytes are made and compared, one core: it must stay far above what a connection carries.
//!
//! `cargo run --release -p kvkeep-bench --example generator_speed`

use std::time::Instant;

use kvkeep_bench::block_bytes::{self, Seed};
use kvkeep_bench::measure::{gb_per_s, median};

/// Bytes of one block.
const BLOCK_BYTES: usize = 1 << 20;
/// Blocks of one round.
const BLOCKS: u64 = 1024;
/// Rounds; medians are printed.
const ROUNDS: usize = 5;

fn main() {
    let mut block = vec![0; BLOCK_BYTES];
    let (mut fills, mut checks) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        (0..BLOCKS).for_each(|n| block_bytes::fill(Seed::nth(n), std::hint::black_box(&mut block)));
        fills.push(gb_per_s(BLOCKS * BLOCK_BYTES as u64, began.elapsed()));
        let began = Instant::now();
        let seed = Seed::nth(BLOCKS - 1);
        let wrong: u64 = (0..BLOCKS).map(|_| block_bytes::wrong_bytes(seed, std::hint::black_box(&block))).sum();
        checks.push(gb_per_s(BLOCKS * BLOCK_BYTES as u64, began.elapsed()));
        assert_eq!(wrong, 0);
    }
    println!("made {:.1} GB/s, compared {:.1} GB/s (medians of {ROUNDS} rounds)", median(&fills), median(&checks));
}
