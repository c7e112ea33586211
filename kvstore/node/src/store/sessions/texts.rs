//! Token ids: durable blocks of a system namespace, one for each append that brings any. Their keys are made of what is in
//! them, so an append that is repeated finds its block again.

use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::format::{Group, Rule, SizeRule, Topology};
use kvkeep_core::session::text::{TEXT_BYTES_MAX, Tokens};
use kvkeep_core::session::{Session, Text};
use kvkeep_core::{
    BlockId, Class, Digest, Error, ErrorKind, Fidelity, Format, GroupId, Handle, Keeper, Key, KeyDomain, RequestId,
    RequestInfo, Result, ShardId,
};

use super::super::Store;
use super::super::get::{Compare, Fetched, PartRead};
use super::super::put::{Caller, PartAnswer, PartWish, PositionWish, ReserveWish};

/// Namespaces whose names begin so are the store's own: no client registers one.
pub const SYSTEM_PREFIX: &str = "system/";
const NAMESPACE: &str = "system/sessions";

/// A put of token ids waits so long for room, and for another writer of the same.
const PUT_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks at what another is writing.
const AGAIN_AFTER: Duration = Duration::from_millis(5);
/// Blocks of token ids read for one answer.
const TEXTS_READ_MAX: usize = 256;
/// Token ids of one answer.
pub(super) const TOKENS_ANSWER_MAX: u64 = 1 << 18;

/// Token ids of a session, as asked.
#[derive(Debug, Default)]
pub struct TokensRead {
    /// From the first asked on.
    pub tokens: Tokens,
    /// A block is lost: what is behind it is not here.
    pub damaged: bool,
}

/// A block of token ids that is to be put.
pub(super) struct TextBlock {
    /// How its session names it.
    pub text: Text,
    handle: Handle,
    key: Key,
    bytes: Vec<u8>,
}

