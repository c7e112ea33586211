//! Between the words of `kvkeep-core` and the messages of `kvkeep-proto`, both ways: the one place that knows both.
//! The SDK and the server use it, so that neither can read a number differently from the other.
//!
//! From core to proto is total. From proto to core refuses what this version does not know, except where the `.proto`
//! says how an unset field is read.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ids::{InstanceId, Instant, Key, LeaseId, NamespaceId, RequestId, Revision, Version};
use kvkeep_core::words::{Class, Fidelity, Hint, MissReason, PartStatus, Priority, RequestInfo, RequestKind, Tier};
use kvkeep_core::{Error, ErrorKind, Format, Group, Handle, Result, Rule, SizeRule, Topology};
use kvkeep_proto::{ERROR_DETAIL_KEY, v1};
use prost::Message as _;
use tonic::metadata::MetadataValue;

/// The kind of error that a call on a connection without hello gets; it belongs to the wire, not to the store.
pub const HELLO_REQUIRED: &str = "hello_required";

// ---------------------------------------------------------------- words

fn unknown(what: &'static str, number: i32) -> Error {
    Error::new(ErrorKind::InvalidArgument, "a field holds a number that this version does not know")
        .with("field", what)
        .with("number", number)
}

fn code(number: i32) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

macro_rules! word {
    ($to:ident, $from:ident, $name:ident, $text:literal $(, unset = $unset:expr)?) => {
        #[doc = concat!("The wire's number of a ", $text, ".")]
        pub const fn $to(word: $name) -> i32 {
            word.code() as i32
        }

        #[doc = concat!("A ", $text, " from its number on the wire.")]
        pub fn $from(number: i32) -> Result<$name> {
            $(if number == 0 { return Ok($unset); })?
            $name::from_code(code(number)).ok_or_else(|| unknown($text, number))
        }
    };
}

word!(tier_to_proto, tier_from_proto, Tier, "tier");
word!(class_to_proto, class_from_proto, Class, "class", unset = Class::Cache);
word!(fidelity_to_proto, fidelity_from_proto, Fidelity, "fidelity", unset = Fidelity::Exact);
word!(status_to_proto, status_from_proto, PartStatus, "part status");
word!(reason_to_proto, reason_from_proto, MissReason, "miss reason");
word!(kind_to_proto, kind_from_proto, RequestKind, "request kind");

/// A class that may be left out.
pub fn class_opt_from_proto(number: i32) -> Result<Option<Class>> {
    if number == 0 { Ok(None) } else { class_from_proto(number).map(Some) }
}

/// A tier that may be left out; one that this version does not know reads as none.
pub fn tier_opt_from_proto(number: i32) -> Option<Tier> {
    Tier::from_code(code(number))
}

/// A reason that may be left out; one that this version does not know reads as none.
pub fn reason_opt_from_proto(number: i32) -> Option<MissReason> {
    MissReason::from_code(code(number))
}

/// What is sent for an optional word: 0 for none.
pub fn reason_opt_to_proto(reason: Option<MissReason>) -> i32 {
    reason.map_or(0, reason_to_proto)
}

/// What is sent for an optional word: 0 for none.
pub fn tier_opt_to_proto(tier: Option<Tier>) -> i32 {
    tier.map_or(0, tier_to_proto)
}

/// Statuses as they travel in a match: one byte each.
pub fn statuses_to_proto(statuses: &[PartStatus]) -> Bytes {
    statuses.iter().map(|s| s.code()).collect()
}

/// Statuses as they travel in a match. One that this version does not know is no hit, hence a miss.
pub fn statuses_from_proto(bytes: &[u8]) -> Vec<PartStatus> {
    bytes.iter().map(|b| PartStatus::from_code(*b).unwrap_or(PartStatus::Miss)).collect()
}

/// Tiers as they travel in a match: one byte each, 0 where the position is no hit.
pub fn tiers_to_proto(tiers: &[Option<Tier>]) -> Bytes {
    tiers.iter().map(|t| t.map_or(0, Tier::code)).collect()
}

