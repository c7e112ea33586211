//! From the store to a file.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::ids::{GroupId, ShardId};
use kvkeep_core::{ErrorKind as CoreKind, MissReason, PartStatus};
use tokio::io::AsyncWrite;

use crate::call::Call;
use crate::error::{Error, ErrorKind, Result};
use crate::get::{GetItem, GotPart};
use crate::session_file::record::{IDS_PER_RECORD, Record};
use crate::session_file::writer::FileWriter;
use crate::session_file::{
    FileCounts, FileHeader, FileProgress, FileSession, OnProgress, Origin, POSITION_BYTES_MAX, Stage, WHAT,
    WINDOW_BYTES, within_limits,
};
use crate::sessions::{ManifestPosition, SessionInfo, SessionState, Sessions};

/// Times that a part which is on its way, or which the server does not want to read just now, is asked for.
const TRIES_MAX: u32 = 10;
/// Pause between them where the server names none.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest pause between them.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What to write.
#[derive(Clone, Debug)]
pub struct Export {
    /// The session's namespace.
    pub origin: Origin,
    /// Fail at the first position of which something is missing, and where token ids are lost.
    pub complete: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The session as it was.
    pub session: SessionInfo,
    /// What the file holds.
    pub counts: FileCounts,
}

/// A position of the manifest and what was read of it.
struct Read {
    position: ManifestPosition,
    parts: Vec<(GroupId, ShardId, Bytes)>,
    reason: Option<MissReason>,
    whole: bool,
}

impl Sessions {
    /// Writes a session into a file: token ids and every part that is here. What is missing is counted, and has its reason in
    /// the file. The call's deadline is that of each of many calls. What is appended meanwhile is not in the file; a session
    /// that is changed otherwise fails with `conflict`. After an error the file is of no use.
    pub async fn export<W: AsyncWrite + Unpin>(
        &self,
        id: &str,
        export: &Export,
        to: &mut W,
        call: &Call,
        progress: OnProgress<'_>,
    ) -> Result<Exported> {
        let session = self.get(id, call).await?;
        within_limits(session.positions, session.tokens)?;
        let mut writer = FileWriter::begin(to, &header(&session, &export.origin)).await?;
        self.export_tokens(&session, export, &mut writer, call).await?;
        let digests = self.export_positions(&session, export, &mut writer, call, progress).await?;
        self.is_still(&session, digests, call).await?;
        let counts = writer.end().await?;
        Ok(Exported { session, counts })
    }

    async fn export_tokens<W: AsyncWrite + Unpin>(
        &self,
        session: &SessionInfo,
        export: &Export,
        writer: &mut FileWriter<'_, W>,
        call: &Call,
    ) -> Result<()> {
        while writer.counts().tokens < session.tokens {
            let first = writer.counts().tokens;
            let count = (session.tokens - first).min(IDS_PER_RECORD as u64);
            let page = self.tokens(&session.id, first, count as u32, call).await?;
            let (damaged, got) = (page.damaged, page.ids.len() as u64);
            if got > count || (got == 0 && !damaged) {
                return Err(changed(session));
            }
            if got > 0 {
                writer.record(&Record::Tokens { first, ids: page.ids }).await?;
            }
            for part in page.content {
                writer.record(&Record::Content(part)).await?;
            }
            if damaged {
                let lost = Error::new(ErrorKind::Refused(CoreKind::Corrupt), "token ids of the session are lost");
                return if export.complete { Err(lost.with("from_token", first + got)) } else { Ok(()) };
            }
        }
        Ok(())
    }

