//! Broker access: connections, topology, deliveries and confirmed publishing. The only module that uses the AMQP client.
//!
//! The client's own recovery is off. A lost connection is rebuilt as a whole by its owner: the consumer rebuilds its
//! [`Subscription`], the [`Publisher`] its connection. Every answer is awaited with a time limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_rs::TokioRuntime;
use lapin::uri::AMQPUri;
use parking_lot::RwLock;

use crate::config::{BrokerConfig, RotatedSecret, TopologyConfig, seconds};

mod address;
mod confirm_channel;
mod connect_failure;
mod connection;
mod content_header;
mod dead_letters;
mod deliveries;
mod error;
mod frame_fit;
mod frame_guard;
mod guarded_stream;
mod message;
mod permissions;
mod publish_outcome;
mod publisher;
mod request_watch;
mod retry_tier;
mod tail;
mod tls;
mod topology;

pub use dead_letters::{DeadLetter, DeadLetters};
pub use deliveries::{Delivery, Subscription};
pub use error::BrokerError;
pub use message::Outgoing;
pub use publish_outcome::PublishOutcome;
pub use publisher::Publisher;
pub use request_watch::RequestWatch;
pub use retry_tier::RetryTier;
pub use tail::{EventTail, TailedEvent};
pub use topology::{Names, SYNC_REQUESTED};

use address::Address;
use confirm_channel::ConfirmChannel;
pub use connection::TESTED_VERSIONS;
use connection::{Connection, Opening};
use tls::Tls;

/// Handle to the broker. Cheap to clone; connections are opened on demand.
#[derive(Clone)]
pub struct Broker(Arc<Inner>);

struct Inner {
    addresses: RwLock<Arc<[Address]>>,
    /// File of the addresses, read again for every connection: passwords are rotated while the process runs.
    url: RotatedSecret,
    /// Index of the address to try first: the one after the last that failed.
    first: AtomicUsize,
    opening: Opening,
    heartbeat_s: u16,
    topology: TopologyConfig,
    names: Names,
    /// Version of the broker that answered last, if it is a supported one.
    version: RwLock<Option<String>>,
    /// True once this user was found to have every permission.
    permitted: AtomicBool,
    spawner: tokio::runtime::Handle,
}

/// Purpose of a connection, shown in the broker's list of connections.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Consume,
    Publish,
    Manage,
}

impl Broker {
    /// Creates a handle without connecting. `client_name` names this process on the broker.
    ///
    /// # Errors
    /// If `broker.url` or a file of `[broker]` can't be used.
    pub fn new(config: &BrokerConfig, topology: &TopologyConfig, client_name: &str) -> Result<Self, BrokerError> {
        // An error means that a provider is installed already, which serves as well.
        crate::tls::install_provider();
        let tls = Tls::read(config)?;
        // A separate thread for the client's tasks: heartbeats must be sent while all workers are busy.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("inventoryd-amqp")
            .enable_all()
            .build()
            .map_err(|error| BrokerError::Config(format!("can't start a thread for the AMQP client: {error}")))?;
        let spawner = runtime.handle().clone();
        let opening = Opening {
            runtime: TokioRuntime::tokio_with_runtime(runtime),
            tls,
            name: client_name.to_owned(),
            connect_limit: seconds(config.connect_timeout_s),
            answer_limit: seconds(config.operation_timeout_s),
        };
        Ok(Self(Arc::new(Inner {
            addresses: RwLock::new(Address::parse_all(&config.url)?.into()),
            url: RotatedSecret::new("broker.url_file", config.url_file.clone(), config.url.clone()),
            first: AtomicUsize::new(0),
            opening,
            heartbeat_s: config.heartbeat_s,
            names: Names::new(&topology.prefix),
            topology: topology.clone(),
            version: RwLock::default(),
            permitted: AtomicBool::new(false),
            spawner,
        })))
    }

