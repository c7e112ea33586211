//! The verbs whose bytes do not travel: into regions, out of regions, and in place. See [`crate::region`].

use std::time::{Duration, Instant};

use kvkeep_core::ids::LeaseId;
use kvkeep_core::{MissReason, PartStatus};
use kvkeep_proto::v1;
use kvkeep_proto::v1::envelope::Message;

use crate::block::pool::Lent;
use crate::call::Call;
use crate::client::{Client, Safety, Tries, count};
use crate::convert;
use crate::error::{Error, ErrorKind, Result};
use crate::get::{GetItem, GotInto, Header};
use crate::hot::{Asked, Line, Verb};
use crate::matching::{Match, MatchQuery};
use crate::namespace::Namespace;
use crate::put::{PartOutcome, Put};
use crate::region::mapped::MappedMatch;
use crate::region::words::Word;
use crate::region::{Landed, Place, Region};

/// After a call was given up, a copy that was under way is waited for so long before its memory is called in doubt.
const COPY_END_WAIT: Duration = Duration::from_millis(10);
/// Doubts are looked at so often by who waits for them.
const SETTLE_POLL: Duration = Duration::from_millis(5);

/// How a call that named memory ended.
struct Ended {
    error: Error,
    /// The memory may still be written.
    in_doubt: bool,
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self { error, in_doubt: false }
    }
}

impl Namespace {
    /// Reads parts into regions, one place per item. On the Unix socket the server copies each block straight into its place (or
    /// has the disk do it); on the other ways, and where a region [cannot be shared](Region::lent), the bytes land there from the
    /// socket. A part that does not fit its place is a
    /// miss with reason `format`. A lost server is all misses, unless [`crate::config::Lost::Errors`] is configured.
    ///
    /// # Errors
    /// Where the call itself is wrong, or as configured.
    pub async fn get_into_region(
        &self,
        items: &[GetItem],
        places: &[Place],
        lease: Option<LeaseId>,
        call: &Call,
    ) -> Result<Vec<GotInto>> {
        if items.len() != places.len() {
            return Err(kvkeep_core::Error::new(
                kvkeep_core::ErrorKind::InvalidArgument,
                "get_into_region takes one place per item",
            )
            .with("items", items.len())
            .with("places", places.len())
            .into());
        }
        let shared = &self.client.shared;
        let all_shared = places.iter().all(Place::is_shared);
        let mut tries = shared.begin(call);
        let mut got: Vec<GotInto> = Vec::with_capacity(items.len());
        while got.len() < items.len() {
            let rest = got.len()..items.len();
            match shared.hot_line().await {
                Ok(Line::Block(lent)) if all_shared && lent.may_register() => {
                    let batch = self.batch_of(&places[rest.clone()]);
                    let batch = rest.start..rest.start + batch;
                    let items = &items[batch.clone()];
                    match self.get_into_once(lent, items, &places[batch], lease, &tries, call).await {
                        Ok(some) => got.extend(some),
                        Err(Ended { error, in_doubt }) if in_doubt || error.is_silence() => {
                            // Not asked again: the memory may not be given to another try.
                            let reason = shared.miss(error)?;
                            got.extend(items.iter().map(|_| GotInto { in_doubt, ..GotInto::missed(reason) }));
                            break;
                        }
                        Err(Ended { error, .. }) => tries.again(error, Safety::Repeatable).await.or_else(|e| {
                            let reason = shared.miss(e)?;
                            got.extend(items.iter().map(|_| GotInto::missed(reason)));
                            Ok::<_, Error>(())
                        })?,
                    }
                }
                Ok(line) => {
                    // Given back unused: the bytes travel, as in any get.
                    if let Line::Block(lent) = line {
                        lent.give_back();
                    }
                    let mut landing = Landed(&places[rest.clone()]);
                    let headers = self.fetch(&items[rest.clone()], lease, call, &mut landing).await?;
                    got.extend(headers.into_iter().zip(&items[rest]).map(|(h, item)| GotInto::new(h, item)));
                }
                Err(e) => {
                    if let Err(e) = tries.again(e, Safety::Repeatable).await {
                        let reason = shared.miss(e)?;
                        got.extend(items[rest].iter().map(|_| GotInto::missed(reason)));
                    }
                }
            }
        }
        got.resize_with(items.len(), || GotInto::missed(MissReason::Unreachable));
        let doubtful = got.iter().filter(|g| g.in_doubt).count();
        count(&shared.counts.doubtful_parts, doubtful as u64);
        Ok(got)
    }

    /// How many of these one call may name.
    fn batch_of(&self, places: &[Place]) -> usize {
        let runs_max = u64::from(self.client.hello().limits.runs_max);
        let mut runs = 0;
        let fit = places.iter().take(self.batch()).take_while(|p| {
            runs += p.run_count();
            runs <= runs_max
        });
        fit.count().max(1)
    }

