//! Delivery handling: runs the request, then settles the delivery. The durable effect always comes first.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, warn};

use super::MAX_HELD;
use super::health::{ConsumerHealth, InFlight, Paused};
use crate::backoff::{Waits, full_jitter};
use crate::broker::{BrokerError, Delivery, PublishOutcome, Publisher, RetryTier};
use crate::domain::clock::Deadline;
use crate::domain::failure::{DeadReason, Rejection};
use crate::domain::request::SyncRequest;
use crate::run::{Disposition, Incoming, Runner};
use crate::telemetry::{self, spans};

/// Time limit for publishing a copy to a retry or dead-letter queue.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);
/// Nacks in a row after which a copy counts as permanently refused.
const STEADY_REFUSALS: u32 = 5;
/// Additional wait between attempts to copy a held delivery.
const HELD_WAIT: Duration = Duration::from_secs(2);
/// Delay before the redelivery of a request that caused a panic.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// Slot of a delivery, released early if the delivery is held: the count in flight and the permit.
type Slot = Option<(InFlight, OwnedSemaphorePermit)>;

/// Destination of the copy that is confirmed before the delivery is acknowledged.
#[derive(Clone, Copy)]
enum CopyTarget<'a> {
    Retry(RetryTier),
    DeadLetter(&'a Rejection),
}

impl CopyTarget<'_> {
    /// Outcome of a delivery whose copy was confirmed.
    const fn settled(self) -> &'static str {
        match self {
            Self::Retry(_) => "retry_scheduled",
            Self::DeadLetter(_) => "rejected",
        }
    }
}

/// Handles and settles deliveries; shared by all of them.
pub(super) struct DeliveryHandler {
    pub(super) runner: Runner,
    pub(super) publisher: Publisher,
    /// Time a delivery stays in flight while the database is unavailable. Requeued at once it would be redelivered at
    /// once, and would reach the broker's delivery limit within seconds.
    pub(super) hold: Duration,
    /// Name of this replica, for the `x-dead-by` header.
    pub(super) name: String,
    pub(super) health: Arc<ConsumerHealth>,
    pub(super) intake: watch::Receiver<Option<Paused>>,
    pub(super) trouble: Arc<Notify>,
    /// Notified after every settled delivery.
    pub(super) settled: Arc<Notify>,
    pub(super) drain: CancellationToken,
    pub(super) abort: CancellationToken,
}

impl DeliveryHandler {
    /// Handles and settles one delivery. Holds the permit to the end: permits cap the deliveries in flight.
    pub(super) async fn handle_delivery(self: Arc<Self>, delivery: Delivery, permit: OwnedSemaphorePermit) {
        let span = spans::delivery(delivery.traceparent.as_deref(), delivery.tracestate.as_deref());
        self.handle_and_settle(delivery, permit).instrument(span).await;
    }

    async fn handle_and_settle(&self, delivery: Delivery, permit: OwnedSemaphorePermit) {
        let mut slot = Some((self.health.track_in_flight(), permit));
        // After a panic the delivery must still be settled; it would stay unacknowledged until its channel closes.
        match AssertUnwindSafe(self.handle(&delivery)).catch_unwind().await {
            Ok(disposition) => self.settle(&delivery, disposition, &mut slot).await,
            Err(_) => {
                error!("handling panicked; rejecting the delivery for another attempt");
                tokio::time::sleep(AFTER_PANIC).await;
                note_requeued(delivery.fail().await);
            }
        }
        drop(slot);
        self.settled.notify_waiters();
    }

