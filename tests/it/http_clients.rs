//! HTTP server of a daemon with few file descriptors, against clients that hold their connections.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::sim::Rule;
use crate::support::daemon::Process;
use crate::support::world::World;
use crate::support::{eventually, within};

/// Open file descriptors that the daemon may have.
const FILES: u32 = 256;
/// Clients of each kind; all together are more than the daemon has file descriptors.
const CLIENTS: usize = 100;
/// Time after which the server has ended every kind of slow client.
const CLOSED_WITHIN: Duration = Duration::from_secs(90);

async fn connect(address: &str, sent: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(sent).await.unwrap();
    stream
}

/// Reads until the server closes the connection.
async fn closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(CLOSED_WITHIN, stream.read_to_end(&mut answer)).await;
    // A reset closes the connection as well.
    let _ = ended.expect("the server closes the connection");
    answer
}

/// Number of lease renewals of the running run that can be told apart.
async fn lease(world: &World) -> Option<String> {
    let running = "select lease_expires_at::text as until from inventory_sync_runs where status = 'running'";
    world.rows(running).await.first().map(|row| row["until"].to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_and_slow_clients_cost_no_lease_and_no_run() {
    let world = World::new().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let process = Process::start_with_files(&world, "files", &[("HTTP__LISTEN", &address)], FILES);
    process.wait_for_log("subscribed").await;
    let slow = json!({ "action": { "kind": "slow", "delay_ms": 14_000 } });
    world.sim.add_rule(serde_json::from_value::<Rule>(slow).unwrap());
    world.publish(&world.request("run", &["mobileApp", "deviceShellScript"])).await;
    let first = eventually("the run has a lease", || lease(&world)).await;

    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(connect(&address, b"").await);
        clients.push(connect(&address, b"GET /metrics HTTP/1.1\r\nhost:").await);
        clients.push(connect(&address, b"GET /status HTTP/1.1\r\nhost: x\r\n\r\n").await);
    }
    let livez = format!("http://{address}/livez");
    let alive = within(Duration::from_secs(20), "a probe is answered", || async {
        reqwest::get(&livez).await.ok().filter(|answer| answer.status().is_success())
    });
    alive.await;
    let open = std::fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().count();
    assert!(open < FILES as usize - 100, "{open} of {FILES} file descriptors are in use");

    eventually("the lease is renewed", || async { lease(&world).await.filter(|now| *now != first) }).await;
    let run = world.ended("run").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "{run}");
    for mut client in clients {
        closed(&mut client).await;
    }
    assert!(!process.log().contains("Too many open files"), "{}", process.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_limit_of_the_http_server_is_enforced() {
    let world = World::new().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let process = Process::start(&world, "limits", &[("HTTP__LISTEN", &address)]);
    process.wait_for_log("subscribed").await;

    // Header time: bytes that trickle in do not extend it.
    let begun = Instant::now();
    let mut trickle = connect(&address, b"GET /livez HTTP/1.1\r\n").await;
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    while begun.elapsed() < CLOSED_WITHIN && trickle.write_all(b"x: y\r\n").await.is_ok() {
        ticks.tick().await;
    }
    assert!(begun.elapsed() < CLOSED_WITHIN, "a request whose headers never end is closed");

    // Idle time, after a request that was answered.
    let mut idle = connect(&address, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(closed(&mut idle).await.starts_with(b"HTTP/1.1 200"), "the request is answered");

    // Size of the headers.
    let long = format!("GET /livez HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(20 << 10));
    assert!(closed(&mut connect(&address, long.as_bytes()).await).await.starts_with(b"HTTP/1.1 431"));

    // Size of a body: none is read, and the connection ends.
    let mut upload = connect(&address, b"GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n").await;
    let (begun, part, mut sent) = (Instant::now(), vec![0; 64 << 10], 0);
    while begun.elapsed() < CLOSED_WITHIN && upload.write_all(&part).await.is_ok() {
        sent += part.len();
    }
    assert!(sent < 64 << 20, "{sent} bytes of a body were taken");
}
