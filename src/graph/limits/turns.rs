//! Turns of limits that are too low to be divided: the fleet grants one after another, over all replicas.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use uuid::Uuid;

/// Requests for a turn that wait for the fleet.
const WAITING_REQUESTS: usize = 64;
/// Delay after which a turn is no longer used, because the next one is too close. Part of the margin for reordering.
const USABLE_FOR: Duration = Duration::from_millis(100);
/// Turns that are taken for one request; the last is used late rather than never.
const MAX_TURNS: u32 = 3;

/// Request of one replica for the next turn of a tenant and family.
#[derive(Debug)]
pub struct TurnRequest {
    /// The tenant.
    pub tenant_id: Uuid,
    /// Family of Graph's limits.
    pub family: &'static str,
    /// Time from this turn to the next one, of whichever replica.
    pub interval: Duration,
    /// Receives the wait until the turn; dropped if no turn can be had.
    pub reply: oneshot::Sender<Duration>,
}

/// Connection to the fleet, once there is one.
#[derive(Debug, Clone, Default)]
pub(super) struct TurnSource(Arc<Mutex<Option<mpsc::Sender<TurnRequest>>>>);

impl TurnSource {
    /// Receiver of all requests from now on.
    pub(super) fn requests(&self) -> mpsc::Receiver<TurnRequest> {
        let (sender, requests) = mpsc::channel(WAITING_REQUESTS);
        *self.0.lock() = Some(sender);
        requests
    }
}

/// Turns of one tenant and family.
#[derive(Debug)]
pub(super) struct Turns {
    pub(super) source: TurnSource,
    pub(super) tenant_id: Uuid,
    pub(super) family: &'static str,
}

impl Turns {
    /// Waits for the next turn. Returns `false` if the fleet grants none: this replica is alone, or the database is away.
    pub(super) async fn wait_for_next(&self, interval: Duration) -> bool {
        for _ in 0..MAX_TURNS {
            let asked = Instant::now();
            let Some(wait) = self.request(interval).await else { return false };
            tokio::time::sleep(wait).await;
            if asked.elapsed() <= wait + USABLE_FOR {
                break;
            }
        }
        true
    }

    async fn request(&self, interval: Duration) -> Option<Duration> {
        let (reply, granted) = oneshot::channel();
        let sender = self.source.0.lock().clone()?;
        let request = TurnRequest { tenant_id: self.tenant_id, family: self.family, interval, reply };
        sender.send(request).await.ok()?;
        granted.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(1_250);

    fn turns() -> Turns {
        Turns { source: TurnSource::default(), tenant_id: Uuid::from_u128(7), family: "conditional_access" }
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_waited_for() {
        let turns = turns();
        let mut requests = turns.source.requests();
        let fleet = async {
            let request = requests.recv().await.unwrap();
            assert_eq!(
                (request.tenant_id, request.family, request.interval),
                (turns.tenant_id, turns.family, INTERVAL)
            );
            request.reply.send(Duration::from_secs(3)).unwrap();
        };
        let begun = Instant::now();
        assert!(tokio::join!(turns.wait_for_next(INTERVAL), fleet).0);
        assert_eq!(begun.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_whose_grant_arrives_late_is_left_unused() {
        let turns = turns();
        let mut requests = turns.source.requests();
        let fleet = async {
            for delay_ms in [150, 10] {
                let request = requests.recv().await.unwrap();
                tokio::time::sleep(Duration::from_millis(delay_ms)).await;
                request.reply.send(Duration::from_secs(1)).unwrap();
            }
        };
        let begun = Instant::now();
        assert!(tokio::join!(turns.wait_for_next(INTERVAL), fleet).0);
        assert_eq!(begun.elapsed(), Duration::from_millis(150 + 1_000 + 10 + 1_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_turn_is_used_after_three_tries() {
        let turns = turns();
        let mut requests = turns.source.requests();
        let fleet = async {
            for _ in 0..MAX_TURNS {
                let request = requests.recv().await.unwrap();
                tokio::time::sleep(Duration::from_millis(150)).await;
                request.reply.send(Duration::ZERO).unwrap();
            }
        };
        assert!(tokio::join!(turns.wait_for_next(INTERVAL), fleet).0);
    }

    #[tokio::test]
    async fn without_a_fleet_there_are_no_turns() {
        let turns = turns();
        assert!(!turns.wait_for_next(INTERVAL).await);
        drop(turns.source.requests());
        assert!(!turns.wait_for_next(INTERVAL).await);
        let mut requests = turns.source.requests();
        let fleet = async { drop(requests.recv().await) };
        assert!(!tokio::join!(turns.wait_for_next(INTERVAL), fleet).0, "the database is away");
    }
}