/// Tiers as they travel in a match.
pub fn tiers_from_proto(bytes: &[u8]) -> Vec<Option<Tier>> {
    bytes.iter().map(|b| Tier::from_code(*b)).collect()
}

/// What a put asks of a tier that is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Retention {
    /// The coldest blocks make room.
    #[default]
    BestEffort,
    /// Back-pressure wins over dropping as long as NVMe has room.
    Keep,
}

/// The wire's number of a retention.
pub const fn retention_to_proto(retention: Retention) -> i32 {
    match retention {
        Retention::BestEffort => v1::reserve_request::Retention::BestEffort as i32,
        Retention::Keep => v1::reserve_request::Retention::Keep as i32,
    }
}

/// A retention from its number on the wire; unset reads as best effort.
pub fn retention_from_proto(number: i32) -> Result<Retention> {
    match v1::reserve_request::Retention::try_from(number) {
        Ok(v1::reserve_request::Retention::Unspecified | v1::reserve_request::Retention::BestEffort) => {
            Ok(Retention::BestEffort)
        }
        Ok(v1::reserve_request::Retention::Keep) => Ok(Retention::Keep),
        Err(_) => Err(unknown("retention", number)),
    }
}

/// Whether a session takes appends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SessionState {
    /// It does.
    Open,
    /// Not until it is opened again.
    Closed,
}

impl SessionState {
    /// The word used in JSON and the CLI.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }
}

/// The wire's number of a session's state.
pub const fn session_state_to_proto(state: SessionState) -> i32 {
    match state {
        SessionState::Open => v1::SessionState::Open as i32,
        SessionState::Closed => v1::SessionState::Closed as i32,
    }
}

/// A session's state from its number on the wire; `None` where it is left out.
pub fn session_state_opt_from_proto(number: i32) -> Result<Option<SessionState>> {
    match v1::SessionState::try_from(number) {
        Ok(v1::SessionState::Unspecified) => Ok(None),
        Ok(v1::SessionState::Open) => Ok(Some(SessionState::Open)),
        Ok(v1::SessionState::Closed) => Ok(Some(SessionState::Closed)),
        Err(_) => Err(unknown("session state", number)),
    }
}

/// What an engine knows of a session's future.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionHint {
    /// It will not come back.
    Finished,
    /// It waits for somebody; nobody knows how long.
    Paused,
    /// It is expected back after so long.
    DueIn(Duration),
    /// Higher stays longer.
    Priority(i32),
}

/// A hint as it travels.
pub fn session_hint_to_proto(hint: SessionHint) -> v1::Hint {
    let what = match hint {
        SessionHint::Finished => v1::hint::What::Finished(true),
        SessionHint::Paused => v1::hint::What::Paused(true),
        SessionHint::DueIn(after) => v1::hint::What::DueMs(long_millis_to_proto(after)),
        SessionHint::Priority(priority) => v1::hint::What::Priority(priority),
    };
    v1::Hint { what: Some(what) }
}

/// A hint; `None` for one that says nothing, or that this version does not know.
pub fn session_hint_from_proto(hint: &v1::Hint) -> Option<SessionHint> {
    match hint.what? {
        v1::hint::What::Finished(true) => Some(SessionHint::Finished),
        v1::hint::What::Paused(true) => Some(SessionHint::Paused),
        v1::hint::What::DueMs(ms) => Some(SessionHint::DueIn(Duration::from_millis(ms))),
        v1::hint::What::Priority(priority) => Some(SessionHint::Priority(priority)),
        v1::hint::What::Finished(false) | v1::hint::What::Paused(false) => None,
    }
}

// ---------------------------------------------------------------- ids

/// A handle as it travels.
pub const fn handle_to_proto(handle: Handle) -> v1::Handle {
    v1::Handle { namespace_id: handle.namespace.0, revision: handle.revision.0 }
}

