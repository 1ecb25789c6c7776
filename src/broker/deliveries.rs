//! Subscription to the requests queue and its deliveries.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
    QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Acker, BasicProperties, Channel};

use super::connection::Connection;
use super::content_header::{BODY_DISCARDED, UNREADABLE};
use super::error::{BrokerError, within};
use super::message::{DEFERRED_S, Original, RETRIES, is_traceparent, is_tracestate, read_number, read_text};
use crate::telemetry;

/// Connection, channel, prefetch and consumer as one unit. It is unusable after any error: owners rebuild it.
pub struct Subscription {
    connection: Connection,
    channel: Channel,
    consumer: Option<lapin::Consumer>,
    requests: ShortString,
    prefetch: u16,
    limit: Duration,
    narrow: bool,
    /// Prefetch beyond the configured one.
    extra: u16,
    /// Number of consumers started so far.
    consumers: u32,
}

impl Subscription {
    /// Starts to consume on a connection whose topology was verified, one request at a time until [`Self::widen`]:
    /// whatever delivery still ends a session or the process ends it alone, and costs no other request a delivery.
    pub(super) async fn start(
        connection: Connection,
        requests: &str,
        prefetch: u16,
        limit: Duration,
    ) -> Result<Self, BrokerError> {
        let channel = connection.channel().await?;
        let requests = requests.into();
        let mut subscription = Self {
            connection,
            channel,
            consumer: None,
            requests,
            prefetch,
            limit,
            narrow: prefetch > 1,
            extra: 0,
            consumers: 0,
        };
        subscription.set_prefetch(1).await?;
        subscription.resume().await?;
        Ok(subscription)
    }

    /// True until the configured prefetch applies.
    #[must_use]
    pub fn narrow(&self) -> bool {
        self.narrow
    }

    /// Prefetch beyond the configured one.
    #[must_use]
    pub fn extra(&self) -> u16 {
        self.extra
    }

    /// Applies the configured prefetch plus `extra`, for deliveries that are held and must not stop the others. Returns
    /// deliveries that arrived meanwhile.
    pub async fn widen(&mut self, extra: u16) -> Result<Vec<Delivery>, BrokerError> {
        // A prefetch applies to consumers started after it.
        let buffered = self.stop_consumer().await?;
        self.set_prefetch(self.prefetch.saturating_add(extra)).await?;
        self.extra = extra;
        self.narrow = false;
        self.resume().await?;
        Ok(buffered)
    }

    async fn set_prefetch(&self, prefetch: u16) -> Result<(), BrokerError> {
        // Not global: a quorum queue answers a global prefetch by closing the connection.
        let qos = self.channel.basic_qos(prefetch, BasicQosOptions { global: false });
        within(self.limit, "setting the prefetch", qos).await
    }

    /// Returns the next delivery, an error that ends the subscription, or `None` once it has ended. The broker ends a
    /// consumer without an error when the queue is deleted or moves.
    ///
    /// While the consumer is cancelled this only waits for the connection to be lost.
    pub async fn next(&mut self) -> Option<Result<Delivery, BrokerError>> {
        let Some(consumer) = &mut self.consumer else {
            return self.lost().await;
        };
        let delivery = consumer.next().await?;
        Some(match delivery {
            Ok(delivery) => Ok(Delivery::new(delivery, self.limit)),
            Err(error) => Err(BrokerError::while_doing("consuming")(error)),
        })
    }

    /// Cancels the consumer and requeues buffered deliveries. The channel stays open, so that deliveries in flight can
    /// still be settled.
    pub async fn cancel(&mut self) -> Result<(), BrokerError> {
        for delivery in self.stop_consumer().await? {
            delivery.requeue().await?;
        }
        Ok(())
    }

    /// Cancels the consumer and returns its buffered deliveries.
    async fn stop_consumer(&mut self) -> Result<Vec<Delivery>, BrokerError> {
        let Some(mut consumer) = self.consumer.take() else { return Ok(Vec::new()) };
        let cancel = self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        within(self.limit, "cancelling the consumer", cancel).await?;
        let mut buffered = Vec::new();
        // The stream ends after the deliveries that were in transit.
        while let Ok(Some(Ok(delivery))) = tokio::time::timeout(self.limit, consumer.next()).await {
            buffered.push(Delivery::new(delivery, self.limit));
        }
        Ok(buffered)
    }

    /// Consumes again after [`Subscription::cancel`], on the same channel.
    pub async fn resume(&mut self) -> Result<(), BrokerError> {
        if self.consumer.is_none() {
            let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
            // A new tag each time: RabbitMQ 3.10 closes the connection with an internal error when a tag is used again
            // while deliveries of its first use are in flight.
            self.consumers += 1;
            let tag = format!("inventoryd-{}", self.consumers);
            let consume = self.channel.basic_consume(self.requests.clone(), tag.into(), options, arguments);
            self.consumer = Some(within(self.limit, "consuming", consume).await?);
        }
        Ok(())
    }

