//! The run-completed event published to subscribers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::failure::ErrorCode;
use super::run::{GraphUsage, RunStatus, TypeCounters, TypeOutcome};
use super::selection::Selection;

/// CloudEvents type of the event; the last part is the version of `data`.
pub const EVENT_TYPE: &str = "io.inventoryd.run.completed.v1";

/// A CloudEvents 1.0 envelope in structured mode, `application/cloudevents+json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "inventoryd run-completed event, version 1")]
pub struct CloudEvent {
    /// `1.0`.
    #[schemars(extend("const" = "1.0"))]
    pub specversion: String,
    /// Run id, the deduplication key: a redelivered event carries the same id.
    pub id: String,
    /// `/inventoryd/<deployment>`.
    #[schemars(extend("format" = "uri-reference"))]
    pub source: String,
    /// `io.inventoryd.run.completed.v1`; the last part is the version of `data`.
    #[serde(rename = "type")]
    #[schemars(extend("const" = EVENT_TYPE))]
    pub kind: String,
    /// Tenant id.
    pub subject: String,
    /// End of the run, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub time: String,
    /// `application/json`.
    #[schemars(extend("const" = "application/json"))]
    pub datacontenttype: String,
    /// W3C trace context of the request, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Result of the run.
    pub data: RunCompleted,
}

/// Result of a completed or skipped run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunCompleted {
    /// Run id.
    pub run_id: Uuid,
    /// Tenant id.
    pub tenant_id: Uuid,
    /// SHA-256 of the canonical selection, lower-case hex.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub selection_hash: String,
    /// Selection in canonical form.
    pub selection: Selection,
    /// Idempotency key of the request.
    pub idempotency_key: String,
    /// Correlation id of the request, unchanged.
    pub correlation_id: Option<String>,
    /// Requester named in the request, unchanged.
    pub requested_by: Option<String>,
    /// `success`, `partial`, `failed` or `skipped`.
    pub status: RunStatus,
    /// True if any error occurred.
    pub had_errors: bool,
    /// Distinct error codes, sorted.
    pub error_codes: Vec<ErrorCode>,
    /// Sums over all types.
    #[serde(flatten)]
    pub counters: TypeCounters,
    /// Graph requests and throttling of the run.
    #[serde(flatten)]
    pub usage: GraphUsage,
    /// One outcome per selected type; for a run whose worker was lost, the types that had ended; empty for a skipped run.
    pub types: Vec<TypeOutcome>,
    /// Start of the run, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub started_at: String,
    /// End of the run, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub finished_at: String,
    /// Number of workers that held the run, the last one included.
    pub attempt: i32,
    /// Items missing with high confidence, as computed by `inventory_missing`.
    pub missing_high_count: i64,
    /// Items missing with low confidence.
    pub missing_low_count: i64,
    /// Seconds after which to retry, if throttling exceeded the run's budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<i32>,
    /// Version of the daemon that recorded the run.
    pub daemon_version: String,
}

impl RunCompleted {
    /// Topic routing key: `run.completed.<status>.<tenant_id>`.
    #[must_use]
    pub fn routing_key(&self) -> String {
        format!("run.completed.{}.{}", self.status.as_str(), self.tenant_id)
    }

    /// Wraps the result in its CloudEvents envelope.
    #[must_use]
    pub fn into_event(self, deployment: &str, traceparent: Option<String>) -> CloudEvent {
        CloudEvent {
            specversion: "1.0".to_owned(),
            id: self.run_id.to_string(),
            source: format!("/inventoryd/{deployment}"),
            kind: EVENT_TYPE.to_owned(),
            subject: self.tenant_id.to_string(),
            time: self.finished_at.clone(),
            datacontenttype: "application/json".to_owned(),
            traceparent,
            data: self,
        }
    }
}

/// RFC 3339 text of a database timestamp.
#[must_use]
pub fn rfc3339(moment: OffsetDateTime) -> String {
    moment.format(&Rfc3339).expect("the database's years have four digits")
}
