//! The dead-letter queue, for people: look, replay, drop.
//!
//! What is looked at is taken unacknowledged and goes back when the channel closes. Only what was replayed, and
//! confirmed, or dropped by name is acknowledged.

use std::time::Duration;

use lapin::options::{BasicAckOptions, BasicGetOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Acker, BasicProperties, Channel};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::error::{BrokerError, within};
use super::message::{
    DEAD_AT, DEAD_BY, DEAD_DETAIL, DEAD_ID, DEAD_REASON, Original, Outgoing, RETRIES, read_number, read_text,
    value_text,
};
use super::publisher::ConfirmChannel;
use super::topology::Names;
use super::{Broker, Purpose};
use crate::domain::event::rfc3339;

/// The dead letters that were there when this was opened, oldest first.
pub struct DeadLetters {
    link: ConfirmChannel,
    channel: Channel,
    names: Names,
    left: u32,
    limit: Duration,
}

/// One dead letter.
#[derive(Debug)]
pub struct DeadLetter {
    /// What it is called by: the same at every look.
    pub id: String,
    /// Why it is here; [`crate::domain::failure::DeadReason`] lists them.
    pub reason: String,
    /// What exactly was wrong, if we put it here.
    pub detail: Option<String>,
    /// When it came here, RFC 3339, by the clock of the host or broker that put it here.
    pub at: Option<String>,
    /// Which process put it here; `broker` if that gave it up by itself.
    pub by: String,
    /// The publisher's message id.
    pub message_id: Option<String>,
    /// The publisher's correlation id.
    pub correlation_id: Option<String>,
    /// The content type.
    pub content_type: Option<String>,
    /// How often it was parked before.
    pub retries: u64,
    /// The bytes, as they were published.
    pub body: Vec<u8>,
    properties: BasicProperties,
    acker: Acker,
}

impl DeadLetters {
    pub(super) async fn open(broker: &Broker) -> Result<Self, BrokerError> {
        let limit = broker.0.opening.answer_limit;
        let link = ConfirmChannel::open(broker, Purpose::Manage).await?;
        let channel = link.wire.channel().await?;
        let names = broker.names().clone();
        let options = QueueDeclareOptions::durable().passive();
        let declare = channel.queue_declare(names.dead.as_str().into(), options, FieldTable::default());
        let left = within(limit, "asking for the dead letters", declare).await?.message_count();
        Ok(Self { link, channel, names, left, limit })
    }

    /// How many have not been looked at yet.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.left
    }

    /// The next one. It ends with the last that was there at the beginning: a replayed one may be back by then.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn next(&mut self) -> Result<Option<DeadLetter>, BrokerError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let get = self.channel.basic_get(self.names.dead.as_str().into(), BasicGetOptions { no_ack: false });
        let got = within(self.limit, "reading a dead letter", get).await?;
        Ok(got.map(|message| DeadLetter::read(message.delivery, &self.names.requests)))
    }

    /// The oldest ones, at most so many.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn list(&mut self, limit: usize) -> Result<Vec<DeadLetter>, BrokerError> {
        let mut letters = Vec::new();
        while letters.len() < limit
            && let Some(letter) = self.next().await?
        {
            letters.push(letter);
        }
        Ok(letters)
    }

    /// The oldest one whose id begins with `id`.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn find(&mut self, id: &str) -> Result<Option<DeadLetter>, BrokerError> {
        while let Some(letter) = self.next().await? {
            if letter.id.starts_with(id) {
                return Ok(Some(letter));
            }
        }
        Ok(None)
    }

    /// Publishes the request anew, with a fresh message id and the same bytes, and takes the dead letter away once
    /// that is confirmed.
    ///
    /// # Errors
    /// If it was not confirmed: then the dead letter stays. If the request is stored but the dead letter could not
    /// be taken away, it may be replayed again: the idempotency key makes that harmless.
    pub async fn replay(&mut self, letter: &DeadLetter) -> Result<(), BrokerError> {
        let original = Original { properties: &letter.properties, body: &letter.body };
        let outcomes = self.link.publish(&self.names, &[Outgoing::replay(&original)]).await;
        for outcome in outcomes {
            outcome.into_result("replaying the dead letter")?;
        }
        self.discard(letter).await
    }

    /// Takes the dead letter away for good.
    ///
    /// # Errors
    /// If the broker does not take the acknowledgement: then it stays.
    pub async fn discard(&mut self, letter: &DeadLetter) -> Result<(), BrokerError> {
        let ack = letter.acker.ack(BasicAckOptions::default());
        if within(self.limit, "taking the dead letter away", ack).await? {
            return Ok(());
        }
        Err(BrokerError::NotTaken("the dead letter is not in hand any more; look again".to_owned()))
    }

    /// Gives back everything that was only looked at.
    pub async fn close(self) {
        // Closing in order waits for the acknowledgements before it; cut off, they could be lost.
        let close = self.channel.close(200, "OK".into());
        if let Err(error) = within(self.limit, "closing the channel", close).await {
            tracing::debug!(%error, "the channel was not closed in order");
        }
        self.link.close(self.limit).await;
    }
}

