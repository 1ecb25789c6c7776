//! Publishing with confirms, on a connection of its own: when the broker blocks it, consuming goes on.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, TryFutureExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, Event};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::connection::{Connection, Events};
use super::deliveries::Delivery;
use super::error::{BrokerError, within};
use super::message::{Outgoing, Target};
use super::topology::{Names, RetryTier};
use super::{Broker, Purpose};
use crate::backoff::{Waits, full_jitter};
use crate::domain::clock::Deadline;
use crate::domain::failure::Rejection;
use crate::telemetry;

/// Messages that are published before the first confirm is awaited.
const BATCH: usize = 512;
/// Messages that the connection is given at once.
const SENT_TOGETHER: usize = 64;
const WAITING_JOBS: usize = 64;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishOutcome {
    /// The broker has stored it in every queue that takes it.
    Confirmed,
    /// No queue takes it: it was stored nowhere.
    Unroutable,
    /// It was not stored: the broker refused it, or it never got that far.
    Refused,
    /// It may have been stored, and may still be. Publish it again with the same id; receivers know it by that.
    Unknown,
}

impl PublishOutcome {
    /// The stable text form.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Unroutable => "unroutable",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }

    pub(super) fn into_result(self, what: &'static str) -> Result<(), BrokerError> {
        let problem = match self {
            Self::Confirmed => return Ok(()),
            Self::Unroutable => "the exchange has no queue for it",
            Self::Refused => "the broker refused it",
            Self::Unknown => "the broker did not confirm it in time; it may have been stored",
        };
        Err(BrokerError::NotTaken(format!("{what}: {problem}")))
    }
}

enum Job {
    Publish(Vec<Outgoing>, oneshot::Sender<Vec<PublishOutcome>>),
    Close(oneshot::Sender<()>),
}

/// Publishes for everyone in this process. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    jobs: mpsc::Sender<Job>,
    names: Arc<Names>,
    blocked: Arc<AtomicBool>,
}

impl Publisher {
    pub(super) fn start(broker: &Broker) -> Self {
        let (jobs, waiting) = mpsc::channel(WAITING_JOBS);
        let blocked = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            broker: broker.clone(),
            link: None,
            waits: waits(),
            not_before: Instant::now(),
            blocked: Arc::clone(&blocked),
        };
        broker.0.spawner.spawn(worker.run(waiting));
        Self { jobs, names: Arc::new(broker.names().clone()), blocked }
    }

    /// Publishes all messages and says what became of each, in their order.
    ///
    /// It never takes longer than a reconnect and one confirm timeout, and those of the jobs before it.
    pub async fn publish(&self, messages: Vec<Outgoing>) -> Vec<PublishOutcome> {
        let count = messages.len();
        let (reply, outcomes) = oneshot::channel();
        if self.jobs.send(Job::Publish(messages, reply)).await.is_err() {
            return vec![PublishOutcome::Refused; count];
        }
        outcomes.await.unwrap_or_else(|_| vec![PublishOutcome::Unknown; count])
    }

    /// Puts a copy of the delivery on a tier of the retry ladder.
    pub async fn schedule_retry(&self, delivery: &Delivery, tier: RetryTier) -> PublishOutcome {
        let copy = Outgoing::retry(&delivery.original(), &self.names, tier);
        self.publish_one(copy).await
    }

    /// Puts a copy of the delivery into the dead-letter queue. `by` says which process found it wanting.
    pub async fn dead_letter(&self, delivery: &Delivery, rejection: &Rejection, by: &str) -> PublishOutcome {
        let copy = Outgoing::dead_letter(&delivery.original(), rejection, by);
        self.publish_one(copy).await
    }

    /// Whether the broker takes no messages for now, because of a memory or disk alarm.
    #[must_use]
    pub fn blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
    }

    /// Finishes what was given to it and closes the connection. It opens again if there is more to publish.
    pub async fn close(&self) {
        let (reply, done) = oneshot::channel();
        if self.jobs.send(Job::Close(reply)).await.is_ok() {
            // Gone is as good as closed.
            let _ = done.await;
        }
    }

    async fn publish_one(&self, message: Outgoing) -> PublishOutcome {
        self.publish(vec![message]).await.first().copied().unwrap_or(PublishOutcome::Unknown)
    }
}

