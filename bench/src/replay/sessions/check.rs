//! Restores kept sessions and compares all of them with what was acknowledged.

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use kvkeep_client::sessions::{ManifestPosition, Restore, Restored};
use kvkeep_client::{Call, Error};
use kvkeep_core::{RequestId, Tier};
use serde::Serialize;

use super::ledger::Promise;
use super::token_id;
use crate::measure::gb_per_s;
use crate::progress::Steps;
use crate::replay::engine::{Engine, OUTAGE_PAUSE, Patience, passes};
use crate::replay::ledger::BlockName;
use crate::trace::SessionId;

/// Times that a restore is asked for which ended because DRAM had no room at the moment.
const RESTORES_MAX: u32 = 20;

/// Term of the lease over a session that is compared.
const LEASE: Duration = Duration::from_secs(30);
/// Sets the requests of checks apart from those of the workload, which name leases too.
const LEASE_IDS: u64 = 1 << 63;

/// What became of kept sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SessionCheck {
    /// Asked for.
    pub sessions: u64,
    /// Of these: restored whole, every key, byte and token id as acknowledged.
    pub whole: u64,
    /// Positions acknowledged.
    pub positions: u64,
    /// Of these, the manifest names another key, or none.
    pub keys_wrong: u64,
    /// Bytes compared.
    pub bytes_compared: u64,
    /// Of these, different from what was put.
    pub bytes_wrong: u64,
    /// Blocks that did not come back, or with wrong bytes.
    pub blocks_lost: u64,
    /// Token ids acknowledged.
    pub tokens: u64,
    /// Sessions whose token ids are all there and equal.
    pub token_ids_equal: u64,
    /// Bytes in DRAM at the end of the restores.
    pub restored_bytes: u64,
    /// Positions that were on NVMe, and not in DRAM, when their restore began.
    pub positions_from_nvme: u64,
    /// Seconds that the restores took, one after the other.
    pub restore_s: f64,
    /// `restored_bytes` over `restore_s`.
    pub restore_gb_per_s: f64,
}

impl SessionCheck {
    /// Whether every session was whole.
    pub fn is_right(&self) -> bool {
        self.whole == self.sessions
    }

    /// In one line.
    pub fn line(&self) -> String {
        format!(
            "{} of {} durable sessions restored whole, {} bytes compared, {} wrong, token ids equal in {}",
            self.whole, self.sessions, self.bytes_compared, self.bytes_wrong, self.token_ids_equal
        )
    }
}

impl AddAssign for SessionCheck {
    fn add_assign(&mut self, one: Self) {
        self.sessions += one.sessions;
        self.whole += one.whole;
        self.positions += one.positions;
        self.keys_wrong += one.keys_wrong;
        self.bytes_compared += one.bytes_compared;
        self.bytes_wrong += one.bytes_wrong;
        self.blocks_lost += one.blocks_lost;
        self.tokens += one.tokens;
        self.token_ids_equal += one.token_ids_equal;
        self.restored_bytes += one.restored_bytes;
        self.positions_from_nvme += one.positions_from_nvme;
        self.restore_s += one.restore_s;
        self.restore_gb_per_s = gb_per_s(self.restored_bytes, Duration::from_secs_f64(self.restore_s));
    }
}

/// Positions whose manifest entry is not the one that was acknowledged.
fn keys_wrong(promise: &Promise, manifest: &[ManifestPosition]) -> u64 {
    let right =
        promise.positions.iter().zip(manifest).filter(|(id, there)| there.key.as_deref() == Some(id.key().as_bytes()));
    (promise.positions.len() - right.count()) as u64
}

/// Whether the first tokens of a conversation are these.
fn tokens_equal(session: SessionId, promised: u64, got: &[u32]) -> bool {
    got.len() as u64 >= promised && (0..promised).zip(got).all(|(index, id)| token_id(session, index) == *id)
}

impl Engine {
    /// Restores each session, reads every block of it back, and compares. Others may append meanwhile: what was promised is
    /// at least there.
    pub async fn check_sessions(
        &mut self,
        promises: &[(SessionId, Promise)],
        show: bool,
    ) -> anyhow::Result<SessionCheck> {
        let mut sum = SessionCheck::default();
        let mut steps = Steps::new("sessions restored and compared", promises.len() as u64, show);
        for (session, promise) in promises {
            sum += self.check_session(*session, promise).await?;
            steps.at(sum.sessions, &format!("{:.2} GB/s restored, {} whole", sum.restore_gb_per_s, sum.whole));
        }
        steps.end();
        Ok(sum)
    }

