//! The traps of embedding raft, each with a test that turns red when it is sprung. Numbers are those of `docs/decisions/0012-raft.md`.
//!
//! Elsewhere: traps 10 and 11 in [`crate::settings`], the loop under power cuts in `tests/suite`. Cannot be sprung here: 7 (word to
//! raft of what could not be delivered), for there is no transport yet: [`crate::Transport`] says who owes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, Entry, Message, MessageType, Snapshot,
};
use raft::{StateRole, Storage as _};

use super::*;
use crate::engine::Engine;
use crate::format::{hard_state_key, records};
use crate::handle::{GroupHandle, Pending};
use crate::ids::NodeId;
use crate::journal::Task;
use crate::machine::Refusal;
use crate::store::mem::{MemFault, MemLog};
use crate::store::{LogStore, Table};
use crate::transport::Transport;

type Seen = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// Keeps commands by index.
struct Keep(Seen);

impl StateMachine for Keep {
    fn clear(&mut self) {
        self.0.lock().clear();
    }
    fn load(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let index = key.try_into().map_err(|_| Refusal("key".into()))?;
        self.0.lock().push((u64::from_be_bytes(index), value.to_vec()));
        Ok(())
    }
    fn loaded(&mut self) -> Result<(), Refusal> {
        Ok(())
    }
    fn apply(&mut self, c: Committed<'_>, writes: &mut Writes<'_>) -> Result<Reply, Refusal> {
        if c.command == b"poison" {
            return Err(Refusal("poison".into()));
        }
        writes.put(&c.index.to_be_bytes(), c.command);
        self.0.lock().push((c.index, c.command.to_vec()));
        Ok(Box::new(c.command.to_vec()))
    }
}

#[derive(Clone, Default)]
struct Sent(Arc<Mutex<Vec<Message>>>);

impl Transport for Sent {
    fn send(&mut self, _: GroupId, messages: Vec<Message>) {
        self.0.lock().extend(messages);
    }
}

/// Node 1 of a group, over a store in memory.
struct Rig {
    store: Arc<MemLog>,
    journal: Arc<Journal>,
    engine: Engine,
    handle: GroupHandle,
    seen: Seen,
    sent: Sent,
}

const G: GroupId = GroupId::ZERO;

impl Rig {
    fn new(voters: &[u64]) -> Self {
        let store = Arc::new(MemLog::new());
        let journal = Journal::open(store.clone(), NodeId::ALONE).unwrap();
        let voters: Vec<_> = voters.iter().map(|n| NodeId::new(*n).unwrap()).collect();
        journal.create(G, &voters, &Vec::new()).unwrap();
        Self::open(store)
    }

    fn open(store: Arc<MemLog>) -> Self {
        Self::open_with(store, |s| s)
    }

    fn open_with(store: Arc<MemLog>, change: impl Fn(Settings) -> Settings) -> Self {
        let journal = Arc::new(Journal::open(store.clone(), NodeId::ALONE).unwrap());
        let settings = change(Settings::new(NodeId::ALONE, Arc::new(|| 0)));
        let (sent, seen) = (Sent::default(), Seen::default());
        let mut engine = Engine::new(Arc::clone(&journal), settings, Box::new(sent.clone()));
        let handle = engine.open(G, Box::new(Keep(seen.clone()))).unwrap();
        Self { store, journal, engine, handle, seen, sent }
    }

    fn again(self) -> Self {
        let store = Arc::clone(&self.store);
        drop(self);
        Self::open(store)
    }

    fn group(&mut self) -> &mut Group {
        self.engine.group(G)
    }

    fn turn(&mut self) -> Option<Task> {
        self.engine.take_in();
        self.engine.turn()
    }

    fn persist(&mut self, task: Option<Task>) {
        let done = self.journal.persist(task).unwrap();
        self.engine.persisted(done);
    }

    fn settle(&mut self) {
        while let Some(task) = self.turn() {
            self.persist(Some(task));
        }
    }

    fn propose(&self, command: &[u8]) -> Pending<Answer> {
        self.handle.propose(command.to_vec()).unwrap().queued().unwrap()
    }

    fn second_says(&mut self, message: Message) {
        self.engine.receive(G, Message { from: 2, to: 1, ..message });
    }

