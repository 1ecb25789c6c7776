//! Limits of one tenant and family: the pause while a `Retry-After` lasts, then concurrency limit and rate limiter.
//!
//! Shared by all runs of a tenant in this process; pauses are shared with the other replicas as well.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio::time::Instant;
use uuid::Uuid;

use super::budget::BudgetTracker;
use super::concurrency::{ConcurrencyLimit, Permit};
use super::rate_limit::{Allowance, DocumentedLimit, RateLimiter};
use crate::backoff::full_jitter;
use crate::config::GraphConfig;
use crate::telemetry;

/// Notices kept for a slow receiver. The oldest are dropped first; the newest matter.
const NOTICES_KEPT: usize = 256;
/// Several requests are throttled at about the same time: an extension below this is not announced again.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(250);

/// Pause that Graph asked for, as announced to the other replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PauseNotice {
    /// The throttled tenant.
    pub tenant_id: Uuid,
    /// Family of Graph's limits: `intune`, `devices`, `conditional_access` or `graph`.
    pub family: &'static str,
    /// Length of the pause, from now.
    pub duration: Duration,
}

/// Lists that Graph counts against the same limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::graph) enum Family {
    /// Policies and apps: every Intune list without a documented limit of its own.
    Intune,
    /// Devices and scripts.
    Devices,
    /// Conditional Access policies and named locations.
    ConditionalAccess,
    /// Lists outside Intune; Graph publishes no limit for them.
    Graph,
}

impl Family {
    const ALL: [Self; 4] = [Self::Intune, Self::Devices, Self::ConditionalAccess, Self::Graph];

    /// Family of a contract's `throttle`.
    pub(in crate::graph) fn of(throttle: &str) -> Self {
        match throttle {
            "devices" => Self::Devices,
            "identityprotection-ca" => Self::ConditionalAccess,
            "graph-default" => Self::Graph,
            _ => Self::Intune,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Intune => "intune",
            Self::Devices => "devices",
            Self::ConditionalAccess => "conditional_access",
            Self::Graph => "graph",
        }
    }
}

/// Limits of all tenants of this process.
pub(in crate::graph) struct LimitRegistry {
    intune: DocumentedLimit,
    devices: DocumentedLimit,
    conditional_access: DocumentedLimit,
    share: f64,
    started: Instant,
    replicas: AtomicU32,
    min_jitter: Duration,
    tenants: Mutex<HashMap<(Uuid, Family), Arc<TenantLimits>>>,
    concurrency: Mutex<HashMap<Uuid, Arc<ConcurrencyLimit>>>,
    notices: broadcast::Sender<PauseNotice>,
}

/// Limits of one tenant and family.
pub(in crate::graph) struct TenantLimits {
    tenant_id: Uuid,
    family: Family,
    pause: Mutex<Option<Pause>>,
    concurrency: Arc<ConcurrencyLimit>,
    rate_limiter: RateLimiter,
    min_jitter: Duration,
    notices: broadcast::Sender<PauseNotice>,
}

/// Time in which no request is sent.
#[derive(Clone, Copy)]
struct Pause {
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

impl LimitRegistry {
    pub(in crate::graph) fn new(config: &GraphConfig) -> Self {
        let per_20_s = |max| DocumentedLimit { max, window: Duration::from_secs(20) };
        Self {
            intune: per_20_s(config.intune_per_20s),
            devices: per_20_s(config.devices_per_20s),
            conditional_access: DocumentedLimit {
                max: config.conditional_access_per_s,
                window: Duration::from_secs(1),
            },
            share: config.rate_share,
            started: Instant::now(),
            replicas: AtomicU32::new(1),
            min_jitter: Duration::from_secs_f64(config.backoff_first_s),
            tenants: Mutex::default(),
            concurrency: Mutex::default(),
            notices: broadcast::channel(NOTICES_KEPT).0,
        }
    }

    /// Limits of a tenant and family.
    pub(in crate::graph) fn of(&self, tenant_id: Uuid, family: Family) -> Arc<TenantLimits> {
        let mut tenants = self.tenants.lock();
        let limits = tenants.entry((tenant_id, family)).or_insert_with(|| {
            Arc::new(TenantLimits {
                tenant_id,
                family,
                pause: Mutex::default(),
                concurrency: Arc::clone(self.concurrency.lock().entry(tenant_id).or_default()),
                rate_limiter: RateLimiter::new(self.allowance(family), self.started),
                min_jitter: self.min_jitter,
                notices: self.notices.clone(),
            })
        });
        Arc::clone(limits)
    }

    fn allowance(&self, family: Family) -> Option<Allowance> {
        let limit = match family {
            Family::Intune => self.intune,
            Family::Devices => self.devices,
            Family::ConditionalAccess => self.conditional_access,
            Family::Graph => return None,
        };
        limit.allowance(self.share, self.replicas.load(Ordering::Relaxed))
    }

    /// Divides the documented limits by the number of replicas that share them.
    pub(in crate::graph) fn set_replicas(&self, replicas: u32) {
        let replicas = replicas.max(1);
        if self.replicas.swap(replicas, Ordering::Relaxed) == replicas {
            return;
        }
        for limits in self.tenants.lock().values() {
            limits.rate_limiter.set_allowance(self.allowance(limits.family));
        }
    }

    /// Receiver of the pauses that Graph asks this replica for.
    pub(in crate::graph) fn notices(&self) -> broadcast::Receiver<PauseNotice> {
        self.notices.subscribe()
    }

    /// Applies a pause that another replica announced; it is not announced again.
    pub(in crate::graph) fn pause(&self, tenant_id: Uuid, family: &str, duration: Duration) {
        if let Some(family) = Family::ALL.into_iter().find(|known| known.as_str() == family) {
            self.of(tenant_id, family).extend(duration);
        }
    }
}

impl TenantLimits {
    /// Waits until a request may be sent. The error is the rest of a pause that exceeds the run's budget.
    pub(in crate::graph) async fn acquire(&self, budget: &BudgetTracker) -> Result<Permit, Duration> {
        loop {
            self.wait_for_pause(budget).await?;
            let permit = self.concurrency.acquire().await;
            self.rate_limiter.acquire().await;
            // A pause may have begun while this request waited for permit and rate limiter.
            if self.current_pause().is_none() {
                return Ok(permit);
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
    fn extend(&self, duration: Duration) -> bool {
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
        let limits = registry.of(TENANT, Family::of("identityprotection-ca"));
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

    #[test]
    fn every_family_of_the_contracts_has_its_limits() {
        for (throttle, family) in [
            ("device-configuration", Family::Intune),
            ("intune-default", Family::Intune),
            ("devices", Family::Devices),
            ("identityprotection-ca", Family::ConditionalAccess),
            ("graph-default", Family::Graph),
        ] {
            assert_eq!(Family::of(throttle), family, "{throttle}");
        }
        let registry = LimitRegistry::new(&Config::load_with(None, [].into()).unwrap().graph);
        assert!(registry.allowance(Family::Graph).is_none());
        let in_window = |family| registry.allowance(family).unwrap().in_window;
        assert_eq!((in_window(Family::Intune), in_window(Family::Devices)), (Some(800), Some(1_600)));
        registry.set_replicas(4);
        assert_eq!((in_window(Family::Intune), in_window(Family::Devices)), (Some(200), Some(400)));
    }
}
