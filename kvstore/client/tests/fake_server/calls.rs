//! The way of every call: hello, deadline, retries, budget, token.

use std::time::{Duration, Instant};

use crate::support::{Fake, Fault, key, refusal};
use bytes::Bytes;
use kvkeep_client::{Call, Client, ClientConfig, ErrorKind, MatchQuery, Namespace, Put, RetryBudget, Watch};
use kvkeep_core::{Error, ErrorKind as CoreKind};
use tonic::Status;

fn query() -> MatchQuery {
    MatchQuery::of(vec![key(0)])
}

#[tokio::test]
async fn a_restarted_server_is_greeted_again_and_the_caller_sees_nothing() {
    let (fake, addr) = Fake::start().await;
    let (client, ns) = Fake::client(&addr, |c| c.connections = 2).await;
    assert_eq!((client.server_epoch(), client.counters().hellos), (1, 2));
    fake.forget_everyone();
    let calls = (0..20).map(|_| {
        let ns = ns.clone();
        tokio::spawn(async move { ns.match_chain(&query(), &Call::default()).await })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap().unwrap();
    }
    assert_eq!(client.server_epoch(), 2);
    assert_eq!(client.counters().hellos, 4, "one new hello per connection, however many calls waited for it");
    assert_eq!((client.counters().restarts, client.counters().retries), (1, 0));
}

#[tokio::test]
async fn a_server_that_asks_for_hello_for_ever_is_given_up() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let required = kvkeep_client::convert::status_from_detail(&kvkeep_client::convert::hello_required());
    (0..50).for_each(|_| fake.fault("match", Fault::Refuse(required.clone())));
    let e = ns.match_chain(&query(), &Call::default()).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::HelloRequired);
    assert!(fake.calls("match") <= 4);
}

#[tokio::test]
async fn the_retry_after_of_a_throttled_answer_is_waited_for() {
    let (fake, addr) = Fake::start().await;
    let (client, ns) = Fake::client(&addr, |_| ()).await;
    let wait = Duration::from_millis(300);
    let throttled = Error::new(CoreKind::Throttled, "busy").retry_after(wait);
    fake.fault("match", Fault::Refuse(kvkeep_client::convert::status_from_error(&throttled)));
    let began = Instant::now();
    ns.match_chain(&query(), &Call::default()).await.unwrap();
    assert!(began.elapsed() >= wait);
    assert_eq!(client.counters().retries, 1);
}

#[tokio::test]
async fn a_wait_beyond_the_deadline_is_not_waited() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    let throttled = Error::new(CoreKind::Throttled, "busy").retry_after(Duration::from_secs(3600));
    fake.fault("match", Fault::Refuse(kvkeep_client::convert::status_from_error(&throttled)));
    let e = ns.match_chain(&query(), &Call::default()).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused(CoreKind::Throttled));
    assert_eq!(e.retry_after(), Some(Duration::from_secs(3600)), "the caller may wait where we do not");
}

#[tokio::test]
async fn a_server_in_trouble_is_asked_little_more_than_in_health() {
    let (fake, addr) = Fake::start().await;
    let retry = RetryBudget {
        backoff_first: Duration::from_millis(1),
        backoff_max: Duration::from_millis(2),
        ..RetryBudget::default()
    };
    let (client, ns) = Fake::client(&addr, |c| c.retry = retry).await;
    (0..1000).for_each(|_| fake.fault("match", Fault::Refuse(refusal(CoreKind::Unavailable))));
    for _ in 0..200 {
        ns.match_chain(&query(), &Call::default()).await.unwrap_err();
    }
    let tries = fake.calls("match");
    assert!((200..=200 + 10 + 21).contains(&tries), "{tries} tries of 200 calls");
    assert!(client.counters().retries_denied > 0);
}

#[tokio::test]
async fn what_cannot_help_is_not_tried_again() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    for kind in [CoreKind::StaleRevision, CoreKind::Denied, CoreKind::TooLarge, CoreKind::FormatMismatch] {
        let before = fake.calls("match");
        fake.fault("match", Fault::Refuse(refusal(kind)));
        let e = ns.match_chain(&query(), &Call::default()).await.unwrap_err();
        assert_eq!((e.kind(), e.is_retryable()), (ErrorKind::Refused(kind), false));
        assert_eq!(fake.calls("match"), before + 1);
    }
}