/// A handle must be there, and neither of its numbers is 0.
pub fn handle_from_proto(handle: Option<v1::Handle>) -> Result<Handle> {
    match handle {
        Some(h) if h.namespace_id != 0 && h.revision != 0 => {
            Ok(Handle { namespace: NamespaceId(h.namespace_id), revision: Revision(h.revision) })
        }
        _ => {
            Err(Error::new(ErrorKind::InvalidArgument, "the call names no namespace; register one and send its handle"))
        }
    }
}

/// Checks a key's length.
pub fn key_from_proto(bytes: &[u8]) -> Result<Key> {
    Key::new(bytes)
}

/// Exactly 16 bytes.
pub fn instance_from_proto(bytes: &[u8]) -> Result<InstanceId> {
    bytes.try_into().map(InstanceId).map_err(|_| {
        Error::new(ErrorKind::InvalidArgument, "an instance id has 16 bytes").with("instance_id_bytes", bytes.len())
    })
}

/// A version that may be left out: 0 is none.
pub const fn version_from_proto(version: u64) -> Option<Version> {
    if version == 0 { None } else { Some(Version(version)) }
}

/// What is sent for an optional version: 0 for none.
pub fn version_to_proto(version: Option<Version>) -> u64 {
    version.map_or(0, |v| v.0)
}

/// A lease that may be left out: 0 is none.
pub const fn lease_from_proto(lease: u64) -> Option<LeaseId> {
    if lease == 0 { None } else { Some(LeaseId(lease)) }
}

/// What is sent for an optional lease: 0 for none.
pub fn lease_to_proto(lease: Option<LeaseId>) -> u64 {
    lease.map_or(0, |l| l.0)
}