    async fn get_into_once(
        &self,
        mut lent: Lent<'_>,
        items: &[GetItem],
        places: &[Place],
        lease: Option<LeaseId>,
        tries: &Tries<'_>,
        call: &Call,
    ) -> Result<Vec<GotInto>, Ended> {
        const VERB: &str = "get_into";
        let shared = &self.client.shared;
        let left = tries.left(VERB)?;
        let (word, into) = match self.name_memory(&mut lent, places).await {
            Ok(named) => named,
            Err(e) => return shared.block_answered(lent, false, Err(e)).map_err(|e| e.into_error().into()),
        };
        let get = v1::GetRequest {
            ctx: Some(call.to_proto(left)),
            handle: self.wire_handle(),
            items: items.iter().map(GetItem::to_proto).collect(),
            lease_id: convert::lease_to_proto(lease),
            fidelity: v1::Fidelity::Exact as i32,
            chunk_bytes: 0,
        };
        let request =
            v1::GetIntoRequest { get: Some(get), into, want_sums: false, word: self.word(&mut lent, &word).await? };
        let reply = self.ask_with_memory(VERB, lent, request, word, left, places).await?;
        if reply.items.len() != items.len() {
            return Err(Error::protocol("get_into answers for another number of items").into());
        }
        let read = |(n, (reply, item)): (usize, (v1::GetReply, &GetItem))| {
            if reply.item as usize != n {
                return Err(Error::protocol("get_into answers out of order"));
            }
            Ok(GotInto::new(Header::from_proto(&reply)?, item))
        };
        reply.items.into_iter().zip(items).enumerate().map(read).collect::<Result<_>>().map_err(Ended::from)
    }

    /// Registers what is not, and takes a word for the call.
    async fn name_memory(&self, lent: &mut Lent<'_>, places: &[Place]) -> Result<(Option<Word>, Vec<v1::Scatter>)> {
        let shared = &self.client.shared;
        let (instance, patience) = (shared.config.instance, shared.config.registration_patience());
        let mut named = Vec::with_capacity(places.len());
        for place in places {
            named.push(place.to_proto(lent.conn(), instance, patience).await?);
        }
        let word = shared.hot.words.take(lent.conn().server.clone())?;
        Ok((word, named))
    }

    async fn word(&self, lent: &mut Lent<'_>, word: &Option<Word>) -> Result<Option<v1::CallWord>> {
        let Some(word) = word else { return Ok(None) };
        let config = &self.client.shared.config;
        let region_id = word.region.id(lent.conn(), config.instance, config.patience).await?;
        Ok(Some(v1::CallWord { region_id, offset: word.offset as u64 }))
    }

    /// Asks, and sees to it that the memory is the caller's again, or known not to be.
    async fn ask_with_memory<Req: Verb>(
        &self,
        verb: &'static str,
        mut lent: Lent<'_>,
        request: Req,
        word: Option<Word>,
        left: Duration,
        places: &[Place],
    ) -> Result<Req::Reply, Ended> {
        let shared = &self.client.shared;
        let used = lent.conn().used;
        let patience = shared.config.patience;
        let asking = lent.conn().call(verb, request.pack(), patience);
        let answer = tokio::time::timeout(left, asking).await.unwrap_or_else(|_| Err(Error::late(verb)));
        let lost = answer.as_ref().is_err_and(Error::is_loss);
        let answer = shared.block_answered(lent, used, answer);
        let error = match answer {
            Ok(message) => {
                word.into_iter().for_each(Word::answered);
                return Req::unpack(message).ok_or_else(|| {
                    Error::protocol("a call was answered with another's answer").with("verb", verb).into()
                });
            }
            Err(Asked::Failed(e)) => e,
            Err(Asked::Stale) => Asked::Stale.into_error(),
        };
        if !lost {
            // Refused: answered, that is.
            word.into_iter().for_each(Word::answered);
            if error.kind() == ErrorKind::Refused(kvkeep_core::ErrorKind::Expired) {
                // Perhaps a region of an instance that ended meanwhile: registered anew by the next try.
                places.iter().flat_map(Place::regions).for_each(|r| r.forget(shared.config.instance));
                shared.hot.words.forget(shared.config.instance);
            }
            return Err(error.into());
        }
        let in_doubt = match word {
            // Without a word nobody can tell.
            None => true,
            Some(word) => !word.take_back() && !self.client.settle(COPY_END_WAIT).await,
        };
        Err(Ended { error, in_doubt })
    }

