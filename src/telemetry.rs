//! Logs, traces and metrics: how lines are written, what is traced, and every metric and label as a function.

use std::io::IsTerminal;
use std::time::Duration;

use metrics::{Label, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{LogFormat, TelemetryConfig};
use crate::domain::failure::{DeadReason, ErrorCode};
use crate::domain::run::RunStatus;

pub mod spans;
mod traces;

pub use traces::Traces;

/// Sets up the lines that this process writes to standard error, and the traces that it sends.
///
/// # Errors
/// If the directives in `telemetry.log` or the collector's address can't be used, or lines were set up before.
pub fn init_logs_and_traces(config: &TelemetryConfig) -> Result<Traces, String> {
    // The AMQP client logs whole messages that the broker returns; events are nobody's business there.
    let directives = format!("lapin=off,typespec_client_core=warn,{}=off,{}", spans::TARGET, config.log);
    let filter = EnvFilter::try_new(directives).map_err(|error| format!("telemetry.log: {error}"))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(true);
    let lines = match config.format {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
        LogFormat::Pretty => lines.compact().boxed(),
    };
    let (sender, traces) = traces::layer(config)?;
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter)).with(sender);
    subscriber.try_init().map_err(|error| error.to_string())?;
    Ok(traces)
}

/// Sets up the metrics of this process; what they are at a moment is asked of the handle.
///
/// # Errors
/// If metrics were set up before.
pub fn init_metrics() -> Result<PrometheusHandle, String> {
    let seconds = [0.005, 0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)
        .map_err(|error| error.to_string())?
        .install_recorder()
        .map_err(|error| error.to_string())?;
    METRICS.iter().for_each(begin);
    Ok(handle)
}

/// Describes a metric, and has what grows begin at 0: the rate of a series that begins with its first event misses that
/// event.
fn begin(metric: &Metric) {
    let labels = || (metric.values)().into_iter().map(|value| Label::new(metric.labels[0], value));
    let series = || if metric.labels.is_empty() { vec![Vec::new()] } else { labels().map(|one| vec![one]).collect() };
    match metric.kind {
        Kind::Counter => {
            describe_counter!(metric.name, metric.help);
            series().into_iter().for_each(|labels| counter!(metric.name, labels).increment(0));
        }
        Kind::Gauge => describe_gauge!(metric.name, metric.help),
        Kind::Histogram => {
            describe_histogram!(metric.name, metric.help);
            series().into_iter().for_each(|labels| drop(histogram!(metric.name, labels)));
        }
    }
}

/// What kind of number a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How observations are spread.
    Histogram,
}

/// One metric, as README lists it.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
    /// Its label, if it has one.
    pub labels: &'static [&'static str],
    /// Every value that the label can have.
    pub values: fn() -> Vec<&'static str>,
    /// What it says.
    pub help: &'static str,
}

/// Declares each metric once: its entry in [`METRICS`] and the function that moves it.
macro_rules! metrics {
    ($($function:ident($($label:ident: $kind_of:ty => $text:expr; $values:expr)?) $method:ident($($value:ident: $of:ty => $number:expr)?) $kind:ident $name:literal $help:literal;)+) => {
        /// Every metric of the daemon.
        pub const METRICS: &[Metric] = &[
            $(Metric {
                name: $name,
                kind: Kind::$kind,
                labels: &[$(stringify!($label))?],
                values: || Vec::<&'static str>::from_iter(metrics!(@all $($values)?)),
                help: $help,
            }),+
        ];
        $(#[doc = $help]
        pub fn $function($($label: $kind_of,)? $($value: $of)?) {
            metrics!(@$kind $name, [$($label => $text)?], $method, $($number)?);
        })+
    };
    (@Counter $name:literal, [$($label:ident => $text:expr),*], $method:ident, $($number:expr)?) => {
        counter!($name, $(stringify!($label) => $text),*).increment(metrics!(@or_one $($number)?));
    };
    (@Gauge $name:literal, [$($label:ident => $text:expr),*], $method:ident, $number:expr) => {
        gauge!($name, $(stringify!($label) => $text),*).$method($number);
    };
    (@Histogram $name:literal, [$($label:ident => $text:expr),*], $method:ident, $number:expr) => {
        histogram!($name, $(stringify!($label) => $text),*).$method($number);
    };
    (@all) => { [] };
    (@all $values:expr) => { $values };
    (@or_one) => { 1 };
    (@or_one $number:expr) => { $number };
}