    fn append(&mut self, term: u64, before: (u64, u64), entries: Vec<Entry>, commit: u64) {
        let mut m = Message { term, index: before.0, log_term: before.1, commit, entries, ..Message::default() };
        m.set_msg_type(MessageType::MsgAppend);
        self.second_says(m);
    }

    fn last_term(&mut self) -> (u64, u64) {
        let log = self.group().node.store();
        let last = log.last_index().unwrap();
        (last, log.term(last).unwrap())
    }
}

fn entry_of(term: u64, index: u64, command: &[u8]) -> Entry {
    Entry { term, index, data: entry::stamped(0, command), ..Entry::default() }
}

/// Trap 1: leaving a joint configuration is a change of members without data, and a leader's first entry has none either.
#[test]
fn a_joint_configuration_is_left() {
    let mut rig = Rig::new(&[1]);
    rig.settle();
    let mut add = ConfChangeSingle { node_id: 2, ..ConfChangeSingle::default() };
    add.set_change_type(ConfChangeType::AddLearnerNode);
    let mut change = ConfChangeV2 { changes: vec![add], ..ConfChangeV2::default() };
    change.set_transition(ConfChangeTransition::Implicit);
    rig.group().node.propose_conf_change(Vec::new(), change).unwrap();
    rig.propose(b"x");
    rig.settle();
    let members = rig.group().node.store().applied().members.clone();
    assert!(members.voters_outgoing.is_empty() && !members.auto_leave, "still joint: {members:?}");
    assert_eq!((&members.voters[..], &members.learners[..]), (&[1][..], &[2][..]));
    // And it is what the next life begins with.
    let mut rig = rig.again();
    assert_eq!(rig.group().node.store().initial_state().unwrap().conf_state, members);
}

fn snapshot_of(commands: &[&[u8]]) -> (Snapshot, Vec<(u64, Vec<u8>)>) {
    let mut leader = Rig::new(&[1]);
    for command in commands {
        leader.propose(command);
        leader.settle();
    }
    let mut snapshot = leader.group().node.store().snapshot(0, 2).unwrap();
    // As if 2 had led a group of two.
    snapshot.mut_metadata().mut_conf_state().voters = vec![1, 2];
    let seen = leader.seen.lock().clone();
    (snapshot, seen)
}

/// Trap 2: a snapshot counts as applied only after it is persisted, and raft panics before. And a cut leaves the old
/// state or the new one.
#[test]
fn a_snapshot_is_applied_when_it_is_durable() {
    let (snapshot, theirs) = snapshot_of(&[b"a", b"b", b"c"]);
    let index = snapshot.get_metadata().index;
    for kept in [0, 1] {
        let mut rig = Rig::new(&[1, 2]);
        rig.append(2, (1, 1), vec![entry_of(2, 2, b"mine")], 2);
        rig.settle();
        rig.journal.sync().unwrap();
        assert_eq!(rig.seen.lock().len(), 1);

        let mut m = Message { term: 3, snapshot: Some(snapshot.clone()), ..Message::default() };
        m.set_msg_type(MessageType::MsgSnapshot);
        rig.second_says(m);
        let task = rig.turn().expect("a snapshot to write");
        assert!(task.must_sync());
        // Not persisted: raft must not be told that it is applied.
        assert!(rig.group().node.raft.raft_log.applied < index);
        assert!(rig.group().installing.is_some());

        // The power fails within.
        rig.store.write(task.changes()).unwrap();
        rig.store.cut(kept);
        let store = Arc::clone(&rig.store);
        let mut cut = Rig::open(store);
        let applied = cut.group().node.store().applied().index;
        assert_eq!(applied, if kept == 0 { 2 } else { index });
        let state = cut.seen.lock().clone();
        assert_eq!(state.len(), if kept == 0 { 1 } else { theirs.len() });
        drop(cut);

        // Or it does not.
        rig.persist(Some(task));
        rig.settle();
        assert_eq!(rig.group().node.raft.raft_log.applied, index);
        assert_eq!(*rig.seen.lock(), theirs);
        let last = rig.last_term();
        rig.append(3, last, vec![entry_of(3, index + 1, b"next")], index + 1);
        rig.settle();
        let rig = rig.again();
        assert_eq!(rig.seen.lock().len(), theirs.len() + 1, "goes on from the snapshot");
    }
}

