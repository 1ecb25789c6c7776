//! Sending traces: OTLP over HTTP, from a thread of its own. A collector that is away costs traces and nothing else: what
//! does not fit into the queue meanwhile is dropped.

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

/// How long a stopping daemon may take for the traces that are left.
const LAST_FLUSH: Duration = Duration::from_secs(3);
const PATH: &str = "v1/traces";

/// The traces of this process on their way to the collector, if there is one.
#[derive(Debug, Default)]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Sends what is left, for a short time; nothing is sent from then on.
    pub async fn flush(self) {
        let Some(provider) = self.0 else { return };
        let flushed = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_FLUSH)).await;
        if !matches!(flushed, Ok(Ok(()))) {
            warn!("the last traces were not sent in time");
        }
    }
}

/// What has spans of ours sent to the collector of the configuration; events stay in the log.
pub(super) fn layer<S>(config: &TelemetryConfig) -> Result<(Option<impl Layer<S>>, Traces), String>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    if config.otlp_endpoint.is_empty() {
        return Ok((None, Traces::default()));
    }
    // The exporter makes a TLS client, whether it needs one or not; an installed provider is kept.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let endpoint = format!("{}/{PATH}", config.otlp_endpoint.trim_end_matches('/'));
    let exporter = SpanExporter::builder().with_http().with_endpoint(endpoint).build();
    let exporter = exporter.map_err(|error| format!("telemetry.otlp_endpoint: {error}"))?;
    let resource = Resource::builder().with_service_name(env!("CARGO_PKG_NAME")).with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("deployment.environment.name", config.deployment.clone()),
    ]);
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(Outspoken { exporter, failing: AtomicBool::new(false) })
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

/// An exporter that says when it begins to fail and when that is over: once, and not for every batch.
#[derive(Debug)]
struct Outspoken {
    exporter: SpanExporter,
    failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for Outspoken {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.exporter.export(batch).await;
        match (&sent, self.failing.swap(sent.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => warn!(%error, "the collector takes no traces; they are lost until it does"),
            (Ok(()), true) => info!("the collector takes traces again"),
            _ => {}
        }
        sent
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
