//! Which peers are installed. Each is driven by a Python program of ours through the client library that it ships.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;

use super::path::{Entry, Group, Kind};
use super::report::Skipped;
use super::script::{Program, Started};

/// The programs' files, written next to each other into a folder of the run.
const FILES: [(&str, &str); 4] = [
    ("common.py", include_str!("../../peers/common.py")),
    ("peer_mooncake.py", include_str!("../../peers/peer_mooncake.py")),
    ("peer_redis.py", include_str!("../../peers/peer_redis.py")),
    ("peer_lmcache.py", include_str!("../../peers/peer_lmcache.py")),
];

/// One peer as we drive it.
struct Peer {
    name: &'static str,
    file: &'static str,
    args: &'static [&'static str],
    group: Group,
    what: &'static str,
}

const PEERS: [Peer; 4] = [
    Peer {
        name: "Mooncake, shared-memory agent",
        file: "peer_mooncake.py",
        args: &["agent"],
        group: Group::SameHost,
        what: "client to a stand-alone client process over shared memory",
    },
    Peer {
        name: "Mooncake, TCP",
        file: "peer_mooncake.py",
        args: &["tcp"],
        group: Group::Network,
        what: "client to a store node in another process",
    },
    Peer {
        name: "Redis",
        file: "peer_redis.py",
        args: &[],
        group: Group::Network,
        what: "no persistence, one connection",
    },
    Peer {
        name: "LMCache",
        file: "peer_lmcache.py",
        args: &[],
        group: Group::Network,
        what: "its lm:// server; a put is not acknowledged",
    },
];

/// What was found.
#[derive(Default)]
pub struct Installed {
    /// Paths of the peers.
    pub entries: Vec<Entry>,
    /// Name and version.
    pub versions: BTreeMap<String, String>,
    /// What is not there.
    pub skipped: Vec<Skipped>,
    // Holds the programs' files and logs.
    _folder: Option<tempfile::TempDir>,
}

/// The interpreters to try: those named, else that of the active virtual environment, else that of the path.
pub fn pythons(named: &[PathBuf]) -> Vec<PathBuf> {
    if !named.is_empty() {
        return named.to_vec();
    }
    match std::env::var_os("VIRTUAL_ENV").filter(|folder| !folder.is_empty()) {
        Some(folder) => vec![PathBuf::from(folder).join("bin/python")],
        None => vec!["python3".into()],
    }
}

/// Starts every peer with the first interpreter that has its library. What does not start is skipped, and said.
pub async fn start(pythons: &[PathBuf]) -> anyhow::Result<Installed> {
    let folder =
        tempfile::Builder::new().prefix("kvkeep-bench-").tempdir().context("a folder for the peers' programs")?;
    for (name, text) in FILES {
        std::fs::write(folder.path().join(name), text).with_context(|| format!("write {name}"))?;
    }
    let mut installed = Installed::default();
    for peer in &PEERS {
        let mut reasons = Vec::new();
        for (number, python) in pythons.iter().enumerate() {
            eprintln!("starting {} with {} ...", peer.name, python.display());
            let mut args = vec![folder.path().join(peer.file).to_string_lossy().into_owned()];
            args.extend(peer.args.iter().map(|arg| (*arg).to_owned()));
            let log = folder.path().join(format!("{}-{number}.log", peer.name));
            match (Program { python: python.clone(), args, log }).start().await {
                Ok(Started::Ready { version, paths }) => {
                    installed.versions.insert(peer.name.to_owned(), version);
                    installed.entries.extend(paths.into_iter().map(|(id, path)| Entry {
                        id,
                        what: peer.what.to_owned(),
                        kind: Kind::Peer,
                        group: peer.group,
                        path,
                    }));
                    reasons.clear();
                    break;
                }
                Ok(Started::Missing(why)) => reasons.push(why),
                Err(why) => reasons.push(format!("{why:#}")),
            }
        }
        if !reasons.is_empty() {
            installed.skipped.push(Skipped { what: peer.name.to_owned(), why: reasons.join("; ") });
        }
    }
    installed._folder = Some(folder);
    Ok(installed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_an_interpreter_every_peer_is_skipped_and_named() {
        let installed = start(&["/no/such/python".into()]).await.unwrap();
        assert!(installed.entries.is_empty());
        assert_eq!(installed.skipped.len(), PEERS.len());
        assert!(installed.skipped.iter().all(|skipped| !skipped.why.is_empty()));
    }

    #[test]
    fn named_interpreters_win() {
        assert_eq!(pythons(&["a".into(), "b".into()]), [PathBuf::from("a"), "b".into()]);
        assert_eq!(pythons(&[]).len(), 1);
    }

    #[test]
    fn every_peer_has_its_file() {
        assert!(PEERS.iter().all(|peer| FILES.iter().any(|(name, _)| *name == peer.file)));
    }
}
