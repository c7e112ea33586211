//! Whole lists, manifests and token ids, page by page.

use bytes::Bytes;

use crate::call::Call;
use crate::error::{Error, Result};
use crate::sessions::Sessions;
use crate::sessions::info::{ListSessions, ManifestPosition, SessionInfo, Tokens};

/// A manifest, page by page. Positions that are appended meanwhile are walked too.
pub struct ManifestWalk<'a> {
    sessions: &'a Sessions,
    id: &'a str,
    call: &'a Call,
    next: u64,
    end: Option<u64>,
}

impl ManifestWalk<'_> {
    /// The next positions; `None` at the end.
    pub async fn next_page(&mut self) -> Result<Option<Vec<ManifestPosition>>> {
        if self.end.is_some_and(|end| self.next >= end) {
            return Ok(None);
        }
        let page = self.sessions.manifest(self.id, self.next, 0, self.call).await?;
        if page.positions.is_empty() && page.total > self.next {
            return Err(Error::protocol("a page of a manifest is empty before its end").with("session_id", self.id));
        }
        self.next += page.positions.len() as u64;
        self.end = Some(page.total);
        Ok((!page.positions.is_empty()).then_some(page.positions))
    }

    /// Index of the position that the next page begins with.
    pub fn position(&self) -> u64 {
        self.next
    }
}

impl Sessions {
    /// The first `limit` sessions that are asked for, page by page, and whether there are more.
    pub async fn list(&self, which: &ListSessions, limit: usize, call: &Call) -> Result<(Vec<SessionInfo>, bool)> {
        let (mut sessions, mut token) = (Vec::new(), Bytes::new());
        loop {
            let want = u32::try_from(limit - sessions.len()).unwrap_or(u32::MAX);
            let page = self.list_page(which, &token, want, call).await?;
            sessions.extend(page.sessions);
            token = page.next_page_token;
            let more = !token.is_empty() || sessions.len() > limit;
            sessions.truncate(limit);
            if sessions.len() == limit || !more {
                return Ok((sessions, more));
            }
        }
    }

    /// The manifest from `first` on, page by page; each page is a call of its own.
    pub fn walk_manifest<'a>(&'a self, id: &'a str, first: u64, call: &'a Call) -> ManifestWalk<'a> {
        ManifestWalk { sessions: self, id, call, next: first, end: None }
    }

    /// The whole manifest.
    pub async fn manifest_all(&self, id: &str, call: &Call) -> Result<Vec<ManifestPosition>> {
        let mut walk = self.walk_manifest(id, 0, call);
        let mut positions = Vec::new();
        while let Some(page) = walk.next_page().await? {
            positions.extend(page);
        }
        Ok(positions)
    }

    /// All token ids and content; with `damaged`, those in front of the damage.
    pub async fn tokens_all(&self, id: &str, call: &Call) -> Result<Tokens> {
        self.tokens_from(id, 0, call).await
    }

    /// The same from the token `first` on.
    pub async fn tokens_from(&self, id: &str, first: u64, call: &Call) -> Result<Tokens> {
        let mut all = Tokens::default();
        loop {
            let page = self.tokens(id, first + all.ids.len() as u64, 0, call).await?;
            let got = page.ids.len();
            all.ids.extend(page.ids);
            all.content.extend(page.content);
            all.total = page.total;
            all.damaged = page.damaged;
            if all.damaged || first + all.ids.len() as u64 >= all.total {
                return Ok(all);
            }
            if got == 0 {
                return Err(Error::protocol("a page of token ids is empty before their end").with("session_id", id));
            }
        }
    }
}
