//! Outgoing messages: events, requests, and copies of deliveries for retry and dead-letter queues.

use std::collections::BTreeMap;
use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use super::content_header::{BODY_DISCARDED, UNREADABLE};
use super::retry_tier::RetryTier;
use super::topology::{Names, SYNC_REQUESTED};
use crate::backoff::full_jitter;
use crate::domain::clock;
use crate::domain::event::{RunCompleted, rfc3339};
use crate::domain::failure::Rejection;
use crate::domain::request::CLOUDEVENTS_CONTENT_TYPE;

pub(super) const RETRIES: &str = "x-inventoryd-retries";
pub(super) const DEFERRED_S: &str = "x-inventoryd-deferred-s";
/// Headers of [`crate::domain::dead_letter::RejectedHeaders`].
pub(super) const DEAD_ID: &str = "x-dead-id";
pub(super) const DEAD_REASON: &str = "x-dead-reason";
pub(super) const DEAD_DETAIL: &str = "x-dead-detail";
/// Time by the clock of the rejecting host; informational, nothing is decided by it.
pub(super) const DEAD_AT: &str = "x-dead-at";
pub(super) const DEAD_BY: &str = "x-dead-by";
/// Maximum length of the detail on a dead letter, in bytes.
const MAX_DETAIL_BYTES: usize = 512;
const PERSISTENT: u8 = 2;

/// One message to publish.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) target: Target,
    pub(super) routing_key: ShortString,
    /// Id by which a returned message is matched. Messages in a batch that share an id share the worst outcome.
    pub(super) message_id: String,
    pub(super) body: Vec<u8>,
    pub(super) properties: BasicProperties,
}

/// Destination of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Sync,
    Events,
    Dead,
    /// Queue named by the routing key, through the default exchange.
    Queue,
    /// Retry exchange; the routing key is the tier.
    Retry,
}

impl Target {
    pub(super) const ALL: [Self; 5] = [Self::Events, Self::Sync, Self::Dead, Self::Retry, Self::Queue];

    pub(super) fn exchange(self, names: &Names) -> ShortString {
        match self {
            Self::Sync => names.sync.as_str().into(),
            Self::Events => names.events.as_str().into(),
            Self::Dead => names.dead.as_str().into(),
            Self::Retry => names.retry.as_str().into(),
            Self::Queue => ShortString::default(),
        }
    }
}

impl Outgoing {
    /// The event of a completed run of `deployment`.
    #[must_use]
    pub fn run_completed(run: RunCompleted, deployment: &str, traceparent: Option<String>) -> Self {
        let (id, routing_key, correlation_id) = (run.run_id, run.routing_key(), run.correlation_id.clone());
        let event = run.into_event(deployment, traceparent);
        let payload = serde_json::to_string(&event).expect("strings and numbers always serialise");
        Self::event(id, &routing_key, payload, correlation_id.as_deref(), event.traceparent.as_deref())
    }

    /// The same message, straight to one queue instead of its exchange.
    #[must_use]
    pub fn to_queue(self, queue: &str) -> Self {
        Self { target: Target::Queue, routing_key: short(queue).unwrap_or_default(), ..self }
    }

    /// Builds a run-completed event. No timestamp property is set: the payload has the end of the run by the database's
    /// clock.
    #[must_use]
    pub fn event(
        id: Uuid,
        routing_key: &str,
        payload: String,
        correlation_id: Option<&str>,
        traceparent: Option<&str>,
    ) -> Self {
        let properties = BasicProperties::default().with_content_type(CLOUDEVENTS_CONTENT_TYPE.into());
        // A key over 255 bytes cannot be bound to: with an empty key the event goes to the unrouted queue.
        let routing_key = short(routing_key).unwrap_or_default();
        Self::new(Target::Events, routing_key, id, payload.into_bytes(), properties)
            .with_correlation_id(correlation_id)
            .with_headers(text_table([("traceparent", traceparent)]))
    }

