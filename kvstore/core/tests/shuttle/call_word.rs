//! The call word: servers copy, a client takes its memory back at any moment.

use kvkeep_core::call_word::{REVOKED, SharedWord, begin_copy, end_copy, is_settled, revoke};
use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicU32, Ordering};
use shuttle::thread;

use crate::explore::{catches, every, random};

/// What the memory holds while it is the call's, what a server writes, and what the client writes once it is its own
/// again.
const CALL: u32 = 1;
const SERVERS: u32 = 2;
const CLIENTS: u32 = 3;

struct Word(AtomicU32);

impl SharedWord for Word {
    fn add(&self, n: u32) -> u32 {
        self.0.fetch_add(n, Ordering::SeqCst)
    }

    fn set(&self, bits: u32) -> u32 {
        self.0.fetch_or(bits, Ordering::SeqCst)
    }

    fn get(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

/// A call's word and the memory that it names: as many cells as can be seen half-written.
struct Shared {
    word: Word,
    memory: [AtomicU32; 2],
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self { word: Word(AtomicU32::new(0)), memory: [AtomicU32::new(CALL), AtomicU32::new(CALL)] })
    }

    fn fill(&self, value: u32) {
        self.memory.iter().for_each(|cell| cell.store(value, Ordering::Relaxed));
    }

    fn read(&self) -> [u32; 2] {
        [0, 1].map(|n| self.memory[n].load(Ordering::Relaxed))
    }
}

/// How a server guards its copy. Both answer as `begin_copy` and `end_copy` do.
trait Guard {
    fn begin(word: &Word) -> bool;
    fn end(word: &Word) -> bool;
}

struct Real;

impl Guard for Real {
    fn begin(word: &Word) -> bool {
        begin_copy(word)
    }
    fn end(word: &Word) -> bool {
        end_copy(word)
    }
}

/// Looks, and does not count.
struct NotCounted;

impl Guard for NotCounted {
    fn begin(word: &Word) -> bool {
        word.get() & REVOKED == 0
    }
    fn end(word: &Word) -> bool {
        word.get() & REVOKED == 0
    }
}

/// Counts, and looks first.
struct LooksFirst;

impl Guard for LooksFirst {
    fn begin(word: &Word) -> bool {
        let may = word.get() & REVOKED == 0;
        if may {
            word.add(1);
        }
        may
    }
    fn end(word: &Word) -> bool {
        end_copy(word)
    }
}

/// Takes what it copied, revoked or not.
struct TakesAnyhow;

impl Guard for TakesAnyhow {
    fn begin(word: &Word) -> bool {
        begin_copy(word)
    }
    fn end(word: &Word) -> bool {
        let _ = end_copy(word);
        true
    }
}

/// The client's side: revokes, and once the memory is its own writes to it. Whether it got it.
fn take_back(shared: &Shared) -> bool {
    // Settled at once, or by the time it looks again: where it is not, it gives up.
    let ours = revoke(&shared.word) || is_settled(&shared.word);
    if ours {
        shared.fill(CLIENTS);
    }
    ours
}

/// A get: servers write into the client's memory.
fn get<G: Guard>(servers: usize) {
    let shared = Shared::new();
    let serving: Vec<_> = (0..servers)
        .map(|_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                if G::begin(&shared.word) {
                    shared.fill(SERVERS);
                    let _ = G::end(&shared.word);
                }
            })
        })
        .collect();
    if take_back(&shared) {
        assert_eq!(shared.read(), [CLIENTS; 2], "a server wrote memory that its client has back");
    }
    serving.into_iter().for_each(|server| server.join().unwrap());
    // Whatever became of the copies: nobody is counted for ever, and no copy begins any more.
    assert!(is_settled(&shared.word), "the word settles when the servers are done");
    assert!(!begin_copy(&shared.word));
}

/// A get whose client looks again when every server is done: a copy that ended late shows then at the latest.
fn get_and_look_later<G: Guard>() {
    let shared = Shared::new();
    let server = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            if G::begin(&shared.word) {
                shared.fill(SERVERS);
                let _ = G::end(&shared.word);
            }
        })
    };
    let ours = take_back(&shared);
    server.join().unwrap();
    if ours {
        assert_eq!(shared.read(), [CLIENTS; 2], "a server wrote memory that its client has back");
    }
}

/// A put: servers read the client's memory and store what they read, if it counts.
fn put<G: Guard>(servers: usize) {
    let shared = Shared::new();
    let serving: Vec<_> = (0..servers)
        .map(|_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let copied = G::begin(&shared.word).then(|| shared.read())?;
                G::end(&shared.word).then_some(copied)
            })
        })
        .collect();
    // A client that does not wait, as one that got an answer would not: it may write as soon as it has revoked, since
    // what is copied from then on does not count. (A client in doubt leaves the memory alone, which is less.)
    let _ = revoke(&shared.word);
    shared.fill(CLIENTS);
    for server in serving {
        if let Some(stored) = server.join().unwrap() {
            assert_eq!(stored, [CALL; 2], "what was stored is not what was put");
        }
    }
}

/// Two calls, one behind the other, the second into other memory. The first is given up; its server is slow. `same`:
/// the second uses the word of the first.
fn two_calls(same: bool) {
    let first = Shared::new();
    let slow = {
        let first = Arc::clone(&first);
        thread::spawn(move || {
            if begin_copy(&first.word) {
                first.fill(SERVERS);
                let _ = end_copy(&first.word);
            }
        })
    };
    let ours = take_back(&first);
    if ours && same {
        // What a pool of words would do that knows no better.
        first.word.0.store(0, Ordering::SeqCst);
        assert!(begin_copy(&first.word) && end_copy(&first.word));
    }
    slow.join().unwrap();
    if ours {
        assert_eq!(first.read(), [CLIENTS; 2], "a server wrote memory that its client has back");
    }
}

#[test]
fn no_write_of_a_server_is_seen_after_its_client_has_the_memory_back() {
    assert!(every(get_and_look_later::<Real>) > 20);
    assert!(every(|| get::<Real>(1)) > 20);
    assert!(every(|| get::<Real>(2)) > 1000);
}

#[test]
fn what_is_stored_is_what_was_put_or_nothing_is() {
    assert!(every(|| put::<Real>(1)) > 20);
    assert!(every(|| put::<Real>(2)) > 1000);
}

#[test]
fn the_word_of_a_call_that_was_given_up_lets_nobody_in_ever_again() {
    assert!(every(|| two_calls(false)) > 20);
}

#[test]
fn broken_words_are_caught() {
    let memory = "memory that its client has back";
    catches(memory, || every(get_and_look_later::<NotCounted>));
    catches(memory, || every(get_and_look_later::<LooksFirst>));
    catches(memory, || random(6000, || get::<LooksFirst>(2)));
    catches("not what was put", || every(|| put::<TakesAnyhow>(1)));
    catches(memory, || every(|| two_calls(true)));
}
