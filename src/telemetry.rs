//! Logs, traces and metrics.

use std::io::IsTerminal;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{LogFormat, TelemetryConfig};

mod recorded;
pub mod spans;
mod traces;

pub use recorded::*;
pub use traces::Traces;

/// Initialises logging to standard error, and trace export.
///
/// # Errors
/// If `telemetry.log` or the collector's address is invalid, or logging is already initialised.
pub fn init_logs_and_traces(config: &TelemetryConfig) -> Result<Traces, String> {
    let filter = check_log_directives(config)?;
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

/// Parses the directives of `telemetry.log`.
///
/// # Errors
/// If they are not valid tracing directives.
pub fn check_log_directives(config: &TelemetryConfig) -> Result<EnvFilter, String> {
    // The AMQP client logs whole messages that the broker returns; event bodies do not belong in the log.
    let directives = format!("lapin=off,typespec_client_core=warn,{}=off,{}", spans::TARGET, config.log);
    EnvFilter::try_new(directives)
        .map_err(|_| "telemetry.log: not valid tracing directives; use a level, or TARGET=LEVEL,...".to_owned())
}

/// Installs the metrics recorder of this process; the handle renders the current values.
///
/// # Errors
/// If a recorder is already installed.
pub fn init_metrics() -> Result<PrometheusHandle, String> {
    let seconds = [0.005, 0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)
        .map_err(|error| error.to_string())?
        .install_recorder()
        .map_err(|error| error.to_string())?;
    METRICS.iter().for_each(register);
    build_info();
    Ok(handle)
}

/// Describes a metric and creates its series at 0, because the rate of a series that starts with its first event misses
/// that event.
fn register(metric: &Metric) {
    let labels = || match &metric.label {
        None => vec![Vec::new()],
        Some(label) => (label.values)().into_iter().map(|value| vec![metrics::Label::new(label.name, value)]).collect(),
    };
    match metric.kind {
        Kind::Counter => {
            describe_counter!(metric.name, metric.help);
            labels().into_iter().for_each(|labels| counter!(metric.name, labels).increment(0));
        }
        Kind::Gauge => describe_gauge!(metric.name, metric.help),
        Kind::Histogram => {
            describe_histogram!(metric.name, metric.help);
            labels().into_iter().for_each(|labels| drop(histogram!(metric.name, labels)));
        }
    }
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
    fn counters_start_at_zero_for_every_label_value() {
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || METRICS.iter().for_each(register));
        let text = recorder.handle().render();
        let mut series = 0;
        for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Counter) {
            let labels: Vec<String> = match &metric.label {
                None => vec![String::new()],
                Some(label) => {
                    let name = label.name;
                    (label.values)().iter().map(|value| format!("{{{name}=\"{value}\"}}")).collect()
                }
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
