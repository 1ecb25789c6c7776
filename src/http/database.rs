//! Bounded waits for the database, which name the cause of a failure also when it is slower than the wait.

use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{interval, timeout};

use super::Source;

/// Longest wait for the database before a probe is answered without it; below common probe timeouts.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(800);
/// Longest wait for the cause of a failure: a login over a slow network takes several round trips.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// Failure of the latest probe of the database, which no request waits for.
#[derive(Debug, Default)]
pub(super) struct DatabaseProbe {
    failure: Mutex<Option<String>>,
}

impl DatabaseProbe {
    /// Probes the database again and again; never returns.
    pub(super) async fn run(&self, source: &dyn Source) {
        let mut tick = interval(PROBE_INTERVAL);
        loop {
            tick.tick().await;
            *self.failure.lock() = timeout(PROBE_TIMEOUT, source.ping()).await.ok().and_then(Result::err);
        }
    }

    /// Awaits an answer of the database for a short time.
    pub(super) async fn in_time<T>(&self, answer: BoxFuture<'_, Result<T, String>>) -> Result<T, String> {
        timeout(RESPONSE_TIMEOUT, answer).await.unwrap_or_else(|_| {
            let late = format!("no response within {} ms", RESPONSE_TIMEOUT.as_millis());
            Err(match &*self.failure.lock() {
                Some(cause) => format!("{late}; the latest attempt failed: {cause}"),
                None => late,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::super::{Backlog, Consumption, Problem};
    use super::*;

    /// A daemon whose database refuses each login after a second.
    struct SlowRefusal;

    impl Source for SlowRefusal {
        fn consumption(&self) -> Consumption {
            Consumption::default()
        }

        fn graph(&self) -> Vec<Problem> {
            Vec::new()
        }

        fn ping(&self) -> BoxFuture<'_, Result<(), String>> {
            async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Err("password authentication failed".to_owned())
            }
            .boxed()
        }

        fn backlog(&self) -> BoxFuture<'_, Result<Backlog, String>> {
            async { Err("not asked for".to_owned()) }.boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_slower_than_the_wait_is_named_all_the_same() {
        let probe = DatabaseProbe::default();
        let first = probe.in_time(SlowRefusal.ping()).await.unwrap_err();
        assert_eq!(first, "no response within 800 ms", "nothing is known yet");
        tokio::select! {
            () = probe.run(&SlowRefusal) => {}
            () = tokio::time::sleep(Duration::from_secs(2)) => {}
        }
        let named = probe.in_time(SlowRefusal.ping()).await.unwrap_err();
        assert_eq!(named, "no response within 800 ms; the latest attempt failed: password authentication failed");
    }
}
