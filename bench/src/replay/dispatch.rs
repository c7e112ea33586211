//! Hands requests to engines: in the order of the workload, one request of a session at a time.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::trace::{Request, SessionId};

/// Requests looked ahead for a session that is not being served, so that one busy session does not stop every engine.
pub const WINDOW_REQUESTS: usize = 256;

type Requests = Box<dyn Iterator<Item = anyhow::Result<Request>> + Send>;

/// The queue that all engines take from.
pub struct Dispatcher {
    state: Mutex<State>,
    freed: Notify,
}

struct State {
    requests: Requests,
    left: u64,
    window: VecDeque<Request>,
    busy: HashSet<SessionId>,
    failed: bool,
}

/// One request being served; its session is free again when this is dropped.
pub struct Work {
    /// What to serve.
    pub request: Request,
    dispatcher: Arc<Dispatcher>,
}

enum Next {
    Take(Request),
    Wait,
    End,
}

impl Dispatcher {
    /// Over at most `limit` requests.
    pub fn new(requests: Requests, limit: u64) -> Arc<Self> {
        let state = State { requests, left: limit, window: VecDeque::new(), busy: HashSet::new(), failed: false };
        Arc::new(Self { state: Mutex::new(state), freed: Notify::new() })
    }

    /// The next request whose session is free; `None` at the end of the workload.
    pub async fn next(self: &Arc<Self>) -> anyhow::Result<Option<Work>> {
        loop {
            // Registered before the look, so that a session freed in between is not missed.
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            let next = self.state.lock().next()?;
            match next {
                Next::Take(request) => return Ok(Some(Work { request, dispatcher: Arc::clone(self) })),
                Next::End => return Ok(None),
                Next::Wait => freed.await,
            }
        }
    }

    /// Ends the workload early: engines finish what they have.
    pub fn stop(&self) {
        let mut state = self.state.lock();
        state.failed = true;
        drop(state);
        self.freed.notify_waiters();
    }
}

impl State {
    fn next(&mut self) -> anyhow::Result<Next> {
        if self.failed {
            return Ok(Next::End);
        }
        while self.window.len() < WINDOW_REQUESTS && self.left > 0 {
            match self.requests.next() {
                Some(Ok(request)) => {
                    self.left -= 1;
                    self.window.push_back(request);
                }
                Some(Err(e)) => {
                    self.failed = true;
                    return Err(e);
                }
                None => self.left = 0,
            }
        }
        let free = self.window.iter().position(|r| !self.busy.contains(&r.session));
        Ok(match free.and_then(|i| self.window.remove(i)) {
            Some(request) => {
                self.busy.insert(request.session);
                Next::Take(request)
            }
            None if self.window.is_empty() => Next::End,
            None => Next::Wait,
        })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.dispatcher.state.lock().busy.remove(&self.request.session);
        self.dispatcher.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvkeep_core::RequestKind;

    fn request(number: u64, session: u64) -> anyhow::Result<Request> {
        Ok(Request {
            number,
            at_ms: number,
            session: SessionId(session),
            kind: RequestKind::Chat,
            input_tokens: 1,
            output_tokens: 1,
            blocks: Vec::new(),
        })
    }

    #[tokio::test]
    async fn a_busy_session_waits_and_others_pass() {
        let all = vec![request(0, 1), request(1, 1), request(2, 2)];
        let d = Dispatcher::new(Box::new(all.into_iter()), 10);
        let first = d.next().await.unwrap().unwrap();
        let second = d.next().await.unwrap().unwrap();
        assert_eq!((first.request.number, second.request.number), (0, 2));
        let waiting = tokio::spawn({
            let d = Arc::clone(&d);
            async move { d.next().await.unwrap().unwrap().request.number }
        });
        tokio::task::yield_now().await;
        drop(first);
        assert_eq!(waiting.await.unwrap(), 1);
        drop(second);
        assert!(d.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn the_limit_and_a_stop_end_the_workload() {
        let d = Dispatcher::new(Box::new((0..).map(|n| request(n, n))), 3);
        let mut served = 0;
        while d.next().await.unwrap().is_some() {
            served += 1;
        }
        assert_eq!(served, 3);
        let d = Dispatcher::new(Box::new((0..).map(|n| request(n, n))), u64::MAX);
        assert!(d.next().await.unwrap().is_some());
        d.stop();
        assert!(d.next().await.unwrap().is_none());
    }
}