    /// Builds a sync request, as a scheduler publishes it.
    #[must_use]
    pub fn request(body: Vec<u8>, content_type: &str, traceparent: Option<&str>) -> Self {
        let content_type = short(content_type).unwrap_or_default();
        let properties = BasicProperties::default().with_content_type(content_type);
        Self::new(Target::Sync, SYNC_REQUESTED.into(), Uuid::new_v4(), body, properties)
            .with_headers(text_table([("traceparent", traceparent)]))
    }

    fn new(target: Target, routing_key: ShortString, id: Uuid, body: Vec<u8>, properties: BasicProperties) -> Self {
        let message_id = id.to_string();
        let properties = properties.with_delivery_mode(PERSISTENT).with_message_id(message_id.as_str().into());
        Self { target, routing_key, message_id, body, properties }
    }

    fn with_correlation_id(mut self, correlation_id: Option<&str>) -> Self {
        // 200 characters can be 800 bytes, the property holds 255. The payload contains the id in any case.
        if let Some(id) = correlation_id.and_then(short) {
            self.properties = self.properties.with_correlation_id(id);
        }
        self
    }

    fn with_headers(mut self, headers: FieldTable) -> Self {
        if !headers.inner().is_empty() {
            self.properties = self.properties.with_headers(headers);
        }
        self
    }

    /// Builds a copy for a retry queue, with its retry count and total delay increased.
    pub(super) fn retry(original: &Original<'_>, tier: RetryTier) -> Self {
        let mut headers = original.headers();
        let number = |value: u64| AMQPValue::LongLongInt(i64::try_from(value).unwrap_or(i64::MAX));
        let retries = read_number(original.properties, RETRIES).saturating_add(1);
        let deferred_s = read_number(original.properties, DEFERRED_S).saturating_add(tier.seconds());
        headers.insert(RETRIES.into(), number(retries));
        headers.insert(DEFERRED_S.into(), number(deferred_s));
        // The queue's TTL is the longest delay. A random shorter TTL per message spreads a burst of requests.
        let longest = Duration::from_secs(tier.seconds());
        let wait = longest.mul_f64(0.8) + full_jitter(longest.mul_f64(0.2));
        let properties = original.properties(headers).with_expiration(wait.as_millis().to_string().into());
        Self::copy(original, Target::Retry, tier.suffix().into(), properties)
    }

