//! L2: the arena.
