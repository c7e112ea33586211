//! The catalogue over a log in memory that forgets what was not synced, and over the real one.

use std::fs;

use kvkeep_core::catalogue::{DEFAULT_TENANT, Registered};
use kvkeep_core::{Format, Group as FormatGroup, Handle, NamespaceId, Revision, Rule, SizeRule, TenantId, Topology};
use kvkeep_raft::format::state_key;
use kvkeep_raft::{Change, MemFault, MemLog, StateMachine as _, Table};
use proptest::prelude::*;

use super::*;

const DEFAULT: TenantId = TenantId(0);

fn format() -> Format {
    Format {
        model: "m".into(),
        dtype: "bf16".into(),
        layout: "l".into(),
        hash_algorithm: "sha256".into(),
        hash_seed: String::new(),
        tokens_per_key: 16,
        topology: Topology { canonical: false, tp: 1, pp: 1, cp: 1 },
        groups: vec![FormatGroup {
            rule: Rule::All,
            tokens_per_block: 16,
            shards: 1,
            replicated: false,
            size: SizeRule::Exact(4096),
        }],
        prefill_us_per_token: 0,
        prefill_doubles_at_tokens: 0,
    }
}

fn registration(tenant: TenantId, name: &str, digest: &str) -> Command {
    Command::RegisterNamespace {
        tenant,
        name: name.into(),
        format: format(),
        revision_digest: digest.into(),
        require_full: false,
    }
}

fn registered(outcome: Outcome) -> Registered {
    match outcome {
        Outcome::Registered(r) => r,
        other => panic!("{other:?}"),
    }
}

/// A node's catalogue, and what is below it.
struct Life {
    consensus: Consensus,
    registry: Registry,
    views: Arc<Views>,
}

impl Life {
    fn over(log: &Arc<MemLog>, data_dir: &Path) -> Result<Self> {
        let log = Arc::clone(log);
        Self::on(Consensus::over(log, Consensus::folder(data_dir))?, data_dir)
    }

    fn real(data_dir: &Path) -> Result<Self> {
        refuse_orphans(data_dir)?;
        Self::on(Consensus::open(data_dir)?, data_dir)
    }

    fn on(consensus: Consensus, data_dir: &Path) -> Result<Self> {
        let views = Arc::new(Views::default());
        let registry = Registry::open(&consensus, data_dir, Arc::clone(&views))?;
        Ok(Self { consensus, registry, views })
    }

    fn state(&self) -> FirstState {
        first_state(&self.registry.shared.catalogue.read())
    }

    fn copy(&self) -> Catalogue {
        self.registry.shared.catalogue.read().clone()
    }

    /// Past the look at the state: every command stands in the log.
    fn log(&self, command: &Command) -> Result<Outcome> {
        self.registry.group.propose_blocking::<Result<Outcome>>(encode_command(command)).unwrap()
    }

    fn views_agree(&self) {
        let namespaces: Vec<_> = self.copy().namespaces().cloned().collect();
        assert_eq!(self.views.all().iter().map(|n| (**n).clone()).collect::<Vec<_>>(), namespaces);
    }
}

