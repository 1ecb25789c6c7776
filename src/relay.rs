//! Relay: publishes run-completed events and keeps each in the outbox until the broker has confirmed it.
//!
//! The key of a run that this replica ended is kept in memory, so that its event is published at once. Any other event that is due
//! (of a crashed replica, refused, unroutable) is found by polling. Either way the event is built from the row of the run, so a
//! repeat has the same bytes and the same id.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Span, debug, warn};

use crate::backoff::{Waits, full_jitter};
use crate::broker::{Outgoing, PublishOutcome, Publisher};
use crate::config::OutboxConfig;
use crate::domain::run::RunKey;
use crate::store::{Store, StoreError};
use crate::telemetry::{self, spans};

/// Limit of ended runs that wait in memory; the events of further ones are found in the outbox once they are due.
pub const MAX_ENDED_RUNS: usize = 10_000;
/// Time for the last flush of a stopping daemon; another replica publishes the rest.
const LAST_FLUSH: Duration = Duration::from_secs(2);
/// Batches in flight: the database builds one while the broker confirms another.
const BATCHES_IN_FLIGHT: usize = 2;
/// Batches of one round; the gauges are updated between rounds.
const MAX_BATCHES: usize = 25;
/// Pause after a round in which further events gather: each batch is one commit.
const GATHER: Duration = Duration::from_millis(50);
const GAUGES_EVERY: Duration = Duration::from_secs(5);
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Publishes events until it is stopped.
pub struct Relay {
    outlet: Outlet,
    config: OutboxConfig,
    ended: mpsc::Receiver<RunKey>,
    /// Taken from `ended`, not published yet.
    pending: Vec<RunKey>,
    next_poll: Instant,
    gauged: Option<Instant>,
    warned: Option<Instant>,
}

/// Builds, publishes and settles one batch.
#[derive(Clone)]
struct Outlet {
    publisher: Publisher,
    store: Store,
    deployment: String,
}

/// Result of a batch, or of all batches of a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    confirmed: usize,
    unroutable: usize,
    /// Events that did not reach a broker, or whose confirmation did not come in time.
    unconfirmed: usize,
}

/// Result of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// No event was due.
    Idle,
    /// All events were confirmed.
    Sent,
    /// Some events were not confirmed.
    Stuck,
}

impl Relay {
    /// A relay that takes the runs of this replica from `ended`.
    #[must_use]
    pub fn new(
        publisher: Publisher,
        store: Store,
        config: &OutboxConfig,
        deployment: &str,
        ended: mpsc::Receiver<RunKey>,
    ) -> Self {
        Self {
            outlet: Outlet { publisher, store, deployment: deployment.to_owned() },
            config: config.clone(),
            ended,
            pending: Vec::new(),
            next_poll: Instant::now(),
            gauged: None,
            warned: None,
        }
    }

    /// Runs until `stop`, then publishes what is left, for a short time, and closes the publisher.
    pub async fn run(mut self, stop: &CancellationToken) {
        let mut waits = waits();
        while !stop.is_cancelled() {
            let round = self.round().await.unwrap_or_else(|error| {
                warn!(%error, "the outbox cannot be read");
                Round::Stuck
            });
            let pause = match round {
                Round::Stuck => full_jitter(waits.next_wait()),
                Round::Sent => GATHER,
                Round::Idle => Duration::ZERO,
            };
            if round != Round::Stuck {
                waits = self::waits();
            }
            stop.run_until_cancelled(async {
                tokio::time::sleep(pause).await;
                if round == Round::Idle {
                    self.next_event().await;
                }
            })
            .await;
        }
        if timeout(LAST_FLUSH, self.flush()).await.is_err() {
            warn!("events remain in the outbox; another replica publishes them, or this one after a restart");
        }
        self.outlet.publisher.close().await;
    }

    /// Waits until a run of this replica ends or the next poll is due.
    async fn next_event(&mut self) {
        tokio::select! {
            Some(run) = self.ended.recv() => self.pending.push(run),
            () = tokio::time::sleep_until(self.next_poll) => {}
        }
    }

    async fn flush(&mut self) {
        while matches!(self.round().await, Ok(Round::Sent)) {}
    }

    /// Publishes what is due, several batches at a time.
    async fn round(&mut self) -> Result<Round, StoreError> {
        self.gauge().await?;
        if self.outlet.publisher.blocked() {
            // Nothing is claimed: other replicas may reach another node of the broker.
            return Ok(Round::Stuck);
        }
        let outlet = self.outlet.clone();
        let (mut in_flight, mut started, mut more_due) = (FuturesUnordered::new(), 0, true);
        let mut total = Counts::default();
        loop {
            while more_due && started < MAX_BATCHES && in_flight.len() < BATCHES_IN_FLIGHT {
                let batch = self.next_batch().await?;
                more_due = batch.len() >= self.config.batch as usize;
                if !batch.is_empty() {
                    in_flight.push(outlet.publish(batch));
                    started += 1;
                }
            }
            let Some(counts) = in_flight.next().await else { break };
            total.add(counts?);
            more_due &= total.all_confirmed();
        }
        self.note_unpublished(total);
        Ok(match total {
            Counts { confirmed: 0, unroutable: 0, unconfirmed: 0 } => Round::Idle,
            total if total.all_confirmed() => Round::Sent,
            _ => Round::Stuck,
        })
    }

