//! Tiers, classes, statuses and reasons: the small closed sets that proto, metrics, CLI and docs spell the same way.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $code),+ }

        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The word used in metrics, JSON and the CLI.
            pub const fn word(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }

            /// The number used in files and on the wire.
            pub const fn code(self) -> u8 {
                self as u8
            }

            /// Back from the number; `None` for one this version does not know.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some($name::$variant),)+ _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

words!(
    /// Where bytes live. Ordered: the smaller, the faster.
    Tier {
        /// L1: a GPU pool of the agent.
        Hbm = 1 => "hbm",
        /// L2: the arena of a storage node.
        Dram = 2 => "dram",
        /// L3: segment files of a storage node.
        Nvme = 3 => "nvme",
        /// Another storage node.
        Remote = 4 => "remote",
    }
);

words!(
    /// What an acknowledgement promises (`docs/ARCHITECTURE.md`). Ordered by strength.
    Class {
        /// The home has it.
        Cache = 1 => "cache",
        /// R owners have it in some tier.
        Replicated = 2 => "replicated",
        /// W distinct owners have flushed data and a synced index.
        Durable = 3 => "durable",
    }
);

words!(
    /// On whose word a block stays once it is durable. Ordered by strength.
    Keeper {
        /// Kept while the manifest of a session names it; then a sweep takes it.
        Sessions = 0 => "sessions",
        /// Its caller asked for it by itself: it stays until it is removed.
        Caller = 1 => "caller",
    }
);

words!(
    /// Whether decoded bytes equal the bytes that were put.
    Fidelity {
        /// Bit for bit.
        Exact = 1 => "exact",
        /// A lossy codec stated its error bound and the caller accepted it.
        Near = 2 => "near",
    }
);

words!(
    /// What a lookup says of a position or a part. Anything but a hit is an ordinary outcome, not an error.
    PartStatus {
        /// Readable now.
        Hit = 1 => "hit",
        /// Being written by somebody; not readable yet.
        Pending = 2 => "pending",
        /// On its way up from a colder tier.
        Loading = 3 => "loading",
        /// Not here.
        Miss = 4 => "miss",
        /// Perhaps here, but reading it now would hurt others.
        Throttled = 5 => "throttled",
    }
);

words!(
    /// Why a position or a part is not readable.
    MissReason {
        /// Nothing was ever stored under this key, as far as this node remembers.
        NeverStored = 1 => "never_stored",
        /// The policy took it from its last tier.
        Evicted = 2 => "evicted",
        /// Its time to live ended.
        Expired = 3 => "expired",
        /// Its put was refused.
        Refused = 4 => "refused",
        /// Its bytes failed their checksum, or its header named another block.
        Quarantined = 5 => "quarantined",
        /// The handle's revision is not the namespace's.
        Revision = 6 => "revision",
        /// The stored part does not fit the format.
        Format = 7 => "format",
        /// The deadline passed first.
        Late = 8 => "late",
        /// A caller removed it.
        Removed = 9 => "removed",
        /// Some shards or groups of the position are absent.
        Incomplete = 10 => "incomplete",
        /// Being written, not committed yet.
        Pending = 11 => "pending",
        /// Its device failed the read.
        Io = 12 => "io",
        /// It was in memory only when the server stopped.
        Restart = 13 => "restart",
        /// Said by a client: the server gave no sign of life.
        Unreachable = 14 => "unreachable",
        /// The caller took the call back.
        Cancelled = 15 => "cancelled",
    }
);

words!(
    /// What a request is to the engine; the policy learns per kind.
    RequestKind {
        /// Not said.
        Unspecified = 0 => "unspecified",
        /// A chat turn.
        Chat = 1 => "chat",
        /// A person typed to an agent.
        User = 2 => "user",
        /// A tool's result came back to an agent.
        Tool = 3 => "tool",
        /// An agent started by an agent.
        Subagent = 4 => "subagent",
        /// Batch or offline work.
        Batch = 5 => "batch",
    }
);

words!(
    /// How much a position counts beside others that are used as often.
    Priority {
        /// A quarter.
        Low = 1 => "low",
        /// As it is.
        Normal = 2 => "normal",
        /// Four times.
        High = 3 => "high",
    }
);

impl Priority {
    /// Of a number as clients give it: below 0 low, above 0 high.
    #[must_use]
    pub const fn of_number(number: i32) -> Self {
        match number {
            ..0 => Self::Low,
            0 => Self::Normal,
            1.. => Self::High,
        }
    }
}

words!(
    /// What decides which position goes next.
    PolicyKind {
        /// Learned online from the use of positions like it; leaves first.
        Sage = 1 => "sage",
        /// Least recently used; leaves first.
        Lru = 2 => "lru",
    }
);

impl std::str::FromStr for PolicyKind {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let known = PolicyKind::ALL.iter().find(|kind| kind.word() == word);
        known.copied().ok_or_else(|| format!("{word:?} is no policy; there are sage and lru"))
    }
}

words!(
    /// What happened to a position: the words of `explain` and of its bounded history.
    Happening {
        /// Committed for the first time.
        Stored = 1 => "stored",
        /// Copied to a faster tier.
        Promoted = 2 => "promoted",
        /// Its copy in a faster tier was dropped; a slower one stays.
        Demoted = 3 => "demoted",
        /// The policy took its last copy.
        Evicted = 4 => "evicted",
        /// A caller removed it, or its revision ended.
        Removed = 5 => "removed",
        /// Its time to live ended.
        Expired = 6 => "expired",
        /// A copy failed its checksum or named another block.
        Quarantined = 7 => "quarantined",
        /// Its put was refused.
        Refused = 8 => "refused",
    }
);

words!(
    /// What a watcher is told of a position.
    EventKind {
        /// Readable here from now on.
        Stored = 1 => "stored",
        /// Now in this faster tier too.
        Promoted = 2 => "promoted",
        /// No longer in the faster tier; readable from this one.
        Demoted = 3 => "demoted",
        /// No longer readable here.
        Removed = 4 => "removed",
    }
);

/// What a client says of a session's future. A hint that is missing says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// After this request the session does not come back.
    Ends,
    /// The session's next request comes in about so many milliseconds.
    DueIn(u32),
}

/// What every access carries for the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestInfo {
    /// The kind of request.
    pub kind: RequestKind,
    /// Tokens of its input; 0: not said.
    pub input_tokens: u32,
    /// Tokens of its output; 0: not known yet.
    pub output_tokens: u32,
    /// Any number that is the session's own; 0: not said. Matters to hints only.
    pub session: u64,
    /// Any number that is the client's own: how far its hints can be believed is learned for each.
    pub client: u64,
    /// What is said of the session's future.
    pub hint: Option<Hint>,
    /// How much its positions count from now on; `None`: as before.
    pub priority: Option<Priority>,
}

impl RequestInfo {
    /// A request that says nothing.
    pub const NONE: RequestInfo = RequestInfo {
        kind: RequestKind::Unspecified,
        input_tokens: 0,
        output_tokens: 0,
        session: 0,
        client: 0,
        hint: None,
        priority: None,
    };
}

impl Default for RequestInfo {
    fn default() -> Self {
        Self::NONE
    }
}
