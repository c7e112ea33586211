//! How far a client's hints can be believed: learned from what came of them, for each client.
//!
//! An estimate is judged when its session comes back: by how many buckets it was off. An announced end is judged false
//! when a position of that session is used again. A request counts once, however many positions it has. A client that
//! is not believed any more is still tried with one session in [`TRIED`], so that it can be believed again.

use std::collections::HashMap;

use crate::ids::Instant;
use crate::words::RequestInfo;

use super::classes::{NOISES, TRUSTS};

/// Clients judged each by itself; all others share one judgement.
pub(super) const CLIENTS_MAX: usize = 1024;
/// What clients beyond that are known under.
const OTHERS: u64 = 0;
/// Per noise, how many buckets its estimates are off at most (factors of 2.8, 5.7 and 16)...
const OFF_MAX: [usize; NOISES] = [6, 10, 16];
/// ... and in which share of the cases.
const OFF_SHARE: f64 = 0.9;
/// Estimates that a client is believed to have given before its first, all good.
const BELIEVED: f64 = 8.0;
/// Largest share of false ends, per trust.
const FALSE_SHARE: [f64; TRUSTS] = [0.005, 0.3];
/// Ends that a client is believed to have given before its first, all true.
const BELIEVED_ENDS: f64 = 20.0;
/// Once so many requests were judged, older ones count half.
const REMEMBERED: f64 = 4096.0;
/// One session in so many is tried of a client that is not believed.
const TRIED: u64 = 16;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Client {
    /// Estimates judged, and those that were off by no more than each noise allows.
    pub estimates: f64,
    pub close: [f64; NOISES],
    /// Ends announced, and those that proved false.
    pub ends: f64,
    pub false_ends: f64,
    /// The last request counted in each way.
    counted: [(Instant, u64); 3],
}

impl Client {
    /// Whether a request is not the one counted last; then it is from now on.
    fn counts(&mut self, way: usize, info: &RequestInfo, now: Instant) -> bool {
        let this = (now, info.session);
        std::mem::replace(&mut self.counted[way], this) != this
    }
}

/// All clients.
#[derive(Default)]
pub(super) struct Clients {
    pub(super) known: HashMap<u64, Client>,
}

impl Clients {
    fn of(&mut self, id: u64) -> &mut Client {
        let id = if self.known.len() < CLIENTS_MAX || self.known.contains_key(&id) { id } else { OTHERS };
        self.known.entry(id).or_default()
    }

    fn tried(info: &RequestInfo, last: usize) -> Option<usize> {
        info.session.is_multiple_of(TRIED).then_some(last)
    }

    /// How well the client of this request estimates, the best first; `None`: not well enough to be listened to.
    pub(super) fn noise(&mut self, info: &RequestInfo) -> Option<usize> {
        let client = self.of(info.client);
        let good = |close: &f64| close + BELIEVED >= OFF_SHARE * (client.estimates + BELIEVED);
        client.close.iter().position(good).or(Self::tried(info, NOISES - 1))
    }

    /// How far an end that this request announces goes, and that it was announced.
    pub(super) fn trust(&mut self, info: &RequestInfo, now: Instant) -> Option<usize> {
        let client = self.of(info.client);
        if client.counts(0, info, now) {
            client.ends += 1.0;
            if client.ends > REMEMBERED {
                client.ends /= 2.0;
                client.false_ends /= 2.0;
            }
        }
        let share = client.false_ends / (client.ends + BELIEVED_ENDS);
        FALSE_SHARE.iter().position(|most| share <= *most).or(Self::tried(info, TRUSTS - 1))
    }

    /// A session of this client came back `off` buckets from its estimate.
    pub(super) fn came(&mut self, info: &RequestInfo, off: usize, now: Instant) {
        let client = self.of(info.client);
        if client.counts(1, info, now) {
            client.estimates += 1.0;
            for (close, most) in client.close.iter_mut().zip(OFF_MAX) {
                *close += f64::from(u8::from(off <= most));
            }
            if client.estimates > REMEMBERED {
                client.estimates /= 2.0;
                client.close.iter_mut().for_each(|close| *close /= 2.0);
            }
        }
    }

    /// A session of this client came back that was said to have ended.
    pub(super) fn came_after_end(&mut self, info: &RequestInfo, now: Instant) {
        let client = self.of(info.client);
        if client.counts(2, info, now) {
            client.false_ends += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(client: u64, session: u64) -> RequestInfo {
        RequestInfo { client, session, ..RequestInfo::default() }
    }

    /// Sessions of one client come back, each so far from its estimate.
    fn come(clients: &mut Clients, client: u64, offs: impl Iterator<Item = usize>) {
        for (n, off) in offs.enumerate() {
            clients.came(&info(client, n as u64 + 1), off, Instant(n as u64));
        }
    }

    #[test]
    fn each_client_is_believed_as_far_as_its_own_estimates_went() {
        let mut clients = Clients::default();
        let ask = info(0, 1);
        for (client, spread, noise) in
            [(1, 4, Some(0)), (2, 9, Some(1)), (3, 14, Some(2)), (4, 40, None), (5, 0, Some(0))]
        {
            assert_eq!(clients.noise(&RequestInfo { client, ..ask }), Some(0), "believed at first");
            come(&mut clients, client, (0..200).map(|n| n % (spread + 1)));
            assert_eq!(clients.noise(&RequestInfo { client, ..ask }), noise, "client {client}");
        }
        // One that is not believed is tried with some sessions, and believed again once its estimates are good.
        assert_eq!(clients.noise(&info(4, TRIED)), Some(NOISES - 1));
        come(&mut clients, 4, (0..20_000).map(|_| 1));
        assert_eq!(clients.noise(&info(4, 1)), Some(0));
    }

    #[test]
    fn a_request_counts_once_however_many_positions_it_has() {
        let mut clients = Clients::default();
        for _ in 0..1000 {
            clients.came(&info(1, 7), 60, Instant(5));
            clients.came_after_end(&info(1, 7), Instant(5));
            clients.trust(&info(1, 7), Instant(5));
        }
        let client = clients.known[&1];
        assert_eq!((client.estimates, client.ends, client.false_ends), (1.0, 1.0, 1.0));
    }

    #[test]
    fn ends_are_hard_until_one_is_false_then_soft_then_not_believed() {
        let mut clients = Clients::default();
        let mut trust = Vec::new();
        for n in 0..400u64 {
            trust.push(clients.trust(&info(1, 16 * n + 1), Instant(n)));
            // From the 100th on, one in ten comes back; from the 200th on, all.
            if n >= 200 || (n >= 100 && n % 10 == 0) {
                clients.came_after_end(&info(1, 16 * n + 1), Instant(n));
            }
        }
        assert!(trust[..101].iter().all(|t| *t == Some(0)));
        assert!(trust[110..200].iter().all(|t| *t == Some(1)));
        assert_eq!(trust[399], None);
        assert_eq!(clients.trust(&info(2, 1), Instant(0)), Some(0), "another client is another matter");
    }

    #[test]
    fn clients_are_bounded() {
        let mut clients = Clients::default();
        for client in 1..10_000 {
            clients.noise(&info(client, 1));
        }
        assert!(clients.known.len() <= CLIENTS_MAX + 1);
    }
}
