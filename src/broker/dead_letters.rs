//! Dead-letter queue for operators: list, show, replay, drop.
//!
//! Letters are read without acknowledgement and return to their queue when the channel closes. Only letters that were
//! replayed with a confirm, or dropped, are acknowledged. Where a policy limits deliveries, a letter that was read too often
//! moves to a second queue, which is read too.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Acker, BasicProperties, Channel};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::confirm_channel::ConfirmChannel;
use super::connection::Connection;
use super::content_header::BODY_DISCARDED;
use super::error::{BrokerError, within};
use super::message::{
    DEAD_AT, DEAD_BY, DEAD_DETAIL, DEAD_ID, DEAD_REASON, Original, Outgoing, RETRIES, read_number, read_text,
    value_text,
};
use super::topology::{Names, refusal};
use super::{Broker, Purpose};
use crate::domain::event::rfc3339;
use crate::domain::request::SyncRequest;

/// Dead letters present when this was opened, oldest first.
pub struct DeadLetters {
    publishing: ConfirmChannel,
    channel: Channel,
    names: Names,
    /// Queues that hold letters, with the number of those not yet read.
    unread: VecDeque<(String, u32)>,
    /// Number of letters seen with each id.
    seen: HashMap<String, u32>,
    limit: Duration,
}

/// One dead letter.
#[derive(Debug)]
pub struct DeadLetter {
    /// Short id, the same at every read. Letters of the broker that equal each other are numbered: `…`, `…-2`.
    pub id: String,
    /// Reason code; see [`crate::domain::failure::DeadReason`].
    pub reason: String,
    /// Detail of the rejection, if the daemon rejected it.
    pub detail: Option<String>,
    /// Time of rejection, RFC 3339, by the clock of the rejecting host or broker.
    pub at: Option<String>,
    /// Rejecting replica, or `broker`.
    pub by: String,
    /// Message id of the publisher.
    pub message_id: Option<String>,
    /// Correlation id of the publisher.
    pub correlation_id: Option<String>,
    /// Content type.
    pub content_type: Option<String>,
    /// Number of retries before the rejection.
    pub retries: u64,
    /// Size of the body in bytes.
    pub bytes: u64,
    /// Body, byte for byte as published; empty if it was not kept.
    pub body: Vec<u8>,
    /// False if the body was not kept because it is far above the limit.
    pub complete: bool,
    /// Reason for which the broker moved it out of the dead-letter queue, if it did: a policy limits that queue.
    pub moved: Option<String>,
    /// Set by the daemon, equal for every copy of one message.
    pub dead_id: Option<String>,
    properties: BasicProperties,
    /// One for each copy.
    ackers: Vec<Acker>,
}

/// Warning of letters that a policy of the broker moved out of the dead-letter queue, if any wait. A user who may not look
/// gets none.
pub(super) async fn warn_of_kept(
    connection: &Connection,
    names: &Names,
    limit: Duration,
) -> Result<Option<String>, BrokerError> {
    let channel = connection.channel().await?;
    let options = QueueDeclareOptions::durable().passive();
    let declare = channel.queue_declare(names.dead_kept.as_str().into(), options, FieldTable::default());
    let depth = match within(limit, "reading the depth of a queue", declare).await {
        Ok(queue) => queue.message_count(),
        Err(error) if refusal(&error).is_some() => 0,
        Err(error) => return Err(error),
    };
    Ok((depth > 0).then(|| {
        format!(
            "{depth} dead letters wait in {}, moved there by a policy of the broker: exempt {} from that policy (deploy/README.md, \
             Policies), then list them with `inventoryd dead list` and replay or drop each",
            names.dead_kept, names.dead
        )
    }))
}

impl DeadLetters {
    pub(super) async fn open(broker: &Broker) -> Result<Self, BrokerError> {
        let limit = broker.0.opening.answer_limit;
        let publishing = ConfirmChannel::open(broker, Purpose::Manage).await?;
        let channel = publishing.connection.channel().await?;
        let names = broker.names().clone();
        let mut unread = VecDeque::new();
        for queue in [&names.dead, &names.dead_kept] {
            let options = QueueDeclareOptions::durable().passive();
            let declare = channel.queue_declare(queue.as_str().into(), options, FieldTable::default());
            let depth = within(limit, "reading the dead-letter queue's depth", declare).await?.message_count();
            unread.push_back((queue.clone(), depth));
        }
        Ok(Self { publishing, channel, names, unread, seen: HashMap::new(), limit })
    }

