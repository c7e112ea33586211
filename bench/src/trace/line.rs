//! One line of a trace. Three dialects, told apart by the fields they have:
//!
//! | dialect | fields | time | tokens per id |
//! |---|---|---|---|
//! | `mooncake` | timestamp, input_length, output_length, hash_ids | ms | 512 |
//! | `mooncake+sessions` | the same with session, turn, type | ms | 512 |
//! | `qwen-bailian` | chat_id, parent_chat_id, timestamp, input_length, output_length, type, turn, hash_ids | s | 16 |

use std::borrow::Cow;

use kvkeep_core::RequestKind;
use serde::Deserialize;

use crate::keys::PrefixId;

/// Longest line of a trace, bytes. Two million tokens in blocks of 16 need about 1.2 MB.
pub const LINE_BYTES_MAX: usize = 8 << 20;
/// Longest input, tokens: keeps every product of tokens and bytes far from overflow.
pub const INPUT_TOKENS_MAX: u32 = 1 << 28;

/// Which fields a trace has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Published Mooncake JSONL.
    Mooncake,
    /// Mooncake JSONL with sessions added.
    MooncakeSessions,
    /// Published Qwen-Bailian JSONL.
    QwenBailian,
}

impl Dialect {
    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mooncake => "mooncake",
            Self::MooncakeSessions => "mooncake+sessions",
            Self::QwenBailian => "qwen-bailian",
        }
    }

    /// Tokens that one id covers.
    pub fn tokens_per_block(self) -> u32 {
        match self {
            Self::Mooncake | Self::MooncakeSessions => 512,
            Self::QwenBailian => 16,
        }
    }
}

/// Who a request belongs to, as far as its line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nothing said: it shows in the blocks.
    Unsaid,
    /// A session by its id.
    Session(u64),
    /// A chat turn and the turn before it.
    Chat {
        /// Of this request.
        id: i64,
        /// Of the request before; negative: the first one.
        parent: i64,
    },
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Which fields it had.
    pub dialect: Dialect,
    /// Milliseconds on the trace's clock.
    pub at_ms: u64,
    /// Whose it is.
    pub owner: Owner,
    /// Kind of request.
    pub kind: RequestKind,
    /// Tokens of the input.
    pub input_tokens: u32,
    /// Tokens of the output.
    pub output_tokens: u32,
    /// Prefix blocks of the input.
    pub blocks: Vec<PrefixId>,
}

#[derive(Deserialize)]
struct Fields<'a> {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
    session: Option<u64>,
    chat_id: Option<i64>,
    parent_chat_id: Option<i64>,
    #[serde(borrow, rename = "type")]
    kind: Option<Cow<'a, str>>,
}

/// Reads one line. What it allocates is bounded by the line's length.
pub fn parse(line: &[u8]) -> Result<Line, String> {
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("a line has at most {LINE_BYTES_MAX} bytes"));
    }
    let fields: Fields<'_> = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    let (dialect, owner, ms_per_unit) = match (fields.chat_id, fields.session) {
        (Some(id), _) => {
            (Dialect::QwenBailian, Owner::Chat { id, parent: fields.parent_chat_id.unwrap_or(-1) }, 1000.0)
        }
        (None, Some(session)) => (Dialect::MooncakeSessions, Owner::Session(session), 1.0),
        (None, None) => (Dialect::Mooncake, Owner::Unsaid, 1.0),
    };
    if !fields.timestamp.is_finite() || fields.timestamp < 0.0 {
        return Err("timestamp is a number from 0 on".into());
    }
    if fields.input_length == 0 || fields.input_length > INPUT_TOKENS_MAX {
        return Err(format!("input_length is 1 to {INPUT_TOKENS_MAX}"));
    }
    let blocks_max = fields.input_length.div_ceil(dialect.tokens_per_block());
    if fields.hash_ids.is_empty() || fields.hash_ids.len() > blocks_max as usize {
        return Err(format!(
            "{} tokens have 1 to {blocks_max} hash_ids in a {} trace, not {}",
            fields.input_length,
            dialect.name(),
            fields.hash_ids.len()
        ));
    }
    Ok(Line {
        dialect,
        at_ms: (fields.timestamp * ms_per_unit) as u64,
        owner,
        kind: kind(fields.kind.as_deref()),
        input_tokens: fields.input_length,
        output_tokens: fields.output_length,
        blocks: fields.hash_ids.into_iter().map(PrefixId).collect(),
    })
}

