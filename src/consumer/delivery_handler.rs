//! One delivery from the queue to its end: handled, then settled. The durable effect always comes first.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, warn};

use super::health::{ConsumerHealth, Paused};
use crate::backoff::{Waits, full_jitter};
use crate::broker::{BrokerError, Delivery, PublishOutcome, Publisher, RetryTier};
use crate::domain::clock::Deadline;
use crate::domain::failure::Rejection;
use crate::run::{Disposition, Incoming, Runner};
use crate::telemetry::{self, spans};

/// How long a copy is tried for a retry tier or the dead-letter queue.
const COPY_PATIENCE: Duration = Duration::from_secs(60);
/// Before a request goes back that made the code panic.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// Where a copy of a delivery goes before the delivery is acknowledged.
#[derive(Clone, Copy)]
enum CopyTarget<'a> {
    Retry(RetryTier),
    DeadLetter(&'a Rejection),
}

/// What attending to a delivery needs.
pub(super) struct DeliveryHandler {
    pub(super) runner: Runner,
    pub(super) publisher: Publisher,
    /// How long a request is kept in hand while the database is away. Given back at once it would come again at once,
    /// and the broker would soon give it up as failing for ever.
    pub(super) hold: Duration,
    /// Who stands on a dead letter as the one who found it wanting.
    pub(super) name: String,
    pub(super) health: Arc<ConsumerHealth>,
    pub(super) intake: watch::Receiver<Option<Paused>>,
    pub(super) trouble: Arc<Notify>,
    pub(super) drain: CancellationToken,
    pub(super) abort: CancellationToken,
}

impl DeliveryHandler {
    /// Handles and settles. The permit is held to the end: it is what caps the requests in hand.
    pub(super) async fn handle_delivery(self: Arc<Self>, delivery: Delivery, permit: OwnedSemaphorePermit) {
        let span = spans::delivery(delivery.traceparent.as_deref(), delivery.tracestate.as_deref());
        self.handle_and_settle(delivery, permit).instrument(span).await;
    }

    async fn handle_and_settle(&self, delivery: Delivery, permit: OwnedSemaphorePermit) {
        let in_flight = self.health.track_in_flight();
        // A panic must not take the delivery with it, which would stay unanswered until its channel closes.
        match AssertUnwindSafe(self.handle(&delivery)).catch_unwind().await {
            Ok(disposition) => self.settle(&delivery, disposition).await,
            Err(_) => {
                error!("a request made the daemon panic; it goes back to the queue as a failed delivery");
                tokio::time::sleep(AFTER_PANIC).await;
                note_requeued(delivery.fail().await);
            }
        }
        drop((in_flight, permit));
    }

    async fn handle(&self, delivery: &Delivery) -> Disposition {
        let incoming = Incoming {
            body: &delivery.body,
            content_type: delivery.content_type.as_deref(),
            traceparent: delivery.traceparent.as_deref(),
            deferred_s: delivery.deferred_s,
        };
        let hold = Deadline::after(self.hold);
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(15));
        loop {
            let disposition = self.runner.handle(incoming, &self.abort).await;
            let undecided = matches!(disposition, Disposition::StoreAway | Disposition::Defect);
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

    /// Waits until the database is believed to be back, and a little on top.
    async fn wait_for_database(&self, wait: Duration) {
        tokio::time::sleep(wait).await;
        // It fails when the intake is gone: then the daemon stops, which ends the wait as well.
        let _ = self.intake.clone().wait_for(|paused| *paused != Some(Paused::DatabaseUnavailable)).await;
    }

    async fn settle(&self, delivery: &Delivery, disposition: Disposition) {
        match disposition {
            Disposition::Ended(_) => self.ack(delivery, "done").await,
            Disposition::Duplicate => self.ack(delivery, "duplicate").await,
            Disposition::Busy => self.schedule_retry(delivery, RetryTier::while_busy(delivery.retries)).await,
            Disposition::Deferred(_) => {
                self.schedule_retry(delivery, RetryTier::while_deferred(delivery.retries)).await
            }
            Disposition::Rejected(rejection) => self.dead_letter(delivery, &rejection).await,
            Disposition::HandBack(_) => note_requeued(delivery.requeue().await),
            Disposition::StoreAway | Disposition::Defect if self.database_unavailable() => {
                note_requeued(delivery.requeue().await);
            }
            // It answers, but not to this: full, perhaps, or a right is missing. Older brokers count what is given back.
            Disposition::StoreAway => self.schedule_retry(delivery, RetryTier::while_busy(delivery.retries)).await,
            // What fails for ever has to end as a dead letter: the broker is to count.
            Disposition::Defect => note_requeued(delivery.fail().await),
        }
    }

    /// Whether it is nobody's fault: then nothing new is taken, and what is given back does not come again at once.
    fn database_unavailable(&self) -> bool {
        *self.intake.borrow() == Some(Paused::DatabaseUnavailable) || self.drain.is_cancelled()
    }

    async fn ack(&self, delivery: &Delivery, outcome: &'static str) {
        // A lost acknowledgement is counted where it is given: the redelivery finds the run ended.
        let _ = delivery.ack().await;
        note_settled(outcome);
    }

    async fn schedule_retry(&self, delivery: &Delivery, tier: RetryTier) {
        self.copy_then_ack(delivery, CopyTarget::Retry(tier)).await;
    }

    async fn dead_letter(&self, delivery: &Delivery, rejection: &Rejection) {
        warn!(reason = %rejection.reason, detail = rejection.detail, "request rejected");
        if self.copy_then_ack(delivery, CopyTarget::DeadLetter(rejection)).await {
            telemetry::dead_letter(rejection.reason);
        }
    }

    /// Acknowledges once the copy is confirmed. A copy of unknown outcome is made again: the key makes two harmless.
    async fn copy_then_ack(&self, delivery: &Delivery, copy: CopyTarget<'_>) -> bool {
        let settled = match copy {
            CopyTarget::Retry(_) => "retry_scheduled",
            CopyTarget::DeadLetter(_) => "rejected",
        };
        let patience = Deadline::after(COPY_PATIENCE);
        let mut waits = Waits::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let outcome = match copy {
                CopyTarget::Retry(tier) => self.publisher.schedule_retry(delivery, tier).await,
                CopyTarget::DeadLetter(rejection) => self.publisher.dead_letter(delivery, rejection, &self.name).await,
            };
            if outcome == PublishOutcome::Confirmed {
                self.ack(delivery, settled).await;
                return true;
            }
            if patience.passed() || !delivery.usable() || self.drain.is_cancelled() {
                warn!(?outcome, settled, "a copy could not be confirmed in time; the request goes back to the queue");
                note_requeued(delivery.requeue().await);
                return false;
            }
            let wait = full_jitter(waits.next_wait());
            self.drain.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
    }
}

fn note_requeued(handed_back: Result<bool, BrokerError>) {
    // If the channel is gone, the broker has it back already.
    if let Err(error) = handed_back {
        tracing::debug!(%error, "the broker takes the request back by itself");
    }
    note_settled("requeued");
}

fn note_settled(outcome: &'static str) {
    telemetry::delivery(outcome);
    spans::settled(outcome);
}