    async fn handle(&self, delivery: &Delivery) -> Disposition {
        if let Some(bytes) = delivery.discarded_bytes {
            return Disposition::Rejected(SyncRequest::too_large(bytes));
        }
        if let Some(names) = &delivery.unreadable {
            let detail = format!("cannot be parsed: {names}");
            return Disposition::Rejected(Rejection::new(DeadReason::UnreadableProperties, detail));
        }
        let incoming = Incoming {
            body: &delivery.body,
            content_type: delivery.content_type.as_deref(),
            content_encoding: delivery.content_encoding.as_deref(),
            traceparent: delivery.traceparent.as_deref(),
            deferred_s: delivery.deferred_s,
        };
        let hold = Deadline::after(self.hold);
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(15));
        loop {
            let disposition = self.runner.handle(incoming, &self.abort).await;
            match &disposition {
                Disposition::DatabaseUnavailable(cause) => self.health.set_run_failure(Some(cause.clone())),
                Disposition::Ended(_) => self.health.set_run_failure(None),
                _ => {}
            }
            let undecided = matches!(disposition, Disposition::DatabaseUnavailable(_) | Disposition::DataRejected);
            if !undecided || hold.passed() || !delivery.usable() {
                return disposition;
            }
            self.trouble.notify_one();
            let wait = waits.next_wait();
            tokio::select! {
                () = self.wait_for_database(wait / 2 + full_jitter(wait / 2)) => {}
                () = tokio::time::sleep(hold.remaining()) => return disposition,
                () = self.drain.cancelled() => return disposition,
            }
        }
    }

    /// Waits at least `wait`, then until the intake no longer reports the database as unavailable.
    async fn wait_for_database(&self, wait: Duration) {
        tokio::time::sleep(wait).await;
        // An error means that the intake was dropped at shutdown, which ends the wait as well.
        let _ = self.intake.clone().wait_for(|paused| *paused != Some(Paused::DatabaseUnavailable)).await;
    }

    async fn settle(&self, delivery: &Delivery, disposition: Disposition, slot: &mut Slot) {
        match disposition {
            Disposition::Ended(_) => self.ack(delivery, "done").await,
            Disposition::Duplicate => self.ack(delivery, "duplicate").await,
            Disposition::InProgressElsewhere => {
                self.schedule_retry(delivery, RetryTier::while_busy(delivery.retries), slot).await
            }
            Disposition::Deferred(_) => {
                self.schedule_retry(delivery, RetryTier::while_deferred(delivery.retries), slot).await
            }
            Disposition::Rejected(rejection) => self.dead_letter(delivery, &rejection, slot).await,
            Disposition::HandBack(_) => note_requeued(delivery.requeue().await),
            Disposition::DatabaseUnavailable(_) | Disposition::DataRejected if self.database_unavailable() => {
                note_requeued(delivery.requeue().await);
            }
            // The database answers but rejects this work (disk full, missing privilege). A retry queue is used because
            // brokers before 4.3 count a requeue as a failed delivery.
            Disposition::DatabaseUnavailable(_) => {
                self.schedule_retry(delivery, RetryTier::while_busy(delivery.retries), slot).await
            }
            // A counted rejection: a request that fails on every delivery becomes a dead letter.
            Disposition::DataRejected => note_requeued(delivery.fail().await),
        }
    }

    /// True while intake is stopped, so that a requeued delivery is not redelivered to this replica at once.
    fn database_unavailable(&self) -> bool {
        *self.intake.borrow() == Some(Paused::DatabaseUnavailable) || self.drain.is_cancelled()
    }

    async fn ack(&self, delivery: &Delivery, outcome: &'static str) {
        // A lost ack is counted by `Delivery::ack`; the redelivery finds the run in a terminal state.
        let _ = delivery.ack().await;
        note_settled(outcome);
    }

    async fn schedule_retry(&self, delivery: &Delivery, tier: RetryTier, slot: &mut Slot) {
        self.copy_then_ack(delivery, CopyTarget::Retry(tier), slot).await;
    }

    async fn dead_letter(&self, delivery: &Delivery, rejection: &Rejection, slot: &mut Slot) {
        warn!(reason = %rejection.reason, detail = rejection.detail, "request rejected");
        let moved = match delivery.discarded_bytes {
            // Only the broker has the complete message.
            Some(_) => self.dead_letter_original(delivery).await,
            None => self.copy_then_ack(delivery, CopyTarget::DeadLetter(rejection), slot).await,
        };
        if moved {
            telemetry::dead_letter(rejection.reason);
        }
    }

    async fn dead_letter_original(&self, delivery: &Delivery) -> bool {
        let moved = matches!(delivery.dead_letter_original().await, Ok(true));
        note_settled(if moved { "rejected" } else { "requeued" });
        moved
    }

    /// Acknowledges once the copy is confirmed. A copy of unknown outcome is published again: the idempotency key
    /// makes duplicates harmless. A copy that the broker permanently refuses must not occupy a slot: the delivery is held
    /// without its permit, or the broker moves a dead letter itself.
    async fn copy_then_ack(&self, delivery: &Delivery, copy: CopyTarget<'_>, slot: &mut Slot) -> bool {
        let mut timeout = Deadline::after(COPY_TIMEOUT);
        let mut waits = Waits::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut refusals = 0;
        let mut held = None;
        loop {
            let outcome = self.publish_copy(delivery, copy).await;
            if outcome == PublishOutcome::Confirmed {
                self.ack(delivery, copy.settled()).await;
                return true;
            }
            refusals += u32::from(outcome == PublishOutcome::Refused);
            let permanent = outcome == PublishOutcome::Denied || refusals >= STEADY_REFUSALS;
            if permanent && held.is_none() {
                if !self.may_hold(copy, outcome) {
                    warn!(?outcome, "copy permanently refused; the broker moves the original");
                    return self.dead_letter_original(delivery).await;
                }
                warn!(?outcome, "copy permanently refused; holding the delivery without a slot");
                held = Some(self.health.track_held());
                timeout = Deadline::after(self.hold);
                *slot = None;
            }
            if timeout.passed() || !delivery.usable() || self.drain.is_cancelled() {
                return self.give_up_copy(delivery, copy, outcome, held.is_some()).await;
            }
            let wait = full_jitter(waits.next_wait()) + if held.is_some() { HELD_WAIT } else { Duration::ZERO };
            self.drain.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
    }

    async fn publish_copy(&self, delivery: &Delivery, copy: CopyTarget<'_>) -> PublishOutcome {
        match copy {
            CopyTarget::Retry(tier) => self.publisher.schedule_retry(delivery, tier).await,
            CopyTarget::DeadLetter(rejection) => self.publisher.dead_letter(delivery, rejection, &self.name).await,
        }
    }

    /// False for a dead letter that the broker can move although this user may not write to the exchange, and for one
    /// above the number of deliveries that extend the prefetch.
    fn may_hold(&self, copy: CopyTarget<'_>, outcome: PublishOutcome) -> bool {
        match copy {
            CopyTarget::Retry(_) => true,
            CopyTarget::DeadLetter(_) => {
                outcome == PublishOutcome::Refused && self.health.held() < usize::from(MAX_HELD)
            }
        }
    }

    /// Settles a delivery whose copy was not confirmed in time. Requeued, a dead letter that was held would be rejected
    /// and held again; the broker keeps the original until its target queue has room.
    async fn give_up_copy(
        &self,
        delivery: &Delivery,
        copy: CopyTarget<'_>,
        outcome: PublishOutcome,
        held: bool,
    ) -> bool {
        let settled = copy.settled();
        if held && matches!(copy, CopyTarget::DeadLetter(_)) && !self.drain.is_cancelled() {
            warn!(?outcome, settled, "copy not confirmed in time; the broker moves the original");
            return self.dead_letter_original(delivery).await;
        }
        warn!(?outcome, settled, "copy not confirmed in time; requeueing the delivery");
        note_requeued(delivery.requeue().await);
        false
    }
}

fn note_requeued(requeued: Result<bool, BrokerError>) {
    // The broker requeues every unacknowledged delivery of a closed channel by itself.
    if let Err(error) = requeued {
        tracing::debug!(%error, "requeue failed; the broker requeues when the channel closes");
    }
    note_settled("requeued");
}

fn note_settled(outcome: &'static str) {
    telemetry::delivery(outcome);
    spans::settled(outcome);
}
