//! Limits of all tenants of this process, divided by the number of replicas.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;
use uuid::Uuid;

use super::concurrency::ConcurrencyLimit;
use super::family::Family;
use super::pause::{PauseNotice, TenantLimits};
use super::rate_limit::RateLimiter;
use super::sliding_window::{Allowance, DocumentedLimit, counted_for};
use super::turns::{TurnRequest, TurnSource, Turns};
use crate::config::GraphConfig;

/// Window of Intune's limits, the longest one.
const INTUNE_WINDOW: Duration = Duration::from_secs(20);
/// Notices kept for a slow receiver. The oldest are dropped first; the newest matter.
const NOTICES_KEPT: usize = 256;

/// Limits of all tenants of this process.
pub(in crate::graph) struct LimitRegistry {
    intune: DocumentedLimit,
    devices: DocumentedLimit,
    conditional_access: DocumentedLimit,
    share: f64,
    started: Instant,
    replicas: Mutex<Replicas>,
    turns: TurnSource,
    min_jitter: Duration,
    tenants: Mutex<HashMap<(Uuid, Family), Arc<TenantLimits>>>,
    concurrency: Mutex<HashMap<Uuid, Arc<ConcurrencyLimit>>>,
    notices: broadcast::Sender<PauseNotice>,
}

/// Number of replicas that the limits are divided by.
struct Replicas {
    counted: u32,
    /// Highest count since the number fell, and the time of its fall.
    fallen: Option<(u32, Instant)>,
}

impl Replicas {
    /// Takes a new count. A lower one holds only when no window contains a request of the replicas that have left.
    fn count(&mut self, replicas: u32, now: Instant) {
        let (highest, since) = match self.fallen {
            _ if replicas >= self.counted => {
                *self = Self { counted: replicas, fallen: None };
                return;
            }
            None => (replicas, now),
            Some((highest, since)) => (highest.max(replicas), since),
        };
        self.fallen = Some((highest, since));
        if now.duration_since(since) >= counted_for(INTUNE_WINDOW) {
            *self = Self { counted: highest, fallen: (replicas < highest).then_some((replicas, now)) };
        }
    }
}

impl LimitRegistry {
    pub(in crate::graph) fn new(config: &GraphConfig) -> Self {
        let per_20_s = |max| DocumentedLimit { max, window: INTUNE_WINDOW };
        Self {
            intune: per_20_s(config.intune_per_20s),
            devices: per_20_s(config.devices_per_20s),
            conditional_access: DocumentedLimit {
                max: config.conditional_access_per_s,
                window: Duration::from_secs(1),
            },
            share: config.rate_share,
            started: Instant::now(),
            replicas: Mutex::new(Replicas { counted: 1, fallen: None }),
            turns: TurnSource::default(),
            min_jitter: Duration::from_secs_f64(config.backoff_first_s),
            tenants: Mutex::default(),
            concurrency: Mutex::default(),
            notices: broadcast::channel(NOTICES_KEPT).0,
        }
    }

    /// Limits of a tenant and family.
    pub(in crate::graph) fn of(&self, tenant_id: Uuid, family: Family) -> Arc<TenantLimits> {
        self.entry(tenant_id, family, Some(self.started))
    }

    /// Time for which an earlier process may still have requests in a window of a tenant; `None` if this process is older than
    /// that, or has read the tenant before.
    pub(in crate::graph) fn predecessor_counts_for(&self, tenant_id: Uuid) -> Option<Duration> {
        let counts_for = counted_for(INTUNE_WINDOW);
        let may_count = self.started.elapsed() < counts_for && !self.concurrency.lock().contains_key(&tenant_id);
        may_count.then_some(counts_for)
    }

    /// Gives a tenant that no other process has read within a window all of its limits at once.
    pub(in crate::graph) fn tenant_was_idle(&self, tenant_id: Uuid) {
        for family in Family::ALL {
            self.entry(tenant_id, family, None);
        }
    }