/// Trap 3: wherever a batch moves what is applied, the same batch has a commit that is not behind it.
#[test]
fn commit_is_never_behind_what_is_applied() {
    let mut rig = Rig::new(&[1]);
    let mut moved = 0;
    for n in 0..20u8 {
        rig.propose(&[n]);
        while let Some(task) = rig.turn() {
            let (mut applied, mut commit) = (None, None);
            for change in task.changes() {
                match change {
                    Change::Put(Table::State, key, value) if *key == crate::format::applied_key(G) => {
                        applied = Some(records::Applied::decode(key, value).unwrap().index);
                    }
                    Change::Put(Table::Meta, key, value) if *key == hard_state_key(G) => {
                        commit = Some(records::decode_hard_state(key, value).unwrap().commit);
                    }
                    _ => {}
                }
            }
            if let Some(applied) = applied {
                assert!(commit >= Some(applied), "applied {applied}, commit {commit:?}");
                moved += 1;
            }
            rig.persist(Some(task));
        }
    }
    assert!(moved >= 20);
}

/// Trap 4: a report of one ready is a report of all before it, so each turn goes through the journal, in order, even one that
/// needs no sync.
#[test]
fn every_ready_is_reported_and_in_order() {
    let mut rig = Rig::new(&[1]);
    let (mut last, mut without_sync) = (0, 0);
    for n in 0..10u8 {
        rig.propose(&[n]);
        while let Some(task) = rig.turn() {
            assert_eq!(task.done.len(), 1);
            assert!(task.done[0].number > last, "out of order");
            last = task.done[0].number;
            without_sync += u32::from(!task.must_sync());
            rig.persist(Some(task));
        }
    }
    assert!(without_sync > 0, "no turn without a sync came by");
    assert!(!rig.group().node.has_ready());
}

/// And a follower's promise leaves only when what it promises is durable.
#[test]
fn a_follower_answers_after_the_sync() {
    let mut rig = Rig::new(&[1, 2]);
    rig.append(2, (1, 1), vec![entry_of(2, 2, b"x")], 1);
    let task = rig.turn();
    let acks =
        |rig: &Rig| rig.sent.0.lock().iter().filter(|m| m.get_msg_type() == MessageType::MsgAppendResponse).count();
    assert_eq!(acks(&rig), 0, "acknowledged before it was persisted");
    rig.persist(task);
    assert_eq!(acks(&rig), 1);
}

fn elect(rig: &mut Rig) -> u64 {
    rig.group().node.campaign().unwrap();
    for kind in [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse] {
        rig.settle();
        let term = rig.group().node.raft.term + u64::from(kind == MessageType::MsgRequestPreVoteResponse);
        let mut m = Message { term, ..Message::default() };
        m.set_msg_type(kind);
        rig.second_says(m);
    }
    rig.settle();
    assert_eq!(rig.group().node.raft.state, StateRole::Leader);
    rig.group().node.raft.term
}

/// Trap 5: that a proposal was taken says nothing of its being committed; what counts is the term at its place.
#[test]
fn a_place_taken_by_another_leader_is_no_answer() {
    let mut rig = Rig::new(&[1, 2, 3]);
    let term = elect(&mut rig);
    let (place, _) = rig.last_term();
    let (mut first, mut second) = (rig.propose(b"mine"), rig.propose(b"mine, too"));
    rig.settle();
    assert!(first.try_take().is_none(), "one of three has it");
    // 2 leads a later term; at the first place stands something else, and at the second nothing.
    rig.append(term + 1, (place, term), vec![entry_of(term + 1, place + 1, b"theirs")], place + 1);
    rig.settle();
    let e = first.try_take().unwrap().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Superseded);
    assert!(e.is_retryable());
    assert!(second.try_take().is_none(), "its place is not decided");
    assert_eq!(rig.seen.lock().last().unwrap().1, b"theirs");
    // This node leads again: the place of the second goes to the first entry of the new term.
    let term = elect(&mut rig);
    let mut third = rig.propose(b"third");
    rig.settle();
    let (last, _) = rig.last_term();
    let mut m = Message { term, index: last, ..Message::default() };
    m.set_msg_type(MessageType::MsgAppendResponse);
    rig.second_says(m);
    rig.settle();
    assert_eq!(second.try_take().unwrap().unwrap_err().kind(), ErrorKind::Superseded);
    assert_eq!(third.try_take().unwrap().unwrap().take::<Vec<u8>>().unwrap(), b"third");
    // What was overwritten is gone from the disk, too.
    let rig = rig.again();
    assert!(rig.seen.lock().iter().all(|(_, c)| c != b"mine" && c != b"mine, too"));
}

