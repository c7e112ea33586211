//! The threads: many groups at once, a full queue, a disk that fails, a stop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_raft::error::Result;
use kvkeep_raft::settings::{COMMAND_BYTES_MAX, PROPOSALS_MAX};
use kvkeep_raft::store::Visit;
use kvkeep_raft::{
    Alone, Change, ErrorKind, GroupHandle, GroupId, Host, Journal, LogStore, MemFault, MemLog, NodeId, Proposed,
    RocksLog, Settings, Table,
};
use parking_lot::Mutex;

use crate::sequence::{Sequence, View, command, position};

fn group(n: u64) -> GroupId {
    GroupId::new(n).unwrap()
}

fn start(store: Arc<dyn LogStore>) -> Host {
    let journal = Arc::new(Journal::open(store, NodeId::ALONE).unwrap());
    Host::start(journal, Settings::new(NodeId::ALONE, Arc::new(|| 5)), Box::new(Alone)).unwrap()
}

fn with_group(host: &Host, id: GroupId) -> (GroupHandle, View) {
    if !host.journal().holds(id).unwrap() {
        host.journal().create(id, &[NodeId::ALONE], &Vec::new()).unwrap();
    }
    let view = View::default();
    (host.open(id, Box::new(Sequence(view.clone()))).unwrap(), view)
}

fn ask(handle: &GroupHandle, id: u64) -> Result<usize> {
    loop {
        match handle.propose(command(id))? {
            Proposed::Queued(pending) => return pending.wait().map(position),
            Proposed::Overloaded { retry_after } => std::thread::sleep(retry_after),
        }
    }
}

#[test]
fn groups_share_syncs_and_come_back_after_a_stop() {
    const GROUPS: u64 = 8;
    const EACH: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    let host = start(Arc::new(RocksLog::open(dir.path()).unwrap()));
    let handles: Vec<_> = (0..GROUPS).map(|n| with_group(&host, group(n)).0).collect();
    std::thread::scope(|scope| {
        for handle in &handles {
            scope.spawn(move || {
                let pending: Vec<_> =
                    (0..EACH).map(|id| handle.propose(command(id)).unwrap().queued().unwrap()).collect();
                for (at, pending) in pending.into_iter().enumerate() {
                    assert_eq!(position(pending.wait().unwrap()), at);
                }
            });
        }
    });
    let stats = host.stats();
    assert!(stats.syncs < GROUPS * EACH / 4, "no sync was shared: {stats:?}");
    host.stop().unwrap();
    let refused = handles[0].propose(command(1)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Stopped);
    drop(host);

    let host = start(Arc::new(RocksLog::open(dir.path()).unwrap()));
    assert_eq!(host.journal().groups().unwrap(), (0..GROUPS).map(group).collect::<Vec<_>>());
    for n in 0..GROUPS {
        let (handle, view) = with_group(&host, group(n));
        // After a stop there is nothing to replay: the state is whole before the first turn.
        assert_eq!(view.lock().len() as u64, EACH);
        assert_eq!(ask(&handle, EACH).unwrap() as u64, EACH);
    }
}

/// A store whose sync waits until it is let go.
struct Gate {
    store: MemLog,
    gate: Mutex<()>,
}

impl LogStore for Gate {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.store.get(table, key)
    }
    fn write(&self, changes: &[Change]) -> Result<()> {
        self.store.write(changes)
    }
    fn sync(&self) -> Result<()> {
        let _open = self.gate.lock();
        self.store.sync()
    }
    fn scan(&self, table: Table, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.store.scan(table, from, visit)
    }
}

#[test]
fn a_full_queue_is_a_value_and_nothing_is_answered_before_its_sync() {
    let gate = Arc::new(Gate { store: MemLog::new(), gate: Mutex::new(()) });
    let host = start(gate.clone());
    let (handle, view) = with_group(&host, GroupId::ZERO);
    let (other, _) = with_group(&host, group(1));
    ask(&handle, 0).unwrap();
    let closed = gate.gate.lock();
    let mut pending: Vec<_> =
        (1..=PROPOSALS_MAX as u64).map(|id| handle.propose(command(id)).unwrap().queued().unwrap()).collect();
    let full = handle.propose(command(9)).unwrap();
    assert!(matches!(full, Proposed::Overloaded { retry_after } if retry_after > Duration::ZERO), "{full:?}");
    assert!(matches!(other.propose(command(0)).unwrap(), Proposed::Queued(_)), "another group's queue is its own");
    std::thread::sleep(Duration::from_millis(50));
    assert!(pending.iter_mut().all(|p| p.try_take().is_none()), "answered before the sync");
    assert_eq!(view.lock().len(), 1, "applied before the sync");
    drop(closed);
    for p in pending {
        p.wait().unwrap();
    }
    ask(&handle, 9).unwrap();
    let e = handle.propose(vec![0; COMMAND_BYTES_MAX + 1]).unwrap_err();
    assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::InvalidArgument, false));
}

#[test]
fn a_sync_that_fails_ends_every_group_and_nothing_is_acknowledged() {
    let store = Arc::new(MemLog::new());
    let host = start(store.clone());
    let (one, _) = with_group(&host, group(1));
    let (two, _) = with_group(&host, group(2));
    ask(&one, 0).unwrap();
    ask(&two, 0).unwrap();
    store.fail_next(MemFault::Sync);
    let e = ask(&one, 1).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unknown, "{e}");
    // The other group is on the same log.
    let refused = Instant::now() + Duration::from_secs(10);
    let e = loop {
        match ask(&two, 1) {
            Err(e) if e.kind() == ErrorKind::Poisoned => break e,
            Err(e) => assert!(matches!(e.kind(), ErrorKind::Unknown | ErrorKind::UnknownGroup), "{e}"),
            Ok(_) => panic!("acknowledged on a poisoned log"),
        }
        assert!(Instant::now() < refused);
    };
    assert!(!e.is_retryable());
    assert!(!one.leads());
    assert_eq!(host.stop().unwrap_err().kind(), ErrorKind::Poisoned);
    drop(host);

    // The next life has what was acknowledged.
    store.cut(0);
    let host = start(store);
    let (one, view) = with_group(&host, group(1));
    ask(&one, 2).unwrap();
    assert_eq!(view.lock().iter().map(|i| i.id).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn reads_come_after_what_was_acknowledged() {
    let host = start(Arc::new(MemLog::new()));
    let (handle, view) = with_group(&host, GroupId::ZERO);
    // Before the first commit of its term, too.
    handle.read_barrier().unwrap().queued().unwrap().wait().unwrap();
    for id in 0..50 {
        ask(&handle, id).unwrap();
        let applied = handle.read_barrier().unwrap().queued().unwrap().wait().unwrap();
        assert!(applied >= view.lock().last().unwrap().index);
        assert_eq!(view.lock().len() as u64, id + 1);
    }
}

#[test]
fn a_group_is_made_once_and_opened_once() {
    let store = Arc::new(MemLog::new());
    let host = start(store.clone());
    let (_handle, _) = with_group(&host, group(7));
    let machine = || Box::new(Sequence(View::default()));
    let kind = |r: Result<GroupHandle>| r.unwrap_err().kind();
    assert_eq!(kind(host.open(group(7), machine())), ErrorKind::Conflict);
    assert_eq!(kind(host.open(group(8), machine())), ErrorKind::UnknownGroup);
    let again = host.journal().create(group(7), &[NodeId::ALONE], &Vec::new());
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Conflict);
    let stranger = Journal::open(store, NodeId::new(2).unwrap());
    assert_eq!(stranger.err().unwrap().kind(), ErrorKind::Conflict, "a log of another node");
}