/// What stands on disks does not change with a library.
#[test]
fn keys_values_and_commands_are_these_bytes() {
    let mut c = Catalogue::new(DigestKey::from_bytes([7; 16]));
    let next = c.next_namespace().to_le_bytes();
    assert_eq!(
        first_state(&c),
        [(b"h".to_vec(), [&[1], &[7; 16][..], &next].concat()), (b"t\0\0\0\0".to_vec(), b"\x01default".to_vec())]
    );
    let r = registered(c.apply(registration(DEFAULT, "n", "w")).unwrap());
    let (key, value) = first_state(&c).remove(1);
    assert_eq!(key, [b"n", &r.handle.namespace.0.to_be_bytes()[..]].concat());
    let json = r#"{"id":ID,"tenant":0,"name":"n","format":FORMAT,"fingerprint":FINGERPRINT,"revision":1,"revision_digest":"w","require_full":false}"#;
    let namespace = c.namespace(r.handle.namespace).unwrap();
    let format = r#"{"model":"m","dtype":"bf16","layout":"l","hash_algorithm":"sha256","hash_seed":"","tokens_per_key":16,"topology":{"canonical":false,"tp":1,"pp":1,"cp":1},"groups":[{"rule":"all","tokens_per_block":16,"shards":1,"replicated":false,"size":{"exact":4096}}],"prefill_us_per_token":0,"prefill_doubles_at_tokens":0}"#;
    let json = json
        .replace("ID", &r.handle.namespace.0.to_string())
        .replace("FORMAT", format)
        .replace("FINGERPRINT", &serde_json::to_string(&namespace.fingerprint).unwrap());
    assert_eq!(value[0], 1);
    assert_eq!(std::str::from_utf8(&value[1..]).unwrap(), json);
    let commands = [
        (Command::EnsureTenant { name: "a".into() }, r#"{"ensure_tenant":{"name":"a"}}"#.to_owned()),
        (
            Command::AdvanceRevision {
                tenant: TenantId(3),
                from: Handle { namespace: NamespaceId(9), revision: Revision(2) },
                revision_digest: "w".into(),
            },
            r#"{"advance_revision":{"tenant":3,"from":{"namespace":9,"revision":2},"revision_digest":"w"}}"#.to_owned(),
        ),
        (
            registration(DEFAULT, "n", "w"),
            r#"{"register_namespace":{"tenant":0,"name":"n","format":FORMAT,"revision_digest":"w","require_full":false}}"#
                .replace("FORMAT", format),
        ),
    ];
    for (command, json) in commands {
        assert_eq!(encode_command(&command), [&[1], json.as_bytes()].concat());
    }
}

#[test]
fn a_store_keeps_its_secret_and_everything_that_was_registered() {
    let dir = tempfile::tempdir().unwrap();
    let life = Life::real(dir.path()).unwrap();
    life.registry.apply_blocking(&Command::EnsureTenant { name: "b".into() }).unwrap();
    let one = registered(life.registry.apply_blocking(&registration(TenantId(1), "n", "w1")).unwrap());
    let advance = Command::AdvanceRevision { tenant: TenantId(1), from: one.handle, revision_digest: "w2".into() };
    let two = life.registry.apply_blocking(&advance).unwrap();
    assert_eq!(two, Outcome::Advanced(Handle { revision: Revision(2), ..one.handle }));
    life.views_agree();
    let state = life.state();
    life.consensus.stop().unwrap();
    drop(life);
    let life = Life::real(dir.path()).unwrap();
    assert_eq!(life.state(), state);
    life.views_agree();
    assert!(!dir.path().join("catalogue").exists(), "the old file is not written any more");
    let other = tempfile::tempdir().unwrap();
    let other = Life::real(other.path()).unwrap();
    assert_ne!(other.registry.digest_key().to_bytes(), life.registry.digest_key().to_bytes());
}

/// Thousands of engines may say what already is: nothing is written for it, nor for what the rules refuse.
#[test]
fn what_changes_nothing_is_not_logged() {
    let dir = tempfile::tempdir().unwrap();
    let life = Life::over(&Arc::new(MemLog::new()), dir.path()).unwrap();
    let first = registered(life.registry.apply_blocking(&registration(DEFAULT, "n", "w1")).unwrap());
    assert!(first.created);
    let other_format = Command::RegisterNamespace {
        tenant: DEFAULT,
        name: "n".into(),
        format: Format { dtype: "fp8".into(), ..format() },
        revision_digest: "w1".into(),
        require_full: false,
    };
    // What was applied is written with the next turn: this one. Its answer comes before the turn is over and its number told.
    life.registry.apply_blocking(&Command::EnsureTenant { name: "b".into() }).unwrap();
    life.registry.group.barrier_blocking().unwrap();
    let before = life.registry.group.applied();
    for _ in 0..100 {
        let again = registered(life.registry.apply_blocking(&registration(DEFAULT, "n", "w1")).unwrap());
        assert_eq!(again, Registered { created: false, ..first });
        let late = registered(life.registry.apply_blocking(&registration(DEFAULT, "n", "w2")).unwrap());
        assert!(!late.revision_matches);
        let e = life.registry.apply_blocking(&other_format).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FormatMismatch);
        life.registry.apply_blocking(&Command::EnsureTenant { name: DEFAULT_TENANT.into() }).unwrap();
    }
    assert_eq!(life.registry.group.applied(), before);
}