#[test]
fn a_follower_takes_no_proposals() {
    let mut rig = Rig::new(&[1, 2]);
    let mut pending = rig.propose(b"x");
    rig.settle();
    let e = pending.try_take().unwrap().unwrap_err();
    assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::NotLeader, true));
    assert!(rig.sent.0.lock().iter().all(|m| m.get_msg_type() != MessageType::MsgPropose), "forwarded");
}

/// Trap 6: raft drops a read without a word while its leader has committed nothing in its term.
#[test]
fn a_read_on_a_fresh_leader_is_asked_again() {
    let mut rig = Rig::new(&[1]);
    let mut read = rig.handle.read_barrier().unwrap().queued().unwrap();
    rig.settle();
    assert!(read.try_take().expect("dropped").unwrap() > 1);
    // And while nobody leads, until somebody does.
    let mut rig = Rig::new(&[1, 2]);
    let mut read = rig.handle.read_barrier().unwrap().queued().unwrap();
    rig.settle();
    rig.append(2, (1, 1), vec![entry_of(2, 2, b"x")], 2);
    rig.settle();
    rig.engine.tick();
    rig.settle();
    let asked = rig.sent.0.lock().iter().rfind(|m| m.get_msg_type() == MessageType::MsgReadIndex).cloned();
    let mut m =
        Message { term: 2, index: 2, entries: asked.expect("the leader is asked").entries, ..Message::default() };
    m.set_msg_type(MessageType::MsgReadIndexResp);
    rig.second_says(m);
    rig.settle();
    assert_eq!(read.try_take().unwrap().unwrap(), 2);
}

/// Trap 8: raft is inoperable once its storage failed. That group ends, loudly; the next one does not notice.
#[test]
fn a_storage_error_ends_the_group_and_no_other() {
    let mut rig = Rig::new(&[1]);
    let other = GroupId::new(1).unwrap();
    rig.journal.create(other, &[NodeId::ALONE], &Vec::new()).unwrap();
    let theirs = rig.engine.open(other, Box::new(Keep(Seen::default()))).unwrap();
    rig.settle();
    for n in 0..4 {
        rig.propose(&[n]);
        rig.settle();
    }
    let mut waits = rig.propose(b"waits");
    rig.engine.take_in();
    // An entry that is in the store only.
    rig.store.fail_next(MemFault::Read);
    rig.engine.with_group(G, |g| {
        let log = &g.node.raft.raft_log;
        log.slice(3, 4, raft::NO_LIMIT, raft::GetEntriesContext::empty(false))
            .map(drop)
            .map_err(|e| broken("read", G, &e))
    });
    assert_eq!(waits.try_take().unwrap().unwrap_err().kind(), ErrorKind::Unknown);
    let e = rig.handle.propose(b"x".to_vec()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io, "the reason is the storage's, not raft's: {e}");
    let mut answer = theirs.propose(b"y".to_vec()).unwrap().queued().unwrap();
    rig.settle();
    assert_eq!(answer.try_take().unwrap().unwrap().take::<Vec<u8>>().unwrap(), b"y");
}

#[test]
fn a_command_that_the_machine_cannot_take_stops_the_group_for_good() {
    let mut rig = Rig::new(&[1]);
    rig.settle();
    let (mut good, mut bad) = (rig.propose(b"good"), rig.propose(b"poison"));
    rig.settle();
    assert_eq!(good.try_take().unwrap().unwrap().take::<Vec<u8>>().unwrap(), b"good");
    assert_eq!(bad.try_take().unwrap().unwrap_err().kind(), ErrorKind::Unknown);
    assert_eq!(rig.handle.propose(b"x".to_vec()).unwrap_err().kind(), ErrorKind::Machine);
    // It is committed: a restart meets it again, and what stood before it is there.
    let mut rig = rig.again();
    rig.settle();
    assert_eq!(rig.seen.lock().iter().filter(|(_, c)| c == b"good").count(), 1);
    assert_eq!(rig.handle.propose(b"x".to_vec()).unwrap_err().kind(), ErrorKind::Machine);
}