fn kind(word: Option<&str>) -> RequestKind {
    match word {
        None => RequestKind::Unspecified,
        Some("user") => RequestKind::User,
        Some("tool") => RequestKind::Tool,
        Some("subagent") => RequestKind::Subagent,
        // `chat`, and what the published chat traces say: text, search, image, file.
        Some(_) => RequestKind::Chat,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MOONCAKE: &str = r#"{"timestamp":27482,"input_length":1100,"output_length":52,"hash_ids":[46,47,48]}"#;

    #[test]
    fn every_dialect_is_told_by_its_fields() {
        let line = parse(MOONCAKE.as_bytes()).unwrap();
        assert_eq!(
            line,
            Line {
                dialect: Dialect::Mooncake,
                at_ms: 27482,
                owner: Owner::Unsaid,
                kind: RequestKind::Unspecified,
                input_tokens: 1100,
                output_tokens: 52,
                blocks: vec![PrefixId(46), PrefixId(47), PrefixId(48)],
            }
        );
        let sessions = MOONCAKE.replace("{", r#"{"session":3,"turn":2,"type":"tool","#);
        let line = parse(sessions.as_bytes()).unwrap();
        assert_eq!((line.dialect, line.owner), (Dialect::MooncakeSessions, Owner::Session(3)));
        assert_eq!(line.kind, RequestKind::Tool);
        let qwen = r#"{"chat_id":159,"parent_chat_id":55,"timestamp":61.114,"input_length":21,"output_length":132,
                       "type":"text","turn":2,"hash_ids":[1089,1090]}"#;
        let line = parse(qwen.as_bytes()).unwrap();
        assert_eq!((line.dialect, line.owner), (Dialect::QwenBailian, Owner::Chat { id: 159, parent: 55 }));
        assert_eq!((line.at_ms, line.kind), (61114, RequestKind::Chat));
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        for (bad, reason) in [
            (MOONCAKE.replace("1100", "0"), "input_length"),
            (MOONCAKE.replace("1100", "1024"), "hash_ids"),
            (MOONCAKE.replace("46,47,48", ""), "hash_ids"),
            (MOONCAKE.replace("27482", "-1"), "timestamp"),
            (MOONCAKE.replace("27482", "1e999"), "number"),
            (MOONCAKE.replace("46", "-46"), "integer"),
            (MOONCAKE.replace("hash_ids", "ids"), "hash_ids"),
            (String::from("[]"), ""),
        ] {
            let why = parse(bad.as_bytes()).unwrap_err();
            assert!(why.contains(reason), "{bad}: {why}");
        }
    }

    proptest! {
        /// Whatever the bytes are, the answer is a line within its bounds or a reason.
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        /// The same for lines that are nearly right, where a parser's corners are.
        #[test]
        fn a_mutated_line_never_panics(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut bytes = MOONCAKE.as_bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = parse(&bytes);
            bytes.truncate(cut.index(bytes.len()));
            let _ = parse(&bytes);
        }

        #[test]
        fn numbers_of_any_size_never_overflow(time: f64, input: u64, ids: Vec<u64>) {
            let text = format!(r#"{{"timestamp":{time:e},"input_length":{input},"output_length":0,"hash_ids":{ids:?}}}"#);
            if let Ok(line) = parse(text.as_bytes()) {
                prop_assert!(line.blocks.len() <= line.input_tokens.div_ceil(512) as usize);
            }
        }
    }
}
