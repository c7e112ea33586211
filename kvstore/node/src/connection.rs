//! Connections and engine instances. A connection says hello once; an instance ends when its last connection has been
//! closed for a grace period, and its leases and reservations with it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvkeep_core::{InstanceId, TenantId};
use parking_lot::Mutex;

/// What a connection has said of itself.
#[derive(Clone, Debug)]
pub struct Hello {
    /// The instance it belongs to.
    pub instance: InstanceId,
    /// Its tenant.
    pub tenant: TenantId,
    /// The tenant's name.
    pub tenant_name: Arc<str>,
    /// May ask the admin service.
    pub admin: bool,
}

/// How a connection came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// TCP, from this address.
    Tcp(std::net::SocketAddr),
    /// The Unix socket, from this user.
    Unix {
        /// Peer credentials.
        uid: u32,
        /// The process that connected; 0: not said.
        pid: u32,
    },
}

impl Via {
    /// Whether this peer may map the arena: the server's own user and root, who could not be kept from it, and those whom
    /// the operator named.
    pub fn may_map(&self, auth: &crate::config::Auth) -> bool {
        match self {
            Self::Tcp(_) => false,
            Self::Unix { uid, .. } => {
                *uid == 0 || *uid == rustix::process::getuid().as_raw() || auth.map_uids.contains(uid)
            }
        }
    }
}

/// One connection; shared by the calls on it, dropped when it is closed and they are done.
pub struct Connection {
    /// How it came in.
    pub via: Via,
    hello: OnceLock<Hello>,
    instances: Arc<Instances>,
}

impl Connection {
    /// What was said, if anything was.
    pub fn hello(&self) -> Option<&Hello> {
        self.hello.get()
    }

    /// Records the hello; the first one counts. `false` where an earlier one said something else, or where the instance is
    /// another tenant's: its leases and reservations are nobody else's to end.
    pub fn say_hello(&self, hello: Hello) -> bool {
        let same = |said: &Hello| (said.instance, said.tenant) == (hello.instance, hello.tenant);
        if let Some(said) = self.hello.get() {
            return same(said);
        }
        if !self.instances.joined(hello.instance, hello.tenant) {
            return false;
        }
        // Two hellos at once on one connection: one is recorded, and only that one is counted.
        self.hello.set(hello.clone()).is_ok() || {
            self.instances.left(hello.instance);
            self.hello.get().is_some_and(same)
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(hello) = self.hello.get() {
            self.instances.left(hello.instance);
        }
        // Who sees the last connection gone must see when it went.
        *self.instances.changed.lock() = Instant::now();
        self.instances.open.fetch_sub(1, Ordering::Release);
    }
}

/// All connections and instances of a node.
pub struct Instances {
    open: AtomicU32,
    /// When a connection was last closed; at first, when the node was started.
    changed: Mutex<Instant>,
    connections_max: u32,
    grace: Duration,
    live: Mutex<HashMap<InstanceId, Live>>,
}

struct Live {
    tenant: TenantId,
    connections: u32,
    /// When the last connection closed.
    alone_since: Option<Instant>,
}

impl Instances {
    /// `grace`: how long an instance outlives its last connection.
    pub fn new(connections_max: u32, grace: Duration) -> Arc<Self> {
        let changed = Mutex::new(Instant::now());
        Arc::new(Self { open: AtomicU32::new(0), changed, connections_max, grace, live: Mutex::default() })
    }