    /// Builds a copy for the dead-letter queue, with the reason in its headers.
    pub(super) fn dead_letter(original: &Original<'_>, rejection: &Rejection, by: &str) -> Self {
        let mut headers = original.headers();
        let at = OffsetDateTime::from_unix_timestamp(clock::wall_clock_unix_s()).map(rfc3339).unwrap_or_default();
        let id = dead_letter_id(original).to_string();
        let detail = bounded(&rejection.detail, MAX_DETAIL_BYTES);
        let reason_headers = [(DEAD_ID, id.as_str()), (DEAD_REASON, rejection.reason.as_str()), (DEAD_DETAIL, detail)];
        for (name, value) in reason_headers.into_iter().chain([(DEAD_AT, at.as_str()), (DEAD_BY, by)]) {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        Self::copy(original, Target::Dead, SYNC_REQUESTED.into(), original.properties(headers))
    }

    /// Builds a new request message from a dead letter, without the headers added by the daemon.
    pub(super) fn replay(original: &Original<'_>) -> Self {
        let headers: BTreeMap<_, _> =
            original.headers().into_iter().filter(|(name, _)| !is_ours(name.as_str())).collect();
        let properties = original.properties(headers);
        Self::new(Target::Sync, SYNC_REQUESTED.into(), Uuid::new_v4(), original.body.to_vec(), properties)
    }

    fn copy(original: &Original<'_>, target: Target, routing_key: ShortString, properties: BasicProperties) -> Self {
        let message_id = match original.properties.message_id() {
            Some(id) => id.to_string(),
            None => Uuid::new_v4().to_string(),
        };
        let properties = properties.with_message_id(message_id.as_str().into());
        Self { target, routing_key, message_id, body: original.body.to_vec(), properties }
    }
}

/// Id of a message's dead letter. Every copy of the message has the same one, so that a letter is recognised if its copy was
/// confirmed and the acknowledgement of the original was lost.
fn dead_letter_id(original: &Original<'_>) -> Uuid {
    let mut hash = Sha256::new();
    if let Some(message_id) = original.properties.message_id() {
        hash.update(message_id.as_str());
    }
    hash.update(original.properties.timestamp().unwrap_or(0).to_be_bytes());
    hash.update(original.body);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// Received message that is published again as a copy.
pub(super) struct Original<'a> {
    pub(super) properties: &'a BasicProperties,
    pub(super) body: &'a [u8],
}

impl Original<'_> {
    /// Headers of the publisher and of the daemon, without those of the broker.
    fn headers(&self) -> BTreeMap<ShortString, AMQPValue> {
        let all = self.properties.headers().iter().flat_map(FieldTable::inner);
        all.filter(|(name, _)| !is_the_brokers(name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// Properties of the publisher except `user_id`, which the broker refuses from another user, `expiration`, which
    /// applied to the original queue, and `cluster_id`.
    fn properties(&self, headers: BTreeMap<ShortString, AMQPValue>) -> BasicProperties {
        let from = self.properties;
        let mut to = BasicProperties::default().with_delivery_mode(PERSISTENT);
        macro_rules! keep {
            ($($property:ident $with:ident),+) => {
                $(if let Some(value) = from.$property() { to = to.$with(value.clone()); })+
            };
        }
        keep!(content_type with_content_type, content_encoding with_content_encoding, priority with_priority,
              correlation_id with_correlation_id, reply_to with_reply_to, message_id with_message_id,
              timestamp with_timestamp, kind with_type, app_id with_app_id);
        if headers.is_empty() { to } else { to.with_headers(headers.into()) }
    }
}

/// Headers that the broker writes or routes by, and those of the frame guard. A kept `x-death` would make the broker detect a cycle and drop the
/// message; `CC` would route the copy to other queues.
fn is_the_brokers(name: &str) -> bool {
    matches!(name, "x-death" | "x-delivery-count" | "x-acquired-count" | "CC" | "BCC" | UNREADABLE | BODY_DISCARDED)
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
}

pub(super) fn is_ours(name: &str) -> bool {
    name.starts_with("x-dead-") || name.starts_with("x-inventoryd-")
}

pub(super) fn text_table<const N: usize>(entries: [(&str, Option<&str>); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        if let Some(value) = value {
            table.insert(name.into(), AMQPValue::LongString(value.into()));
        }
    }
    table
}

/// Validates a W3C `traceparent`. Anything else from a publisher is ignored: it would end up in the run's row and event.
pub(super) fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    parts.iter().map(|part| part.len()).eq([2, 32, 16, 2]) && parts.into_iter().all(hex)
}

/// Validates a W3C `tracestate`: printable, at most 512 bytes.
pub(super) fn is_tracestate(text: &str) -> bool {
    text.len() <= 512 && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// Reads a text header; `None` unless it is UTF-8.
pub(super) fn read_text(properties: &BasicProperties, name: &str) -> Option<String> {
    value_text(properties.headers().as_ref()?.inner().get(name)?)
}

/// Text of a value; `None` unless it is UTF-8.
pub(super) fn value_text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// Reads a count from a header; zero for anything else.
pub(super) fn read_number(properties: &BasicProperties, name: &str) -> u64 {
    let number = match properties.headers().as_ref().and_then(|headers| headers.inner().get(name)) {
        Some(AMQPValue::LongLongInt(number)) => *number,
        Some(AMQPValue::LongInt(number)) => i64::from(*number),
        Some(AMQPValue::LongUInt(number)) => i64::from(*number),
        Some(AMQPValue::ShortInt(number)) => i64::from(*number),
        Some(AMQPValue::ShortUInt(number)) => i64::from(*number),
        Some(AMQPValue::ShortShortInt(number)) => i64::from(*number),
        Some(AMQPValue::ShortShortUInt(number)) => i64::from(*number),
        _ => 0,
    };
    u64::try_from(number).unwrap_or(0)
}

/// Converts to a short string; `None` above 255 bytes.
pub(super) fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

/// Truncates a text to `bytes`, between characters.
fn bounded(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::failure::DeadReason;

    fn incoming() -> BasicProperties {
        let mut headers = text_table([("traceparent", Some("00-1")), ("tenant-team", Some("blue")), ("CC", Some("x"))]);
        for name in ["x-death", "x-first-death-reason", "x-last-death-queue", "x-delivery-count", "x-acquired-count"] {
            headers.insert(name.into(), AMQPValue::LongLongInt(3));
        }
        BasicProperties::default()
            .with_headers(headers)
            .with_message_id("m-1".into())
            .with_user_id("scheduler".into())
            .with_expiration("1".into())
            .with_type("sync".into())
    }

    fn names_of(outgoing: &Outgoing) -> Vec<String> {
        outgoing.properties.headers().iter().flat_map(FieldTable::inner).map(|(name, _)| name.to_string()).collect()
    }

    #[test]
    fn retry_copy_keeps_the_publishers_headers_and_counts_retries() {
        let properties = incoming();
        let original = Original { properties: &properties, body: b"{ \"a\":1}" };
        let once = Outgoing::retry(&original, RetryTier::FiveSeconds);
        assert_eq!(names_of(&once), ["tenant-team", "traceparent", DEFERRED_S, RETRIES]);
        assert_eq!((once.body.as_slice(), once.message_id.as_str()), (original.body, "m-1"));
        assert_eq!(once.routing_key.as_str(), "5s");
        assert_eq!((once.properties.user_id(), once.properties.kind()), (&None, &Some("sync".into())));
        let wait_ms: u64 = once.properties.expiration().as_ref().unwrap().as_str().parse().unwrap();
        assert!((4000..=5000).contains(&wait_ms));
        let again =
            Outgoing::retry(&Original { properties: &once.properties, body: &once.body }, RetryTier::TwoMinutes);
        assert_eq!(read_number(&again.properties, RETRIES), 2);
        assert_eq!(read_number(&again.properties, DEFERRED_S), 125);
    }

    #[test]
    fn dead_letter_has_its_reason_and_a_replay_has_no_trace_of_it() {
        let properties = incoming();
        let original = Original { properties: &properties, body: b"\xff\x00 not json" };
        let rejection = Rejection::new(DeadReason::InvalidJson, "ü".repeat(600));
        let dead = Outgoing::dead_letter(&original, &rejection, "inventoryd@host");
        assert_eq!(read_text(&dead.properties, DEAD_REASON).as_deref(), Some("invalid_json"));
        assert_eq!(read_text(&dead.properties, DEAD_DETAIL).unwrap().len(), 512);
        assert_eq!(read_text(&dead.properties, DEAD_BY).as_deref(), Some("inventoryd@host"));
        assert!(read_text(&dead.properties, DEAD_AT).is_some() && read_text(&dead.properties, DEAD_ID).is_some());
        let replay = Outgoing::replay(&Original { properties: &dead.properties, body: &dead.body });
        assert_eq!(names_of(&replay), ["tenant-team", "traceparent"]);
        assert_eq!(replay.body, original.body);
        assert_ne!(replay.message_id, "m-1");
        assert_eq!(replay.properties.message_id().as_ref().unwrap().as_str(), replay.message_id);
    }

    #[test]
    fn invalid_trace_context_is_ignored() {
        assert!(is_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        for other in ["", "00-1-2-01", "a\0b", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01"] {
            assert!(!is_traceparent(other), "{other:?}");
        }
        assert!(is_tracestate("vendor=1,other=x y") && !is_tracestate("a\0b") && !is_tracestate(&"x".repeat(513)));
    }

    #[test]
    fn event_is_persistent_and_omits_an_overlong_correlation_id() {
        let long = "ü".repeat(200);
        let event = Outgoing::event(Uuid::from_u128(7), "run.completed.success.t", "{}".to_owned(), Some(&long), None);
        assert_eq!(event.properties.correlation_id(), &None);
        assert_eq!(event.properties.delivery_mode(), &Some(2));
        assert_eq!(event.message_id, Uuid::from_u128(7).to_string());
        assert_eq!((event.properties.timestamp(), event.properties.headers()), (&None, &None));
    }
}
