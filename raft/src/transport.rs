//! [`Transport`]: the seam between raft and other nodes. The way in is [`crate::Engine::receive`].

use raft::eraftpb::Message;

use crate::ids::GroupId;

/// Takes raft's messages to other members. They may be lost, repeated and reordered; they must not be forged.
///
/// One that reaches nodes owes raft word of what it could not deliver (`report_unreachable`, `report_snapshot`): without it
/// a member stays in the state "is being sent a snapshot".
pub trait Transport: Send {
    /// Takes them; must not block.
    fn send(&mut self, group: GroupId, messages: Vec<Message>);
}

/// Of a node without a cluster: there is nobody to send to.
#[derive(Debug, Default)]
pub struct Alone;

impl Transport for Alone {
    fn send(&mut self, group: GroupId, messages: Vec<Message>) {
        tracing::warn!(%group, messages = messages.len(), "raft messages to other members, and no way to them");
    }
}
