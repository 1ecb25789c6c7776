//! HTTP transport for Graph and the token service: TLS, connections, and one request with its bounds.

use std::io::Read;
use std::time::Duration;

use flate2::bufread::MultiGzDecoder;
use parking_lot::Mutex;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, DATE, HeaderMap, HeaderValue, RETRY_AFTER,
};
use reqwest::{Certificate, Client, ClientBuilder, NoProxy, Proxy, Response, Url, redirect};
use uuid::Uuid;

use crate::config::{GraphConfig, seconds};
use crate::domain::clock::Deadline;
use crate::graph::limits::retry_after;
use crate::tls;

const USER_AGENT: &str = concat!("inventoryd/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// HTTP/2 pings detect a dead peer long before a request would time out.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow control windows, large enough for a page of several megabytes without window updates.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Upper bound of an error body; a longer one is read as empty.
const MAX_ERROR_BYTES: usize = 256 << 10;
/// Shortest time between two replacements of the connections, however many requests ask for one.
const MIN_RENEWAL_INTERVAL: Duration = Duration::from_secs(1);

/// Error in the configuration of the Graph client; names the key to correct.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// The additional certificate authority cannot be used.
    #[error("graph.ca_file: cannot use {0}: {1}")]
    CaFile(String, String),
    /// The root of Graph is not a URL.
    #[error("graph.base_url: {0} is not a valid URL")]
    BaseUrl(String),
    /// The proxy, or the file with its credential, cannot be used.
    #[error("graph.{0}: {1}")]
    Proxy(&'static str, String),
    /// TLS setup failed.
    #[error("graph: cannot create the HTTPS client: {0}")]
    Client(#[source] reqwest::Error),
}

/// HTTP client that can be replaced by one with new connections.
#[derive(Debug)]
pub(super) struct HttpTransport {
    ca: Vec<Certificate>,
    proxy: Option<Proxy>,
    proxy_url: String,
    timeout: Duration,
    max_body_bytes: usize,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    client: Client,
    generation: u64,
    renewable_from: Deadline,
}

/// Response with its whole body.
pub(super) struct HttpResponse {
    pub(super) status: u16,
    /// Graph's `request-id`.
    pub(super) request_id: Option<String>,
    /// Parsed `Retry-After`.
    pub(super) retry_after: Option<Duration>,
    pub(super) body: Vec<u8>,
}

/// Reason for a request without a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TransportError {
    /// Connecting failed, or the connection broke, for this reason.
    Broken(String),
    /// No response within the time limit.
    TimedOut,
    /// The body exceeds `graph.max_page_bytes`.
    TooLarge,
}

/// Authorised GET request.
pub(super) struct Get<'a> {
    pub(super) url: &'a Url,
    pub(super) authorization: &'a HeaderValue,
    /// Our `client-request-id`, new for every attempt.
    pub(super) client_request_id: Uuid,
    pub(super) timeout: Duration,
}

impl HttpTransport {
    pub(super) fn new(config: &GraphConfig) -> Result<Self, GraphError> {
        tls::install_provider();
        let ca = match &config.ca_file {
            Some(path) => certificates(path)?,
            None => Vec::new(),
        };
        let (proxy, timeout) = (proxy(config)?, seconds(config.request_timeout_s));
        let client = build_client(&ca, proxy.as_ref(), timeout).map_err(GraphError::Client)?;
        let current = Current { client, generation: 0, renewable_from: Deadline::after(Duration::ZERO) };
        Ok(Self {
            ca,
            proxy,
            proxy_url: config.proxy.clone(),
            timeout,
            max_body_bytes: config.max_page_bytes,
            current: Mutex::new(current),
        })
    }

    /// Client in use, with its generation.
    pub(super) fn client(&self) -> (Client, u64) {
        let current = self.current.lock();
        (current.client.clone(), current.generation)
    }

    /// Replaces the client of a generation: new requests use new connections, requests in flight keep theirs.
    pub(super) fn renew(&self, generation: u64) {
        let mut current = self.current.lock();
        if current.generation != generation || !current.renewable_from.passed() {
            return;
        }
        match build_client(&self.ca, self.proxy.as_ref(), self.timeout) {
            Ok(client) => {
                let renewable_from = Deadline::after(MIN_RENEWAL_INTERVAL);
                *current = Current { client, generation: generation + 1, renewable_from };
            }
            Err(_) => tracing::warn!("cannot create a new HTTP client; keeping the current connections"),
        }
    }