/// Milliseconds as they travel: rounded up, so that a short wait is not sent as none; saturating.
pub fn millis_to_proto(d: Duration) -> u32 {
    u32::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

/// A duration in milliseconds that may be left out: 0 is none.
pub fn millis_from_proto(ms: u32) -> Option<Duration> {
    (ms != 0).then(|| Duration::from_millis(u64::from(ms)))
}

/// Milliseconds of a time that may be longer than 49 days: rounded up; saturating.
pub fn long_millis_to_proto(d: Duration) -> u64 {
    u64::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// The same that may be left out: 0 is none.
pub fn long_millis_from_proto(ms: u64) -> Option<Duration> {
    (ms != 0).then(|| Duration::from_millis(ms))
}

// ---------------------------------------------------------------- what every call carries

/// Request info as it travels.
pub const fn info_to_proto(info: RequestInfo) -> v1::RequestInfo {
    v1::RequestInfo {
        kind: kind_to_proto(info.kind),
        input_tokens: info.input_tokens,
        output_tokens: info.output_tokens,
    }
}

/// Request info; a kind that this version does not know is one that was not said.
pub fn info_from_proto(info: Option<v1::RequestInfo>) -> RequestInfo {
    info.map_or_else(RequestInfo::default, |i| RequestInfo {
        kind: kind_from_proto(i.kind).unwrap_or(RequestKind::Unspecified),
        input_tokens: i.input_tokens,
        output_tokens: i.output_tokens,
        ..RequestInfo::default()
    })
}

/// A session's id as a number for the policy: what [`context_to_proto`] made of one, or a sum of any other text. 0: none.
pub fn session_number(id: &str) -> u64 {
    let number = (id.len() == 16).then(|| u64::from_str_radix(id, 16).ok()).flatten();
    // FNV-1a: the policy only has to tell sessions from each other.
    let sum = || id.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    if id.is_empty() { 0 } else { number.unwrap_or_else(sum) }
}

fn hint_to_proto(hint: Hint) -> v1::Hint {
    let what = match hint {
        Hint::Ends => v1::hint::What::Finished(true),
        Hint::DueIn(ms) => v1::hint::What::DueMs(u64::from(ms)),
    };
    v1::Hint { what: Some(what) }
}

/// What the policy understands of a hint: that a session ends, or when it is due.
fn hint_from_proto(hint: &v1::Hint) -> Option<Hint> {
    match hint.what? {
        v1::hint::What::Finished(true) => Some(Hint::Ends),
        v1::hint::What::DueMs(ms) => Some(Hint::DueIn(u32::try_from(ms).unwrap_or(u32::MAX))),
        v1::hint::What::Finished(false) | v1::hint::What::Paused(_) | v1::hint::What::Priority(_) => None,
    }
}

fn priority_to_proto(priority: Priority) -> v1::Hint {
    let number = match priority {
        Priority::Low => -1,
        Priority::Normal => 0,
        Priority::High => 1,
    };
    v1::Hint { what: Some(v1::hint::What::Priority(number)) }
}

fn priority_from_proto(hint: &v1::Hint) -> Option<Priority> {
    match hint.what? {
        v1::hint::What::Priority(number) => Some(Priority::of_number(number)),
        _ => None,
    }
}

/// What a server reads of a [`v1::CallContext`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Calls of one request share it.
    pub request_id: RequestId,
    /// From arrival; `None`: the server's default.
    pub deadline: Option<Duration>,
    /// For the policy.
    pub info: RequestInfo,
    /// The policy's clock, where requests carry it; `None`: not said.
    pub policy_clock: Option<Instant>,
    /// Accounting label, never part of a key.
    pub label: String,
}

/// A call's context as it travels.
pub fn context_to_proto(context: &Context) -> v1::CallContext {
    let info = &context.info;
    v1::CallContext {
        request_id: Bytes::copy_from_slice(context.request_id.as_bytes()),
        deadline_ms: context.deadline.map_or(0, millis_to_proto),
        info: Some(info_to_proto(context.info)),
        policy_clock_ms: context.policy_clock.map_or(0, |i| i.0),
        session_id: if info.session == 0 { String::new() } else { format!("{:016x}", info.session) },
        hints: info.hint.map(hint_to_proto).into_iter().chain(info.priority.map(priority_to_proto)).collect(),
        label: context.label.clone(),
    }
}

/// A call's context; one that is absent reads as the default.
pub fn context_from_proto(context: Option<v1::CallContext>) -> Result<Context> {
    let Some(c) = context else { return Ok(Context::default()) };
    Ok(Context {
        request_id: RequestId::new(&c.request_id)?,
        deadline: millis_from_proto(c.deadline_ms),
        info: RequestInfo {
            session: session_number(&c.session_id),
            hint: c.hints.iter().find_map(hint_from_proto),
            priority: c.hints.iter().find_map(priority_from_proto),
            ..info_from_proto(c.info)
        },
        policy_clock: (c.policy_clock_ms != 0).then_some(Instant(c.policy_clock_ms)),
        label: c.label,
    })
}

// ---------------------------------------------------------------- formats

/// A format as it travels.
pub fn format_to_proto(format: &Format) -> v1::Format {
    let t = format.topology;
    v1::Format {
        model: format.model.clone(),
        dtype: format.dtype.clone(),
        layout: format.layout.clone(),
        hash_algorithm: format.hash_algorithm.clone(),
        hash_seed: format.hash_seed.clone(),
        tokens_per_key: format.tokens_per_key,
        topology: Some(v1::Topology {
            canonical: t.canonical,
            tp: u32::from(t.tp),
            pp: u32::from(t.pp),
            cp: u32::from(t.cp),
        }),
        groups: format.groups.iter().map(group_to_proto).collect(),
        prefill_us_per_token: format.prefill_us_per_token,
        prefill_doubles_at_tokens: format.prefill_doubles_at_tokens,
    }
}

fn group_to_proto(group: &Group) -> v1::Group {
    let rule = match group.rule {
        Rule::All => v1::group::Rule::All(v1::group::All {}),
        Rule::Window { tokens } => v1::group::Rule::Window(v1::group::Window { tokens }),
        Rule::State => v1::group::Rule::State(v1::group::State {}),
    };
    let size = match group.size {
        SizeRule::Exact(n) => v1::size_rule::Rule::Exact(n),
        SizeRule::MultipleOf { step, max } => v1::size_rule::Rule::MultipleOf(v1::size_rule::MultipleOf { step, max }),
        SizeRule::UpTo(n) => v1::size_rule::Rule::UpTo(n),
    };
    v1::Group {
        rule: Some(rule),
        tokens_per_block: group.tokens_per_block,
        shards: u32::from(group.shards),
        replicated: group.replicated,
        size: Some(v1::SizeRule { rule: Some(size) }),
    }
}

/// A format from the wire, checked whole: what comes back is valid.
pub fn format_from_proto(format: Option<v1::Format>) -> Result<Format> {
    let missing = |field: &'static str| {
        Error::new(ErrorKind::InvalidArgument, "a field of the format is missing").with("field", field)
    };
    let small = |field: &'static str, n: u32| {
        u16::try_from(n).map_err(|_| {
            Error::new(ErrorKind::InvalidArgument, "a number of the format is over 65535")
                .with("field", field)
                .with("number", n)
        })
    };
    let f = format.ok_or_else(|| missing("format"))?;
    let t = f.topology.ok_or_else(|| missing("topology"))?;
    let mut groups = Vec::with_capacity(f.groups.len().min(kvkeep_core::format::GROUPS_MAX));
    for g in f.groups {
        let rule = match g.rule.ok_or_else(|| missing("group.rule"))? {
            v1::group::Rule::All(_) => Rule::All,
            v1::group::Rule::Window(w) => Rule::Window { tokens: w.tokens },
            v1::group::Rule::State(_) => Rule::State,
        };
        let size = match g.size.and_then(|s| s.rule).ok_or_else(|| missing("group.size"))? {
            v1::size_rule::Rule::Exact(n) => SizeRule::Exact(n),
            v1::size_rule::Rule::MultipleOf(m) => SizeRule::MultipleOf { step: m.step, max: m.max },
            v1::size_rule::Rule::UpTo(n) => SizeRule::UpTo(n),
        };
        groups.push(Group {
            rule,
            tokens_per_block: g.tokens_per_block,
            shards: small("group.shards", g.shards)?,
            replicated: g.replicated,
            size,
        });
    }
    let format = Format {
        model: f.model,
        dtype: f.dtype,
        layout: f.layout,
        hash_algorithm: f.hash_algorithm,
        hash_seed: f.hash_seed,
        tokens_per_key: f.tokens_per_key,
        topology: Topology {
            canonical: t.canonical,
            tp: small("topology.tp", t.tp)?,
            pp: small("topology.pp", t.pp)?,
            cp: small("topology.cp", t.cp)?,
        },
        groups,
        prefill_us_per_token: f.prefill_us_per_token,
        prefill_doubles_at_tokens: f.prefill_doubles_at_tokens,
    };
    format.validate()?;
    Ok(format)
}

