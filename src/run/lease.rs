//! Leases of this process: renewed together in the background. A worker stops before the database can grant its lease to
//! another replica.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::seconds;
use crate::domain::clock::Deadline;
use crate::domain::run::Lease;
use crate::store::Store;
use crate::telemetry;

/// First pause before leases are tried again whose row was locked; it doubles.
const LOCKED_RETRY: Duration = Duration::from_millis(250);
/// Time that handing back one run may take.
const HAND_BACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Renews the leases of this process.
#[derive(Debug, Clone)]
pub struct LeaseKeeper {
    /// Leases of active workers, each with its local deadline.
    held: Arc<Mutex<HashMap<Lease, watch::Sender<Deadline>>>>,
    /// Leases without a worker, still to be handed back.
    orphaned: Arc<Mutex<HashSet<Lease>>>,
    store: Store,
    owner: Arc<str>,
    lease_s: u64,
}

/// Lease of an active worker; no longer renewed after drop.
#[derive(Debug)]
pub(super) struct HeldLease {
    lease: Lease,
    keeper: LeaseKeeper,
    until: watch::Receiver<Deadline>,
}

impl LeaseKeeper {
    pub(super) fn new(store: Store, owner: &str, lease_s: u64) -> Self {
        Self { held: Arc::default(), orphaned: Arc::default(), store, owner: owner.into(), lease_s }
    }

    /// Time that a worker trusts a lease for: shorter than its life in the database, so that the worker has stopped by then.
    fn trusted_for(&self) -> Duration {
        seconds(self.lease_s).mul_f64(5.0 / 6.0)
    }

    pub(super) fn hold(&self, lease: Lease, granted: Instant) -> HeldLease {
        let (sender, until) = watch::channel(Deadline::from_start(granted, self.trusted_for()));
        self.held.lock().insert(lease, sender);
        HeldLease { lease, keeper: self.clone(), until }
    }

    /// True if a worker of this process holds the lease.
    pub(super) fn holds(&self, lease: &Lease) -> bool {
        self.held.lock().contains_key(lease)
    }

    /// Renews every lease each third of its life, until `stop`.
    pub async fn keep(&self, stop: &CancellationToken) {
        let third = seconds(self.lease_s) / 3;
        let mut ticks = tokio::time::interval(third);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            // Bounded, because the next tick has leases of its own to renew.
            let renewed = timeout(third, self.renew_all());
            if let Some(Err(_)) = stop.run_until_cancelled(renewed).await {
                warn!("some leases could not be renewed in time");
            }
        }
    }

    async fn renew_all(&self) {
        let mut pause = LOCKED_RETRY;
        let mut leases: Vec<Lease> = self.held.lock().keys().copied().collect();
        loop {
            leases = self.renew(&leases).await;
            // Of those that were not renewed, only those that still have a worker.
            leases.retain(|lease| self.held.lock().contains_key(lease));
            if leases.is_empty() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    /// Tries once, and returns the leases that were not renewed: their row was locked, or they are lost. A lost one needs no
    /// message to its worker: its writes are fenced off, and its local deadline passes before another replica gets it.
    async fn renew(&self, leases: &[Lease]) -> Vec<Lease> {
        if leases.is_empty() {
            return Vec::new();
        }
        let requested = Instant::now();
        let renewal = self.store.renew_leases(leases, &self.owner, self.lease_s);
        // Bounded: a database that does not respond must not hold up the next try.
        let renewed = match timeout(seconds(self.lease_s) / 6, renewal).await {
            Ok(Ok(renewed)) => renewed,
            Ok(Err(error)) => {
                warn!(%error, leases = leases.len(), "leases could not be renewed");
                return leases.to_vec();
            }
            Err(_) => {
                warn!(leases = leases.len(), "leases could not be renewed: the database does not respond");
                return leases.to_vec();
            }
        };
        if renewed.least_left_s.is_finite() {
            telemetry::lease_headroom(Duration::from_secs_f64(renewed.least_left_s.max(0.0)));
        }
        let until = Deadline::from_start(requested, self.trusted_for());
        let held = self.held.lock();
        for sender in renewed.leases.iter().filter_map(|lease| held.get(lease)) {
            sender.send_replace(until);
        }
        leases.iter().filter(|lease| !renewed.leases.contains(lease)).copied().collect()
    }

    /// Marks a lease to be handed back as soon as the database responds: its run was interrupted by an outage, which must
    /// neither delay the next attempt until the lease expires nor count as an attempt.
    pub(super) fn orphan(&self, lease: Lease) {
        self.orphaned.lock().insert(lease);
    }

    /// Hands back the orphaned leases, as far as the database responds.
    pub(super) async fn hand_back_orphans(&self) {
        let orphans: Vec<Lease> = self.orphaned.lock().iter().copied().collect();
        for lease in orphans {
            if !self.hand_back(&lease).await {
                return;
            }
            self.orphaned.lock().remove(&lease);
        }
    }

    /// Hands back one lease, in bounded time; returns whether the database responded.
    pub(super) async fn hand_back(&self, lease: &Lease) -> bool {
        match timeout(HAND_BACK_TIMEOUT, self.store.hand_back_lease(lease)).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                debug!(%error, run_id = %lease.run_id, "the run could not be handed back; its lease expires")
            }
            Err(_) => debug!(run_id = %lease.run_id, "the run could not be handed back in time; its lease expires"),
        }
        false
    }
}

impl HeldLease {
    /// Returns once the lease can no longer be trusted.
    pub(super) async fn lost(&self) {
        loop {
            let until = *self.until.borrow();
            tokio::time::sleep_until(until.instant().into()).await;
            if self.until.borrow().passed() {
                return;
            }
        }
    }
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        self.keeper.held.lock().remove(&self.lease);
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::config::Config;

    fn keeper(lease_s: u64) -> LeaseKeeper {
        let config = Config::load_with(None, [].into()).unwrap();
        LeaseKeeper::new(Store::connect(&config.database).unwrap(), "me", lease_s)
    }

    fn lease() -> Lease {
        Lease { tenant_id: Uuid::from_u128(1), run_id: Uuid::from_u128(2), attempt: 1 }
    }

    #[tokio::test]
    async fn worker_stops_trusting_its_lease_before_the_database_does() {
        for lease_s in [10, 60, 3_600] {
            let granted = Instant::now();
            let held = keeper(lease_s).hold(lease(), granted);
            let (trusted, life) = (held.until.borrow().instant() - granted, seconds(lease_s));
            // A sixth of the life is left for a write that is in flight when trust ends.
            assert!(trusted <= life - life / 6, "{trusted:?} of {life:?}");
            // A renewal takes place each third; the second one may still succeed.
            assert!(trusted > life * 2 / 3, "{trusted:?} of {life:?}");
        }
    }

    #[tokio::test]
    async fn lease_is_lost_at_its_local_deadline_and_forgotten_on_drop() {
        let keeper = keeper(60);
        let held = keeper.hold(lease(), Instant::now());
        assert!(timeout(Duration::from_millis(10), held.lost()).await.is_err());
        held.keeper.held.lock()[&lease()].send_replace(Deadline::after(Duration::ZERO));
        timeout(Duration::from_secs(60), held.lost()).await.unwrap();
        drop(held);
        assert!(keeper.held.lock().is_empty(), "a dropped lease is not renewed");
    }
}
