//! One HTTP client for Graph and the token service: its TLS, its connections, and a single request with its bounds.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, Client, ClientBuilder, Response, Url, redirect};
use uuid::Uuid;

use super::retry_after;
use crate::config::{GraphConfig, seconds};
use crate::domain::clock::Deadline;

/// How this daemon introduces itself.
const USER_AGENT: &str = concat!("inventoryd/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection whose far end is gone must not swallow a request until its timeout.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Large enough that a page of some megabytes does not wait for window updates.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Error bodies are small; what is longer says nothing that is needed.
const MOST_ERROR_BYTES: usize = 256 << 10;
/// New connections are made at most this often, however many requests ask for it at once.
const RENEW_AT_MOST_EVERY: Duration = Duration::from_secs(1);

/// Why there is no Graph client; each names the key to mend.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// The extra certificate authority can't be used.
    #[error("graph.ca_file: can't use {0}: {1}")]
    CaFile(String, String),
    /// The root of Graph is no address.
    #[error("graph.base_url: {0} is no address")]
    BaseUrl(String),
    /// TLS could not be set up.
    #[error("graph: no HTTPS client could be made: {0}")]
    Client(#[source] reqwest::Error),
}

/// The HTTP client in use, which can be exchanged for one with fresh connections.
#[derive(Debug)]
pub(super) struct Connections {
    ca: Vec<Certificate>,
    timeout: Duration,
    max_body_bytes: usize,
    live: Mutex<Live>,
}

#[derive(Debug)]
struct Live {
    client: Client,
    generation: u64,
    renewable_from: Deadline,
}

/// An answer with its whole body.
pub(super) struct Answer {
    pub(super) status: u16,
    /// Graph's id of the request.
    pub(super) request_id: Option<String>,
    /// How long Graph asks to be left alone.
    pub(super) retry_after: Option<Duration>,
    pub(super) body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// It could not be reached, or broke off on the way.
    Broken,
    /// It took too long.
    TimedOut,
    /// It is larger than the largest page.
    TooLarge,
}

/// One authorised GET.
pub(super) struct Get<'a> {
    pub(super) url: &'a Url,
    pub(super) authorization: &'a HeaderValue,
    /// Ours, new with every try.
    pub(super) client_request_id: Uuid,
    pub(super) at_most: Duration,
}

impl Connections {
    pub(super) fn new(config: &GraphConfig) -> Result<Self, GraphError> {
        // The process may have chosen its provider already; then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ca = match &config.ca_file {
            Some(path) => certificates(path)?,
            None => Vec::new(),
        };
        let timeout = seconds(config.request_timeout_s);
        let client = client(&ca, timeout).map_err(GraphError::Client)?;
        let live = Live { client, generation: 0, renewable_from: Deadline::after(Duration::ZERO) };
        Ok(Self { ca, timeout, max_body_bytes: config.max_page_bytes, live: Mutex::new(live) })
    }

    /// The client in use, with the number of its generation.
    pub(super) fn client(&self) -> (Client, u64) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        (live.client.clone(), live.generation)
    }

    /// Leaves the connections of a generation to the requests that still use them; new requests get fresh ones.
    pub(super) fn renew(&self, generation: u64) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if live.generation != generation || !live.renewable_from.passed() {
            return;
        }
        match client(&self.ca, self.timeout) {
            Ok(client) => {
                let renewable_from = Deadline::after(RENEW_AT_MOST_EVERY);
                *live = Live { client, generation: generation + 1, renewable_from };
            }
            Err(_) => tracing::warn!("no new HTTP client could be made; the connections in use are kept"),
        }
    }

    /// Sends one GET and reads its answer to the end.
    pub(super) async fn get(&self, client: &Client, get: Get<'_>) -> Result<Answer, NoAnswer> {
        let response = client
            .get(get.url.clone())
            .header(AUTHORIZATION, get.authorization)
            .header(ACCEPT, "application/json")
            .header("prefer", "include-unknown-enum-members")
            .header("client-request-id", get.client_request_id.to_string())
            .timeout(get.at_most.min(self.timeout))
            .send()
            .await
            .map_err(no_answer)?;
        let status = response.status().as_u16();
        let (request_id, retry_after) = (text(response.headers(), "request-id"), wait(response.headers()));
        let body = match status {
            200 => read(response, self.max_body_bytes).await?,
            _ => read(response, MOST_ERROR_BYTES).await.unwrap_or_default(),
        };
        Ok(Answer { status, request_id, retry_after, body })
    }
}

fn client(ca: &[Certificate], timeout: Duration) -> reqwest::Result<Client> {
    let builder: ClientBuilder = Client::builder()
        .user_agent(USER_AGENT)
        // A redirect would carry the token to wherever it leads; Graph has no use for them here.
        .redirect(redirect::Policy::none())
        .referer(false)
        // The environment must not be able to put somebody between us and Graph.
        .no_proxy()
        .https_only(true)
        .gzip(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout)
        .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(PING_EVERY)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        // Retries are ours alone, with their budget and their counters.
        .retry(reqwest::retry::never());
    builder.tls_certs_merge(ca.iter().cloned()).build()
}

/// A client for the metadata service of this very machine, which speaks plain HTTP and must never be sent on.
pub(super) fn machine_client() -> reqwest::Result<Client> {
    Client::builder().redirect(redirect::Policy::none()).no_proxy().timeout(CONNECT_TIMEOUT).build()
}

fn certificates(path: &std::path::Path) -> Result<Vec<Certificate>, GraphError> {
    let unreadable = |problem: String| GraphError::CaFile(path.display().to_string(), problem);
    let pem = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| unreadable(error.to_string()))?;
    if certificates.is_empty() {
        return Err(unreadable("there is no certificate in it".to_owned()));
    }
    Ok(certificates)
}

async fn read(mut response: Response, at_most_bytes: usize) -> Result<Vec<u8>, NoAnswer> {
    let (mut chunks, mut bytes) = (Vec::new(), 0);
    while let Some(chunk) = response.chunk().await.map_err(no_answer)? {
        bytes += chunk.len();
        if bytes > at_most_bytes {
            return Err(NoAnswer::TooLarge);
        }
        chunks.push(chunk);
    }
    // A buffer that grows as it is read would take up to three times the page.
    Ok(chunks.concat())
}

/// What is left of an error: its text may hold the link that was asked for, and with it names of the tenant.
fn no_answer(error: reqwest::Error) -> NoAnswer {
    if error.is_timeout() { NoAnswer::TimedOut } else { NoAnswer::Broken }
}

fn wait(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?;
    let date = headers.get(DATE).and_then(|date| date.to_str().ok());
    retry_after::parse(value, date)
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
