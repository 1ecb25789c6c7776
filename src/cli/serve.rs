//! `inventoryd serve`: runs the daemon until it is stopped.

use std::pin::pin;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

use super::{CliError, Context, Outcome};
use crate::daemon::Daemon;
use crate::run::Stop;
use crate::telemetry;

/// Run the daemon: process requests from the queue until stopped
///
/// SIGTERM or SIGINT drains: no new requests are accepted, runs in flight have consumer.drain_s seconds to finish, the
/// rest is requeued, and the exit code is 0. A second signal requeues at once; a third ends the process immediately.
/// SIGUSR1 pauses and resumes the acceptance of requests.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) async fn run(_: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let traces = telemetry::init_logs_and_traces(&config.telemetry).map_err(CliError::Failed)?;
    let metrics = config.http.listen.map(|_| telemetry::init_metrics()).transpose().map_err(CliError::Failed)?;
    // Registered before startup, so that an early signal stops the daemon in order.
    let mut signals = Signals::new()?;
    let daemon = tokio::select! {
        started = Daemon::start(config, metrics) => started.map_err(|error| CliError::Failed(error.to_string()))?,
        () = signals.stop() => {
            info!("stopped during startup");
            return Ok(Outcome::Done);
        }
    };
    let stop = daemon.stop();
    let mut ended = pin!(daemon.stopped());
    let mut count = 0;
    loop {
        tokio::select! {
            () = &mut ended => break,
            received = signals.next() => {
                count += u32::from(received == SignalAction::Stop);
                if !apply(received, count, &stop) {
                    let message = "ended at the third signal; the broker redelivers the messages in flight";
                    return Err(CliError::Failed(message.to_owned()));
                }
            }
        }
    }
    traces.flush().await;
    if count > 0 {
        Ok(Outcome::Done)
    } else {
        Err(CliError::Failed("the daemon ended unexpectedly; see its log for the cause".to_owned()))
    }
}

/// Applies a signal; `count` is the number of stop signals so far. Returns false if the process must end at once.
fn apply(received: SignalAction, count: u32, stop: &Stop) -> bool {
    match (received, count) {
        (SignalAction::TogglePause, _) => {
            stop.paused.send_modify(|paused| *paused = !*paused);
            info!(paused = *stop.paused.borrow(), "SIGUSR1 received: consumption paused or resumed");
        }
        (SignalAction::Stop, 1) => {
            info!("draining: no new requests are accepted; runs in flight may finish");
            stop.drain.cancel();
        }
        (SignalAction::Stop, 2) => {
            info!("aborting: runs in flight are stopped and requeued");
            stop.abort.cancel();
        }
        (SignalAction::Stop, _) => return false,
    }
    true
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SignalAction {
    Stop,
    TogglePause,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    user: Signal,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen =
            |kind| signal(kind).map_err(|error| CliError::Failed(format!("can't install signal handlers: {error}")));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            user: listen(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> SignalAction {
        tokio::select! {
            _ = self.terminate.recv() => SignalAction::Stop,
            _ = self.interrupt.recv() => SignalAction::Stop,
            _ = self.user.recv() => SignalAction::TogglePause,
        }
    }

    async fn stop(&mut self) {
        while self.next().await != SignalAction::Stop {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_signal_drains_second_aborts_third_ends() {
        let stop = Stop::default();
        assert!(apply(SignalAction::Stop, 1, &stop) && stop.drain.is_cancelled() && !stop.abort.is_cancelled());
        assert!(apply(SignalAction::Stop, 2, &stop) && stop.abort.is_cancelled());
        assert!(!apply(SignalAction::Stop, 3, &stop));
    }

    #[test]
    fn sigusr1_toggles_pause_without_stopping() {
        let stop = Stop::default();
        for expected in [true, false] {
            assert!(apply(SignalAction::TogglePause, 0, &stop));
            assert_eq!(*stop.paused.borrow(), expected);
        }
        assert!(!stop.drain.is_cancelled());
    }
}