/// Trap 9: a group begins with a state at index 1 and its members, so that whoever joins later must begin from a snapshot.
#[test]
fn a_group_begins_at_index_one() {
    let mut rig = Rig::new(&[1]);
    let log = rig.group().node.store();
    assert_eq!((log.first_index().unwrap(), log.term(1).unwrap()), (2, 1));
    let compacted = log.entries(1, 2, raft::NO_LIMIT, raft::GetEntriesContext::empty(false));
    assert_eq!(compacted, Err(raft::Error::Store(raft::StorageError::Compacted)));
    assert_eq!(log.initial_state().unwrap().conf_state.voters, [1]);
}

/// Trap 10: `applied` is what the state machine really has: nothing is applied twice, nothing is skipped. And trap 11: what is
/// replayed comes in bounded pieces.
#[test]
fn a_restart_replays_what_is_missing_and_no_more() {
    let mut rig = Rig::new(&[1]);
    rig.settle();
    // Three pieces of more than COMMITTED_BYTES_PER_READY_MAX / 2: persisted, and not known to be committed.
    let big = vec![7; 3 << 20];
    for _ in 0..3 {
        rig.propose(&big);
    }
    let task = rig.turn();
    rig.journal.persist(task).unwrap();
    let before = rig.seen.lock().len();
    let mut rig = rig.again();
    assert_eq!(rig.seen.lock().len(), before);
    let readies = Arc::new(AtomicU64::new(0));
    while let Some(task) = rig.turn() {
        readies.store(task.done[0].number, Ordering::Relaxed);
        rig.persist(Some(task));
    }
    assert_eq!(rig.seen.lock().len(), before + 3);
    assert!(readies.load(Ordering::Relaxed) >= 4, "all in one go");
    let rig = rig.again();
    assert_eq!(rig.seen.lock().len(), before + 3);
}

/// The log is cut where it is too long, by entries or by bytes, and what is cut is gone from the store.
#[test]
fn the_log_is_bounded() {
    let entries = |store: &MemLog| {
        let mut n = 0u64;
        store
            .scan(Table::Log, &[], &mut |_, _| {
                n += 1;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        n
    };
    let rig = Rig::new(&[1]);
    let store = Arc::clone(&rig.store);
    drop(rig);
    let mut rig = Rig::open_with(store, |s| Settings { log_entries_max: 10, log_bytes_max: 1 << 20, ..s });
    for n in 0..100u8 {
        rig.propose(&[n]);
        rig.settle();
        assert!(entries(&rig.store) <= 12);
    }
    assert!(entries(&rig.store) >= 5, "half of it stays, for members that lag");
    for _ in 0..4 {
        rig.propose(&vec![1; 600 << 10]);
        rig.settle();
    }
    assert!(entries(&rig.store) <= 3, "bytes count, too");
    // Memory as well: what the store has is read from there.
    assert!(rig.group().node.store().tail_len() <= 1);
    let rig = rig.again();
    assert_eq!(rig.seen.lock().len(), 104);
}

/// A flipped bit in any record of a group is found when the group is opened.
#[test]
fn damage_is_found_at_open() {
    let mut rig = Rig::new(&[1]);
    rig.propose(b"x");
    let task = rig.turn();
    rig.journal.persist(task).unwrap();
    let task = rig.turn();
    rig.journal.persist(task).unwrap();
    let store = Arc::clone(&rig.store);
    drop(rig);
    let mut all = Vec::new();
    for table in [Table::Meta, Table::Log, Table::State] {
        store
            .scan(table, &[], &mut |key, value| {
                all.push((table, key.to_vec(), value.to_vec()));
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
    }
    assert!(all.len() >= 5, "{all:?}");
    for (table, key, value) in all {
        let mut bad = value.clone();
        *bad.last_mut().unwrap() ^= 1;
        store.tamper(Change::Put(table, key.clone(), bad));
        let opened = Journal::open(store.clone(), NodeId::ALONE).and_then(|journal| {
            let settings = Settings::new(NodeId::ALONE, Arc::new(|| 0));
            let shared = Arc::new(Shared::default());
            Group::open(&journal, &settings, G, Box::new(Keep(Seen::default())), shared).map(drop)
        });
        assert_eq!(opened.unwrap_err().kind(), ErrorKind::Corrupt, "{table:?} {key:?}");
        store.tamper(Change::Put(table, key, value));
    }
}
