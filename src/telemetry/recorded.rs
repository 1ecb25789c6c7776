//! Every metric: its entry in [`METRICS`], and the function that records it.

use std::time::Duration;

use metrics::{counter, gauge, histogram};

use crate::domain::failure::{DeadReason, ErrorCode};
use crate::domain::run::RunStatus;

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Monotonic count.
    Counter,
    /// Current value.
    Gauge,
    /// Distribution of observations.
    Histogram,
}

/// Label of a metric, with all of its values.
#[derive(Debug, Clone, Copy)]
pub struct Label {
    /// Name of the label.
    pub name: &'static str,
    /// All values of the label.
    pub values: fn() -> Vec<&'static str>,
}

/// Definition of one metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Name with the prefix `inventoryd_`.
    pub name: &'static str,
    /// Kind of the metric.
    pub kind: Kind,
    /// Label, if any.
    pub label: Option<Label>,
    /// Description.
    pub help: &'static str,
}

/// Every metric of the daemon. Each function below records the one with the same name.
pub const METRICS: &[Metric] = &[
    Metric {
        name: "inventoryd_runs_total",
        kind: Kind::Counter,
        label: Some(Label { name: "status", values: || ended() }),
        help: "Runs that this replica ended, by status.",
    },
    Metric {
        name: "inventoryd_run_errors_total",
        kind: Kind::Counter,
        label: Some(Label { name: "code", values: || texts(ErrorCode::ALL, ErrorCode::as_str) }),
        help: "Error codes of ended runs, each counted once per run.",
    },
    Metric {
        name: "inventoryd_run_duration_seconds",
        kind: Kind::Histogram,
        label: Some(Label { name: "status", values: || ended() }),
        help: "Duration of runs from admission to end.",
    },
    Metric {
        name: "inventoryd_deliveries_in_flight",
        kind: Kind::Gauge,
        label: None,
        help: "Deliveries in flight, at most consumer.prefetch.",
    },
    Metric {
        name: "inventoryd_deliveries_held",
        kind: Kind::Gauge,
        label: None,
        help: "Deliveries held because the broker permanently refuses their copies.",
    },
    Metric {
        name: "inventoryd_deliveries_total",
        kind: Kind::Counter,
        label: Some(Label {
            name: "outcome",
            values: || vec!["done", "duplicate", "retry_scheduled", "rejected", "requeued"],
        }),
        help: "Settled deliveries by outcome: done, duplicate, retry_scheduled, rejected, requeued.",
    },
    Metric {
        name: "inventoryd_dead_letters_total",
        kind: Kind::Counter,
        label: Some(Label { name: "reason", values: || texts(DeadReason::ALL, DeadReason::as_str) }),
        help: "Messages moved to the dead-letter queue, by reason.",
    },
    Metric {
        name: "inventoryd_acks_lost_total",
        kind: Kind::Counter,
        label: None,
        help: "Acknowledgements lost with their channel; the redelivery is settled as a duplicate.",
    },
    Metric {
        name: "inventoryd_resubscriptions_total",
        kind: Kind::Counter,
        label: Some(Label { name: "cause", values: || vec!["error", "ended", "watchdog"] }),
        help: "Subscriptions rebuilt, by cause: error, ended, watchdog.",
    },
    Metric {
        name: "inventoryd_subscribed",
        kind: Kind::Gauge,
        label: None,
        help: "1 while this replica has a live subscription.",
    },
    Metric {
        name: "inventoryd_broker_blocked",
        kind: Kind::Gauge,
        label: None,
        help: "1 while the broker blocks the publishing connection (memory or disk alarm).",
    },
    Metric {
        name: "inventoryd_items_observed_total",
        kind: Kind::Counter,
        label: None,
        help: "Distinct objects that Graph returned in scope.",
    },
    Metric {
        name: "inventoryd_items_upserted_total",
        kind: Kind::Counter,
        label: None,
        help: "Inventory rows written.",
    },
    Metric {
        name: "inventoryd_items_unclassified_total",
        kind: Kind::Counter,
        label: None,
        help: "Objects of shared collections that no policy type claims.",
    },
    Metric {
        name: "inventoryd_graph_requests_total",
        kind: Kind::Counter,
        label: Some(Label { name: "outcome", values: || vec!["ok", "throttled", "refused", "failed"] }),
        help: "Requests to Graph by outcome: ok, throttled, refused, failed.",
    },
    Metric {
        name: "inventoryd_graph_request_duration_seconds",
        kind: Kind::Histogram,
        label: None,
        help: "Duration of single requests to Graph.",
    },
    Metric {
        name: "inventoryd_graph_throttle_wait_seconds",
        kind: Kind::Histogram,
        label: None,
        help: "Time that runs waited because Graph throttled them.",
    },
    Metric {
        name: "inventoryd_graph_rate_limit_wait_seconds",
        kind: Kind::Histogram,
        label: None,
        help: "Time that requests waited for the rate limiter.",
    },
    Metric {
        name: "inventoryd_graph_select_refused_total",
        kind: Kind::Counter,
        label: None,
        help: "Lists restarted without $select because Graph rejected it.",
    },
    Metric {
        name: "inventoryd_graph_tokens_total",
        kind: Kind::Counter,
        label: Some(Label { name: "outcome", values: || vec!["ok", "failed"] }),
        help: "Token requests by outcome: ok, failed.",
    },
    Metric {
        name: "inventoryd_leases_lost_total",
        kind: Kind::Counter,
        label: None,
        help: "Runs that this replica stopped because their lease was lost.",
    },
    Metric {
        name: "inventoryd_lease_headroom_seconds",
        kind: Kind::Gauge,
        label: None,
        help: "Shortest remaining time of any held lease, just before its renewal.",
    },
    Metric {
        name: "inventoryd_runs_restarted_total",
        kind: Kind::Counter,
        label: None,
        help: "Interrupted runs whose request was published again.",
    },
    Metric {
        name: "inventoryd_events_published_total",
        kind: Kind::Counter,
        label: None,
        help: "Events that the broker confirmed.",
    },
    Metric {
        name: "inventoryd_events_unroutable_total",
        kind: Kind::Counter,
        label: None,
        help: "Events that no queue accepted; they are kept and published again.",
    },
    Metric {
        name: "inventoryd_outbox_unsent",
        kind: Kind::Gauge,
        label: None,
        help: "Events waiting to be published, over all replicas.",
    },
    Metric {
        name: "inventoryd_outbox_oldest_seconds",
        kind: Kind::Gauge,
        label: None,
        help: "Age of the oldest event waiting to be published.",
    },
    Metric {
        name: "inventoryd_build_info",
        kind: Kind::Gauge,
        label: Some(Label { name: "version", values: || vec![env!("CARGO_PKG_VERSION")] }),
        help: "1, labelled with the version of this replica.",
    },
];

