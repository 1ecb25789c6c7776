//! Exponential backoff with jitter, for every module that retries.
//!
//! The `backoff` crate is unmaintained (RUSTSEC-2025-0012). Only its arithmetic is used, and only here, so that it can
//! be replaced without a change elsewhere.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff;

/// Waits of one retried operation: each twice as long as the one before, up to a maximum.
#[derive(Debug)]
pub struct Waits(ExponentialBackoff);

impl Waits {
    /// Waits that start at `first` and never exceed `max`.
    pub fn new(first: Duration, max: Duration) -> Self {
        Self(ExponentialBackoff {
            current_interval: first,
            initial_interval: first,
            // The crate's jitter would blur the bounds; `full_jitter` adds it where it is wanted.
            randomization_factor: 0.0,
            multiplier: 2.0,
            max_interval: max,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        })
    }

    /// Returns the next wait, without jitter.
    pub fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval).min(self.0.max_interval)
    }
}

/// Random duration between zero and `max`, which spreads retries of operations that failed together.
#[expect(clippy::disallowed_methods, reason = "the one place for randomness")]
pub fn full_jitter(max: Duration) -> Duration {
    max.mul_f64(rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum() {
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(3));
        let seen: Vec<u128> = (0..5).map(|_| waits.next_wait().as_millis()).collect();
        assert_eq!(seen, [500, 1_000, 2_000, 3_000, 3_000]);
    }

    #[test]
    fn jitter_stays_between_zero_and_its_maximum() {
        let most = Duration::from_secs(2);
        let drawn: Vec<Duration> = (0..1_000).map(|_| full_jitter(most)).collect();
        assert!(drawn.iter().all(|wait| *wait <= most));
        assert!(drawn.iter().any(|wait| *wait < most / 4) && drawn.iter().any(|wait| *wait > most * 3 / 4));
        assert_eq!(full_jitter(Duration::ZERO), Duration::ZERO);
    }
}
