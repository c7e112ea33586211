//! Reads a file and checks every byte of it.

use std::io::ErrorKind as IoKind;

use bytes::Bytes;
use crc32fast::Hasher;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use kvkeep_core::ErrorKind as CoreKind;

use crate::error::{Error, ErrorKind, Result};
use crate::session_file::check::Checker;
use crate::session_file::record::{Kind, MAGIC, PREFIX_BYTES, Record};
use crate::session_file::{
    FILE_VERSION, FileCounts, FileHeader, FileProgress, HEADER_BYTES_MAX, OnProgress, Stage, corrupt, io,
};
use crate::sessions::Tokens;

/// Room that is made for a body before any of it came, bytes: a length that lies costs no more.
const ROOM_BYTES: usize = 1 << 20;
/// Bytes of magic, version and the header's length.
const HEAD_BYTES: usize = 16;

/// A whole file but its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileContents {
    /// What it says of itself.
    pub header: FileHeader,
    /// What it holds.
    pub counts: FileCounts,
    /// Keys of its positions; empty where nobody knew it.
    pub keys: Vec<Bytes>,
    /// Token ids and content.
    pub tokens: Tokens,
    /// Positions from the start that an import can use: with their key and every part of the groups that need every block.
    pub usable_positions: u64,
    /// Of the whole file up to its last record.
    pub(super) crc32: u32,
}

/// Reads what a file says of itself, and nothing behind that.
pub async fn read_header<R: AsyncRead + Unpin>(from: &mut R) -> Result<FileHeader> {
    Ok(FileReader::begin(from).await?.1)
}

/// Reads a whole file and checks it, without a server.
pub async fn inspect<R: AsyncRead + Unpin>(from: &mut R, progress: OnProgress<'_>) -> Result<FileContents> {
    let (mut reader, header) = FileReader::begin(from).await?;
    let (mut keys, mut tokens, mut crc32) = (Vec::new(), Tokens::default(), 0);
    while let Some(record) = reader.next().await? {
        match record {
            Record::Tokens { ids, .. } => tokens.ids.extend(ids),
            Record::Content(part) => tokens.content.push(part),
            Record::Position { key, .. } => {
                let counts = reader.counts();
                keys.push(key);
                progress(FileProgress {
                    stage: Stage::Checking,
                    positions: counts.positions,
                    total_positions: header.session.positions,
                    bytes: counts.bytes,
                });
            }
            Record::Part { .. } => {}
            Record::End { crc32: sum, .. } => crc32 = sum,
        }
    }
    tokens.total = header.session.tokens;
    tokens.damaged = (tokens.ids.len() as u64) < tokens.total;
    if tokens.damaged && tokens.content.last().is_some_and(|part| part.end_token() > tokens.ids.len() as u64) {
        // Its last tokens are lost where the file comes from.
        tokens.content.pop();
    }
    Ok(FileContents { counts: reader.counts(), usable_positions: reader.usable(), header, keys, tokens, crc32 })
}

/// A file that is being read.
pub(super) struct FileReader<'a, R> {
    from: &'a mut R,
    at: u64,
    whole: Hasher,
    checker: Checker,
}