    /// A place for a new connection; `None` where `connections_max` are open.
    pub fn admit(self: &Arc<Self>, via: Via) -> Option<Arc<Connection>> {
        self.open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < self.connections_max).then_some(n + 1))
            .ok()
            .map(|_| Arc::new(Connection { via, hello: OnceLock::new(), instances: Arc::clone(self) }))
    }

    /// Connections open now.
    pub fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// For how long no connection has been open; `None` while one is.
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        // In this order: a connection that is seen to be gone has written down when it went.
        (self.open.load(Ordering::Acquire) == 0).then(|| now.saturating_duration_since(*self.changed.lock()))
    }

    fn joined(&self, instance: InstanceId, tenant: TenantId) -> bool {
        let mut live = self.live.lock();
        let entry = live.entry(instance).or_insert(Live { tenant, connections: 0, alone_since: None });
        let ours = entry.tenant == tenant;
        if ours {
            entry.connections += 1;
            entry.alone_since = None;
        }
        ours
    }

    fn left(&self, instance: InstanceId) {
        if let Some(entry) = self.live.lock().get_mut(&instance) {
            entry.connections -= 1;
            if entry.connections == 0 {
                entry.alone_since = Some(Instant::now());
            }
        }
    }

    /// Takes out the instances whose grace is over.
    pub fn take_ended(&self, now: Instant) -> Vec<InstanceId> {
        let mut live = self.live.lock();
        let ended: Vec<_> = live
            .iter()
            .filter(|(_, l)| l.alone_since.is_some_and(|since| now.duration_since(since) >= self.grace))
            .map(|(id, _)| *id)
            .collect();
        for id in &ended {
            live.remove(id);
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(instance: u8) -> Hello {
        Hello { instance: InstanceId([instance; 16]), tenant: TenantId(0), tenant_name: "default".into(), admin: false }
    }

    #[test]
    fn an_instance_ends_only_when_its_last_connection_has_been_closed_for_the_grace_period() {
        let all = Instances::new(8, Duration::from_secs(5));
        let via = Via::Unix { uid: 0, pid: 0 };
        let (a, b) = (all.admit(via).unwrap(), all.admit(via).unwrap());
        assert!(a.say_hello(hello(1)) && b.say_hello(hello(1)) && a.say_hello(hello(1)));
        drop(a);
        assert!(all.take_ended(Instant::now() + Duration::from_secs(60)).is_empty());
        drop(b);
        assert!(all.take_ended(Instant::now()).is_empty());
        assert_eq!(all.take_ended(Instant::now() + Duration::from_secs(60)), vec![InstanceId([1; 16])]);
        assert_eq!(all.open(), 0);
    }

    #[test]
    fn a_tenant_cannot_speak_for_the_instance_of_another() {
        let all = Instances::new(8, Duration::ZERO);
        let (a, b) =
            (all.admit(Via::Unix { uid: 0, pid: 0 }).unwrap(), all.admit(Via::Unix { uid: 0, pid: 0 }).unwrap());
        assert!(a.say_hello(hello(1)));
        assert!(!b.say_hello(Hello { tenant: TenantId(7), ..hello(1) }));
        assert!(b.hello().is_none());
        drop(b);
        assert!(all.take_ended(Instant::now()).is_empty(), "the other's end is not this one's");
    }

    #[test]
    fn idleness_is_counted_from_the_end_of_the_last_connection() {
        let all = Instances::new(8, Duration::ZERO);
        let later = Instant::now() + Duration::from_secs(60);
        assert!(all.idle_for(later).is_some_and(|idle| idle >= Duration::from_secs(60)), "from the start");
        let a = all.admit(Via::Unix { uid: 0, pid: 0 }).unwrap();
        let b = all.admit(Via::Unix { uid: 0, pid: 0 }).unwrap();
        drop(a);
        assert_eq!(all.idle_for(later), None, "one is still open");
        let before = Instant::now();
        drop(b);
        assert!(all.idle_for(later).is_some_and(|idle| idle <= later - before));
    }

    #[test]
    fn a_connection_cannot_change_its_mind_and_a_flood_is_turned_away() {
        let all = Instances::new(1, Duration::ZERO);
        let a = all.admit(Via::Unix { uid: 0, pid: 0 }).unwrap();
        assert!(a.say_hello(hello(1)));
        assert!(!a.say_hello(hello(2)));
        assert!(all.admit(Via::Unix { uid: 0, pid: 0 }).is_none());
    }
}
