//! HTTP endpoints of the daemon: `/livez`, `/readyz`, `/metrics` and `/status`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use futures_util::future::BoxFuture;
use metrics_exporter_prometheus::PrometheusHandle;
use secrecy::SecretString;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::domain::clock::Heartbeat;

mod auth;
mod database;
mod server;
mod status;
#[cfg(test)]
mod tests;

use auth::{is_authorised, unauthorised};
use database::DatabaseProbe;
pub use status::{
    Backlog, Component, Consumption, DatabaseState, Problem, ServerVersion, Servers, Status, TenantPause,
};
use status::{MAX_LISTED_PAUSES, ProblemLog, Readiness};

/// Interval at which histograms are compacted and problems are dated, also without requests.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Live state of the daemon, as the endpoints report it. An error is one line that states the cause.
pub trait Source: Send + Sync {
    /// State of the consumer.
    fn consumption(&self) -> Consumption;
    /// Versions of the servers.
    fn servers(&self) -> Servers {
        Servers::default()
    }
    /// Checks that the database responds.
    fn ping(&self) -> BoxFuture<'_, Result<(), String>>;
    /// Problems with Microsoft Graph and its token service.
    fn graph(&self) -> Vec<Problem>;
    /// Tenants that are paused because Graph throttled them, the longest pause first.
    fn pauses(&self) -> Vec<TenantPause> {
        Vec::new()
    }
    /// Reads the backlog of all replicas from the database.
    fn backlog(&self) -> BoxFuture<'_, Result<Backlog, String>>;
}

/// Everything that the endpoints report on.
pub struct HttpState {
    /// Name of this replica.
    pub replica: String,
    /// Recorded metrics.
    pub metrics: PrometheusHandle,
    /// Bearer token required by `/metrics` and `/status`; none if empty.
    pub token: SecretString,
    /// Start of this process.
    pub started: Instant,
    /// Heartbeat of the consume loop.
    pub heartbeat: Arc<Heartbeat>,
    /// Age of the heartbeat from which this process counts as stuck.
    pub stuck_after: Duration,
    /// Cancelled once the daemon accepts no new requests.
    pub draining: CancellationToken,
    /// Live state of the daemon.
    pub source: Box<dyn Source>,
}

impl std::fmt::Debug for HttpState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpState").field("replica", &self.replica).finish_non_exhaustive()
    }
}

/// Shared state of the handlers.
struct Shared {
    state: HttpState,
    problems: ProblemLog,
    database: DatabaseProbe,
}

/// Binds the address of `http.listen`.
///
/// # Errors
/// One line that names the key, if the address can't be bound.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    let refuse = |error| {
        format!(
            "http.listen: can't listen on {address}: {error}; choose another address, or an empty one to disable it"
        )
    };
    TcpListener::bind(address).await.map_err(refuse)
}

/// Serves the endpoints until `stop` is cancelled and the open requests have ended.
pub async fn serve(listener: TcpListener, state: HttpState, stop: CancellationToken) {
    let shared = Arc::new(Shared { state, problems: ProblemLog::default(), database: DatabaseProbe::default() });
    let upkeep = async {
        let mut tick = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            tick.tick().await;
            shared.state.metrics.run_upkeep();
            shared.readiness().await;
        }
    };
    tokio::select! {
        () = server::serve(listener, router(&shared), &stop) => {}
        () = upkeep => {}
        () = shared.database.run(&*shared.state.source) => {}
    }
}

fn router(shared: &Arc<Shared>) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(Arc::clone(shared))
}

/// Reports on this process alone: an unreachable database is no reason to restart every replica.
async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let age = shared.state.heartbeat.age();
    let alive = age <= shared.state.stuck_after;
    (status_code(alive), Json(json!({ "alive": alive, "heartbeat_age_s": age.as_secs_f64() }))).into_response()
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let readiness = shared.readiness().await;
    (status_code(readiness.ready), Json(readiness)).into_response()
}

const fn status_code(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if !is_authorised(&shared.state.token, &headers) {
        return unauthorised();
    }
    ([(CONTENT_TYPE, PROMETHEUS_TEXT)], shared.state.metrics.render()).into_response()
}

async fn status(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if !is_authorised(&shared.state.token, &headers) {
        return unauthorised();
    }
    Json(shared.status().await).into_response()
}

impl Shared {
    async fn readiness(&self) -> Readiness {
        let database = self.database.in_time(self.state.source.ping()).await;
        let problems = self.problems(database.err(), &self.state.source.consumption());
        let missing: Vec<_> =
            problems.iter().map(|problem| problem.component).filter(|one| one.is_required()).collect();
        Readiness { ready: missing.is_empty(), missing, problems }
    }

    async fn status(&self) -> Status {
        let backlog = self.database.in_time(self.state.source.backlog()).await;
        let consumption = self.state.source.consumption();
        let mut problems = self.problems(backlog.as_ref().err().cloned(), &consumption);
        // Names tenants, which `/readyz` must not do: it requires no token.
        problems.extend(self.state.source.graph());
        let backlog = backlog.ok();
        let mut paused_tenants = self.state.source.pauses();
        paused_tenants.truncate(MAX_LISTED_PAUSES);
        Status {
            database: if backlog.is_some() { DatabaseState::Ok } else { DatabaseState::Unreachable },
            draining: self.state.draining.is_cancelled(),
            in_flight: consumption.in_flight,
            held: consumption.held,
            outbox_oldest_s: backlog.map(|all| all.outbox_oldest_s),
            outbox_unsent: backlog.map(|all| all.outbox_unsent),
            paused: consumption.paused,
            paused_tenants,
            problem: consumption.problem,
            problems,
            servers: self.state.source.servers(),
            replica: self.state.replica.clone(),
            running_runs: backlog.map(|all| all.running_runs),
            subscribed: consumption.subscribed,
            uptime_s: self.state.started.elapsed().as_secs(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn problems(&self, database: Option<String>, consumption: &Consumption) -> Vec<Problem> {
        let mut present = Vec::new();
        if let Some(cause) = database {
            present.push((Component::Database, format!("the database is unavailable: {cause}")));
        }
        if !consumption.subscribed {
            let cause = match (&consumption.problem, &consumption.paused) {
                (Some(problem), _) => problem,
                (None, Some(_)) => "there is none while no new requests are accepted",
                (None, None) => "not connected yet",
            };
            present.push((Component::Subscription, format!("no subscription to the request queue: {cause}")));
        }
        if let Some(reason) = &consumption.paused {
            present.push((Component::Consumption, format!("no new requests are accepted: {reason}")));
        }
        if let Some(cause) = &consumption.run_failure {
            present.push((Component::Runs, format!("runs do not progress: {cause}")));
        }
        present.extend(consumption.held_deliveries().map(|message| (Component::HeldDeliveries, message)));
        if self.state.draining.is_cancelled() {
            present.push((Component::Draining, "the daemon is stopping".to_owned()));
        }
        self.problems.update(present)
    }
}