impl<'a, R: AsyncRead + Unpin> FileReader<'a, R> {
    pub(super) async fn begin(from: &'a mut R) -> Result<(Self, FileHeader)> {
        let mut head = [0; HEAD_BYTES];
        let place = |e: Error| e.with("at_byte", 0);
        read(from, &mut head).await.map_err(place)?;
        let [magic @ .., v0, v1, v2, v3, n0, n1, n2, n3] = head;
        if magic != MAGIC {
            return Err(place(corrupt("this is no session file")));
        }
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != FILE_VERSION {
            let message = "the session file has another version";
            let error = Error::new(ErrorKind::Refused(CoreKind::InvalidArgument), message);
            return Err(place(error.with("version", version).with("known", FILE_VERSION)));
        }
        let length = u32::from_le_bytes([n0, n1, n2, n3]);
        if length > HEADER_BYTES_MAX {
            return Err(place(corrupt("the header of the file is longer than any is")));
        }
        let json = read_body(from, length as usize).await.map_err(place)?;
        let mut sum = [0; 4];
        read(from, &mut sum).await.map_err(place)?;
        let mut whole = Hasher::new();
        whole.update(&head);
        whole.update(&json);
        if whole.clone().finalize() != u32::from_le_bytes(sum) {
            return Err(place(corrupt("the header of the file does not match its checksum")));
        }
        whole.update(&sum);
        let header: FileHeader = serde_json::from_slice(&json)
            .map_err(|e| place(corrupt("the header of the file makes no sense").with("why", &e).caused_by(e)))?;
        header.validate().map_err(place)?;
        let at = (HEAD_BYTES + json.len() + sum.len()) as u64;
        Ok((Self { from, at, whole, checker: Checker::new(&header) }, header))
    }

    /// The next record; `None` behind the end.
    pub(super) async fn next(&mut self) -> Result<Option<Record>> {
        if self.checker.has_ended() {
            return match self.from.read(&mut [0]).await {
                Ok(0) => Ok(None),
                Ok(_) => Err(corrupt("the file goes on behind its end").with("at_byte", self.at)),
                Err(e) => Err(io("the file cannot be read", e)),
            };
        }
        let at = self.at;
        let before = self.whole.clone().finalize();
        let mut prefix = [0; PREFIX_BYTES];
        self.take(&mut prefix).await.map_err(|e| e.with("at_byte", at))?;
        let Some((kind, length)) = Kind::read(prefix) else {
            return Err(corrupt("no record of the file begins like this").with("at_byte", at));
        };
        let place = |e: Error| e.with("record", kind.word()).with("at_byte", at);
        let body = Bytes::from(read_body(self.from, length).await.map_err(place)?);
        self.at += length as u64;
        let mut sum = Hasher::new();
        sum.update(&prefix);
        sum.update(&body);
        self.whole.update(&body);
        let mut stored = [0; 4];
        self.take(&mut stored).await.map_err(place)?;
        if sum.finalize() != u32::from_le_bytes(stored) {
            return Err(place(corrupt("a record of the file does not match its checksum")));
        }
        let record = Record::decode(kind, body).ok_or_else(|| place(corrupt("a record of the file makes no sense")))?;
        if matches!(&record, Record::End { crc32, .. } if *crc32 != before) {
            return Err(place(corrupt("the file does not match the checksum at its end")));
        }
        self.checker.take(&record).map_err(place)?;
        Ok(Some(record))
    }

    /// What was read so far.
    pub(super) fn counts(&self) -> FileCounts {
        self.checker.counts
    }

    /// Positions that an import can use; behind the end.
    pub(super) fn usable(&self) -> u64 {
        self.checker.usable()
    }

    async fn take(&mut self, to: &mut [u8]) -> Result<()> {
        read(self.from, to).await?;
        self.at += to.len() as u64;
        self.whole.update(to);
        Ok(())
    }
}

fn cut_or_failed(e: std::io::Error) -> Error {
    match e.kind() {
        IoKind::UnexpectedEof => corrupt("the file ends before its end: it was cut"),
        _ => io("the file cannot be read", e),
    }
}

async fn read<R: AsyncRead + Unpin>(from: &mut R, to: &mut [u8]) -> Result<()> {
    from.read_exact(to).await.map(drop).map_err(cut_or_failed)
}

async fn read_body<R: AsyncRead + Unpin>(from: &mut R, length: usize) -> Result<Vec<u8>> {
    let mut body = Vec::with_capacity(length.min(ROOM_BYTES));
    let read = from.take(length as u64).read_to_end(&mut body).await.map_err(cut_or_failed)?;
    if read == length { Ok(body) } else { Err(cut_or_failed(IoKind::UnexpectedEof.into())) }
}