    /// Sends one GET and reads the whole response.
    pub(super) async fn get(&self, client: &Client, get: Get<'_>) -> Result<HttpResponse, TransportError> {
        let response = client
            .get(get.url.clone())
            .header(AUTHORIZATION, get.authorization)
            .header(ACCEPT, "application/json")
            .header(ACCEPT_ENCODING, "gzip")
            .header("prefer", "include-unknown-enum-members")
            .header("client-request-id", get.client_request_id.to_string())
            .timeout(get.timeout.min(self.timeout))
            .send()
            .await
            .map_err(|error| transport_error(&error, &self.proxy_url))?;
        let status = response.status().as_u16();
        let (request_id, retry_after) = (text(response.headers(), "request-id"), retry_after_of(response.headers()));
        let body = match status {
            200 => read(response, self.max_body_bytes, &self.proxy_url).await?,
            _ => read(response, MAX_ERROR_BYTES, &self.proxy_url).await.unwrap_or_default(),
        };
        Ok(HttpResponse { status, request_id, retry_after, body })
    }
}

fn build_client(ca: &[Certificate], proxy: Option<&Proxy>, timeout: Duration) -> reqwest::Result<Client> {
    let builder: ClientBuilder = Client::builder()
        .user_agent(USER_AGENT)
        // A redirect would carry the token to another host; Graph's lists never redirect.
        .redirect(redirect::Policy::none())
        .referer(false)
        // Environment variables must not put a proxy between the daemon and Graph.
        .no_proxy()
        .https_only(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout)
        .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        // Retries are made in listing/retry.rs, within the run's budget.
        .retry(reqwest::retry::never());
    let builder = match proxy {
        Some(proxy) => builder.proxy(proxy.clone()),
        None => builder,
    };
    builder.tls_certs_merge(ca.iter().cloned()).build()
}

/// Configured proxy, with its credential.
fn proxy(config: &GraphConfig) -> Result<Option<Proxy>, GraphError> {
    if config.proxy.is_empty() {
        return Ok(None);
    }
    let proxy = Proxy::all(&config.proxy).map_err(|_| GraphError::Proxy("proxy", "not a valid URL".to_owned()))?;
    let proxy = proxy.no_proxy(NoProxy::from_string(&config.no_proxy));
    let Some(file) = &config.proxy_credential_file else { return Ok(Some(proxy)) };
    let problem = |problem: &str| GraphError::Proxy("proxy_credential_file", format!("{}: {problem}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| problem(&error.to_string()))?;
    let (user, password) = text.trim().split_once(':').ok_or_else(|| problem("the file must contain user:password"))?;
    Ok(Some(proxy.basic_auth(user, password)))
}

/// Client for the metadata service of this machine: plain HTTP, no redirects, no proxy.
pub(super) fn metadata_client() -> reqwest::Result<Client> {
    Client::builder().redirect(redirect::Policy::none()).no_proxy().timeout(CONNECT_TIMEOUT).build()
}

fn certificates(path: &std::path::Path) -> Result<Vec<Certificate>, GraphError> {
    let unreadable = |problem: String| GraphError::CaFile(path.display().to_string(), problem);
    let pem = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| unreadable(error.to_string()))?;
    if certificates.is_empty() {
        return Err(unreadable("the file contains no certificate".to_owned()));
    }
    Ok(certificates)
}

/// Reads a body to its end and decompresses it.
async fn read(mut response: Response, max_bytes: usize, proxy: &str) -> Result<Vec<u8>, TransportError> {
    let encoding = response.headers().get(CONTENT_ENCODING);
    let is_compressed = encoding.is_some_and(|encoding| encoding.as_bytes().eq_ignore_ascii_case(b"gzip"));
    let (mut chunks, mut bytes) = (Vec::new(), 0);
    while let Some(chunk) = response.chunk().await.map_err(|error| transport_error(&error, proxy))? {
        bytes += chunk.len();
        if bytes > max_bytes {
            return Err(TransportError::TooLarge);
        }
        chunks.push(chunk);
    }
    // A growing buffer would take up to three times the size of the page.
    let body = chunks.concat();
    if is_compressed { decompress(&body, max_bytes) } else { Ok(body) }
}

/// Decompresses a body in one piece: by a stream it would be copied and allocated in pieces of a few kilobytes.
fn decompress(compressed: &[u8], max_bytes: usize) -> Result<Vec<u8>, TransportError> {
    // The last four bytes are the size before compression; a false one is found at the end.
    let size = compressed.last_chunk().map_or(0, |size| u32::from_le_bytes(*size) as usize);
    let mut body = Vec::with_capacity(size.min(max_bytes) + 1);
    let mut reader = MultiGzDecoder::new(compressed).take(max_bytes as u64 + 1);
    reader.read_to_end(&mut body).map_err(|_| TransportError::Broken("the compressed body is damaged".to_owned()))?;
    if body.len() > max_bytes { Err(TransportError::TooLarge) } else { Ok(body) }
}

/// Class of an error. The text is dropped: it may contain the requested link, and with it names of the tenant.
fn transport_error(error: &reqwest::Error, proxy: &str) -> TransportError {
    if error.is_timeout() { TransportError::TimedOut } else { TransportError::Broken(describe(error, proxy)) }
}

/// Describes a failed request by its class and, if it is known, the reason: name resolution, refused connection, TLS,
/// time limit. The error's own text may contain the link.
pub(super) fn describe(error: &reqwest::Error, proxy: &str) -> String {
    let reason = reason(error);
    if proxy.is_empty() { reason } else { format!("{reason}, through the proxy {proxy}") }
}

fn reason(error: &reqwest::Error) -> String {
    let host = error.url().and_then(Url::host_str).unwrap_or("the host");
    if error.is_timeout() {
        return format!("{host} did not respond within the time limit");
    }
    let mut layer: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = layer {
        let io = error.downcast_ref::<std::io::Error>();
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return format!("TLS with {host} failed: {tls}");
        }
        if io.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
            return format!("{host} refused the connection");
        }
        match error.to_string().as_str() {
            "dns error" => return format!("the name {host} cannot be resolved"),
            "tunnel error: proxy authorization required" => {
                return "the proxy requires a user and password (407); set graph.proxy_credential_file".to_owned();
            }
            "tunnel error: unsuccessful" => return format!("the proxy refused a connection to {host}"),
            _ => {}
        }
        // An I/O error passes over what it wraps when it is asked for its source.
        layer = match io.and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    if error.is_connect() { format!("no connection to {host}") } else { format!("the connection to {host} broke") }
}