/// Runs that this replica ended, by status.
pub fn run_ended(status: RunStatus) {
    counter!("inventoryd_runs_total", "status" => status.as_str()).increment(1);
}

/// Error codes of ended runs, each counted once per run.
pub fn run_error(code: ErrorCode) {
    counter!("inventoryd_run_errors_total", "code" => code.as_str()).increment(1);
}

/// Duration of runs from admission to end.
pub fn run_took(status: RunStatus, took: Duration) {
    histogram!("inventoryd_run_duration_seconds", "status" => status.as_str()).record(took.as_secs_f64());
}

/// Deliveries held because the broker permanently refuses their copies.
pub fn deliveries_held(count: usize) {
    gauge!("inventoryd_deliveries_held").set(count as f64);
}

/// Deliveries in flight, at most consumer.prefetch.
pub fn deliveries_in_flight(count: usize) {
    gauge!("inventoryd_deliveries_in_flight").set(count as f64);
}

/// Settled deliveries by outcome: done, duplicate, retry_scheduled, rejected, requeued.
pub fn delivery(outcome: &'static str) {
    counter!("inventoryd_deliveries_total", "outcome" => outcome).increment(1);
}

/// Messages moved to the dead-letter queue, by reason.
pub fn dead_letter(reason: DeadReason) {
    counter!("inventoryd_dead_letters_total", "reason" => reason.as_str()).increment(1);
}

/// Acknowledgements lost with their channel; the redelivery is settled as a duplicate.
pub fn ack_lost() {
    counter!("inventoryd_acks_lost_total").increment(1);
}

