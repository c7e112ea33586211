//! The state machine of sessions against a model, and what it stores against itself.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::ids::{DigestKey, KeyDomain};

const TOKENS_PER_KEY: u64 = 16;

fn name(n: u8) -> SessionName {
    SessionName { namespace: NamespaceId(7), id: SessionId::new(&format!("s{n}")).unwrap() }
}

fn digest(n: u64) -> Digest {
    let handle = Handle { namespace: NamespaceId(7), revision: Revision(1) };
    DigestKey::from_bytes([3; 16]).digest(KeyDomain(0), handle, &n.to_le_bytes())
}

/// The state machine, and what it has stored, as a disk would.
#[derive(Default)]
struct Machine {
    sessions: Sessions,
    disk: BTreeMap<Vec<u8>, Vec<u8>>,
    now_ms: u64,
}

impl Machine {
    fn apply(&mut self, command: Command) -> Result<Outcome> {
        // Through its encoding, as from the log.
        let command = Command::decode(&command.encode()).unwrap();
        let mut writes = Vec::new();
        let outcome = self.sessions.apply(command, self.now_ms, &mut writes);
        if outcome.is_err() {
            assert!(writes.is_empty(), "a refused command stores nothing");
        }
        for write in writes {
            match write {
                Write::Put(key, value) => drop(self.disk.insert(key, value)),
                Write::Delete(key) => assert!(self.disk.remove(&key).is_some(), "what is deleted was there"),
            }
        }
        outcome
    }

    fn reloaded(&self) -> Sessions {
        let mut back = Sessions::default();
        self.disk.iter().for_each(|(key, value)| back.load(key, value).unwrap());
        back.loaded().unwrap();
        back
    }

    fn open(&mut self, n: u8) -> Result<Outcome> {
        self.apply(Command::Open {
            name: name(n),
            tenant: TenantId(0),
            revision: Revision(1),
            uid: u64::from(n) + 1,
            declared: Declared::default(),
            from: None,
        })
    }

    fn append(&mut self, n: u8, from: u64, count: u64, text: Option<Text>) -> Result<Outcome> {
        let digests = (from..from + count).map(|i| digest(u64::from(n) << 32 | i)).collect();
        let uid = self.uid(n);
        self.apply(Command::Append { name: name(n), uid, revision: Revision(1), from_position: from, digests, text })
    }

    /// Of a session that is not there: 0.
    fn uid(&self, n: u8) -> u64 {
        self.sessions.get(&name(n)).map_or(0, |s| s.uid)
    }

    fn get(&self, n: u8) -> &Session {
        self.sessions.get(&name(n)).unwrap()
    }
}

fn text(first: u64, count: u32) -> Text {
    Text { digest: digest(first << 20 | u64::from(count)), first, in_block: count, count }
}

