//! The wire by hand: for requests that the SDK refuses to make, and for connections that break.

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::{Format, Handle, InstanceId};
use kvkeep_proto::v1::blocks_client::BlocksClient;
use kvkeep_proto::v1::part_answer::Answer;
use kvkeep_proto::v1::sessions_client::SessionsClient;
use kvkeep_proto::{PROTOCOL_MAJOR, PROTOCOL_MINOR, v1};
use tonic::transport::{Channel, Endpoint};

use crate::Node;

/// One connection.
#[derive(Clone, Debug)]
pub struct Raw {
    /// Every verb on blocks.
    pub blocks: BlocksClient<Channel>,
    /// Every verb on sessions, on the same connection.
    pub sessions: SessionsClient<Channel>,
    /// Of the hello.
    pub instance: InstanceId,
}

/// The connection alone, without hello.
///
/// # Panics
/// If there is none.
pub async fn channel(node: &Node) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", node.endpoint())).expect("an address is a good endpoint");
    endpoint.connect().await.expect("the server accepts connections")
}

/// A hello of this protocol's version.
pub fn hello(instance: InstanceId) -> v1::HelloRequest {
    v1::HelloRequest {
        major: PROTOCOL_MAJOR,
        minor: PROTOCOL_MINOR,
        instance_id: Bytes::copy_from_slice(&instance.0),
        ..Default::default()
    }
}

/// The error that a failed call carries.
///
/// # Panics
/// If it carries none.
pub fn detail(status: &tonic::Status) -> v1::ErrorDetail {
    convert::detail_from_status(status).unwrap_or_else(|| panic!("no detail with {status:?}"))
}

impl Raw {
    /// A connection that has said hello.
    ///
    /// # Panics
    /// If the server refuses.
    pub async fn connect(node: &Node) -> Self {
        Self::connect_as(node, InstanceId(rand::random())).await
    }

    /// A connection of this instance that has said hello.
    ///
    /// # Panics
    /// If the server refuses.
    pub async fn connect_as(node: &Node, instance: InstanceId) -> Self {
        let channel = channel(node).await;
        let mut blocks = BlocksClient::new(channel.clone()).max_decoding_message_size(64 << 20);
        blocks.hello(hello(instance)).await.expect("the server accepts a hello");
        Self { blocks, sessions: SessionsClient::new(channel), instance }
    }

    /// Registers a namespace.
    ///
    /// # Panics
    /// If the server refuses.
    pub async fn namespace(&mut self, name: &str, format: &Format) -> Handle {
        let request = v1::RegisterNamespaceRequest {
            name: name.into(),
            format: Some(convert::format_to_proto(format)),
            revision_digest: "weights-1".into(),
            ..Default::default()
        };
        let reply = self.blocks.register_namespace(request).await.expect("the namespace is registered").into_inner();
        convert::handle_from_proto(reply.handle).expect("the server gives a handle")
    }

    /// Reserves one block per key, each of so many bytes, group 0, shard 0.
    ///
    /// # Errors
    /// As the server says.
    pub async fn reserve(
        &mut self,
        handle: Handle,
        keys: &[Bytes],
        bytes: u64,
    ) -> Result<v1::ReserveReply, tonic::Status> {
        let part = v1::PutPart { group: 0, shard: 0, length: bytes };
        let positions =
            keys.iter().map(|key| v1::PutPosition { key: key.clone(), parts: vec![part], token_ids: Vec::new() });
        let request = v1::ReserveRequest {
            handle: Some(convert::handle_to_proto(handle)),
            positions: positions.collect(),
            ..Default::default()
        };
        Ok(self.blocks.reserve(request).await?.into_inner())
    }

    /// Reserves one block and expects a slot for it.
    ///
    /// # Panics
    /// If there is none.
    pub async fn slot(&mut self, handle: Handle, key: &Bytes, bytes: u64) -> u64 {
        let reply = self.reserve(handle, std::slice::from_ref(key), bytes).await.expect("a reserve is answered");
        match slots(&reply)[..] {
            [id] => id,
            _ => panic!("no slot: {reply:?}"),
        }
    }

    /// Writes chunks `(reservation, offset, data)`.
    ///
    /// # Errors
    /// As the server says.
    pub async fn write(&mut self, chunks: Vec<(u64, u64, Bytes)>) -> Result<v1::WriteReply, tonic::Status> {
        let chunks: Vec<_> = chunks
            .into_iter()
            .map(|(reservation_id, offset, data)| v1::WriteRequest { reservation_id, offset, data })
            .collect();
        Ok(self.blocks.write(tokio_stream::iter(chunks)).await?.into_inner())
    }

    /// Commits reservations, each with the client's sums or none.
    ///
    /// # Errors
    /// As the server says.
    pub async fn commit(&mut self, parts: Vec<(u64, Vec<u32>)>) -> Result<v1::CommitReply, tonic::Status> {
        let parts = parts.into_iter().map(|(reservation_id, crc32)| v1::CommitPart { reservation_id, crc32 }).collect();
        Ok(self.blocks.commit(v1::CommitRequest { ctx: None, parts }).await?.into_inner())
    }
}

/// The reservations that a reserve gave.
pub fn slots(reply: &v1::ReserveReply) -> Vec<u64> {
    reply
        .answers
        .iter()
        .filter_map(|a| match &a.answer {
            Some(Answer::Slot(slot) | Answer::Upgrade(slot)) => Some(slot.reservation_id),
            _ => None,
        })
        .collect()
}