/// Subscriptions rebuilt, by cause: error, ended, watchdog.
pub fn resubscribed(cause: &'static str) {
    counter!("inventoryd_resubscriptions_total", "cause" => cause).increment(1);
}

/// 1 while this replica has a live subscription.
pub fn subscribed(yes: bool) {
    gauge!("inventoryd_subscribed").set(f64::from(u8::from(yes)));
}

/// 1 while the broker blocks the publishing connection (memory or disk alarm).
pub fn broker_blocked(yes: bool) {
    gauge!("inventoryd_broker_blocked").set(f64::from(u8::from(yes)));
}

/// Distinct objects that Graph returned in scope.
pub fn items_observed(count: u64) {
    counter!("inventoryd_items_observed_total").increment(count);
}

/// Inventory rows written.
pub fn items_upserted(count: u64) {
    counter!("inventoryd_items_upserted_total").increment(count);
}

/// Objects of shared collections that no policy type claims.
pub fn items_unclassified(count: u64) {
    counter!("inventoryd_items_unclassified_total").increment(count);
}

/// Requests to Graph by outcome: ok, throttled, refused, failed.
pub fn graph_request(outcome: &'static str) {
    counter!("inventoryd_graph_requests_total", "outcome" => outcome).increment(1);
}

/// Duration of single requests to Graph.
pub fn graph_request_took(took: Duration) {
    histogram!("inventoryd_graph_request_duration_seconds").record(took.as_secs_f64());
}

/// Time that runs waited because Graph throttled them.
pub fn graph_throttle_wait(wait: Duration) {
    histogram!("inventoryd_graph_throttle_wait_seconds").record(wait.as_secs_f64());
}

/// Time that requests waited for the rate limiter.
pub fn graph_rate_limit_wait(wait: Duration) {
    histogram!("inventoryd_graph_rate_limit_wait_seconds").record(wait.as_secs_f64());
}

/// Lists restarted without $select because Graph rejected it.
pub fn graph_select_refused() {
    counter!("inventoryd_graph_select_refused_total").increment(1);
}

/// Token requests by outcome: ok, failed.
pub fn graph_token(outcome: &'static str) {
    counter!("inventoryd_graph_tokens_total", "outcome" => outcome).increment(1);
}

/// Runs that this replica stopped because their lease was lost.
pub fn lease_lost() {
    counter!("inventoryd_leases_lost_total").increment(1);
}

/// Shortest remaining time of any held lease, just before its renewal.
pub fn lease_headroom(least: Duration) {
    gauge!("inventoryd_lease_headroom_seconds").set(least.as_secs_f64());
}

/// Interrupted runs whose request was published again.
pub fn run_restarted() {
    counter!("inventoryd_runs_restarted_total").increment(1);
}

/// Events that the broker confirmed.
pub fn event_published(count: u64) {
    counter!("inventoryd_events_published_total").increment(count);
}

/// Events that no queue accepted; they are kept and published again.
pub fn event_unroutable(count: u64) {
    counter!("inventoryd_events_unroutable_total").increment(count);
}

/// Events waiting to be published, over all replicas.
pub fn outbox_unsent(count: i64) {
    gauge!("inventoryd_outbox_unsent").set(count as f64);
}

/// Age of the oldest event waiting to be published.
pub fn outbox_oldest(age_s: f64) {
    gauge!("inventoryd_outbox_oldest_seconds").set(age_s);
}

/// 1, labelled with the version of this replica.
pub fn build_info() {
    gauge!("inventoryd_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

fn ended() -> Vec<&'static str> {
    texts(&[RunStatus::Success, RunStatus::Partial, RunStatus::Failed, RunStatus::Skipped], RunStatus::as_str)
}

fn texts<T: Copy>(all: &[T], text: impl Fn(T) -> &'static str) -> Vec<&'static str> {
    all.iter().copied().map(text).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_recorded_name_is_declared_once() {
        let source = include_str!("recorded.rs").split("#[cfg(test)]").next().unwrap();
        let recorded: BTreeSet<&str> = source
            .lines()
            .filter_map(|line| line.trim().split_once("!(\"").map(|(_, rest)| rest.split('"').next().unwrap()))
            .filter(|name| *name != "CARGO_PKG_VERSION")
            .collect();
        let declared: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(recorded, declared);
    }
}
