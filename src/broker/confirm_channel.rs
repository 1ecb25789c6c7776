//! Publishing of one batch with confirms.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, TryFutureExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, Event};
use tokio::time::{Instant, timeout};

use super::connection::{Connection, Events};
use super::error::{BrokerError, within};
use super::message::Outgoing;
use super::publish_outcome::PublishOutcome;
use super::topology::{Names, refusal_of};
use super::{Broker, Purpose};
use crate::domain::clock::Deadline;

/// Messages passed to the connection's thread at once.
const SEND_WINDOW: usize = 64;

/// Age from which a channel is replaced after a nack: RabbitMQ goes on refusing the messages of a channel that it refused
/// once, after the policy that limited the queue is gone.
const REFUSED_AGE: Duration = Duration::from_secs(10);

/// Connection with one channel in confirm mode, used for one batch at a time.
pub(super) struct ConfirmChannel {
    pub(super) connection: Connection,
    channel: Channel,
    pub(super) events: Events,
    pub(super) limit: Duration,
    /// False once a message published on it has no confirm, or was refused for a while.
    pub(super) clean: bool,
    opened: Instant,
}

impl ConfirmChannel {
    pub(super) async fn open(broker: &Broker, purpose: Purpose) -> Result<Self, BrokerError> {
        let limit = broker.0.opening.answer_limit;
        let connection = broker.connect(purpose).await?;
        match broker.ensure(&connection).await {
            // The consumer reports both and is not ready; publishing may still succeed.
            Ok(()) | Err(BrokerError::Drift(_) | BrokerError::Permissions(_)) => {}
            Err(error) => return Err(error),
        }
        let channel = connection.channel().await?;
        let select = channel.confirm_select(ConfirmSelectOptions::default());
        within(limit, "asking for confirms", select).await?;
        let events = connection.events();
        Ok(Self { connection, channel, events, limit, clean: true, opened: Instant::now() })
    }

    /// Publishes a batch and waits for its confirms.
    ///
    /// The client matches confirms to messages correctly, but may attach a returned message to the wrong confirm when
    /// several are in flight. Returned messages are therefore matched by message id over the whole batch.
    pub(super) async fn publish(&mut self, names: &Names, batch: &[&Outgoing]) -> Vec<PublishOutcome> {
        let deadline = Deadline::after(self.limit);
        let frame_max = self.connection.frame_max();
        let mut outcomes = vec![PublishOutcome::Unsent; batch.len()];
        let mut denied = false;
        let (mut sending, mut confirms) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut rest = batch.iter().enumerate();
        loop {
            // Sent one by one, each message would wake the connection's thread and wait for it.
            for (index, message) in rest.by_ref().take(SEND_WINDOW - sending.len()) {
                outcomes[index] = PublishOutcome::Unknown;
                let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                let exchange = message.target.exchange(names);
                let (key, properties) = (message.routing_key.clone(), message.properties_within(frame_max));
                let publish = self.channel.basic_publish(exchange, key, options, &message.body, properties);
                sending.push(publish.map_ok(move |confirm| confirm.map(move |confirmation| (index, confirmation))));
            }
            match timeout(deadline.remaining(), sending.next()).await {
                Ok(Some(Ok(confirm))) => confirms.push(confirm),
                Ok(None) => break,
                failed => {
                    denied = matches!(&failed, Ok(Some(Err(error))) if refusal_of(error).is_some());
                    self.clean = false;
                    break;
                }
            }
        }
        let mut returned = HashSet::new();
        let mut note = |(index, confirmation): (usize, lapin::Result<Confirmation>)| {
            let confirmation = match confirmation {
                Ok(confirmation) => confirmation,
                Err(error) => {
                    denied |= refusal_of(&error).is_some();
                    return false;
                }
            };
            outcomes[index] = if confirmation.is_ack() { PublishOutcome::Confirmed } else { PublishOutcome::Refused };
            returned.extend(confirmation.take_message().and_then(|message| message.properties.message_id().clone()));
            true
        };
        while let Ok(Some(confirm)) = timeout(deadline.remaining(), confirms.next()).await {
            self.clean &= note(confirm);
        }
        // A returned message may be attached to any confirm received by now: read all of them.
        while let Some(Some(confirm)) = confirms.next().now_or_never() {
            self.clean &= note(confirm);
        }
        let refused = outcomes.contains(&PublishOutcome::Refused);
        self.clean &= confirms.is_empty() && !(refused && self.opened.elapsed() >= REFUSED_AGE);
        if denied {
            mark_denied(&mut outcomes);
        }
        for (outcome, message) in outcomes.iter_mut().zip(batch) {
            if returned.iter().any(|id| id.as_str() == message.message_id) {
                *outcome = PublishOutcome::Unroutable;
            }
        }
        outcomes
    }

    /// Publishes one message, and fails as soon as the broker blocks this connection because of an alarm.
    pub(super) async fn publish_one(&mut self, names: &Names, message: &Outgoing) -> Result<(), BrokerError> {
        let mut events = self.connection.events();
        let alarm = async {
            loop {
                match events.next().await {
                    Some(Event::ConnectionBlocked(reason)) => return BrokerError::Alarm(reason.to_string()),
                    Some(_) => {}
                    None => std::future::pending().await,
                }
            }
        };
        let batch = [message];
        tokio::select! {
            outcomes = self.publish(names, &batch) => {
                outcomes.first().copied().unwrap_or(PublishOutcome::Unknown).into_result("publishing the request")
            }
            alarm = alarm => Err(alarm),
        }
    }

    pub(super) async fn close(self, limit: Duration) {
        self.connection.close(limit).await;
    }
}

/// Marks the messages that the broker closed the channel about.
fn mark_denied(outcomes: &mut [PublishOutcome]) {
    for outcome in outcomes.iter_mut().filter(|outcome| **outcome == PublishOutcome::Unknown) {
        *outcome = PublishOutcome::Denied;
    }
}
