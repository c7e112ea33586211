//! Reads a trace file line by line, never more than one line in memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, bail};

use super::line::{self, Dialect, LINE_BYTES_MAX, Line, Owner};
use super::{Request, SessionId, Source, Workload};
use crate::keys::PrefixId;

/// Bytes read ahead.
const READ_AHEAD_BYTES: usize = 256 << 10;
/// Largest window a zstd stream may ask for, log2 of bytes: 128 MiB, what the `zstd` tool accepts too.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// First bytes of a zstd stream.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Sessions remembered while they are told from blocks or chat ids; beyond, the memory starts anew.
const REMEMBERED_SESSIONS_MAX: usize = 1 << 20;

/// Opens a trace; its first line says which dialect the rest must be.
pub fn open(path: &Path) -> anyhow::Result<Workload> {
    let file = File::open(path).with_context(|| format!("trace {}", path.display()))?;
    let mut file = BufReader::with_capacity(READ_AHEAD_BYTES, file);
    let zstd = file.fill_buf().with_context(|| format!("trace {}", path.display()))?.starts_with(&ZSTD_MAGIC);
    let reader: Box<dyn BufRead + Send> = if zstd {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        Box::new(BufReader::with_capacity(READ_AHEAD_BYTES, decoder))
    } else {
        Box::new(file)
    };
    from_reader(reader, &path.display().to_string())
}

/// The same from anything that can be read.
pub fn from_reader(reader: Box<dyn BufRead + Send>, name: &str) -> anyhow::Result<Workload> {
    let mut lines = Lines { reader, number: 0, buffer: Vec::new() };
    let Some(first) = lines.next() else { bail!("trace {name}: it has no line") };
    let first = first.with_context(|| format!("trace {name}"))?;
    let dialect = first.dialect;
    let mut sessions = Sessions::default();
    let mut number = 0;
    let start_ms = first.at_ms;
    let owner_name = name.to_owned();
    let requests = std::iter::once(Ok(first)).chain(lines).map(move |read| {
        let line = read.with_context(|| format!("trace {owner_name}"))?;
        if line.dialect != dialect {
            bail!("trace {owner_name}: a {} line in a {} trace", line.dialect.name(), dialect.name());
        }
        let request = Request {
            number,
            at_ms: line.at_ms.saturating_sub(start_ms),
            session: sessions.of(&line),
            kind: line.kind,
            input_tokens: line.input_tokens,
            output_tokens: line.output_tokens,
            blocks: line.blocks,
        };
        number += 1;
        Ok(request)
    });
    let source = Source { format: dialect.name(), name: name.to_owned(), tokens_per_block: dialect.tokens_per_block() };
    Ok(Workload { source, requests: Box::new(requests), total: None })
}

struct Lines {
    reader: Box<dyn BufRead + Send>,
    number: u64,
    buffer: Vec<u8>,
}

impl Iterator for Lines {
    type Item = anyhow::Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.buffer.clear();
            self.number += 1;
            // One byte over the bound is enough to see that a line is too long.
            let read = self.reader.by_ref().take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', &mut self.buffer);
            match read {
                Ok(0) => return None,
                Ok(_) if self.buffer.trim_ascii().is_empty() => {}
                Ok(_) => {
                    let parsed =
                        line::parse(&self.buffer).map_err(|why| anyhow::anyhow!("line {}: {why}", self.number));
                    return Some(parsed);
                }
                Err(e) => return Some(Err(e).with_context(|| format!("line {}", self.number))),
            }
        }
    }
}

/// Finds the session of each line.
#[derive(Default)]
struct Sessions {
    next: u64,
    /// Of the last full block of a request: a request that repeats all full blocks of an earlier one continues its session.
    by_block: HashMap<PrefixId, SessionId>,
    by_chat: HashMap<i64, SessionId>,
}