    /// Stores positions out of regions. On the Unix socket one call does it all, and the server copies the bytes itself; on the
    /// other ways they are copied once by this client and then travel as in [`Self::put`].
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn put_from(&self, put: &Put<Place>, call: &Call) -> Result<Vec<PartOutcome>> {
        let shared = &self.client.shared;
        let parts = put.positions.iter().map(|p| p.parts.len()).sum();
        let all_shared = put.positions.iter().flat_map(|p| &p.parts).all(|p| p.data.is_shared());
        let mut tries = shared.begin(call);
        let mut outcomes = Vec::with_capacity(parts);
        let mut leases = Vec::new();
        let mut done = 0;
        while done < put.positions.len() {
            let step = match shared.hot_line().await {
                Ok(Line::Block(lent)) if all_shared && lent.may_register() => {
                    self.put_from_once(lent, put, done, &tries, call, &mut leases).await
                }
                Ok(line) => {
                    if let Line::Block(lent) = line {
                        lent.give_back();
                    }
                    let rest = put.copied_from(done);
                    outcomes.extend(self.put(&rest, call).await?);
                    break;
                }
                Err(e) => Err(e.into()),
            };
            match step {
                Ok((positions, some)) => {
                    done += positions;
                    outcomes.extend(some);
                }
                Err(Ended { error, .. }) => {
                    if let Err(e) = tries.again(error, Safety::Repeatable).await {
                        if done == 0 {
                            shared.miss(e.clone())?;
                        }
                        outcomes.resize(parts, PartOutcome::Refused(e));
                        break;
                    }
                }
            }
        }
        if !leases.is_empty() {
            self.client.post(v1::ReleaseRequest { lease_ids: leases, ..Default::default() }, call).await;
        }
        Ok(outcomes)
    }

    async fn put_from_once(
        &self,
        mut lent: Lent<'_>,
        put: &Put<Place>,
        done: usize,
        tries: &Tries<'_>,
        call: &Call,
        leases: &mut Vec<u64>,
    ) -> Result<(usize, Vec<PartOutcome>), Ended> {
        const VERB: &str = "put_from";
        let shared = &self.client.shared;
        let left = tries.left(VERB)?;
        let asked = done..put.positions.len().min(done + self.batch());
        let places: Vec<Place> =
            put.positions[asked.clone()].iter().flat_map(|p| &p.parts).map(|p| p.data.clone()).collect();
        let (word, from) = match self.name_memory(&mut lent, &places).await {
            Ok(named) => named,
            Err(e) => return shared.block_answered(lent, false, Err(e)).map_err(|e| e.into_error().into()),
        };
        let reserve = self.reserve_request(put, &asked, call.to_proto(left));
        let request = v1::PutFromRequest {
            reserve: Some(reserve),
            from,
            sums: Vec::new(),
            word: self.word(&mut lent, &word).await?,
        };
        let reply = self.ask_with_memory(VERB, lent, request, word, left, &places).await?;
        let reserved = reply.reserve.ok_or_else(|| Error::protocol("put_from was answered without its first half"))?;
        leases.extend((reserved.lease_id != 0).then_some(reserved.lease_id));
        let results = reply.commit.unwrap_or_default().results;
        Ok(self.read_put_from(put, &asked, reserved, results)?)
    }

    /// Looks one chain up, leases what matched, and answers where it lies in the server's memory. `parts` is empty where this
    /// client cannot read in place: [`Client::way`] says why.
    ///
    /// # Errors
    /// As [`Self::match_chain`].
    pub async fn match_mapped(&self, query: &MatchQuery, call: &Call) -> Result<MappedMatch> {
        const VERB: &str = "match";
        let shared = &self.client.shared;
        let mut tries = shared.begin(call);
        loop {
            let error = match shared.hot_line().await {
                Ok(Line::Block(mut lent)) if lent.may_map() && query.lease.is_some() => {
                    let left = tries.left(VERB)?;
                    let used = lent.conn().used;
                    let mut wish = self.query_to_proto(query, call);
                    wish.map = true;
                    let request = v1::MatchRequest { ctx: Some(call.to_proto(left)), queries: vec![wish] };
                    let patience = shared.config.patience;
                    let asking = async {
                        let Message::MatchReply(mut reply) = lent.conn().call(VERB, request.pack(), patience).await?
                        else {
                            return Err(Error::protocol("a match was answered with something else"));
                        };
                        let mut result = reply.results.pop().ok_or_else(|| Error::protocol("a match has no answer"))?;
                        let mapped = result.mapped.take().unwrap_or_default();
                        let found = Match::from_proto(result, query)?;
                        let parts = shared.hot.files.read(lent.conn(), mapped, patience).await?;
                        Ok(MappedMatch { found, parts })
                    };
                    let answer = tokio::time::timeout(left, asking).await.unwrap_or_else(|_| Err(Error::late(VERB)));
                    match shared.block_answered(lent, used, answer) {
                        Ok(mapped) => return Ok(mapped),
                        Err(Asked::Stale) => continue,
                        Err(Asked::Failed(e)) => e,
                    }
                }
                Ok(line) => {
                    if let Line::Block(lent) = line {
                        lent.give_back();
                    }
                    let found = self.match_chain(query, call).await?;
                    return Ok(MappedMatch { found, parts: Vec::new() });
                }
                Err(e) => e,
            };
            if let Err(e) = tries.again(error, Safety::Repeatable).await {
                let reason = shared.miss(e)?;
                return Ok(MappedMatch { found: Match::missed(query.statuses_asked(), reason), parts: Vec::new() });
            }
        }
    }
}

