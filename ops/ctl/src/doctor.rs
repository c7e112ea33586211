//! `doctor`: is this machine fit for a node, does the endpoint answer, and are both of one version?

use std::path::PathBuf;

use kvkeep_client::{Way, Wire};
use serde_json::json;

use crate::args::{Connection, DoctorArgs};
use crate::checks::{self, Check, Level};
use crate::contact::{self, Contact};
use crate::failure::{Failure, Outcome};
use crate::kvkeepd;
use crate::output::{Output, table};

const OWN_VERSION: &str = env!("CARGO_PKG_VERSION");

/// `doctor`
pub async fn run(args: &DoctorArgs, connection: &Connection, out: &Output) -> Outcome {
    let (mut about_server, mut data_dir) = (Vec::new(), None);
    if !args.offline {
        (about_server, data_dir) = server(connection).await;
    }
    let data_dir = args.data_dir.clone().or(data_dir).unwrap_or_else(|| PathBuf::from("."));
    let mut all = checks::machine(&data_dir, &args.arena_dir);
    all.extend(beside().await);
    all.extend(about_server);

    let worst = all.iter().map(|c| c.level).max().unwrap_or(Level::Ok);
    let fields = json!({
        "worst": worst.word(),
        "checks": all.iter().map(|c| json!({
            "name": c.name, "level": c.level.word(), "found": c.found, "advice": c.advice,
        })).collect::<Vec<_>>(),
    });
    out.answer("doctor", fields, || {
        let rows = all.iter().flat_map(|c| {
            let line = vec![c.level.word().to_owned(), c.name.to_owned(), c.found.clone()];
            let advice = c.advice.iter().map(|a| vec![String::new(), String::new(), format!("-> {a}")]);
            std::iter::once(line).chain(advice)
        });
        table(&["", "what", "found"], rows, &[])
    })?;
    match worst {
        Level::Bad => Err(Failure::failed("something is bad; see above")),
        Level::Ok | Level::Warn => Ok(()),
    }
}

/// Does the endpoint answer, of which version is it, and what does it warn of? Also the data folder it uses.
async fn server(connection: &Connection) -> (Vec<Check>, Option<PathBuf>) {
    const NAME: &str = "endpoint";
    let endpoint = contact::endpoint(connection);
    let contact = match Contact::open(connection).await {
        Ok(contact) => contact,
        Err(e) => {
            let advice = e.advice().unwrap_or("--offline leaves this out").to_owned();
            return (vec![Check::bad(NAME, e.to_string(), advice)], None);
        }
    };
    let hello = contact.client.hello();
    let found = format!("{endpoint}: node {}, tenant {}", hello.node, hello.tenant);
    let mut checks = vec![Check::ok(NAME, found), judge_version("server", &hello.server)];
    checks.extend(contact.client.way().map(|way| judge_way(&way)));
    match contact.client.admin().status(&contact.call).await {
        Ok(status) => {
            checks
                .extend(status.warnings.iter().map(|w| Check::warn("server", w.clone(), "the server's log says more")));
            (checks, Some(PathBuf::from(status.data_dir)).filter(|d| d.is_dir()))
        }
        Err(e) => {
            checks.push(Check::warn("status", e.to_string(), "status needs the admin right"));
            (checks, None)
        }
    }
}

/// Which way an engine on this host, as this user, would go, and what stands in the way of a faster one.
fn judge_way(way: &Way) -> Check {
    let can = match (way.wire, way.mapped, way.regions) {
        (Wire::Socket, true, _) => {
            "block protocol on the Unix socket: mapped reads and regions, nothing copied or one copy"
        }
        (Wire::Socket, false, true) => "block protocol on the Unix socket: regions, one copy by the server",
        (Wire::Socket, false, false) => "block protocol on the Unix socket: bytes travel through it",
        (Wire::Port, ..) => "block protocol over TCP: bytes travel",
        (Wire::Grpc, ..) => "gRPC: bytes travel, and the library copies them once more",
    };
    let found = format!("{can} ({})", way.to);
    let advice = match (way.wire, way.mapped) {
        (Wire::Socket, false) => {
            Some("to let this user read in place, add its uid to auth.unix_uids and auth.map_uids".to_owned())
        }
        _ if !way.why.is_empty() => Some(way.why.clone()),
        _ => None,
    };
    Check { advice, ..Check::ok("fast way", found) }
}

/// The `kvkeepd` beside this program.
async fn beside() -> Option<Check> {
    let program = kvkeepd::find(None).ok()?;
    let output = tokio::process::Command::new(&program).arg("--version").output().await;
    Some(match output {
        Ok(output) if output.status.success() => {
            judge_version("kvkeepd beside this", String::from_utf8_lossy(&output.stdout).trim())
        }
        Ok(output) => Check::bad("kvkeepd beside this", format!("ends with {}", output.status), "build it again"),
        Err(e) => Check::bad("kvkeepd beside this", format!("does not run: {e}"), "build it again"),
    })
}

/// `name` says what it is and its version, as in `kvkeepd 0.1.0` or `kvkeepd/0.1.0`.
fn judge_version(what: &'static str, name: &str) -> Check {
    let version = name.rsplit(['/', ' ']).find(|w| w.starts_with(|c: char| c.is_ascii_digit()));
    match version {
        Some(version) if version == OWN_VERSION => Check::ok(what, format!("{name}, as this program")),
        _ => Check::warn(
            what,
            format!("{name:?}; this program is {OWN_VERSION}"),
            "within one major version both work together; use one version to see everything",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_the_last_word_that_begins_with_a_digit() {
        assert_eq!(judge_version("server", &format!("kvkeepd/{OWN_VERSION}")).level, Level::Ok);
        assert_eq!(judge_version("server", &format!("kvkeepd {OWN_VERSION}")).level, Level::Ok);
        assert_eq!(judge_version("server", "kvkeepd/99.0.0").level, Level::Warn);
        assert_eq!(judge_version("server", "").level, Level::Warn);
    }
}
