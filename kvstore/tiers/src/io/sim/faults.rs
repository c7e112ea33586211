//! What can go wrong on a [`SimDisk`](super::SimDisk), and when: by script, or at seeded random.

use std::io;

use kvkeep_core::{Error, ErrorKind, Result};

use crate::io::buf::IO_ALIGN;
use crate::io::file::FLUSH_FAILED;

/// A seeded source of chance (SplitMix64): the same seed, the same story, on every machine and in every version.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that roll as `seed` says.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What is attempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimOp {
    /// One request to read.
    Read,
    /// One request to write.
    Write,
    /// One flush.
    Flush,
    /// Making a file; [`Fault::Error`] is a failed flush of it.
    Create,
    /// Removing a file; [`Fault::Error`] is a failed flush of the folder.
    Remove,
}

/// What befalls an attempt. Where a fault makes no sense for an operation, the operation succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// EINTR, nothing moved.
    Interrupted,
    /// Fewer bytes than asked for, at least one page.
    Short,
    /// EIO. A flush that fails so leaves the pages clean and not durable: the next flush succeeds and saves nothing.
    Error,
    /// ENOSPC.
    NoSpace,
    /// The bytes go to, or come from, another page of the same file.
    Misdirected,
    /// One bit of the bytes moved is wrong.
    BitFlip,
    /// Answered with success, and nothing was done: a write that is lost, a flush that lies.
    Lost,
}

/// Chances of faults per thousand attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// [`Fault::Interrupted`] of reads and writes.
    pub interrupted: u16,
    /// [`Fault::Short`] of reads and writes.
    pub short: u16,
    /// [`Fault::Error`] of reads.
    pub read_error: u16,
    /// [`Fault::Error`] of writes.
    pub write_error: u16,
    /// [`Fault::Error`] of flushes.
    pub flush_error: u16,
    /// [`Fault::NoSpace`] of writes.
    pub no_space: u16,
    /// [`Fault::Misdirected`] of writes.
    pub misdirected_write: u16,
    /// [`Fault::BitFlip`] of reads: the device has the right bytes.
    pub read_flip: u16,
    /// [`Fault::BitFlip`] of writes: the device has wrong bytes.
    pub write_flip: u16,
    /// [`Fault::Lost`] of writes.
    pub lost_write: u16,
    /// Operations that end up to 8 polls late, so that others overtake them.
    pub delayed: u16,
}

/// Attempts, by what was attempted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Files made.
    pub creates: u64,
    /// Files removed.
    pub removes: u64,
}

/// What an attempt comes to.
pub(super) enum Attempt {
    Whole,
    Short(usize),
    Fails(io::Error),
    Misdirected,
    Flipped(u64),
    Lost,
}

impl Attempt {
    /// Of making or removing a file: EIO is that of the flush inside.
    pub(super) fn into_result(self) -> Result<()> {
        match self {
            Self::Fails(e) if e.kind() == io::ErrorKind::StorageFull => {
                Err(Error::new(ErrorKind::Full, "cannot allocate a segment file").with("cause", e))
            }
            Self::Fails(e) => Err(Error::new(ErrorKind::Io, FLUSH_FAILED).with("cause", e)),
            _ => Ok(()),
        }
    }
}

pub(super) struct Faults {
    pub(super) dice: Dice,
    pub(super) rates: FaultRates,
    pub(super) counts: OpCounts,
    script: Vec<(SimOp, u64, Fault)>,
}

impl Faults {
    pub(super) fn new(seed: u64) -> Self {
        Self { dice: Dice::new(seed), rates: FaultRates::default(), counts: OpCounts::default(), script: Vec::new() }
    }

    pub(super) fn inject(&mut self, on: SimOp, skip: u64, fault: Fault) {
        self.script.push((on, skip, fault));
    }

    /// Ticks that an operation is late.
    pub(super) fn delay(&mut self) -> u32 {
        if self.chance(self.rates.delayed) { 1 + self.dice.below(8) as u32 } else { 0 }
    }

    /// Counts an attempt over `len` bytes and says what becomes of it.
    pub(super) fn attempt(&mut self, op: SimOp, len: usize) -> Attempt {
        let counts = &mut self.counts;
        *match op {
            SimOp::Read => &mut counts.reads,
            SimOp::Write => &mut counts.writes,
            SimOp::Flush => &mut counts.flushes,
            SimOp::Create => &mut counts.creates,
            SimOp::Remove => &mut counts.removes,
        } += 1;
        let errno = |code| Attempt::Fails(io::Error::from_raw_os_error(code));
        match self.scripted(op).or_else(|| self.random(op)) {
            None => Attempt::Whole,
            Some(Fault::Interrupted) => errno(libc::EINTR),
            Some(Fault::Error) => errno(libc::EIO),
            Some(Fault::NoSpace) => errno(libc::ENOSPC),
            Some(Fault::Short) if len >= 2 * IO_ALIGN => {
                Attempt::Short(IO_ALIGN * (1 + self.dice.below((len / IO_ALIGN - 1) as u64) as usize))
            }
            Some(Fault::Short) => Attempt::Whole,
            Some(Fault::Misdirected) => Attempt::Misdirected,
            Some(Fault::BitFlip) => Attempt::Flipped(self.dice.below((len as u64 * 8).max(1))),
            Some(Fault::Lost) => Attempt::Lost,
        }
    }

    /// Another place for `len` bytes of a file of `file` bytes than `at`; `at` itself if there is none.
    pub(super) fn elsewhere(&mut self, at: u64, len: usize, file: u64) -> u64 {
        let page = IO_ALIGN as u64;
        let places = file.saturating_sub(len as u64) / page + 1;
        let wrong = self.dice.below(places) * page;
        if wrong == at { (wrong / page + 1) % places * page } else { wrong }
    }

    fn scripted(&mut self, op: SimOp) -> Option<Fault> {
        let due = self.script.iter().position(|(on, skip, _)| *on == op && *skip == 0);
        for (_, skip, _) in self.script.iter_mut().filter(|(on, ..)| *on == op) {
            *skip = skip.saturating_sub(1);
        }
        due.map(|n| self.script.remove(n).2)
    }

    fn random(&mut self, op: SimOp) -> Option<Fault> {
        let r = self.rates;
        let odds: &[(u16, Fault)] = match op {
            SimOp::Read => &[
                (r.interrupted, Fault::Interrupted),
                (r.short, Fault::Short),
                (r.read_error, Fault::Error),
                (r.read_flip, Fault::BitFlip),
            ],
            SimOp::Write => &[
                (r.interrupted, Fault::Interrupted),
                (r.short, Fault::Short),
                (r.write_error, Fault::Error),
                (r.no_space, Fault::NoSpace),
                (r.misdirected_write, Fault::Misdirected),
                (r.write_flip, Fault::BitFlip),
                (r.lost_write, Fault::Lost),
            ],
            SimOp::Flush => &[(r.flush_error, Fault::Error)],
            SimOp::Create | SimOp::Remove => &[],
        };
        odds.iter().find(|(rate, _)| self.chance(*rate)).map(|(_, fault)| *fault)
    }

    fn chance(&mut self, per_thousand: u16) -> bool {
        // Rolled only where it can matter, so that turning one rate on leaves the rest of the story alone.
        per_thousand > 0 && self.dice.below(1000) < u64::from(per_thousand)
    }
}
