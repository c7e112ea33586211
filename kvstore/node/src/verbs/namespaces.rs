//! Formats, namespaces, and the verbs that look at what is stored.

use kvkeep_client::convert;
use kvkeep_core::{Error, ErrorKind, Key, RequestId};
use kvkeep_proto::v1;

use super::{Answer, Call, Verbs};
use crate::connection::Hello;
use crate::store::sessions::SYSTEM_PREFIX;
use bytes::Bytes;

impl Verbs {
    /// Checks a format; answers its fingerprint.
    pub fn register_format(&self, wish: v1::RegisterFormatRequest) -> Answer<v1::RegisterFormatReply> {
        let format = convert::format_from_proto(wish.format)?;
        format.validate()?;
        Ok(v1::RegisterFormatReply { fingerprint: Bytes::copy_from_slice(&format.fingerprint().0) })
    }

    /// Opens a namespace, making it where it is new.
    pub async fn register_namespace(
        &self,
        hello: &Hello,
        wish: v1::RegisterNamespaceRequest,
    ) -> Answer<v1::RegisterNamespaceReply> {
        let call = self.call(hello, wish.ctx)?;
        if wish.name.starts_with(SYSTEM_PREFIX) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "names of namespaces that begin with system/ are the store's own",
            )
            .with("name", wish.name)
            .into());
        }
        let format = convert::format_from_proto(wish.format)?;
        let registered = self
            .store
            .register_namespace(call.caller, wish.name, format, wish.revision_digest, wish.require_full)
            .await?;
        let n = &registered.namespace;
        Ok(v1::RegisterNamespaceReply {
            handle: Some(v1::Handle { namespace_id: n.id.0, revision: n.revision.0 }),
            created: registered.created,
            fingerprint: Bytes::copy_from_slice(&n.fingerprint.0),
            revision_digest: n.revision_digest.clone(),
            revision_matches: registered.revision_matches,
        })
    }

    /// The weights changed.
    pub async fn advance_revision(
        &self,
        hello: &Hello,
        wish: v1::AdvanceRevisionRequest,
    ) -> Answer<v1::AdvanceRevisionReply> {
        let call = self.call(hello, wish.ctx)?;
        let from = convert::handle_from_proto(wish.from)?;
        let handle = self.store.advance_revision(call.caller, from, wish.revision_digest).await?;
        Ok(v1::AdvanceRevisionReply { handle: Some(convert::handle_to_proto(handle)) })
    }

    /// One page of positions.
    pub async fn list(&self, call: &Call, wish: v1::ListRequest) -> Answer<v1::ListReply> {
        let handle = convert::handle_from_proto(wish.handle)?;
        self.store.namespace_of(call.caller, handle)?;
        let (positions, next_page_token) =
            self.store.list(handle, &wish.key_prefix, &wish.page_token, wish.page_size, call.deadline).await?;
        Ok(v1::ListReply { positions, next_page_token })
    }

    /// Why a position is, or is not, here.
    pub async fn explain(&self, call: &Call, wish: v1::ExplainRequest) -> Answer<v1::ExplainReply> {
        if !wish.request_id.is_empty() {
            let request = RequestId::new(&wish.request_id)?;
            return Ok(self.store.explain_request(call.caller, &request));
        }
        let handle = convert::handle_from_proto(wish.handle)?;
        let key = Key::new(&wish.key)?;
        Ok(self.store.explain(call.caller, handle, &key).await?)
    }

    /// Deletes blocks.
    pub async fn remove(&self, call: &Call, wish: v1::RemoveRequest) -> Answer<v1::RemoveReply> {
        let batch = self.batch(call, wish.handle, &wish.keys)?;
        let (removed, absent) = self.store.remove(&batch.digests).await;
        Ok(v1::RemoveReply { removed, absent, held: 0 })
    }
}
