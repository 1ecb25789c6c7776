//! One delivery from the queue to its end: handled, then settled. The durable effect always comes first.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::health::{ConsumerHealth, Paused};
use crate::backoff::{Waits, full_jitter};
use crate::broker::{BrokerError, Delivery, Fate, Publisher, Rung};
use crate::domain::clock::Deadline;
use crate::domain::failure::Rejection;
use crate::run::{Disposition, Incoming, Runner};
use crate::telemetry;

/// How long a copy is tried for a retry rung or the dead-letter queue.
const COPY_PATIENCE: Duration = Duration::from_secs(60);
/// Before a request goes back that made the code panic.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// Where a copy of a delivery goes before the delivery is acknowledged.
#[derive(Clone, Copy)]
enum Onward<'a> {
    Parked(Rung),
    Buried(&'a Rejection),
}

/// What attending to a delivery needs.
pub(super) struct Attendant {
    pub(super) runner: Runner,
    pub(super) publisher: Publisher,
    /// How long a request is kept in hand while the database is away. Given back at once it would come again at once,
    /// and the broker would soon give it up as failing for ever.
    pub(super) hold: Duration,
    /// Who stands on a dead letter as the one who found it wanting.
    pub(super) name: String,
    pub(super) health: Arc<ConsumerHealth>,
    pub(super) gate: watch::Receiver<Option<Paused>>,
    pub(super) trouble: Arc<Notify>,
    pub(super) drain: CancellationToken,
    pub(super) abort: CancellationToken,
}

impl Attendant {
    /// Handles and settles. The permit is held to the end: it is what caps the requests in hand.
    pub(super) async fn attend(self: Arc<Self>, delivery: Delivery, permit: OwnedSemaphorePermit) {
        let in_hand = self.health.take_in_hand();
        // A panic must not take the delivery with it, which would stay unanswered until its channel closes.
        match AssertUnwindSafe(self.handle(&delivery)).catch_unwind().await {
            Ok(disposition) => self.settle(&delivery, disposition).await,
            Err(_) => {
                error!("a request made the daemon panic; it goes back to the queue as a failed delivery");
                tokio::time::sleep(AFTER_PANIC).await;
                note_handed_back(delivery.fail().await);
            }
        }
        drop((in_hand, permit));
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
                () = self.store_back(wait / 2 + full_jitter(wait / 2)) => {}
                () = tokio::time::sleep(hold.remaining()) => return disposition,
                () = self.drain.cancelled() => return disposition,
            }
        }
    }

    /// Waits until the database is believed to be back, and a little on top.
    async fn store_back(&self, wait: Duration) {
        tokio::time::sleep(wait).await;
        // It fails when the gate is gone: then the daemon stops, which ends the wait as well.
        let _ = self.gate.clone().wait_for(|paused| *paused != Some(Paused::StoreAway)).await;
    }

    async fn settle(&self, delivery: &Delivery, disposition: Disposition) {
        match disposition {
            Disposition::Ended(_) => self.ack(delivery, "done").await,
            Disposition::Duplicate => self.ack(delivery, "duplicate").await,
            Disposition::Busy => self.park(delivery, Rung::while_busy(delivery.retries)).await,
            Disposition::Deferred(_) => self.park(delivery, Rung::while_deferred(delivery.retries)).await,
            Disposition::Rejected(rejection) => self.bury(delivery, &rejection).await,
            Disposition::HandBack(_) => note_handed_back(delivery.hand_back().await),
            Disposition::StoreAway | Disposition::Defect if self.is_store_away() => {
                note_handed_back(delivery.hand_back().await);
            }
            // It answers, but not to this: full, perhaps, or a right is missing. Older brokers count what is given back.
            Disposition::StoreAway => self.park(delivery, Rung::while_busy(delivery.retries)).await,
            // What fails for ever has to end as a dead letter: the broker is to count.
            Disposition::Defect => note_handed_back(delivery.fail().await),
        }
    }

    /// Whether it is nobody's fault: then nothing new is taken, and what is given back does not come again at once.
    fn is_store_away(&self) -> bool {
        *self.gate.borrow() == Some(Paused::StoreAway) || self.drain.is_cancelled()
    }

    async fn ack(&self, delivery: &Delivery, outcome: &'static str) {
        // A lost acknowledgement is counted where it is given: the redelivery finds the run ended.
        let _ = delivery.ack().await;
        telemetry::delivery(outcome);
    }

    async fn park(&self, delivery: &Delivery, rung: Rung) {
        self.copy_then_ack(delivery, Onward::Parked(rung)).await;
    }

    async fn bury(&self, delivery: &Delivery, rejection: &Rejection) {
        warn!(reason = %rejection.reason, detail = rejection.detail, "request rejected");
        if self.copy_then_ack(delivery, Onward::Buried(rejection)).await {
            telemetry::dead_letter(rejection.reason);
        }
    }

    /// Acknowledges once the copy is confirmed. A copy of unknown fate is made again: the key makes two harmless.
    async fn copy_then_ack(&self, delivery: &Delivery, copy: Onward<'_>) -> bool {
        let outcome = match copy {
            Onward::Parked(_) => "parked",
            Onward::Buried(_) => "rejected",
        };
        let patience = Deadline::after(COPY_PATIENCE);
        let mut waits = Waits::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let fate = match copy {
                Onward::Parked(rung) => self.publisher.park(delivery, rung).await,
                Onward::Buried(rejection) => self.publisher.bury(delivery, rejection, &self.name).await,
            };
            if fate == Fate::Confirmed {
                self.ack(delivery, outcome).await;
                return true;
            }
            if patience.passed() || !delivery.usable() || self.drain.is_cancelled() {
                warn!(?fate, outcome, "a copy could not be confirmed in time; the request goes back to the queue");
                note_handed_back(delivery.hand_back().await);
                return false;
            }
            let wait = full_jitter(waits.next_wait());
            self.drain.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
    }
}

fn note_handed_back(handed_back: Result<bool, BrokerError>) {
    // If the channel is gone, the broker has it back already.
    if let Err(error) = handed_back {
        tracing::debug!(%error, "the broker takes the request back by itself");
    }
    telemetry::delivery("handed_back");
}
