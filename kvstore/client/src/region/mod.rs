//! Memory that the server reads and writes itself: blocks go between its arena and a region in one copy, or straight from
//! the disk.
//!
//! A [`Region`] is memory of this process in a descriptor that the server is given. A [`Place`] is a part of it that one
//! block fills: one run, or many of one length and distance ([`Region::strided`]), or several of these ([`Place::and`]).
//!
//! **Whose memory it is.** From the call that names a place until the call is answered, its bytes are the server's. A server
//! that is stopped in the middle of a copy goes on with it when it wakes up, so a call that was given up takes its memory
//! back first (`kvkeep_core::call_word`): no copy begins after that. If one was under way at that very moment, the part
//! is a miss and [`GotInto::in_doubt`](crate::get::GotInto::in_doubt) says so; its bytes may still change until
//! [`Client::settle`](crate::Client::settle) says that they cannot.
//!
//! Over the block port and gRPC the same calls work, with the bytes on the wire and landing in the region. So they do for memory
//! that no other process can be given ([`Region::lent`]), on every way.
//!
//! `memory` has the mapping and all `unsafe`, `landed` what arrives over a socket, [`geometry`] makes places out of block ids,
//! [`mapped`] is the other way round: the server's memory, read in place;
//! [`maps`] tells whether memory is a mapping of a file.

pub mod geometry;
mod landed;
pub mod mapped;
pub mod maps;
pub(crate) mod memory;
pub(crate) mod words;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::{Bytes, BytesMut};
use kvkeep_core::InstanceId;
use kvkeep_proto::v1;
use kvkeep_proto::v1::envelope::Message;

use crate::block::conn::Conn;
use crate::error::{Error, Result};
use crate::process::PerProcess;
use memory::Memory;

pub(crate) use landed::Landed;
pub use memory::Keeper;

/// Nothing that is locked here is left half done by a panic.
fn alone<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Servers that a region remembers being registered with.
const REGISTRATIONS_KEPT: usize = 64;

/// Memory shared with a server. Cheap to clone; unmapped with the last clone and [`Place`].
#[derive(Clone, Debug)]
pub struct Region(Arc<Inner>);

/// A region that is remembered, not kept.
#[derive(Debug)]
pub(crate) struct WeakRegion(Weak<Inner>);

impl WeakRegion {
    pub(crate) fn upgrade(&self) -> Option<Region> {
        self.0.upgrade().map(Region)
    }

    /// Whether it is this one.
    pub(crate) fn is(&self, region: &Region) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&region.0))
    }
}

#[derive(Debug)]
struct Inner {
    memory: Memory,
    // A forked child goes on using the memory, and a lock of its parent may be held for ever there.
    here: PerProcess<Here>,
}

/// What each process keeps of a region.
#[derive(Debug, Default)]
struct Here {
    /// By client and life of the server: the server's number for it.
    ids: Mutex<HashMap<(InstanceId, u64), u32>>,
    /// Held by copies of this process, so that two of them never meet.
    copying: Mutex<()>,
}

/// Where one block lies.
#[derive(Clone, Debug)]
pub struct Place {
    runs: Vec<(Region, Runs)>,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Runs {
    offset: u64,
    bytes: u64,
    stride: u64,
    count: u32,
}

impl Region {
    fn of(memory: Memory) -> Self {
        Self(Arc::new(Inner { memory, here: PerProcess::empty() }))
    }

    /// Fresh memory, zeroed, every page allocated: a memfd that cannot shrink, so that the server maps it.
    ///
    /// # Errors
    /// `config` where the memory is not to be had.
    pub fn new(bytes: usize) -> Result<Self> {
        let failed = |e| Error::config("memory for a region cannot be had").with("bytes", bytes).caused_by(e);
        Memory::new(bytes).map(Self::of).map_err(failed)
    }

    /// Memory that an engine has in a descriptor of its own. Sealed against shrinking (a memfd with F_SEAL_SHRINK) it is mapped
    /// by the server; any other is reached by system calls there, one more copy in the kernel. Never truncate it: this
    /// process maps it, too.
    ///
    /// # Errors
    /// `config` where it is too short, or cannot be mapped for reading and writing.
    pub fn from_descriptor(descriptor: OwnedFd, offset: u64, bytes: usize) -> Result<Self> {
        let failed = |e| Error::config("the descriptor cannot be mapped as a region").with("bytes", bytes).caused_by(e);
        Memory::map(descriptor, offset, bytes, true).map(Self::of).map_err(failed)
    }

