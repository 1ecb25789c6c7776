//! Spans: one function per span with its attributes, and trace context propagation.
//!
//! Attributes contain no link, token, object or person. Without a collector these spans are disabled. They do not appear
//! in log lines, which carry the fields of the run's own span.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Span, field, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::domain::failure::ErrorCode;

/// Target that identifies the spans of this file.
pub(super) const TARGET: &str = module_path!();
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Span of a delivery, from arrival to settlement; continues the publisher's trace.
#[must_use]
pub fn delivery(traceparent: Option<&str>, tracestate: Option<&str>) -> Span {
    let span = info_span!(parent: None, "delivery", otel.kind = "consumer", messaging.system = "rabbitmq",
        messaging.operation.type = "process", outcome = field::Empty);
    continue_trace(&span, traceparent, tracestate);
    span
}

/// Records the outcome of the delivery on the current span.
pub fn settled(outcome: &'static str) {
    Span::current().record("outcome", outcome);
}

/// Span of one Graph list.
#[must_use]
pub fn list(path: &str) -> Span {
    info_span!("list", path, error.type = field::Empty, otel.status_code = field::Empty)
}

/// Span of one page of a list, including retries and waits for Graph's limits.
#[must_use]
pub fn page(path: &str) -> Span {
    info_span!("page", otel.kind = "client", path, objects = field::Empty, error.type = field::Empty,
        otel.status_code = field::Empty)
}

/// Span of one batch of inventory writes.
#[must_use]
pub fn upsert(policy_type: &str, rows: usize) -> Span {
    info_span!("upsert", otel.kind = "client", db.system.name = "postgresql", policy_type, rows)
}

/// Span of the transaction that ends a run: remaining rows, run and event.
#[must_use]
pub fn finish() -> Span {
    info_span!("finish", otel.kind = "client", db.system.name = "postgresql")
}

/// Span of the publication of one event; continues the trace of its run.
#[must_use]
pub fn publish(traceparent: Option<&str>) -> Span {
    let span = info_span!(parent: None, "publish", otel.kind = "producer", messaging.system = "rabbitmq",
        messaging.operation.type = "send", error.type = field::Empty, otel.status_code = field::Empty);
    continue_trace(&span, traceparent, None);
    span
}

/// Records an error code on a span.
pub fn failed(span: &Span, code: ErrorCode) {
    record_failure(span, code.as_str());
}

/// Records the reason for an unpublished event on its span.
pub fn not_published(span: &Span, outcome: &'static str) {
    record_failure(span, outcome);
}

fn record_failure(span: &Span, kind: &'static str) {
    span.record("error.type", kind).record("otel.status_code", "ERROR");
}

/// W3C `traceparent` of the current span; none without a collector.
#[must_use]
pub fn traceparent() -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// Sets the parent of a span. An invalid context is ignored.
fn continue_trace(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let given = [(TRACEPARENT, traceparent), (TRACESTATE, tracestate)];
    let carrier: HashMap<String, String> =
        given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    // Fails without a collector, where it has no effect.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
}
