//! What systemd is told, where it has started us with `Type=notify`: that requests are taken, that the loop which takes them
//! still turns, what is going on, and that we stop. Elsewhere nobody hears it.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::STUCK_AFTER;
use crate::consumer::ConsumerHealth;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Tells it all, for as long as it is awaited.
pub(super) async fn tell(health: &ConsumerHealth, draining: &CancellationToken) {
    let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    let mut looks = interval(LOOK_EVERY);
    let mut beats = interval(watchdog.map_or(LOOK_EVERY, |limit| limit / 2));
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
            _ = looks.tick() => {
                if !ready && health.subscribed() {
                    ready = true;
                    notify(&[NotifyState::Ready]);
                }
                let status = status(health);
                if status != said {
                    say(&status);
                    said = status;
                }
            }
        }
    }
}

/// Says in a line what is going on, for `systemctl status`.
pub(super) fn say(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

fn status(health: &ConsumerHealth) -> String {
    let doing = match (health.paused(), health.problem()) {
        (Some(paused), _) => format!("no new requests are taken: {paused}"),
        (None, Some(problem)) => format!("no subscription: {}", problem.replace('\n', " ")),
        (None, None) if health.subscribed() => "requests are taken".to_owned(),
        (None, None) => "subscribing".to_owned(),
    };
    format!("{doing}; {} in flight", health.in_flight())
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "systemd could not be told");
    }
}
