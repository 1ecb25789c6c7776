//! Budget of one run (deadline and throttle wait) and the counters of what it has used.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::domain::clock::Deadline;
use crate::domain::run::GraphUsage;

/// Limits of one run, or of one attempt of it.
#[derive(Debug, Clone, Copy)]
pub struct RunBudget {
    /// End of the run.
    pub deadline: Deadline,
    /// Total time that the run may still wait because of throttling. An attempt that continues a run passes what
    /// the attempts before it have left over; zero fails the first throttled request without a wait.
    pub throttle_budget: Duration,
}

/// Usage of one run, shared by its concurrent lists.
#[derive(Debug)]
pub(in crate::graph) struct BudgetTracker {
    pub(in crate::graph) deadline: Deadline,
    waits: Mutex<ReservedWaits>,
    requests: AtomicI64,
    throttled: AtomicI64,
    select_refused: AtomicI64,
    retry_after_s: AtomicI64,
}

#[derive(Debug)]
struct ReservedWaits {
    budget: Duration,
    spent: Duration,
    reserved_until: Option<Instant>,
}

impl BudgetTracker {
    pub(in crate::graph) fn new(budget: RunBudget) -> Self {
        let waits = ReservedWaits { budget: budget.throttle_budget, spent: Duration::ZERO, reserved_until: None };
        Self {
            deadline: budget.deadline,
            waits: Mutex::new(waits),
            requests: AtomicI64::new(0),
            throttled: AtomicI64::new(0),
            select_refused: AtomicI64::new(0),
            retry_after_s: AtomicI64::new(0),
        }
    }

    /// Counts one request.
    pub(in crate::graph) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one throttled response.
    pub(in crate::graph) fn count_throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one list that was requested again without its query options.
    pub(in crate::graph) fn count_options_refused(&self) {
        self.select_refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps the remaining pause of a list that was given up; the longest is reported.
    pub(in crate::graph) fn record_retry_after(&self, wait: Duration) {
        let seconds = i64::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(i64::MAX);
        self.retry_after_s.fetch_max(seconds.max(1), Ordering::Relaxed);
    }

    /// Reserves a wait that begins now and returns the part of it that no other list has reserved. `None` if it
    /// exceeds the deadline or the budget. Waits of several lists that overlap count once: the time passes once.
    pub(in crate::graph) fn reserve_wait(&self, wait: Duration) -> Option<Duration> {
        if wait >= self.deadline.remaining() { None } else { self.reserve_wait_at(Instant::now(), wait) }
    }

    fn reserve_wait_at(&self, now: Instant, wait: Duration) -> Option<Duration> {
        let mut waits = self.waits.lock();
        let from = waits.reserved_until.map_or(now, |until| until.max(now));
        let new = (now + wait).saturating_duration_since(from);
        if waits.spent + new > waits.budget {
            return None;
        }
        waits.spent += new;
        waits.reserved_until = Some(from + new);
        Some(new)
    }

    pub(in crate::graph) fn usage(&self) -> GraphUsage {
        let waited = self.waits.lock().spent;
        GraphUsage {
            graph_requests_count: self.requests.load(Ordering::Relaxed),
            graph_throttled_count: self.throttled.load(Ordering::Relaxed),
            graph_throttle_wait_ms: i64::try_from(waited.as_millis()).unwrap_or(i64::MAX),
            graph_select_refused_count: self.select_refused.load(Ordering::Relaxed),
            items_unclassified_count: 0,
        }
    }

    pub(in crate::graph) fn retry_after_s(&self) -> Option<i32> {
        let seconds = self.retry_after_s.load(Ordering::Relaxed);
        (seconds > 0).then(|| i32::try_from(seconds).unwrap_or(i32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(deadline_s: u64, budget_s: u64) -> BudgetTracker {
        let seconds = Duration::from_secs;
        let budget = RunBudget { deadline: Deadline::after(seconds(deadline_s)), throttle_budget: seconds(budget_s) };
        BudgetTracker::new(budget)
    }

    #[test]
    fn overlapping_waits_are_counted_once() {
        let (tracker, start) = (tracker(600, 20), Instant::now());
        let reserve = |at_s, wait_s| {
            let new = tracker.reserve_wait_at(start + Duration::from_secs(at_s), Duration::from_secs(wait_s));
            new.map(|new| new.as_secs())
        };
        assert_eq!(reserve(0, 10), Some(10));
        assert_eq!(reserve(0, 10), Some(0));
        assert_eq!(reserve(0, 15), Some(5));
        assert_eq!(reserve(0, 30), None, "exceeds the budget");
        assert_eq!(reserve(20, 5), Some(5), "the reserved time has passed");
        assert_eq!(reserve(20, 6), None, "the budget is spent");
        assert_eq!(tracker.usage().graph_throttle_wait_ms, 20_000);
    }

    #[test]
    fn a_spent_budget_allows_no_wait() {
        assert_eq!(tracker(600, 0).reserve_wait(Duration::from_millis(1)), None);
    }

    #[test]
    fn no_wait_reaches_past_the_deadline() {
        assert_eq!(tracker(5, 100).reserve_wait(Duration::from_secs(6)), None);
        assert!(tracker(5, 100).reserve_wait(Duration::from_secs(4)).is_some());
    }

    #[test]
    fn the_longest_retry_after_is_kept_and_rounded_up() {
        let tracker = tracker(5, 100);
        assert_eq!(tracker.retry_after_s(), None);
        tracker.record_retry_after(Duration::from_millis(40_200));
        tracker.record_retry_after(Duration::from_secs(3));
        assert_eq!(tracker.retry_after_s(), Some(41));
    }
}
