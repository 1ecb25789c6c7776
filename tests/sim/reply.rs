//! Responses, and the faults of their delivery.

use std::io::Write;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::{StreamExt, stream};

use super::errors::{CallIds, graph_error, usual};

/// Smaller bodies are not worth compressing.
const GZIP_FROM_BYTES: usize = 512;
const ODATA_JSON: &str =
    "application/json;odata.metadata=minimal;odata.streaming=true;IEEE754Compatible=false;charset=utf-8";

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// Headers beside the usual ones.
    pub headers: Vec<(&'static str, String)>,
    /// Content type.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
    /// The body compressed, if that was done before.
    pub gzip: Option<Bytes>,
    /// Delivery to the client.
    pub delivery: Delivery,
}

/// Delivery of a body to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// As it should.
    Whole,
    /// Half of it; `clean` hides that from HTTP.
    Half {
        /// `true` if the announced length is the length that is sent.
        clean: bool,
    },
    /// In drips.
    Drips {
        /// Bytes per drip.
        chunk_bytes: usize,
        /// The pause before each.
        pause_ms: u64,
    },
    /// Not at all: the connection is cut.
    Never,
}

impl Reply {
    /// A good answer of JSON.
    pub fn json(body: Bytes) -> Reply {
        let content_type = ODATA_JSON;
        Reply { status: 200, headers: Vec::new(), content_type, body, gzip: None, delivery: Delivery::Whole }
    }

    /// Graph's error answer.
    pub fn error(status: u16, code: &str, message: &str, ids: &CallIds) -> Reply {
        let body = graph_error(code, message, ids);
        Reply { status, content_type: "application/json", ..Reply::json(body) }
    }

    /// Graph's error answer with the words that it usually has.
    pub fn usual_error(status: u16, ids: &CallIds) -> Reply {
        let (code, message) = usual(status);
        Reply::error(status, code, message, ids)
    }

    /// The same answer with one more header.
    pub fn with_header(mut self, name: &'static str, value: String) -> Reply {
        self.headers.push((name, value));
        self
    }

    /// The answer as HTTP; compressed if the client can read that and it pays.
    pub fn into_response(mut self, takes_gzip: bool, ids: &CallIds) -> Response {
        if self.delivery == (Delivery::Half { clean: true }) {
            // Cut before it is compressed, or the client would see broken gzip instead of broken JSON.
            self.body.truncate(self.body.len() / 2);
            self.gzip = None;
        }
        let is_zipped = takes_gzip && self.body.len() >= GZIP_FROM_BYTES;
        let sent = if is_zipped { self.gzip.unwrap_or_else(|| gzip(&self.body)) } else { self.body };
        let announced = sent.len();
        let mut response = Response::new(body(sent, &self.delivery));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(announced));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-cache"));
        headers.insert("odata-version", HeaderValue::from_static("4.0"));
        headers.insert("x-ms-ags-diagnostic", HeaderValue::from_static(r#"{"ServerInfo":{"DataCenter":"Simulator"}}"#));
        if is_zipped {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        let own = [("request-id", ids.request.clone()), ("client-request-id", ids.client.clone())];
        for (name, value) in own.into_iter().chain(self.headers) {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        }
        response
    }
}

/// Compresses a body; fast rather than small, because the simulator must not be what a benchmark measures.
pub fn gzip(body: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 4), Compression::fast());
    encoder.write_all(body).expect("writing to memory does not fail");
    Bytes::from(encoder.finish().expect("writing to memory does not fail"))
}

/// Returns `true` if a body of this length is compressed for a client that accepts it.
pub fn pays_to_gzip(length: usize) -> bool {
    length >= GZIP_FROM_BYTES
}

fn body(sent: Bytes, delivery: &Delivery) -> Body {
    let half = sent.slice(..sent.len() / 2);
    match *delivery {
        Delivery::Whole | Delivery::Never | Delivery::Half { clean: true } => Body::from(sent),
        Delivery::Half { clean: false } => {
            let broken = async {
                // Time for the first half to be sent: a stream that is reset at once loses even its headers.
                tokio::time::sleep(Duration::from_millis(25)).await;
                Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
            };
            Body::from_stream(stream::iter([Ok(half)]).chain(stream::once(broken)))
        }
        Delivery::Drips { chunk_bytes, pause_ms } => {
            Body::from_stream(stream::unfold(sent, move |mut rest| async move {
                if rest.is_empty() {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                let drip = rest.split_to(chunk_bytes.clamp(1, rest.len()));
                Some((Ok::<_, std::io::Error>(drip), rest))
            }))
        }
    }
}
