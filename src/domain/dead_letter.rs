//! Messages in the dead-letter queue.

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use super::failure::DeadReason;

/// A message that can never be processed, with its original bytes, properties and headers; additional headers give the
/// reason.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[schemars(title = "inventoryd dead letter, version 1")]
pub struct DeadLetter {
    /// Headers that give the reason, in addition to the publisher's own.
    pub headers: DeadLetterHeaders,
    /// The published bytes, unchanged; they need not be text.
    pub body: String,
}

/// Headers set by whichever side dead-lettered the message.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum DeadLetterHeaders {
    /// Set by the daemon.
    Rejected(RejectedHeaders),
    /// Set by the broker alone: after `topology.delivery_limit` unacknowledged deliveries, because of a policy or a TTL,
    /// or when the daemon rejected a message that it could not copy.
    GivenUp(GivenUpHeaders),
}

/// The headers of a message that the daemon rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct RejectedHeaders {
    /// Id of the message, equal for every copy of its dead letter; `inventoryd dead` shows copies as one.
    #[serde(rename = "x-dead-id")]
    pub id: Uuid,
    /// Reason; `inventoryd explain REASON` shows cause and remedy.
    #[serde(rename = "x-dead-reason")]
    pub reason: DeadReason,
    /// Human-readable detail: the field and the expected value. Never contains a value from the message.
    #[serde(rename = "x-dead-detail")]
    pub detail: String,
    /// Time of rejection, RFC 3339, by the clock of the rejecting host.
    #[serde(rename = "x-dead-at")]
    #[schemars(extend("format" = "date-time"))]
    pub at: String,
    /// Replica that rejected the message.
    #[serde(rename = "x-dead-by")]
    pub by: String,
}

/// Headers of a message that the broker dead-lettered.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct GivenUpHeaders {
    /// RabbitMQ's record of the queues that dead-lettered the message.
    #[serde(rename = "x-death")]
    pub deaths: Vec<Death>,
}

/// One entry of RabbitMQ's `x-death` header.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Death {
    /// Queue that dead-lettered the message; the entry for `inventory.sync.requests` gives the reason.
    pub queue: String,
    /// `delivery_limit`, `rejected`, `expired` (also for a wait in a retry tier) or `maxlen`.
    pub reason: String,
    /// Number of times.
    pub count: u64,
}
