//! Connection pools, and the bounds on every wait for the database.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Postgres};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::log::LevelFilter;

use super::StoreError;
use super::batcher::MAX_DELAY;
use super::session::{PINNED, PINNED_FOR_RUNS};
use crate::config::{DatabaseConfig, seconds};

/// Idle time after which a connection is pinged before it is used.
const PING_AFTER_IDLE: Duration = Duration::from_secs(1);

/// Connect options with every session setting pinned that the SQL depends on.
pub(super) fn connect_options(config: &DatabaseConfig) -> Result<PgConnectOptions, StoreError> {
    let mut options: PgConnectOptions = config.url.expose_secret().parse()?;
    // The parser keeps the brackets of an IPv6 literal, which the resolver takes for a name.
    if let Some(literal) = options.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let literal = literal.to_owned();
        options = options.host(&literal);
    }
    let statement_timeout = format!("{}s", config.statement_timeout_s);
    Ok(options
        .application_name("inventoryd")
        .options(PINNED.iter().copied())
        .options([
            ("statement_timeout", statement_timeout.as_str()),
            ("idle_in_transaction_session_timeout", statement_timeout.as_str()),
        ])
        .log_statements(LevelFilter::Trace)
        .log_slow_statements(LevelFilter::Debug, Duration::from_secs(5)))
}

/// Options for connections that write runs.
pub(super) fn for_runs(options: &PgConnectOptions) -> PgConnectOptions {
    options.clone().options(PINNED_FOR_RUNS.iter().copied())
}

/// Options for connections that execute batches.
pub(super) fn for_batches(options: &PgConnectOptions) -> PgConnectOptions {
    for_runs(options).options([("statement_timeout", format!("{}ms", MAX_DELAY.as_millis()))])
}

/// A pool of at most `connections`, which are opened on demand.
pub(super) fn pool(options: &PgConnectOptions, connections: u32, acquire_timeout: Duration) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(acquire_timeout)
        // A ping before every statement would be a second round trip. If a connection that was used a moment ago has broken
        // since, its next statement fails and is retried by the caller.
        .test_before_acquire(false)
        .before_acquire(|connection, lent| {
            Box::pin(async move {
                if lent.idle_for > PING_AFTER_IDLE {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .connect_lazy_with(options.clone())
}

/// Pool for the writes of runs, in which waiting for a connection is backpressure and not an outage.
///
/// sqlx has one timeout for both: no free connection, and no connection to the server. Here a permit is taken first, without
/// a limit (the lease of the run is the limit), and there are as many permits as connections; what remains of sqlx's timeout is the
/// time to connect.
#[derive(Debug, Clone)]
pub(super) struct WorkPool {
    pool: PgPool,
    permits: Arc<Semaphore>,
}

impl WorkPool {
    pub(super) fn new(options: &PgConnectOptions, config: &DatabaseConfig) -> Self {
        let permits = Arc::new(Semaphore::new(config.max_connections as usize));
        Self { pool: pool(&for_runs(options), config.max_connections, seconds(config.acquire_timeout_s)), permits }
    }

    /// Acquires a connection; waits without a limit while all are busy.
    pub(super) async fn acquire(&self) -> Result<WorkConnection, StoreError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.expect("the semaphore is never closed");
        Ok(WorkConnection { connection: self.pool.acquire().await?, _permit: permit })
    }

    /// Applies other options to connections that are opened from now on.
    pub(super) fn set_options(&self, options: &PgConnectOptions) {
        self.pool.set_connect_options(for_runs(options));
    }

    pub(super) async fn close(&self) {
        self.pool.close().await;
    }
}

/// A connection of the [`WorkPool`]; dropped, it goes back.
pub(super) struct WorkConnection {
    // Dropped before the permit, so that the next holder of the permit finds a connection.
    connection: PoolConnection<Postgres>,
    _permit: OwnedSemaphorePermit,
}

impl Deref for WorkConnection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for WorkConnection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}
