//! The daemon: builds its components, starts them, and stops them in reverse order of dependency.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

use crate::backoff::{Waits, full_jitter};
use crate::broker::{Broker, BrokerError};
use crate::config::{Config, ConfigError, seconds};
use crate::consumer::{Consumer, ConsumerHealth};
use crate::domain::catalog::Catalog;
use crate::domain::clock::Heartbeat;
use crate::fleet::Fleet;
use crate::graph::{GraphClient, GraphError, GraphProblem, PauseNotice};
use crate::http::{self, Backlog, Component, Consumption, HttpState, Problem, ServerVersion, Servers, TenantPause};
use crate::janitor::Janitor;
use crate::relay::{self, Relay};
use crate::run::{Runner, Stop};
use crate::store::{Store, StoreError};

mod systemd;

/// Shutdown timeout of the background components, and then of the database connections.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum backoff while the database is unreachable at startup.
const MAX_STARTUP_BACKOFF: Duration = Duration::from_secs(15);
/// Heartbeat age from which `/livez` fails and the systemd watchdog is no longer notified.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Error that prevents the start of the daemon.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The policy types are invalid.
    #[error(transparent)]
    Contracts(#[from] ConfigError),
    /// The Graph client can't be created.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The broker's address or certificates are invalid.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The database rejects the connection, or has a different schema version.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HTTP address can't be bound.
    #[error("{0}")]
    Http(String),
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    stop: Stop,
    health: Arc<ConsumerHealth>,
    ended: JoinHandle<()>,
}

impl Daemon {
    /// Starts all components. Waits for an unreachable database, but not for one that rejects the connection.
    ///
    /// # Errors
    /// If a problem persists without intervention; the error names the configuration key.
    pub async fn start(config: Config, metrics: Option<PrometheusHandle>) -> Result<Self, StartError> {
        let owner = replica_name();
        let catalog = config.graph.catalog()?;
        let store = Store::connect(&config.database)?;
        let broker = Broker::new(&config.broker, &config.topology, &format!("inventoryd {owner}"))?;
        let graph = GraphClient::new(&config.graph)?;
        // Keys of the runs that this replica has ended, whose events the relay publishes without waiting for its poll.
        let (ended, ended_runs) = mpsc::channel(relay::MAX_ENDED_RUNS);
        let fleet = Fleet::new(store.clone(), graph.clone(), &owner);
        let runner = Runner::new(&config, &owner, (store.clone(), graph.clone()), catalog.clone(), ended.clone());
        let publisher = broker.publisher();
        let janitor = Janitor::new(store.clone(), publisher.clone(), catalog.clone(), &config, ended);
        let relay =
            Relay::new(publisher.clone(), store.clone(), &config.outbox, &config.telemetry.deployment, ended_runs);
        // A connection of their own: a copy that the broker refuses must not delay events.
        let copies = broker.publisher();
        let consumer = Consumer::new(broker.clone(), copies, runner.clone(), store.clone(), &config);
        let (stop, health) = (Stop::default(), consumer.health());
        let parts = Parts { broker, consumer, relay, janitor, fleet, runner, store, graph };
        // Before the wait for the database: an orchestrator whose probes get no response would restart this process.
        let http = http_server(&config, metrics, &owner, &parts, &stop).await?;
        let http = AbortOnDropHandle::new(tokio::spawn(http));
        wait_for_schema(&parts.store, &catalog, health.heartbeat()).await?;
        info!(replica = owner, version = env!("CARGO_PKG_VERSION"), "started");
        let ended = tokio::spawn(parts.run(stop.clone(), http));
        Ok(Self { stop, health, ended })
    }

    /// Drains: accepts no new requests; runs in flight have `consumer.drain_s` to finish.
    pub fn drain(&self) {
        self.stop.drain.cancel();
    }

    /// Stops the runs in flight and requeues their messages at once.
    pub fn abort(&self) {
        self.stop.drain.cancel();
        self.stop.abort.cancel();
    }

    /// Stop signals, for use while [`Daemon::stopped`] is awaited.
    #[must_use]
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Health of the consumer.
    #[must_use]
    pub fn health(&self) -> &Arc<ConsumerHealth> {
        &self.health
    }

    /// Returns once all components have ended.
    pub async fn stopped(self) {
        if let Err(error) = self.ended.await {
            warn!(%error, "the daemon ended by a panic");
        }
    }
}

/// Components of the daemon.
struct Parts {
    broker: Broker,
    consumer: Consumer,
    relay: Relay,
    janitor: Janitor,
    fleet: Fleet,
    runner: Runner,
    store: Store,
    graph: GraphClient,
}

