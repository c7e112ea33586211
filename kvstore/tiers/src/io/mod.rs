//! Buffers lent to the kernel, the disk seam, and its engines.
//!
//! Read in this order:
//! - [`buf`]: memory handed over by value, so that nobody can pull it out from under a running read;
//! - [`disk`]: the seam, [`Disk`], and the rules that hold for every engine;
//! - `file` (the folder and its open files), `transfer` (short counts and retries), `request` (the way into an engine):
//!   what the engines share;
//! - [`uring`], the engine on io_uring, and [`pread`], the one for hosts that refuse it; [`probe`] chooses at start;
//! - [`flush`]: one coordinator per device, around any engine: shared flushes, and a failed one poisons;
//! - [`sim`]: the unkind disk, a test seam.
//!
//! The segment store sees `FlushCoordinator<Arc<dyn Disk>>` and nothing below it.

pub mod buf;
pub mod disk;
mod file;
pub mod flush;
pub mod pread;
pub mod probe;
mod request;
pub mod sim;
mod transfer;
pub mod uring;

#[cfg(test)]
mod tests;

pub use buf::{FixedBuf, IO_ALIGN, IoBuf, Region};
pub use disk::{Disk, DiskOptions, EngineInfo, FileId, Flush, Io, Io2, MAX_REGISTERED_BUFFERS, Registration, Space};
pub use flush::FlushCoordinator;
pub use pread::PreadDisk;
pub use probe::EngineChoice;
pub use sim::SimDisk;
pub use uring::UringDisk;
