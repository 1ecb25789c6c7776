//! Sliding window on top of the generic cell rate algorithm (GCRA), and the part of a limit that it allows.
//!
//! `governor` implements GCRA alone, and with a clock of its own: here both algorithms judge the same moment.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Factor by which requests may exceed the even rate while the window has capacity left.
const BURST_FACTOR: f64 = 5.0;
/// Divisor of the window's capacity that gives the number of requests allowed at the same moment. Limits below it are low:
/// their requests are spaced evenly.
const BURST_DIVISOR: f64 = 20.0;
/// Resolution at which sent requests are counted.
const SLOT: Duration = Duration::from_millis(100);
/// Requests overtake one another in transit: Graph may see two of them closer together by this than they were sent.
const REORDER_MARGIN: Duration = Duration::from_millis(250);
/// Documented limit of Graph: `max` requests in any `window`; 0 means no limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct DocumentedLimit {
    pub(super) max: u32,
    pub(super) window: Duration,
}

/// Part of a documented limit that this replica may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    /// Shortest average interval between two requests.
    interval: Duration,
    /// Requests that may be sent at the same moment.
    burst: u32,
    /// Requests in any window. `None` for a low limit, which the interval alone enforces.
    pub(super) in_window: Option<u32>,
    /// Requests of `in_window` that remain if a predecessor has used the whole share.
    after_restart: u32,
    window: Duration,
    /// Interval between two requests of all replicas together, for a low limit.
    pub(super) between_turns: Option<Duration>,
    /// Time from a response to the next request, for a low limit: Graph has counted a request before it responds, so this
    /// needs no margin.
    pub(super) after_response: Duration,
}

impl DocumentedLimit {
    /// This replica's allowance, or `None` if there is no limit.
    pub(super) fn allowance(self, share: f64, replicas: u32) -> Option<Allowance> {
        let (max, replicas) = (f64::from(self.max), replicas.max(1));
        let fleet = max * share;
        let ours = fleet / f64::from(replicas);
        if ours <= 0.0 {
            return None;
        }
        if fleet < BURST_DIVISOR || ours < 1.0 {
            return Some(self.low_allowance(fleet, replicas));
        }
        let in_window = floor(ours);
        Some(Allowance {
            interval: self.window.div_f64(ours * BURST_FACTOR),
            burst: floor(ours / BURST_DIVISOR).max(1),
            in_window: Some(in_window),
            after_restart: floor((max - fleet) / f64::from(replicas)).min(in_window),
            window: self.window,
            between_turns: None,
            after_response: Duration::ZERO,
        })
    }

    /// Allowance that spaces requests so that no window holds more than `max`, even if they are reordered in transit.
    fn low_allowance(self, fleet: f64, replicas: u32) -> Allowance {
        let between_turns = self.window.div_f64(fleet).max(divide_up(self.window + REORDER_MARGIN, self.max));
        Allowance {
            interval: between_turns * replicas,
            burst: 1,
            in_window: None,
            after_restart: 0,
            window: self.window,
            between_turns: Some(between_turns),
            after_response: divide_up(self.window, self.max),
        }
    }
}

