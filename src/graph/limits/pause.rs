//! Limits of one tenant and family: the pause while a `Retry-After` lasts, then concurrency limit and rate limiter.
//!
//! Shared by all runs of a tenant in this process; pauses are shared with the other replicas as well.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio::time::Instant;
use uuid::Uuid;

use super::budget::BudgetTracker;
use super::concurrency::{ConcurrencyLimit, Permit};
use super::family::Family;
use super::rate_limit::{RateLimiter, SoleRequest};
use crate::backoff::full_jitter;
use crate::telemetry;

/// Several requests are throttled at about the same time: an extension below this is not announced again.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(250);

/// Pause that Graph asked for, as announced to the other replicas and shown to operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PauseNotice {
    /// The throttled tenant.
    pub tenant_id: Uuid,
    /// Family of Graph's limits: `intune`, `devices`, `conditional_access` or `graph`.
    pub family: &'static str,
    /// Length of the pause, from now.
    pub duration: Duration,
}

/// Limits of one tenant and family.
pub(in crate::graph) struct TenantLimits {
    pub(super) tenant_id: Uuid,
    pub(super) family: Family,
    pub(super) pause: Mutex<Option<Pause>>,
    pub(super) concurrency: Arc<ConcurrencyLimit>,
    pub(super) rate_limiter: RateLimiter,
    pub(super) min_jitter: Duration,
    pub(super) notices: broadcast::Sender<PauseNotice>,
}

/// Right to send one request, until it is dropped with the response.
pub(in crate::graph) struct RequestPermit {
    concurrency: Permit,
    _sole_request: Option<SoleRequest>,
}

impl RequestPermit {
    /// Records a successful response.
    pub(in crate::graph) fn succeeded(&self) {
        self.concurrency.succeeded();
    }

    /// Records a throttled response.
    pub(in crate::graph) fn throttled(&self) {
        self.concurrency.throttled();
    }
}

/// Time in which no request is sent.
#[derive(Clone, Copy)]
pub(super) struct Pause {
    until: Instant,
    /// Upper bound of the random wait after the pause, which spreads the requests that waited for it.
    jitter: Duration,
}

impl Pause {
    fn remaining(self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }

    /// Wait of one request at `now`: the rest of the pause, with jitter.
    fn wait(self, now: Instant) -> Duration {
        self.remaining(now) + full_jitter(self.jitter)
    }
}

impl TenantLimits {
    /// Waits until a request may be sent. The error is the rest of a pause that exceeds the run's budget.
    pub(in crate::graph) async fn acquire(&self, budget: &BudgetTracker) -> Result<RequestPermit, Duration> {
        loop {
            self.wait_for_pause(budget).await?;
            let concurrency = self.concurrency.acquire().await;
            let sole_request = self.rate_limiter.acquire().await;
            // A pause may have begun while this request waited for permit and rate limiter.
            if self.current_pause().is_none() {
                return Ok(RequestPermit { concurrency, _sole_request: sole_request });
            }
        }
    }