    /// Runs that ended here, and once per poll interval those whose events are due in the outbox.
    async fn next_batch(&mut self) -> Result<Vec<RunKey>, StoreError> {
        let limit = self.config.batch as usize;
        let mut batch = std::mem::take(&mut self.pending);
        while batch.len() < limit
            && let Ok(run) = self.ended.try_recv()
        {
            batch.push(run);
        }
        let capacity = limit.saturating_sub(batch.len());
        if capacity > 0 && self.next_poll <= Instant::now() {
            let due = self.outlet.store.claim_due_events(capacity as u32, self.config.claim_s).await?;
            if due.len() < capacity {
                // Jittered, so that replicas do not poll together.
                let poll = Duration::from_millis(self.config.poll_ms);
                self.next_poll = Instant::now() + poll.mul_f64(0.75) + full_jitter(poll / 2);
            }
            batch.extend(due);
        }
        Ok(batch)
    }

    fn note_unpublished(&mut self, counts: Counts) {
        telemetry::event_unroutable(counts.unroutable as u64);
        let due = self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY);
        if !counts.all_confirmed() && due {
            self.warned = Some(Instant::now());
            let Counts { unroutable, unconfirmed, .. } = counts;
            warn!(unroutable, unconfirmed, "events not published; they stay in the outbox and are published again");
        }
    }

    async fn gauge(&mut self) -> Result<(), StoreError> {
        if self.gauged.is_none_or(|gauged| gauged.elapsed() >= GAUGES_EVERY) {
            let backlog = self.outlet.store.outbox_backlog().await?;
            telemetry::outbox_unsent(backlog.unsent);
            telemetry::outbox_oldest(backlog.oldest_age_s);
            self.gauged = Some(Instant::now());
        }
        Ok(())
    }
}

impl Outlet {
    /// Publishes the events of `runs` and settles each: confirmed ones leave the outbox, unroutable ones are delayed, those that did
    /// not reach a broker are due at once. Those without a confirmation stay claimed and are published again later.
    async fn publish(&self, runs: Vec<RunKey>) -> Result<Counts, StoreError> {
        let events = self.store.load_events(&runs).await?;
        let (mut keys, mut spans, mut messages) = (Vec::new(), Vec::new(), Vec::new());
        for (event, traceparent) in events {
            keys.push(RunKey { tenant_id: event.tenant_id, run_id: event.run_id });
            spans.push(spans::publish(traceparent.as_deref()));
            messages.push(Outgoing::run_completed(event, &self.deployment, traceparent));
        }
        let outcomes = self.publisher.publish(messages).await;
        for (outcome, span) in outcomes.iter().zip(&spans) {
            note_outcome(*outcome, span);
        }
        let with = |wanted: fn(PublishOutcome) -> bool| -> Vec<RunKey> {
            let both = keys.iter().zip(&outcomes);
            both.filter(|(_, outcome)| wanted(**outcome)).map(|(key, _)| *key).collect()
        };
        let confirmed = with(|outcome| outcome == PublishOutcome::Confirmed);
        let unroutable = with(|outcome| outcome == PublishOutcome::Unroutable);
        let refused = with(PublishOutcome::not_stored);
        if !confirmed.is_empty() {
            self.store.remove_confirmed_events(&confirmed).await?;
            telemetry::event_published(confirmed.len() as u64);
            debug!(events = confirmed.len(), "events published");
        }
        if !unroutable.is_empty() {
            self.store.delay_events(&unroutable).await?;
        }
        if !refused.is_empty() {
            self.store.release_events(&refused).await?;
        }
        let unconfirmed = keys.len() - confirmed.len() - unroutable.len();
        Ok(Counts { confirmed: confirmed.len(), unroutable: unroutable.len(), unconfirmed })
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.confirmed += other.confirmed;
        self.unroutable += other.unroutable;
        self.unconfirmed += other.unconfirmed;
    }

    fn all_confirmed(self) -> bool {
        self.unroutable == 0 && self.unconfirmed == 0
    }
}

fn note_outcome(outcome: PublishOutcome, span: &Span) {
    if outcome != PublishOutcome::Confirmed {
        spans::not_published(span, outcome.as_str());
    }
}

fn waits() -> Waits {
    Waits::new(Duration::from_millis(200), Duration::from_secs(15))
}