    /// The same by the path of a file (on tmpfs, as vLLM's offload region is); the server is given the descriptor.
    ///
    /// # Errors
    /// As [`Self::from_descriptor`].
    pub fn open(path: &Path, offset: u64, bytes: usize) -> Result<Self> {
        let opened = memory::open(path).map_err(|e| {
            Error::config("the region's file cannot be opened for reading and writing")
                .with("path", path.display())
                .caused_by(e)
        })?;
        Self::from_descriptor(opened, offset, bytes)
    }

    /// Memory of this process that no server can be given: anonymous, on a heap. A call that names it in one of its places has
    /// all its bytes travel, and land here from the socket: a copy more. `keeper` is dropped when nothing needs the memory any
    /// more, by whichever thread that is.
    ///
    /// # Safety
    /// The memory is there, readable and writable (or never given to a get), as long as `keeper` lives.
    pub unsafe fn lent(base: NonNull<u8>, bytes: usize, keeper: Keeper) -> Self {
        // SAFETY: the caller's promise; places are made by the rules of this module.
        Self::of(unsafe { Memory::lent(base, bytes, keeper) })
    }

    /// Whether a server can be given it: see [`Self::lent`].
    pub fn is_shared(&self) -> bool {
        self.0.memory.file().is_some()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.memory.len()
    }

    /// Never: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it starts in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.memory.as_ptr()
    }

    fn check(&self, runs: Runs) -> u64 {
        let last = runs.stride.checked_mul(u64::from(runs.count.saturating_sub(1)));
        let end = last.and_then(|l| l.checked_add(runs.offset)).and_then(|l| l.checked_add(runs.bytes));
        let apart = runs.count == 1 || runs.stride >= runs.bytes;
        assert!(
            runs.bytes > 0 && runs.count > 0 && apart && end.is_some_and(|end| end <= self.len() as u64),
            "{runs:?} overlap, are empty, or lie outside of a region of {} bytes",
            self.len()
        );
        runs.bytes * u64::from(runs.count)
    }

    /// `bytes` from `offset`.
    ///
    /// # Safety
    /// Until each call that the place is given to has been answered (and is not in doubt), nobody else reads the bytes that a
    /// get fills, and nobody writes those that a get fills or a put reads.
    ///
    /// # Panics
    /// If they lie outside.
    pub unsafe fn place(&self, offset: usize, bytes: usize) -> Place {
        // SAFETY: the caller's promise.
        unsafe { self.strided(offset, bytes, bytes, 1) }
    }

    /// `count` runs of `bytes`, `stride` apart, from `offset`: a block that has a piece per layer.
    ///
    /// # Safety
    /// As [`Self::place`].
    ///
    /// # Panics
    /// If they overlap or lie outside.
    pub unsafe fn strided(&self, offset: usize, bytes: usize, stride: usize, count: u32) -> Place {
        let runs = Runs { offset: offset as u64, bytes: bytes as u64, stride: stride as u64, count };
        let bytes = self.check(runs);
        Place { runs: vec![(self.clone(), runs)], bytes }
    }

    /// Copies out of it. Waits for other copies of this process; not for the server: what a call may be writing is garbage.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let _alone = alone(&self.0.here.here().copying);
        self.0.memory.copy_out(offset, to);
    }

    /// Copies into it.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let _alone = alone(&self.0.here.here().copying);
        self.0.memory.copy_in(offset, from);
    }

    /// Whether both are the same memory.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Remembers it without keeping it.
    pub(crate) fn downgrade(&self) -> WeakRegion {
        WeakRegion(Arc::downgrade(&self.0))
    }

    fn ids(&self) -> MutexGuard<'_, HashMap<(InstanceId, u64), u32>> {
        alone(&self.0.here.here().ids)
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.0.memory
    }

    /// The server's number for it, on whose connection this is; registered where it is not.
    pub(crate) async fn id(&self, conn: &mut Conn, instance: InstanceId, patience: std::time::Duration) -> Result<u32> {
        const VERB: &str = "register_region";
        let server = (instance, conn.hello.server_epoch);
        if let Some(id) = self.ids().get(&server).copied() {
            return Ok(id);
        }
        let memory = &self.0.memory;
        let (descriptor, start) = memory.file().ok_or_else(|| Error::invalid("memory that was lent is no server's"))?;
        let wish = v1::RegisterRegionRequest { offset: start, length: memory.len() as u64 };
        let call = conn.next_call();
        let frame =
            v1::Envelope { call, end: true, message: Some(Message::RegisterRegion(wish)), ..Default::default() };
        conn.send(VERB, frame, &[], Some(descriptor), patience).await?;
        let Message::RegisterRegionReply(reply) = conn.answer(VERB, call, patience).await? else {
            return Err(Error::protocol("a registration was answered with something else"));
        };
        let mut ids = self.ids();
        if ids.len() >= REGISTRATIONS_KEPT {
            ids.clear(); // of lives that are over, nearly all; the others register again
        }
        ids.insert(server, reply.region_id);
        Ok(reply.region_id)
    }

    /// The server's number for it, if it has one.
    pub(crate) fn known_as(&self, instance: InstanceId, epoch: u64) -> Option<u32> {
        self.ids().get(&(instance, epoch)).copied()
    }

    /// The server does not know it (any more).
    pub(crate) fn forget(&self, instance: InstanceId) {
        self.ids().retain(|(i, _), _| *i != instance);
    }
}

