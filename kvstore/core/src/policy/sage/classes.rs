//! What positions are told apart by: how often they were used and at what gap, whose first use it was, which block a
//! prompt ends in, and what a client has announced.
//!
//! | classes | told apart by |
//! |---|---|
//! | first use | input tokens (4) x output tokens (3); one more where the request did not say |
//! | used again | uses (2, 3-4, 5-8, 9-16, 17 and more) x the last gap (10 s, 30 s, 2 min, 10 min, more) |
//! | tail | the block that the prompt ends in and does not fill, per kind of request |
//! | ended | the only session that used it has ended: how far its client's word goes (2) x uses (6) |
//! | due | the next turn was announced: how well its client estimates (3) x the estimate (64) |
//!
//! Classes of no hint (*history*) never depend on hints, sessions or clients.

use std::time::Duration;

use crate::words::{RequestInfo, RequestKind};

/// Of an entry: small, dense, kept in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClassId(pub(crate) u8);

/// Steps of uses: 1, 2, 3-4, 5-8, 9-16, 17 and more.
pub(crate) const USE_STEPS: usize = 6;
const OUTPUT_STEPS: usize = 3;
const INPUT_STEPS: usize = 4;
const GAP_STEPS: usize = 5;
/// Upper ends of the steps of the last gap, seconds.
const GAP_ENDS_S: [u64; GAP_STEPS - 1] = [10, 30, 120, 600];
/// Upper ends of the steps of input tokens.
const INPUT_ENDS: [u32; INPUT_STEPS - 1] = [4 << 10, 16 << 10, 64 << 10];
/// Upper ends of the steps of output tokens.
const OUTPUT_ENDS: [u32; OUTPUT_STEPS - 1] = [32, 256];

/// First uses of requests that did not say how long they are.
const UNSAID: usize = INPUT_STEPS * OUTPUT_STEPS;
const AGAIN: usize = UNSAID + 1;
const TAIL: usize = AGAIN + (USE_STEPS - 1) * GAP_STEPS;
/// Classes of no hint.
pub(crate) const HISTORY: usize = TAIL + RequestKind::ALL.len();
const ENDED: usize = HISTORY;
/// How far a client's word that a session has ended goes: always true so far, or not always.
pub(crate) const TRUSTS: usize = 2;
const DUE: usize = ENDED + TRUSTS * USE_STEPS;
/// How well clients estimate when the next turn comes, the best first.
pub(crate) const NOISES: usize = 3;
/// Buckets of announced ages; what is announced for later than seven hours is in the last.
const DUES: usize = 64;
/// All classes.
pub(crate) const CLASSES: usize = DUE + NOISES * DUES;

/// Coarse classes of history: uses alone, and the tails.
pub(crate) const COARSE: usize = USE_STEPS + 1;

const _: () = assert!(CLASSES <= u8::MAX as usize + 1, "a class is one byte of an entry");

/// What is known of one access, for its class.
pub(crate) struct Seen<'a> {
    /// This one included.
    pub uses: u8,
    /// Since the last one; `None`: the first.
    pub gap: Option<Duration>,
    /// The prompt ends in this position and does not fill it.
    pub tail: bool,
    pub info: &'a RequestInfo,
}

fn step<T: PartialOrd>(ends: &[T], value: T) -> usize {
    ends.iter().take_while(|end| value >= **end).count()
}

/// The step of a number of uses.
pub(crate) fn use_step(uses: u8) -> usize {
    match uses {
        0 | 1 => 0,
        2 => 1,
        3..=4 => 2,
        5..=8 => 3,
        9..=16 => 4,
        17.. => 5,
    }
}

impl ClassId {
    /// The class by history alone.
    pub(crate) fn of_history(seen: &Seen<'_>) -> ClassId {
        let info = seen.info;
        let class = match (seen.tail, use_step(seen.uses), seen.gap) {
            (true, _, _) => TAIL + usize::from(info.kind.code()),
            (false, uses, Some(gap)) if uses > 0 => {
                let ends = GAP_ENDS_S.map(Duration::from_secs);
                AGAIN + (uses - 1) * GAP_STEPS + step(&ends, gap)
            }
            (false, _, _) if info.input_tokens == 0 => UNSAID,
            (false, _, _) => {
                step(&INPUT_ENDS, info.input_tokens) * OUTPUT_STEPS + step(&OUTPUT_ENDS, info.output_tokens)
            }
        };
        ClassId(class as u8)
    }

    /// The only session that used it has ended.
    pub(crate) fn ended(trust: usize, uses: u8) -> ClassId {
        ClassId((ENDED + trust * USE_STEPS + use_step(uses)) as u8)
    }

    /// Its session's next turn was announced for an age in bucket `due`.
    pub(crate) fn due(noise: usize, due: usize) -> ClassId {
        ClassId((DUE + noise * DUES + due.min(DUES - 1)) as u8)
    }

    /// The classes of sessions that have ended, as clients say that were never wrong.
    pub(crate) fn certainly_ended() -> impl Iterator<Item = ClassId> + Clone {
        (ENDED..ENDED + USE_STEPS).map(|class| ClassId(class as u8))
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }

    /// What it is.
    pub(crate) fn sort(self) -> Sort {
        match self.index() {
            0..AGAIN => Sort::History { coarse: 0 },
            i @ AGAIN..TAIL => Sort::History { coarse: 1 + (i - AGAIN) / GAP_STEPS },
            TAIL..HISTORY => Sort::History { coarse: USE_STEPS },
            i @ ENDED..DUE => Sort::Ended { trust: (i - ENDED) / USE_STEPS },
            i => Sort::Due { noise: (i - DUE) / DUES, due: (i - DUE) % DUES },
        }
    }
}

/// The kind of a class and what it shares with others of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    /// Of no hint; `coarse` is below [`COARSE`].
    History { coarse: usize },
    /// `trust` is below [`TRUSTS`].
    Ended { trust: usize },
    /// `noise` is below [`NOISES`]; `due` is the bucket of the announced age.
    Due { noise: usize, due: usize },
}