fn retry_after_of(headers: &HeaderMap) -> Option<Duration> {
    let values: Vec<&str> = headers.get_all(RETRY_AFTER).iter().filter_map(|value| value.to_str().ok()).collect();
    let date = headers.get(DATE).and_then(|date| date.to_str().ok());
    // A gateway may add a header of its own: the longest wait satisfies both.
    values.into_iter().filter_map(|value| retry_after::parse(value, date)).max()
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn compressed(body: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_compressed_body_is_limited_by_its_size_after_decompression() {
        let (page, bomb) = (vec![b'x'; 100_000], compressed(&vec![0; 1 << 20]));
        assert_eq!(decompress(&compressed(&page), page.len()), Ok(page.clone()));
        assert_eq!(decompress(&compressed(&page), page.len() - 1), Err(TransportError::TooLarge));
        assert!(bomb.len() < 2_000);
        assert_eq!(decompress(&bomb, 100_000), Err(TransportError::TooLarge));
        let members = [compressed(b"[1,"), compressed(b"2]")].concat();
        assert_eq!(decompress(&members, 10), Ok(b"[1,2]".to_vec()), "a body may have several members");
    }

    #[test]
    fn a_damaged_compressed_body_is_a_broken_response() {
        let whole = compressed(b"a page of objects");
        for end in 0..whole.len() {
            assert!(matches!(decompress(&whole[..end], 100), Err(TransportError::Broken(_))), "{end}");
        }
        let mut false_size = whole.clone();
        *false_size.last_mut().unwrap() = 0xff;
        assert!(matches!(decompress(&false_size, 100), Err(TransportError::Broken(_))));
        assert!(matches!(decompress(b"<html>", 100), Err(TransportError::Broken(_))));
    }

    #[test]
    fn of_two_retry_after_lines_the_longest_wait_counts() {
        let wait = |lines: &[&str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(RETRY_AFTER, line.parse().unwrap());
            }
            retry_after_of(&headers).map(|wait| wait.as_secs())
        };
        assert_eq!((wait(&["2", "2"]), wait(&["2", "5"]), wait(&["5", "2"])), (Some(2), Some(5), Some(5)));
        assert_eq!((wait(&["soon", "3"]), wait(&["3", ""])), (Some(3), Some(3)), "an unparsable line is ignored");
        assert_eq!((wait(&["soon"]), wait(&[])), (None, None));
    }
}