impl Place {
    /// This, and then the other: a block that lies in several areas.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.bytes += other.bytes;
        self.runs.extend(other.runs);
        self
    }

    /// Bytes of the block.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Never: a place has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether a server can be given all of it: see [`Region::lent`].
    pub fn is_shared(&self) -> bool {
        self.regions().all(Region::is_shared)
    }

    /// How many runs it has.
    pub(crate) fn run_count(&self) -> u64 {
        self.runs.iter().map(|(_, r)| u64::from(r.count)).sum()
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = &Region> {
        self.runs.iter().map(|(region, _)| region)
    }

    /// As it travels; registers what is not.
    pub(crate) async fn to_proto(
        &self,
        conn: &mut Conn,
        instance: InstanceId,
        patience: std::time::Duration,
    ) -> Result<v1::Scatter> {
        let mut runs = Vec::with_capacity(self.runs.len());
        for (region, r) in &self.runs {
            runs.push(v1::RegionRuns {
                region_id: region.id(conn, instance, patience).await?,
                offset: r.offset,
                run_bytes: r.bytes,
                stride: r.stride,
                count: r.count,
            });
        }
        Ok(v1::Scatter { runs })
    }

    /// The pieces of its memory that hold the block's bytes `at..at + len`.
    fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = (&Region, usize, usize)> {
        let mut before = 0;
        let runs = self
            .runs
            .iter()
            .flat_map(|(region, r)| (0..u64::from(r.count)).map(move |n| (region, r.offset + n * r.stride, r.bytes)));
        runs.filter_map(move |(region, offset, bytes)| {
            let (start, end) = (before, before + bytes);
            before = end;
            let (from, to) = (start.max(at), end.min(at + len));
            (from < to).then(|| (region, (offset + from - start) as usize, (to - from) as usize))
        })
    }

    /// Copies the block out, for a way on which bytes travel.
    pub(crate) fn copy_out(&self) -> Bytes {
        let mut out = BytesMut::zeroed(self.bytes as usize);
        let mut rest = &mut out[..];
        for (region, offset, len) in self.pieces(0, self.bytes) {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(len);
            region.memory().copy_out(offset, head);
            rest = tail;
        }
        out.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lent_memory_is_kept_as_long_as_a_place_of_it_and_given_to_nobody() {
        let mut bytes = vec![0u8; 64];
        let kept = Arc::new(());
        // SAFETY: `bytes` outlives the region and its places, and is not touched meanwhile.
        let region =
            unsafe { Region::lent(NonNull::new(bytes.as_mut_ptr()).unwrap(), 64, Box::new(Arc::clone(&kept))) };
        assert!(!region.is_shared() && Region::new(4096).unwrap().is_shared());
        // SAFETY: nobody else knows the region.
        let place = unsafe { region.strided(8, 8, 16, 2).and(Region::new(4096).unwrap().place(0, 8)) };
        assert!(!place.is_shared());
        drop(region);
        assert_eq!(Arc::strong_count(&kept), 2);
        drop(place);
        assert_eq!(Arc::strong_count(&kept), 1);
        assert_eq!(bytes, [0; 64]);
    }

    #[test]
    #[should_panic(expected = "lie outside")]
    fn a_place_outside_of_its_region_is_a_bug_of_the_caller() {
        let region = Region::new(4096).unwrap();
        // SAFETY: nothing is made of it.
        unsafe { region.strided(0, 1024, 2048, 3) };
    }
}
