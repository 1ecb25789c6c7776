//! Time that this process may judge by itself: monotonic only. Time of record comes from the database.

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