/// Two at once register one name: one of them makes it, and each finds it in the views when it is answered.
#[test]
fn callers_at_the_same_time_get_one_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let life = Arc::new(Life::over(&Arc::new(MemLog::new()), dir.path()).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let created = runtime.block_on(async {
        let calls: Vec<_> = (0..64u32)
            .map(|n| {
                let life = Arc::clone(&life);
                tokio::spawn(async move {
                    let name = format!("n{}", n % 4);
                    let r = registered(life.registry.apply(registration(DEFAULT, &name, "w")).await.unwrap());
                    assert_eq!(life.views.get(DEFAULT, r.handle.namespace).unwrap().name, name);
                    r.created
                })
            })
            .collect();
        let mut created = 0;
        for call in calls {
            created += usize::from(call.await.unwrap());
        }
        created
    });
    assert_eq!((created, life.views.all().len()), (4, 4));
}

/// The JSON of the file that a store had before.
fn old_json(c: &Catalogue) -> Vec<u8> {
    let parts = c.parts();
    serde_json::to_vec(&serde_json::json!({
        "version": 1,
        "secret": parts.secret.to_bytes(),
        "tenants": parts.tenants,
        "next_namespace": parts.next_namespace,
        "namespaces": parts.namespaces,
    }))
    .unwrap()
}

fn old_catalogue() -> Catalogue {
    let mut c = Catalogue::new(DigestKey::from_bytes([3; 16]));
    c.apply(Command::EnsureTenant { name: "b".into() }).unwrap();
    c.apply(registration(DEFAULT, "n", "w1")).unwrap();
    let r = registered(c.apply(registration(TenantId(1), "n", "w1")).unwrap());
    c.apply(Command::AdvanceRevision { tenant: TenantId(1), from: r.handle, revision_digest: "w2".into() }).unwrap();
    c
}

/// The move from the old file, with a crash at each of its steps.
#[test]
fn an_old_file_becomes_the_first_state_whatever_happens_in_between() {
    let old = old_catalogue();
    let file = old_file::old_file(&old_json(&old));
    let dir = tempfile::tempdir().unwrap();
    let (path, aside) = (dir.path().join("catalogue"), dir.path().join("catalogue.before-raft"));
    fs::create_dir(dir.path().join("nvme")).unwrap();
    fs::write(&path, &file).unwrap();
    let log = Arc::new(MemLog::new());

    // Before the group was durable: the log has been opened, and nothing is in it.
    Consensus::over(Arc::clone(&log) as _, Consensus::folder(dir.path())).unwrap().stop().unwrap();
    log.fail_next(MemFault::Sync);
    let e = Life::over(&log, dir.path()).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Io, "{e}");
    log.cut(0);
    assert!(path.exists() && !aside.exists());

    let life = Life::over(&log, dir.path()).unwrap();
    assert_eq!(life.state(), first_state(&old));
    life.views_agree();
    assert!(!path.exists());
    assert_eq!(fs::read(&aside).unwrap(), file);

    // The group is durable and goes on; the file was not put aside, or somebody brought it back: the group is the truth.
    let new = registered(life.registry.apply_blocking(&registration(DEFAULT, "later", "w")).unwrap());
    let state = life.state();
    drop(life);
    log.cut(0);
    fs::rename(&aside, &path).unwrap();
    let life = Life::over(&log, dir.path()).unwrap();
    assert_eq!(life.state(), state);
    assert_eq!(life.views.any(new.handle.namespace).unwrap().name, "later");
    assert!(!path.exists() && aside.exists());
}

#[test]
fn an_old_file_that_is_damaged_is_refused_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalogue");
    let mut old = old_json(&old_catalogue());
    let at = old.windows(4).position(|w| w == b"bf16").unwrap();
    old[at] = b'x';
    for bad in [old_file::old_file(&old), old_file::old_file(b"{}"), b"KVC2".to_vec()] {
        fs::write(&path, &bad).unwrap();
        let e = Life::real(dir.path()).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(e.to_string().contains(&path.display().to_string()), "{e}");
        assert_eq!(fs::read(&path).unwrap(), bad);
    }
    fs::write(&path, old_file::old_file(&old_json(&old_catalogue()))).unwrap();
    assert_eq!(Life::real(dir.path()).unwrap().state(), first_state(&old_catalogue()));
}

