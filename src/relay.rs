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
use crate::broker::{Outgoing, PublishOutcome, Publisher};
use crate::config::OutboxConfig;
use crate::store::{OutboxEvent, Store, StoreError};
use crate::telemetry::{self, spans};

/// How long the last flush of a stopping daemon may take; what is left is carried by another replica, or later.
const LAST_FLUSH: Duration = Duration::from_secs(2);
/// Batches of one round; between rounds the gauges are looked at.
const MOST_BATCHES: usize = 25;
/// After a round that sent something, what ends within this time is published together: each round is two commits.
const GATHER: Duration = Duration::from_millis(50);
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

/// A tenant and one of its events.
type EventId = (Uuid, Uuid);

/// What became of a batch.
#[derive(Default)]
struct Published {
    ids: Vec<EventId>,
    outcomes: Vec<PublishOutcome>,
}

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// There was nothing to do.
    Idle,
    /// All of it was confirmed, and there may be more.
    Full,
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
                Ok(Round::Full) => {
                    waits = self::waits();
                    continue;
                }
                Ok(Round::Sent) => {
                    waits = self::waits();
                    GATHER
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
        while matches!(self.round().await, Ok(Round::Sent | Round::Full)) {}
    }

    /// Publishes what is due. While one batch is with the broker, the database marks the one before and gives the next.
    async fn round(&mut self) -> Result<Round, StoreError> {
        self.gauge().await?;
        if self.publisher.blocked() {
            // A claim would only keep other replicas from trying; some of them may reach another node.
            return Ok(Round::Stuck);
        }
        let mut batch = self.claim().await?;
        if batch.is_empty() {
            return Ok(Round::Idle);
        }
        let (mut published, mut all_sent, mut batches) = (Published::default(), true, 1);
        loop {
            let ids: Vec<EventId> = batch.iter().map(|event| (event.tenant_id, event.id)).collect();
            let more_may_be_due = all_sent && self.is_full(&batch) && batches < MOST_BATCHES;
            let spans: Vec<Span> = batch.iter().map(|event| spans::publish(event.traceparent.as_deref())).collect();
            let publish = self.publisher.publish(batch.into_iter().map(outgoing).collect());
            let publish = async { publish.await.into_iter().zip(spans).map(end_span).collect::<Vec<PublishOutcome>>() };
            let claim = async { if more_may_be_due { self.claim().await } else { Ok(Vec::new()) } };
            let (outcomes, settled, next) = tokio::join!(publish, self.settle(&published), claim);
            let unroutable = outcomes.iter().filter(|outcome| **outcome == PublishOutcome::Unroutable).count();
            all_sent &= outcomes.iter().all(|outcome| *outcome == PublishOutcome::Confirmed);
            published = Published { ids, outcomes };
            self.note_unroutable(unroutable);
            batch = match settled.and(next) {
                Ok(next) => next,
                Err(error) => {
                    self.settle(&published).await?;
                    return Err(error);
                }
            };
            batches += 1;
            if batch.is_empty() {
                break;
            }
        }
        let last_was_full = published.ids.len() >= self.config.batch as usize;
        self.settle(&published).await?;
        Ok(match (all_sent, last_was_full) {
            (false, _) => Round::Stuck,
            (true, true) => Round::Full,
            (true, false) => Round::Sent,
        })
    }

    async fn claim(&self) -> Result<Vec<OutboxEvent>, StoreError> {
        self.store.claim_events(self.config.batch, self.config.claim_s).await
    }

    fn is_full(&self, batch: &[OutboxEvent]) -> bool {
        batch.len() >= self.config.batch as usize
    }

    /// Marks what the broker has, and puts back what no queue took.
    async fn settle(&self, published: &Published) -> Result<(), StoreError> {
        let with = |wanted: PublishOutcome| -> Vec<EventId> {
            let both = published.ids.iter().zip(&published.outcomes);
            both.filter(|(_, outcome)| **outcome == wanted).map(|(id, _)| *id).collect()
        };
        // Those of unknown outcome stay claimed: the claim runs out, and they are published again.
        let (sent, unroutable, refused) =
            (with(PublishOutcome::Confirmed), with(PublishOutcome::Unroutable), with(PublishOutcome::Refused));
        if !sent.is_empty() {
            self.store.mark_sent(&sent).await?;
            telemetry::event_published(sent.len() as u64);
            debug!(events = sent.len(), "published");
        }
        if !unroutable.is_empty() {
            self.store.release_events(&unroutable).await?;
        }
        if !refused.is_empty() {
            self.store.give_back_events(&refused).await?;
        }
        Ok(())
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

fn end_span((outcome, span): (PublishOutcome, Span)) -> PublishOutcome {
    if outcome != PublishOutcome::Confirmed {
        spans::not_published(&span, outcome.as_str());
    }
    outcome
}

fn waits() -> Waits {
    Waits::new(Duration::from_millis(200), Duration::from_secs(15))
}

fn outgoing(event: OutboxEvent) -> Outgoing {
    let (correlation_id, traceparent) = (event.correlation_id.as_deref(), event.traceparent.as_deref());
    Outgoing::event(event.id, &event.routing_key, event.payload, correlation_id, traceparent)
}
