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

use auth::{is_authorised, unauthorised};
use database::DatabaseProbe;
pub use status::{Backlog, Component, Consumption, DatabaseState, Problem, ServerVersion, Servers, Status};
use status::{ProblemLog, Readiness};

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
        Status {
            database: if backlog.is_some() { DatabaseState::Ok } else { DatabaseState::Unreachable },
            draining: self.state.draining.is_cancelled(),
            in_flight: consumption.in_flight,
            held: consumption.held,
            outbox_oldest_s: backlog.map(|all| all.outbox_oldest_s),
            outbox_unsent: backlog.map(|all| all.outbox_unsent),
            paused: consumption.paused,
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::server::{HEADER_TIMEOUT, MAX_CONNECTIONS, SHUTDOWN_GRACE};
    use super::*;

    /// A daemon whose database responds, refuses or hangs.
    struct Fake {
        consumption: Consumption,
        database: Option<Result<(), String>>,
    }

    impl Source for Fake {
        fn consumption(&self) -> Consumption {
            self.consumption.clone()
        }

        fn graph(&self) -> Vec<Problem> {
            let message = "no token with credential default".to_owned();
            vec![Problem { component: Component::Graph, message, since_s: 7 }]
        }

        fn ping(&self) -> BoxFuture<'_, Result<(), String>> {
            match self.database.clone() {
                Some(answer) => std::future::ready(answer).boxed(),
                None => std::future::pending().boxed(),
            }
        }

        fn backlog(&self) -> BoxFuture<'_, Result<Backlog, String>> {
            let backlog = Backlog { outbox_unsent: 3, outbox_oldest_s: 1.5, running_runs: 2 };
            self.ping().map(move |answer| answer.map(|()| backlog)).boxed()
        }
    }

    fn state() -> HttpState {
        let consumption = Consumption { subscribed: true, in_flight: 4, ..Consumption::default() };
        HttpState {
            replica: "here".to_owned(),
            metrics: PrometheusBuilder::new().build_recorder().handle(),
            token: String::new().into(),
            started: Instant::now(),
            heartbeat: Arc::default(),
            stuck_after: Duration::from_secs(60),
            draining: CancellationToken::new(),
            source: Box::new(Fake { consumption, database: Some(Ok(())) }),
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
    async fn readiness_names_each_problem_with_cause_and_duration() {
        let server = Server::start(state()).await;
        assert_eq!(server.get("/readyz", "").await, (200, r#"{"ready":true,"missing":[],"problems":[]}"#.to_owned()));
        let mut unready = state();
        let run_failure = Some("disk full".to_owned());
        let consumption = Consumption { problem: Some("access refused".to_owned()), run_failure, ..Default::default() };
        unready.source = Box::new(Fake { consumption, database: Some(Err("connection refused".to_owned())) });
        unready.draining.cancel();
        let server = Server::start(unready).await;
        let (code, body) = server.get("/readyz", "").await;
        assert_eq!(code, 503);
        assert!(body.contains(r#""missing":["database","subscription","draining"]"#), "{body}");
        let causes = ["connection refused", "access refused", "disk full"];
        assert!(causes.iter().all(|cause| body.contains(cause)), "{body}");
        assert!(body.contains(r#""since_s":0"#), "{body}");
    }

    #[tokio::test]
    async fn a_hanging_database_does_not_block_probes() {
        let mut hanging = state();
        hanging.source = Box::new(Fake { consumption: Consumption::default(), database: None });
        let server = Server::start(hanging).await;
        assert_eq!(server.get("/readyz", "").await.0, 503);
        assert_eq!(server.get("/livez", "").await.0, 200);
        let (code, body) = server.get("/status", "").await;
        assert!(code == 200 && body.contains(r#""database":"unreachable""#), "{body}");
    }

    #[tokio::test]
    async fn idle_and_slow_clients_are_closed_and_never_block_a_probe() {
        let server = Server::start(state()).await;
        let mut idle = Vec::new();
        for n in 0..MAX_CONNECTIONS * 3 {
            let mut client = TcpStream::connect(server.address).await.unwrap();
            if n % 2 == 0 {
                client.write_all(b"GET /metrics HTTP/1.1\r\nhost:").await.unwrap();
            }
            idle.push(client);
        }
        assert_eq!(server.get("/livez", "").await.0, 200);
        let mut newest = idle.pop().unwrap();
        let closed = tokio::time::timeout(HEADER_TIMEOUT * 2, newest.read_to_end(&mut Vec::new())).await;
        assert!(closed.is_ok(), "a connection without a request is closed after the header timeout");
    }

    #[tokio::test]
    async fn headers_above_the_limit_are_refused() {
        let server = Server::start(state()).await;
        let (code, _) = server.get("/livez", &format!("x: {}\r\n", "y".repeat(64 * 1024))).await;
        assert_eq!(code, 431);
    }

    #[tokio::test]
    async fn a_stuck_loop_is_not_alive() {
        let mut stuck = state();
        stuck.stuck_after = Duration::from_millis(500);
        let heartbeat = Arc::clone(&stuck.heartbeat);
        let server = Server::start(stuck).await;
        let livez_becomes = async |code| while server.get("/livez", "").await.0 != code {};
        let deadline = Duration::from_secs(60);
        tokio::time::timeout(deadline, livez_becomes(503)).await.expect("a silent loop counts as stuck");
        let beating = async {
            loop {
                heartbeat.beat();
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = beating => {}
            alive = tokio::time::timeout(deadline, livez_becomes(200)) => alive.expect("a loop that progresses is alive"),
        }
    }

    #[tokio::test]
    async fn metrics_and_status_require_the_token() {
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
    async fn status_is_json_and_stopping_ends_the_server() {
        let server = Server::start(state()).await;
        let (_, body) = server.get("/status", "").await;
        let status: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&status["in_flight"], &status["outbox_unsent"]), (&json!(4), &json!(3)));
        assert_eq!(
            status["problems"],
            json!([{ "component": "graph", "message": "no token with credential default", "since_s": 7 }])
        );
        assert_eq!((&status["replica"], &status["running_runs"]), (&json!("here"), &json!(2)));
        // A connection without a request must not delay the shutdown.
        let _idle = TcpStream::connect(server.address).await.unwrap();
        server.stop.cancel();
        tokio::time::timeout(SHUTDOWN_GRACE * 3, server.task).await.unwrap().unwrap();
    }
}
