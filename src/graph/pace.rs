//! Staying under a documented limit of Graph: so many requests in any window, and never all of them in one moment.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::telemetry;

/// What a window allows goes out in this part of it at the soonest; the rest of it is a wait.
const HASTE: f64 = 5.0;
/// At most this part of what a window allows goes out in one moment.
const BURST_PART: f64 = 20.0;
/// What is sent within so short a time is counted together.
const SLOT: Duration = Duration::from_millis(100);
/// Requests overtake one another on their way: Graph may see them so much closer together than we do.
const OVERTAKING: Duration = Duration::from_millis(250);
/// A request that passes at once takes less.
const WORTH_COUNTING: Duration = Duration::from_millis(1);

/// So many requests in so long a window; 0 is no limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) most: u32,
    pub(super) window: Duration,
}

/// This replica's part of the share of a limit that we allow ourselves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    /// The fastest that requests may follow one another.
    pub(super) speed: Quota,
    /// Requests in any window. So few that they go one by one need no counting: their speed is the limit.
    pub(super) in_window: Option<u32>,
    window: Duration,
}

impl Limit {
    /// What is ours of it, if there is a limit at all.
    pub(super) fn allowance(self, share: f64, replicas: u32) -> Option<Allowance> {
        let ours = f64::from(self.most) / f64::from(replicas.max(1)) * share;
        if ours <= 0.0 {
            return None;
        }
        let counted = ours >= BURST_PART;
        let fastest = if counted { ours * HASTE } else { ours };
        let burst = NonZeroU32::new(whole(ours / BURST_PART).max(1))?;
        let speed = Quota::with_period(self.window.div_f64(fastest))?.allow_burst(burst);
        Some(Allowance { speed, in_window: counted.then(|| whole(ours)), window: self.window })
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is a part of a u32")]
fn whole(requests: f64) -> u32 {
    requests.floor() as u32
}

/// The pace of one tenant and family.
#[derive(Debug)]
pub(super) struct Pace {
    current: Mutex<Option<(Allowance, Arc<DefaultDirectRateLimiter>)>>,
    /// Held by whoever is next, so that requests go in the order in which they came.
    sent: tokio::sync::Mutex<Sent>,
}

impl Pace {
    /// A pace by `allowance`. Before `born` another process may have asked the same tenant.
    pub(super) fn new(allowance: Option<Allowance>, born: Instant) -> Self {
        let sent = allowance.map(|allowance| Sent::by_a_predecessor(allowance, born)).unwrap_or_default();
        let pace = Self { current: Mutex::default(), sent: tokio::sync::Mutex::new(sent) };
        pace.set(allowance);
        pace
    }

    /// Changes the allowance from now on; what was sent stays counted.
    pub(super) fn set(&self, allowance: Option<Allowance>) {
        let pace = allowance.map(|allowance| (allowance, Arc::new(RateLimiter::direct(allowance.speed))));
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = pace;
    }

    /// Waits for the turn of one request.
    pub(super) async fn turn(&self) {
        let came = Instant::now();
        let mut sent = self.sent.lock().await;
        while let Err(wait) = self.take(&mut sent) {
            tokio::time::sleep(wait).await;
        }
        drop(sent);
        let waited = came.elapsed();
        if waited >= WORTH_COUNTING {
            telemetry::graph_rate_limit_wait(waited);
        }
    }

    /// Takes the turn of one request, or says how long that has to wait at least.
    fn take(&self, sent: &mut Sent) -> Result<(), Duration> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((allowance, speed)) = current else { return Ok(()) };
        let now = Instant::now();
        if let Some(wait) = allowance.in_window.and_then(|most| sent.full_for(most, allowance.window, now)) {
            return Err(wait);
        }
        if let Err(too_early) = speed.check() {
            return Err(too_early.wait_time_from(DefaultClock::default().now()));
        }
        sent.count(now);
        Ok(())
    }
}

/// What was sent within the last window.
#[derive(Debug, Default)]
struct Sent {
    /// When each slot began, and what was sent in it.
    slots: VecDeque<(Instant, u32)>,
    all: u32,
}

impl Sent {
    /// What the process before this one may have sent until `born`, at an even pace and with a burst to spare: a daemon
    /// that is replaced does not take the same window twice.
    fn by_a_predecessor(allowance: Allowance, born: Instant) -> Self {
        let mut sent = Self::default();
        let begin = born.checked_sub(counts_for(allowance.window));
        let (Some(begin), Some(most)) = (begin, allowance.in_window) else { return sent };
        let most = most - allowance.speed.burst_size().get();
        let step = allowance.window / most.max(1);
        for number in 0..most {
            sent.count(begin + step * number);
        }
        sent
    }

    fn count(&mut self, now: Instant) {
        self.all += 1;
        match self.slots.back_mut() {
            Some((begun, count)) if now < *begun + SLOT => *count += 1,
            _ => self.slots.push_back((now, 1)),
        }
    }

