//! From a file into the store.

use std::io::SeekFrom;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ErrorKind as CoreKind;
use tokio::io::{AsyncRead, AsyncSeek, AsyncSeekExt as _};

use crate::call::Call;
use crate::convert::{self, Retention};
use crate::error::{Error, ErrorKind, Result};
use crate::put::{PartOutcome, Put, PutPart, PutPosition};
use crate::session_file::reader::{FileContents, FileReader, inspect};
use crate::session_file::record::Record;
use crate::session_file::{FileCounts, FileProgress, OnProgress, Origin, Stage, WINDOW_BYTES, corrupt, io};
use crate::sessions::{Append, OpenSession, SessionInfo, Sessions};

/// Times that a put which finds no room, or another writer, is made.
const TRIES_MAX: u32 = 20;
/// Pause between them where the server names none.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest pause between them.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What to read, and where it goes.
#[derive(Clone, Debug)]
pub struct Import {
    /// The namespace it goes to.
    pub into: Origin,
    /// Name of the session; `None`: the file's.
    pub id: Option<String>,
    /// Only token ids: into a namespace of another format or of other weights, where the blocks are of no use.
    pub tokens_only: bool,
}

/// What was read, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The session now.
    pub session: SessionInfo,
    /// Whether the import made it.
    pub created: bool,
    /// What the file holds.
    pub counts: FileCounts,
    /// Positions that the session got: those from the start that were whole.
    pub positions: u64,
    /// Token ids that the session got.
    pub tokens: u64,
}

impl Sessions {
    /// Reads a session from a file that [`Self::export`] wrote. The whole file is checked first; then blocks are put, with the
    /// session's class; then the session is opened and appended to. Behind a position that the file does not have, only token
    /// ids are taken. A session of that name must be empty, or be the same: then blocks that it misses are put. The call's
    /// deadline is that of each of many calls. An error leaves no half session: at most blocks that nobody asks for.
    pub async fn import<R: AsyncRead + AsyncSeek + Unpin>(
        &self,
        import: &Import,
        from: &mut R,
        call: &Call,
        progress: OnProgress<'_>,
    ) -> Result<Imported> {
        let begin = from.stream_position().await.map_err(|e| io("the file cannot be read twice", e))?;
        let contents = inspect(from, progress).await?;
        if !import.tokens_only {
            fits(&contents, &import.into)?;
        }
        let id = import.id.as_deref().unwrap_or(&contents.header.session.id);
        let positions = if import.tokens_only { 0 } else { contents.usable_positions };
        let keys = &contents.keys[..positions as usize];
        self.same_or_empty(id, keys, &contents, call).await?;
        if positions > 0 {
            from.seek(SeekFrom::Start(begin)).await.map_err(|e| io("the file cannot be read twice", e))?;
            self.put_blocks(from, &contents, positions, call, progress).await?;
        }
        let (session, created) = self.fill(id, keys, &contents, call).await?;
        Ok(Imported { session, created, counts: contents.counts, positions, tokens: contents.tokens.ids.len() as u64 })
    }

    /// Refuses a session of that name that is something else.
    async fn same_or_empty(&self, id: &str, keys: &[Bytes], contents: &FileContents, call: &Call) -> Result<()> {
        let there = match self.get(id, call).await {
            Err(e) if e.kind() == ErrorKind::Refused(CoreKind::UnknownSession) => return Ok(()),
            there => there?,
        };
        if there.positions == 0 && there.tokens == 0 {
            return Ok(());
        }
        let other = || {
            let message = "there is another session of that name: import under another one, or delete that first";
            Error::new(ErrorKind::Refused(CoreKind::Conflict), message).with("session_id", id)
        };
        let tokens = &contents.tokens;
        if (there.positions, there.tokens) != (keys.len() as u64, tokens.ids.len() as u64) || !there.revision_matches {
            return Err(other().with("positions", there.positions).with("tokens", there.tokens));
        }
        let theirs = self.tokens_all(id, call).await?;
        if !theirs.damaged && (theirs.ids != tokens.ids || theirs.content != tokens.content) {
            return Err(other());
        }
        let mut walk = self.walk_manifest(id, 0, call);
        loop {
            let first = walk.position() as usize;
            let Some(page) = walk.next_page().await? else { return Ok(()) };
            for (position, i) in page.iter().zip(first..) {
                // One whose blocks are gone has no key to compare; the append will tell.
                if position.key.is_some() && position.key.as_ref() != keys.get(i) {
                    return Err(other().with("position", i));
                }
            }
        }
    }

