//! PostgreSQL: the inventory, the runs and the outbox. Only this module uses sqlx.
//!
//! Three pools: `work` for what runs write, `control` for health, the outbox and the janitor, and one connection for lease
//! renewals, so that neither starved runs nor a busy relay can cost a run its lease. No function holds one connection while it
//! asks for another. Every statement is a transaction of its own; what belongs together is one function of the schema
//! (`migrations/0001_inventory.sql`), where each lock has its reason beside it.

mod admission;
mod error;
mod events;
mod fleet;
mod items;
mod leases;
mod pool;
mod queries;
mod retention;
mod run_outcome;
mod run_row;
mod schema;
mod session;
mod tenants;

use std::time::Duration;

use sqlx::postgres::PgPool;

pub use admission::{Admission, AdmissionRequest, AdmissionRules, Admitted};
pub use error::StoreError;
pub use events::{Backlog, ReplayFilter};
pub use fleet::TenantPause;
pub use items::{BatchCounts, ObservedItem};
pub use leases::{InterruptedRun, Renewed};
pub use queries::{MissingItem, Run, RunDetails, RunFilter};
pub use run_outcome::{RunEnd, SuspiciousDropRule};
pub use tenants::{NewTenant, Tenant};

use crate::config::{DatabaseConfig, seconds};

/// Handle to the database of the inventory; clones share the pools.
#[derive(Debug, Clone)]
pub struct Store {
    work: pool::WorkPool,
    control: PgPool,
    leases: PgPool,
    /// Longest time for a connection and one statement on it.
    statement_limit: Duration,
}

impl Store {
    /// Prepares the pools; connections are opened on demand.
    pub fn connect(config: &DatabaseConfig) -> Result<Self, StoreError> {
        let options = pool::connect_options(config)?;
        let acquire_timeout = seconds(config.acquire_timeout_s);
        Ok(Self {
            work: pool::WorkPool::new(&options, config),
            control: pool::pool(&options, config.control_connections, acquire_timeout),
            leases: pool::pool(&options, 1, acquire_timeout),
            statement_limit: seconds(config.acquire_timeout_s.saturating_add(config.statement_timeout_s)),
        })
    }

    /// Bounds an operation by the time that the server itself allows a statement. A server that died without closing its
    /// connections never reports its statement timeout, and TCP gives up only after a quarter of an hour.
    async fn with_timeout<T>(&self, operation: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        tokio::time::timeout(self.statement_limit, operation).await.unwrap_or(Err(StoreError::Timeout))
    }

    /// Checks that the database responds and accepts writes: after a failover to a standby it only responds.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let read_only =
            sqlx::query_scalar!(r#"select current_setting('transaction_read_only') = 'on' as "read_only!""#);
        if read_only.fetch_one(&self.control).await? { Err(StoreError::ReadOnly) } else { Ok(()) }
    }

    /// Closes every connection.
    pub async fn close(&self) {
        tokio::join!(self.work.close(), self.control.close(), self.leases.close());
    }
}