    fn entry(&self, tenant_id: Uuid, family: Family, predecessor_until: Option<Instant>) -> Arc<TenantLimits> {
        let mut tenants = self.tenants.lock();
        let limits = tenants.entry((tenant_id, family)).or_insert_with(|| {
            let turns = Turns { source: self.turns.clone(), tenant_id, family: family.as_str() };
            Arc::new(TenantLimits {
                tenant_id,
                family,
                pause: Mutex::default(),
                concurrency: Arc::clone(self.concurrency.lock().entry(tenant_id).or_default()),
                rate_limiter: RateLimiter::new(self.allowance(family), predecessor_until, turns),
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
        limit.allowance(self.share, self.replicas.lock().counted)
    }

    /// Divides the documented limits by the number of replicas that share them.
    pub(in crate::graph) fn set_replicas(&self, replicas: u32) {
        self.replicas.lock().count(replicas.max(1), Instant::now());
        for limits in self.tenants.lock().values() {
            limits.rate_limiter.set_allowance(self.allowance(limits.family));
        }
    }

    /// Receiver of the requests for turns of limits that are too low to be divided.
    pub(in crate::graph) fn turn_requests(&self) -> mpsc::Receiver<TurnRequest> {
        self.turns.requests()
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

    /// Pauses that have not ended, the longest first.
    pub(in crate::graph) fn pauses(&self) -> Vec<PauseNotice> {
        let mut pauses: Vec<PauseNotice> =
            self.tenants.lock().values().filter_map(|limits| limits.pause_left()).collect();
        pauses.sort_by_key(|pause| Reverse(pause.duration));
        pauses
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::domain::clock::Deadline;
    use crate::graph::RunBudget;
    use crate::graph::limits::budget::BudgetTracker;

    const TENANT: Uuid = Uuid::from_u128(7);

    #[test]
    fn replicas_divide_the_limits_of_every_family_that_has_one() {
        let registry = LimitRegistry::new(&Config::load_with(None, [].into()).unwrap().graph);
        assert!(registry.allowance(Family::Graph).is_none());
        let in_window = |family| registry.allowance(family).unwrap().in_window;
        assert_eq!((in_window(Family::Intune), in_window(Family::Devices)), (Some(800), Some(1_600)));
        registry.set_replicas(4);
        assert_eq!((in_window(Family::Intune), in_window(Family::Devices)), (Some(200), Some(400)));
    }

    #[test]
    fn requests_of_a_replica_that_left_count_for_a_window() {
        let (mut replicas, start) = (Replicas { counted: 1, fallen: None }, Instant::now());
        let mut count = |at_s, number| {
            replicas.count(number, start + Duration::from_secs(at_s));
            replicas.counted
        };
        assert_eq!(count(0, 4), 4, "a newcomer counts at once");
        assert_eq!((count(15, 2), count(30, 3), count(45, 2)), (4, 4, 3), "the highest count since the fall holds");
        assert_eq!((count(60, 2), count(75, 2)), (3, 2));
        assert_eq!((count(90, 1), count(105, 2), count(120, 1)), (2, 2, 2), "the number has not fallen for a window");
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenant_that_was_idle_has_its_whole_window_at_once() {
        let registry = LimitRegistry::new(&Config::load_with(None, [].into()).unwrap().graph);
        assert!(registry.predecessor_counts_for(TENANT).is_some());
        let idle = Uuid::from_u128(8);
        let (deadline, throttle_budget) = (Deadline::after(Duration::from_secs(60)), Duration::from_secs(10));
        let budget = BudgetTracker::new(RunBudget { deadline, throttle_budget });
        registry.tenant_was_idle(idle);
        assert!(registry.predecessor_counts_for(idle).is_none(), "it is asked for once");
        let mut took = Vec::new();
        for tenant in [idle, TENANT] {
            let begun = Instant::now();
            for _ in 0..201 {
                drop(registry.of(tenant, Family::Intune).acquire(&budget).await);
            }
            took.push(begun.elapsed());
        }
        assert!(took[0] < Duration::from_secs(2), "{took:?}");
        assert!(took[1] > Duration::from_secs(15), "the rest of the window may be used up: {took:?}");
        assert!(registry.predecessor_counts_for(Uuid::from_u128(9)).is_none());
    }
}
