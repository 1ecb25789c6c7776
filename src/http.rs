//! What may be asked of this process over HTTP: whether it is stuck, whether it is ready, what it measures, what it does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use futures_util::future::BoxFuture;
use metrics_exporter_prometheus::PrometheusHandle;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::domain::clock::Heartbeat;

/// Longest wait for the database before a probe is answered without it: under the time that probes commonly allow.
const DATABASE_PATIENCE: Duration = Duration::from_millis(800);
/// Time that open connections have to end once the daemon stops.
const LAST_CALL: Duration = Duration::from_secs(2);
/// How often histograms are condensed, so that they don't grow where nobody scrapes.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A question that is answered by another room; `Err` is one line that says why there is no answer.
pub type Ask<T> = Arc<dyn Fn() -> BoxFuture<'static, Result<T, String>> + Send + Sync>;

/// What is known of this process and whom to ask for the rest.
#[derive(Clone)]
pub struct HttpState {
    /// The name of this replica.
    pub replica: String,
    /// The metrics.
    pub metrics: PrometheusHandle,
    /// What `/metrics` and `/status` ask for; empty for nothing.
    pub token: SecretString,
    /// When it began.
    pub started: Instant,
    /// Beaten by the loop that takes requests.
    pub heartbeat: Arc<Heartbeat>,
    /// Without a beat for so long, this process is stuck.
    pub stuck_after: Duration,
    /// Cancelled once nothing new is taken.
    pub draining: CancellationToken,
    /// What the consumer does.
    pub consuming: Arc<dyn Fn() -> Consuming + Send + Sync>,
    /// Whether the database answers.
    pub ping: Ask<()>,
    /// What the database says of all replicas.
    pub figures: Ask<Figures>,
}

/// What the consumer does at a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Consuming {
    /// Whether there is a live subscription.
    pub subscribed: bool,
    /// Deliveries in hand.
    pub in_flight: usize,
    /// Why nothing new is taken, if so.
    pub paused: Option<String>,
    /// Why there is no subscription, in words, if so.
    pub problem: Option<String>,
}

/// What the database says of all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Events waiting to be published.
    pub outbox_unsent: i64,
    /// Age of the oldest of them in seconds.
    pub outbox_oldest_s: f64,
    /// Runs that are running.
    pub running_runs: i64,
}

/// Takes the address that `http.listen` gives.
///
/// # Errors
/// One line that names the key, if the address can't be had.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    let refuse =
        |error| format!("http.listen: can't listen on {address}: {error}; choose another, or leave it empty for none");
    TcpListener::bind(address).await.map_err(refuse)
}

/// Answers until `stop` is cancelled and the open connections have ended.
pub async fn serve(listener: TcpListener, state: HttpState, stop: CancellationToken) {
    let metrics = state.metrics.clone();
    let server = axum::serve(listener, router(state)).with_graceful_shutdown(stop.clone().cancelled_owned());
    let upkeep = async {
        let mut tick = tokio::time::interval(UPKEEP_EVERY);
        loop {
            tick.tick().await;
            metrics.run_upkeep();
        }
    };
    let last_call = async {
        stop.cancelled().await;
        tokio::time::sleep(LAST_CALL).await;
    };
    tokio::select! {
        _ = server => {},
        () = upkeep => {},
        () = last_call => {},
    }
}

fn router(state: HttpState) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(Arc::new(state))
}

/// Looks at this process alone: a database that is away is no reason to restart every replica.
async fn livez(State(state): State<Arc<HttpState>>) -> Response {
    let age = state.heartbeat.age();
    let alive = age <= state.stuck_after;
    let code = if alive { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "alive": alive, "heartbeat_age_s": age.as_secs_f64() }))).into_response()
}

async fn readyz(State(state): State<Arc<HttpState>>) -> Response {
    let mut missing = Vec::new();
    if ask(&state.ping).await.is_none() {
        missing.push("database");
    }
    if !(state.consuming)().subscribed {
        missing.push("subscription");
    }
    if state.draining.is_cancelled() {
        missing.push("draining");
    }
    let ready = missing.is_empty();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": ready, "missing": missing }))).into_response()
}

async fn metrics(State(state): State<Arc<HttpState>>, headers: HeaderMap) -> Response {
    if !is_authorised(&state.token, &headers) {
        return unauthorised();
    }
    ([(CONTENT_TYPE, PROMETHEUS_TEXT)], state.metrics.render()).into_response()
}

async fn status(State(state): State<Arc<HttpState>>, headers: HeaderMap) -> Response {
    if !is_authorised(&state.token, &headers) {
        return unauthorised();
    }
    let figures = ask(&state.figures).await;
    let consuming = (state.consuming)();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "replica": state.replica,
        "uptime_s": state.started.elapsed().as_secs(),
        "draining": state.draining.is_cancelled(),
        "subscribed": consuming.subscribed,
        "in_flight": consuming.in_flight,
        "paused": consuming.paused,
        "problem": consuming.problem,
        "database": if figures.is_some() { "ok" } else { "away" },
        "outbox_unsent": figures.map(|all| all.outbox_unsent),
        "outbox_oldest_s": figures.map(|all| all.outbox_oldest_s),
        "running_runs": figures.map(|all| all.running_runs),
    }))
    .into_response()
}

