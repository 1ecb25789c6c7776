//! Trace export: OTLP over HTTP, from a separate thread. An unreachable collector costs traces only: spans that exceed the
//! queue are dropped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use tracing::level_filters::LevelFilter;
use tracing::{Subscriber, info, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

use crate::config::TelemetryConfig;
use crate::tls;

/// Timeout of the final export at shutdown.
const LAST_FLUSH: Duration = Duration::from_secs(3);
const PATH: &str = "v1/traces";

/// Trace exporter of this process; inactive without a collector.
#[derive(Debug, Default)]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Exports the remaining spans within a timeout, and shuts the exporter down.
    pub async fn flush(self) {
        let Some(provider) = self.0 else { return };
        let flushed = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_FLUSH)).await;
        if !matches!(flushed, Ok(Ok(()))) {
            warn!("the last traces were not exported in time");
        }
    }
}

/// Layer that exports this crate's spans to the configured collector; events stay in the log.
pub(super) fn layer<S>(config: &TelemetryConfig) -> Result<(Option<impl Layer<S>>, Traces), String>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    if config.otlp_endpoint.is_empty() {
        return Ok((None, Traces::default()));
    }
    tls::install_provider();
    let endpoint = format!("{}/{PATH}", config.otlp_endpoint.trim_end_matches('/'));
    let exporter = SpanExporter::builder().with_http().with_endpoint(endpoint).build();
    let exporter = exporter.map_err(|error| format!("telemetry.otlp_endpoint: {error}"))?;
    let resource = Resource::builder().with_service_name(env!("CARGO_PKG_NAME")).with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("deployment.environment.name", config.deployment.clone()),
    ]);
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(LoggingExporter { exporter, failing: AtomicBool::new(false) })
        .with_resource(resource.build())
        .build();
    let ours = filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with(env!("CARGO_PKG_NAME")));
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(env!("CARGO_PKG_NAME")))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(ours.with_max_level_hint(LevelFilter::INFO));
    Ok((Some(layer), Traces(Some(provider))))
}

/// Exporter that logs each change between failure and success once, instead of every failed batch.
#[derive(Debug)]
struct LoggingExporter {
    exporter: SpanExporter,
    failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for LoggingExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.exporter.export(batch).await;
        match (&sent, self.failing.swap(sent.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => warn!(%error, "the trace collector is failing; traces are dropped"),
            (Ok(()), true) => info!("the trace collector has recovered"),
            _ => {}
        }
        sent
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
