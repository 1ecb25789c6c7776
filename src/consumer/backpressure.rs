//! Backpressure: intake of requests pauses while the database is unavailable, the outbox is over its high-water mark,
//! or an operator paused it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::health::Paused;
use crate::backoff::full_jitter;
use crate::store::{Store, StoreError};

const CHECK_WHILE_OPEN: Duration = Duration::from_secs(5);
const CHECK_WHILE_PAUSED: Duration = Duration::from_secs(1);
/// Limit of one check; a frozen database never answers.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// Decides whether new requests are taken and publishes the decision on a watch channel.
pub(super) struct Intake {
    store: Store,
    high_water: i64,
    by_operator: watch::Receiver<bool>,
    state: watch::Sender<Option<Paused>>,
    /// Wakes the check early: a delivery met a database problem.
    trouble: Arc<Notify>,
}

impl Intake {
    /// An intake that is paused until the database has answered once.
    pub(super) fn new(store: Store, high_water: i64, by_operator: watch::Receiver<bool>, trouble: Arc<Notify>) -> Self {
        Self { store, high_water, by_operator, state: watch::Sender::new(Some(Paused::DatabaseUnavailable)), trouble }
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<Paused>> {
        self.state.subscribe()
    }

    /// Repeats the check for as long as the future is polled.
    pub(super) async fn run(mut self) {
        loop {
            let now = self.check().await;
            self.state.send_if_modified(|state| std::mem::replace(state, now) != now);
            let wait = if now.is_none() { CHECK_WHILE_OPEN } else { CHECK_WHILE_PAUSED };
            tokio::select! {
                () = sleep(wait.mul_f64(0.8) + full_jitter(wait.mul_f64(0.4))) => {}
                () = self.trouble.notified() => {}
                // A closed channel means that no operator pause can follow.
                () = async { if self.by_operator.changed().await.is_err() { std::future::pending().await } } => {}
            }
        }
    }

    async fn check(&self) -> Option<Paused> {
        if *self.by_operator.borrow() {
            return Some(Paused::ByOperator);
        }
        match timeout(CHECK_TIMEOUT, self.unsent()).await {
            Ok(Ok(unsent)) => (unsent >= self.limit()).then_some(Paused::Backlog),
            Ok(Err(_)) | Err(_) => Some(Paused::DatabaseUnavailable),
        }
    }

    async fn unsent(&self) -> Result<i64, StoreError> {
        self.store.ping().await?;
        Ok(self.store.outbox_backlog().await?.unsent)
    }

    /// High-water mark while open, half of it while paused (hysteresis).
    fn limit(&self) -> i64 {
        if *self.state.borrow() == Some(Paused::Backlog) {
            self.high_water.div_euclid(2).max(1)
        } else {
            self.high_water
        }
    }
}
