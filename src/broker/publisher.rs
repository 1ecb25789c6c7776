//! Confirmed publishing on a connection of its own: while the broker blocks it, consuming continues.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::Event;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::confirm_channel::ConfirmChannel;
use super::deliveries::Delivery;
use super::error::BrokerError;
use super::message::{Outgoing, Target};
use super::publish_outcome::PublishOutcome;
use super::retry_tier::RetryTier;
use super::{Broker, Purpose};
use crate::backoff::{Waits, full_jitter};
use crate::domain::clock::Deadline;
use crate::domain::failure::Rejection;
use crate::telemetry;

/// Maximum number of messages in a batch, which share a time limit for their confirms.
const MAX_BATCH: usize = 512;
const QUEUED_JOBS: usize = 64;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

enum Job {
    Publish(Vec<Outgoing>, oneshot::Sender<Vec<PublishOutcome>>),
    Close(oneshot::Sender<()>),
}

/// Handle to the publishing task of this process. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    jobs: mpsc::Sender<Job>,
    blocked: Arc<AtomicBool>,
}

impl Publisher {
    pub(super) fn start(broker: &Broker) -> Self {
        let (jobs, waiting) = mpsc::channel(QUEUED_JOBS);
        let blocked = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            broker: broker.clone(),
            open_channel: None,
            waits: waits(),
            not_before: Instant::now(),
            blocked: Arc::clone(&blocked),
        };
        broker.0.spawner.spawn(worker.run(waiting));
        Self { jobs, blocked }
    }

    /// Publishes all messages and returns their outcomes in the same order.
    ///
    /// Takes at most one reconnect and one confirm timeout, plus those of the jobs queued before.
    pub async fn publish(&self, messages: Vec<Outgoing>) -> Vec<PublishOutcome> {
        let count = messages.len();
        let (reply, outcomes) = oneshot::channel();
        if self.jobs.send(Job::Publish(messages, reply)).await.is_err() {
            return vec![PublishOutcome::Unsent; count];
        }
        outcomes.await.unwrap_or_else(|_| vec![PublishOutcome::Unknown; count])
    }

    /// Publishes a copy of the delivery to the retry queue of a tier.
    pub async fn schedule_retry(&self, delivery: &Delivery, tier: RetryTier) -> PublishOutcome {
        let copy = Outgoing::retry(&delivery.original(), tier);
        self.publish_one(copy).await
    }

    /// Publishes a copy of the delivery to the dead-letter queue; `by` names the rejecting replica.
    pub async fn dead_letter(&self, delivery: &Delivery, rejection: &Rejection, by: &str) -> PublishOutcome {
        let copy = Outgoing::dead_letter(&delivery.original(), rejection, by);
        self.publish_one(copy).await
    }

    /// True while the broker blocks publishing (memory or disk alarm).
    #[must_use]
    pub fn blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
    }

    /// Publishes what is queued, then closes the connection. A later publish opens it again.
    pub async fn close(&self) {
        let (reply, done) = oneshot::channel();
        if self.jobs.send(Job::Close(reply)).await.is_ok() {
            // An error means that the task has ended and its connection is closed.
            let _ = done.await;
        }
    }

    async fn publish_one(&self, message: Outgoing) -> PublishOutcome {
        self.publish(vec![message]).await.first().copied().unwrap_or(PublishOutcome::Unknown)
    }
}

/// Publishing task, owner of the connection. Jobs that queue up while it is busy are published as one batch.
struct Worker {
    broker: Broker,
    open_channel: Option<ConfirmChannel>,
    waits: Waits,
    not_before: Instant,
    blocked: Arc<AtomicBool>,
}

