//! Rate limiter for one documented limit of Graph.
//!
//! A limit is divided by the number of replicas. One that is too low for that (Conditional Access: one request a second) is
//! not: the replicas take turns, which `turns.rs` asks the fleet for.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::sliding_window::{Allowance, SlidingWindow};
use super::turns::Turns;
use crate::telemetry;

/// Shortest wait that is recorded as a metric.
const MIN_RECORDED_WAIT: Duration = Duration::from_millis(1);

/// Rate limiter of one tenant and family.
#[derive(Debug)]
pub(super) struct RateLimiter {
    allowance: Mutex<Option<Allowance>>,
    /// Locked by the request whose turn is next, so that requests leave in the order of their arrival.
    sent: Arc<tokio::sync::Mutex<SlidingWindow>>,
    turns: Turns,
}

/// The one request of a low limit that is in flight; the next one follows its response.
#[derive(Debug)]
pub(super) struct SoleRequest {
    sent: OwnedMutexGuard<SlidingWindow>,
    after_response: Duration,
}

impl Drop for SoleRequest {
    fn drop(&mut self) {
        let next = Instant::now() + self.after_response;
        self.sent.not_before = Some(next);
    }
}

impl RateLimiter {
    /// Limiter with `allowance`. Another process may have sent requests of the same tenant before `started`; `None` if
    /// it has not.
    pub(super) fn new(allowance: Option<Allowance>, started: Option<Instant>, turns: Turns) -> Self {
        let sent = allowance.zip(started).map(|(allowance, started)| SlidingWindow::of_predecessor(allowance, started));
        let sent = Arc::new(tokio::sync::Mutex::new(sent.unwrap_or_default()));
        Self { allowance: Mutex::new(allowance), sent, turns }
    }

    /// Replaces the allowance; requests sent before stay counted.
    pub(super) fn set_allowance(&self, allowance: Option<Allowance>) {
        *self.allowance.lock() = allowance;
    }

    /// Waits until one request may be sent, and counts it. The result is kept until its response.
    pub(super) async fn acquire(&self) -> Option<SoleRequest> {
        let arrived = Instant::now();
        let mut sent = Arc::clone(&self.sent).lock_owned().await;
        let sole = loop {
            let allowance = *self.allowance.lock();
            let Some(allowance) = allowance else { break None };
            if let Some(interval) = allowance.between_turns {
                self.wait_for_turn(&mut sent, allowance, interval).await;
                break Some(SoleRequest { sent, after_response: allowance.after_response });
            }
            match sent.try_send(allowance, Instant::now()) {
                Ok(()) => break None,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        };
        let waited = arrived.elapsed();
        if waited >= MIN_RECORDED_WAIT {
            telemetry::graph_rate_limit_wait(waited);
        }
        sole
    }

    /// Waits for the next request of a low limit: for a turn, or for this replica's part if the fleet grants none.
    async fn wait_for_turn(&self, sent: &mut SlidingWindow, allowance: Allowance, interval: Duration) {
        if let Some(not_before) = sent.not_before {
            tokio::time::sleep_until(not_before).await;
        }
        if self.turns.wait_for_next(interval).await {
            sent.sent_in_turn(allowance, Instant::now());
            return;
        }
        while let Err(wait) = sent.try_send(allowance, Instant::now()) {
            tokio::time::sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::limits::sliding_window::DocumentedLimit;
    use crate::graph::limits::turns::TurnSource;

    fn limiter(allowance: Option<Allowance>, started: Option<Instant>) -> RateLimiter {
        let (source, tenant_id) = (TurnSource::default(), uuid::Uuid::nil());
        RateLimiter::new(allowance, started, Turns { source, tenant_id, family: "conditional_access" })
    }

    #[tokio::test(start_paused = true)]
    async fn a_low_limit_waits_for_the_response_and_after_a_restart() {
        let second = DocumentedLimit { max: 1, window: Duration::from_secs(1) };
        let start = Instant::now();
        let limiter = limiter(second.allowance(0.8, 1), Some(start));
        let mut times = Vec::new();
        for response_ms in [100, 2_000, 0] {
            let request = limiter.acquire().await;
            times.push(start.elapsed().as_millis());
            tokio::time::sleep(Duration::from_millis(response_ms)).await;
            drop(request);
        }
        assert_eq!(times, [1_250, 2_500, 5_500]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_low_limit_is_not_divided_while_the_fleet_grants_turns() {
        let second = DocumentedLimit { max: 1, window: Duration::from_secs(1) };
        let limiter = limiter(second.allowance(0.8, 8), Some(Instant::now()));
        let mut requests = limiter.turns.source.requests();
        let fleet = async {
            for wait_ms in [0, 1_250] {
                let request = requests.recv().await.unwrap();
                assert_eq!(request.interval, Duration::from_millis(1_250));
                request.reply.send(Duration::from_millis(wait_ms)).unwrap();
            }
            requests.close();
        };
        let start = Instant::now();
        let sending = async {
            let mut times = Vec::new();
            for _ in 0..3 {
                drop(limiter.acquire().await);
                times.push(start.elapsed().as_millis());
            }
            times
        };
        let (times, ()) = tokio::join!(sending, fleet);
        assert_eq!(times[0], 0);
        assert!((1_250..=2_250).contains(&times[1]), "{times:?}");
        assert_eq!(times[2], times[1] + 8 * 1_250, "without turns this replica uses its own part");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_leave_in_the_order_of_arrival() {
        let limit = DocumentedLimit { max: 40, window: Duration::from_millis(500) };
        let started = Instant::now().checked_sub(limit.window * 2).unwrap();
        let (limiter, order) = (limiter(limit.allowance(1.0, 1), Some(started)), Mutex::new(Vec::new()));
        let requests = (0..12).map(|number| {
            let (limiter, order) = (&limiter, &order);
            async move {
                limiter.acquire().await;
                order.lock().push(number);
            }
        });
        futures_util::future::join_all(requests).await;
        assert_eq!(*order.lock(), (0..12).collect::<Vec<_>>());
    }
}