metrics! {
    run_ended(status: RunStatus => status.as_str(); ended()) increment() Counter
        "inventoryd_runs_total" "Runs that this replica brought to their end, by status.";
    run_error(code: ErrorCode => code.as_str(); texts(ErrorCode::ALL, ErrorCode::as_str)) increment() Counter
        "inventoryd_run_errors_total" "Error codes of ended runs, each counted once a run.";
    run_took(status: RunStatus => status.as_str(); ended()) record(took: Duration => took.as_secs_f64()) Histogram
        "inventoryd_run_duration_seconds" "How long runs took from admission to their end.";
    deliveries_in_flight() set(count: usize => count as f64) Gauge
        "inventoryd_deliveries_in_flight" "Deliveries in flight, at most consumer.prefetch.";
    delivery(outcome: &'static str => outcome; ["done", "duplicate", "retry_scheduled", "rejected", "requeued"]) increment() Counter
        "inventoryd_deliveries_total" "Deliveries by how they were settled: done, duplicate, retry_scheduled, rejected, requeued.";
    dead_letter(reason: DeadReason => reason.as_str(); texts(DeadReason::ALL, DeadReason::as_str)) increment() Counter
        "inventoryd_dead_letters_total" "Messages moved to the dead-letter queue, by reason.";
    ack_lost() increment() Counter
        "inventoryd_acks_lost_total" "Acknowledgements that found their channel gone; the redelivery is answered as a duplicate.";
    resubscribed(cause: &'static str => cause; ["error", "ended", "watchdog"]) increment() Counter
        "inventoryd_resubscriptions_total" "Subscriptions rebuilt, by cause: error, ended, watchdog.";
    subscribed() set(yes: bool => f64::from(u8::from(yes))) Gauge
        "inventoryd_subscribed" "1 while this replica has a live subscription.";
    broker_blocked() set(yes: bool => f64::from(u8::from(yes))) Gauge
        "inventoryd_broker_blocked" "1 while the broker blocks the publishing connection (memory or disk alarm).";
    items_observed() increment(count: u64 => count) Counter
        "inventoryd_items_observed_total" "Distinct objects that Graph returned in scope.";
    items_upserted() increment(count: u64 => count) Counter
        "inventoryd_items_upserted_total" "Inventory rows written.";
    items_unclassified() increment(count: u64 => count) Counter
        "inventoryd_items_unclassified_total" "Objects of shared collections that no policy type claims.";
    graph_request(outcome: &'static str => outcome; ["ok", "throttled", "refused", "failed"]) increment() Counter
        "inventoryd_graph_requests_total" "Requests to Graph by outcome: ok, throttled, refused, failed.";
    graph_request_took() record(took: Duration => took.as_secs_f64()) Histogram
        "inventoryd_graph_request_duration_seconds" "How long single requests to Graph took.";
    graph_throttle_wait() record(wait: Duration => wait.as_secs_f64()) Histogram
        "inventoryd_graph_throttle_wait_seconds" "How long runs waited because Graph asked them to.";
    graph_rate_limit_wait() record(wait: Duration => wait.as_secs_f64()) Histogram
        "inventoryd_graph_rate_limit_wait_seconds" "How long requests waited to stay under Graph's documented limits.";
    graph_select_refused() increment() Counter
        "inventoryd_graph_select_refused_total" "Lists asked again without $select because Graph refused it.";
    graph_token(outcome: &'static str => outcome; ["ok", "failed"]) increment() Counter
        "inventoryd_graph_tokens_total" "Tokens asked for by outcome: ok, failed.";
    lease_lost() increment() Counter
        "inventoryd_leases_lost_total" "Runs that this replica had to stop because their lease was lost.";
    lease_headroom() set(least: Duration => least.as_secs_f64()) Gauge
        "inventoryd_lease_headroom_seconds" "Least time left on any lease held, just before it was renewed.";
    run_restarted() increment() Counter
        "inventoryd_runs_restarted_total" "Interrupted runs whose request was published again.";
    event_published() increment(count: u64 => count) Counter
        "inventoryd_events_published_total" "Events that the broker confirmed.";
    event_unroutable() increment(count: u64 => count) Counter
        "inventoryd_events_unroutable_total" "Events that no queue took; they are kept and tried again.";
    outbox_unsent() set(count: i64 => count as f64) Gauge
        "inventoryd_outbox_unsent" "Events waiting to be published, over all replicas.";
    outbox_oldest() set(age_s: f64 => age_s) Gauge
        "inventoryd_outbox_oldest_seconds" "Age of the oldest event waiting to be published.";
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
    fn names_are_unique_prefixed_and_described() {
        let names: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        for metric in METRICS {
            assert!(metric.name.starts_with("inventoryd_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }
    #[test]
    fn what_grows_begins_at_zero_for_every_value_of_its_label() {
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || METRICS.iter().for_each(begin));
        let text = recorder.handle().render();
        let mut series = 0;
        for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Counter) {
            assert_eq!(metric.labels.is_empty(), (metric.values)().is_empty(), "{}", metric.name);
            let labels: Vec<String> = match metric.labels {
                [] => vec![String::new()],
                [label, ..] => (metric.values)().iter().map(|value| format!("{{{label}=\"{value}\"}}")).collect(),
            };
            for label in labels {
                let line = format!("{}{label} 0", metric.name);
                assert!(text.lines().any(|one| one == line), "{line} is not in {text}");
                series += 1;
            }
        }
        assert!(series > 40, "{series}");
        assert!(text.contains("inventoryd_graph_throttle_wait_seconds_count 0"), "{text}");
    }
}