    /// Consumes on a new channel, unless deliveries were in transit; returns those. No delivery of the old channel may be
    /// unsettled.
    ///
    /// RabbitMQ counts what it assigned to a consumer as delivered even if the consumer never got it, as after the deletion of a
    /// queue that is declared again at once. Only the end of the channel makes such requests ready again.
    pub async fn renew(&mut self) -> Result<Vec<Delivery>, BrokerError> {
        let in_transit = self.stop_consumer().await?;
        if in_transit.is_empty() {
            let old = std::mem::replace(&mut self.channel, self.connection.channel().await?);
            within(self.limit, "closing a channel", old.close(200, "OK".into())).await?;
            self.set_prefetch(if self.narrow { 1 } else { self.prefetch.saturating_add(self.extra) }).await?;
        }
        self.resume().await?;
        Ok(in_transit)
    }

    /// Number of ready requests in the queue.
    ///
    /// # Errors
    /// If the queue is missing or the broker does not answer.
    pub async fn ready(&self) -> Result<u32, BrokerError> {
        // On a separate channel: a refused passive declare closes its channel, and deliveries are settled on ours.
        let channel = self.connection.channel().await?;
        let options = QueueDeclareOptions::durable().passive();
        let declare = channel.queue_declare(self.requests.clone(), options, FieldTable::default());
        let queue = within(self.limit, "reading the queue's depth", declare).await?;
        let close = channel.close(200, "OK".into());
        within(self.limit, "closing a channel", close).await?;
        Ok(queue.message_count())
    }

    /// Closes the channel, then the connection, each within `limit`.
    pub async fn close(self, limit: Duration) {
        let close = self.channel.close(200, "OK".into());
        if let Err(error) = within(limit, "closing the channel", close).await {
            tracing::debug!(%error, "channel not closed in order");
        }
        self.connection.close(limit).await;
    }

    async fn lost(&self) -> Option<Result<Delivery, BrokerError>> {
        while self.connection.connected() && self.channel.status().connected() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        None
    }
}

/// One delivered request. Dropped unsettled it stays unacknowledged until its channel closes. Settling fails if the channel
/// closes at that moment; the broker then requeues.
#[derive(Debug)]
pub struct Delivery {
    /// Body, byte for byte as published.
    pub body: Vec<u8>,
    /// Content type.
    pub content_type: Option<String>,
    /// Content encoding.
    pub content_encoding: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// W3C trace state.
    pub tracestate: Option<String>,
    /// Number of retries so far.
    pub retries: u32,
    /// Total time spent in retry queues, in seconds.
    pub deferred_s: u64,
    /// Properties that were removed because the AMQP client cannot parse them.
    pub unreadable: Option<String>,
    /// Size of a body that was not kept because it is far above the limit.
    pub discarded_bytes: Option<u64>,
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
            content_encoding: text(properties.content_encoding()),
            traceparent: read_text(&properties, "traceparent").filter(|text| is_traceparent(text)),
            tracestate: read_text(&properties, "tracestate").filter(|text| is_tracestate(text)),
            retries: u32::try_from(read_number(&properties, RETRIES)).unwrap_or(u32::MAX),
            deferred_s: read_number(&properties, DEFERRED_S),
            unreadable: read_text(&properties, UNREADABLE),
            discarded_bytes: Some(read_number(&properties, BODY_DISCARDED)).filter(|bytes| *bytes > 0),
            body: delivery.data,
            properties,
            acker: delivery.acker,
            limit,
        }
    }

    /// Acknowledges. `false` if its channel is closed: the broker redelivers, the redelivery finds a terminal run, and
    /// the lost ack is only counted.
    pub async fn ack(&self) -> Result<bool, BrokerError> {
        self.counted(within(self.limit, "acknowledging", self.acker.ack(BasicAckOptions::default())).await)
    }

    /// Returns the delivery to the queue. RabbitMQ 4.3 and newer do not count this as a failed delivery.
    pub async fn requeue(&self) -> Result<bool, BrokerError> {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        within(self.limit, "requeueing", self.acker.nack(options)).await
    }

    /// Returns the delivery to the queue as failed. Every version of RabbitMQ counts this, so a request that always
    /// fails becomes a dead letter.
    pub async fn fail(&self) -> Result<bool, BrokerError> {
        within(self.limit, "rejecting", self.acker.reject(BasicRejectOptions { requeue: true })).await
    }

    /// Has the broker dead-letter the original message, byte for byte.
    pub async fn dead_letter_original(&self) -> Result<bool, BrokerError> {
        within(self.limit, "dead-lettering", self.acker.reject(BasicRejectOptions { requeue: false })).await
    }

    /// True while the delivery can be settled, false once its channel is closed.
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
