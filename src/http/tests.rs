//! Tests of the endpoints.

use futures_util::FutureExt;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use serde_json::Value;

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
    let livez_becomes = async |wanted| loop {
        let (code, body) = server.get("/livez", "").await;
        if code == wanted {
            return serde_json::from_str::<Value>(&body).unwrap();
        }
    };
    let deadline = Duration::from_secs(60);
    let body = tokio::time::timeout(deadline, livez_becomes(503)).await.expect("a silent loop counts as stuck");
    assert_eq!((body.as_object().unwrap().len(), &body["alive"]), (2, &json!(false)), "{body}");
    assert!(body["heartbeat_age_s"].as_f64().unwrap() > 0.5, "{body}");
    let beating = async {
        loop {
            heartbeat.beat();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = beating => {}
        alive = tokio::time::timeout(deadline, livez_becomes(200)) => {
            let body = alive.expect("a loop that progresses is alive");
            assert_eq!(body["alive"], json!(true));
            assert!(body["heartbeat_age_s"].as_f64().unwrap() <= 0.5, "{body}");
        }
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
