//! The daemon as a whole: builds its parts, starts them, and stops them in the order in which they need each other.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
use crate::graph::{GraphClient, GraphError};
use crate::http::{self, Consuming, Figures, HttpState};
use crate::janitor::Janitor;
use crate::relay::{self, Relay};
use crate::run::{Runner, Stop};
use crate::store::{Store, StoreError};

mod systemd;

/// What the parts beside the consumer have to end in, and the connections to the database after them.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Longest wait between two looks for a database that is away at the start.
const MOST_PATIENT: Duration = Duration::from_secs(15);
/// Without a beat of the consumer's for so long, `/livez` calls this process stuck, and systemd is told nothing more.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The contracts can't be used.
    #[error(transparent)]
    Contracts(#[from] ConfigError),
    /// Graph's client can't be made.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The broker's address or certificates can't be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The database refuses, or has another schema.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HTTP address can't be had.
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
    /// Starts everything. A database that is away is waited for; one that refuses is not.
    ///
    /// # Errors
    /// If something is wrong that waiting does not mend; each names its key.
    pub async fn start(config: Config, metrics: Option<PrometheusHandle>) -> Result<Self, StartError> {
        // Two TLS providers in one process would panic at the first handshake; an installed one is kept by all.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let owner = replica_name();
        let catalog = config.graph.catalog()?;
        let store = Store::connect(&config.database)?;
        let broker = Broker::new(&config.broker, &config.topology, &format!("inventoryd {owner}"))?;
        let graph = GraphClient::new(&config.graph)?;
        // Keys of runs that this replica has ended: their events are published at once, without a poll.
        let (ended, ended_runs) = mpsc::channel(relay::MAX_ENDED_RUNS);
        let fleet = Fleet::new(store.clone(), graph.clone(), &owner);
        let runner = Runner::new(&config, &owner, (store.clone(), graph), catalog.clone(), ended.clone());
        let publisher = broker.publisher();
        let janitor = Janitor::new(store.clone(), publisher.clone(), catalog.clone(), &config, ended);
        let relay =
            Relay::new(publisher.clone(), store.clone(), &config.outbox, &config.telemetry.deployment, ended_runs);
        let consumer = Consumer::new(broker, publisher, runner.clone(), store.clone(), &config);
        let (stop, health) = (Stop::default(), consumer.health());
        let parts = Parts { consumer, relay, janitor, fleet, runner, store };
        // Before the wait for the database: an orchestrator that gets no answers would start this again and again.
        let answers = http_server(&config, metrics, &owner, &parts, &stop).await?;
        let answers = AbortOnDropHandle::new(tokio::spawn(answers));
        wait_for_schema(&parts.store, &catalog, health.heartbeat()).await?;
        info!(replica = owner, version = env!("CARGO_PKG_VERSION"), "started");
        let ended = tokio::spawn(parts.run(stop.clone(), answers));
        Ok(Self { stop, health, ended })
    }

    /// Takes nothing new from now on; what is in hand has `consumer.drain_s` to end.
    pub fn drain(&self) {
        self.stop.drain.cancel();
    }

    /// Hands everything in hand back at once.
    pub fn abort(&self) {
        self.stop.drain.cancel();
        self.stop.abort.cancel();
    }

    /// What tells it to stop, for whoever waits in [`Daemon::stopped`] meanwhile.
    #[must_use]
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// What the consumer does.
    #[must_use]
    pub fn health(&self) -> &Arc<ConsumerHealth> {
        &self.health
    }

    /// Returns once everything has ended.
    pub async fn stopped(self) {
        if let Err(error) = self.ended.await {
            warn!(%error, "the daemon did not end in order");
        }
    }
}

/// What a daemon is made of.
struct Parts {
    consumer: Consumer,
    relay: Relay,
    janitor: Janitor,
    fleet: Fleet,
    runner: Runner,
    store: Store,
}