impl Worker {
    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        loop {
            let job = match &mut self.open_channel {
                Some(channel) => tokio::select! {
                    job = jobs.recv() => job,
                    event = channel.events.next() => {
                        self.handle_event(event);
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
        while batch.len() < MAX_BATCH && close.is_none() {
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
            // A caller that stopped waiting publishes again.
            let _ = reply.send(outcomes.by_ref().take(count).collect());
        }
        if close.is_some() {
            self.close(close).await;
        }
    }

    /// Publishes one group for each destination: a destination that denies closes the channel under all of its group.
    async fn publish(&mut self, batch: &[Outgoing]) -> Vec<PublishOutcome> {
        let mut outcomes = vec![PublishOutcome::Unsent; batch.len()];
        for target in Target::ALL {
            let of_target = |(_, message): &(usize, &Outgoing)| message.target == target;
            let (places, group): (Vec<_>, Vec<_>) = batch.iter().enumerate().filter(of_target).unzip();
            if !group.is_empty() {
                let published = self.publish_group(&group).await;
                places.into_iter().zip(published).for_each(|(place, outcome)| outcomes[place] = outcome);
            }
        }
        outcomes
    }

    async fn publish_group(&mut self, batch: &[&Outgoing]) -> Vec<PublishOutcome> {
        let mut channel = match self.usable_channel().await {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(%error, messages = batch.len(), "publishing failed; no usable connection");
                return vec![PublishOutcome::Unsent; batch.len()];
            }
        };
        let outcomes = channel.publish(self.broker.names(), batch).await;
        self.set_blocked(channel.connection.blocked());
        let ours_is_unroutable = batch
            .iter()
            .zip(&outcomes)
            .any(|(message, outcome)| *outcome == PublishOutcome::Unroutable && message.target != Target::Events);
        if ours_is_unroutable && let Err(error) = self.broker.ensure(&channel.connection).await {
            tracing::warn!(%error, "topology incomplete");
        }
        self.open_channel = Some(channel);
        outcomes
    }

    /// Takes the open channel or opens one. The caller puts it back after the publish: an unfinished publish drops it.
    async fn usable_channel(&mut self) -> Result<ConfirmChannel, BrokerError> {
        if let Some(channel) = self.open_channel.take()
            && let Some(channel) = self.keep_if_usable(channel).await?
        {
            return Ok(channel);
        }
        sleep_until(self.not_before).await;
        match ConfirmChannel::open(&self.broker, Purpose::Publish).await {
            Ok(channel) => {
                self.waits = waits();
                self.set_blocked(channel.connection.blocked());
                Ok(channel)
            }
            Err(error) => {
                self.not_before = Instant::now() + full_jitter(self.waits.next_wait());
                Err(error)
            }
        }
    }

    /// Keeps a blocked connection: a new one would be blocked too, and could not be closed.
    async fn keep_if_usable(&mut self, channel: ConfirmChannel) -> Result<Option<ConfirmChannel>, BrokerError> {
        let after = channel.limit;
        let deadline = Deadline::after(after);
        while channel.connection.connected() && channel.connection.blocked() {
            if deadline.passed() {
                self.open_channel = Some(channel);
                return Err(BrokerError::TimedOut {
                    doing: "waiting for the broker's memory or disk alarm to clear",
                    after,
                });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.set_blocked(false);
        if channel.clean && channel.connection.connected() {
            return Ok(Some(channel));
        }
        // Late confirms of an earlier batch would be attributed to the next one.
        channel.close(after).await;
        Ok(None)
    }

    fn handle_event(&mut self, event: Option<Event>) {
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                tracing::warn!(reason, "broker blocked publishing; events wait in the outbox");
                self.set_blocked(true);
            }
            Some(Event::ConnectionUnblocked) => {
                tracing::info!("broker unblocked publishing");
                self.set_blocked(false);
            }
            Some(Event::Error(error)) => {
                tracing::warn!(%error, "publishing connection lost");
                self.drop_channel();
            }
            None => self.drop_channel(),
            Some(_) => {}
        }
    }

    fn drop_channel(&mut self) {
        self.open_channel = None;
        self.set_blocked(false);
    }

    fn set_blocked(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
        telemetry::broker_blocked(blocked);
    }

    async fn close(&mut self, done: Option<oneshot::Sender<()>>) {
        if let Some(channel) = self.open_channel.take() {
            let limit = channel.limit.min(Duration::from_secs(2));
            channel.close(limit).await;
        }
        if let Some(done) = done {
            let _ = done.send(());
        }
    }
}

fn waits() -> Waits {
    Waits::new(FIRST_BACKOFF, MAX_BACKOFF)
}