    async fn check_session(&mut self, session: SessionId, promise: &Promise) -> anyhow::Result<SessionCheck> {
        let shared = std::sync::Arc::clone(&self.shared);
        let plan = &shared.plan;
        let id = plan.session_id(session);
        let sessions = shared.namespace.sessions();
        let call = Call::of(RequestId::new(&(LEASE_IDS | session.0).to_be_bytes()).expect("8 bytes are a request id"));
        let mut check = SessionCheck {
            sessions: 1,
            positions: promise.positions.len() as u64,
            tokens: promise.tokens,
            ..SessionCheck::default()
        };
        let Some(manifest) = self.asked(&id, "manifest", || sessions.manifest_all(&id, &call)).await? else {
            check.keys_wrong = check.positions;
            return Ok(check);
        };
        check.keys_wrong = keys_wrong(promise, &manifest);
        check.positions_from_nvme =
            manifest.iter().filter(|p| p.is_here() && p.tier == Some(Tier::Nvme)).count() as u64;

        let began = Instant::now();
        let mut restored: Option<Restored> = None;
        for _ in 0..RESTORES_MAX {
            // Under a lease, as an engine would: what came up stays while anything else can leave.
            let wish = Restore { lease: Some(LEASE), ..Restore::default() };
            restored =
                self.asked(&id, "restore", async || sessions.restore(&id, &wish, &call).await?.finish().await).await?;
            // Without room in DRAM: others use it now.
            if !restored.as_ref().is_some_and(|r| r.late && r.missing.is_empty()) {
                break;
            }
            tokio::time::sleep(OUTAGE_PAUSE).await;
        }
        check.restore_s = began.elapsed().as_secs_f64();
        check.restored_bytes = restored.as_ref().map_or(0, |r| r.progress.bytes);
        let restored_whole = restored.as_ref().is_some_and(|r| r.is_whole() && r.usable_positions >= check.positions);

        let compared = (self.tally.bytes_verified, self.tally.bytes_wrong);
        let per_batch = plan.positions_per_batch(plan.args.get_batch_bytes);
        for (n, batch) in promise.positions.chunks(per_batch).enumerate() {
            let blocks = batch.iter().enumerate().flat_map(|(i, id)| {
                let index = (n * per_batch + i) as u32;
                plan.format.parts_at(index).map(|(group, shard)| (BlockName { id: *id, group, shard }, None))
            });
            check.blocks_lost += self.read_back(blocks.collect()).await?.blocks_lost;
        }
        check.bytes_compared = self.tally.bytes_verified - compared.0;
        check.bytes_wrong = self.tally.bytes_wrong - compared.1;

        if let Some(lease) = restored.as_ref().and_then(|r| r.lease)
            && let Err(e) = shared.namespace.release(&[lease], &[], &call).await
        {
            // It ends by itself.
            self.tally.error("release", &e);
        }
        let tokens = self.asked(&id, "tokens", || sessions.tokens_all(&id, &call)).await?;
        let equal = tokens.is_some_and(|t| !t.damaged && tokens_equal(session, promise.tokens, &t.ids));
        check.token_ids_equal = u64::from(equal);
        let whole = restored_whole && equal && check.keys_wrong + check.blocks_lost + check.bytes_wrong == 0;
        check.whole = u64::from(whole);
        if !whole {
            eprintln!("session {id} is not whole: {check:?}, {restored:?}");
        }
        Ok(check)
    }

    /// Asks until there is an answer, as long as the server is only away. `None`: it says no, which is said.
    async fn asked<T>(
        &mut self,
        id: &str,
        verb: &'static str,
        ask: impl AsyncFn() -> Result<T, Error>,
    ) -> anyhow::Result<Option<T>> {
        let mut patience = Patience::new(self.shared.plan.outage);
        loop {
            match ask().await {
                Ok(answer) => return Ok(Some(answer)),
                Err(e) => {
                    self.tally.error(verb, &e);
                    if !passes(&e) {
                        eprintln!("session {id}: {verb}: {e}");
                        return Ok(None);
                    }
                    patience.wait(verb, e).await?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::PrefixId;
    use bytes::Bytes;
    use kvkeep_core::{Class, Digest, PartStatus};

    fn position(key: Option<PrefixId>, status: PartStatus) -> ManifestPosition {
        ManifestPosition {
            digest: Digest::from_slice(&[0; 16]).unwrap(),
            key: key.map(|id| Bytes::copy_from_slice(id.key().as_bytes())),
            status,
            tier: Some(Tier::Nvme),
            reason: None,
            class: Class::Durable,
            bytes: 1,
            why: String::new(),
        }
    }

    #[test]
    fn a_manifest_may_be_longer_and_not_shorter_or_other() {
        let promise = Promise { positions: (0..3).map(PrefixId).collect(), tokens: 0 };
        let mut manifest: Vec<_> = (0..4).map(|n| position(Some(PrefixId(n)), PartStatus::Hit)).collect();
        assert_eq!(keys_wrong(&promise, &manifest), 0);
        manifest[1] = position(Some(PrefixId(9)), PartStatus::Hit);
        assert_eq!(keys_wrong(&promise, &manifest), 1);
        manifest.truncate(1);
        assert_eq!(keys_wrong(&promise, &manifest), 2);
    }

    #[test]
    fn token_ids_are_compared_up_to_what_was_acknowledged() {
        let session = SessionId(3);
        let mut ids = super::super::token_ids(session, 0..100);
        assert!(tokens_equal(session, 90, &ids) && tokens_equal(session, 100, &ids));
        assert!(!tokens_equal(session, 101, &ids), "one is missing");
        ids[50] ^= 1;
        assert!(tokens_equal(session, 50, &ids) && !tokens_equal(session, 51, &ids));
    }

    #[test]
    fn checks_add_up_and_one_that_is_not_whole_is_wrong() {
        let one = SessionCheck {
            sessions: 1,
            whole: 1,
            token_ids_equal: 1,
            restored_bytes: 3 << 20,
            restore_s: 0.5,
            ..SessionCheck::default()
        };
        let mut sum = SessionCheck::default();
        assert!(sum.is_right(), "nothing was promised");
        sum += one;
        sum += one;
        assert!(sum.is_right());
        assert!((sum.restore_gb_per_s - 0.006_291).abs() < 1e-5);
        sum += SessionCheck { whole: 0, ..one };
        assert!(!sum.is_right());
        assert!(sum.line().starts_with("2 of 3 "), "{}", sum.line());
    }
}
