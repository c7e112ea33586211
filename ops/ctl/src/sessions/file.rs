//! `session export`, `session import`.

use std::path::Path;

use kvkeep_client::session_file::{Export, FileCounts, FileHeader, FileProgress, Import, Origin, Stage, read_header};
use kvkeep_client::{Sessions, wire};
use serde_json::{Value, json};
use tokio::fs::File;
use tokio::io::{AsyncWriteExt as _, BufReader, BufWriter};

use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, pairs};
use crate::sessions::args::{ImportArgs, SessionArg};
use crate::sessions::bar::Bar;
use crate::sessions::words;
use crate::units;

/// Bytes between the file and us.
const BUFFER_BYTES: usize = 1 << 20;

/// `session export`
pub async fn export(
    contact: &Contact,
    session: &SessionArg,
    path: &Path,
    complete: bool,
    overwrite: bool,
    out: &Output,
) -> Outcome {
    if !overwrite && path.try_exists()? {
        return Err(Failure::failed(format!("{} is there already", path.display()))
            .advise("name another file, or say --overwrite"));
    }
    let (namespace, sessions) = contact.sessions(session.namespace.name()).await?;
    let export = Export { origin: Origin::from_info(&namespace)?, complete };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Beside the file, and under its name only when it is whole.
    let part = tempfile::Builder::new().prefix(".kvkeep-export-").tempfile_in(folder)?;
    let mut to = BufWriter::with_capacity(BUFFER_BYTES, File::from_std(part.reopen()?));
    let bar = Bar::new(out);
    let mut progress = |p: FileProgress| bar.at(stage(p.stage), p.positions, p.total_positions, p.bytes);
    let exported = sessions.export(&session.id, &export, &mut to, &contact.call, &mut progress).await?;
    to.flush().await?;
    to.get_ref().sync_all().await?;
    let file_bytes = to.get_ref().metadata().await?.len();
    drop(bar);
    let kept = if overwrite { part.persist(path) } else { part.persist_noclobber(path) };
    kept.map_err(|e| Failure::failed(format!("{} cannot be written: {}", path.display(), e.error)))?;
    let counts = exported.counts;
    let mut fields = json!({
        "session_id": session.id,
        "file": path.to_string_lossy(),
        "file_bytes": file_bytes,
    });
    add_counts(&mut fields, &counts);
    fields["tokens_lost"] = (exported.session.tokens - counts.tokens).into();
    out.answer("session_export", fields, || {
        let mut rows = vec![
            ("session", session.id.clone()),
            ("file", format!("{}, {}", path.display(), units::bytes(file_bytes))),
        ];
        rows.extend(count_rows(&counts));
        if counts.tokens < exported.session.tokens {
            rows.push(("lost", format!("{} token ids", exported.session.tokens - counts.tokens)));
        }
        pairs(rows)
    })?;
    Ok(())
}

/// `session import`
pub async fn import(contact: &Contact, args: &ImportArgs, out: &Output) -> Outcome {
    let open = |e: std::io::Error| Failure::failed(format!("{} cannot be read: {e}", args.file.display()));
    let file = File::open(&args.file).await.map_err(open)?;
    let header = read_header(&mut BufReader::new(file)).await?;
    let (namespace, sessions) = destination(contact, args, &header).await?;
    let into = Origin::from_info(&namespace)?;
    let import = Import { into, id: args.id.clone(), tokens_only: args.tokens_only };
    let mut from = BufReader::with_capacity(BUFFER_BYTES, File::open(&args.file).await.map_err(open)?);
    let bar = Bar::new(out);
    let mut progress = |p: FileProgress| bar.at(stage(p.stage), p.positions, p.total_positions, p.bytes);
    let imported = sessions.import(&import, &mut from, &contact.call, &mut progress).await?;
    drop(bar);
    let left_out = if args.tokens_only { 0 } else { imported.counts.positions - imported.positions };
    let mut fields = words::session_json(&imported.session);
    fields["created"] = imported.created.into();
    fields["imported_positions"] = imported.positions.into();
    fields["imported_tokens"] = imported.tokens.into();
    let mut in_file = json!({});
    add_counts(&mut in_file, &imported.counts);
    fields["file"] = in_file;
    out.answer("session_import", fields, || {
        let mut rows = vec![
            ("session", imported.session.id.clone()),
            ("namespace", words::label(&namespace)),
            ("made", if imported.created { "yes" } else { "it was there" }.to_owned()),
            ("got", format!("{} positions, {} token ids", imported.positions, imported.tokens)),
        ];
        if left_out > 0 {
            let why = "the file lacks blocks of the first of them";
            rows.push(("left out", format!("{left_out} positions: {why}")));
        }
        pairs(rows)
    })?;
    Ok(())
}

/// Where a file goes: the namespace that was named, or that of the file's name, made where that was asked for.
async fn destination(
    contact: &Contact,
    args: &ImportArgs,
    header: &FileHeader,
) -> Outcome<(wire::NamespaceInfo, Sessions)> {
    let name = args.namespace.as_deref().unwrap_or(&header.namespace);
    if args.register {
        // Says which fields differ where there is one of this name and another format.
        let ns = contact.client.register_namespace(name, &header.format, &header.revision_digest).await?;
        let number = ns.handle.namespace.0.to_string();
        return contact.sessions(Some(&number)).await;
    }
    contact.sessions(Some(name)).await.map_err(|e| match e.advice() {
        Some(_) => e,
        None => e.advise("--register makes the namespace as the file describes it"),
    })
}

fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Exporting => "export",
        Stage::Checking => "check",
        Stage::Storing => "put",
    }
}

fn add_counts(fields: &mut Value, counts: &FileCounts) {
    fields["positions"] = counts.positions.into();
    fields["missing_positions"] = counts.missing.into();
    fields["incomplete_positions"] = counts.incomplete.into();
    fields["parts"] = counts.parts.into();
    fields["bytes"] = counts.bytes.into();
    fields["tokens"] = counts.tokens.into();
    fields["content_parts"] = counts.content.into();
}

fn count_rows(counts: &FileCounts) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("positions", counts.positions.to_string()),
        ("parts", format!("{}, {}", counts.parts, units::bytes(counts.bytes))),
        ("token ids", counts.tokens.to_string()),
    ];
    if counts.missing > 0 {
        rows.push(("missing", format!("{} positions", counts.missing)));
    }
    if counts.incomplete > 0 {
        rows.push(("incomplete", format!("{} positions", counts.incomplete)));
    }
    rows
}