impl Parts {
    /// Runs until the consumer has stopped, then lets go of what it needed: leases are kept until the last run has
    /// settled, events are published until the last one has left, and the answers over HTTP end last.
    async fn run(self, stop: Stop, answers: AbortOnDropHandle<()>) {
        let (health, draining) = (self.consumer.health(), stop.drain.clone());
        let tell = AbortOnDropHandle::new(tokio::spawn(async move { systemd::tell(&health, &draining).await }));
        let late = CancellationToken::new();
        let mut beside = JoinSet::new();
        let (leases, stopping) = (self.runner.leases(), late.clone());
        beside.spawn(async move { leases.keep(&stopping).await });
        let stopping = late.clone();
        beside.spawn(async move { self.janitor.run(&stopping).await });
        let stopping = late.clone();
        beside.spawn(async move { self.fleet.run(&stopping).await });
        let stopping = late.clone();
        beside.spawn(async move { self.relay.run(&stopping).await });

        let mut consuming = pin!(self.consumer.run(stop.clone()));
        tokio::select! {
            () = &mut consuming => {}
            // Without one of them the others would only seem to work.
            Some(ended) = beside.join_next() => {
                error!(panicked = ended.is_err(), "a part of the daemon has ended by itself; stopping");
                stop.drain.cancel();
                consuming.await;
            }
        }
        info!("nothing is in hand any more");
        late.cancel();
        let last_words = async { while beside.join_next().await.is_some() {} };
        if timeout(LAST_WORDS, last_words).await.is_err() {
            warn!("some parts did not end in time; another replica, or the next start, carries on");
        }
        drop((answers, tell));
        // A connection whose server does not answer would be waited for.
        if timeout(LAST_WORDS, self.store.close()).await.is_err() {
            warn!("the connections to the database are left to close by themselves");
        }
        info!("stopped");
    }
}

/// The name that this replica signs leases with.
fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}-{}", if host.is_empty() { "replica" } else { host }, std::process::id(), &unique[..8])
}

/// Waits for a database that is away; one that refuses, or has another schema, does not get better by waiting.
async fn wait_for_schema(store: &Store, catalog: &Catalog, heartbeat: &Heartbeat) -> Result<(), StoreError> {
    let mut waits = Waits::new(seconds(1), MOST_PATIENT);
    loop {
        heartbeat.beat();
        match timeout(MOST_PATIENT, prepare(store, catalog)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) if error.is_refusal() => return Err(error),
            Ok(Err(error)) => warn!(%error, "waiting for the database"),
            Err(_) => warn!("waiting for the database: it does not answer"),
        }
        heartbeat.beat();
        systemd::say("waiting for the database");
        tokio::time::sleep(full_jitter(waits.next_wait())).await;
    }
}

/// Checks the server and its schema, and publishes which types this daemon lists.
async fn prepare(store: &Store, catalog: &Catalog) -> Result<(), StoreError> {
    for warning in store.check_schema().await? {
        warn!("{warning}");
    }
    store.publish_catalog(catalog).await
}

/// The server behind `/livez` and the rest; nothing to be waited for if there is to be none.
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
    let (health, asked, pinged) = (parts.consumer.health(), parts.store.clone(), parts.store.clone());
    let state = listening.map(|(listener, metrics)| {
        let state = HttpState {
            replica: owner.to_owned(),
            metrics,
            token: config.http.token.clone(),
            started: Instant::now(),
            heartbeat: Arc::clone(health.heartbeat()),
            stuck_after: STUCK_AFTER,
            draining: stop.drain.clone(),
            consuming: Arc::new(move || Consuming {
                subscribed: health.subscribed(),
                in_flight: health.in_flight(),
                paused: health.paused().map(str::to_owned),
                problem: health.problem(),
            }),
            ping: Arc::new(move || {
                let store = pinged.clone();
                Box::pin(async move { store.ping().await.map_err(|error| error.to_string()) })
            }),
            figures: Arc::new(move || {
                let store = asked.clone();
                Box::pin(async move { figures(&store).await.map_err(|error| error.to_string()) })
            }),
        };
        (listener, state)
    });
    Ok(async move {
        let Some((listener, state)) = state else { return };
        http::serve(listener, state, CancellationToken::new()).await;
    })
}

async fn figures(store: &Store) -> Result<Figures, StoreError> {
    let backlog = store.outbox_backlog().await?;
    Ok(Figures {
        outbox_unsent: backlog.unsent,
        outbox_oldest_s: backlog.oldest_age_s,
        running_runs: store.running_runs().await?,
    })
}
