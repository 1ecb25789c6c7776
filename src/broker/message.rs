//! Messages on their way out: what is kept of a message that is published again, and what is not.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use time::OffsetDateTime;
use uuid::Uuid;

use super::topology::{Names, RetryTier, SYNC_REQUESTED};
use crate::domain::clock;
use crate::domain::event::rfc3339;
use crate::domain::failure::Rejection;
use crate::domain::request::CLOUDEVENTS_CONTENT_TYPE;

pub(super) const RETRIES: &str = "x-inventoryd-retries";
pub(super) const DEFERRED_S: &str = "x-inventoryd-deferred-s";
/// The headers of [`crate::domain::dead_letter::RejectedHeaders`].
pub(super) const DEAD_ID: &str = "x-dead-id";
pub(super) const DEAD_REASON: &str = "x-dead-reason";
pub(super) const DEAD_DETAIL: &str = "x-dead-detail";
/// By the clock of the host that buried it, because the broker puts no time on what is published: it tells an operator
/// when, and nothing is ever decided by it.
pub(super) const DEAD_AT: &str = "x-dead-at";
pub(super) const DEAD_BY: &str = "x-dead-by";
/// The longest detail on a dead letter, in bytes.
const MAX_DETAIL_BYTES: usize = 512;
const PERSISTENT: u8 = 2;

/// One message to publish.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) target: Target,
    pub(super) routing_key: ShortString,
    /// What the outcome of the message is decided by; several may share one, then the worst of their outcomes is all's.
    pub(super) message_id: String,
    pub(super) body: Vec<u8>,
    pub(super) properties: BasicProperties,
}

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Sync,
    Events,
    Dead,
    /// Straight to the queue that the routing key names.
    Queue,
}

impl Target {
    pub(super) fn exchange(self, names: &Names) -> ShortString {
        match self {
            Self::Sync => names.sync.as_str().into(),
            Self::Events => names.events.as_str().into(),
            Self::Dead => names.dead.as_str().into(),
            Self::Queue => ShortString::default(),
        }
    }
}

impl Outgoing {
    /// A run-completed event. No timestamp is set: when the run ended stands in the payload, by the database's clock.
    #[must_use]
    pub fn event(
        id: Uuid,
        routing_key: &str,
        payload: String,
        correlation_id: Option<&str>,
        traceparent: Option<&str>,
    ) -> Self {
        let properties = BasicProperties::default().with_content_type(CLOUDEVENTS_CONTENT_TYPE.into());
        // A key that does not fit could not be bound to either: without one the event is kept as unrouted.
        let routing_key = short(routing_key).unwrap_or_default();
        Self::new(Target::Events, routing_key, id, payload.into_bytes(), properties)
            .with_correlation_id(correlation_id)
            .with_headers(text_table([("traceparent", traceparent)]))
    }

    /// A sync request, as a scheduler publishes it.
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
        // 200 characters can have 800 bytes, the property 255: the payload says it in any case.
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

    /// A copy that waits on a tier and then comes back, with one more retry and so many more seconds on its account.
    pub(super) fn retry(original: &Original<'_>, names: &Names, tier: RetryTier) -> Self {
        let mut headers = original.headers();
        let number = |value: u64| AMQPValue::LongLongInt(i64::try_from(value).unwrap_or(i64::MAX));
        let retries = read_number(original.properties, RETRIES).saturating_add(1);
        let deferred_s = read_number(original.properties, DEFERRED_S).saturating_add(tier.seconds());
        headers.insert(RETRIES.into(), number(retries));
        headers.insert(DEFERRED_S.into(), number(deferred_s));
        // The queue's own limit is the longest wait. A little less for each message, at random, takes a burst of
        // requests apart before it comes back.
        let wait_ms = rand::random_range(tier.seconds() * 800..=tier.seconds() * 1000);
        let properties = original.properties(headers).with_expiration(wait_ms.to_string().into());
        Self::copy(original, Target::Queue, names.retry(tier).as_str().into(), properties)
    }