    /// Number of messages not yet read. Copies of one letter count as many.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.unread.iter().map(|(_, count)| count).sum()
    }

    /// Reads the next letter. Ends with the last that was present at the beginning: a replayed one may be back by then.
    pub async fn next(&mut self) -> Result<Option<DeadLetter>, BrokerError> {
        while let Some((queue, left)) = self.unread.front_mut() {
            if *left == 0 {
                self.unread.pop_front();
                continue;
            }
            *left -= 1;
            let get = self.channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: false });
            let Some(message) = within(self.limit, "reading a dead letter", get).await? else {
                self.unread.pop_front();
                continue;
            };
            let mut letter = DeadLetter::read(message.delivery, &self.names);
            let seen = self.seen.entry(letter.id.clone()).or_default();
            *seen += 1;
            if letter.dead_id.is_none() && *seen > 1 {
                letter.id = format!("{}-{seen}", letter.id);
            }
            return Ok(Some(letter));
        }
        Ok(None)
    }

    /// Reads the oldest letters, at most `limit`. Copies of one letter are one. Keeps the bodies of those chosen by
    /// `keep_body` only: together they can exceed the memory.
    pub async fn list(
        &mut self,
        limit: usize,
        keep_body: impl Fn(&DeadLetter) -> bool,
    ) -> Result<Vec<DeadLetter>, BrokerError> {
        let mut letters: Vec<DeadLetter> = Vec::new();
        let mut positions = HashMap::new();
        while letters.len() < limit
            && let Some(mut letter) = self.next().await?
        {
            if !keep_body(&letter) {
                letter.body = Vec::new();
            }
            let position = letter.dead_id.clone().map(|id| *positions.entry(id).or_insert(letters.len()));
            match position.and_then(|position| letters.get_mut(position)) {
                Some(first) => first.ackers.extend(letter.ackers),
                None => letters.push(letter),
            }
        }
        Ok(letters)
    }

    /// Finds the oldest letter whose id starts with `id`, with all its copies.
    pub async fn find(&mut self, id: &str) -> Result<Option<DeadLetter>, BrokerError> {
        let mut found: Option<DeadLetter> = None;
        while let Some(letter) = self.next().await? {
            match &mut found {
                None if letter.id.starts_with(id) => found = Some(letter),
                Some(first) if first.dead_id.is_some() && first.dead_id == letter.dead_id => {
                    first.ackers.extend(letter.ackers);
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Publishes the request with a new message id and the same body, and removes the dead letter once that is
    /// confirmed.
    ///
    /// # Errors
    /// If it was not confirmed; the dead letter stays. If the request was stored but the letter could not be removed,
    /// a second replay is harmless because of the idempotency key.
    pub async fn replay(&mut self, letter: &DeadLetter) -> Result<(), BrokerError> {
        if !letter.complete {
            let problem = "the body is too large to be a request; drop the letter and publish a smaller request";
            return Err(BrokerError::NotTaken(problem.to_owned()));
        }
        let original = Original { properties: &letter.properties, body: &letter.body };
        let outcomes = self.publishing.publish(&self.names, &[&Outgoing::replay(&original)]).await;
        for outcome in outcomes {
            outcome.into_result("replaying the dead letter")?;
        }
        self.discard(letter).await
    }

    /// Removes the dead letter for good, with all its copies.
    ///
    /// # Errors
    /// If the acknowledgement fails; the letter stays.
    pub async fn discard(&mut self, letter: &DeadLetter) -> Result<(), BrokerError> {
        let mut removed = true;
        for acker in &letter.ackers {
            let ack = acker.ack(BasicAckOptions::default());
            removed &= within(self.limit, "removing the dead letter", ack).await?;
        }
        if removed {
            return Ok(());
        }
        Err(BrokerError::NotTaken("the channel of the dead letter was closed; list the letters again".to_owned()))
    }

    /// Returns every letter that was only read to the queue.
    pub async fn close(self) {
        // Since RabbitMQ 4.3 a nack is no failed delivery, while a closed channel is one.
        let back = BasicNackOptions { multiple: true, requeue: true };
        if let Err(error) = within(self.limit, "returning the letters", self.channel.basic_nack(0, back)).await {
            tracing::debug!(%error, "letters not returned; the broker returns them");
        }
        // An orderly close waits for the acknowledgements sent before it; a shut socket could lose them.
        let close = self.channel.close(200, "OK".into());
        if let Err(error) = within(self.limit, "closing the channel", close).await {
            tracing::debug!(%error, "channel not closed in order");
        }
        self.publishing.close(self.limit).await;
    }
}

impl DeadLetter {
    /// Number of copies of this letter that were read with it.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.ackers.len()
    }

    pub(super) fn read(delivery: lapin::message::Delivery, names: &Names) -> Self {
        let properties = delivery.properties;
        let death = Death::of(&properties, &names.requests);
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
        let discarded = Some(read_number(&properties, BODY_DISCARDED)).filter(|bytes| *bytes > 0);
        // The broker moved a message with such a body by itself; its own reason says less.
        let too_large = discarded.map(SyncRequest::too_large);
        let reason = read_text(&properties, DEAD_REASON)
            .or_else(|| Some(too_large.as_ref()?.reason.to_string()))
            .or(death.reason);
        Self {
            id: id_of(&properties, &delivery.data, death.at_s),
            reason: reason.unwrap_or_else(|| "unknown".to_owned()),
            detail: read_text(&properties, DEAD_DETAIL).or(too_large.map(|rejection| rejection.detail)),
            complete: discarded.is_none(),
            bytes: discarded.unwrap_or(delivery.data.len() as u64),
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
            moved: Death::entry(&properties, &names.dead).and_then(|death| text_in(death, "reason")),
            dead_id: read_text(&properties, DEAD_ID),
            properties,
            ackers: vec![delivery.acker],
        }
    }
}

/// Broker's own record (`x-death`) of a message it dead-lettered.
#[derive(Debug, Default, PartialEq, Eq)]
struct Death {
    reason: Option<String>,
    at_s: Option<u64>,
}

impl Death {
    /// Reads the entry of the requests queue; `x-death` also has one for each retry queue the message has passed.
    fn of(properties: &BasicProperties, requests: &str) -> Self {
        let first = || Self::entries(properties).next();
        let Some(death) = Self::entry(properties, requests).or_else(first) else { return Self::default() };
        let at_s = death.inner().get("time").and_then(AMQPValue::as_timestamp);
        Self { reason: text_in(death, "reason"), at_s }
    }

    fn entry<'a>(properties: &'a BasicProperties, queue: &str) -> Option<&'a FieldTable> {
        Self::entries(properties).find(|death| text_in(death, "queue").as_deref() == Some(queue))
    }

    fn entries(properties: &BasicProperties) -> impl Iterator<Item = &FieldTable> {
        let deaths = properties.headers().as_ref().and_then(|headers| headers.inner().get("x-death"));
        let deaths = match deaths {
            Some(AMQPValue::FieldArray(deaths)) => deaths.as_slice(),
            _ => &[],
        };
        deaths.iter().filter_map(AMQPValue::as_field_table)
    }
}

fn text_in(table: &FieldTable, key: &str) -> Option<String> {
    table.inner().get(key).and_then(value_text)
}

/// Short id of twelve hexadecimal digits, stable across reads also for letters without an `x-dead-id`.
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
    fn reason_is_taken_from_the_requests_queue_entry_of_x_death() {
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
    fn ids_are_stable_and_distinct() {
        let plain = BasicProperties::default();
        assert_eq!(id_of(&plain, b"a", Some(1)), id_of(&plain, b"a", Some(1)));
        assert_ne!(id_of(&plain, b"a", Some(1)), id_of(&plain, b"b", Some(1)));
        assert_eq!(id_of(&plain, b"a", None).len(), 12);
    }
}
