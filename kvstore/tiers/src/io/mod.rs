//! Buffers lent to the kernel, the disk seam, and its engines.
//!
//! Read in this order: [`buf`] (memory handed over by value) -> [`disk`] (the seam, [`Disk`], and the rules that hold for
//! every engine) -> [`file`] (the folder of files) -> [`transfer`] (short counts and retries) -> [`request`] (the way
//! into an engine) -> the engines: [`pread`], [`sim`](mod@sim) (the unkind one, for tests).

pub mod buf;
pub mod disk;
mod file;
pub mod flush;
pub mod pread;
mod request;
pub mod sim;
mod transfer;

pub use buf::{FixedBuf, IO_ALIGN, IoBuf};
pub use disk::{Disk, DiskOptions, EngineInfo, FileId, Flush, Io, Io2, MAX_REGISTERED_BUFFERS, Registration, Space};
pub use flush::FlushCoordinator;
pub use pread::PreadDisk;
pub use sim::SimDisk;