/// Blocks that nothing names: nothing is made in the folder, so that a backup can be put there.
#[test]
fn blocks_without_a_catalogue_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("nvme")).unwrap();
    let refused = |e: Error| {
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(e.to_string().contains("restore the folder `raft`"), "{e}");
        assert!(e.to_string().contains(&dir.path().display().to_string()), "{e}");
    };
    refused(Life::real(dir.path()).err().unwrap());
    assert!(!Consensus::folder(dir.path()).exists());
    // A log without the group is no catalogue either.
    refused(Life::over(&Arc::new(MemLog::new()), dir.path()).err().unwrap());
}

#[test]
fn damage_of_the_state_is_refused_and_names_the_folder() {
    let good = registration(DEFAULT, "n", "w");
    let keys = [&b"h"[..], b"t\0\0\0\0"];
    let spoils: [fn(Vec<u8>) -> Change; 2] = [
        |key| Change::Delete(Table::State, key),
        |key| Change::Put(Table::State, key, b"not a value of any version".to_vec()),
    ];
    for key in keys {
        for spoil in spoils {
            let dir = tempfile::tempdir().unwrap();
            let log = Arc::new(MemLog::new());
            let life = Life::over(&log, dir.path()).unwrap();
            life.registry.apply_blocking(&good).unwrap();
            life.consensus.stop().unwrap();
            drop(life);
            log.tamper(spoil(state_key(GROUP, key)));
            let e = Life::over(&log, dir.path()).err().unwrap();
            assert_eq!(e.kind(), ErrorKind::Corrupt);
            assert!(e.to_string().contains(&Consensus::folder(dir.path()).display().to_string()), "{e}");
        }
    }
}

#[test]
fn values_that_are_not_understood_are_refused() {
    type Spoil = fn(&mut Vec<u8>, &mut Vec<u8>);
    let state = first_state(&old_catalogue());
    let load = |state: &FirstState| {
        let mut machine = Machine::new(Arc::new(Shared::new(Arc::default())));
        machine.clear();
        state.iter().try_for_each(|(key, value)| machine.load(key, value))?;
        machine.loaded()
    };
    load(&state).unwrap();
    for at in 0..state.len() {
        let mut bad = state.clone();
        bad.remove(at);
        // Namespaces stand for themselves; each tenant here has one.
        assert_eq!(load(&bad).is_ok(), state[at].0[0] == b'n', "{at}");
        let spoils: [Spoil; 5] = [
            |_, value| value[0] = 2,
            |_, value| value.clear(),
            |_, value| value[1] = 0xff,
            |key, _| key[0] = b'x',
            |key, _| key.push(0),
        ];
        for (n, spoil) in spoils.into_iter().enumerate() {
            let mut bad = state.clone();
            let (key, value) = &mut bad[at];
            spoil(key, value);
            // Any bytes are a secret.
            assert!(load(&bad).is_err() || (bad[at].0 == b"h" && n == 2), "{at} {n}");
        }
    }
}