    /// Names of all exchanges and queues.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.0.names
    }

    /// Name of this process on the broker.
    #[must_use]
    pub fn client_name(&self) -> &str {
        &self.0.opening.name
    }

    /// Version of the broker at the latest start of a session, and whether it is one that was tested; `None` before the first
    /// connection.
    #[must_use]
    pub fn version(&self) -> Option<(String, bool)> {
        let version = self.0.version.read().clone()?;
        let is_tested = connection::is_tested(&version);
        Some((version, is_tested))
    }

    /// Connects, declares or verifies the topology, and consumes requests with the given prefetch.
    ///
    /// # Errors
    /// If any step fails; the connection is closed then.
    pub async fn subscribe(&self, prefetch: u16) -> Result<Subscription, BrokerError> {
        let connection = self.connect(Purpose::Consume).await?;
        for warning in self.check_session(&connection).await? {
            tracing::warn!("{warning}");
        }
        Subscription::start(connection, &self.0.names.requests, prefetch, self.0.opening.answer_limit).await
    }

    /// Starts a publisher with its own connection, opened on demand and reopened when lost.
    #[must_use]
    pub fn publisher(&self) -> Publisher {
        Publisher::start(self)
    }

    /// Declares or verifies the exchanges and queues once.
    ///
    /// # Errors
    /// [`BrokerError::Drift`] with one line per differing exchange or queue, or a connection error.
    pub async fn ensure_topology(&self) -> Result<(), BrokerError> {
        let connection = self.connect(Purpose::Manage).await?;
        let ensured = self.ensure(&connection).await;
        connection.close(self.0.opening.answer_limit).await;
        ensured
    }

    /// Connects, declares or verifies the topology, and checks the permissions of this user, as a start does; returns warnings.
    ///
    /// # Errors
    /// [`BrokerError::Drift`], [`BrokerError::Permissions`], or a connection error.
    pub async fn check(&self) -> Result<Vec<String>, BrokerError> {
        let connection = self.connect(Purpose::Manage).await?;
        let checked = self.check_session(&connection).await;
        connection.close(self.0.opening.answer_limit).await;
        checked
    }

    /// Publishes one sync request and waits for its confirm.
    ///
    /// # Errors
    /// If the request was not stored, or may not have been.
    pub async fn publish_request(
        &self,
        body: Vec<u8>,
        content_type: &str,
        traceparent: Option<&str>,
    ) -> Result<(), BrokerError> {
        let mut link = ConfirmChannel::open(self, Purpose::Manage).await?;
        let published = link.publish_one(self.names(), &Outgoing::request(body, content_type, traceparent)).await;
        if matches!(published, Err(BrokerError::Alarm(_))) {
            // Dropped: a blocked connection never closes in order.
            return published;
        }
        link.close(self.0.opening.answer_limit).await;
        published
    }

    /// Publishes one sync request and watches over it.
    ///
    /// # Errors
    /// As [`Self::publish_request`].
    pub async fn publish_and_watch(&self, body: Vec<u8>, content_type: &str) -> Result<RequestWatch, BrokerError> {
        RequestWatch::publish(self, &Outgoing::request(body, content_type, None)).await
    }

    /// Opens the dead-letter queue for inspection.
    ///
    /// # Errors
    /// If no broker is reachable.
    pub async fn dead_letters(&self) -> Result<DeadLetters, BrokerError> {
        DeadLetters::open(self).await
    }

    /// Subscribes to run-completed events from now on whose routing key matches `pattern`
    /// (`run.completed.failed.*`, or `#` for all).
    ///
    /// # Errors
    /// If no broker is reachable, or it refuses.
    pub async fn tail_events(&self, pattern: &str) -> Result<EventTail, BrokerError> {
        EventTail::open(self, pattern).await
    }

    /// Declares or verifies the topology, and checks the permissions until they have been sufficient once. Returns warnings
    /// of that one check.
    async fn check_session(&self, connection: &Connection) -> Result<Vec<String>, BrokerError> {
        let (inner, limit) = (&self.0, self.0.opening.answer_limit);
        let found = topology::ensure(connection, &inner.names, &inner.topology, limit).await?;
        if found.refused.is_empty() && inner.permitted.load(Ordering::Relaxed) {
            return found.into_result().map(|()| Vec::new());
        }
        permissions::check(connection, &inner.names, inner.topology.mode, &found, limit).await?;
        found.into_result()?;
        let warning = dead_letters::warn_of_kept(connection, &inner.names, limit).await?;
        inner.permitted.store(true, Ordering::Relaxed);
        Ok(warning.into_iter().collect())
    }

    async fn ensure(&self, connection: &Connection) -> Result<(), BrokerError> {
        let inner = &self.0;
        let found = topology::ensure(connection, &inner.names, &inner.topology, inner.opening.answer_limit).await?;
        found.into_result()
    }

    /// Tries every address once, starting after the last that failed.
    async fn connect(&self, purpose: Purpose) -> Result<Connection, BrokerError> {
        let inner = &self.0;
        let addresses = self.addresses();
        let mut problems = Vec::new();
        for _ in 0..addresses.len() {
            let index = inner.first.load(Ordering::Relaxed) % addresses.len();
            match self.connect_to(&addresses[index], purpose).await {
                Ok(connection) => return Ok(connection),
                Err(error @ BrokerError::TooOld { .. }) => return Err(error),
                Err(error) => {
                    let address = &addresses[index];
                    problems.push(format!("{address}: {}", connect_failure::describe(&error, address.is_tls())));
                }
            }
            inner.first.store(index + 1, Ordering::Relaxed);
        }
        Err(BrokerError::Unreachable(problems.join("; ")))
    }

    /// Current addresses, after a look at the file.
    fn addresses(&self) -> Arc<[Address]> {
        if let Some(url) = self.0.url.changed() {
            match Address::parse_all(&url) {
                Ok(addresses) => *self.0.addresses.write() = addresses.into(),
                Err(error) => tracing::warn!(%error, "changed addresses invalid; keeping the previous ones"),
            }
        }
        Arc::clone(&self.0.addresses.read())
    }

    async fn check_version(&self, address: &Address, uri: &AMQPUri) -> Result<(), BrokerError> {
        let (product, version) = connection::server_version(&self.0.opening, uri).await?;
        if !connection::is_new_enough(&product, &version) {
            return Err(BrokerError::TooOld { address: address.to_string(), found: format!("{product} {version}") });
        }
        let previous = self.0.version.write().replace(version.clone());
        if previous.as_ref() != Some(&version) && !connection::is_tested(&version) {
            tracing::warn!(version, tested = TESTED_VERSIONS, "RabbitMQ is newer than the versions that were tested");
        }
        Ok(())
    }

    async fn connect_to(&self, address: &Address, purpose: Purpose) -> Result<Connection, BrokerError> {
        let uri = address.to_uri(self.0.heartbeat_s);
        let mut opening = self.0.opening.clone();
        // A broker may have been upgraded since the last session.
        let is_known = self.0.version.read().is_some();
        if !is_known || matches!(purpose, Purpose::Consume) {
            self.check_version(address, &uri).await?;
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
