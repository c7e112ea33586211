//! What a block of token ids holds.
//!
//! | at | size | field |
//! |----|------|-------|
//! |  0 | 1 | version, 1 |
//! |  1 | 3 | zeros |
//! |  4 | 4 | token ids, n |
//! |  8 | 8 | index of the first in its session |
//! | 16 | 4 | content parts, m |
//! | 20 | 4 n | token ids |
//! | .. | m times | content: first token 8, tokens 4, bytes of the id 1, the id |
//!
//! Numbers are little-endian. The block's own sums say whether it is what was put.

use crate::error::{Error, ErrorKind, Result};

/// Token ids of one block: of one append.
pub const TOKENS_MAX: usize = 1 << 18;
/// Content parts of one block.
pub const CONTENT_MAX: usize = 1024;
/// Longest content id, in bytes.
pub const CONTENT_ID_BYTES_MAX: usize = 128;
/// Largest block of token ids, in bytes.
pub const TEXT_BYTES_MAX: usize = HEAD_BYTES + 4 * TOKENS_MAX + CONTENT_MAX * (13 + CONTENT_ID_BYTES_MAX);

const VERSION: u8 = 1;
const HEAD_BYTES: usize = 20;

/// Content that has no token ids of its own: it stands for some tokens of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Index of its first token in the session.
    pub first: u64,
    /// Tokens that it stands for.
    pub tokens: u32,
    /// The caller's name for it, 1 to [`CONTENT_ID_BYTES_MAX`] bytes.
    pub id: Vec<u8>,
}

/// Token ids and content of one append.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Index of the first in its session.
    pub first: u64,
    /// In order.
    pub ids: Vec<u32>,
    /// By first token, within the ids.
    pub content: Vec<Content>,
}

impl Tokens {
    /// # Errors
    /// `TooLarge` and `InvalidArgument` for what a block cannot hold.
    pub fn check(&self) -> Result<()> {
        if self.ids.len() > TOKENS_MAX || self.content.len() > CONTENT_MAX {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "more token ids or content parts than one append may bring; split it",
            )
            .with("tokens", self.ids.len())
            .with("tokens_max", TOKENS_MAX)
            .with("content", self.content.len())
            .with("content_max", CONTENT_MAX));
        }
        let end = self.first.checked_add(self.ids.len() as u64);
        let within = |c: &Content| {
            let ends = c.first.checked_add(u64::from(c.tokens));
            c.first >= self.first && ends.zip(end).is_some_and(|(ends, end)| ends <= end)
        };
        let fits = |c: &Content| (1..=CONTENT_ID_BYTES_MAX).contains(&c.id.len()) && within(c);
        if !self.content.iter().all(fits) || !self.content.is_sorted_by_key(|c| c.first) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "content stands in order, within the token ids of its append, under an id of 1 to 128 bytes",
            ));
        }
        Ok(())
    }

    /// As it stands in the block. [`Self::check`] comes first.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_BYTES + 4 * self.ids.len());
        out.extend([VERSION, 0, 0, 0]);
        out.extend((self.ids.len() as u32).to_le_bytes());
        out.extend(self.first.to_le_bytes());
        out.extend((self.content.len() as u32).to_le_bytes());
        out.extend(self.ids.iter().flat_map(|id| id.to_le_bytes()));
        for c in &self.content {
            out.extend(c.first.to_le_bytes());
            out.extend(c.tokens.to_le_bytes());
            out.push(c.id.len() as u8);
            out.extend(&c.id);
        }
        out
    }

    /// From the block.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are no such block.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let tokens = Self::read(bytes).ok_or_else(|| Error::new(ErrorKind::Corrupt, "no block of token ids"))?;
        tokens.check().map_err(|_| Error::new(ErrorKind::Corrupt, "a block of token ids contradicts itself"))?;
        Ok(tokens)
    }

    fn read(mut at: &[u8]) -> Option<Self> {
        let at = &mut at;
        let version = u32::from_le_bytes(take(at)?);
        let count = u32::from_le_bytes(take(at)?) as usize;
        let first = u64::from_le_bytes(take(at)?);
        let content_count = u32::from_le_bytes(take(at)?) as usize;
        if version != u32::from(VERSION) || count > TOKENS_MAX || content_count > CONTENT_MAX || at.len() / 4 < count {
            return None;
        }
        let ids = (0..count).map(|_| Some(u32::from_le_bytes(take(at)?))).collect::<Option<_>>()?;
        let mut content = Vec::new();
        for _ in 0..content_count {
            let (first, tokens) = (u64::from_le_bytes(take(at)?), u32::from_le_bytes(take(at)?));
            let [len] = take::<1>(at)?;
            let (id, rest) = at.split_at_checked(usize::from(len))?;
            *at = rest;
            content.push(Content { first, tokens, id: id.to_vec() });
        }
        at.is_empty().then_some(Self { first, ids, content })
    }
}

fn take<const N: usize>(at: &mut &[u8]) -> Option<[u8; N]> {
    let (now, rest) = at.split_first_chunk::<N>()?;
    *at = rest;
    Some(*now)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_block_reads_back_as_it_was_written(first in 0..u64::MAX / 2, ids in proptest::collection::vec(any::<u32>(), 1..200), parts in proptest::collection::vec((0..200u64, 0..9u32, 1..20usize), 0..5)) {
            let mut content: Vec<_> = parts
                .into_iter()
                .map(|(at, tokens, len)| {
                    let at = at % ids.len() as u64;
                    let tokens = tokens.min((ids.len() as u64 - at) as u32);
                    Content { first: first + at, tokens, id: vec![7; len] }
                })
                .collect();
            content.sort_by_key(|c| c.first);
            let tokens = Tokens { first, ids, content };
            tokens.check().unwrap();
            prop_assert_eq!(Tokens::decode(&tokens.encode()).unwrap(), tokens);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Tokens::decode(&bytes);
        }
    }

    #[test]
    fn content_outside_of_its_tokens_is_refused() {
        let tokens =
            |first| Tokens { first: 10, ids: vec![1, 2], content: vec![Content { first, tokens: 2, id: vec![1] }] };
        assert!(tokens(10).check().is_ok());
        assert!(tokens(9).check().is_err() && tokens(11).check().is_err() && tokens(u64::MAX).check().is_err());
    }
}
