//! Whether new requests may be taken: not while the database is away, the outbox overflows, or an operator wants quiet.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::health::Paused;
use crate::backoff::full_jitter;
use crate::store::{Store, StoreError};

const LOOK_WHILE_OPEN: Duration = Duration::from_secs(5);
const LOOK_WHILE_CLOSED: Duration = Duration::from_secs(1);
/// A frozen database never answers; the client would wait for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// The keeper of the intake. What it decides stands in the channel.
pub(super) struct Intake {
    store: Store,
    high_water: i64,
    quiet: watch::Receiver<bool>,
    state: watch::Sender<Option<Paused>>,
    /// Someone found the database away: look now.
    trouble: Arc<Notify>,
}

impl Intake {
    /// A intake that is closed until the database has answered once.
    pub(super) fn new(store: Store, high_water: i64, quiet: watch::Receiver<bool>, trouble: Arc<Notify>) -> Self {
        Self { store, high_water, quiet, state: watch::Sender::new(Some(Paused::DatabaseUnavailable)), trouble }
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<Paused>> {
        self.state.subscribe()
    }

    /// Looks again and again, for as long as it is awaited.
    pub(super) async fn keep(mut self) {
        loop {
            let now = self.look().await;
            self.state.send_if_modified(|state| std::mem::replace(state, now) != now);
            let wait = if now.is_none() { LOOK_WHILE_OPEN } else { LOOK_WHILE_CLOSED };
            tokio::select! {
                () = sleep(wait.mul_f64(0.8) + full_jitter(wait.mul_f64(0.4))) => {}
                () = self.trouble.notified() => {}
                // Its sender is gone: nobody will ask for quiet any more.
                () = async { if self.quiet.changed().await.is_err() { std::future::pending().await } } => {}
            }
        }
    }

    async fn look(&self) -> Option<Paused> {
        if *self.quiet.borrow() {
            return Some(Paused::ByOperator);
        }
        match timeout(PATIENCE, self.unsent()).await {
            Ok(Ok(unsent)) => (unsent >= self.limit()).then_some(Paused::Backlog),
            Ok(Err(_)) | Err(_) => Some(Paused::DatabaseUnavailable),
        }
    }

    async fn unsent(&self) -> Result<i64, StoreError> {
        self.store.ping().await?;
        Ok(self.store.outbox_backlog().await?.unsent)
    }

    /// Once closed for its backlog, the intake opens again at half of it.
    fn limit(&self) -> i64 {
        if *self.state.borrow() == Some(Paused::Backlog) {
            self.high_water.div_euclid(2).max(1)
        } else {
            self.high_water
        }
    }
}