impl Parts {
    /// Runs until the consumer has stopped, then stops the components that it needs: leases are renewed until the last run
    /// has settled, the relay publishes what is left, and HTTP ends last.
    async fn run(self, stop: Stop, http: AbortOnDropHandle<()>) {
        let (health, draining) = (self.consumer.health(), stop.drain.clone());
        let notifier = AbortOnDropHandle::new(tokio::spawn(async move { systemd::report(&health, &draining).await }));
        let late = CancellationToken::new();
        let mut background = JoinSet::new();
        let (leases, stopping) = (self.runner.leases(), late.clone());
        background.spawn(async move { leases.keep(&stopping).await });
        let stopping = late.clone();
        background.spawn(async move { self.janitor.run(&stopping).await });
        let stopping = late.clone();
        background.spawn(async move { self.fleet.run(&stopping).await });
        let stopping = late.clone();
        background.spawn(async move { self.relay.run(&stopping).await });

        let mut consuming = pin!(self.consumer.run(stop.clone()));
        tokio::select! {
            () = &mut consuming => {}
            // No component works correctly without the others.
            Some(ended) = background.join_next() => {
                error!(panicked = ended.is_err(), "a component ended unexpectedly; stopping the daemon");
                stop.drain.cancel();
                consuming.await;
            }
        }
        info!("all in-flight deliveries are settled");
        late.cancel();
        let ended = async { while background.join_next().await.is_some() {} };
        if timeout(SHUTDOWN_TIMEOUT, ended).await.is_err() {
            warn!("some components did not stop in time; another replica or the next start continues their work");
        }
        drop((http, notifier));
        // Closing waits for a server that does not respond.
        if timeout(SHUTDOWN_TIMEOUT, self.store.close()).await.is_err() {
            warn!("the database connections did not close in time");
        }
        info!("stopped");
    }
}

/// Name of this replica, recorded as owner of its leases.
fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}-{}", if host.is_empty() { "replica" } else { host }, std::process::id(), &unique[..8])
}

/// Waits for an unreachable database; fails if the database rejects the connection or has a different schema version.
async fn wait_for_schema(store: &Store, catalog: &Catalog, heartbeat: &Heartbeat) -> Result<(), StoreError> {
    let mut waits = Waits::new(seconds(1), MAX_STARTUP_BACKOFF);
    loop {
        heartbeat.beat();
        match timeout(MAX_STARTUP_BACKOFF, prepare(store, catalog)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) if error.is_refusal() => return Err(error),
            Ok(Err(error)) => warn!(%error, "the database is unreachable; retrying"),
            Err(_) => warn!("the database does not respond; retrying"),
        }
        heartbeat.beat();
        systemd::set_status("waiting for the database");
        tokio::time::sleep(full_jitter(waits.next_wait())).await;
    }
}

/// Checks the server and its schema, and stores the catalog of types that this daemon lists.
async fn prepare(store: &Store, catalog: &Catalog) -> Result<(), StoreError> {
    for warning in store.check_schema().await? {
        warn!("{warning}");
    }
    store.publish_catalog(catalog).await
}

/// Binds the HTTP server; the returned future serves it, and ends at once if `http.listen` is empty.
async fn http_server(
    config: &Config,
    metrics: Option<PrometheusHandle>,
    owner: &str,
    parts: &Parts,
    stop: &Stop,
) -> Result<impl Future<Output = ()> + Send + use<>, StartError> {
    let listening = match (config.http.listen, metrics) {
        (Some(address), Some(metrics)) => Some((http::bind(address).await.map_err(StartError::Http)?, metrics)),
        _ => None,
    };
    let health = parts.consumer.health();
    let state = listening.map(|(listener, metrics)| {
        let state = HttpState {
            replica: owner.to_owned(),
            metrics,
            token: config.http.token.clone(),
            started: Instant::now(),
            heartbeat: Arc::clone(health.heartbeat()),
            stuck_after: STUCK_AFTER,
            draining: stop.drain.clone(),
            source: Box::new(LiveState {
                broker: parts.broker.clone(),
                store: parts.store.clone(),
                graph: parts.graph.clone(),
                health,
            }),
        };
        (listener, state)
    });
    Ok(async move {
        let Some((listener, state)) = state else { return };
        http::serve(listener, state, CancellationToken::new()).await;
    })
}

/// Source of the HTTP endpoints.
struct LiveState {
    broker: Broker,
    store: Store,
    graph: GraphClient,
    health: Arc<ConsumerHealth>,
}

impl http::Source for LiveState {
    fn consumption(&self) -> Consumption {
        Consumption {
            subscribed: self.health.subscribed(),
            in_flight: self.health.in_flight(),
            held: self.health.held(),
            paused: self.health.paused().map(str::to_owned),
            problem: self.health.problem(),
            run_failure: self.health.run_failure(),
        }
    }

    fn servers(&self) -> Servers {
        let version = |(version, tested): (String, bool)| ServerVersion { version, tested };
        Servers { postgresql: self.store.server_version().map(version), rabbitmq: self.broker.version().map(version) }
    }

    fn graph(&self) -> Vec<Problem> {
        let problem = |found: GraphProblem| Problem {
            component: Component::Graph,
            message: found.message,
            since_s: found.since.as_secs(),
        };
        self.graph.problems().into_iter().map(problem).collect()
    }

    fn pauses(&self) -> Vec<TenantPause> {
        let pause = |pause: PauseNotice| TenantPause {
            tenant_id: pause.tenant_id,
            family: pause.family.to_owned(),
            remaining_s: pause.duration.as_secs_f64(),
        };
        self.graph.pauses().into_iter().map(pause).collect()
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), String>> {
        async { self.store.ping().await.map_err(|error| error.to_string()) }.boxed()
    }

    fn backlog(&self) -> BoxFuture<'_, Result<Backlog, String>> {
        async { self.read_backlog().await.map_err(|error| error.to_string()) }.boxed()
    }
}

impl LiveState {
    async fn read_backlog(&self) -> Result<Backlog, StoreError> {
        self.store.ping().await?;
        let outbox = self.store.outbox_backlog().await?;
        Ok(Backlog {
            outbox_unsent: outbox.unsent,
            outbox_oldest_s: outbox.oldest_age_s,
            running_runs: self.store.running_runs().await?,
        })
    }
}
