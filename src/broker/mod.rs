//! The broker: connections, topology, deliveries, confirmed publishing. Only here is the AMQP client known.
//!
//! The client recovers nothing by itself. Whatever is lost is rebuilt as a whole by whoever held it: the consumer its
//! [`Subscription`], the [`Publisher`] its connection. Every answer is awaited with a limit.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use async_rs::TokioRuntime;

use crate::config::{BrokerConfig, TopologyConfig, seconds};

mod address;
mod connection;
mod dead_letters;
mod deliveries;
mod drift;
mod error;
mod message;
mod publisher;
mod tail;
mod tls;
mod topology;

pub use dead_letters::{DeadLetter, DeadLetters};
pub use deliveries::{Delivery, Subscription};
pub use error::BrokerError;
pub use message::Outgoing;
pub use publisher::{PublishOutcome, Publisher};
pub use tail::{EventTail, TailedEvent};
pub use topology::{Names, RetryTier, SYNC_REQUESTED};

use address::Address;
use connection::{Connection, Opening};
use publisher::ConfirmChannel;
use tls::Tls;

/// The way to the broker. Cheap to clone; no connection is made before one is needed.
#[derive(Clone)]
pub struct Broker(Arc<Inner>);

struct Inner {
    addresses: Vec<Address>,
    /// The address that is tried first: the one after the last that failed.
    first: AtomicUsize,
    opening: Opening,
    heartbeat_s: u16,
    topology: TopologyConfig,
    drift: drift::Known,
    names: Names,
    /// Set once a broker has said that it is new enough.
    version: OnceLock<String>,
    spawner: tokio::runtime::Handle,
}

/// What a connection is for; it stands in the broker's list of connections.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Consume,
    Publish,
    Manage,
}

impl Broker {
    /// Prepares everything that needs no network. `client_name` names this process on the broker.
    ///
    /// # Errors
    /// If `broker.url` or a file of `[broker]` can't be used.
    pub fn new(config: &BrokerConfig, topology: &TopologyConfig, client_name: &str) -> Result<Self, BrokerError> {
        // The first provider stays for the process. If someone else has installed one, that one is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tls = Tls::read(config)?;
        // One thread of their own for the client's tasks: heartbeats must go out while all workers are busy.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("inventoryd-amqp")
            .enable_all()
            .build()
            .map_err(|error| BrokerError::Config(format!("no threads for the broker's client: {error}")))?;
        let spawner = runtime.handle().clone();
        let opening = Opening {
            runtime: TokioRuntime::tokio_with_runtime(runtime),
            tls,
            name: client_name.to_owned(),
            connect_limit: seconds(config.connect_timeout_s),
            answer_limit: seconds(config.operation_timeout_s),
        };
        Ok(Self(Arc::new(Inner {
            addresses: Address::parse_all(&config.url)?,
            first: AtomicUsize::new(0),
            opening,
            heartbeat_s: config.heartbeat_s,
            names: Names::new(&topology.prefix),
            topology: topology.clone(),
            drift: drift::Known::default(),
            version: OnceLock::new(),
            spawner,
        })))
    }

    /// The names of all exchanges and queues.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.0.names
    }

    /// The name of this process on the broker.
    #[must_use]
    pub fn client_name(&self) -> &str {
        &self.0.opening.name
    }

    /// The broker's version, once it has been asked.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.0.version.get().map(String::as_str)
    }

    /// Connects, makes or checks the topology, and starts to consume requests, at most `prefetch` at a time.
    ///
    /// # Errors
    /// If any of it fails; nothing is left behind then.
    pub async fn subscribe(&self, prefetch: u16) -> Result<Subscription, BrokerError> {
        let wire = self.connect(Purpose::Consume).await?;
        self.ensure(&wire).await?;
        Subscription::start(wire, &self.0.names.requests, prefetch, self.0.opening.answer_limit).await
    }

    /// A publisher with a connection of its own, made when it is first needed and made again when it is lost.
    #[must_use]
    pub fn publisher(&self) -> Publisher {
        Publisher::start(self)
    }

    /// Makes or checks the exchanges and queues, and says goodbye.
    ///
    /// # Errors
    /// [`BrokerError::Drift`] with a line for each difference, or that no broker could be asked.
    pub async fn ensure_topology(&self) -> Result<(), BrokerError> {
        let wire = self.connect(Purpose::Manage).await?;
        let ensured = self.ensure(&wire).await;
        wire.close(self.0.opening.answer_limit).await;
        ensured
    }

    /// Publishes one sync request and waits until the broker has stored it.
    ///
    /// # Errors
    /// If it was not stored, or if that is not known.
    pub async fn publish_request(
        &self,
        body: Vec<u8>,
        content_type: &str,
        traceparent: Option<&str>,
    ) -> Result<(), BrokerError> {
        let mut link = ConfirmChannel::open(self, Purpose::Manage).await?;
        let outcomes = link.publish(self.names(), &[Outgoing::request(body, content_type, traceparent)]).await;
        link.close(self.0.opening.answer_limit).await;
        outcomes.first().copied().unwrap_or(PublishOutcome::Unknown).into_result("publishing the request")
    }

    /// The dead letters, as they are now.
    ///
    /// # Errors
    /// If no broker could be asked.
    pub async fn dead_letters(&self) -> Result<DeadLetters, BrokerError> {
        DeadLetters::open(self).await
    }

    /// Run-completed events as they are published from now on, those whose routing key fits `pattern`
    /// (`run.completed.failed.*`, or `#` for all).
    ///
    /// # Errors
    /// If no broker could be asked, or it refuses.
    pub async fn tail_events(&self, pattern: &str) -> Result<EventTail, BrokerError> {
        EventTail::open(self, pattern).await
    }

    async fn ensure(&self, wire: &Connection) -> Result<(), BrokerError> {
        let inner = &self.0;
        topology::ensure(wire, &inner.names, &inner.topology, inner.opening.answer_limit, &inner.drift).await
    }

    /// Tries every address once, beginning with the one after the last that failed.
    async fn connect(&self, purpose: Purpose) -> Result<Connection, BrokerError> {
        let inner = &self.0;
        let mut problems = Vec::new();
        for _ in 0..inner.addresses.len() {
            let index = inner.first.load(Ordering::Relaxed) % inner.addresses.len();
            match self.connect_to(&inner.addresses[index], purpose).await {
                Ok(wire) => return Ok(wire),
                Err(error @ BrokerError::TooOld { .. }) => return Err(error),
                Err(error) => problems.push(format!("{}: {error}", inner.addresses[index])),
            }
            inner.first.store(index + 1, Ordering::Relaxed);
        }
        Err(BrokerError::Unreachable(problems.join("; ")))
    }

    async fn connect_to(&self, address: &Address, purpose: Purpose) -> Result<Connection, BrokerError> {
        let uri = address.to_uri(self.0.heartbeat_s);
        let mut opening = self.0.opening.clone();
        if self.0.version.get().is_none() {
            let (product, version) = connection::server_version(&opening, &uri).await?;
            if !connection::is_new_enough(&product, &version) {
                return Err(BrokerError::TooOld {
                    address: address.to_string(),
                    found: format!("{product} {version}"),
                });
            }
            // Another task may have asked at the same time, and got the same answer.
            let _ = self.0.version.set(version);
        }
        let purpose = match purpose {
            Purpose::Consume => "consume",
            Purpose::Publish => "publish",
            Purpose::Manage => "manage",
        };
        opening.name = format!("{} {purpose}", opening.name);
        Connection::open(&opening, uri).await
    }
}