    /// Reads the file once more and puts the blocks of the first `positions`.
    async fn put_blocks<R: AsyncRead + Unpin>(
        &self,
        from: &mut R,
        contents: &FileContents,
        positions: u64,
        call: &Call,
        progress: OnProgress<'_>,
    ) -> Result<()> {
        let differs = || corrupt("the file was changed while it was imported");
        let (mut reader, header) = FileReader::begin(from).await?;
        if header != contents.header {
            return Err(differs());
        }
        let mut window: Vec<PutPosition> = Vec::new();
        let (mut first, mut bytes, mut done_bytes) = (0u64, 0u64, 0u64);
        loop {
            let record = reader.next().await?;
            // A position is whole when the next record is none of its parts.
            let closes = !matches!(record, Some(Record::Part { .. }));
            let full = bytes >= WINDOW_BYTES || window.len() >= self.ns.batch();
            let behind = first + window.len() as u64 == positions;
            if closes && !window.is_empty() && (full || behind) {
                let (count, part_bytes) = (window.len() as u64, bytes);
                self.put_window(std::mem::take(&mut window), first, contents, call).await?;
                first += count;
                done_bytes += part_bytes;
                bytes = 0;
                progress(FileProgress {
                    stage: Stage::Storing,
                    positions: first,
                    total_positions: positions,
                    bytes: done_bytes,
                });
            }
            match record {
                Some(Record::Position { key, .. }) if first + (window.len() as u64) < positions => {
                    if contents.keys.get(first as usize + window.len()) != Some(&key) {
                        return Err(differs());
                    }
                    window.push(PutPosition { key, ..PutPosition::default() });
                }
                Some(Record::Part { group, shard, data }) => {
                    if let Some(position) = window.last_mut() {
                        bytes += data.len() as u64;
                        position.parts.push(PutPart { group, shard, data });
                    }
                }
                Some(Record::End { crc32, .. }) if crc32 != contents.crc32 => return Err(differs()),
                Some(_) => {}
                None => return Ok(()),
            }
        }
    }

    async fn put_window(
        &self,
        positions: Vec<PutPosition>,
        first: u64,
        contents: &FileContents,
        call: &Call,
    ) -> Result<()> {
        let session = &contents.header.session;
        let parent = first.checked_sub(1).map(|i| contents.keys[i as usize].clone());
        let put = Put {
            parent,
            first_position: first as u32,
            positions,
            class: Some(session.class),
            retention: Retention::Keep,
            priority: session.priority,
            ..Put::default()
        };
        let parts: Vec<u64> = (first..)
            .zip(&put.positions)
            .flat_map(|(index, position)| std::iter::repeat_n(index, position.parts.len()))
            .collect();
        if parts.is_empty() {
            return Ok(());
        }
        for tries in 1.. {
            let outcomes = match self.ns.put(&put, call).await {
                Ok(outcomes) => outcomes,
                Err(e) => vec![PartOutcome::Refused(e)],
            };
            let failed = outcomes.into_iter().enumerate().find(|(_, outcome)| !outcome.is_kept());
            let Some((i, outcome)) = failed else { return Ok(()) };
            let (error, pause) = match outcome {
                PartOutcome::InProgressElsewhere { retry_after } => {
                    let message = "another client has been writing a block of the session for long";
                    (Error::new(ErrorKind::Refused(CoreKind::Conflict), message), Some(retry_after))
                }
                PartOutcome::Refused(e) => {
                    let pause = e.is_retryable().then(|| e.retry_after().unwrap_or(PAUSE));
                    (e, pause)
                }
                PartOutcome::Stored { .. } | PartOutcome::AlreadyPresent { .. } => return Ok(()),
            };
            match pause.filter(|_| tries < TRIES_MAX) {
                // What was stored is present at the next try.
                Some(pause) => tokio::time::sleep(pause.clamp(Duration::from_millis(10), PAUSE_MAX)).await,
                None => return Err(error.with("position", parts.get(i).copied().unwrap_or(first))),
            }
        }
        Ok(())
    }

    /// Opens the session and appends everything; what an error would leave is taken away again.
    async fn fill(
        &self,
        id: &str,
        keys: &[Bytes],
        contents: &FileContents,
        call: &Call,
    ) -> Result<(SessionInfo, bool)> {
        let session = &contents.header.session;
        let open = OpenSession {
            parent: None,
            class: Some(session.class),
            ttl: convert::long_millis_from_proto(session.ttl_ms),
            priority: session.priority,
            attributes: session.attributes.clone(),
        };
        let (opened, created) = self.open(id, &open, call).await?;
        let append = Append {
            from_position: 0,
            keys: keys.to_vec(),
            from_token: 0,
            token_ids: contents.tokens.ids.clone(),
            content: contents.tokens.content.clone(),
        };
        let filled = async {
            if !append.keys.is_empty() || !append.token_ids.is_empty() {
                self.append(id, &append, call).await?;
            }
            if session.closed { self.close(id, call).await } else { self.get(id, call).await }
        };
        match filled.await {
            Ok(session) => Ok((session, created)),
            Err(e) => {
                // As far as the server lets us: it may be what was lost.
                let undone = if created {
                    self.delete(id, call).await.map(drop)
                } else if opened.positions == 0 && opened.tokens == 0 {
                    self.truncate(id, 0, false, call).await.map(drop)
                } else {
                    Ok(())
                };
                match undone {
                    Ok(()) => Err(e),
                    Err(undo) => Err(e.with("left_half", id).with("because", undo)),
                }
            }
        }
    }
}

/// Whether blocks of the file are of use in a namespace.
fn fits(contents: &FileContents, into: &Origin) -> Result<()> {
    let header = &contents.header;
    let differences = header.format.differences(&into.format);
    if !differences.is_empty() {
        let message = "the file's format is not the namespace's: its blocks are of no use there, its token ids are";
        return Err(
            Error::new(ErrorKind::Refused(CoreKind::FormatMismatch), message).with("differ", differences.join(", "))
        );
    }
    if header.revision_digest != into.revision_digest {
        let message = "the file's blocks were computed with other weights: they are of no use there, its token ids are";
        return Err(Error::new(ErrorKind::Refused(CoreKind::StaleRevision), message)
            .with("file", &header.revision_digest)
            .with("namespace", &into.revision_digest));
    }
    Ok(())
}
