//! Staying under Graph's limits, and out of its way when it asks: shared by all runs of a tenant in this process.
//!
//! A request passes three posts: the gate of its tenant and family (closed by 429 and 503 until Graph's wait is over),
//! the crowd of its tenant (how many at once; halved by throttling, recovering slowly) and the pace of the family.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use uuid::Uuid;

use super::crowd::{Crowd, Permit};
use super::pace::{Allowance, Limit, Pace};
use super::spending::Spending;
use crate::backoff::full_jitter;
use crate::config::GraphConfig;
use crate::domain::clock::Deadline;
use crate::telemetry;

/// Gate changes that a slow listener may be behind; the oldest are lost first, and the newest matter.
const CHANGES_KEPT: usize = 256;
/// Several requests are refused at about the same time: what lengthens a closure by less is no news.
const NEWS: Duration = Duration::from_millis(250);

/// A gate that Graph has closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GateChange {
    /// Whose.
    pub tenant_id: Uuid,
    /// Which limits of Graph: `intune`, `devices`, `conditional_access` or `graph`.
    pub family: &'static str,
    /// For how long from now.
    pub closed_for: Duration,
}

/// Lists that Graph counts together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// Policies and apps: whatever Microsoft lists no other limit for.
    Intune,
    /// Devices and scripts.
    Devices,
    /// Conditional Access and its named locations.
    ConditionalAccess,
    /// Not Intune; no limit of its own is published.
    Graph,
}

impl Family {
    const ALL: [Self; 4] = [Self::Intune, Self::Devices, Self::ConditionalAccess, Self::Graph];