/// The one that holds the connection. What waits while it is busy is published together.
struct Worker {
    broker: Broker,
    link: Option<ConfirmChannel>,
    waits: Waits,
    not_before: Instant,
    blocked: Arc<AtomicBool>,
}

impl Worker {
    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        loop {
            let job = match &mut self.link {
                Some(link) => tokio::select! {
                    job = jobs.recv() => job,
                    event = link.events.next() => {
                        self.heed(event);
                        continue;
                    }
                },
                None => jobs.recv().await,
            };
            match job {
                Some(Job::Publish(messages, reply)) => self.serve(messages, reply, &mut jobs).await,
                Some(Job::Close(done)) => self.close(Some(done)).await,
                None => break,
            }
        }
        self.close(None).await;
    }

    async fn serve(
        &mut self,
        messages: Vec<Outgoing>,
        reply: oneshot::Sender<Vec<PublishOutcome>>,
        jobs: &mut mpsc::Receiver<Job>,
    ) {
        let mut batch = messages;
        let mut replies = vec![(batch.len(), reply)];
        let mut close = None;
        while batch.len() < BATCH && close.is_none() {
            match jobs.try_recv() {
                Ok(Job::Publish(more, reply)) => {
                    replies.push((more.len(), reply));
                    batch.extend(more);
                }
                Ok(Job::Close(done)) => close = Some(done),
                Err(_) => break,
            }
        }
        let mut outcomes = self.publish(&batch).await.into_iter();
        for (count, reply) in replies {
            // Whoever does not wait any more will publish it again.
            let _ = reply.send(outcomes.by_ref().take(count).collect());
        }
        if close.is_some() {
            self.close(close).await;
        }
    }

    async fn publish(&mut self, batch: &[Outgoing]) -> Vec<PublishOutcome> {
        let mut link = match self.usable_channel().await {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!(%error, messages = batch.len(), "can't publish for now");
                return vec![PublishOutcome::Refused; batch.len()];
            }
        };
        let outcomes = link.publish(self.broker.names(), batch).await;
        self.set_blocked(link.wire.blocked());
        let ours_is_unroutable = batch
            .iter()
            .zip(&outcomes)
            .any(|(message, outcome)| *outcome == PublishOutcome::Unroutable && message.target != Target::Events);
        if ours_is_unroutable && let Err(error) = self.broker.ensure(&link.wire).await {
            tracing::warn!(%error, "a queue of our own is missing");
        }
        self.link = Some(link);
        outcomes
    }

    /// A link that takes messages now, or the reason why there is none. It is taken out of its place: a publish that
    /// is not finished leaves none behind.
    async fn usable_channel(&mut self) -> Result<ConfirmChannel, BrokerError> {
        if let Some(link) = self.link.take() {
            let link = self.keep_if_usable(link).await?;
            if let Some(link) = link {
                return Ok(link);
            }
        }
        sleep_until(self.not_before).await;
        match ConfirmChannel::open(&self.broker, Purpose::Publish).await {
            Ok(link) => {
                self.waits = waits();
                self.set_blocked(link.wire.blocked());
                Ok(link)
            }
            Err(error) => {
                self.not_before = Instant::now() + full_jitter(self.waits.next_wait());
                Err(error)
            }
        }
    }

    /// While the broker blocks the link it is kept: a new one would be blocked too, and could not even be closed.
    async fn keep_if_usable(&mut self, link: ConfirmChannel) -> Result<Option<ConfirmChannel>, BrokerError> {
        let after = link.limit;
        let deadline = Deadline::after(after);
        while link.wire.connected() && link.wire.blocked() {
            if deadline.passed() {
                self.link = Some(link);
                return Err(BrokerError::TimedOut {
                    doing: "waiting for the broker's memory or disk alarm to end",
                    after,
                });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.set_blocked(false);
        if link.clean && link.wire.connected() {
            return Ok(Some(link));
        }
        // Confirms of an earlier batch may still come on it, and would be taken for those of the next.
        link.close(after).await;
        Ok(None)
    }

    fn heed(&mut self, event: Option<Event>) {
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                tracing::warn!(reason, "the broker takes no messages for now; events wait in the outbox");
                self.set_blocked(true);
            }
            Some(Event::ConnectionUnblocked) => {
                tracing::info!("the broker takes messages again");
                self.set_blocked(false);
            }
            Some(Event::Error(error)) => {
                tracing::warn!(%error, "the publishing connection is lost");
                self.drop_channel();
            }
            None => self.drop_channel(),
            Some(_) => {}
        }
    }

    fn drop_channel(&mut self) {
        self.link = None;
        self.set_blocked(false);
    }

    fn set_blocked(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
        telemetry::broker_blocked(blocked);
    }

    async fn close(&mut self, done: Option<oneshot::Sender<()>>) {
        if let Some(link) = self.link.take() {
            let limit = link.limit.min(Duration::from_secs(2));
            link.close(limit).await;
        }
        if let Some(done) = done {
            let _ = done.send(());
        }
    }
}

