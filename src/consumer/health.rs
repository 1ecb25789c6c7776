//! What the rest of the daemon may know of the consumer.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::interval;

use crate::domain::clock::Heartbeat;
use crate::telemetry;

const BEAT_EVERY: Duration = Duration::from_secs(1);

/// Why no new requests are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Paused {
    /// The database does not answer, or has not been asked yet.
    DatabaseUnavailable,
    /// Too many events wait in the outbox.
    Backlog,
    /// An operator has asked for quiet.
    ByOperator,
    /// The daemon stops.
    Draining,
}

impl Paused {
    /// The stable text form.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::DatabaseUnavailable => "database_unavailable",
            Self::Backlog => "backlog",
            Self::ByOperator => "by_operator",
            Self::Draining => "draining",
        }
    }
}

/// How the consumer is, at this moment.
#[derive(Debug, Default)]
pub struct ConsumerHealth {
    heartbeat: Arc<Heartbeat>,
    subscribed_since: Mutex<Option<Instant>>,
    in_flight: AtomicUsize,
    paused: Mutex<Option<Paused>>,
    problem: Mutex<Option<String>>,
}

impl ConsumerHealth {
    /// Beats for as long as the pump gets round, whether or not there is a subscription.
    #[must_use]
    pub fn heartbeat(&self) -> &Arc<Heartbeat> {
        &self.heartbeat
    }

    /// Whether there is a live subscription that takes requests.
    #[must_use]
    pub fn subscribed(&self) -> bool {
        lock(&self.subscribed_since).is_some()
    }

    /// How long this replica has been reading the queue without a break.
    #[must_use]
    pub fn reading_for(&self) -> Duration {
        lock(&self.subscribed_since).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Requests in hand.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Why no new requests are taken, if that is so: `store_away`, `backlog`, `quiet` or `draining`.
    #[must_use]
    pub fn paused(&self) -> Option<&'static str> {
        lock(&self.paused).map(Paused::as_str)
    }

    /// Why there is no subscription, in words for an operator, if that is so.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }

    /// Beats while `work` is waited for, but no longer than `at_most`: what takes longer is stuck.
    pub(super) async fn beating<T>(&self, at_most: Duration, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let begun = Instant::now();
        let mut ticks = interval(BEAT_EVERY);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = ticks.tick() => {
                    if begun.elapsed() <= at_most {
                        self.heartbeat.beat();
                    }
                }
            }
        }
    }

    pub(super) fn set_subscribed(&self, yes: bool) {
        let mut since = lock(&self.subscribed_since);
        *since = yes.then(|| since.unwrap_or_else(Instant::now));
        drop(since);
        telemetry::subscribed(yes);
        if yes {
            *lock(&self.problem) = None;
        }
    }

    pub(super) fn set_paused(&self, paused: Option<Paused>) {
        *lock(&self.paused) = paused;
    }

    pub(super) fn set_problem(&self, problem: String) {
        *lock(&self.problem) = Some(problem);
    }

    /// Counts one more request in hand, for as long as the guard lives.
    pub(super) fn track_in_flight(self: &Arc<Self>) -> InFlight {
        telemetry::deliveries_in_flight(self.in_flight.fetch_add(1, Ordering::Relaxed) + 1);
        InFlight(Arc::clone(self))
    }
}

/// One request in hand.
pub(super) struct InFlight(Arc<ConsumerHealth>);

impl Drop for InFlight {
    fn drop(&mut self) {
        telemetry::deliveries_in_flight(self.0.in_flight.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_takes_too_long_gets_no_more_beats() {
        let health = ConsumerHealth::default();
        let work = tokio::time::sleep(Duration::from_secs(4));
        health.beating(Duration::from_millis(1_500), work).await;
        let age = health.heartbeat().age();
        assert!((Duration::from_millis(2_400)..Duration::from_millis(3_600)).contains(&age), "{age:?}");
    }
}
