//! Watchdog of the subscription.

use std::time::Duration;

use tokio::time::Instant;

use crate::broker::{BrokerError, Subscription};

/// Detects a subscription that is open but stalled: requests are ready and none is delivered.
pub(super) struct Watchdog {
    timeout: Duration,
    last: Instant,
    suspicious: bool,
}

impl Watchdog {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, last: Instant::now(), suspicious: false }
    }

    /// Resets the watchdog after a delivery.
    pub(super) fn note_activity(&mut self) {
        self.last = Instant::now();
        self.suspicious = false;
    }

    /// True if the subscription must be rebuilt. Requests that are ready at one check may be in transit; at a second
    /// consecutive check they are not.
    pub(super) async fn stalled(&mut self, session: &Subscription, expects: bool) -> Result<bool, BrokerError> {
        if !expects {
            self.note_activity();
        }
        if self.last.elapsed() < self.timeout {
            return Ok(false);
        }
        if session.ready().await? == 0 {
            self.note_activity();
            return Ok(false);
        }
        Ok(std::mem::replace(&mut self.suspicious, true))
    }
}
