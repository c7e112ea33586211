//! `namespace list` and `namespace show`.

use serde_json::json;

use crate::contact::Contact;
use crate::failure::Outcome;
use crate::output::{Output, pairs, table};
use crate::{key, show, units};

/// `namespace list`
pub async fn list(contact: &Contact, out: &Output) -> Outcome {
    let all = contact.namespaces().await?;
    let fields = json!({ "namespaces": all.iter().map(show::namespace_json).collect::<Vec<_>>() });
    out.answer("namespaces", fields, || {
        let rows = all.iter().map(|n| {
            vec![
                n.namespace_id.to_string(),
                n.tenant.clone(),
                n.name.clone(),
                n.format.as_ref().map_or_else(String::new, |f| f.model.clone()),
                n.revision.to_string(),
                n.positions.to_string(),
                units::bytes(n.dram_bytes),
                units::bytes(n.nvme_bytes),
            ]
        });
        table(&["id", "tenant", "name", "model", "revision", "positions", "dram", "nvme"], rows, &[0, 4, 5, 6, 7])
    })?;
    Ok(())
}

/// `namespace show`
pub async fn show(contact: &Contact, name: &str, out: &Output) -> Outcome {
    let n = contact.namespace(Some(name)).await?;
    out.answer("namespace", show::namespace_json(&n), || {
        let mut text = pairs([
            ("namespace", n.namespace_id.to_string()),
            ("tenant", n.tenant.clone()),
            ("name", n.name.clone()),
            ("revision", format!("{} ({})", n.revision, n.revision_digest)),
            ("fingerprint", key::hex(&n.fingerprint)),
            ("positions", n.positions.to_string()),
            ("dram", units::bytes(n.dram_bytes)),
            ("nvme", units::bytes(n.nvme_bytes)),
        ]);
        if let Some(f) = &n.format {
            let t = f.topology.unwrap_or_default();
            let cut = if t.canonical { "canonical".to_owned() } else { format!("tp {} pp {} cp {}", t.tp, t.pp, t.cp) };
            let prefill = match f.prefill_us_per_token {
                0 => "not declared".to_owned(),
                us if f.prefill_doubles_at_tokens == 0 => format!("{us} us per token"),
                us => format!("{us} us per token, twice that behind {} tokens", f.prefill_doubles_at_tokens),
            };
            text.push_str(&pairs([
                ("model", f.model.clone()),
                ("dtype", f.dtype.clone()),
                ("layout", f.layout.clone()),
                ("keys", format!("{} tokens each, {} seed {:?}", f.tokens_per_key, f.hash_algorithm, f.hash_seed)),
                ("topology", cut),
                ("prefill", prefill),
            ]));
            let rows = f.groups.iter().enumerate().map(|(i, g)| {
                let shards = if g.replicated { "replicated".to_owned() } else { g.shards.to_string() };
                vec![i.to_string(), show::rule(g), g.tokens_per_block.to_string(), shards, show::size(g)]
            });
            text.push('\n');
            text.push_str(&table(&["group", "rule", "tokens", "shards", "bytes of a shard"], rows, &[0, 2]));
        }
        text
    })?;
    Ok(())
}
