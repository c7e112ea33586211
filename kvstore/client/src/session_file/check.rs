//! Which record may follow which, and what was counted: one judge for the reader and the writer.

use kvkeep_core::{Format, GroupId, Rule, ShardId};

use crate::error::Result;
use crate::session_file::record::Record;
use crate::session_file::{CONTENT_MAX, FileCounts, FileHeader, corrupt};

/// A position whose parts are still to come, or have come.
#[derive(Clone, Copy, Debug)]
struct Open {
    index: u32,
    /// Parts that were announced and have not come.
    to_come: u32,
    has_key: bool,
    last: Option<(GroupId, ShardId)>,
    /// Parts of groups that need every block.
    needed: u32,
    parts: u32,
}

/// What a file may go on with.
#[derive(Debug)]
pub(super) struct Checker {
    format: Format,
    positions: u64,
    tokens_max: u64,
    /// Where the last content ended.
    content_end: u64,
    open: Option<Open>,
    /// Positions from the start, each of them with its key and every part that its rule needs.
    usable: u64,
    ended: bool,
    pub(super) counts: FileCounts,
}

impl Checker {
    pub(super) fn new(header: &FileHeader) -> Self {
        Self {
            format: header.format.clone(),
            positions: header.session.positions,
            tokens_max: header.session.tokens,
            content_end: 0,
            open: None,
            usable: 0,
            ended: false,
            counts: FileCounts::default(),
        }
    }

    /// Positions that an import can use; after the end.
    pub(super) fn usable(&self) -> u64 {
        self.usable
    }

    /// Whether nothing may follow.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes note of a record, or says why it may not stand here.
    pub(super) fn take(&mut self, record: &Record) -> Result<()> {
        let order = |what: &'static str| Err(corrupt("a record of the file stands where it may not").with("why", what));
        if self.ended {
            return order("it follows the end");
        }
        if self.open.is_some_and(|p| p.to_come > 0) && !matches!(record, Record::Part { .. }) {
            return order("a part is missing before it");
        }
        match record {
            Record::Tokens { .. } | Record::Content(_) if self.counts.positions > 0 => {
                return order("token ids and content go before the positions");
            }
            Record::Tokens { first, ids } => {
                if *first != self.counts.tokens {
                    return order("its token ids do not follow the last ones");
                }
                self.counts.tokens += ids.len() as u64;
                if self.counts.tokens > self.tokens_max {
                    return order("there are more token ids than the header says");
                }
            }
            Record::Content(part) => {
                if part.first_token < self.content_end || part.first_token >= self.counts.tokens {
                    return order("its tokens are not behind the last content's, or are not in the file");
                }
                self.content_end = part.end_token();
                self.counts.content += 1;
                if self.counts.content > CONTENT_MAX {
                    return order("there is more content than a file may have");
                }
            }
            Record::Position { index, parts, key, .. } => {
                self.close();
                if u64::from(*index) != self.counts.positions || self.counts.positions >= self.positions {
                    return order("it is not the next position");
                }
                if key.is_empty() && *parts > 0 {
                    return order("a position without a key has no parts");
                }
                self.counts.positions += 1;
                self.open = Some(Open {
                    index: *index,
                    to_come: *parts,
                    has_key: !key.is_empty(),
                    last: None,
                    needed: 0,
                    parts: *parts,
                });
            }
            Record::Part { group, shard, data } => {
                let Some(open) = self.open.as_mut().filter(|p| p.to_come > 0) else {
                    return order("no part was announced");
                };
                if open.last.is_some_and(|last| last >= (*group, *shard)) {
                    return order("parts are not in order");
                }
                let len = data.len() as u64;
                self.format.check_part(open.index, *group, *shard, len).map_err(|e| {
                    corrupt("a part of the file is none of its format").with("position", open.index).with("why", e)
                })?;
                let rule = self.format.groups.get(usize::from(group.0)).map(|g| g.rule);
                open.needed += u32::from(rule == Some(Rule::All));
                open.last = Some((*group, *shard));
                open.to_come -= 1;
                self.counts.parts += 1;
                self.counts.bytes += len;
            }
            Record::End { counts, .. } => {
                self.close();
                if self.counts.positions != self.positions {
                    return order("positions are missing before it");
                }
                if *counts != self.counts {
                    return order("its counts are not those of the file");
                }
                self.ended = true;
            }
        }
        Ok(())
    }

    /// What the last position came to. To be called before counts are written.
    pub(super) fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        let (mut all, mut needed) = (0, 0);
        for (group, _) in self.format.parts_at(open.index) {
            all += 1;
            needed += u32::from(self.format.groups[usize::from(group.0)].rule == Rule::All);
        }
        if !open.has_key || (open.parts == 0 && all > 0) {
            self.counts.missing += 1;
        } else if open.parts < all {
            self.counts.incomplete += 1;
        }
        let useful = open.has_key && open.needed == needed && (open.parts > 0 || all == 0);
        if useful && self.usable == u64::from(open.index) {
            self.usable += 1;
        }
    }
}