fn format() -> Format {
    Format {
        model: "kvkeep sessions".into(),
        dtype: "u32".into(),
        layout: "token ids, version 1".into(),
        hash_algorithm: "siphash-2-4-128".into(),
        hash_seed: String::new(),
        tokens_per_key: 1,
        topology: Topology { canonical: true, tp: 1, pp: 1, cp: 1 },
        groups: vec![Group {
            rule: Rule::All,
            tokens_per_block: 1,
            shards: 1,
            replicated: false,
            size: SizeRule::UpTo(TEXT_BYTES_MAX as u64),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

impl Store {
    /// The tenant's namespace of token ids.
    async fn text_handle(&self, caller: Caller) -> Result<Handle> {
        let registered = self.register_namespace(caller, NAMESPACE.into(), format(), "1".into(), false).await?;
        Ok(registered.namespace.handle())
    }

    /// The block of token ids that an append to a session brings.
    pub(super) async fn text_block(&self, caller: Caller, uid: u64, tokens: &Tokens) -> Result<TextBlock> {
        tokens.check()?;
        if self.nvme.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "this node has no NVMe tier: token ids cannot be kept; append without them",
            ));
        }
        let handle = self.text_handle(caller).await?;
        let (first, count) = (tokens.first, tokens.ids.len() as u32);
        let bytes = tokens.encode();
        // Of the store's own secret: nobody else can aim for a key of another's.
        let mut key = uid.to_le_bytes().to_vec();
        key.extend(self.secret.digest(KeyDomain(uid), handle, &bytes).as_bytes());
        let key = Key::new(&key)?;
        let digests = self.digests(caller, handle, [key.as_bytes()]);
        Ok(TextBlock { text: Text { digest: digests[0], first, in_block: count, count }, handle, key, bytes })
    }

    /// Puts it as a durable block that sessions keep. The caller holds its digest: it may be here already, and suspected.
    pub(super) async fn put_text(self: &Arc<Self>, caller: Caller, block: &TextBlock) -> Result<()> {
        let TextBlock { handle, key, bytes, .. } = block;
        let until = tokio::time::Instant::now() + PUT_WITHIN;
        let wish = ReserveWish {
            handle: *handle,
            parent: None,
            first_position: 0,
            positions: vec![PositionWish {
                key: key.clone(),
                parts: vec![PartWish { group: GroupId(0), shard: ShardId(0), len: bytes.len() as u32 }],
                token_ids: Arc::default(),
            }],
            unordered: true,
            class: Class::Durable,
            keeper: Keeper::Sessions,
            fidelity: Fidelity::Exact,
            keep: true,
            bytes_max: 0,
            ttl: None,
            info: RequestInfo::NONE,
            request: RequestId::default(),
        };
        loop {
            let reserves = self.reserve(caller, wish.clone(), until).await?;
            if let Some(lease) = reserves.lease {
                // Of what is here already, which the append holds.
                self.release(caller, &[lease], &[]);
            }
            let id = match reserves.answers.into_iter().next() {
                Some(PartAnswer::Present { .. }) => return Ok(()),
                Some(PartAnswer::Slot(id)) => {
                    self.fill(caller, id, |slot, sums| {
                        slot.copy_from_slice(bytes);
                        sums.add(bytes);
                        Ok(())
                    })?;
                    id
                }
                Some(PartAnswer::Upgrade(id)) => id,
                Some(PartAnswer::Refused(error)) => return Err(error),
                Some(PartAnswer::InProgress { .. }) | None if tokio::time::Instant::now() < until => {
                    tokio::time::sleep(AGAIN_AFTER).await;
                    continue;
                }
                Some(PartAnswer::InProgress { .. }) | None => {
                    return Err(Error::new(ErrorKind::Throttled, "the token ids could not be written in time"));
                }
            };
            let committed = self.commit(caller, RequestInfo::NONE, vec![(id, Vec::new())]).await;
            return match committed.into_iter().next() {
                Some((_, Ok(_))) => Ok(()),
                Some((_, Err(error))) => Err(error),
                None => Err(super::odd()),
            };
        }
    }

    /// Token ids of a session from `first` on, at most `count` (0: as many as one answer takes).
    pub async fn session_tokens(
        self: &Arc<Self>,
        caller: Caller,
        session: &Session,
        first: u64,
        count: u64,
    ) -> Result<TokensRead> {
        let most = if count == 0 { TOKENS_ANSWER_MAX } else { count.min(TOKENS_ANSWER_MAX) };
        let end = first.saturating_add(most).min(session.tokens);
        let mut read = TokensRead { tokens: Tokens { first, ..Tokens::default() }, damaged: false };
        if first >= end {
            return Ok(read);
        }
        let handle = self.text_handle(caller).await?;
        let from = session.texts.partition_point(|t| t.first + u64::from(t.count) <= first);
        for text in session.texts[from..].iter().take(TEXTS_READ_MAX).take_while(|t| t.first < end) {
            let Some(block) = self.read_text(caller, handle, text).await? else {
                read.damaged = true;
                return Ok(read);
            };
            // Of the block, what is the session's and was asked for.
            let here = text.first.max(first)..(text.first + u64::from(text.count)).min(end);
            let ids = block.ids.iter().skip((here.start - text.first) as usize).take((here.end - here.start) as usize);
            read.tokens.ids.extend(ids);
            read.tokens.content.extend(block.content.into_iter().filter(|c| here.contains(&c.first)));
        }
        Ok(read)
    }

    /// One block of token ids; `None`: it is lost, or is not what the session says.
    async fn read_text(self: &Arc<Self>, caller: Caller, handle: Handle, text: &Text) -> Result<Option<Tokens>> {
        let key = self.keys_of(&[(text.digest, handle)]).await.into_iter().next().flatten();
        let Some(key) = key else { return Ok(None) };
        let read =
            PartRead { id: part_of(text.digest), key, offset: 0, length: 0, version: None, fidelity: Fidelity::Exact };
        match self.fetch(caller, handle, read, Compare::All).await {
            Fetched::Hit { part, range, .. } => {
                let tokens = Tokens::decode(&part[range]).ok();
                Ok(tokens.filter(|t| t.first == text.first && t.ids.len() == text.in_block as usize))
            }
            Fetched::No(..) => Ok(None),
            Fetched::Bad(error) => Err(error),
        }
    }

    /// Whether a block of token ids is here.
    pub(super) fn has_text(&self, text: &Text) -> bool {
        let id = part_of(text.digest);
        self.directory.lock().locate(&id.digest, id.group, id.shard).is_some()
    }
}

fn part_of(digest: Digest) -> BlockId {
    BlockId { digest, group: GroupId(0), shard: ShardId(0) }
}
