//! Consumer state that readiness, `/status` and systemd read.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, interval};

use crate::domain::clock::Heartbeat;
use crate::telemetry;

const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Time for which a failure of a run is shown; a run that still fails is attempted again sooner.
const RUN_FAILURE_LASTS: Duration = Duration::from_secs(90);

/// Reason for taking no new requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Paused {
    /// The database does not answer, or has not been queried yet.
    DatabaseUnavailable,
    /// The outbox has reached its high-water mark.
    Backlog,
    /// An operator paused the consumer (SIGUSR1).
    ByOperator,
    /// The daemon is shutting down.
    Draining,
}

impl Paused {
    /// Text form used in `/status`.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::DatabaseUnavailable => "database_unavailable",
            Self::Backlog => "backlog",
            Self::ByOperator => "by_operator",
            Self::Draining => "draining",
        }
    }
}

/// Current state of the consumer.
#[derive(Debug, Default)]
pub struct ConsumerHealth {
    heartbeat: Arc<Heartbeat>,
    subscribed: AtomicBool,
    in_flight: AtomicUsize,
    held: AtomicUsize,
    paused: Mutex<Option<Paused>>,
    problem: Mutex<Option<String>>,
    run_failure: Mutex<Option<(String, Instant)>>,
}

impl ConsumerHealth {
    /// Heartbeat of the consume loop; it beats with and without a subscription as long as the loop progresses.
    #[must_use]
    pub fn heartbeat(&self) -> &Arc<Heartbeat> {
        &self.heartbeat
    }

    /// True while a live subscription takes requests.
    #[must_use]
    pub fn subscribed(&self) -> bool {
        self.subscribed.load(Ordering::Relaxed)
    }

    /// Deliveries in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Deliveries held without a slot, because the broker permanently refuses their copies.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Reason for taking no new requests: `database_unavailable`, `backlog`, `by_operator` or `draining`.
    #[must_use]
    pub fn paused(&self) -> Option<&'static str> {
        self.paused.lock().map(Paused::as_str)
    }

    /// Problem that prevents a subscription, in words for an operator.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Reason for which the database, although it responds, did not let a run progress lately.
    #[must_use]
    pub fn run_failure(&self) -> Option<String> {
        let failure = self.run_failure.lock();
        failure.as_ref().filter(|(_, at)| at.elapsed() < RUN_FAILURE_LASTS).map(|(cause, _)| cause.clone())
    }

    /// Awaits `work` and keeps beating for at most `at_most`: work that takes longer counts as stuck.
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
        self.subscribed.store(yes, Ordering::Relaxed);
        telemetry::subscribed(yes);
        if yes {
            *self.problem.lock() = None;
        }
    }

    /// A problem found before a pause is forgotten: no subscription is attempted during the pause, which may last longer.
    pub(super) fn set_paused(&self, paused: Option<Paused>) {
        *self.paused.lock() = paused;
        if paused.is_some() {
            *self.problem.lock() = None;
        }
    }

    pub(super) fn set_problem(&self, problem: String) {
        *self.problem.lock() = Some(problem);
    }

    /// Records why a run failed at the database; `None` once a run has ended.
    pub(super) fn set_run_failure(&self, cause: Option<String>) {
        *self.run_failure.lock() = cause.map(|cause| (cause, Instant::now()));
    }

    /// Counts one delivery as held for the lifetime of the guard.
    pub(super) fn track_held(self: &Arc<Self>) -> Held {
        telemetry::deliveries_held(self.held.fetch_add(1, Ordering::Relaxed) + 1);
        Held(Arc::clone(self))
    }

    /// Counts one delivery as in flight for the lifetime of the guard.
    pub(super) fn track_in_flight(self: &Arc<Self>) -> InFlight {
        telemetry::deliveries_in_flight(self.in_flight.fetch_add(1, Ordering::Relaxed) + 1);
        InFlight(Arc::clone(self))
    }
}

/// Guard of one delivery held without a slot.
pub(super) struct Held(Arc<ConsumerHealth>);

impl Drop for Held {
    fn drop(&mut self) {
        telemetry::deliveries_held(self.0.held.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}

/// Guard of one delivery in flight.
pub(super) struct InFlight(Arc<ConsumerHealth>);

impl Drop for InFlight {
    fn drop(&mut self) {
        telemetry::deliveries_in_flight(self.0.in_flight.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn heartbeat_stops_when_work_exceeds_its_limit() {
        let health = ConsumerHealth::default();
        let work = tokio::time::sleep(Duration::from_secs(60));
        health.beating(Duration::from_secs(10), work).await;
        // Beats at 0, 1, .., 10 s; the clock is at 60 s now.
        assert_eq!(health.heartbeat().age(), Duration::from_secs(50));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_run_is_shown_until_a_run_ends_or_no_further_one_fails() {
        let health = ConsumerHealth::default();
        health.set_run_failure(Some("disk full".to_owned()));
        assert_eq!(health.run_failure().as_deref(), Some("disk full"));
        tokio::time::advance(RUN_FAILURE_LASTS).await;
        assert_eq!(health.run_failure(), None);
        health.set_run_failure(Some("disk full".to_owned()));
        health.set_run_failure(None);
        assert_eq!(health.run_failure(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn heartbeat_continues_while_work_is_within_its_limit() {
        let health = ConsumerHealth::default();
        health.beating(Duration::from_secs(120), tokio::time::sleep(Duration::from_secs(60))).await;
        assert!(health.heartbeat().age() <= BEAT_EVERY);
    }
}
