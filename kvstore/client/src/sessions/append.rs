//! What is appended, and how a large append is cut into calls.

use std::ops::Range;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::sessions::info::ContentPart;

/// Token ids of one call.
const TOKENS_PER_CALL: usize = 64 << 10;
/// Content parts of one call.
const CONTENT_PER_CALL: usize = 1024;

/// Positions, token ids and content to add to the end of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Append {
    /// Compare-and-set: positions the session has now.
    pub from_position: u64,
    /// Of the positions after those, in chain order. Their blocks have been put.
    pub keys: Vec<Bytes>,
    /// Compare-and-set, where token ids are given: tokens the session has now.
    pub from_token: u64,
    /// Optional; may run ahead of the last whole position.
    pub token_ids: Vec<u32>,
    /// Within the tokens of this append, in order.
    pub content: Vec<ContentPart>,
}

/// What a session has after an append.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// Positions.
    pub positions: u64,
    /// Tokens whose ids are kept.
    pub tokens: u64,
    /// All of it was there already.
    pub repeated: bool,
}

/// What one call of an append carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) keys: Range<usize>,
    pub(super) tokens: Range<usize>,
    pub(super) content: Range<usize>,
}

impl Append {
    /// Cuts it into calls of at most `keys_max` keys: token ids first, so that they are never behind the positions. Content
    /// is never cut. At least one step.
    pub(super) fn steps(&self, keys_max: usize) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        let (mut token, mut content) = (0, 0);
        while token < self.token_ids.len() {
            let (tokens, parts) = self.cut(token, content)?;
            (token, content) = (tokens.end, parts.end);
            steps.push(Step { keys: 0..0, tokens, content: parts });
        }
        if content < self.content.len() {
            return Err(Error::invalid("content lies outside of the tokens that are appended"));
        }
        let mut key = 0;
        while key < self.keys.len() || steps.is_empty() {
            let keys = key..self.keys.len().min(key + keys_max.max(1));
            key = keys.end;
            match steps.last_mut() {
                Some(last) if keys.start == 0 => last.keys = keys,
                _ => steps.push(Step {
                    keys,
                    tokens: self.token_ids.len()..self.token_ids.len(),
                    content: self.content.len()..self.content.len(),
                }),
            }
        }
        Ok(steps)
    }

    /// The tokens of one call from `first` on, and the content that begins among them from `part` on.
    fn cut(&self, first: usize, part: usize) -> Result<(Range<usize>, Range<usize>)> {
        let outside = || Error::invalid("content lies outside of the tokens that are appended, or is out of order");
        let last = self.token_ids.len();
        let mut end = last.min(first + TOKENS_PER_CALL);
        let mut parts = part..part;
        for (i, content) in self.content.iter().enumerate().skip(part) {
            let offset = content.first_token.checked_sub(self.from_token).ok_or_else(outside)?;
            let begins = usize::try_from(offset).map_err(|_| outside())?;
            let ends = begins.saturating_add(content.tokens as usize);
            if begins < first || ends > last {
                return Err(outside());
            }
            if begins >= end {
                break;
            }
            if i - part == CONTENT_PER_CALL || ends > end {
                // It goes with the next call, unless it is all there is of this one.
                if begins > first {
                    end = begins;
                    break;
                }
                end = ends.max(end);
            }
            parts.end = i + 1;
        }
        Ok((first..end, parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn append(keys: usize, tokens: usize, content: &[(u64, u32)]) -> Append {
        let part = |&(first, tokens): &(u64, u32)| ContentPart {
            first_token: 7 + first,
            tokens,
            content_id: Bytes::from_static(b"image"),
        };
        Append {
            from_position: 3,
            keys: vec![Bytes::from_static(b"k"); keys],
            from_token: 7,
            token_ids: vec![1; tokens],
            content: content.iter().map(part).collect(),
        }
    }

    #[test]
    fn a_small_append_is_one_call() {
        let step = |keys, tokens, content| vec![Step { keys, tokens, content }];
        assert_eq!(append(2, 40, &[(3, 5)]).steps(256).unwrap(), step(0..2, 0..40, 0..1));
        assert_eq!(append(0, 0, &[]).steps(256).unwrap(), step(0..0, 0..0, 0..0));
        assert_eq!(append(0, 5, &[]).steps(256).unwrap(), step(0..0, 0..5, 0..0));
    }

    #[test]
    fn content_outside_of_the_tokens_is_refused() {
        assert!(append(1, 0, &[(0, 1)]).steps(256).is_err());
        assert!(append(1, 10, &[(8, 3)]).steps(256).is_err());
        assert!(append(1, 10, &[(5, 1), (2, 1)]).steps(256).is_ok(), "order within one call is the server's to judge");
        let before = Append {
            content: vec![ContentPart { first_token: 6, ..append(0, 9, &[(0, 1)]).content[0].clone() }],
            ..append(0, 9, &[])
        };
        assert!(before.steps(256).is_err());
    }

    proptest! {
        #[test]
        fn every_key_token_and_part_goes_once_and_no_part_is_cut(
            keys in 0usize..1000,
            spans in proptest::collection::vec((0u64..9000, 1u32..9000), 0..40),
            keys_max in 1usize..300,
        ) {
            let mut at = 0;
            let content: Vec<_> = spans.iter().map(|&(gap, n)| {
                let part = (at + gap, n);
                at = part.0 + u64::from(n);
                part
            }).collect();
            let append = append(keys, at as usize + 10, &content);
            let steps = append.steps(keys_max).unwrap();
            let (mut key, mut token, mut part) = (0, 0, 0);
            for step in &steps {
                prop_assert_eq!((step.keys.start.min(key), step.tokens.start, step.content.start), (step.keys.start, token, part));
                prop_assert!(step.keys.is_empty() || step.keys.start == key);
                prop_assert!(step.keys.len() <= keys_max);
                for i in step.content.clone() {
                    let (first, n) = content[i];
                    prop_assert!(first >= step.tokens.start as u64 && first + u64::from(n) <= step.tokens.end as u64);
                }
                key = key.max(step.keys.end);
                token = step.tokens.end;
                part = step.content.end;
                prop_assert!(key == 0 || token == append.token_ids.len(), "token ids go first");
            }
            prop_assert_eq!((key, token, part), (keys, append.token_ids.len(), content.len()));
        }
    }
}