fn waits() -> Waits {
    Waits::new(FIRST_WAIT, LONGEST_WAIT)
}

/// A connection with one channel in confirm mode, used for one batch at a time.
pub(super) struct ConfirmChannel {
    pub(super) wire: Connection,
    channel: Channel,
    events: Events,
    limit: Duration,
    /// Whether every message published on it got its answer.
    clean: bool,
}

impl ConfirmChannel {
    pub(super) async fn open(broker: &Broker, purpose: Purpose) -> Result<Self, BrokerError> {
        let limit = broker.0.opening.answer_limit;
        let wire = broker.connect(purpose).await?;
        match broker.ensure(&wire).await {
            // The consumer reports it and is not ready; what can be published still is.
            Ok(()) | Err(BrokerError::Drift(_)) => {}
            Err(error) => return Err(error),
        }
        let channel = wire.channel().await?;
        let select = channel.confirm_select(ConfirmSelectOptions::default());
        within(limit, "asking for confirms", select).await?;
        let events = wire.events();
        Ok(Self { wire, channel, events, limit, clean: true })
    }

    /// Publishes a batch and waits for its confirms.
    ///
    /// Which message a confirm is for is certain, which returned message comes with which confirm is not: with
    /// several in flight the client pairs them wrongly. So what was returned is known by its message id, over the
    /// whole batch.
    pub(super) async fn publish(&mut self, names: &Names, batch: &[Outgoing]) -> Vec<PublishOutcome> {
        let deadline = Deadline::after(self.limit);
        let mut outcomes = vec![PublishOutcome::Refused; batch.len()];
        let (mut sending, mut confirms) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut rest = batch.iter().enumerate();
        loop {
            // Given one by one, each would wake the connection's thread and wait for it.
            for (index, message) in rest.by_ref().take(SENT_TOGETHER - sending.len()) {
                outcomes[index] = PublishOutcome::Unknown;
                let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                let exchange = message.target.exchange(names);
                let (key, properties) = (message.routing_key.clone(), message.properties.clone());
                let publish = self.channel.basic_publish(exchange, key, options, &message.body, properties);
                sending.push(publish.map_ok(move |confirm| confirm.map(move |confirmation| (index, confirmation))));
            }
            match timeout(deadline.remaining(), sending.next()).await {
                Ok(Some(Ok(confirm))) => confirms.push(confirm),
                Ok(None) => break,
                Ok(Some(Err(_))) | Err(_) => {
                    self.clean = false;
                    break;
                }
            }
        }
        let mut returned = HashSet::new();
        let mut note = |(index, confirmation): (usize, lapin::Result<Confirmation>)| {
            let Ok(confirmation) = confirmation else { return false };
            outcomes[index] = if confirmation.is_ack() { PublishOutcome::Confirmed } else { PublishOutcome::Refused };
            returned.extend(confirmation.take_message().and_then(|message| message.properties.message_id().clone()));
            true
        };
        while let Ok(Some(confirm)) = timeout(deadline.remaining(), confirms.next()).await {
            self.clean &= note(confirm);
        }
        // A returned message may have come with any confirm that is there by now: none may be overlooked.
        while let Some(Some(confirm)) = confirms.next().now_or_never() {
            self.clean &= note(confirm);
        }
        self.clean &= confirms.is_empty();
        for (outcome, message) in outcomes.iter_mut().zip(batch) {
            if returned.iter().any(|id| id.as_str() == message.message_id) {
                *outcome = PublishOutcome::Unroutable;
            }
        }
        outcomes
    }

    pub(super) async fn close(self, limit: Duration) {
        self.wire.close(limit).await;
    }
}
