//! Local time: monotonic clocks for durations and deadlines. Recorded timestamps come from the database.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;

/// Unix time in seconds by the clock of this host. Used only for the validity period in tokens, which the token service
/// states as wall-clock time, and for the informational timestamp on a dead letter.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "used for token validity and for display only")]
pub fn wall_clock_unix_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Substitute for a duration that the clock can't represent.
const FAR_FUTURE: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Monotonic instant by which an operation must have stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// Deadline `after` from now; far in the future for a duration beyond the range of the clock.
    #[must_use]
    pub fn after(after: Duration) -> Self {
        Self::from_start(Instant::now(), after)
    }

    /// Deadline `after` from an instant recorded earlier.
    ///
    /// A lease is measured from before its statement was sent. Measured from the response, this process could still
    /// trust a lease that the database has already expired.
    #[must_use]
    pub fn from_start(start: Instant, after: Duration) -> Self {
        Self(start.checked_add(after).unwrap_or_else(|| start + FAR_FUTURE))
    }

    /// Time remaining; zero once the deadline has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// True once the deadline has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// The underlying instant, for timers.
    #[must_use]
    pub fn instant(self) -> Instant {
        self.0
    }
}

/// Database time of the observations of a run: the time that its admission returned, plus the monotonic time since. No
/// statement is needed for an observation, and a change of a host's clock has no effect.
#[derive(Debug, Clone, Copy)]
pub struct ObservationClock {
    started_at: OffsetDateTime,
    admitted_at: OffsetDateTime,
    admitted: Instant,
}

impl ObservationClock {
    /// The clock of a run that started at `started_at`, of whose admission the database said at `admitted` (local) that it
    /// was `admitted_at`.
    #[must_use]
    pub fn new(started_at: OffsetDateTime, admitted_at: OffsetDateTime, admitted: Instant) -> Self {
        Self { started_at, admitted_at, admitted }
    }

    /// Database time of a local moment. Never before the start of the run, even if the clock of the server was set back
    /// between two attempts: an item that a run observed is not missing from it.
    #[must_use]
    pub fn at(&self, moment: Instant) -> OffsetDateTime {
        (self.admitted_at + moment.saturating_duration_since(self.admitted)).max(self.started_at)
    }
}

/// Liveness signal of a loop.
#[derive(Debug)]
pub struct Heartbeat {
    /// Tokio's clock, so that tests can pause it.
    start: tokio::time::Instant,
    last_ms: AtomicU64,
}

impl Default for Heartbeat {
    /// A heartbeat whose first beat is now.
    fn default() -> Self {
        Self { start: tokio::time::Instant::now(), last_ms: AtomicU64::new(0) }
    }
}

impl Heartbeat {
    /// Records one iteration of the loop.
    pub fn beat(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Time since the last beat.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed)))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadline_is_measured_from_its_start() {
        let start = Instant::now();
        let deadline = Deadline::from_start(start, Duration::from_secs(5));
        assert_eq!(deadline.instant(), start + Duration::from_secs(5));
        assert!(!deadline.passed() && deadline.remaining() <= Duration::from_secs(5));
        let passed = Deadline::from_start(start, Duration::ZERO);
        assert!(passed.passed() && passed.remaining().is_zero());
        assert!(!Deadline::after(Duration::MAX).passed(), "a huge duration does not overflow");
    }

    #[test]
    fn observations_are_dated_by_the_database_and_never_before_the_run() {
        let (started_at, admitted) = (OffsetDateTime::UNIX_EPOCH, Instant::now());
        let second = Duration::from_secs(1);
        let clock = ObservationClock::new(started_at, started_at + second, admitted);
        assert_eq!(clock.at(admitted + 2 * second), started_at + 3 * second);
        let set_back = ObservationClock::new(started_at, started_at - 10 * second, admitted);
        assert_eq!(set_back.at(admitted + 2 * second), started_at);
        assert_eq!(set_back.at(admitted + 11 * second), started_at + second);
    }
}