// ---------------------------------------------------------------- errors

/// Every kind, for the way back from its word.
const KINDS: [ErrorKind; 17] = [
    ErrorKind::InvalidArgument,
    ErrorKind::UnknownNamespace,
    ErrorKind::UnknownSession,
    ErrorKind::FormatMismatch,
    ErrorKind::StaleRevision,
    ErrorKind::WrongSize,
    ErrorKind::Checksum,
    ErrorKind::TooLarge,
    ErrorKind::Throttled,
    ErrorKind::Expired,
    ErrorKind::Conflict,
    ErrorKind::Io,
    ErrorKind::Corrupt,
    ErrorKind::Full,
    ErrorKind::Config,
    ErrorKind::Unavailable,
    ErrorKind::Denied,
];

/// The kind that a word on the wire names; `None` for one that this version does not know.
pub fn error_kind_from_word(word: &str) -> Option<ErrorKind> {
    KINDS.into_iter().find(|k| k.word() == word)
}

/// An error as it travels inside answers and, encoded, in the trailer of a failed call.
pub fn error_to_proto(error: &Error) -> v1::ErrorDetail {
    v1::ErrorDetail {
        kind: error.kind().word().to_owned(),
        message: error.message().to_owned(),
        retryable: error.is_retryable(),
        retry_after_ms: error.retry_hint().map_or(0, millis_to_proto),
        fields: error.context().iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect(),
    }
}