    async fn wait_for_pause(&self, budget: &BudgetTracker) -> Result<(), Duration> {
        while let Some(pause) = self.current_pause() {
            let now = Instant::now();
            let wait = pause.wait(now);
            let new = budget.reserve_wait(wait).ok_or_else(|| pause.remaining(now))?;
            telemetry::graph_throttle_wait(new);
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    fn current_pause(&self) -> Option<Pause> {
        let mut pause = self.pause.lock();
        pause.take_if(|pause| pause.until <= Instant::now());
        *pause
    }

    /// Rest of the pause, from now.
    pub(super) fn pause_left(&self) -> Option<PauseNotice> {
        let (tenant_id, family) = (self.tenant_id, self.family.as_str());
        self.current_pause().map(|pause| PauseNotice { tenant_id, family, duration: pause.remaining(Instant::now()) })
    }

    /// Pauses all requests because Graph throttled one, and announces that to the other replicas.
    pub(in crate::graph) fn pause(&self, duration: Duration) {
        if !self.extend(duration) {
            return;
        }
        let (tenant_id, family) = (self.tenant_id, self.family.as_str());
        tracing::info!(family, pause_ms = duration.as_millis(), "Graph throttled the tenant; pausing requests");
        // Fails only while nothing receives notices.
        let _ = self.notices.send(PauseNotice { tenant_id, family, duration });
    }

    /// Extends the pause to at least `duration` from now. Returns `true` if the change is worth announcing.
    pub(super) fn extend(&self, duration: Duration) -> bool {
        let mut pause = self.pause.lock();
        let now = Instant::now();
        let before = pause.map_or(Duration::ZERO, |pause| pause.remaining(now));
        if duration > before {
            let jitter = (duration / 10).max(self.min_jitter);
            *pause = Some(Pause { until: now + duration, jitter });
        }
        duration > before + ANNOUNCE_AFTER || (before.is_zero() && !duration.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::domain::clock::Deadline;
    use crate::graph::RunBudget;
    use crate::graph::limits::registry::LimitRegistry;

    const TENANT: Uuid = Uuid::from_u128(7);

    fn registry() -> LimitRegistry {
        let mut config = Config::load_with(None, [].into()).unwrap().graph;
        config.backoff_first_s = 0.001;
        // The rate limiter has tests of its own.
        (config.intune_per_20s, config.devices_per_20s) = (0, 0);
        LimitRegistry::new(&config)
    }

    fn tracker(throttle_budget: Duration) -> BudgetTracker {
        BudgetTracker::new(RunBudget { deadline: Deadline::after(Duration::from_secs(60)), throttle_budget })
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_holds_every_request_of_its_family_and_no_other() {
        let registry = registry();
        let start = Instant::now();
        registry.of(TENANT, Family::Intune).pause(Duration::from_millis(200));
        assert!(registry.of(TENANT, Family::Devices).current_pause().is_none());
        assert!(registry.of(Uuid::from_u128(8), Family::Intune).current_pause().is_none());
        let budget = tracker(Duration::from_secs(10));
        assert!(registry.of(TENANT, Family::Intune).acquire(&budget).await.is_ok());
        assert!(start.elapsed() >= Duration::from_millis(200));
        assert!(budget.usage().graph_throttle_wait_ms > 0);
        assert!(registry.of(TENANT, Family::Intune).current_pause().is_none(), "a pause ends");
    }

    #[test]
    fn requests_are_spread_after_a_pause() {
        let registry = registry();
        let limits = registry.of(TENANT, Family::Intune);
        limits.pause(Duration::from_secs(10));
        let (pause, now) = (limits.current_pause().unwrap(), Instant::now());
        let left = pause.remaining(now);
        let after: Vec<Duration> = (0..200).map(|_| pause.wait(now) - left).collect();
        assert!(after.iter().all(|wait| *wait <= Duration::from_secs(1)), "{after:?}");
        assert!(after.iter().any(|wait| *wait < Duration::from_millis(250)), "{after:?}");
        assert!(after.iter().any(|wait| *wait > Duration::from_millis(750)), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_beyond_the_budget_is_an_error_with_the_time_left() {
        let registry = registry();
        let limits = registry.of(TENANT, Family::Intune);
        limits.pause(Duration::from_secs(30));
        let left = limits.acquire(&tracker(Duration::from_secs(5))).await.err().unwrap();
        assert!(left > Duration::from_secs(20) && left <= Duration::from_secs(30), "{left:?}");
    }

    #[test]
    fn a_pause_is_announced_once_and_never_when_it_came_from_another_replica() {
        let registry = registry();
        let mut notices = registry.notices();
        let limits = registry.of(TENANT, Family::ConditionalAccess);
        limits.pause(Duration::from_secs(3));
        limits.pause(Duration::from_secs(3));
        limits.pause(Duration::from_secs(1));
        let duration = Duration::from_secs(3);
        assert_eq!(notices.try_recv(), Ok(PauseNotice { tenant_id: TENANT, family: "conditional_access", duration }));
        assert!(notices.try_recv().is_err());
        registry.pause(TENANT, "intune", Duration::from_secs(9));
        registry.pause(TENANT, "no such family", Duration::from_secs(9));
        assert!(notices.try_recv().is_err());
        assert!(registry.of(TENANT, Family::Intune).current_pause().is_some());
    }
}
