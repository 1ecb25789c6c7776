//! What nobody else would end: runs whose worker and message are both gone, and rows past their days.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::full_jitter;
use crate::config::{Config, RetentionConfig};
use crate::store::{Store, StoreError};
use crate::telemetry;

const ROUND: Duration = Duration::from_secs(30);
/// Retention is looked after once in so many rounds.
const ROUNDS_PER_CLEANING: u32 = 20;
/// Batches deleted at one cleaning, so that a long backlog is worked off over several.
const BATCHES_PER_CLEANING: u32 = 50;

/// Ends abandoned runs and deletes what is past its days. Every replica has one; they do not get in each other's way.
#[derive(Debug)]
pub struct Janitor {
    store: Store,
    abandoned_after_s: u64,
    retention: RetentionConfig,
    round: Duration,
}

impl Janitor {
    /// A janitor by the configuration.
    #[must_use]
    pub fn new(store: Store, config: &Config) -> Self {
        let abandoned_after_s = config.run.abandoned_after_s;
        // A short patience is looked after in short rounds.
        let round = ROUND.min(Duration::from_secs(abandoned_after_s.max(1)));
        Self { store, abandoned_after_s, retention: config.retention.clone(), round }
    }

    /// Works until `stop`. `reading_for` says how long this replica has been reading the queue: after a night without
    /// replicas the messages of expired runs are still there, and have to be given their chance first.
    pub async fn run(self, stop: &CancellationToken, reading_for: impl Fn() -> Duration) {
        for round in 0_u32.. {
            // Replicas that were started together should not clean together.
            let wait = self.round.mul_f64(0.8) + full_jitter(self.round.mul_f64(0.4));
            if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
            let message_would_have_come = reading_for() >= Duration::from_secs(self.abandoned_after_s);
            if let Err(error) = self.look_round(message_would_have_come, round % ROUNDS_PER_CLEANING == 0).await {
                warn!(%error, "the janitor could not finish its round");
            }
        }
    }

    async fn look_round(&self, end_abandoned: bool, clean: bool) -> Result<(), StoreError> {
        let ended = if end_abandoned { self.store.end_abandoned_runs(self.abandoned_after_s).await? } else { 0 };
        if ended > 0 {
            warn!(ended, "runs ended whose worker was lost");
            telemetry::run_abandoned(ended);
        }
        if clean {
            self.clean().await?;
        }
        Ok(())
    }

    async fn clean(&self) -> Result<(), StoreError> {
        let (mut runs, mut events) = (0, 0);
        for _ in 0..BATCHES_PER_CLEANING {
            let old_runs = self.store.delete_old_runs(self.retention.runs_days).await?;
            let sent_events = self.store.delete_sent_events(self.retention.outbox_days).await?;
            runs += old_runs;
            events += sent_events;
            if old_runs + sent_events == 0 {
                break;
            }
        }
        if runs + events > 0 {
            info!(runs, events, "rows past their days deleted");
        }
        Ok(())
    }
}
