//! A stock tonic client: the generated one over a tuned channel, nothing of our SDK.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use kvkeep_client::wire;
use kvkeep_client::wire::blocks_client::BlocksClient;
use kvkeep_client::wire::part_answer::Answer;
use tonic::transport::{Channel, Endpoint};

use super::{CHUNK_BYTES, CONNECTION_WINDOW_BYTES, FRAME_BYTES, MESSAGE_BYTES_MAX, STREAM_WINDOW_BYTES};

/// Times that a put asks again for slots while the server makes room.
const RESERVES_MAX: u32 = 200;

/// One connection to one of the two sides.
#[derive(Clone)]
pub struct Stock {
    client: BlocksClient<Channel>,
    handle: Option<wire::Handle>,
}

impl Stock {
    /// Connects.
    pub async fn connect(endpoint: &str) -> anyhow::Result<Self> {
        let channel = Endpoint::from_shared(endpoint.to_owned())?
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .connect()
            .await
            .with_context(|| format!("connect to {endpoint}"))?;
        let client = BlocksClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { client, handle: None })
    }

    /// What a store wants before the first block: hello and a namespace.
    pub async fn greet(&mut self, name: &str, format: wire::Format) -> anyhow::Result<()> {
        let hello = wire::HelloRequest {
            major: 1,
            instance_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
            client: "stock tonic".into(),
            ..wire::HelloRequest::default()
        };
        self.client.hello(hello).await.context("hello")?;
        let register = wire::RegisterNamespaceRequest {
            ctx: Some(wire::CallContext::default()),
            name: name.into(),
            format: Some(format),
            revision_digest: "generated".into(),
            require_full: false,
        };
        let reply = self.client.register_namespace(register).await.context("register_namespace")?;
        self.handle = reply.into_inner().handle;
        Ok(())
    }

    /// Gets whole blocks; answers the payload bytes, and fails where one is missing.
    pub async fn get(&mut self, keys: &[Bytes], block_bytes: usize) -> anyhow::Result<u64> {
        let items = keys.iter().map(|key| wire::GetItem { key: key.clone(), ..wire::GetItem::default() });
        let request = wire::GetRequest {
            ctx: Some(wire::CallContext::default()),
            handle: self.handle,
            items: items.collect(),
            chunk_bytes: CHUNK_BYTES as u32,
            ..wire::GetRequest::default()
        };
        let mut stream = self.client.get(request).await.context("get")?.into_inner();
        let (mut bytes, mut items) = (0, 0);
        while let Some(reply) = stream.message().await.context("get")? {
            ensure!(reply.status() == wire::PartStatus::Hit, "item {}: {:?}", reply.item, reply.status());
            bytes += reply.data.len() as u64;
            items += usize::from(reply.last);
        }
        ensure!(items == keys.len() && bytes == (keys.len() * block_bytes) as u64, "a get came back short");
        Ok(bytes)
    }

    /// Only the bytes: what the bare service offers.
    pub async fn write(&mut self, blocks: &[(u64, Bytes)]) -> anyhow::Result<u64> {
        let chunks: Vec<_> = blocks.iter().flat_map(|(id, data)| chunks(*id, data)).collect();
        let reply = self.client.write(tokio_stream::iter(chunks)).await.context("write")?.into_inner();
        let landed: u64 = reply.results.iter().map(|r| r.bytes).sum();
        if let Some(error) = reply.results.iter().find_map(|r| r.error.as_ref()) {
            bail!("write: {}: {}", error.kind, error.message);
        }
        let sent = blocks.iter().map(|(_, d)| d.len() as u64).sum::<u64>();
        ensure!(landed == sent, "{landed} of {sent} bytes landed");
        Ok(sent)
    }

    /// A whole put: reserve, write, commit. Blocks that are there already are not sent.
    pub async fn put(&mut self, blocks: &[(Bytes, Bytes)]) -> anyhow::Result<u64> {
        let mut done = 0;
        for _ in 0..RESERVES_MAX {
            let granted = self.put_prefix(&blocks[done..]).await?;
            done += granted;
            if done == blocks.len() {
                return Ok(blocks.iter().map(|(_, d)| d.len() as u64).sum());
            }
        }
        bail!("the server granted {done} of {} blocks", blocks.len())
    }

    async fn put_prefix(&mut self, blocks: &[(Bytes, Bytes)]) -> anyhow::Result<usize> {
        let position = |(key, data): &(Bytes, Bytes)| wire::PutPosition {
            key: key.clone(),
            parts: vec![wire::PutPart { group: 0, shard: 0, length: data.len() as u64 }],
            token_ids: Vec::new(),
        };
        let reserve = wire::ReserveRequest {
            ctx: Some(wire::CallContext::default()),
            handle: self.handle,
            positions: blocks.iter().map(position).collect(),
            unordered: true,
            class: wire::Class::Cache as i32,
            ..wire::ReserveRequest::default()
        };
        let reply = self.client.reserve(reserve).await.context("reserve")?.into_inner();
        let mut writes = Vec::with_capacity(blocks.len());
        let mut taken = 0;
        for (answer, (_, data)) in reply.answers.iter().zip(blocks) {
            match &answer.answer {
                Some(Answer::Present(_)) => {}
                Some(Answer::Slot(slot)) => writes.push((slot.reservation_id, data.clone())),
                Some(Answer::Refused(e)) if e.retryable => {
                    tokio::time::sleep(std::time::Duration::from_millis(u64::from(e.retry_after_ms.clamp(1, 100))))
                        .await;
                    break;
                }
                Some(Answer::Refused(e)) => bail!("reserve: {}: {}", e.kind, e.message),
                other => bail!("reserve: unexpected answer {other:?}"),
            }
            taken += 1;
        }
        if !writes.is_empty() {
            self.write(&writes).await?;
            let parts = writes.iter().map(|(id, _)| wire::CommitPart { reservation_id: *id, crc32: Vec::new() });
            let commit = wire::CommitRequest { ctx: Some(wire::CallContext::default()), parts: parts.collect() };
            let reply = self.client.commit(commit).await.context("commit")?.into_inner();
            if let Some(error) = reply.results.iter().find_map(|r| r.error.as_ref()) {
                bail!("commit: {}: {}", error.kind, error.message);
            }
        }
        Ok(taken)
    }
}

fn chunks(reservation_id: u64, data: &Bytes) -> impl Iterator<Item = wire::WriteRequest> + use<> {
    let data = data.clone();
    (0..data.len()).step_by(CHUNK_BYTES).map(move |from| wire::WriteRequest {
        reservation_id,
        offset: from as u64,
        data: data.slice(from..data.len().min(from + CHUNK_BYTES)),
    })
}
