//! The run-completed event that other services receive.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::failure::ErrorCode;
use super::run::{GraphUsage, RunStatus, TypeCounters, TypeOutcome};
use super::selection::Selection;

/// The CloudEvents type of the event; its last part is the version of `data`.
pub const EVENT_TYPE: &str = "io.inventoryd.run.completed.v1";

/// A CloudEvents 1.0 envelope in structured mode, `application/cloudevents+json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "inventoryd run-completed event, version 1")]
pub struct CloudEvent {
    /// `1.0`.
    #[schemars(extend("const" = "1.0"))]
    pub specversion: String,
    /// The run's id: an event that arrives twice has the same one.
    pub id: String,
    /// `/inventoryd/<deployment>`.
    pub source: String,
    /// `io.inventoryd.run.completed.v1`; its last part is the version of `data`.
    #[serde(rename = "type")]
    #[schemars(extend("const" = EVENT_TYPE))]
    pub kind: String,
    /// The tenant's id.
    pub subject: String,
    /// When the run ended, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub time: String,
    /// `application/json`.
    #[schemars(extend("const" = "application/json"))]
    pub datacontenttype: String,
    /// W3C trace context of the request, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// What happened.
    pub data: RunCompleted,
}

/// What happened in a run that has ended, a skipped one too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunCompleted {
    /// The run.
    pub run_id: Uuid,
    /// The tenant.
    pub tenant_id: Uuid,
    /// The hash of the selection.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub selection_hash: String,
    /// The selection in its canonical form.
    pub selection: Selection,
    /// The request's key.
    pub idempotency_key: String,
    /// Handed through from the request.
    pub correlation_id: Option<String>,
    /// Handed through from the request.
    pub requested_by: Option<String>,
    /// `success`, `partial`, `failed` or `skipped`.
    pub status: RunStatus,
    /// Whether anything at all went wrong.
    pub had_errors: bool,
    /// The distinct error codes, sorted.
    pub error_codes: Vec<ErrorCode>,
    /// Sums over all types.
    #[serde(flatten)]
    pub counters: TypeCounters,
    /// What the run cost Graph.
    #[serde(flatten)]
    pub usage: GraphUsage,
    /// One for every selected type; of a run that lost its worker those that had ended by then; empty for a skipped run.
    pub types: Vec<TypeOutcome>,
    /// When the run began, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub started_at: String,
    /// When it ended, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub finished_at: String,
    /// How many workers held the run, the last one included.
    pub attempt: i32,
    /// Items that are surely missing now, as `inventory_missing` gives them.
    pub missing_high_count: i64,
    /// Items that may be missing.
    pub missing_low_count: i64,
    /// When Graph asked to be left alone: ask again after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<i32>,
    /// The version of the daemon that wrote the run.
    pub daemon_version: String,
}

impl RunCompleted {
    /// The topic routing key: `run.completed.<status>.<tenant_id>`.
    #[must_use]
    pub fn routing_key(&self) -> String {
        format!("run.completed.{}.{}", self.status.as_str(), self.tenant_id)
    }

    /// The envelope to publish it in.
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

/// A moment of the database's clock as RFC 3339 text.
#[must_use]
pub fn rfc3339(moment: OffsetDateTime) -> String {
    moment.format(&Rfc3339).expect("the database's years have four digits")
}