async fn ask<T>(question: &Ask<T>) -> Option<T> {
    match tokio::time::timeout(DATABASE_PATIENCE, question()).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(problem)) => {
            tracing::debug!(problem, "the database did not answer a probe");
            None
        }
        Err(_) => {
            tracing::debug!("the database did not answer a probe in time");
            None
        }
    }
}

/// Digests of one length are compared, all of their bytes: how long it takes tells nothing of the token.
fn is_authorised(token: &SecretString, headers: &HeaderMap) -> bool {
    let expected = token.expose_secret();
    if expected.is_empty() {
        return true;
    }
    let Some((scheme, given)) =
        headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.split_once(' '))
    else {
        return false;
    };
    let (expected, given) = (Sha256::digest(expected), Sha256::digest(given.trim()));
    let difference = expected.iter().zip(given.iter()).fold(0, |sum, (a, b)| sum | (a ^ b));
    scheme.eq_ignore_ascii_case("bearer") && difference == 0
}

fn unauthorised() -> Response {
    let hint = "send Authorization: Bearer with the value of http.token\n";
    (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")], hint).into_response()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::*;

    fn state() -> HttpState {
        let figures = Figures { outbox_unsent: 3, outbox_oldest_s: 1.5, running_runs: 2 };
        HttpState {
            replica: "here".to_owned(),
            metrics: PrometheusBuilder::new().build_recorder().handle(),
            token: String::new().into(),
            started: Instant::now(),
            heartbeat: Arc::default(),
            stuck_after: Duration::from_secs(60),
            draining: CancellationToken::new(),
            consuming: Arc::new(|| Consuming { subscribed: true, in_flight: 4, paused: None, problem: None }),
            ping: Arc::new(|| async { Ok(()) }.boxed()),
            figures: Arc::new(move || async move { Ok(figures) }.boxed()),
        }
    }

    struct Server {
        address: SocketAddr,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Server {
        async fn start(state: HttpState) -> Self {
            let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
            let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
            Self { address, stop: stop.clone(), task: tokio::spawn(serve(listener, state, stop)) }
        }

        async fn get(&self, path: &str, headers: &str) -> (u16, String) {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            (head[9..12].parse().unwrap(), body.to_owned())
        }
    }

    #[tokio::test]
    async fn readiness_says_what_is_missing() {
        let server = Server::start(state()).await;
        assert_eq!(server.get("/readyz", "").await, (200, r#"{"missing":[],"ready":true}"#.to_owned()));
        let mut unready = state();
        unready.ping = Arc::new(|| async { Err("connection refused".to_owned()) }.boxed());
        unready.consuming = Arc::new(Consuming::default);
        unready.draining.cancel();
        let server = Server::start(unready).await;
        let (code, body) = server.get("/readyz", "").await;
        assert_eq!(code, 503);
        assert!(body.contains(r#"["database","subscription","draining"]"#), "{body}");
    }

    #[tokio::test]
    async fn a_database_that_hangs_does_not_hang_the_probe_and_never_stops_the_life_sign() {
        let mut hanging = state();
        hanging.ping = Arc::new(|| std::future::pending().boxed());
        hanging.figures = Arc::new(|| std::future::pending().boxed());
        let server = Server::start(hanging).await;
        assert_eq!(server.get("/readyz", "").await.0, 503);
        assert_eq!(server.get("/livez", "").await.0, 200);
        let (code, body) = server.get("/status", "").await;
        assert!(code == 200 && body.contains(r#""database":"away""#), "{body}");
    }

    #[tokio::test]
    async fn a_loop_that_stands_still_is_not_alive() {
        let mut stuck = state();
        stuck.stuck_after = Duration::from_millis(500);
        let heartbeat = Arc::clone(&stuck.heartbeat);
        let server = Server::start(stuck).await;
        tokio::time::sleep(Duration::from_millis(550)).await;
        assert_eq!(server.get("/livez", "").await.0, 503);
        heartbeat.beat();
        assert_eq!(server.get("/livez", "").await.0, 200);
    }

    #[tokio::test]
    async fn the_token_guards_what_tells_of_the_business() {
        let mut guarded = state();
        guarded.token = "s3cret".into();
        let server = Server::start(guarded).await;
        for path in ["/metrics", "/status"] {
            assert_eq!(server.get(path, "").await.0, 401);
            assert_eq!(server.get(path, "authorization: Bearer s3cre\r\n").await.0, 401);
            assert_eq!(server.get(path, "authorization: Basic s3cret\r\n").await.0, 401);
            assert_eq!(server.get(path, "authorization: bearer s3cret\r\n").await.0, 200);
        }
        assert_eq!(server.get("/livez", "").await.0, 200);
        assert_eq!(server.get("/readyz", "").await.0, 200);
    }

    #[tokio::test]
    async fn the_status_is_a_document_and_stopping_ends_the_server() {
        let server = Server::start(state()).await;
        let (_, body) = server.get("/status", "").await;
        let status: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&status["in_flight"], &status["outbox_unsent"]), (&json!(4), &json!(3)));
        assert_eq!((&status["replica"], &status["running_runs"]), (&json!("here"), &json!(2)));
        // A connection that never sends its request must not hold the daemon.
        let _idle = TcpStream::connect(server.address).await.unwrap();
        server.stop.cancel();
        tokio::time::timeout(LAST_CALL * 3, server.task).await.unwrap().unwrap();
    }
}