    /// How long a window is still full that allows `most`.
    fn full_for(&mut self, most: u32, window: Duration, now: Instant) -> Option<Duration> {
        let counts_for = counts_for(window);
        while let Some((_, count)) = self.slots.pop_front_if(|(begun, _)| *begun + counts_for <= now) {
            self.all -= count;
        }
        let (oldest, _) = self.slots.front()?;
        (self.all >= most).then(|| (*oldest + counts_for).saturating_duration_since(now))
    }
}

/// How long a slot is counted from its beginning.
fn counts_for(window: Duration) -> Duration {
    SLOT + window + OVERTAKING
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTUNE: Limit = Limit { most: 1_000, window: Duration::from_secs(20) };

    /// When so many requests go out, one after the other as soon as they may, from the first on.
    fn greedy(requests: usize, allowance: Allowance, mut sent: Sent) -> Vec<Duration> {
        let begun = Instant::now();
        let (limiter, mut times) = (allowance.speed.replenish_interval(), Vec::with_capacity(requests));
        let mut after = Duration::ZERO;
        while times.len() < requests {
            let now = begun + after;
            match allowance.in_window.and_then(|most| sent.full_for(most, allowance.window, now)) {
                Some(wait) => after += wait,
                None => {
                    sent.count(now);
                    times.push(after);
                    after += limiter;
                }
            }
        }
        times
    }

    /// The most that any window holds.
    fn fullest(arrivals: &[Duration], window: Duration) -> usize {
        let counts = (0..arrivals.len()).map(|first| {
            let end = arrivals[first] + window;
            arrivals[first..].partition_point(|arrival| *arrival < end)
        });
        counts.max().unwrap_or_default()
    }

    #[test]
    fn no_window_holds_more_than_the_limit() {
        for (share, replicas) in [(0.8, 1), (1.0, 1), (1.0, 3), (0.5, 2), (0.01, 7), (0.8, 900)] {
            let allowance = INTUNE.allowance(share, replicas).unwrap();
            let one = match allowance.in_window {
                Some(most) => {
                    let mut arrivals = greedy(4_000, allowance, Sent::default());
                    // Some need longer to Graph than others.
                    arrivals.iter_mut().for_each(|sent| *sent += OVERTAKING.mul_f64(rand::random::<f64>()));
                    arrivals.sort();
                    assert_eq!(fullest(&arrivals, INTUNE.window), most as usize, "{share} {replicas}");
                    f64::from(most)
                }
                None => 1.0 + INTUNE.window.div_duration_f64(allowance.speed.replenish_interval()),
            };
            assert!(one * f64::from(replicas) <= 1_000.0 + f64::from(replicas), "{share} {replicas}: {one}");
        }
    }

    #[test]
    fn a_window_is_spent_at_once_and_the_next_begins_when_graph_forgets_it() {
        let sent = greedy(5_000, INTUNE.allowance(1.0, 1).unwrap(), Sent::default());
        assert!(sent[999] <= Duration::from_secs(4), "{:?}", sent[999]);
        // Before 80 s a fifth thousand is not allowed; a pace without haste would need 100.
        assert!(sent[4_000] >= Duration::from_secs(80) && sent[4_999] < Duration::from_secs(86), "{:?}", sent[4_999]);
    }

    #[test]
    fn a_process_that_replaces_another_begins_at_an_even_pace() {
        let allowance = INTUNE.allowance(0.8, 1).unwrap();
        let begun = Instant::now();
        let sent = greedy(800, allowance, Sent::by_a_predecessor(allowance, begun));
        let within = |time: Duration| sent.iter().filter(|after| **after < time).count();
        for (seconds, most) in [(1, 80), (5, 240), (10, 440), (15, 640)] {
            let (sent, even) = (within(Duration::from_secs(seconds)), most - 60);
            assert!((even..=most).contains(&sent), "{sent} in {seconds} s");
        }
        // A tenant that is first asked when the process is old enough has its window.
        let later = Sent::by_a_predecessor(allowance, begun.checked_sub(Duration::from_secs(30)).unwrap());
        assert!(greedy(800, allowance, later)[799] <= Duration::from_secs(4));
    }

    #[test]
    fn what_was_sent_counts_under_a_new_allowance() {
        let mut sent = Sent::default();
        let now = Instant::now();
        (0..500).for_each(|_| sent.count(now));
        let in_window = |replicas| INTUNE.allowance(1.0, replicas).unwrap().in_window.unwrap();
        assert_eq!(sent.full_for(in_window(1), INTUNE.window, now), None);
        let forgotten = counts_for(INTUNE.window);
        assert_eq!(sent.full_for(in_window(2), INTUNE.window, now), Some(forgotten));
        assert_eq!(sent.full_for(in_window(2), INTUNE.window, now + forgotten), None);
        assert_eq!(sent.all, 0);
    }

    #[test]
    fn conditional_access_is_asked_one_by_one_and_no_limit_is_no_pace() {
        let allowance = Limit { most: 1, window: Duration::from_secs(1) }.allowance(0.8, 1).unwrap();
        let speed = allowance.speed;
        assert_eq!((speed.burst_size().get(), speed.replenish_interval()), (1, Duration::from_millis(1_250)));
        assert!(allowance.in_window.is_none());
        assert!(Limit { most: 0, ..INTUNE }.allowance(0.8, 1).is_none());
    }

    #[tokio::test]
    async fn turns_come_at_the_pace_in_the_order_of_arrival() {
        // 40 a second, of which two may go at once.
        let limit = Limit { most: 40, window: Duration::from_secs(5) };
        let pace = Pace::new(limit.allowance(1.0, 1), Instant::now().checked_sub(limit.window).unwrap());
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
        assert!(took >= Duration::from_millis(245) && took < Duration::from_millis(600), "{took:?}");
        assert!(order.lock().unwrap().is_sorted());
    }
}
