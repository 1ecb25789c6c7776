//! What stands in the dead-letter queue.

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use super::failure::DeadReason;

/// A message that can never be run, with the bytes, the properties and the headers that it came with; more headers say
/// why it is here.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[schemars(title = "inventoryd dead letter, version 1")]
pub struct DeadLetter {
    /// The headers that say why, beside the publisher's own.
    pub headers: DeadLetterHeaders,
    /// Any bytes at all, as they were published.
    pub body: String,
}

/// Who gave the message up, and why.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum DeadLetterHeaders {
    /// The daemon did.
    Rejected(RejectedHeaders),
    /// The broker did, after `topology.delivery_limit` deliveries without an answer.
    GivenUp(GivenUpHeaders),
}

/// The headers of a message that the daemon rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct RejectedHeaders {
    /// What `inventoryd dead` calls it by is made from this.
    #[serde(rename = "x-dead-id")]
    pub id: Uuid,
    /// Why; `inventoryd explain REASON` says what to do.
    #[serde(rename = "x-dead-reason")]
    pub reason: DeadReason,
    /// For people: the field, and what was expected. Never a value of the publisher's.
    #[serde(rename = "x-dead-detail")]
    pub detail: String,
    /// When, RFC 3339, by the clock of the host that rejected it.
    #[serde(rename = "x-dead-at")]
    #[schemars(extend("format" = "date-time"))]
    pub at: String,
    /// The replica that rejected it.
    #[serde(rename = "x-dead-by")]
    pub by: String,
}

/// The headers of a message that the broker gave up by itself.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct GivenUpHeaders {
    /// RabbitMQ's own account of the queues that the message has died in.
    #[serde(rename = "x-death")]
    pub deaths: Vec<Death>,
}

/// One entry of RabbitMQ's account.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Death {
    /// The queue; what counts is how it left `inventory.sync.requests`.
    pub queue: String,
    /// `delivery_limit`; `expired` where it had waited on a rung of the retry ladder.
    pub reason: String,
    /// How often.
    pub count: u64,
}
