//! Appends to kept sessions, between a turn's puts and the end of its lease.

use bytes::Bytes;
use kvkeep_client::sessions::Append;
use kvkeep_client::{Call, Error, ErrorKind, OpenSession};
use kvkeep_core::{Class, ErrorKind as CoreKind};

use super::ledger::Next;
use super::token_ids;
use crate::replay::engine::{Engine, Halt, Patience, Shared};
use crate::trace::Request;

/// Times that a turn's blocks are put once more because some had left before the append looked.
const PUTS_AGAIN_MAX: u32 = 8;

impl Engine {
    /// Appends to the conversation's session what this turn has beyond it: whole positions, and token ids up to the end of
    /// the input. The blocks have been put; where some have left since, they are put again.
    pub(in crate::replay) async fn keep(
        &mut self,
        request: &Request,
        keys: &[Bytes],
        call: &Call,
    ) -> anyhow::Result<()> {
        let shared = std::sync::Arc::clone(&self.shared);
        let tokens = u64::from(request.input_tokens);
        let whole = (tokens / u64::from(shared.plan.tokens_per_block())) as usize;
        let whole = &request.blocks[..whole.min(request.blocks.len())];
        let Next::Append { from_position, from_token } = shared.sessions.next(request.session, whole, tokens) else {
            return Ok(());
        };
        let append = Append {
            from_position: from_position as u64,
            keys: keys[from_position..whole.len()].to_vec(),
            from_token,
            token_ids: token_ids(request.session, from_token..tokens),
            content: Vec::new(),
        };
        let id = shared.plan.session_id(request.session);
        let (mut patience, mut puts_again) = (Patience::new(shared.plan.outage), 0);
        loop {
            match append_to(&shared, &id, from_token == 0, &append, call).await {
                Ok(()) => break,
                Err(e) if left(&e) && puts_again < PUTS_AGAIN_MAX => {
                    self.tally.error("append", &e);
                    puts_again += 1;
                    self.put_from(request, &keys[..whole.len()], from_position, call).await?;
                }
                Err(e) => match self.halt("append", e) {
                    Halt::Away(e) => patience.wait("append", e).await?,
                    Halt::Fatal(e) => {
                        return Err(e.context(format!("session {id}: is it another workload's? --namespace")));
                    }
                },
            }
        }
        shared.sessions.note(request.session, whole, tokens);
        Ok(())
    }
}

/// Whether an append says that a block is not here.
fn left(error: &Error) -> bool {
    error.kind() == ErrorKind::Refused(CoreKind::Conflict) && error.context().any(|(name, _)| name == "index_in_append")
}

async fn append_to(shared: &Shared, id: &str, open: bool, append: &Append, call: &Call) -> Result<(), Error> {
    let sessions = shared.namespace.sessions();
    if open {
        let wish = OpenSession { class: Some(Class::Durable), ..OpenSession::default() };
        sessions.open(id, &wish, call).await?;
    }
    sessions.append(id, append, call).await.map(drop)
}