    /// Answers a sum of the digests that were written.
    async fn export_positions<W: AsyncWrite + Unpin>(
        &self,
        session: &SessionInfo,
        export: &Export,
        writer: &mut FileWriter<'_, W>,
        call: &Call,
        progress: OnProgress<'_>,
    ) -> Result<u64> {
        let mut digests = DefaultHasher::new();
        let mut walk = self.walk_manifest(&session.id, 0, call);
        let mut index = 0;
        while u64::from(index) < session.positions {
            let Some(mut page) = walk.next_page().await? else { return Err(changed(session)) };
            page.truncate((session.positions - u64::from(index)) as usize);
            let mut page = page.into_iter().peekable();
            while page.peek().is_some() {
                let mut window = Vec::new();
                let mut bytes = 0;
                while let Some(next) = page.peek() {
                    if !window.is_empty() && (bytes + next.bytes > WINDOW_BYTES || window.len() == self.ns.batch()) {
                        break;
                    }
                    bytes += next.bytes;
                    window.extend(page.next());
                }
                if bytes > POSITION_BYTES_MAX {
                    let message = "a position is larger than a session file may hold";
                    return Err(Error::new(ErrorKind::Refused(CoreKind::TooLarge), message)
                        .with("position", index)
                        .with("bytes", bytes)
                        .with("at_most", POSITION_BYTES_MAX));
                }
                for read in self.read_window(window, index, export, call).await? {
                    read.position.digest.hash(&mut digests);
                    if export.complete && !read.whole {
                        return Err(incomplete(index, &read));
                    }
                    write(writer, index, read).await?;
                    index += 1;
                }
                progress(FileProgress {
                    stage: Stage::Exporting,
                    positions: u64::from(index),
                    total_positions: session.positions,
                    bytes: writer.counts().bytes,
                });
            }
        }
        Ok(digests.finish())
    }

    /// Reads the parts of some positions, the first of which has this index.
    async fn read_window(
        &self,
        window: Vec<ManifestPosition>,
        first: u32,
        export: &Export,
        call: &Call,
    ) -> Result<Vec<Read>> {
        let mut items = Vec::new();
        for (position, index) in window.iter().zip(first..) {
            let Some(key) = &position.key else { continue };
            let parts = export.origin.format.parts_at(index);
            items.extend(parts.map(|(group, shard)| GetItem::part(key.clone(), group, shard)));
        }
        let mut got = self.read_parts(&items, call).await?.into_iter();
        let mut reads = Vec::with_capacity(window.len());
        for (position, index) in window.into_iter().zip(first..) {
            let mut read = Read { reason: position.reason, parts: Vec::new(), whole: position.key.is_some(), position };
            let asked = if read.whole { export.origin.format.parts_at(index).collect() } else { Vec::new() };
            for ((group, shard), part) in asked.into_iter().zip(got.by_ref()) {
                if part.is_hit() {
                    read.parts.push((group, shard, part.data));
                } else {
                    read.whole = false;
                    read.reason = part.reason.or(read.reason);
                }
            }
            if read.whole {
                read.reason = None;
            }
            reads.push(read);
        }
        Ok(reads)
    }

    /// Gets parts, and those again that will be there, or may be read, in a moment. That the server was lost is an error here:
    /// nobody knows what is missing then.
    async fn read_parts(&self, items: &[GetItem], call: &Call) -> Result<Vec<GotPart>> {
        let mut got = Vec::with_capacity(items.len());
        for items in items.chunks(self.ns.batch()) {
            got.extend(self.ns.get(items, None, call).await?);
        }
        for tries in 1.. {
            let again: Vec<usize> = (0..got.len()).filter(|i| may_come(&got[*i])).collect();
            if again.is_empty() {
                break;
            }
            if tries == TRIES_MAX {
                // What cannot be read however often one asks is missing; what nobody knows is an error.
                return again.iter().find_map(|i| unknown(&got[*i])).map_or(Ok(got), Err);
            }
            let pause = again.iter().filter_map(|i| got[*i].retry_after).max().unwrap_or(PAUSE);
            tokio::time::sleep(pause.min(PAUSE_MAX)).await;
            for some in again.chunks(self.ns.batch()) {
                let items: Vec<_> = some.iter().map(|i| items[*i].clone()).collect();
                let parts = self.ns.get(&items, None, call).await?;
                for (i, part) in some.iter().zip(parts) {
                    got[*i] = part;
                }
            }
        }
        Ok(got)
    }

