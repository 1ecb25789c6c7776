//! PostgreSQL: the inventory, the runs and the outbox. Only this module uses sqlx.
//!
//! Four pools: `work` for what runs write, `batches` for batches of their admissions and ends, `control` for health, the
//! outbox and the janitor, and one connection for lease renewals, so that neither starved runs nor a busy relay can cost a run
//! its lease. No function holds one connection while it asks for another. Every statement is a transaction of its own; what
//! belongs together is one function of the schema (`migrations/0001_inventory.sql`), where each lock has its reason beside it.

mod admission;
mod batcher;
mod error;
mod fleet;
mod inventory;
mod items;
mod leases;
mod outbox;
mod pool;
mod queries;
mod retention;
mod run_outcome;
mod run_row;
mod schema;
mod session;
mod tenants;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgPool;
use sqlx::{ConnectOptions, Connection, Postgres};
use tokio::time::timeout;

use admission::Decision;
pub use admission::{Admission, AdmissionRequest, AdmissionRules, Admitted};
use batcher::Batcher;
pub use error::StoreError;
pub use fleet::TenantPause;
pub use inventory::{Change, Difference, Item, ItemFilter, RunDiff};
pub use items::{BatchCounts, ItemBatch, ObservedItem};
pub use leases::{InterruptedRun, Renewed};
pub use outbox::{Backlog, ReplayFilter};
pub use queries::{MissingItem, Run, RunDetails, RunFilter};
use run_outcome::Ended;
pub use run_outcome::{RunEnd, SuspiciousDropRule};
pub use tenants::{NewTenant, Tenant};

use crate::config::{DatabaseConfig, RotatedSecret, seconds};

/// Wait for a pool after which one connection outside it is tried, whose failure names the cause.
const DIAGNOSE_AFTER: Duration = Duration::from_millis(300);

/// Handle to the database of the inventory; clones share the pools.
#[derive(Debug, Clone)]
pub struct Store {
    work: pool::WorkPool,
    control: PgPool,
    leases: PgPool,
    /// One connection for admissions and one for ends: the fewer there are, the warmer are their plans in the processor's caches.
    batches: PgPool,
    admissions: Batcher<Decision>,
    ends: Batcher<Ended>,
    /// Longest time for a connection and one statement on it.
    statement_limit: Duration,
    origin: Arc<Origin>,
}

/// Source of the connect options.
#[derive(Debug)]
struct Origin {
    config: DatabaseConfig,
    /// File of the address: passwords are rotated while the process runs.
    url: RotatedSecret,
    /// Version of the server of the latest connection, as `server_version_num`; 0 before the first one.
    server: AtomicU32,
}

impl Store {
    /// Prepares the pools; connections are opened on demand.
    pub fn connect(config: &DatabaseConfig) -> Result<Self, StoreError> {
        let options = pool::connect_options(config)?;
        let acquire_timeout = seconds(config.acquire_timeout_s);
        let statement_limit = seconds(config.acquire_timeout_s.saturating_add(config.statement_timeout_s));
        let batches = pool::pool(&pool::for_batches(&options), 2, acquire_timeout);
        Ok(Self {
            work: pool::WorkPool::new(&options, config),
            control: pool::pool(&options, config.control_connections, acquire_timeout),
            leases: pool::pool(&options, 1, acquire_timeout),
            admissions: Batcher::new(&batches, statement_limit),
            ends: Batcher::new(&batches, statement_limit),
            batches,
            statement_limit,
            origin: Arc::new(Origin {
                config: config.clone(),
                url: RotatedSecret::new("database.url_file", config.url_file.clone(), config.url.clone()),
                server: AtomicU32::new(0),
            }),
        })
    }

    /// Bounds an operation by the time that the server itself allows a statement. A server that died without closing its
    /// connections never reports its statement timeout, and TCP gives up only after a quarter of an hour.
    async fn with_timeout<T>(&self, operation: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        tokio::time::timeout(self.statement_limit, operation).await.unwrap_or(Err(StoreError::Timeout))
    }

    /// Checks that the database responds and accepts writes: after a failover to a standby it only responds. Applies a
    /// changed `database.url_file`; the consumer and every probe call this, so that a rotation takes effect within seconds.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let mut connection = self.control_connection().await?;
        let read_only =
            sqlx::query_scalar!(r#"select current_setting('transaction_read_only') = 'on' as "read_only!""#);
        if read_only.fetch_one(&mut *connection).await? { Err(StoreError::ReadOnly) } else { Ok(()) }
    }

    /// Connection of the control pool, or the cause for having none. Notes the version of its server, which an upgrade or a
    /// failover changes.
    async fn control_connection(&self) -> Result<PoolConnection<Postgres>, StoreError> {
        self.apply_changed_url();
        let connection = self.acquire_control().await?;
        if let Some(version) = connection.server_version_num() {
            self.origin.server.store(version, Ordering::Relaxed);
        }
        Ok(connection)
    }

    /// Acquires a connection of the control pool, or finds the cause: the pool itself repeats a refused connection and then
    /// reports only that time is up.
    async fn acquire_control(&self) -> Result<PoolConnection<Postgres>, StoreError> {
        let mut pooled = pin!(self.control.acquire());
        if let Ok(connection) = timeout(DIAGNOSE_AFTER, &mut pooled).await {
            return Ok(connection?);
        }
        let options = self.control.connect_options();
        let failure = async {
            match options.connect().await {
                Err(error) => error,
                // The pool is busy: its own wait decides.
                Ok(connection) => {
                    // Fails only if the connection is lost already.
                    let _ = connection.close().await;
                    std::future::pending().await
                }
            }
        };
        tokio::select! {
            connection = &mut pooled => Ok(connection?),
            error = failure => Err(error.into()),
        }
    }

    fn apply_changed_url(&self) {
        let Some(url) = self.origin.url.changed() else { return };
        match pool::connect_options(&DatabaseConfig { url, ..self.origin.config.clone() }) {
            Ok(options) => {
                self.control.set_connect_options(options.clone());
                self.leases.set_connect_options(options.clone());
                self.batches.set_connect_options(pool::for_batches(&options));
                self.work.set_options(&options);
            }
            Err(error) => tracing::warn!(%error, "changed address invalid; keeping the previous one"),
        }
    }

    /// Closes every connection.
    pub async fn close(&self) {
        tokio::join!(self.work.close(), self.batches.close(), self.control.close(), self.leases.close());
    }
}