#[test]
fn an_append_is_a_compare_and_set_that_may_be_repeated() {
    let mut m = Machine::default();
    assert_eq!(m.append(0, 0, 1, None).unwrap_err().kind(), ErrorKind::UnknownSession);
    m.open(0).unwrap();
    let first = m.append(0, 0, 40, Some(text(0, 640))).unwrap();
    assert_eq!(first, Outcome::Appended { positions: 40, tokens: 640, repeated: false });
    let again = m.append(0, 0, 40, Some(text(0, 640))).unwrap();
    assert_eq!(again, Outcome::Appended { positions: 40, tokens: 640, repeated: true });
    // As long as it is believed to be, but not the same.
    let other = Command::Append {
        name: name(0),
        uid: 1,
        revision: Revision(1),
        from_position: 39,
        digests: vec![digest(99)],
        text: None,
    };
    assert_eq!(m.apply(other).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(m.append(0, 41, 1, None).unwrap_err().kind(), ErrorKind::Conflict, "a gap");
    assert_eq!(m.append(0, 40, 1, Some(text(639, 16))).unwrap_err().kind(), ErrorKind::Conflict, "tokens twice");
    assert_eq!(m.append(0, 0, 40, Some(text(0, 641))).unwrap_err().kind(), ErrorKind::Conflict, "other tokens");
    assert_eq!(m.get(0).appends, 1);
}

#[test]
fn opening_again_finds_it_and_another_class_is_a_conflict() {
    let mut m = Machine::default();
    assert_eq!(m.open(0).unwrap(), Outcome::Opened { created: true });
    m.append(0, 0, 3, None).unwrap();
    let before = m.get(0).clone();
    m.now_ms += 5;
    assert_eq!(m.open(0).unwrap(), Outcome::Opened { created: false });
    assert_eq!(*m.get(0), before, "nothing was said, nothing has changed");
    let wish = |class| Command::Open {
        name: name(0),
        tenant: TenantId(0),
        revision: Revision(1),
        uid: 9,
        declared: Declared { class: Some(class), ..Declared::default() },
        from: None,
    };
    assert_eq!(m.apply(wish(Class::Durable)).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(m.apply(wish(Class::Cache)).is_ok());
}

#[test]
fn a_closed_session_takes_nothing_until_it_is_opened() {
    let mut m = Machine::default();
    m.open(0).unwrap();
    m.append(0, 0, 2, None).unwrap();
    m.apply(Command::Set { name: name(0), change: Change::Open(false) }).unwrap();
    assert_eq!(m.append(0, 2, 1, None).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(matches!(m.append(0, 0, 2, None), Ok(Outcome::Appended { repeated: true, .. })));
    m.open(0).unwrap();
    assert!(m.append(0, 2, 1, None).is_ok());
}

#[test]
fn a_fork_is_its_own_from_there_on() {
    let mut m = Machine::default();
    m.open(0).unwrap();
    m.append(0, 0, 70, Some(text(0, 70 * 16))).unwrap();
    let cut = Cut { positions: Some(33), tokens: 33 * TOKENS_PER_KEY };
    let fork = Command::Open {
        name: name(1),
        tenant: TenantId(0),
        revision: Revision(1),
        uid: 77,
        declared: Declared::default(),
        from: Some((name(0).id, cut)),
    };
    m.apply(fork.clone()).unwrap();
    assert_eq!(m.apply(fork).unwrap(), Outcome::Opened { created: false });
    assert_eq!((m.get(1).positions(), m.get(1).tokens), (33, 33 * 16));
    m.append(1, 33, 5, None).unwrap();
    assert_eq!(m.get(0).positions(), 70);
    assert!(m.get(0).manifest.iter().take(33).eq(m.get(1).manifest.iter().take(33)));
    m.apply(Command::Delete { name: name(0) }).unwrap();
    assert_eq!(m.reloaded().get(&name(1)), m.sessions.get(&name(1)), "it does not hang on its parent");
}

/// What a fork names was raised to its parent's class and no further.
#[test]
fn a_fork_is_of_no_stronger_class_than_its_parent() {
    let mut m = Machine::default();
    m.open(0).unwrap();
    m.append(0, 0, 3, None).unwrap();
    let fork = |class| Command::Open {
        name: name(1),
        tenant: TenantId(0),
        revision: Revision(1),
        uid: 77,
        declared: Declared { class: Some(class), ..Declared::default() },
        from: Some((name(0).id, Cut::NONE)),
    };
    assert_eq!(m.apply(fork(Class::Durable)).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(m.apply(fork(Class::Cache)).unwrap(), Outcome::Opened { created: true });
}

/// What was looked at for one session is not appended to another of its name: its class may be another.
#[test]
fn an_append_is_for_the_session_that_its_proposer_saw() {
    let mut m = Machine::default();
    m.open(0).unwrap();
    let append = |uid| Command::Append {
        name: name(0),
        uid,
        revision: Revision(1),
        from_position: 0,
        digests: vec![digest(1)],
        text: None,
    };
    assert_eq!(m.apply(append(2)).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(m.apply(append(1)).is_ok());
    assert_eq!(m.apply(append(2)).unwrap_err().kind(), ErrorKind::Conflict, "no repetition either");
}

#[test]
fn new_weights_take_the_tokens_over_and_not_the_blocks() {
    let mut m = Machine::default();
    m.open(0).unwrap();
    m.append(0, 0, 10, Some(text(0, 160))).unwrap();
    let append = Command::Append {
        name: name(0),
        uid: 1,
        revision: Revision(2),
        from_position: 10,
        digests: vec![digest(5)],
        text: None,
    };
    assert_eq!(m.apply(append).unwrap_err().kind(), ErrorKind::StaleRevision);
    let cut = |positions, tokens| Command::Truncate {
        name: name(0),
        revision: Revision(2),
        cut: Cut { positions: Some(positions), tokens },
    };
    assert_eq!(m.apply(cut(3, u64::MAX)).unwrap_err().kind(), ErrorKind::StaleRevision);
    m.apply(cut(0, u64::MAX)).unwrap();
    assert_eq!((m.get(0).revision, m.get(0).positions(), m.get(0).tokens), (Revision(2), 0, 160));
}

#[test]
fn pins_of_a_tenant_are_bounded() {
    let mut m = Machine::default();
    let pin = |n, tier| Command::Set { name: name(n), change: Change::Pinned { tier, positions_max: 100 } };
    for n in 0..2 {
        m.open(n).unwrap();
        m.append(n, 0, 60, None).unwrap();
    }
    m.apply(pin(0, Some(Tier::Dram))).unwrap();
    assert_eq!(m.apply(pin(1, Some(Tier::Dram))).unwrap_err().kind(), ErrorKind::TooLarge);
    m.apply(pin(0, Some(Tier::Nvme))).unwrap();
    m.apply(pin(0, None)).unwrap();
    m.apply(pin(1, Some(Tier::Dram))).unwrap();
    assert_eq!(m.sessions.pinned_positions(TenantId(0)), 60);
}

#[test]
fn a_time_to_live_counts_from_the_last_change() {
    let mut m = Machine::default();
    let declared = Declared { ttl_ms: 1000, ..Declared::default() };
    let open =
        Command::Open { name: name(0), tenant: TenantId(0), revision: Revision(1), uid: 5, declared, from: None };
    m.apply(open).unwrap();
    m.now_ms = 900;
    m.append(0, 0, 1, None).unwrap();
    m.now_ms = 1899;
    assert!(!m.sessions.any_due(m.now_ms));
    assert_eq!(m.apply(Command::Expire { most: 10 }).unwrap(), Outcome::Expired(Vec::new()));
    m.now_ms = 1900;
    assert!(m.sessions.any_due(m.now_ms));
    assert_eq!(m.apply(Command::Expire { most: 10 }).unwrap(), Outcome::Expired(vec![name(0)]));
    assert!(m.disk.is_empty() && m.sessions.is_empty());
}

/// A state that has lost a value, or has one too many, is not taken for another session.
#[test]
fn a_state_with_a_hole_is_refused() {
    let mut m = Machine::default();
    m.open(0).unwrap();
    m.append(0, 0, 70, Some(text(0, 100))).unwrap();
    m.append(0, 70, 1, Some(text(100, 9))).unwrap();
    for lost in m.disk.keys() {
        let mut back = Sessions::default();
        let rest = m.disk.iter().filter(|(key, _)| *key != lost);
        let loaded = rest.into_iter().try_for_each(|(k, v)| back.load(k, v)).and_then(|()| back.loaded());
        assert_eq!(loaded.unwrap_err().kind(), ErrorKind::Corrupt, "{lost:?}");
    }
}

#[test]
fn bad_names_are_refused() {
    for bad in ["", "a\nb", "\u{7f}", &"x".repeat(257)] {
        assert!(SessionId::new(bad).is_err(), "{bad:?}");
    }
    assert!(SessionId::new(&"x".repeat(256)).is_ok());
}

#[derive(Clone, Debug)]
enum Op {
    Open(u8),
    Append(u8, u64, bool),
    Repeat(u8),
    Fork(u8, u8, u64),
    Truncate(u8, u64),
    Delete(u8),
    Pin(u8, bool),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let n = 0..4u8;
    let op = prop_oneof![
        n.clone().prop_map(Op::Open),
        (n.clone(), 0..70u64, any::<bool>()).prop_map(|(n, c, t)| Op::Append(n, c, t)),
        n.clone().prop_map(Op::Repeat),
        (n.clone(), n.clone(), 0..100u64).prop_map(|(a, b, at)| Op::Fork(a, b, at)),
        (n.clone(), 0..100u64).prop_map(|(n, at)| Op::Truncate(n, at)),
        n.clone().prop_map(Op::Delete),
        (n, any::<bool>()).prop_map(|(n, on)| Op::Pin(n, on)),
    ];
    proptest::collection::vec(op, 1..60)
}

/// What the model knows of a session: its positions, and how many token ids.
type Known = (Vec<Digest>, u64);

proptest! {
    /// The state is that of a plain list for each session, and what was stored gives the same state back.
    #[test]
    fn sessions_are_lists_and_survive_a_restart(ops in ops()) {
        let mut m = Machine::default();
        let mut model: BTreeMap<u8, Known> = BTreeMap::new();
        for (i, op) in ops.into_iter().enumerate() {
            m.now_ms += 1;
            let uid = 1000 + i as u64;
            match op {
                Op::Open(n) => {
                    m.apply(Command::Open {
                        name: name(n), tenant: TenantId(0), revision: Revision(1), uid, declared: Declared::default(),
                        from: None,
                    }).unwrap();
                    model.entry(n).or_default();
                }
                Op::Append(n, count, with_text) => {
                    let known = model.get_mut(&n);
                    let (from, tokens) = known.as_ref().map_or((0, 0), |k| (k.0.len() as u64, k.1));
                    let digests: Vec<_> = (0..count).map(|d| digest((i as u64) << 32 | d)).collect();
                    let t = (with_text && count > 0).then(|| text(tokens, (count * TOKENS_PER_KEY) as u32));
                    let append = Command::Append {
                        name: name(n), uid: m.uid(n), revision: Revision(1), from_position: from, digests: digests.clone(), text: t,
                    };
                    match (m.apply(append), known) {
                        (Ok(Outcome::Appended { positions, tokens: all, repeated }), Some(k)) => {
                            k.0.extend(digests);
                            k.1 += t.map_or(0, |t| u64::from(t.count));
                            prop_assert_eq!((positions, all, repeated), (k.0.len() as u64, k.1, false));
                        }
                        (Err(e), None) => prop_assert_eq!(e.kind(), ErrorKind::UnknownSession),
                        other => prop_assert!(false, "{:?}", other.0),
                    }
                }
                Op::Repeat(n) => {
                    if let Some((digests, _)) = model.get(&n).filter(|k| !k.0.is_empty()) {
                        let append = Command::Append {
                            name: name(n), uid: m.uid(n), revision: Revision(1), from_position: 0, digests: digests.clone(), text: None,
                        };
                        let is_repeat = matches!(m.apply(append), Ok(Outcome::Appended { repeated: true, .. }));
                        prop_assert!(is_repeat);
                    }
                }
                Op::Fork(from, to, at) => {
                    let cut = Cut { positions: Some(at), tokens: at * TOKENS_PER_KEY };
                    let fork = Command::Open {
                        name: name(to), tenant: TenantId(0), revision: Revision(1), uid, declared: Declared::default(),
                        from: Some((name(from).id, cut)),
                    };
                    let forked = m.apply(fork);
                    let there = model.contains_key(&to);
                    match model.get(&from).cloned() {
                        Some((digests, tokens)) if !there && at <= digests.len() as u64 => {
                            prop_assert_eq!(forked.unwrap(), Outcome::Opened { created: true });
                            let first = digests[..at as usize].to_vec();
                            model.insert(to, (first, tokens.min(at * TOKENS_PER_KEY)));
                        }
                        _ if there => {}
                        _ => prop_assert!(forked.is_err()),
                    }
                }
                Op::Truncate(n, at) => {
                    let cut = Cut { positions: Some(at), tokens: at * TOKENS_PER_KEY };
                    let truncated = m.apply(Command::Truncate { name: name(n), revision: Revision(1), cut });
                    match model.get_mut(&n) {
                        Some((digests, tokens)) if at <= digests.len() as u64 => {
                            prop_assert!(truncated.is_ok());
                            digests.truncate(at as usize);
                            *tokens = (*tokens).min(at * TOKENS_PER_KEY);
                        }
                        _ => prop_assert!(truncated.is_err()),
                    }
                }
                Op::Delete(n) => {
                    let there = model.remove(&n).is_some();
                    prop_assert_eq!(m.apply(Command::Delete { name: name(n) }).unwrap(), Outcome::Deleted(there));
                }
                Op::Pin(n, on) => {
                    let tier = on.then_some(Tier::Dram);
                    let pinned = m.apply(Command::Set {
                        name: name(n), change: Change::Pinned { tier, positions_max: u64::MAX },
                    });
                    prop_assert_eq!(pinned.is_ok(), model.contains_key(&n));
                }
            }
            for (n, (digests, tokens)) in &model {
                let s = m.get(*n);
                prop_assert!(s.manifest.iter().eq(digests.iter().copied()));
                prop_assert_eq!(s.tokens, *tokens);
                prop_assert_eq!(s.texts.iter().map(|t| u64::from(t.count)).sum::<u64>(), *tokens);
            }
            prop_assert_eq!(m.sessions.len(), model.len());
        }
        let back = m.reloaded();
        prop_assert!(back.iter().eq(m.sessions.iter()));
        prop_assert_eq!(back.positions(), m.sessions.positions());
        prop_assert_eq!(back.pinned_positions(TenantId(0)), m.sessions.pinned_positions(TenantId(0)));
        prop_assert_eq!(back.ends, m.sessions.ends);
    }

    #[test]
    fn arbitrary_bytes_never_panic(key in proptest::collection::vec(any::<u8>(), 0..24), value in proptest::collection::vec(any::<u8>(), 0..80)) {
        let mut sessions = Sessions::default();
        let _ = sessions.load(&key, &value).and_then(|()| sessions.loaded());
        if let Ok(command) = Command::decode(&value) {
            let _ = sessions.apply(command, 1, &mut Vec::new());
        }
    }
}
