//! What raft logs (through `slog`), handed to `tracing`.

use std::fmt::Write as _;

use slog::{Drain, KV as _, Level, Logger, OwnedKVList, Record, o};

use crate::ids::GroupId;

struct ToTracing(GroupId);

/// A logger for the raft of this group.
pub(crate) fn logger(group: GroupId) -> Logger {
    Logger::root(ToTracing(group), o!())
}

impl Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn is_enabled(&self, level: Level) -> bool {
        // A leader of many groups says much that is news to nobody.
        level.is_at_least(Level::Info)
    }

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), slog::Never> {
        if !self.is_enabled(record.level()) {
            return Ok(());
        }
        let mut fields = Fields(String::new());
        // Into a string; it does not fail.
        let _ = record.kv().serialize(record, &mut fields);
        let (group, message, fields) = (self.0, record.msg(), fields.0);
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", %group, "{message}{fields}"),
            Level::Warning => tracing::warn!(target: "raft", %group, "{message}{fields}"),
            _ => tracing::debug!(target: "raft", %group, "{message}{fields}"),
        }
        Ok(())
    }
}

struct Fields(String);

impl slog::Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(|_| slog::Error::Other)
    }
}
