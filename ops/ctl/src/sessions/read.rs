//! `session list`, `session show`.

use std::collections::BTreeMap;

use kvkeep_client::sessions::{ListSessions, ManifestPosition};
use kvkeep_core::ids::{NamespaceId, Revision};
use kvkeep_core::{Handle, MissReason, Tier};
use serde_json::json;

use crate::contact::Contact;
use crate::failure::Outcome;
use crate::output::{Output, table};
use crate::sessions::args::{ListArgs, SessionArg};
use crate::sessions::words;
use crate::units;

/// `session list`
pub async fn list(contact: &Contact, args: &ListArgs, out: &Output) -> Outcome {
    let (sessions, namespaces) = match args.namespace.name() {
        Some(name) => {
            let (namespace, sessions) = contact.sessions(Some(name)).await?;
            (sessions, vec![namespace])
        }
        None => {
            let anywhere = Handle { namespace: NamespaceId(0), revision: Revision(0) };
            (contact.client.attach(anywhere).sessions(), contact.namespaces().await?)
        }
    };
    let which = ListSessions {
        all_namespaces: args.namespace.name().is_none(),
        id_prefix: args.prefix.clone().unwrap_or_default(),
        class: args.class.map(Into::into),
        state: args.state.map(Into::into),
        attributes: args.attribute.iter().cloned().collect(),
    };
    let (found, more) = sessions.list(&which, args.limit as usize, &contact.call).await?;
    let fields = json!({ "sessions": found.iter().map(words::session_json).collect::<Vec<_>>(), "more": more });
    out.answer("sessions", fields, || {
        let rows = found.iter().map(|s| {
            let namespace = namespaces.iter().find(|n| n.namespace_id == s.handle.namespace.0);
            vec![
                s.id.clone(),
                namespace.map_or_else(|| s.handle.namespace.0.to_string(), words::label),
                s.state.word().to_owned(),
                s.class.word().to_owned(),
                s.positions.to_string(),
                s.tokens.to_string(),
                s.priority.to_string(),
                s.pinned.map_or("-", Tier::word).to_owned(),
                units::moment(s.changed_unix_ms),
            ]
        });
        let head = ["session", "namespace", "state", "class", "positions", "tokens", "priority", "pinned", "changed"];
        let mut text = table(&head, rows, &[4, 5, 6]);
        if more {
            text.push_str(&format!("the first {}; see more with --limit\n", args.limit));
        }
        text
    })?;
    Ok(())
}

/// Positions and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    positions: u64,
    bytes: u64,
}

/// Where a session's positions are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Where {
    tiers: BTreeMap<Tier, Sum>,
    missing: BTreeMap<&'static str, u64>,
}

impl Where {
    fn add(&mut self, position: &ManifestPosition) {
        match position.tier.filter(|_| position.is_here()) {
            Some(tier) => {
                let sum = self.tiers.entry(tier).or_default();
                sum.positions += 1;
                sum.bytes += position.bytes;
            }
            None => {
                let why = position.reason.map_or(position.status.word(), MissReason::word);
                *self.missing.entry(why).or_default() += 1;
            }
        }
    }
}

/// `session show`
pub async fn show(contact: &Contact, session: &SessionArg, out: &Output) -> Outcome {
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    let info = sessions.get(&session.id, &contact.call).await?;
    let mut at = Where::default();
    let mut walk = sessions.walk_manifest(&session.id, 0, &contact.call);
    while let Some(page) = walk.next_page().await? {
        page.iter().for_each(|position| at.add(position));
    }
    let mut fields = words::session_json(&info);
    fields["tiers"] = at
        .tiers
        .iter()
        .map(|(tier, sum)| json!({ "tier": tier.word(), "positions": sum.positions, "bytes": sum.bytes }))
        .collect();
    fields["missing"] = at.missing.iter().map(|(reason, n)| json!({ "reason": reason, "positions": n })).collect();
    fields["missing_positions"] = at.missing.values().sum::<u64>().into();
    out.answer("session", fields, || {
        let mut text = words::session_text(&info, &namespace);
        let here = at.tiers.iter().map(|(tier, sum)| {
            vec![tier.word().to_owned(), sum.positions.to_string(), units::bytes(sum.bytes), String::new()]
        });
        let missing = at
            .missing
            .iter()
            .map(|(reason, n)| vec!["missing".to_owned(), n.to_string(), String::new(), (*reason).to_owned()]);
        if info.positions > 0 {
            text.push('\n');
            text.push_str(&table(&["where", "positions", "bytes", "why"], here.chain(missing), &[1, 2]));
        }
        text
    })?;
    Ok(())
}
