//! Listening to run-completed events, for people.

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;

use super::connection::Connection;
use super::error::{BrokerError, within};
use super::message::short;
use super::{Broker, Purpose};

/// Events as they are published. What was published before is not seen, and nothing is taken from anyone.
pub struct EventTail {
    consumer: lapin::Consumer,
    _wire: Connection,
}

/// One event that passed by.
#[derive(Debug, Clone)]
pub struct TailedEvent {
    /// `run.completed.<status>.<tenant_id>`.
    pub routing_key: String,
    /// The event's id: one that is published twice has the same.
    pub message_id: Option<String>,
    /// The CloudEvents envelope.
    pub body: Vec<u8>,
}

impl EventTail {
    pub(super) async fn open(broker: &Broker, pattern: &str) -> Result<Self, BrokerError> {
        let limit = broker.0.opening.answer_limit;
        let pattern = short(pattern)
            .ok_or_else(|| BrokerError::Config("the pattern of a routing key has at most 255 bytes".to_owned()))?;
        let wire = broker.connect(Purpose::Manage).await?;
        broker.ensure(&wire).await?;
        let channel = wire.channel().await?;
        let options = QueueDeclareOptions::exclusive().auto_delete();
        let declare = channel.queue_declare("".into(), options, FieldTable::default());
        let queue = within(limit, "declaring a queue to listen on", declare).await?;
        let exchange = broker.names().events.as_str().into();
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        let bind = channel.queue_bind(queue.name().clone(), exchange, pattern, options, arguments);
        within(limit, "binding the queue to listen on", bind).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consume = channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default());
        Ok(Self { consumer: within(limit, "listening", consume).await?, _wire: wire })
    }

    /// The next event, an error, or nothing once the broker has ended it.
    pub async fn next(&mut self) -> Option<Result<TailedEvent, BrokerError>> {
        let delivery = self.consumer.next().await?;
        Some(delivery.map_err(BrokerError::while_doing("listening")).map(|delivery| TailedEvent {
            routing_key: delivery.routing_key.to_string(),
            message_id: delivery.properties.message_id().as_ref().map(ToString::to_string),
            body: delivery.data,
        }))
    }
}
