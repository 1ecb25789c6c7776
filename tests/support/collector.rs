//! OTLP collector that stores the traces it receives over HTTP.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use parking_lot::Mutex;
use prost::Message;
use tokio::net::TcpListener;

/// Span as received.
#[derive(Debug, Clone)]
pub struct Span {
    /// Name.
    pub name: String,
    /// Trace id in hexadecimal.
    pub trace_id: String,
    /// Span id.
    pub span_id: String,
    /// Id of the parent span; empty for a root span.
    pub parent_id: String,
    /// `tracestate` of the trace.
    pub trace_state: String,
    /// Attributes as text.
    pub attributes: BTreeMap<String, String>,
}

/// Collector that listens on a free port.
pub struct Collector {
    /// Address it listens on.
    pub address: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    /// Starts a collector.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound");
        let spans: Arc<Mutex<Vec<Span>>> = Arc::default();
        let kept = Arc::clone(&spans);
        let take = move |body: Bytes| {
            let request = ExportTraceServiceRequest::decode(body).expect("the body is OTLP");
            kept.lock().extend(spans_in(request));
            std::future::ready(())
        };
        let router = Router::new().route("/v1/traces", post(take));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, spans }
    }

    /// Returns every span received so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().clone()
    }
}

fn spans_in(request: ExportTraceServiceRequest) -> Vec<Span> {
    let scopes = request.resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
    let spans = scopes.flat_map(|scope| scope.spans).map(|span| Span {
        name: span.name,
        trace_id: hexadecimal(&span.trace_id),
        span_id: hexadecimal(&span.span_id),
        parent_id: hexadecimal(&span.parent_span_id),
        trace_state: span.trace_state,
        attributes: span.attributes.into_iter().map(text).collect(),
    });
    spans.collect()
}

fn hexadecimal(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(attribute: KeyValue) -> (String, String) {
    let value = match attribute.value.and_then(|AnyValue { value, .. }| value) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    (attribute.key, value)
}