impl Sessions {
    fn of(&mut self, line: &Line) -> SessionId {
        match line.owner {
            Owner::Session(id) => SessionId(id),
            Owner::Chat { id, parent } => {
                let session = self.by_chat.get(&parent).copied();
                let session = session.unwrap_or_else(|| self.fresh());
                bounded(&mut self.by_chat).insert(id, session);
                session
            }
            Owner::Unsaid => {
                let full = (line.input_tokens / Dialect::Mooncake.tokens_per_block()) as usize;
                let full = &line.blocks[..full.min(line.blocks.len())];
                // At least two blocks: one is often a system prompt that many sessions share.
                let deep = full.get(1..).unwrap_or_default();
                let known = deep.iter().rev().find_map(|block| self.by_block.get(block)).copied();
                let session = known.unwrap_or_else(|| self.fresh());
                if let Some(last) = deep.last() {
                    bounded(&mut self.by_block).insert(*last, session);
                }
                session
            }
        }
    }

    fn fresh(&mut self) -> SessionId {
        self.next += 1;
        SessionId(self.next)
    }
}

fn bounded<K, V>(map: &mut HashMap<K, V>) -> &mut HashMap<K, V> {
    if map.len() >= REMEMBERED_SESSIONS_MAX {
        map.clear();
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> anyhow::Result<Vec<Request>> {
        from_reader(Box::new(std::io::Cursor::new(text.to_owned().into_bytes())), "test")?.requests.collect()
    }

    fn fixture(name: &str) -> Workload {
        open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
    }

    #[test]
    fn the_published_fields_are_taken_as_they_are() {
        for (name, format, tokens) in [
            ("mooncake.jsonl", "mooncake", 512),
            ("sessions.jsonl", "mooncake+sessions", 512),
            ("qwen_bailian.jsonl", "qwen-bailian", 16),
        ] {
            let workload = fixture(name);
            assert_eq!((workload.source.format, workload.source.tokens_per_block), (format, tokens), "{name}");
            let requests: Vec<_> = workload.requests.map(Result::unwrap).collect();
            assert_eq!(requests.len(), 4, "{name}");
            // Each fixture: two turns of one session, another session, then a third turn of the first.
            assert_eq!(requests[0].session, requests[1].session, "{name}");
            assert_ne!(requests[0].session, requests[2].session, "{name}");
            assert_eq!(requests[0].session, requests[3].session, "{name}");
            assert_eq!(requests[0].at_ms, 0, "{name}");
            assert!(requests.is_sorted_by_key(|r| r.at_ms), "{name}");
        }
    }

    #[test]
    fn a_compressed_trace_reads_like_a_plain_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mooncake.jsonl");
        let plain = std::fs::read(path).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        zstd::stream::copy_encode(plain.as_slice(), &mut file, 3).unwrap();
        let packed: Vec<_> = open(file.path()).unwrap().requests.map(Result::unwrap).collect();
        let plain: Vec<_> = fixture("mooncake.jsonl").requests.map(Result::unwrap).collect();
        assert_eq!(packed, plain);
    }

    #[test]
    fn a_bad_line_is_named_by_its_number() {
        let good = r#"{"timestamp":0,"input_length":512,"output_length":1,"hash_ids":[1]}"#;
        let why = format!("{:#}", read(&format!("{good}\n\n{{}}\n")).unwrap_err());
        assert!(why.contains("line 3"), "{why}");
        let qwen = r#"{"chat_id":1,"timestamp":0,"input_length":16,"output_length":1,"hash_ids":[1]}"#;
        assert!(read(&format!("{good}\n{qwen}\n")).is_err());
        assert!(read("").is_err());
    }

    /// A file without a line break is given up after the bound, not read into memory.
    #[test]
    fn an_endless_line_is_refused() {
        let endless = Box::new(BufReader::new(std::io::repeat(b'1')));
        let mut lines = Lines { reader: endless, number: 0, buffer: Vec::new() };
        assert!(lines.next().unwrap().unwrap_err().to_string().contains("at most"));
        assert!(lines.buffer.capacity() <= 4 * LINE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(bytes: Vec<u8>) {
            if let Ok(workload) = from_reader(Box::new(std::io::Cursor::new(bytes)), "test") {
                workload.requests.take(100).for_each(drop);
            }
        }

        /// The same behind zstd's magic.
        #[test]
        fn arbitrary_compressed_files_never_panic(mut bytes: Vec<u8>) {
            bytes.splice(0..0, ZSTD_MAGIC);
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            if let Ok(workload) = open(file.path()) {
                workload.requests.take(100).for_each(drop);
            }
        }
    }
}
