//! The daemon as a whole: builds its parts, starts them, and stops them in the order in which they need each other.

use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::{Waits, full_jitter};
use crate::broker::{Broker, BrokerError};
use crate::config::{Config, ConfigError, seconds};
use crate::consumer::{Consumer, ConsumerHealth};
use crate::fleet::Fleet;
use crate::graph::{GraphClient, GraphError};
use crate::http::{self, Consuming, Figures, Heartbeat, HttpState};
use crate::janitor::Janitor;
use crate::relay::Relay;
use crate::run::{Runner, Stop};
use crate::store::{Store, StoreError};

/// Longest wait between two looks for a database that is away at the start.
const MOST_PATIENT: Duration = Duration::from_secs(15);
/// Without a beat for so long, `/livez` calls this process stuck.
const STUCK_AFTER: Duration = Duration::from_secs(30);
const BEAT_EVERY: Duration = Duration::from_secs(5);

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
        let store = Store::connect(&config.database, &config.telemetry.deployment)?;
        wait_for_schema(&store).await?;
        let broker = Broker::new(&config.broker, &config.topology, &format!("inventoryd {owner}"))?;
        let graph = GraphClient::new(&config.graph)?;
        let fleet = Fleet::new(store.clone(), graph.clone(), &owner);
        let runner = Runner::new(&config, &owner, store.clone(), graph, catalog);
        let publisher = broker.publisher();
        let consumer = Consumer::new(broker, publisher.clone(), runner.clone(), store.clone(), &config);
        let relay = Relay::new(publisher, store.clone(), &config.outbox);
        let janitor = Janitor::new(store.clone(), &config);
        let (stop, health) = (Stop::default(), consumer.health());
        let parts = Parts { consumer, relay, janitor, fleet, runner, store };
        let answers = http_server(&config, metrics, &owner, &parts, &stop).await?;
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
    async fn run(self, stop: Stop, answers: impl Future<Output = ()> + Send + 'static) {
        let late = CancellationToken::new();
        let very_late = CancellationToken::new();
        let leases = self.runner.leases();
        let keep_leases = tokio::spawn(background(late.clone(), async move |stop| leases.keep(&stop).await));
        let health = self.consumer.health();
        let reading_for = move || health.reading_for();
        let clean =
            tokio::spawn(background(late.clone(), async move |stop| self.janitor.run(&stop, reading_for).await));
        let keep_in_step = tokio::spawn(background(late.clone(), async move |stop| self.fleet.run(&stop).await));
        let publish = tokio::spawn(background(late.clone(), async move |stop| self.relay.run(&stop).await));
        let answer = tokio::spawn(background(very_late.clone(), async move |stop| {
            stop.run_until_cancelled(answers).await;
        }));
        self.consumer.run(stop).await;
        info!("nothing is in hand any more");
        late.cancel();
        for part in [keep_leases, clean, keep_in_step, publish] {
            let _ = part.await;
        }
        very_late.cancel();
        let _ = answer.await;
        self.store.close().await;
        info!("stopped");
    }
}

/// A part that works until it is told to stop.
async fn background(stop: CancellationToken, work: impl AsyncFnOnce(CancellationToken)) {
    work(stop).await;
}

/// The name that this replica signs leases with.
fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}-{}", if host.is_empty() { "replica" } else { host }, std::process::id(), &unique[..8])
}

/// Waits for a database that is away; one that refuses, or has another schema, does not get better by waiting.
async fn wait_for_schema(store: &Store) -> Result<(), StoreError> {
    let mut waits = Waits::new(seconds(1), MOST_PATIENT);
    loop {
        match store.check_schema().await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => warn!(%error, "waiting for the database"),
        }
        tokio::time::sleep(full_jitter(waits.next_wait())).await;
    }
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
    let heartbeat = Arc::new(Heartbeat::new(STUCK_AFTER));
    let (health, asked, pinged) = (parts.consumer.health(), parts.store.clone(), parts.store.clone());
    let state = listening.map(|(listener, metrics)| {
        let state = HttpState {
            replica: owner.to_owned(),
            metrics,
            token: config.http.token.clone(),
            heartbeat: Arc::clone(&heartbeat),
            draining: stop.drain.clone(),
            consuming: Arc::new(move || Consuming {
                subscribed: health.subscribed(),
                in_hand: health.in_hand(),
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
        let beat = async {
            let mut ticks = tokio::time::interval(BEAT_EVERY);
            loop {
                ticks.tick().await;
                heartbeat.beat();
            }
        };
        tokio::select! {
            () = http::serve(listener, state, CancellationToken::new()) => {}
            () = beat => {}
        }
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
