//! A process with a host in it, killed while it is at work. This test binary is that process, too.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kvkeep_raft::{Alone, GroupId, Host, Journal, NodeId, RocksLog, Settings};

use crate::sequence::{Sequence, View, command, position};

const DIR: &str = "KVKEEP_RAFT_KILL_DIR";
const GROUPS: u64 = 3;

fn open(dir: &Path) -> (Host, Vec<(kvkeep_raft::GroupHandle, View)>) {
    let store = Arc::new(RocksLog::open(dir).unwrap());
    let journal = Arc::new(Journal::open(store, NodeId::ALONE).unwrap());
    let settings = Settings { log_entries_max: 50, ..Settings::new(NodeId::ALONE, Arc::new(|| 0)) };
    let host = Host::start(Arc::clone(&journal), settings, Box::new(Alone)).unwrap();
    let groups = (0..GROUPS).map(|n| {
        let id = GroupId::new(n).unwrap();
        if !journal.holds(id).unwrap() {
            journal.create(id, &[NodeId::ALONE], &Vec::new()).unwrap();
        }
        let view = View::default();
        (host.open(id, Box::new(Sequence(view.clone()))).unwrap(), view)
    });
    let groups = groups.collect();
    (host, groups)
}

/// Not a test by itself: what [`acknowledged_commands_survive_a_kill`] runs and kills. Prints what was acknowledged.
#[test]
fn child() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let (_host, groups) = open(Path::new(&dir));
    let mut out = std::io::stdout();
    // What was committed and not applied before the kill is applied behind the open.
    for (group, _) in &groups {
        group.read_barrier().unwrap().queued().unwrap().wait().unwrap();
    }
    let mut next: Vec<u64> = groups.iter().map(|(_, view)| view.lock().last().map_or(0, |i| i.id + 1)).collect();
    loop {
        let asked: Vec<_> = (0..60u64)
            .map(|n| {
                let group = (n % GROUPS) as usize;
                let id = next[group];
                next[group] += 1;
                (group, id, groups[group].0.propose(command(id)).unwrap().queued().unwrap())
            })
            .collect();
        for (group, id, pending) in asked {
            let at = position(pending.wait().unwrap());
            writeln!(out, "acknowledged {group} {id} {at}").unwrap();
        }
        out.flush().unwrap();
    }
}

#[test]
fn acknowledged_commands_survive_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<(usize, u64, usize)> = Vec::new();
    for round in 0..4u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill::child", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut heard, enough) = (0, 100 + 170 * round);
        for line in lines.map_while(std::io::Result::ok) {
            // The first line of the test harness may stand before it.
            let Some(at) = line.find("acknowledged ") else { continue };
            let mut words = line[at..].split(' ').skip(1).map(|w| w.parse::<u64>());
            if let (Some(Ok(group)), Some(Ok(id)), Some(Ok(at))) = (words.next(), words.next(), words.next()) {
                acknowledged.push((group as usize, id, at as usize));
            }
            heard += 1;
            if heard == enough {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(heard >= enough, "the child ended by itself");

        let (host, groups) = open(dir.path());
        for (handle, _) in &groups {
            handle.read_barrier().unwrap().queued().unwrap().wait().unwrap();
        }
        for (group, id, at) in &acknowledged {
            let items = groups[*group].1.lock();
            assert_eq!(items.get(*at).map(|i| i.id), Some(*id), "round {round}, group {group}");
        }
        for (_, view) in &groups {
            assert!(view.lock().windows(2).all(|w| w[0].id < w[1].id));
        }
        drop(groups);
        drop(host);
        std::thread::sleep(Duration::from_millis(10));
    }
}
