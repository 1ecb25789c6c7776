//! What a run may spend on Graph, and what it has spent.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::clock::Deadline;
use crate::domain::run::GraphUsage;

/// What one run may spend on Graph.
#[derive(Debug, Clone, Copy)]
pub struct RunBudget {
    /// When the run must have ended.
    pub deadline: Deadline,
    /// How long it may wait in all because Graph throttles.
    pub throttle_budget: Duration,
}

/// The account of one run, shared by its concurrent lists.
#[derive(Debug)]
pub(super) struct Spending {
    pub(super) deadline: Deadline,
    waits: Mutex<Waits>,
    requests: AtomicI64,
    throttled: AtomicI64,
    select_refused: AtomicI64,
    retry_after_s: AtomicI64,
}

#[derive(Debug)]
struct Waits {
    budget: Duration,
    spent: Duration,
    paid_until: Option<Instant>,
}

impl Spending {
    pub(super) fn new(budget: RunBudget) -> Self {
        Self {
            deadline: budget.deadline,
            waits: Mutex::new(Waits { budget: budget.throttle_budget, spent: Duration::ZERO, paid_until: None }),
            requests: AtomicI64::new(0),
            throttled: AtomicI64::new(0),
            select_refused: AtomicI64::new(0),
            retry_after_s: AtomicI64::new(0),
        }
    }

    /// Counts one request.
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one answer that asked to be left alone.
    pub(super) fn throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one list that was asked for again without `$select`.
    pub(super) fn select_refused(&self) {
        self.select_refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps how long Graph wanted to be left alone when a list was given up; the longest counts.
    pub(super) fn gave_up(&self, wait: Duration) {
        let seconds = i64::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(i64::MAX);
        self.retry_after_s.fetch_max(seconds.max(1), Ordering::Relaxed);
    }

    /// Pays for a wait that begins now and says how much of it was new, or refuses if deadline or budget are too
    /// short. Where the waits of several lists overlap, the time is paid for once: it passes once.
    pub(super) fn pay(&self, wait: Duration) -> Option<Duration> {
        if wait >= self.deadline.remaining() {
            return None;
        }
        let now = Instant::now();
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let from = waits.paid_until.map_or(now, |until| until.max(now));
        let new = (now + wait).saturating_duration_since(from);
        if waits.spent + new > waits.budget {
            return None;
        }
        waits.spent += new;
        waits.paid_until = Some(from + new);
        Some(new)
    }

    pub(super) fn usage(&self) -> GraphUsage {
        let waited = self.waits.lock().unwrap_or_else(PoisonError::into_inner).spent;
        GraphUsage {
            graph_requests_count: self.requests.load(Ordering::Relaxed),
            graph_throttled_count: self.throttled.load(Ordering::Relaxed),
            graph_throttle_wait_ms: i64::try_from(waited.as_millis()).unwrap_or(i64::MAX),
            graph_select_refused_count: self.select_refused.load(Ordering::Relaxed),
            items_unclassified_count: 0,
        }
    }

    pub(super) fn retry_after_s(&self) -> Option<i32> {
        let seconds = self.retry_after_s.load(Ordering::Relaxed);
        (seconds > 0).then(|| i32::try_from(seconds).unwrap_or(i32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spending(deadline_s: u64, budget_s: u64) -> Spending {
        let seconds = Duration::from_secs;
        Spending::new(RunBudget { deadline: Deadline::after(seconds(deadline_s)), throttle_budget: seconds(budget_s) })
    }

    #[test]
    fn waits_that_overlap_are_paid_for_once() {
        let spending = spending(600, 20);
        assert!(spending.pay(Duration::from_secs(10)).is_some());
        assert!(spending.pay(Duration::from_secs(10)).unwrap() < Duration::from_secs(1));
        assert!(spending.pay(Duration::from_secs(15)).unwrap() < Duration::from_secs(6));
        assert_eq!(spending.pay(Duration::from_secs(30)), None, "over the budget");
        assert_eq!(spending.usage().graph_throttle_wait_ms / 1_000, 15);
    }

    #[test]
    fn no_wait_reaches_over_the_deadline() {
        assert_eq!(spending(5, 100).pay(Duration::from_secs(6)), None);
        assert!(spending(5, 100).pay(Duration::from_secs(4)).is_some());
    }

    #[test]
    fn the_longest_wish_is_kept_and_rounded_up() {
        let spending = spending(5, 100);
        assert_eq!(spending.retry_after_s(), None);
        spending.gave_up(Duration::from_millis(40_200));
        spending.gave_up(Duration::from_secs(3));
        assert_eq!(spending.retry_after_s(), Some(41));
    }
}
