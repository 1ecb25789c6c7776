//! Time that this process may judge by itself: monotonic only. Time of record comes from the database.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seconds since 1970 by this host's clock: only for what a token says of its own beginning and end, because the
/// token service speaks of nothing else, and for a person to read on a dead letter.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "nothing of ours is dated or decided by it")]
pub fn wall_clock_unix_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// A moment on the monotonic clock after which an undertaking must have stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `after` from now.
    #[must_use]
    pub fn after(after: Duration) -> Self {
        Self::from_start(Instant::now(), after)
    }

    /// The deadline `after` from a moment that was taken earlier.
    ///
    /// A lease is counted from before the statement that granted it was sent: counted from its answer, this
    /// process could believe in a lease that the database has already given away.
    #[must_use]
    pub fn from_start(start: Instant, after: Duration) -> Self {
        Self(start + after)
    }

    /// What is left, zero once it has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// The moment itself, for timers.
    #[must_use]
    pub fn instant(self) -> Instant {
        self.0
    }
}

/// The proof that a loop still turns.
#[derive(Debug)]
pub struct Heartbeat {
    /// Tokio's clock, so that tests can pause it.
    start: tokio::time::Instant,
    last_ms: AtomicU64,
}

impl Default for Heartbeat {
    /// It beats for the first time.
    fn default() -> Self {
        Self { start: tokio::time::Instant::now(), last_ms: AtomicU64::new(0) }
    }
}

impl Heartbeat {
    /// The loop has come round.
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
    fn a_deadline_counts_from_its_start_and_passes() {
        let start = Instant::now();
        let deadline = Deadline::from_start(start, Duration::from_secs(5));
        assert_eq!(deadline.instant(), start + Duration::from_secs(5));
        assert!(!deadline.passed() && deadline.remaining() <= Duration::from_secs(5));
        let passed = Deadline::from_start(start, Duration::ZERO);
        assert!(passed.passed() && passed.remaining().is_zero());
    }
}
