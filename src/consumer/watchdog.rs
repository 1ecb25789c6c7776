//! Watchdog of the subscription.

use std::time::Duration;

use tokio::time::Instant;

use super::MAX_HELD;
use crate::broker::{BrokerError, Delivery, Subscription};

/// Result of a check of the subscription.
pub(super) enum Check {
    /// Nothing to do, but to accept these deliveries.
    Passed(Vec<Delivery>),
    /// The subscription must be rebuilt.
    Stalled,
}

/// Detects a subscription that is open but stalled: requests are ready and none is delivered. Requests that the broker counts
/// as delivered, although they never arrived, are not ready: a subscription without deliveries is renewed.
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

    /// True if a request that is ready must be delivered: slots are free, no delivery waits for one, and fewer deliveries are
    /// held than extend the prefetch. At that limit the broker delivers no more, although the subscription is not stalled.
    pub(super) const fn expects(waiting: usize, free: usize, held: usize) -> bool {
        waiting == 0 && free > 0 && held < MAX_HELD as usize
    }

    /// Checks the subscription; `idle` is true if none of its deliveries is unsettled. Requests that are ready at one check may
    /// be in transit; at a second consecutive check they are not.
    pub(super) async fn check(
        &mut self,
        session: &mut Subscription,
        expects: bool,
        idle: bool,
    ) -> Result<Check, BrokerError> {
        if !expects {
            self.note_activity();
        }
        if self.last.elapsed() < self.timeout {
            return Ok(Check::Passed(Vec::new()));
        }
        if session.ready().await? > 0 {
            let was_suspicious = std::mem::replace(&mut self.suspicious, true);
            return Ok(if was_suspicious { Check::Stalled } else { Check::Passed(Vec::new()) });
        }
        self.note_activity();
        Ok(Check::Passed(if idle { session.renew().await? } else { Vec::new() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_delivery_is_expected_without_a_slot_or_at_the_limit_of_held_deliveries() {
        let most = usize::from(MAX_HELD);
        for (waiting, free, held, expected) in [
            (0, 1, 0, true),
            (0, 64, most - 1, true),
            (0, 64, most, false),
            (0, 64, most + 1, false),
            (0, 0, 0, false),
            (1, 64, 0, false),
        ] {
            assert_eq!(Watchdog::expects(waiting, free, held), expected, "{waiting} waiting, {free} free, {held} held");
        }
    }
}
