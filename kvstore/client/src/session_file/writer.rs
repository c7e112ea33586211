//! Writes a file, record by record.

use crc32fast::Hasher;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use crate::error::{Error, Result};
use crate::session_file::check::Checker;
use crate::session_file::record::{MAGIC, Record};
use crate::session_file::{FILE_VERSION, FileCounts, FileHeader, HEADER_BYTES_MAX, io};

/// A file that is being written.
pub(super) struct FileWriter<'a, W> {
    to: &'a mut W,
    whole: Hasher,
    checker: Checker,
}

impl<'a, W: AsyncWrite + Unpin> FileWriter<'a, W> {
    pub(super) async fn begin(to: &'a mut W, header: &FileHeader) -> Result<Self> {
        header.validate()?;
        let json = serde_json::to_vec(header)
            .map_err(|e| Error::invalid("the session cannot be described as JSON").caused_by(e))?;
        let length = u32::try_from(json.len()).ok().filter(|n| *n <= HEADER_BYTES_MAX);
        let length =
            length.ok_or_else(|| Error::invalid("the session's attributes are larger than a header may be"))?;
        let head = [&MAGIC[..], &FILE_VERSION.to_le_bytes(), &length.to_le_bytes(), &json].concat();
        let mut writer = Self { to, whole: Hasher::new(), checker: Checker::new(header) };
        writer.write(&head, &[]).await?;
        Ok(writer)
    }

    /// Bytes, and their checksum behind them.
    async fn write(&mut self, head: &[u8], payload: &[u8]) -> Result<()> {
        let mut sum = Hasher::new();
        sum.update(head);
        sum.update(payload);
        let sum = sum.finalize().to_le_bytes();
        for bytes in [head, payload, &sum] {
            self.whole.update(bytes);
            self.to.write_all(bytes).await.map_err(|e| io("the file cannot be written", e))?;
        }
        Ok(())
    }

    /// The next record; one that may not stand here is refused.
    pub(super) async fn record(&mut self, record: &Record) -> Result<()> {
        self.checker.take(record)?;
        let (head, payload) = record.encode();
        self.write(&head, payload).await
    }

    /// What was written so far.
    pub(super) fn counts(&self) -> FileCounts {
        self.checker.counts
    }

    /// The end of the file.
    pub(super) async fn end(mut self) -> Result<FileCounts> {
        self.checker.close();
        let counts = self.checker.counts;
        self.record(&Record::End { counts, crc32: self.whole.clone().finalize() }).await?;
        self.to.flush().await.map_err(|e| io("the file cannot be written", e))?;
        Ok(counts)
    }
}