impl Client {
    /// Ends a lease without waiting for the answer: one frame is sent. Where that cannot be done the lease ends by itself.
    pub async fn post_release(&self, lease: LeaseId, call: &Call) {
        self.post(v1::ReleaseRequest { lease_ids: vec![lease.0], ..Default::default() }, call).await;
    }

    async fn post(&self, request: v1::ReleaseRequest, call: &Call) {
        let shared = &self.shared;
        match shared.hot_line().await {
            Ok(Line::Block(mut lent)) => {
                let patience = shared.config.patience;
                let request = v1::ReleaseRequest { ctx: Some(call.to_proto(patience)), ..request };
                let conn = lent.conn();
                let envelope = v1::Envelope {
                    call: conn.next_call(),
                    end: true,
                    message: Some(request.pack()),
                    ..Default::default()
                };
                // The answer is read over by the next call on this connection.
                if conn.send("release", envelope, &[], None, patience).await.is_ok() {
                    lent.give_back();
                }
            }
            // gRPC has no call without an answer. Failing is harmless: leases end.
            _ => drop(shared.release(request.lease_ids, Vec::new(), Vec::new(), call).await),
        }
    }

    /// One empty call on the hot way, answered at once: how long it takes.
    ///
    /// # Errors
    /// Where the server is lost, or the way is gRPC.
    pub async fn ping(&self) -> Result<Duration> {
        let shared = &self.shared;
        match shared.hot_line().await? {
            Line::Grpc => Err(Error::config("a ping goes on a block connection, and there is none")),
            Line::Block(mut lent) => {
                let used = lent.conn().used;
                let began = Instant::now();
                let beat = Message::Heartbeat(v1::Heartbeat {});
                let answer = lent.conn().call("ping", beat, shared.config.patience).await;
                let took = began.elapsed();
                shared.block_answered(lent, used, answer).map(|_| took).map_err(Asked::into_error)
            }
        }
    }

    /// Waits until no memory of a call that was given up is in doubt any more, or for so long; whether none is.
    pub async fn settle(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        loop {
            if self.shared.hot.words.settle() == 0 {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(SETTLE_POLL.min(within)).await;
        }
    }

    /// Tells the server of a region now, so that the first call that names it need not; whether it was told. `false`: the way that
    /// calls go takes no regions, or nobody can be given this one.
    ///
    /// # Errors
    /// Where the server is lost.
    pub async fn register(&self, region: &Region) -> Result<bool> {
        let shared = &self.shared;
        match shared.hot_line().await? {
            Line::Block(mut lent) if region.is_shared() && lent.may_register() => {
                let used = lent.conn().used;
                let (instance, patience) = (shared.config.instance, shared.config.registration_patience());
                let answer = region.id(lent.conn(), instance, patience).await;
                shared.block_answered(lent, used, answer).map(|_| true).map_err(Asked::into_error)
            }
            Line::Block(lent) => {
                lent.give_back();
                Ok(false)
            }
            Line::Grpc => Ok(false),
        }
    }

    /// Tells the server to forget a region; answers when no call of it touches the region any more.
    ///
    /// # Errors
    /// Where the server is lost: it forgets the region with this client's instance.
    pub async fn unregister(&self, region: &Region, call: &Call) -> Result<()> {
        let shared = &self.shared;
        let instance = shared.config.instance;
        let Some(region_id) = region.known_as(instance, self.server_epoch()) else { return Ok(()) };
        region.forget(instance);
        shared
            .hot(
                "unregister_region",
                call,
                |_| v1::UnregisterRegionRequest { region_id },
                |_, _| async { Err(tonic::Status::unimplemented("regions are of the Unix socket")) },
            )
            .await
            .map(|_| ())
    }
}

impl GotInto {
    pub(crate) fn missed(reason: MissReason) -> Self {
        Self {
            status: PartStatus::Miss,
            reason: Some(reason),
            retry_after: None,
            len: 0,
            part_bytes: 0,
            version: None,
            tier: None,
            sums_ok: false,
            in_doubt: false,
        }
    }
}
