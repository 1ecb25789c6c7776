//! Concurrency limit of one tenant, adjusted by additive increase and multiplicative decrease (AIMD).

use std::pin::pin;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

/// Upper bound, above the number of lists that are commonly read of one tenant at once: without throttling no request waits.
const MAX_LIMIT: usize = 32;
/// Successful responses that raise the limit by one.
const SUCCESSES_PER_STEP: usize = 16;

/// Number of requests of a tenant that may be in flight at once.
#[derive(Debug, Default)]
pub(super) struct ConcurrencyLimit {
    state: Mutex<State>,
    released: Notify,
}

#[derive(Debug)]
struct State {
    in_flight: usize,
    limit: usize,
    successes: usize,
    /// Number of times the limit was halved. Only a request sent in the current epoch may halve it again.
    epoch: u64,
}

impl Default for State {
    fn default() -> Self {
        Self { in_flight: 0, limit: MAX_LIMIT, successes: 0, epoch: 0 }
    }
}

/// Right to have one request in flight, until it is dropped.
pub(super) struct Permit {
    limit: Arc<ConcurrencyLimit>,
    epoch: u64,
}

impl ConcurrencyLimit {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Waits for a permit.
    pub(super) async fn acquire(self: &Arc<Self>) -> Permit {
        loop {
            let mut released = pin!(self.released.notified());
            // Registers before the check below, so that a release between check and wait is not missed.
            released.as_mut().enable();
            if let Some(permit) = self.try_acquire() {
                return permit;
            }
            released.await;
        }
    }

    fn try_acquire(self: &Arc<Self>) -> Option<Permit> {
        let mut state = self.state();
        if state.in_flight >= state.limit {
            return None;
        }
        state.in_flight += 1;
        Some(Permit { limit: Arc::clone(self), epoch: state.epoch })
    }
}

impl Permit {
    /// Records a successful response.
    pub(super) fn succeeded(&self) {
        let mut state = self.limit.state();
        state.successes += 1;
        if state.successes >= SUCCESSES_PER_STEP && state.limit < MAX_LIMIT {
            state.successes = 0;
            state.limit += 1;
            self.limit.released.notify_one();
        }
    }

    /// Records a throttled response.
    pub(super) fn throttled(&self) {
        let mut state = self.limit.state();
        state.successes = 0;
        if state.epoch == self.epoch {
            // Halves what was in flight: halving an unused limit would change nothing.
            state.limit = (state.in_flight.min(state.limit) / 2).max(1);
            state.epoch += 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limit.state().in_flight -= 1;
        self.limit.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn throttling_halves_the_limit_once_and_successes_raise_it_again() {
        let limit = Arc::new(ConcurrencyLimit::default());
        let mut permits: Vec<Permit> = (0..8).map(|_| limit.try_acquire().unwrap()).collect();
        permits.iter().for_each(Permit::throttled);
        assert_eq!(limit.state().limit, 4, "eight requests of one epoch halve it once");
        permits.truncate(3);
        permits.push(limit.try_acquire().unwrap());
        assert!(limit.try_acquire().is_none());
        permits[3].throttled();
        assert_eq!(limit.state().limit, 2);
        for _ in 0..SUCCESSES_PER_STEP * (MAX_LIMIT + 5) {
            permits[0].succeeded();
        }
        assert_eq!(limit.state().limit, MAX_LIMIT);
        drop(permits);
        assert_eq!(limit.state().in_flight, 0);
    }

    #[test]
    fn a_throttled_response_resets_the_count_of_successes() {
        let limit = Arc::new(ConcurrencyLimit::default());
        let permits: Vec<Permit> = (0..8).map(|_| limit.try_acquire().unwrap()).collect();
        for _ in 0..SUCCESSES_PER_STEP - 1 {
            permits[0].succeeded();
        }
        permits[0].throttled();
        permits[1].succeeded();
        assert_eq!(limit.state().limit, 4, "one success after a 429 must not raise the limit");
    }

    #[tokio::test]
    async fn a_released_permit_wakes_a_waiting_request() {
        let limit = Arc::new(ConcurrencyLimit::default());
        limit.state().limit = 1;
        let first = limit.acquire().await;
        let waiting = tokio::spawn({
            let limit = Arc::clone(&limit);
            async move { drop(limit.acquire().await) }
        });
        tokio::task::yield_now().await;
        drop(first);
        tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    }
}
