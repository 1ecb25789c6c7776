//! Janitor: restarts runs without a worker, and deletes old runs. Every replica runs one; they do not conflict.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::full_jitter;
use crate::broker::{Outgoing, PublishOutcome, Publisher};
use crate::config::Config;
use crate::domain::catalog::Catalog;
use crate::domain::failure::ErrorCode;
use crate::domain::request::SyncRequest;
use crate::domain::run::{RunKey, RunStatus};
use crate::store::{InterruptedRun, Store, StoreError};
use crate::telemetry;

/// Maximum interval between two searches for interrupted runs.
const RESTART_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of interrupted runs per round.
const MAX_INTERRUPTED: u32 = 100;
/// Maximum number of batches deleted per round.
const MAX_BATCHES: u32 = 50;

/// Restarts interrupted runs and deletes old ones.
pub struct Janitor {
    store: Store,
    publisher: Publisher,
    catalog: Catalog,
    ended: mpsc::Sender<RunKey>,
    restart_after_s: u64,
    give_up_after_s: u64,
    max_attempts: i32,
    retention_days: u32,
    retention_interval: Duration,
}

impl Janitor {
    /// A janitor that reports each run that it ended to `ended`.
    #[must_use]
    pub fn new(
        store: Store,
        publisher: Publisher,
        catalog: Catalog,
        config: &Config,
        ended: mpsc::Sender<RunKey>,
    ) -> Self {
        Self {
            store,
            publisher,
            catalog,
            ended,
            restart_after_s: config.run.restart_after_s,
            give_up_after_s: config.run.give_up_after_s,
            max_attempts: config.run.max_attempts,
            retention_days: config.retention.runs_days,
            retention_interval: Duration::from_secs(config.retention.interval_s),
        }
    }

    /// Runs until `stop`. The two tasks do not wait for each other.
    pub async fn run(self, stop: &CancellationToken) {
        tokio::join!(self.restart_runs(stop), self.delete_old_runs(stop));
    }

    async fn restart_runs(&self, stop: &CancellationToken) {
        let interval = RESTART_INTERVAL.min(Duration::from_secs(self.restart_after_s));
        while pause(stop, interval).await {
            if let Err(error) = self.restart_round().await {
                warn!(%error, "interrupted runs could not be restarted");
            }
        }
    }

    async fn restart_round(&self) -> Result<(), StoreError> {
        let interrupted = self.store.claim_interrupted_runs(
            self.restart_after_s,
            self.give_up_after_s,
            self.max_attempts,
            MAX_INTERRUPTED,
        );
        for run in interrupted.await? {
            match run {
                InterruptedRun::Restart(request, traceparent) => self.publish_again(&request, traceparent).await,
                // A run that cannot be ended must not delay the others.
                InterruptedRun::GiveUp(run, request) => {
                    if let Err(error) = self.give_up(run, &request).await {
                        warn!(%error, run_id = %run.run_id, "a lost run could not be ended");
                    }
                }
            }
        }
        Ok(())
    }

    /// Publishes the request of a run again, from its row: its own message may be lost, or wait behind a long backlog. A second
    /// copy is harmless, because the key is the same.
    async fn publish_again(&self, request: &SyncRequest, traceparent: Option<String>) {
        let message = Outgoing::request(request.to_json(), "application/json", traceparent.as_deref());
        let (tenant_id, key) = (request.tenant_id, &request.idempotency_key);
        match self.publisher.publish(vec![message]).await.first() {
            Some(PublishOutcome::Confirmed) => {
                info!(%tenant_id, idempotency_key = key, "request of an interrupted run published again");
                telemetry::run_restarted();
            }
            outcome => {
                warn!(%tenant_id, idempotency_key = key, ?outcome, "request of an interrupted run not published; retrying later")
            }
        }
    }

    async fn give_up(&self, run: RunKey, request: &SyncRequest) -> Result<(), StoreError> {
        let policy_types = self.catalog.resolve(&request.selection).policy_types();
        if self.store.fail_lost_run(run, &policy_types).await? {
            warn!(tenant_id = %run.tenant_id, run_id = %run.run_id, "run failed: it lost its worker, and nothing restarted it");
            telemetry::run_ended(RunStatus::Failed);
            telemetry::run_error(ErrorCode::WorkerLost);
            // A full channel is no loss: the event is due in the outbox.
            let _ = self.ended.try_send(run);
        }
        Ok(())
    }

    async fn delete_old_runs(&self, stop: &CancellationToken) {
        while pause(stop, self.retention_interval).await {
            match self.retention_round().await {
                Ok(0) => {}
                Ok(runs) => info!(runs, "old runs deleted"),
                Err(error) => warn!(%error, "old runs could not be deleted"),
            }
        }
    }

    async fn retention_round(&self) -> Result<u64, StoreError> {
        let mut deleted = 0;
        for _ in 0..MAX_BATCHES {
            let batch = self.store.delete_old_runs(self.retention_days).await?;
            deleted += batch;
            if batch == 0 {
                break;
            }
        }
        Ok(deleted)
    }
}

/// Waits for about `interval`, jittered so that replicas that started together do not work at the same moment; false on stop.
async fn pause(stop: &CancellationToken, interval: Duration) -> bool {
    let jittered = interval.mul_f64(0.8) + full_jitter(interval.mul_f64(0.4));
    stop.run_until_cancelled(tokio::time::sleep(jittered)).await.is_some()
}
