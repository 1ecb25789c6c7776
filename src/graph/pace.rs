//! A steady pace under a documented limit of Graph.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::telemetry;

/// A burst is at most this part of a window's requests.
const BURST_PART: f64 = 20.0;

/// A request that passes at once takes less.
const WORTH_COUNTING: Duration = Duration::from_millis(1);

/// So many requests in so long a window; 0 is no limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) most: u32,
    pub(super) window: Duration,
}

impl Limit {
    /// This replica's pace: its part of the share that we allow ourselves, with a small burst at the beginning.
    pub(super) fn quota(self, share: f64, replicas: u32) -> Option<Quota> {
        let whole = f64::from(self.most) / f64::from(replicas.max(1));
        let ours = whole * share;
        let burst = (ours / BURST_PART).floor().max(1.0);
        // Graph counts a burst and what follows it in the same window: together they must fit.
        let steady = if burst > 1.0 { ours.min(whole - burst) } else { ours };
        if steady <= 0.0 {
            return None;
        }
        // The burst is a small whole number by now.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is between 1 and u32::MAX / 20"
        )]
        let burst = NonZeroU32::new(burst as u32)?;
        Quota::with_period(self.window.div_f64(steady)).map(|quota| quota.allow_burst(burst))
    }
}

/// The pace of one tenant and family.
#[derive(Debug)]
pub(super) struct Pace {
    limiter: Mutex<Option<Arc<DefaultDirectRateLimiter>>>,
    /// Held by whoever is next, so that requests go in the order in which they came.
    next: tokio::sync::Mutex<()>,
}

impl Pace {
    pub(super) fn new(quota: Option<Quota>) -> Self {
        let pace = Self { limiter: Mutex::default(), next: tokio::sync::Mutex::default() };
        pace.set(quota);
        pace
    }

    /// Changes the pace from now on.
    pub(super) fn set(&self, quota: Option<Quota>) {
        let limiter = quota.map(|quota| Arc::new(RateLimiter::direct(quota)));
        *self.limiter.lock().unwrap_or_else(PoisonError::into_inner) = limiter;
    }

    fn limiter(&self) -> Option<Arc<DefaultDirectRateLimiter>> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the turn of one request.
    pub(super) async fn turn(&self) {
        let came = Instant::now();
        let _next = self.next.lock().await;
        while let Some(limiter) = self.limiter() {
            let Err(too_early) = limiter.check() else { break };
            tokio::time::sleep(too_early.wait_time_from(DefaultClock::default().now())).await;
        }
        let waited = came.elapsed();
        if waited >= WORTH_COUNTING {
            telemetry::graph_pace_wait(waited);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTUNE: Limit = Limit { most: 1_000, window: Duration::from_secs(20) };

    /// What fits into a window at worst: the burst, and everything that is replenished meanwhile.
    fn worst_window(limit: Limit, quota: Quota) -> f64 {
        f64::from(quota.burst_size().get()) + limit.window.div_duration_f64(quota.replenish_interval())
    }

    #[test]
    fn no_window_holds_more_than_the_limit() {
        for (share, replicas) in [(0.8, 1), (1.0, 1), (1.0, 3), (0.5, 2), (0.01, 7), (0.8, 900)] {
            let quota = INTUNE.quota(share, replicas).unwrap();
            let all = worst_window(INTUNE, quota) * f64::from(replicas);
            assert!(all <= 1_000.0 + f64::from(replicas), "{share} {replicas}: {all}");
        }
        let steady = INTUNE.quota(0.8, 1).unwrap();
        assert_eq!((steady.burst_size().get(), steady.replenish_interval()), (40, Duration::from_millis(25)));
    }

    #[test]
    fn conditional_access_is_asked_one_by_one_and_no_limit_is_no_pace() {
        let quota = Limit { most: 1, window: Duration::from_secs(1) }.quota(0.8, 1).unwrap();
        assert_eq!((quota.burst_size().get(), quota.replenish_interval()), (1, Duration::from_millis(1_250)));
        assert!(Limit { most: 0, ..INTUNE }.quota(0.8, 1).is_none());
    }

    #[tokio::test]
    async fn turns_come_at_the_pace_in_the_order_of_arrival() {
        let quota = Quota::with_period(Duration::from_millis(20)).unwrap().allow_burst(NonZeroU32::new(2).unwrap());
        let pace = Pace::new(Some(quota));
        let order = Mutex::new(Vec::new());
        let begun = Instant::now();
        let turns = (0..12).map(|number| {
            let (pace, order) = (&pace, &order);
            async move {
                pace.turn().await;
                order.lock().unwrap().push(number);
            }
        });
        futures_util::future::join_all(turns).await;
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(195) && took < Duration::from_millis(600), "{took:?}");
        assert!(order.lock().unwrap().is_sorted());
    }
}
