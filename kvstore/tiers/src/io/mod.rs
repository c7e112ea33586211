//! Buffers lent to the kernel, the disk seam, and its engines.

pub mod buf;
