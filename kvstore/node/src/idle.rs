//! A node that nobody uses may end by itself: a private server outlives the programs that started it by a while, not for
//! ever.

use std::time::{Duration, Instant};

use crate::connection::Instances;

/// Returns when no connection has been open for `after`, counted from now at the earliest; answers for how long none was.
pub async fn idle(instances: &Instances, after: Duration) -> Duration {
    let start = Instant::now();
    loop {
        let now = Instant::now();
        let idle = instances.idle_for(now).unwrap_or_default().min(now - start);
        match after.saturating_sub(idle) {
            Duration::ZERO => return idle,
            // A connection that closes meanwhile sets the end of the wait anew: nothing is missed, nothing ends early.
            left => tokio::time::sleep(left).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Via;

    /// Real time: the bounds say what must not happen, and leave room for a busy machine.
    #[tokio::test]
    async fn a_node_is_idle_only_when_the_last_connection_has_been_closed_for_so_long() {
        let all = Instances::new(8, Duration::ZERO);
        let after = Duration::from_millis(60);
        let connection = all.admit(Via::Unix { uid: 0, pid: 0 }).unwrap();
        assert!(tokio::time::timeout(after * 3, idle(&all, after)).await.is_err(), "a connection is open");
        let waiting = tokio::spawn({
            let all = std::sync::Arc::clone(&all);
            async move { idle(&all, after).await }
        });
        tokio::time::sleep(after / 2).await;
        drop(connection);
        let closed = Instant::now();
        assert!(waiting.await.unwrap() >= after);
        assert!(closed.elapsed() >= after - Duration::from_millis(1), "{:?}", closed.elapsed());
    }

    #[tokio::test]
    async fn the_time_before_the_wait_does_not_count() {
        let all = Instances::new(8, Duration::ZERO);
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        idle(&all, Duration::from_millis(40)).await;
        assert!(start.elapsed() >= Duration::from_millis(40));
    }
}
