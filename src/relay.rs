//! The relay: carries events from the outbox to the broker, at least once, each time with the same id.
//!
//! Every replica has one. They claim different events, commit the claim, publish, and mark what was confirmed. No
//! transaction stays open while the broker is waited for.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Span, debug, warn};
use uuid::Uuid;

use crate::backoff::{Waits, full_jitter};
use crate::broker::{Fate, Outgoing, Publisher};
use crate::config::OutboxConfig;
use crate::store::{OutboxEvent, Store, StoreError};
use crate::telemetry::{self, spans};

/// How long the last flush of a stopping daemon may take; what is left is carried by another replica, or later.
const LAST_FLUSH: Duration = Duration::from_secs(2);
const GAUGES_EVERY: Duration = Duration::from_secs(5);
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Publishes events until it is told to stop.
pub struct Relay {
    publisher: Publisher,
    store: Store,
    config: OutboxConfig,
    gauged: Option<Instant>,
    warned: Option<Instant>,
}

/// How a batch went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// There was nothing to do.
    Idle,
    /// All of it was confirmed.
    Sent,
    /// Some of it was not.
    Stuck,
}

impl Relay {
    /// A relay by the configuration.
    #[must_use]
    pub fn new(publisher: Publisher, store: Store, config: &OutboxConfig) -> Self {
        Self { publisher, store, config: config.clone(), gauged: None, warned: None }
    }

    /// Works until `stop`, then publishes what is left, for a short time, and closes the publisher.
    pub async fn run(mut self, stop: &CancellationToken) {
        let committed = self.store.event_committed();
        let mut waits = waits();
        while !stop.is_cancelled() {
            // Listening before looking: an event that is committed in between is not overlooked.
            let mut woken = std::pin::pin!(committed.notified());
            woken.as_mut().enable();
            let wait = match self.round().await {
                Ok(Round::Sent) => {
                    waits = self::waits();
                    continue;
                }
                Ok(Round::Idle) => {
                    waits = self::waits();
                    tokio::select! {
                        () = woken => continue,
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(self.poll_wait()) => continue,
                    }
                }
                Ok(Round::Stuck) => full_jitter(waits.next_wait()),
                Err(error) => {
                    warn!(%error, "the outbox can't be read");
                    full_jitter(waits.next_wait())
                }
            };
            stop.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
        if timeout(LAST_FLUSH, self.flush()).await.is_err() {
            warn!("events are left in the outbox; another replica carries them, or this one when it is back");
        }
        self.publisher.close().await;
    }

    /// Replicas that look at the same time find the same nothing.
    fn poll_wait(&self) -> Duration {
        let poll = Duration::from_millis(self.config.poll_ms);
        poll.mul_f64(0.75) + full_jitter(poll / 2)
    }

    async fn flush(&mut self) {
        while matches!(self.round().await, Ok(Round::Sent)) {}
    }

    async fn round(&mut self) -> Result<Round, StoreError> {
        self.gauge().await?;
        if self.publisher.blocked() {
            // A claim would only keep other replicas from trying; some of them may reach another node.
            return Ok(Round::Stuck);
        }
        let events = self.store.claim_events(self.config.batch, self.config.claim_s).await?;
        if events.is_empty() {
            return Ok(Round::Idle);
        }
        let ids: Vec<(Uuid, Uuid)> = events.iter().map(|event| (event.tenant_id, event.id)).collect();
        let in_flight: Vec<Span> = events.iter().map(|event| spans::publish(event.traceparent.as_deref())).collect();
        let fates = self.publisher.publish(events.into_iter().map(outgoing).collect()).await;
        note_fates(in_flight, &fates);
        let with = |wanted: &[Fate]| -> Vec<(Uuid, Uuid)> {
            ids.iter().zip(&fates).filter(|(_, fate)| wanted.contains(fate)).map(|(id, _)| *id).collect()
        };
        let (sent, unroutable) = (with(&[Fate::Confirmed]), with(&[Fate::Unroutable]));
        // Those of unknown fate stay claimed: the claim runs out, and they are published again.
        let back = with(&[Fate::Unroutable, Fate::Refused]);
        if !sent.is_empty() {
            self.store.mark_sent(&sent).await?;
            telemetry::event_published(sent.len() as u64);
            debug!(events = sent.len(), "published");
        }
        if !back.is_empty() {
            self.store.release_events(&back).await?;
        }
        self.note_unroutable(unroutable.len());
        Ok(if sent.len() == ids.len() { Round::Sent } else { Round::Stuck })
    }

    fn note_unroutable(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        telemetry::event_unroutable(count as u64);
        if self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY) {
            self.warned = Some(Instant::now());
            warn!(count, "no queue takes these events: is the exchange for unrouted ones bound? They are kept");
        }
    }

    async fn gauge(&mut self) -> Result<(), StoreError> {
        if self.gauged.is_none_or(|gauged| gauged.elapsed() >= GAUGES_EVERY) {
            let backlog = self.store.outbox_backlog().await?;
            telemetry::outbox_unsent(backlog.unsent);
            telemetry::outbox_oldest(backlog.oldest_age_s);
            self.gauged = Some(Instant::now());
        }
        Ok(())
    }
}

/// Ends the spans of a batch.
fn note_fates(in_flight: Vec<Span>, fates: &[Fate]) {
    for (span, fate) in in_flight.iter().zip(fates).filter(|(_, fate)| **fate != Fate::Confirmed) {
        spans::not_published(span, fate.as_str());
    }
}

fn waits() -> Waits {
    Waits::new(Duration::from_millis(200), Duration::from_secs(15))
}

fn outgoing(event: OutboxEvent) -> Outgoing {
    let (correlation_id, traceparent) = (event.correlation_id.as_deref(), event.traceparent.as_deref());
    Outgoing::event(event.id, &event.routing_key, event.payload, correlation_id, traceparent)
}