/// A command of a later version: the group stands still, and what was known is still served.
#[test]
fn a_command_that_is_not_understood_ends_the_changes_and_no_read() {
    for bad in [&b"\x02{}"[..], b"\x01{}", b"", b"\x01{\"ensure_tenant\":{\"name\":\"a\",\"quota\":1}}"] {
        let dir = tempfile::tempdir().unwrap();
        let life = Life::over(&Arc::new(MemLog::new()), dir.path()).unwrap();
        let known = registration(DEFAULT, "n", "w");
        life.registry.apply_blocking(&known).unwrap();
        assert!(life.registry.failure().is_none());
        assert!(life.registry.group.propose_blocking::<Result<Outcome>>(bad.to_vec()).is_err());
        assert_eq!(
            life.registry.apply_blocking(&registration(DEFAULT, "m", "w")).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
        assert_eq!(life.registry.failure().unwrap().kind(), ErrorKind::Corrupt);
        assert!(!registered(life.registry.apply_blocking(&known).unwrap()).created);
        life.views_agree();
    }
}

/// The disk fails: what was not synced is in no answer and in no view; what was is still served, now and after a start.
#[test]
fn a_failed_sync_ends_the_changes_and_no_read() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(MemLog::new());
    let life = Life::over(&log, dir.path()).unwrap();
    let known = registration(DEFAULT, "n", "w");
    life.registry.apply_blocking(&known).unwrap();
    let state = life.state();
    log.fail_next(MemFault::Sync);
    let e = life.registry.apply_blocking(&registration(DEFAULT, "m", "w")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "it may be in the log or not: {e}");
    assert_eq!(life.registry.apply_blocking(&registration(DEFAULT, "m", "w")).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(life.registry.failure().unwrap().kind(), ErrorKind::Io);
    assert!(!registered(life.registry.apply_blocking(&known).unwrap()).created);
    assert_eq!(life.state(), state);
    life.views_agree();
    assert!(life.consensus.stop().is_err());
    drop(life);
    log.cut(0);
    let life = Life::over(&log, dir.path()).unwrap();
    assert_eq!(life.state(), state);
    life.registry.apply_blocking(&registration(DEFAULT, "m", "w")).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Tenant(u8),
    Register {
        tenant: u32,
        name: u8,
        format: u8,
        digest: u8,
    },
    Advance {
        tenant: u32,
        namespace: u32,
        revision: u32,
        digest: u8,
    },
    /// A clean stop and a start.
    Restart,
    /// A power cut that keeps so many of the batches that were not synced.
    Cut(usize),
}

fn steps() -> impl Strategy<Value = Vec<(Step, bool)>> {
    let step = prop_oneof![
        3 => (0..5u8).prop_map(Step::Tenant),
        8 => (0..4u32, 0..4u8, 0..3u8, 0..4u8)
            .prop_map(|(tenant, name, format, digest)| Step::Register { tenant, name, format, digest }),
        8 => (0..4u32, 0..4u32, 0..4u32, 0..4u8)
            .prop_map(|(tenant, namespace, revision, digest)| Step::Advance { tenant, namespace, revision, digest }),
        1 => Just(Step::Restart),
        2 => (0..4usize).prop_map(Step::Cut),
    ];
    prop::collection::vec((step, any::<bool>()), 1..60)
}

/// Digest and name 0 are empty: refused. Format 2 is not valid.
fn command(step: &Step, first_namespace: u32) -> Option<Command> {
    let text = |of: char, n: u8| if n == 0 { String::new() } else { format!("{of}{n}") };
    Some(match *step {
        Step::Tenant(n) => Command::EnsureTenant { name: text('t', n) },
        Step::Register { tenant, name, format: kind, digest } => {
            let mut format = format();
            match kind {
                1 => format.dtype = "fp8".into(),
                2 => format.groups.clear(),
                _ => {}
            }
            Command::RegisterNamespace {
                tenant: TenantId(tenant),
                name: text('n', name),
                format,
                revision_digest: text('w', digest),
                require_full: digest == 3,
            }
        }
        Step::Advance { tenant, namespace, revision, digest } => Command::AdvanceRevision {
            tenant: TenantId(tenant),
            from: Handle { namespace: NamespaceId(first_namespace + namespace), revision: Revision(revision) },
            revision_digest: text('w', digest),
        },
        Step::Restart | Step::Cut(_) => return None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Every answer is the model's, and after every restart, with commands that must be replayed, the state is.
    #[test]
    fn it_is_what_a_catalogue_without_a_log_would_be(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::new(MemLog::new());
        let mut life = Life::over(&log, dir.path()).unwrap();
        let mut model = life.copy();
        let first_namespace = model.next_namespace();
        for (step, logged) in steps {
            match (command(&step, first_namespace), step) {
                (Some(command), _) => {
                    let answer = if logged { life.log(&command) } else { life.registry.apply_blocking(&command) };
                    prop_assert_eq!(answer, model.apply(command));
                }
                (None, Step::Cut(kept)) => {
                    drop(life);
                    log.cut(kept);
                    life = Life::over(&log, dir.path()).unwrap();
                }
                (None, _) => {
                    life.consensus.stop().unwrap();
                    drop(life);
                    life = Life::over(&log, dir.path()).unwrap();
                }
            }
            prop_assert_eq!(life.state(), first_state(&model));
            life.views_agree();
        }
    }
}

/// What the test above rests on: a cut takes the last writes of the machine away, and the log brings them back.
#[test]
fn a_cut_leaves_something_to_replay() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(MemLog::new());
    let life = Life::over(&log, dir.path()).unwrap();
    life.registry.apply_blocking(&registration(DEFAULT, "n", "w")).unwrap();
    let state = life.state();
    drop(life);
    assert!(log.unsynced() > 0);
    log.cut(0);
    assert_eq!(Life::over(&log, dir.path()).unwrap().state(), state);
}