    /// Whether the positions that were written are still the first ones of the session.
    async fn is_still(&self, before: &SessionInfo, digests: u64, call: &Call) -> Result<()> {
        let now = self.get(&before.id, call).await?;
        if now.uid != before.uid || now.handle != before.handle || now.positions < before.positions {
            return Err(changed(before));
        }
        if (now.changed_unix_ms, now.appends) == (before.changed_unix_ms, before.appends) {
            return Ok(());
        }
        let mut sum = DefaultHasher::new();
        let mut walk = self.walk_manifest(&before.id, 0, call);
        let mut left = before.positions;
        while left > 0 {
            let Some(page) = walk.next_page().await? else { return Err(changed(before)) };
            for position in page.iter().take(left as usize) {
                position.digest.hash(&mut sum);
                left -= 1;
            }
        }
        if sum.finish() == digests { Ok(()) } else { Err(changed(before)) }
    }
}

fn header(session: &SessionInfo, origin: &Origin) -> FileHeader {
    let millis = |d: Option<Duration>| d.map_or(0, crate::convert::long_millis_to_proto);
    FileHeader {
        what: WHAT.to_owned(),
        written_by: concat!("kvkeep-client/", env!("CARGO_PKG_VERSION")).to_owned(),
        namespace: origin.namespace.clone(),
        format: origin.format.clone(),
        fingerprint: origin.format.fingerprint().to_string(),
        revision_digest: origin.revision_digest.clone(),
        session: FileSession {
            id: session.id.clone(),
            class: session.class,
            closed: session.state == SessionState::Closed,
            ttl_ms: millis(session.ttl),
            priority: session.priority,
            attributes: session.attributes.clone(),
            positions: session.positions,
            tokens: session.tokens,
            created_unix_ms: session.created_unix_ms,
            changed_unix_ms: session.changed_unix_ms,
        },
    }
}

async fn write<W: AsyncWrite + Unpin>(writer: &mut FileWriter<'_, W>, index: u32, read: Read) -> Result<()> {
    let position = Record::Position {
        index,
        parts: read.parts.len() as u32,
        reason: read.reason,
        digest: *read.position.digest.as_bytes(),
        key: read.position.key.unwrap_or_default(),
    };
    writer.record(&position).await?;
    for (group, shard, data) in read.parts {
        writer.record(&Record::Part { group, shard, data }).await?;
    }
    Ok(())
}

/// Whether asking once more may bring a part, or say that there is none.
fn may_come(part: &GotPart) -> bool {
    match part.status {
        PartStatus::Hit => false,
        PartStatus::Miss => is_lost(part.reason) || matches!(part.reason, Some(MissReason::Io | MissReason::Pending)),
        PartStatus::Pending | PartStatus::Loading | PartStatus::Throttled => true,
    }
}

/// Whether a reason says something of the server, and nothing of the part.
fn is_lost(reason: Option<MissReason>) -> bool {
    matches!(reason, Some(MissReason::Late | MissReason::Unreachable | MissReason::Cancelled))
}

/// Why it is not known whether a part is here.
fn unknown(part: &GotPart) -> Option<Error> {
    let message = "the server does not give a part of the session";
    match part.status {
        PartStatus::Throttled | PartStatus::Loading => {
            Some(Error::new(ErrorKind::Refused(CoreKind::Throttled), message).with("status", part.status))
        }
        _ if is_lost(part.reason) => Some(
            Error::new(ErrorKind::Unreachable, message).with("reason", part.reason.map_or("none", MissReason::word)),
        ),
        _ => None,
    }
}

fn changed(session: &SessionInfo) -> Error {
    Error::new(ErrorKind::Refused(CoreKind::Conflict), "the session was changed while it was exported: export it again")
        .with("session_id", &session.id)
}

fn incomplete(index: u32, read: &Read) -> Error {
    let why = match (read.reason, read.position.why.as_str()) {
        (_, why) if !why.is_empty() => why.to_owned(),
        (reason, _) => reason.map_or("not here", MissReason::word).to_owned(),
    };
    Error::new(ErrorKind::Refused(CoreKind::Conflict), "the session is not here whole")
        .with("position", index)
        .with("why", why)
}
