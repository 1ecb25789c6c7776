//! Live view of run-completed events for operators (`inventoryd events tail`).

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;

use super::connection::Connection;
use super::error::{BrokerError, within};
use super::message::short;
use super::{Broker, Purpose};

/// Subscription on a private temporary queue: sees events published from now on and takes none from other subscribers.
pub struct EventTail {
    consumer: lapin::Consumer,
    _connection: Connection,
}

/// One observed event.
#[derive(Debug, Clone)]
pub struct TailedEvent {
    /// `run.completed.<status>.<tenant_id>`.
    pub routing_key: String,
    /// Event id; the same for every repeat of an event.
    pub message_id: Option<String>,
    /// The CloudEvents envelope.
    pub body: Vec<u8>,
}

impl EventTail {
    pub(super) async fn open(broker: &Broker, pattern: &str) -> Result<Self, BrokerError> {
        let limit = broker.0.opening.answer_limit;
        let pattern = short(pattern).ok_or_else(|| {
            BrokerError::Config("the routing key pattern has more than 255 bytes; shorten it".to_owned())
        })?;
        let connection = broker.connect(Purpose::Manage).await?;
        broker.ensure(&connection).await?;
        let channel = connection.channel().await?;
        let options = QueueDeclareOptions::exclusive().auto_delete();
        let declare =
            channel.queue_declare(broker.names().private_queue("tail").into(), options, FieldTable::default());
        let queue = within(limit, "declaring a queue to listen on", declare).await?;
        let exchange = broker.names().events.as_str().into();
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        let bind = channel.queue_bind(queue.name().clone(), exchange, pattern, options, arguments);
        within(limit, "binding the queue to listen on", bind).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consume = channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default());
        Ok(Self { consumer: within(limit, "listening", consume).await?, _connection: connection })
    }

    /// Returns the next event, an error, or `None` once the broker has ended the subscription.
    pub async fn next(&mut self) -> Option<Result<TailedEvent, BrokerError>> {
        let delivery = self.consumer.next().await?;
        Some(delivery.map_err(BrokerError::while_doing("listening")).map(|delivery| TailedEvent {
            routing_key: delivery.routing_key.to_string(),
            message_id: delivery.properties.message_id().as_ref().map(ToString::to_string),
            body: delivery.data,
        }))
    }
}
