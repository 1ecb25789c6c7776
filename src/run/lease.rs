//! Keeping leases: renewed together in the background, given up by the worker itself before the database would give
//! them away.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::seconds;
use crate::domain::clock::Deadline;
use crate::domain::run::Lease;
use crate::store::{Renewal, Store};
use crate::telemetry;

/// A lease whose row a statement of its run has just locked is asked for again so soon.
const BUSY_AGAIN: Duration = Duration::from_millis(250);

/// Keeps the leases of this process.
#[derive(Debug, Clone)]
pub struct LeaseKeeper {
    held: Arc<Mutex<HashMap<Lease, Holding>>>,
    /// Nobody works under them, and the database could not be told yet.
    orphaned: Arc<Mutex<HashSet<Lease>>>,
    store: Store,
    owner: Arc<str>,
    lease_s: u64,
}

#[derive(Debug)]
struct Holding {
    until: watch::Sender<Deadline>,
    revoked: CancellationToken,
}

/// A lease while it is worked under; dropped, it is no longer renewed.
#[derive(Debug)]
pub(super) struct HeldLease {
    lease: Lease,
    keeper: LeaseKeeper,
    until: watch::Receiver<Deadline>,
    revoked: CancellationToken,
}

impl LeaseKeeper {
    pub(super) fn new(store: Store, owner: &str, lease_s: u64) -> Self {
        Self { held: Arc::default(), orphaned: Arc::default(), store, owner: owner.into(), lease_s }
    }

    /// How long a worker trusts a lease: shorter than the database does, so that it has stopped by then.
    fn trusted_for(&self) -> Duration {
        seconds(self.lease_s).mul_f64(5.0 / 6.0)
    }

    pub(super) fn hold(&self, lease: Lease, granted: Instant) -> HeldLease {
        let (sender, until) = watch::channel(Deadline::from_start(granted, self.trusted_for()));
        let revoked = CancellationToken::new();
        lock(&self.held).insert(lease, Holding { until: sender, revoked: revoked.clone() });
        HeldLease { lease, keeper: self.clone(), until, revoked }
    }

    /// Renews every lease each third of its life, until `stop`.
    pub async fn keep(&self, stop: &CancellationToken) {
        let third = seconds(self.lease_s) / 3;
        let mut ticks = tokio::time::interval(third);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            // The next third has leases of its own to ask for.
            let renewed = timeout(third, self.renew_all());
            if let Some(Err(_)) = stop.run_until_cancelled(renewed).await {
                warn!("some leases could not be renewed in time");
            }
        }
    }

    async fn renew_all(&self) {
        let mut leases: Vec<Lease> = lock(&self.held).keys().copied().collect();
        while !leases.is_empty() {
            leases = self.renew(&leases).await;
            if !leases.is_empty() {
                tokio::time::sleep(BUSY_AGAIN).await;
            }
        }
    }

    /// Asks once, and returns those whose rows were locked. A database that hangs must not hold up the next asking.
    async fn renew(&self, leases: &[Lease]) -> Vec<Lease> {
        let asked = Instant::now();
        let renewal = self.store.renew_leases(leases, &self.owner, self.lease_s);
        match timeout(seconds(self.lease_s) / 6, renewal).await {
            Ok(Ok(renewal)) => {
                if renewal.least_left_s.is_finite() {
                    telemetry::lease_headroom(Duration::from_secs_f64(renewal.least_left_s.max(0.0)));
                }
                self.apply(leases, &renewal, Deadline::from_start(asked, self.trusted_for()));
                return renewal.busy;
            }
            // Nothing is known: each worker stops itself at its own deadline.
            Ok(Err(error)) => warn!(%error, leases = leases.len(), "leases could not be renewed"),
            Err(_) => warn!(leases = leases.len(), "leases could not be renewed: the database does not answer"),
        }
        Vec::new()
    }

    fn apply(&self, asked: &[Lease], renewal: &Renewal, until: Deadline) {
        let held = lock(&self.held);
        for lease in asked {
            let Some(holding) = held.get(lease) else { continue };
            if renewal.kept.contains(lease) {
                holding.until.send_replace(until);
            } else if !renewal.busy.contains(lease) {
                holding.revoked.cancel();
            }
        }
    }

    /// The database went away under a run that is given up for now: its lease is to be handed back once it answers, so
    /// that the run need not wait for the lease to end, and an outage costs it no attempt.
    pub(super) fn orphan(&self, lease: Lease) {
        lock(&self.orphaned).insert(lease);
    }

    /// Hands back what was orphaned, as far as the database answers.
    pub(super) async fn hand_back_orphans(&self) {
        let orphans: Vec<Lease> = lock(&self.orphaned).iter().copied().collect();
        for lease in orphans {
            if let Err(error) = self.store.hand_back_lease(&lease).await {
                debug!(%error, run_id = %lease.run_id, "the lease can't be handed back yet");
                return;
            }
            lock(&self.orphaned).remove(&lease);
        }
    }
}

impl HeldLease {
    /// Returns once the lease can no longer be trusted.
    pub(super) async fn lost(&self) {
        loop {
            let until = *self.until.borrow();
            tokio::select! {
                () = self.revoked.cancelled() => return,
                () = tokio::time::sleep_until(until.instant().into()) => {}
            }
            if self.until.borrow().passed() {
                return;
            }
        }
    }
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        lock(&self.keeper.held).remove(&self.lease);
    }
}

fn lock<T>(leases: &Mutex<T>) -> MutexGuard<'_, T> {
    leases.lock().unwrap_or_else(PoisonError::into_inner)
}