#[tokio::test]
async fn a_step_that_must_happen_once_is_not_repeated_when_its_answer_was_lost() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    fake.fault("advance_revision", Fault::LoseAnswer(Status::unavailable("gone")));
    let e = ns.advance_revision("r2", &Call::default()).await.err().unwrap();
    assert!(e.may_have_run());
    assert_eq!(fake.calls("advance_revision"), 1);
    // Refused by the server itself: it certainly did nothing.
    fake.fault("advance_revision", Fault::Refuse(refusal(CoreKind::Unavailable)));
    let next = ns.advance_revision("r2", &Call::default()).await.unwrap();
    assert_eq!((next.handle.revision.0, fake.calls("advance_revision")), (2, 3));
}

#[tokio::test]
async fn every_call_ends_by_its_deadline_and_tells_the_server() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    fake.fault("match", Fault::Stall);
    let e = ns.match_chain(&query(), &Call::default().within(Duration::from_millis(200))).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Late);
    ns.match_chain(&query(), &Call::default().within(Duration::from_millis(7000))).await.unwrap();
    let deadlines = fake.state.lock().deadlines.clone();
    assert!(deadlines.iter().all(|ms| (1..=7000).contains(ms)), "{deadlines:?}");
}

#[tokio::test]
async fn nobody_there_is_said_at_once() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    drop(listener);
    let e = Client::connect(ClientConfig::to(addr)).await.err().unwrap();
    assert_eq!((e.kind(), e.may_have_run()), (ErrorKind::Unreachable, false));
}

/// A listener that takes connections and says nothing: a stopped process, a black hole behind a load balancer.
#[tokio::test]
async fn a_black_hole_ends_at_the_deadline() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let config = ClientConfig { deadline: Duration::from_millis(300), ..ClientConfig::to(addr) };
    let e = Client::connect(config).await.err().unwrap();
    assert!(matches!(e.kind(), ErrorKind::Late | ErrorKind::Unreachable), "{e}");
}

#[tokio::test]
async fn the_token_goes_with_every_call() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |c| c.token = Some("t0ken".into())).await;
    ns.match_chain(&query(), &Call::default()).await.unwrap();
    assert_eq!(fake.state.lock().tokens.iter().collect::<Vec<_>>(), ["Bearer t0ken"]);
    let bad = ClientConfig { token: Some("line\nbreak".into()), ..ClientConfig::to(addr) };
    assert!(matches!(Client::connect(bad).await, Err(e) if e.kind() == ErrorKind::Refused(CoreKind::Config)));
}

#[tokio::test]
async fn https_without_an_authority_is_refused_with_advice() {
    let e = Client::connect(ClientConfig::to("https://127.0.0.1:1")).await.err().unwrap();
    assert!(e.message().contains("KVKEEP_CA"), "{e}");
}

#[tokio::test]
async fn lists_are_read_page_by_page_and_keys_in_batches() {
    let (fake, addr) = Fake::start().await;
    let (_, ns) = Fake::client(&addr, |_| ()).await;
    for i in 0..5 {
        fake.state.lock().blocks.insert((key(i), 0, 0), Bytes::from_static(b"x"));
    }
    let call = Call::default();
    for (limit, want, more) in [(0, 0, true), (3, 3, true), (5, 5, false), (9, 5, false)] {
        let (found, has_more) = ns.list(&Bytes::new(), limit, &call).await.unwrap();
        assert_eq!((found.len(), has_more), (want, more), "limit {limit}");
    }
    let keys: Vec<_> = (0..11).map(key).collect();
    assert_eq!(ns.touch(&keys, &call).await.unwrap(), 11);
    assert_eq!((fake.calls("touch"), fake.state.lock().largest_batch), (3, 4));
}

#[tokio::test]
async fn a_watch_ends_with_the_error_that_ended_it() {
    let (_, addr) = Fake::start().await;
    let (client, _) = Fake::client(&addr, |_| ()).await;
    let mut events = client.watch_events(&Watch::default(), &Call::default()).await.unwrap();
    let batch = events.next_batch().await.unwrap().unwrap();
    assert!(batch.snapshot_end && batch.sequence == 5);
    assert_eq!(events.next_batch().await.unwrap().unwrap_err().kind(), ErrorKind::Unreachable);
    assert!(events.next_batch().await.is_none());
}

/// Engines call from many tasks.
#[test]
fn clients_and_their_calls_go_between_threads() {
    fn both<T: Send + Sync>() {}
    fn sent<T: Send>(_: T) {}
    both::<Client>();
    both::<Namespace>();
    // Never called: only its type is looked at.
    let _ = |ns: Namespace, put: Put, call: Call| {
        sent(ns.get(&[], None, &call));
        sent(ns.put(&put, &call));
        sent(ns.match_chain(&query(), &call));
    };
}
