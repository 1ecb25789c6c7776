//! Watch over one published request: whether it is dead-lettered, consumed at all, or held up by an alarm.

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::confirm_channel::ConfirmChannel;
use super::connection::Connection;
use super::dead_letters::DeadLetter;
use super::error::{BrokerError, within};
use super::message::Outgoing;
use super::{Broker, Purpose};

/// Most dead letters that wait in the private queue; older ones are dropped.
const MAX_LETTERS: i64 = 1_000;

/// Request that was published and confirmed.
pub struct RequestWatch {
    broker: Broker,
    publishing: ConfirmChannel,
    message_id: String,
    /// Copies of all dead letters from before the publish on; none if this user may not have a queue for them.
    letters: Option<lapin::Consumer>,
}

impl RequestWatch {
    pub(super) async fn publish(broker: &Broker, request: &Outgoing) -> Result<Self, BrokerError> {
        let mut publishing = ConfirmChannel::open(broker, Purpose::Manage).await?;
        let letters = match watch_dead_letters(broker, &publishing.connection).await {
            Ok(letters) => Some(letters),
            Err(error) => {
                tracing::debug!(%error, "dead letters not watched");
                None
            }
        };
        publishing.publish_one(broker.names(), request).await?;
        Ok(Self { broker: broker.clone(), publishing, message_id: request.message_id.clone(), letters })
    }

    /// Waits until the request is dead-lettered; for ever if it is not, or if dead letters cannot be watched.
    pub async fn dead_letter(&mut self) -> DeadLetter {
        if let Some(letters) = &mut self.letters {
            while let Some(Ok(delivery)) = letters.next().await {
                let letter = DeadLetter::read(delivery, self.broker.names());
                if letter.message_id.as_deref() == Some(self.message_id.as_str()) {
                    return letter;
                }
            }
        }
        self.letters = None;
        std::future::pending().await
    }

    /// False if this user may not have a private queue, so that a dead letter goes unnoticed.
    #[must_use]
    pub fn watches_dead_letters(&self) -> bool {
        self.letters.is_some()
    }

    /// Number of consumers of the request queue.
    ///
    /// # Errors
    /// If the queue is missing or the broker does not answer.
    pub async fn consumers(&self) -> Result<u32, BrokerError> {
        let limit = self.publishing.limit;
        // On a separate channel: a refused passive declare closes its channel.
        let channel = self.publishing.connection.channel().await?;
        let name = self.broker.names().requests.as_str().into();
        let declare = channel.queue_declare(name, QueueDeclareOptions::durable().passive(), FieldTable::default());
        let queue = within(limit, "counting consumers", declare).await?;
        within(limit, "closing a channel", channel.close(200, "OK".into())).await?;
        Ok(queue.consumer_count())
    }

    /// True while an alarm of the broker blocks publishers.
    #[must_use]
    pub fn blocked(&self) -> bool {
        self.publishing.connection.blocked()
    }
}

/// Consumes from a private temporary queue that gets a copy of every dead letter; the dead-letter queue is not touched.
async fn watch_dead_letters(broker: &Broker, connection: &Connection) -> Result<lapin::Consumer, BrokerError> {
    let limit = broker.0.opening.answer_limit;
    let channel = connection.channel().await?;
    let options = QueueDeclareOptions::exclusive().auto_delete();
    let mut arguments = FieldTable::default();
    // A command that is suspended must not fill the broker.
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(MAX_LETTERS));
    let name = broker.names().private_queue("wait");
    let declare = channel.queue_declare(name.as_str().into(), options, arguments);
    let queue = within(limit, "declaring a queue for dead letters", declare).await?;
    let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
    let exchange = broker.names().dead.as_str().into();
    let bind = channel.queue_bind(queue.name().clone(), exchange, "".into(), options, arguments);
    within(limit, "binding a queue for dead letters", bind).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let consume = channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default());
    within(limit, "listening for dead letters", consume).await
}