    /// A copy for the dead-letter queue, with the reason.
    pub(super) fn dead_letter(original: &Original<'_>, rejection: &Rejection, by: &str) -> Self {
        let mut headers = original.headers();
        let at = OffsetDateTime::from_unix_timestamp(clock::wall_clock_unix_s()).map(rfc3339).unwrap_or_default();
        let id = Uuid::new_v4().to_string();
        let detail = bounded(&rejection.detail, MAX_DETAIL_BYTES);
        let said = [(DEAD_ID, id.as_str()), (DEAD_REASON, rejection.reason.as_str()), (DEAD_DETAIL, detail)];
        for (name, value) in said.into_iter().chain([(DEAD_AT, at.as_str()), (DEAD_BY, by)]) {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        Self::copy(original, Target::Dead, SYNC_REQUESTED.into(), original.properties(headers))
    }

    /// A dead letter that is asked about once more: a new message, and the same request.
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

/// A message that came in and is to be published again.
pub(super) struct Original<'a> {
    pub(super) properties: &'a BasicProperties,
    pub(super) body: &'a [u8],
}

impl Original<'_> {
    /// The user's headers, and ours.
    fn headers(&self) -> BTreeMap<ShortString, AMQPValue> {
        let all = self.properties.headers().iter().flat_map(FieldTable::inner);
        all.filter(|(name, _)| !is_the_brokers(name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// The user's properties, except for three: `user_id`, which the broker refuses from anyone else, `expiration`,
    /// which was for the queue that it came from, and `cluster_id`.
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

/// Headers that the broker writes, or routes by. Kept, `x-death` would make it see a cycle and drop the message, and
/// `CC` would send the copy to more queues than the one it is meant for.
fn is_the_brokers(name: &str) -> bool {
    matches!(name, "x-death" | "x-delivery-count" | "x-acquired-count" | "CC" | "BCC")
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
}

fn is_ours(name: &str) -> bool {
    name.starts_with("x-dead-") || name.starts_with("x-inventoryd-")
}

fn text_table<const N: usize>(entries: [(&str, Option<&str>); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        if let Some(value) = value {
            table.insert(name.into(), AMQPValue::LongString(value.into()));
        }
    }
    table
}

/// Whether a text is a W3C `traceparent` of today's version. Whatever else a publisher writes there goes no further: it
/// would stand in the run's row and in its event.
pub(super) fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    parts.iter().map(|part| part.len()).eq([2, 32, 16, 2]) && parts.into_iter().all(hex)
}

/// Whether a text may be a W3C `tracestate`: printable, and no longer than others have to carry on.
pub(super) fn is_tracestate(text: &str) -> bool {
    text.len() <= 512 && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// A text as a header has it, if it is there and UTF-8.
pub(super) fn read_text(properties: &BasicProperties, name: &str) -> Option<String> {
    value_text(properties.headers().as_ref()?.inner().get(name)?)
}

/// The text in a value, if it is one and UTF-8.
pub(super) fn value_text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// A count as a header has it; zero for anything else.
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

/// The text as a short string, unless it has more than the 255 bytes that AMQP allows.
pub(super) fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

/// The beginning of a text, cut between characters.
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
    fn a_parked_copy_keeps_the_users_words_and_counts_its_waits() {
        let (properties, names) = (incoming(), Names::new("p."));
        let original = Original { properties: &properties, body: b"{ \"a\":1}" };
        let once = Outgoing::retry(&original, &names, RetryTier::FiveSeconds);
        assert_eq!(names_of(&once), ["tenant-team", "traceparent", DEFERRED_S, RETRIES]);
        assert_eq!((once.body.as_slice(), once.message_id.as_str()), (original.body, "m-1"));
        assert_eq!(once.routing_key.as_str(), "p.inventory.retry.5s");
        assert_eq!((once.properties.user_id(), once.properties.kind()), (&None, &Some("sync".into())));
        let wait_ms: u64 = once.properties.expiration().as_ref().unwrap().as_str().parse().unwrap();
        assert!((4000..=5000).contains(&wait_ms));
        let again = Outgoing::retry(
            &Original { properties: &once.properties, body: &once.body },
            &names,
            RetryTier::TwoMinutes,
        );
        assert_eq!(read_number(&again.properties, RETRIES), 2);
        assert_eq!(read_number(&again.properties, DEFERRED_S), 125);
    }

    #[test]
    fn a_dead_letter_says_why_and_a_replay_is_as_good_as_new() {
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
    fn only_a_trace_context_counts_as_one() {
        assert!(is_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        for other in ["", "00-1-2-01", "a\0b", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01"] {
            assert!(!is_traceparent(other), "{other:?}");
        }
        assert!(is_tracestate("vendor=1,other=x y") && !is_tracestate("a\0b") && !is_tracestate(&"x".repeat(513)));
    }

    #[test]
    fn an_event_is_persistent_and_survives_a_correlation_id_that_amqp_can_not_carry() {
        let long = "ü".repeat(200);
        let event = Outgoing::event(Uuid::from_u128(7), "run.completed.success.t", "{}".to_owned(), Some(&long), None);
        assert_eq!(event.properties.correlation_id(), &None);
        assert_eq!(event.properties.delivery_mode(), &Some(2));
        assert_eq!(event.message_id, Uuid::from_u128(7).to_string());
        assert_eq!((event.properties.timestamp(), event.properties.headers()), (&None, &None));
    }
}