/// The kind of error of a call whose deadline passed; it belongs to the wire, not to the store.
pub const LATE: &str = "late";

/// The answer to a call whose deadline passed; what was asked may still be done.
pub fn late(why: &str) -> v1::ErrorDetail {
    v1::ErrorDetail { kind: LATE.to_owned(), message: why.to_owned(), ..Default::default() }
}

/// The answer to a call on a connection that has not said hello.
pub fn hello_required() -> v1::ErrorDetail {
    v1::ErrorDetail {
        kind: HELLO_REQUIRED.to_owned(),
        message: "this connection has not said hello".to_owned(),
        retryable: true,
        retry_after_ms: 0,
        fields: Default::default(),
    }
}

/// A failed gRPC call: the nearest gRPC code and a readable message for any client, the detail in the trailer for ours.
pub fn status_from_detail(detail: &v1::ErrorDetail) -> tonic::Status {
    let code = match error_kind_from_word(&detail.kind) {
        Some(ErrorKind::InvalidArgument | ErrorKind::WrongSize | ErrorKind::Config) => tonic::Code::InvalidArgument,
        Some(ErrorKind::UnknownNamespace | ErrorKind::UnknownSession) => tonic::Code::NotFound,
        Some(ErrorKind::FormatMismatch | ErrorKind::StaleRevision | ErrorKind::Expired) => {
            tonic::Code::FailedPrecondition
        }
        Some(ErrorKind::Checksum | ErrorKind::Corrupt) => tonic::Code::DataLoss,
        Some(ErrorKind::TooLarge) => tonic::Code::OutOfRange,
        Some(ErrorKind::Throttled | ErrorKind::Full) => tonic::Code::ResourceExhausted,
        Some(ErrorKind::Conflict) => tonic::Code::Aborted,
        Some(ErrorKind::Io) => tonic::Code::Internal,
        Some(ErrorKind::Unavailable) => tonic::Code::Unavailable,
        Some(ErrorKind::Denied) => tonic::Code::PermissionDenied,
        None if detail.kind == HELLO_REQUIRED => tonic::Code::FailedPrecondition,
        None => tonic::Code::Unknown,
    };
    let mut message = format!("{}: {}", detail.kind, detail.message);
    let mut fields: Vec<_> = detail.fields.iter().collect();
    fields.sort();
    for (i, (name, value)) in fields.iter().enumerate() {
        message.push_str(if i == 0 { " (" } else { ", " });
        message.push_str(&format!("{name}={value}"));
    }
    if !fields.is_empty() {
        message.push(')');
    }
    let mut status = tonic::Status::new(code, message);
    status.metadata_mut().insert_bin(ERROR_DETAIL_KEY, MetadataValue::from_bytes(&detail.encode_to_vec()));
    status
}

/// A failed gRPC call from the error of the store.
pub fn status_from_error(error: &Error) -> tonic::Status {
    status_from_detail(&error_to_proto(error))
}

/// The detail that a failed call carries, if it does.
pub fn detail_from_status(status: &tonic::Status) -> Option<v1::ErrorDetail> {
    let bytes = status.metadata().get_bin(ERROR_DETAIL_KEY)?.to_bytes().ok()?;
    v1::ErrorDetail::decode(bytes).ok()
}

#[cfg(test)]
mod tests;
