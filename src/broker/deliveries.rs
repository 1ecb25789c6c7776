//! The subscription to the requests queue, and what arrives on it.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
    QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Acker, BasicProperties, Channel};

use super::connection::Connection;
use super::error::{BrokerError, within};
use super::message::{DEFERRED_S, Original, RETRIES, is_traceparent, is_tracestate, read_number, read_text};
use crate::telemetry;

const CONSUMER_TAG: &str = "inventoryd";

/// Connection, channel, topology, prefetch and consumer as one unit: it is never mended, only rebuilt as a whole.
pub struct Subscription {
    wire: Connection,
    channel: Channel,
    consumer: Option<lapin::Consumer>,
    requests: ShortString,
    limit: Duration,
}

impl Subscription {
    /// Starts to consume on a connection whose topology has been checked.
    pub(super) async fn start(
        wire: Connection,
        requests: &str,
        prefetch: u16,
        limit: Duration,
    ) -> Result<Self, BrokerError> {
        let channel = wire.channel().await?;
        // Not global: a quorum queue answers a global prefetch by closing the whole connection.
        let qos = channel.basic_qos(prefetch, BasicQosOptions { global: false });
        within(limit, "setting the prefetch", qos).await?;
        let mut subscription = Self { wire, channel, consumer: None, requests: requests.into(), limit };
        subscription.resume().await?;
        Ok(subscription)
    }

    /// The next delivery, an error that ends the subscription, or nothing once it has ended. It has also ended when
    /// that was not asked for: the broker cancels a consumer without an error when the queue is deleted or moves.
    ///
    /// While the consumer is cancelled this waits only for the connection to break.
    pub async fn next(&mut self) -> Option<Result<Delivery, BrokerError>> {
        let Some(consumer) = &mut self.consumer else {
            return self.broken().await;
        };
        let delivery = consumer.next().await?;
        Some(match delivery {
            Ok(delivery) => Ok(Delivery::new(delivery, self.limit)),
            Err(error) => Err(BrokerError::while_doing("consuming")(error)),
        })
    }

    /// Asks for no more deliveries and gives back those that had arrived unseen. The channel stays, and with it what
    /// is in hand can still be settled.
    ///
    /// # Errors
    /// If the broker does not answer; then the subscription is of no more use.
    pub async fn cancel(&mut self) -> Result<(), BrokerError> {
        let Some(mut consumer) = self.consumer.take() else { return Ok(()) };
        let cancel = self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        within(self.limit, "cancelling the consumer", cancel).await?;
        // The stream ends after what was on its way.
        while let Ok(Some(Ok(unseen))) = tokio::time::timeout(self.limit, consumer.next()).await {
            Delivery::new(unseen, self.limit).requeue().await?;
        }
        Ok(())
    }

    /// Asks for deliveries again after [`Subscription::cancel`], on the same channel.
    ///
    /// # Errors
    /// If the broker refuses or does not answer; then the subscription is of no more use.
    pub async fn resume(&mut self) -> Result<(), BrokerError> {
        if self.consumer.is_none() {
            let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
            let consume = self.channel.basic_consume(self.requests.clone(), CONSUMER_TAG.into(), options, arguments);
            self.consumer = Some(within(self.limit, "consuming", consume).await?);
        }
        Ok(())
    }

    /// How many requests are ready in the queue, that is, not in anyone's hands.
    ///
    /// # Errors
    /// If the queue is gone or the broker does not answer.
    pub async fn ready(&self) -> Result<u32, BrokerError> {
        // A refused passive declare closes its channel, which must not be the one that deliveries are settled on.
        let channel = self.wire.channel().await?;
        let options = QueueDeclareOptions::durable().passive();
        let declare = channel.queue_declare(self.requests.clone(), options, FieldTable::default());
        let queue = within(self.limit, "asking for the depth of the queue", declare).await?;
        let close = channel.close(200, "OK".into());
        within(self.limit, "closing a channel", close).await?;
        Ok(queue.message_count())
    }

    /// Closes the channel, then the connection; cuts them off if that takes longer than `limit` each.
    pub async fn close(self, limit: Duration) {
        let close = self.channel.close(200, "OK".into());
        if let Err(error) = within(limit, "closing the channel", close).await {
            tracing::debug!(%error, "the channel was not closed in order");
        }
        self.wire.close(limit).await;
    }

    async fn broken(&self) -> Option<Result<Delivery, BrokerError>> {
        while self.wire.connected() && self.channel.status().connected() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        None
    }
}

/// One request in hand. Dropped unsettled it stays unacknowledged until its channel closes.
#[derive(Debug)]
pub struct Delivery {
    /// The bytes, as they were published.
    pub body: Vec<u8>,
    /// The content type.
    pub content_type: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// W3C trace state.
    pub tracestate: Option<String>,
    /// How often it was parked by this daemon.
    pub retries: u32,
    /// How long it has been parked, in sum.
    pub deferred_s: u64,
    properties: BasicProperties,
    acker: Acker,
    limit: Duration,
}

impl Delivery {
    fn new(delivery: lapin::message::Delivery, limit: Duration) -> Self {
        let properties = delivery.properties;
        let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
        Self {
            content_type: text(properties.content_type()),
            traceparent: read_text(&properties, "traceparent").filter(|text| is_traceparent(text)),
            tracestate: read_text(&properties, "tracestate").filter(|text| is_tracestate(text)),
            retries: u32::try_from(read_number(&properties, RETRIES)).unwrap_or(u32::MAX),
            deferred_s: read_number(&properties, DEFERRED_S),
            body: delivery.data,
            properties,
            acker: delivery.acker,
            limit,
        }
    }

    /// Says that it is done. `false` if the channel it came on is gone: the broker delivers it again, and the
    /// redelivery finds a run that has ended, so there is nothing to do but to count.
    ///
    /// # Errors
    /// If the channel breaks at this very moment; the same holds.
    pub async fn ack(&self) -> Result<bool, BrokerError> {
        self.counted(within(self.limit, "acknowledging", self.acker.ack(BasicAckOptions::default())).await)
    }

    /// Gives it back to the queue, for another worker. From RabbitMQ 4.3 on this does not count as a failed delivery.
    ///
    /// # Errors
    /// If the channel breaks at this very moment; then the broker takes it back by itself.
    pub async fn requeue(&self) -> Result<bool, BrokerError> {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        within(self.limit, "handing back", self.acker.nack(options)).await
    }

    /// Gives it back as a failed delivery, which every version of RabbitMQ counts: what fails for ever ends as a
    /// dead letter.
    ///
    /// # Errors
    /// If the channel breaks at this very moment; then the broker takes it back by itself.
    pub async fn fail(&self) -> Result<bool, BrokerError> {
        within(self.limit, "failing", self.acker.reject(BasicRejectOptions { requeue: true })).await
    }

    /// Whether it can still be settled: false once its channel is gone.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.acker.usable()
    }

    pub(super) fn original(&self) -> Original<'_> {
        Original { properties: &self.properties, body: &self.body }
    }

    fn counted(&self, acked: Result<bool, BrokerError>) -> Result<bool, BrokerError> {
        if !matches!(acked, Ok(true)) {
            telemetry::ack_lost();
        }
        acked
    }
}
