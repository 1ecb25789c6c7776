//! Notifications to systemd (`Type=notify`): readiness, watchdog, status line and stop. Without systemd they have no effect.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::STUCK_AFTER;
use crate::consumer::ConsumerHealth;

/// Interval at which the status is sampled.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Sends notifications until the future is dropped.
pub(super) async fn report(health: &ConsumerHealth, draining: &CancellationToken) {
    let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    let mut samples = interval(SAMPLE_INTERVAL);
    let mut beats = interval(watchdog.map_or(SAMPLE_INTERVAL, |limit| limit / 2));
    let (mut ready, mut stopping, mut said) = (false, false, String::new());
    loop {
        tokio::select! {
            () = draining.cancelled(), if !stopping => {
                stopping = true;
                notify(&[NotifyState::Stopping]);
            }
            _ = beats.tick(), if watchdog.is_some() => {
                if health.heartbeat().age() <= STUCK_AFTER {
                    notify(&[NotifyState::Watchdog]);
                }
            }
            _ = samples.tick() => {
                if !ready && health.subscribed() {
                    ready = true;
                    notify(&[NotifyState::Ready]);
                }
                let status = status(health);
                if status != said {
                    set_status(&status);
                    said = status;
                }
            }
        }
    }
}

/// Sets the status line of `systemctl status`.
pub(super) fn set_status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

fn status(health: &ConsumerHealth) -> String {
    let doing = match (health.paused(), health.problem()) {
        (Some(paused), _) => format!("paused: {paused}"),
        (None, Some(problem)) => format!("no subscription: {}", problem.replace('\n', " ")),
        (None, None) if health.subscribed() => "consuming requests".to_owned(),
        (None, None) => "subscribing".to_owned(),
    };
    format!("{doing}; {} in flight", health.in_flight())
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "systemd could not be notified");
    }
}