impl DeadLetter {
    fn read(delivery: lapin::message::Delivery, requests: &str) -> Self {
        let properties = delivery.properties;
        let death = Death::of(&properties, requests);
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
        let reason = read_text(&properties, DEAD_REASON).or(death.reason);
        Self {
            id: id_of(&properties, &delivery.data, death.at_s),
            reason: reason.unwrap_or_else(|| "unknown".to_owned()),
            detail: read_text(&properties, DEAD_DETAIL),
            at: read_text(&properties, DEAD_AT).or_else(|| {
                let moment = OffsetDateTime::from_unix_timestamp(i64::try_from(death.at_s?).ok()?).ok()?;
                Some(rfc3339(moment))
            }),
            by: read_text(&properties, DEAD_BY).unwrap_or_else(|| "broker".to_owned()),
            message_id: text(properties.message_id()),
            correlation_id: text(properties.correlation_id()),
            content_type: text(properties.content_type()),
            retries: read_number(&properties, RETRIES),
            body: delivery.data,
            properties,
            acker: delivery.acker,
        }
    }
}

/// What the broker says about a message that it gave up by itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Death {
    reason: Option<String>,
    at_s: Option<u64>,
}

impl Death {
    /// `x-death` also tells of the rungs that the message waited on; what counts is how it left the requests queue.
    fn of(properties: &BasicProperties, requests: &str) -> Self {
        let deaths = properties.headers().as_ref().and_then(|headers| headers.inner().get("x-death"));
        let Some(AMQPValue::FieldArray(deaths)) = deaths else { return Self::default() };
        let tables = || deaths.as_slice().iter().filter_map(AMQPValue::as_field_table);
        let of_requests = |death: &&FieldTable| text_in(death, "queue").as_deref() == Some(requests);
        let Some(death) = tables().find(of_requests).or_else(|| tables().next()) else { return Self::default() };
        let at_s = death.inner().get("time").and_then(AMQPValue::as_timestamp);
        Self { reason: text_in(death, "reason"), at_s }
    }
}

fn text_in(table: &FieldTable, key: &str) -> Option<String> {
    table.inner().get(key).and_then(value_text)
}

/// Twelve hexadecimal digits that stay the same at every look, also for a message to which the broker gave no id.
fn id_of(properties: &BasicProperties, body: &[u8], died_at_s: Option<u64>) -> String {
    let mut hash = Sha256::new();
    match read_text(properties, DEAD_ID) {
        Some(id) => hash.update(id),
        None => {
            hash.update(properties.message_id().as_ref().map_or("", |id| id.as_str()));
            hash.update(died_at_s.unwrap_or(0).to_be_bytes());
            hash.update(body);
        }
    }
    hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn death(queue: &str, reason: &str, time: u64) -> AMQPValue {
        let mut table = FieldTable::default();
        table.insert("queue".into(), AMQPValue::LongString(queue.into()));
        table.insert("reason".into(), AMQPValue::LongString(reason.into()));
        table.insert("time".into(), AMQPValue::Timestamp(time));
        AMQPValue::FieldTable(table)
    }

    #[test]
    fn the_brokers_reason_is_how_the_message_left_the_requests_queue() {
        let mut headers = FieldTable::default();
        let deaths = vec![death("inventory.retry.5s", "expired", 5), death("requests", "delivery_limit", 9)];
        headers.insert("x-death".into(), AMQPValue::FieldArray(deaths.into()));
        let properties = BasicProperties::default().with_headers(headers);
        let found = Death::of(&properties, "requests");
        assert_eq!(found, Death { reason: Some("delivery_limit".to_owned()), at_s: Some(9) });
        assert_eq!(Death::of(&properties, "other").reason.as_deref(), Some("expired"));
        assert_eq!(Death::of(&BasicProperties::default(), "requests"), Death::default());
    }

    #[test]
    fn an_id_stays_the_same_and_tells_messages_apart() {
        let plain = BasicProperties::default();
        assert_eq!(id_of(&plain, b"a", Some(1)), id_of(&plain, b"a", Some(1)));
        assert_ne!(id_of(&plain, b"a", Some(1)), id_of(&plain, b"b", Some(1)));
        assert_eq!(id_of(&plain, b"a", None).len(), 12);
    }
}