    /// The family of a contract's `throttle`.
    pub(super) fn of(throttle: &str) -> Self {
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

/// The posts of all tenants.
pub(super) struct Throttle {
    intune: Limit,
    devices: Limit,
    conditional_access: Limit,
    share: f64,
    born: Instant,
    replicas: AtomicU32,
    least_spread: Duration,
    lanes: Mutex<HashMap<(Uuid, Family), Arc<Lane>>>,
    crowds: Mutex<HashMap<Uuid, Arc<Crowd>>>,
    changes: broadcast::Sender<GateChange>,
}

/// The posts that requests of one tenant and family pass.
pub(super) struct Lane {
    tenant_id: Uuid,
    family: Family,
    gate: Mutex<Option<Closure>>,
    crowd: Arc<Crowd>,
    pace: Pace,
    least_spread: Duration,
    changes: broadcast::Sender<GateChange>,
}

#[derive(Clone, Copy)]
struct Closure {
    until: Deadline,
    spread: Duration,
}

impl Throttle {
    pub(super) fn new(config: &GraphConfig) -> Self {
        Self {
            intune: Limit { most: config.intune_per_20s, window: Duration::from_secs(20) },
            devices: Limit { most: config.devices_per_20s, window: Duration::from_secs(20) },
            conditional_access: Limit { most: config.conditional_access_per_s, window: Duration::from_secs(1) },
            share: config.rate_share,
            born: Instant::now(),
            replicas: AtomicU32::new(1),
            least_spread: Duration::from_secs_f64(config.backoff_first_s),
            lanes: Mutex::default(),
            crowds: Mutex::default(),
            changes: broadcast::channel(CHANGES_KEPT).0,
        }
    }

    /// The posts of a tenant and family.
    pub(super) fn lane(&self, tenant_id: Uuid, family: Family) -> Arc<Lane> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = lanes.entry((tenant_id, family)).or_insert_with(|| {
            let mut crowds = self.crowds.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::new(Lane {
                tenant_id,
                family,
                gate: Mutex::default(),
                crowd: Arc::clone(crowds.entry(tenant_id).or_default()),
                pace: Pace::new(self.allowance(family), self.born),
                least_spread: self.least_spread,
                changes: self.changes.clone(),
            })
        });
        Arc::clone(lane)
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

    /// Divides the limits by the number of replicas that share them.
    pub(super) fn set_replicas(&self, replicas: u32) {
        let replicas = replicas.max(1);
        if self.replicas.swap(replicas, Ordering::Relaxed) == replicas {
            return;
        }
        for lane in self.lanes.lock().unwrap_or_else(PoisonError::into_inner).values() {
            lane.pace.set(self.allowance(lane.family));
        }
    }

    /// What other replicas should know of.
    pub(super) fn changes(&self) -> broadcast::Receiver<GateChange> {
        self.changes.subscribe()
    }

    /// Closes a gate because another replica was told to wait; it is not announced again.
    pub(super) fn close(&self, tenant_id: Uuid, family: &str, closed_for: Duration) {
        if let Some(family) = Family::ALL.into_iter().find(|known| known.as_str() == family) {
            self.lane(tenant_id, family).lengthen(closed_for);
        }
    }
}

impl Lane {
    /// Passes all posts, or says how long the gate stays closed if the run can't afford to wait for it.
    pub(super) async fn enter(&self, spending: &Spending) -> Result<Permit, Duration> {
        loop {
            self.pass_gate(spending).await?;
            let permit = self.crowd.enter().await;
            self.pace.turn().await;
            if self.closure().is_none() {
                return Ok(permit);
            }
        }
    }

    async fn pass_gate(&self, spending: &Spending) -> Result<(), Duration> {
        while let Some(closure) = self.closure() {
            let left = closure.until.remaining();
            // Those who waited together must not come back together.
            let wait = left + full_jitter(closure.spread);
            let new = spending.pay(wait).ok_or(left)?;
            telemetry::graph_throttle_wait(new);
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    fn closure(&self) -> Option<Closure> {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.take_if(|closure| closure.until.passed());
        *gate
    }

    /// Closes the gate because Graph asked for it.
    pub(super) fn close(&self, closed_for: Duration) {
        if !self.lengthen(closed_for) {
            return;
        }
        let (tenant_id, family) = (self.tenant_id, self.family.as_str());
        tracing::info!(family, closed_for_ms = closed_for.as_millis(), "Graph asks to be left alone");
        // Nobody need listen.
        let _ = self.changes.send(GateChange { tenant_id, family, closed_for });
    }

    /// Keeps the gate closed for at least so long, and says whether that is news.
    fn lengthen(&self, closed_for: Duration) -> bool {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let before = gate.map_or(Duration::ZERO, |closure| closure.until.remaining());
        if closed_for > before {
            let spread = (closed_for / 10).max(self.least_spread);
            *gate = Some(Closure { until: Deadline::after(closed_for), spread });
        }
        closed_for > before + NEWS || (before.is_zero() && !closed_for.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::graph::RunBudget;

    const TENANT: Uuid = Uuid::from_u128(7);

    fn throttle() -> Throttle {
        let mut config = Config::load_with(None, [].into()).unwrap().graph;
        config.backoff_first_s = 0.001;
        Throttle::new(&config)
    }

    fn spending(throttle_budget: Duration) -> Spending {
        Spending::new(RunBudget { deadline: Deadline::after(Duration::from_secs(60)), throttle_budget })
    }

    #[tokio::test]
    async fn a_closed_gate_holds_everyone_of_the_family_and_nobody_else() {
        let throttle = throttle();
        throttle.lane(TENANT, Family::Intune).close(Duration::from_millis(200));
        let enough = spending(Duration::from_secs(10));
        for (tenant, family, waits) in [
            (TENANT, Family::Devices, false),
            (Uuid::from_u128(8), Family::Intune, false),
            (TENANT, Family::Intune, true),
            (TENANT, Family::Intune, false),
        ] {
            let begun = std::time::Instant::now();
            assert!(throttle.lane(tenant, family).enter(&enough).await.is_ok());
            assert_eq!(begun.elapsed() >= Duration::from_millis(150), waits, "{family:?}");
        }
        assert!(enough.usage().graph_throttle_wait_ms >= 150);
    }

    #[tokio::test]
    async fn a_run_that_can_not_afford_the_wait_is_told_how_long_it_is() {
        let throttle = throttle();
        let lane = throttle.lane(TENANT, Family::Intune);
        lane.close(Duration::from_secs(30));
        let left = lane.enter(&spending(Duration::from_secs(5))).await.err().unwrap();
        assert!(left > Duration::from_secs(29) && left <= Duration::from_secs(30));
    }

    #[test]
    fn a_closure_is_announced_once_and_one_from_elsewhere_not_at_all() {
        let throttle = throttle();
        let mut changes = throttle.changes();
        let lane = throttle.lane(TENANT, Family::of("identityprotection-ca"));
        lane.close(Duration::from_secs(3));
        lane.close(Duration::from_secs(3));
        lane.close(Duration::from_secs(1));
        let closed_for = Duration::from_secs(3);
        assert_eq!(changes.try_recv(), Ok(GateChange { tenant_id: TENANT, family: "conditional_access", closed_for }));
        assert!(changes.try_recv().is_err());
        throttle.close(TENANT, "intune", Duration::from_secs(9));
        throttle.close(TENANT, "no such family", Duration::from_secs(9));
        assert!(changes.try_recv().is_err());
        assert!(throttle.lane(TENANT, Family::Intune).closure().is_some());
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
        let throttle = throttle();
        assert!(throttle.allowance(Family::Graph).is_none());
        let in_window = |family| throttle.allowance(family).unwrap().in_window;
        assert_eq!((in_window(Family::Intune), in_window(Family::Devices)), (Some(800), Some(1_600)));
        throttle.set_replicas(4);
        assert_eq!((in_window(Family::Intune), in_window(Family::Devices)), (Some(200), Some(400)));
    }
}
