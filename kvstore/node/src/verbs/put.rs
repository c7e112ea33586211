//! Reserve and commit: the first and the last step of a put. Bytes land in between, each wire in its own way.

use std::sync::Arc;
use std::time::Duration;

use kvkeep_client::convert;
use kvkeep_core::{Error, ErrorKind, GroupId, Keeper, Key, Priority, ShardId};
use kvkeep_proto::v1;

use super::{Answer, Call, Refusal, Verbs, narrow};
use crate::failpoint;
use crate::store::put::{Committed, PartAnswer, PartWish, PositionWish, ReserveWish};
use crate::store::reservations::ReservationId;

impl Verbs {
    /// Says what of a put is needed before bytes are sent.
    pub async fn reserve(&self, call: &Call, wish: v1::ReserveRequest) -> Answer<v1::ReserveReply> {
        let parts: usize = wish.positions.iter().map(|p| p.parts.len().max(1)).sum();
        self.keys_within(parts)?;
        let wish = reserve_wish(call, wish)?;
        let reserves = self.store.reserve(call.caller, wish, call.deadline).await?;
        failpoint::at("reserve.granted");
        let answers = reserves.answers.into_iter().map(|a| v1::PartAnswer { answer: Some(spell_answer(a)) }).collect();
        Ok(v1::ReserveReply {
            answers,
            granted_positions: reserves.granted_positions,
            lease_id: convert::lease_to_proto(reserves.lease),
            reservation_ms: self.store.config.limits.reservation_ms,
        })
    }

    /// Makes parts visible, and acknowledges them at their class.
    pub async fn commit(&self, call: &Call, parts: Vec<v1::CommitPart>) -> Answer<v1::CommitReply> {
        self.keys_within(parts.len())?;
        failpoint::at("commit.asked");
        let parts = parts.into_iter().map(|p| (ReservationId(p.reservation_id), p.crc32)).collect();
        // Started work is finished even if the caller goes away: a half-known acknowledgement helps nobody.
        let (store, caller, info) = (Arc::clone(&self.store), call.caller, call.context.info);
        let committing = tokio::spawn(async move { store.commit(caller, info, parts).await });
        let committed = tokio::time::timeout_at(call.deadline, committing)
            .await
            .map_err(|_| Refusal::Late("not committed before the deadline; it may still be"))?
            .map_err(|_| Refusal::Cut("the commit was cut short"))?;
        let results = committed.into_iter().map(|(id, result)| self.spell_committed(id, result)).collect();
        Ok(v1::CommitReply { results })
    }

    /// One part's outcome as it travels.
    pub fn spell_committed(&self, id: ReservationId, result: Result<Committed, Error>) -> v1::CommitResult {
        match result {
            Ok(c) => {
                let wanted = self.store.copies_wanted(c.class);
                v1::CommitResult {
                    reservation_id: id.0,
                    version: c.version.0,
                    class: convert::class_to_proto(c.class),
                    copies: 1,
                    copies_wanted: wanted,
                    degraded: wanted > 1,
                    superseded: c.superseded,
                    owners: vec![self.store.config.node_name.clone()],
                    error: None,
                }
            }
            Err(e) => v1::CommitResult {
                reservation_id: id.0,
                error: Some(convert::error_to_proto(&e)),
                ..Default::default()
            },
        }
    }
}

fn reserve_wish(call: &Call, wish: v1::ReserveRequest) -> Result<ReserveWish, Error> {
    let positions = wish
        .positions
        .into_iter()
        .map(|p| {
            let parts = p
                .parts
                .iter()
                .map(|part| {
                    let len = u32::try_from(part.length).map_err(|_| {
                        Error::new(ErrorKind::TooLarge, "the block is over every limit").with("bytes", part.length)
                    })?;
                    Ok(PartWish {
                        group: GroupId(narrow("group", part.group)?),
                        shard: ShardId(narrow("shard", part.shard)?),
                        len,
                    })
                })
                .collect::<Result<_, Error>>()?;
            Ok(PositionWish { key: Key::new(&p.key)?, parts, token_ids: p.token_ids.into() })
        })
        .collect::<Result<_, Error>>()?;
    let mut info = call.context.info;
    if wish.priority != 0 {
        info.priority = Some(Priority::of_number(wish.priority));
    }
    Ok(ReserveWish {
        handle: convert::handle_from_proto(wish.handle)?,
        request: call.context.request_id.clone(),
        info,
        parent: if wish.parent_key.is_empty() { None } else { Some(Key::new(&wish.parent_key)?) },
        first_position: wish.first_position,
        positions,
        unordered: wish.unordered,
        class: convert::class_from_proto(wish.class)?,
        keeper: Keeper::Caller,
        fidelity: convert::fidelity_from_proto(wish.fidelity)?,
        keep: convert::retention_from_proto(wish.retention)? == convert::Retention::Keep,
        bytes_max: wish.bytes_max,
        ttl: (wish.ttl_ms != 0).then(|| Duration::from_millis(wish.ttl_ms)),
    })
}

fn spell_answer(answer: PartAnswer) -> v1::part_answer::Answer {
    use v1::part_answer::{Answer, InProgress, Present, Slot};
    match answer {
        PartAnswer::Present { tier, class, version } => Answer::Present(Present {
            tier: convert::tier_to_proto(tier),
            class: convert::class_to_proto(class),
            version: version.0,
        }),
        PartAnswer::Upgrade(id) => Answer::Upgrade(Slot { reservation_id: id.0 }),
        PartAnswer::InProgress { retry_after } => {
            Answer::InProgress(InProgress { retry_after_ms: convert::millis_to_proto(retry_after) })
        }
        PartAnswer::Slot(id) => Answer::Slot(Slot { reservation_id: id.0 }),
        PartAnswer::Refused(error) => Answer::Refused(convert::error_to_proto(&error)),
    }
}
