//! `inventoryd serve`: the daemon, until it is told to stop.

use std::pin::pin;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

use super::{CliError, Context, Outcome};
use crate::daemon::Daemon;
use crate::run::Stop;
use crate::telemetry;

/// Run the daemon: take requests from the queue until told to stop
///
/// SIGTERM or SIGINT: take nothing new, give what is in hand consumer.drain_s seconds, hand the rest back, end with 0.
/// The second one hands back at once, the third ends the process. SIGUSR1 takes nothing new until it is sent again.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) async fn run(_: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let traces = telemetry::init_logs_and_traces(&config.telemetry).map_err(CliError::Failed)?;
    let metrics = config.http.listen.map(|_| telemetry::init_metrics()).transpose().map_err(CliError::Failed)?;
    // Before anything is started: a signal that comes early must not kill it half way.
    let mut signals = Signals::new()?;
    let daemon = tokio::select! {
        started = Daemon::start(config, metrics) => started.map_err(|error| CliError::Failed(error.to_string()))?,
        () = signals.stop() => {
            info!("told to stop before everything had started");
            return Ok(Outcome::Done);
        }
    };
    let stop = daemon.stop();
    let mut ended = pin!(daemon.stopped());
    let mut told = 0;
    loop {
        tokio::select! {
            () = &mut ended => break,
            asked = signals.next() => {
                told += u32::from(asked == Asked::Stop);
                if !obey(asked, told, &stop) {
                    let what = "ended at the third signal; the broker hands out again what was in hand";
                    return Err(CliError::Failed(what.to_owned()));
                }
            }
        }
    }
    traces.flush().await;
    if told > 0 {
        Ok(Outcome::Done)
    } else {
        Err(CliError::Failed("the daemon ended by itself; its log says why".to_owned()))
    }
}

/// Does what a signal asks for, the `told`th to stop; false if that is to end at once.
fn obey(asked: Asked, told: u32, stop: &Stop) -> bool {
    match (asked, told) {
        (Asked::Quiet, _) => {
            stop.quiet.send_modify(|quiet| *quiet = !*quiet);
            info!(quiet = *stop.quiet.borrow(), "told to take nothing new, or to go on");
        }
        (Asked::Stop, 1) => {
            info!("stopping: nothing new is taken, what is in hand may end");
            stop.drain.cancel();
        }
        (Asked::Stop, 2) => {
            info!("stopping now: what is in hand is handed back");
            stop.abort.cancel();
        }
        (Asked::Stop, _) => return false,
    }
    true
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Stop,
    Quiet,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    user: Signal,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen =
            |kind| signal(kind).map_err(|error| CliError::Failed(format!("can't listen for signals: {error}")));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            user: listen(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.user.recv() => Asked::Quiet,
        }
    }

    async fn stop(&mut self) {
        while self.next().await != Asked::Stop {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signal_is_more_urgent_than_the_one_before() {
        let stop = Stop::default();
        assert!(obey(Asked::Stop, 1, &stop) && stop.drain.is_cancelled() && !stop.abort.is_cancelled());
        assert!(obey(Asked::Stop, 2, &stop) && stop.abort.is_cancelled());
        assert!(!obey(Asked::Stop, 3, &stop));
    }

    #[test]
    fn quiet_is_switched_on_and_off_and_stops_nothing() {
        let stop = Stop::default();
        for expected in [true, false] {
            assert!(obey(Asked::Quiet, 0, &stop));
            assert_eq!(*stop.quiet.borrow(), expected);
        }
        assert!(!stop.drain.is_cancelled());
    }
}
