//! What is traced: every span and its attributes as a function, and the trace context on its way in and out.
//!
//! Attributes name no link, token, object or person. While no traces are sent these spans cost nothing. Log lines leave
//! them out: what belongs on every line of a run stands in the run's own span.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Span, field, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::domain::failure::ErrorCode;

/// What the spans of this file are told apart by.
pub(super) const TARGET: &str = module_path!();
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// A request in hand, from its arrival to its settlement; it continues the trace of whoever published it.
#[must_use]
pub fn delivery(traceparent: Option<&str>, tracestate: Option<&str>) -> Span {
    let span = info_span!(parent: None, "delivery", otel.kind = "consumer", messaging.system = "rabbitmq",
        messaging.operation.type = "process", outcome = field::Empty);
    continue_trace(&span, traceparent, tracestate);
    span
}

/// Says on the current span how its delivery was settled.
pub fn settled(outcome: &'static str) {
    Span::current().record("outcome", outcome);
}

/// One list of Graph, read to its end or to its failure.
#[must_use]
pub fn list(path: &str) -> Span {
    info_span!("list", path, error.type = field::Empty, otel.status_code = field::Empty)
}

/// One page of a list, asked for until it came or was given up; waits for Graph's limits are part of it.
#[must_use]
pub fn page(path: &str) -> Span {
    info_span!("page", otel.kind = "client", path, objects = field::Empty, error.type = field::Empty,
        otel.status_code = field::Empty)
}

/// One batch of items on its way into the inventory.
#[must_use]
pub fn upsert(policy_type: &str, rows: usize) -> Span {
    info_span!("upsert", otel.kind = "client", db.system.name = "postgresql", policy_type, rows)
}

/// The commit that ends a run: the rows that are left, the run and its event.
#[must_use]
pub fn finish() -> Span {
    info_span!("finish", otel.kind = "client", db.system.name = "postgresql")
}

/// One event on its way from the outbox to the broker; it continues the trace of its run.
#[must_use]
pub fn publish(traceparent: Option<&str>) -> Span {
    let span = info_span!(parent: None, "publish", otel.kind = "producer", messaging.system = "rabbitmq",
        messaging.operation.type = "send", error.type = field::Empty, otel.status_code = field::Empty);
    continue_trace(&span, traceparent, None);
    span
}

/// Says on a span of a run why it failed.
pub fn failed(span: &Span, code: ErrorCode) {
    record_failure(span, code.as_str());
}

/// Says on the span of an event why it is not published yet.
pub fn not_published(span: &Span, fate: &'static str) {
    record_failure(span, fate);
}

fn record_failure(span: &Span, kind: &'static str) {
    span.record("error.type", kind).record("otel.status_code", "ERROR");
}

/// The current span as a W3C `traceparent`, for others to continue; nothing while no traces are sent.
#[must_use]
pub fn traceparent() -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// A context that can't be read counts as not given.
fn continue_trace(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let given = [(TRACEPARENT, traceparent), (TRACESTATE, tracestate)];
    let carrier: HashMap<String, String> =
        given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    // It is refused where no traces are sent.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
}
