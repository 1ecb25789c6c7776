//! Supervision of a replica: notifications to systemd, and the liveness probe of the consume loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use inventoryd::broker::Broker;
use inventoryd::consumer::{Consumer, ConsumerHealth};
use inventoryd::graph::GraphClient;
use inventoryd::http::{self, Backlog, Consumption, HttpState, Problem};
use inventoryd::run::{Runner, Stop};
use inventoryd::store::Store;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio_util::sync::CancellationToken;

use crate::support::daemon::Process;
use crate::support::proxy::Proxy;
use crate::support::systemd::Systemd;
use crate::support::world::World;
use crate::support::{DEADLINE, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_notified_of_readiness_watchdog_and_stop() {
    let world = World::new().await;
    let proxy = Proxy::to(world.amqp_address()).await;
    proxy.refuse(true);
    let mut systemd = Systemd::new(&world.prefix);
    let socket = systemd.path.to_str().unwrap().to_owned();
    let amqp = world.amqp_through(&proxy);
    let foreign = [("NOTIFY_SOCKET", socket.as_str()), ("WATCHDOG_USEC", "1000000")];
    let mut process = Process::start_under(&world, "a", &[("BROKER__URL", &amqp)], &foreign);

    // While the broker is unreachable the replica is alive and not ready, and its status names the cause.
    let unsubscribed =
        |systemd: &mut Systemd| systemd.heard().iter().any(|line| line.starts_with("STATUS=no subscription: "));
    let begun = Instant::now();
    while systemd.count("WATCHDOG=1") < 4 || !unsubscribed(&mut systemd) {
        assert!(begun.elapsed() < DEADLINE, "{:?}\n{}", systemd.heard(), process.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(systemd.count("READY=1"), 0);

    proxy.refuse(false);
    let consuming = "STATUS=consuming requests; 0 in flight";
    let begun = Instant::now();
    while systemd.count("READY=1") == 0 || systemd.count(consuming) == 0 {
        assert!(begun.elapsed() < DEADLINE, "{:?}\n{}", systemd.heard(), process.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(15)).await.success(), "{}", process.log());
    assert_eq!((systemd.count("READY=1"), systemd.count("STOPPING=1")), (1, 1));
}

/// Consumer that runs only while the test polls it, with the HTTP server that reports its liveness.
struct PolledConsumer {
    work: std::pin::Pin<Box<dyn Future<Output = ()>>>,
    health: Arc<ConsumerHealth>,
    livez: String,
    _server: tokio::task::JoinHandle<()>,
}

impl PolledConsumer {
    async fn new(world: &World) -> Self {
        let mut config = world.config();
        // A question to the broker extends the allowance of the heartbeat.
        config.consumer.watchdog_s = 3_600;
        let store = Store::connect(&config.database).unwrap();
        let broker = Broker::new(&config.broker, &config.topology, "test").unwrap();
        let graph = GraphClient::new(&config.graph).unwrap();
        let runner = Runner::new(
            &config,
            "test",
            (store.clone(), graph),
            config.graph.catalog().unwrap(),
            tokio::sync::mpsc::channel(1).0,
        );
        let consumer = Consumer::new(broker.clone(), broker.publisher(), runner, store, &config);
        let listener = http::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let livez = format!("http://{}/livez", listener.local_addr().unwrap());
        let health = consumer.health();
        let state = HttpState {
            replica: "test".to_owned(),
            metrics: PrometheusBuilder::new().build_recorder().handle(),
            token: String::new().into(),
            started: Instant::now(),
            heartbeat: Arc::clone(health.heartbeat()),
            stuck_after: Duration::from_secs(3),
            draining: CancellationToken::new(),
            source: Box::new(Healthy),
        };
        let server = tokio::spawn(http::serve(listener, state, CancellationToken::new()));
        Self { work: Box::pin(consumer.run(Stop::default())), health, livez, _server: server }
    }

    /// Polls the consumer until it consumes and is alive.
    async fn poll_until_alive(&mut self) {
        let (health, livez) = (Arc::clone(&self.health), self.livez.clone());
        let alive = eventually("the consumer is alive", || async {
            (health.subscribed() && is_alive(&livez).await).then_some(())
        });
        tokio::select! {
            () = alive => {}
            () = &mut self.work => panic!("the consumer runs until it is stopped"),
        }
    }
}

async fn is_alive(livez: &str) -> bool {
    reqwest::get(livez).await.unwrap().status().is_success()
}

/// A source without problems.
struct Healthy;

impl http::Source for Healthy {
    fn consumption(&self) -> Consumption {
        Consumption::default()
    }

    fn graph(&self) -> Vec<Problem> {
        Vec::new()
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }

    fn backlog(&self) -> BoxFuture<'_, Result<Backlog, String>> {
        Box::pin(async { Ok(Backlog { outbox_unsent: 0, outbox_oldest_s: 0.0, running_runs: 0 }) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_consume_loop_fails_livez() {
    let world = World::new().await;
    let mut consumer = PolledConsumer::new(&world).await;
    consumer.poll_until_alive().await;
    let livez = consumer.livez.clone();
    eventually("a loop that is not polled fails", || async { (!is_alive(&livez).await).then_some(()) }).await;
    consumer.poll_until_alive().await;
}