/// Quotient, rounded up: `parts` of them are no shorter than the whole.
fn divide_up(whole: Duration, parts: u32) -> Duration {
    let part = whole / parts;
    if part * parts < whole { part + Duration::from_nanos(1) } else { part }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the value is a fraction of a u32")]
fn floor(requests: f64) -> u32 {
    requests.floor() as u32
}

/// Requests sent within the last window.
#[derive(Debug, Default)]
pub(super) struct SlidingWindow {
    /// Start of each slot with the requests sent in it.
    slots: VecDeque<(Instant, u32)>,
    total: u32,
    /// GCRA's theoretical arrival time: when the burst is available in full again.
    burst_restored: Option<Instant>,
    /// Time before which a low limit allows no request, because of the response to the last one.
    pub(super) not_before: Option<Instant>,
}

impl SlidingWindow {
    /// Counts one request at `now`, or returns the shortest time until it may be sent.
    pub(super) fn try_send(&mut self, allowance: Allowance, now: Instant) -> Result<(), Duration> {
        if let Some(wait) = allowance.in_window.and_then(|max| self.time_until_free(max, allowance.window, now)) {
            return Err(wait);
        }
        let restored = self.burst_restored.map_or(now, |restored| restored.max(now));
        let tolerance = allowance.interval * (allowance.burst - 1);
        let debt = restored.duration_since(now);
        if debt > tolerance {
            return Err(debt - tolerance);
        }
        self.burst_restored = Some(restored + allowance.interval);
        if allowance.in_window.is_some() {
            self.count(now, 1);
        }
        Ok(())
    }

    /// Records a request of a low limit that was sent in a turn of the fleet.
    pub(super) fn sent_in_turn(&mut self, allowance: Allowance, now: Instant) {
        self.burst_restored = Some(now + allowance.interval);
    }

    /// Assumes that the process before this one used its whole share just before `started`: a restarted daemon must not
    /// use the same window twice.
    pub(super) fn of_predecessor(allowance: Allowance, started: Instant) -> Self {
        let mut sent = Self::default();
        match allowance.in_window {
            Some(max) => sent.count(started, max - allowance.after_restart),
            None => sent.burst_restored = Some(started + allowance.interval),
        }
        sent
    }

    fn count(&mut self, now: Instant, requests: u32) {
        self.total += requests;
        match self.slots.back_mut() {
            Some((start, count)) if now < *start + SLOT => *count += requests,
            _ => self.slots.push_back((now, requests)),
        }
    }

    /// Time until a window that allows `max` requests has capacity again, or `None` if it has.
    fn time_until_free(&mut self, max: u32, window: Duration, now: Instant) -> Option<Duration> {
        let counted_for = counted_for(window);
        while let Some((_, count)) = self.slots.pop_front_if(|(start, _)| *start + counted_for <= now) {
            self.total -= count;
        }
        let (oldest, _) = self.slots.front()?;
        (self.total >= max).then(|| (*oldest + counted_for).saturating_duration_since(now))
    }
}

/// Time for which a slot is counted from its start; afterwards no window holds its requests.
pub(super) fn counted_for(window: Duration) -> Duration {
    SLOT + window + REORDER_MARGIN
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backoff::full_jitter;

    const INTUNE: DocumentedLimit = DocumentedLimit { max: 1_000, window: Duration::from_secs(20) };

    /// Send times of `requests` requests, each as soon as the limits allow, from the first one on.
    fn greedy(requests: usize, allowance: Allowance, mut sent: SlidingWindow) -> Vec<Duration> {
        let start = Instant::now();
        let (interval, mut times) = (allowance.interval, Vec::with_capacity(requests));
        let mut after = Duration::ZERO;
        while times.len() < requests {
            let now = start + after;
            match allowance.in_window.and_then(|max| sent.time_until_free(max, allowance.window, now)) {
                Some(wait) => after += wait,
                None => {
                    sent.count(now, 1);
                    times.push(after);
                    after += interval;
                }
            }
        }
        times
    }

    /// Highest number of arrivals in any window.
    fn fullest(arrivals: &[Duration], window: Duration) -> usize {
        let counts = (0..arrivals.len()).map(|first| {
            let end = arrivals[first] + window;
            arrivals[first..].partition_point(|arrival| *arrival < end)
        });
        counts.max().unwrap_or_default()
    }

    #[test]
    fn no_window_exceeds_the_limit() {
        for (share, replicas) in [(0.8, 1), (1.0, 1), (1.0, 3), (0.5, 2), (0.01, 7), (0.8, 900)] {
            let allowance = INTUNE.allowance(share, replicas).unwrap();
            let one = match allowance.in_window {
                Some(max) => {
                    let mut arrivals = greedy(4_000, allowance, SlidingWindow::default());
                    // Some requests take longer to reach Graph than others.
                    arrivals.iter_mut().for_each(|sent| *sent += full_jitter(REORDER_MARGIN));
                    arrivals.sort();
                    assert_eq!(fullest(&arrivals, INTUNE.window), max as usize, "{share} {replicas}");
                    f64::from(max)
                }
                None => 1.0 + INTUNE.window.div_duration_f64(allowance.interval),
            };
            assert!(one * f64::from(replicas) <= 1_000.0 + f64::from(replicas), "{share} {replicas}: {one}");
        }
    }

    #[test]
    fn requests_reordered_by_250_ms_stay_within_the_limit() {
        let allowance = INTUNE.allowance(1.0, 1).unwrap();
        let mut arrivals = greedy(3_000, allowance, SlidingWindow::default());
        // The last requests of the first window arrive late, the first ones of the second window at once.
        arrivals[..1_000].iter_mut().for_each(|sent| *sent += Duration::from_millis(250));
        arrivals.sort();
        assert!(fullest(&arrivals, INTUNE.window) <= 1_000, "{}", fullest(&arrivals, INTUNE.window));
    }

    #[test]
    fn a_window_is_used_early_and_the_next_one_starts_when_graph_forgets_it() {
        let sent = greedy(5_000, INTUNE.allowance(1.0, 1).unwrap(), SlidingWindow::default());
        assert!(sent[999] <= Duration::from_secs(4), "{:?}", sent[999]);
        // Before 80 s a fifth thousand is not allowed; an even rate would need 100 s.
        assert!(sent[4_000] >= Duration::from_secs(80) && sent[4_999] < Duration::from_secs(86), "{:?}", sent[4_999]);
    }

    #[test]
    fn a_restarted_process_leaves_its_predecessor_the_share() {
        let allowance = INTUNE.allowance(0.8, 1).unwrap();
        let sent = greedy(800, allowance, SlidingWindow::of_predecessor(allowance, Instant::now()));
        let within = |time: Duration| sent.iter().filter(|after| **after < time).count();
        assert_eq!((within(Duration::from_secs(2)), within(Duration::from_secs(20))), (200, 200));
        assert_eq!(within(counted_for(INTUNE.window) + Duration::from_secs(4)), 800);
        // A tenant first requested when the process is older than a window has the whole window.
        let before = Instant::now().checked_sub(Duration::from_secs(30)).unwrap();
        assert!(
            greedy(800, allowance, SlidingWindow::of_predecessor(allowance, before))[799] <= Duration::from_secs(4)
        );
    }

    #[test]
    fn sent_requests_stay_counted_under_a_new_allowance() {
        let mut sent = SlidingWindow::default();
        let now = Instant::now();
        sent.count(now, 500);
        let in_window = |replicas| INTUNE.allowance(1.0, replicas).unwrap().in_window.unwrap();
        assert_eq!(sent.time_until_free(in_window(1), INTUNE.window, now), None);
        let forgotten = counted_for(INTUNE.window);
        assert_eq!(sent.time_until_free(in_window(2), INTUNE.window, now), Some(forgotten));
        assert_eq!(sent.time_until_free(in_window(2), INTUNE.window, now + forgotten), None);
        assert_eq!(sent.total, 0);
    }

    #[test]
    fn conditional_access_has_no_burst_and_zero_is_no_limit() {
        let allowance = DocumentedLimit { max: 1, window: Duration::from_secs(1) }.allowance(0.8, 1).unwrap();
        assert_eq!((allowance.burst, allowance.interval), (1, Duration::from_millis(1_250)));
        assert!(allowance.in_window.is_none());
        assert!(DocumentedLimit { max: 0, ..INTUNE }.allowance(0.8, 1).is_none());
    }

    #[test]
    fn a_burst_leaves_at_once_and_the_rest_at_the_rate() {
        // 40 requests a second, of which two may leave at once.
        let allowance = DocumentedLimit { max: 40, window: Duration::from_secs(5) }.allowance(1.0, 1).unwrap();
        let (mut sent, start) = (SlidingWindow::default(), Instant::now());
        let mut now = start;
        for _ in 0..12 {
            while let Err(wait) = sent.try_send(allowance, now) {
                now += wait;
            }
        }
        assert_eq!(now - start, Duration::from_millis(250));
        assert_eq!(sent.try_send(allowance, now), Err(Duration::from_millis(25)));
    }
}
