//! How long to wait before a retry when nobody says how long, for every room that waits.
//!
//! The `backoff` crate is looked after no more (RUSTSEC-2025-0012). Only its arithmetic is used, and only here, so
//! that another one can take its place without a trace.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff;

/// The waits of one request: each twice as long as the one before, up to a bound.
#[derive(Debug)]
pub struct Waits(ExponentialBackoff);

impl Waits {
    /// Waits that begin with `first` and never exceed `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self(ExponentialBackoff {
            current_interval: first,
            initial_interval: first,
            // The crate's own jitter would hide the bounds; ours is put on top where it is wanted.
            randomization_factor: 0.0,
            multiplier: 2.0,
            max_interval: most,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        })
    }

    /// The next wait, without jitter.
    pub fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval).min(self.0.max_interval)
    }
}

/// Anything from nothing to `most`, so that those who were refused together do not come back together.
pub fn full_jitter(most: Duration) -> Duration {
    most.mul_f64(rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_bound() {
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(3));
        let seen: Vec<u128> = (0..5).map(|_| waits.next_wait().as_millis()).collect();
        assert_eq!(seen, [500, 1_000, 2_000, 3_000, 3_000]);
    }

    #[test]
    fn jitter_stays_between_nothing_and_its_bound() {
        let most = Duration::from_secs(2);
        let drawn: Vec<Duration> = (0..1_000).map(|_| full_jitter(most)).collect();
        assert!(drawn.iter().all(|wait| *wait <= most));
        assert!(drawn.iter().any(|wait| *wait < most / 4) && drawn.iter().any(|wait| *wait > most * 3 / 4));
        assert_eq!(full_jitter(Duration::ZERO), Duration::ZERO);
    }
}
