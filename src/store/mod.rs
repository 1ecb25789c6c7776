//! PostgreSQL: named transactions over the inventory, the runs and the outbox. Only here is sqlx.
//!
//! Three pools: `work` for what runs write, `control` for health, the outbox and the janitor, and one connection for
//! leases, so that neither a starved worker nor a busy relay can cost a run its lease. No function holds one connection
//! while it asks for another.

mod admission;
mod fleet;
mod items;
mod leases;
mod outbox;
mod read;
mod recording;
mod retention;
mod run_types;
mod runs;
mod tenants;
mod transaction;

use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::Notify;
use tracing::log::LevelFilter;

pub use admission::{Admission, AdmissionRules, Admitted, Applicant};
pub use fleet::ClosedGate;
pub use items::Written;
pub use leases::Renewal;
pub use outbox::{Backlog, OutboxEvent};
pub use read::{MissingItem, Run, RunDetails, RunFilter};
pub use recording::SuspiciousDrop;
pub use runs::{FinishRules, LastType};
pub use tenants::{NewTenant, Tenant};

use crate::config::{DatabaseConfig, seconds};

/// How long a connection that nobody uses is taken to be alive.
const TRUSTED_FOR: Duration = Duration::from_secs(1);

static MIGRATIONS: Migrator = sqlx::migrate!();

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The run is no longer this worker's: it ended, or was taken over.
    #[error("the lease on the run is lost")]
    LeaseLost,
    /// The schema is not the one that this version works with.
    #[error("{0}; run `inventoryd migrate` with the same version")]
    Schema(String),
    /// What PostgreSQL or the way to it said.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// Not a word of it for longer than it may think: its end of the wire is gone.
    #[error("database: no answer in time")]
    Silent,
    /// The database answers, but takes no writes for now.
    #[error("database: it is read only for now")]
    ReadOnly,
    /// A row holds what no version of this daemon writes.
    #[error("database: a row can't be read: {0}")]
    Row(String),
}

impl StoreError {
    /// Whether the write was refused because the run is no longer this worker's.
    #[must_use]
    pub fn is_lease_lost(&self) -> bool {
        matches!(self, Self::LeaseLost)
    }

    /// Whether the database answers but will not have this daemon: a wrong password, database, right or schema.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Schema(_) => true,
            // Classes of SQLSTATE: 28 authorisation, 3D no such database, 42 rights.
            Self::Database(sqlx::Error::Database(error)) => {
                error.code().is_some_and(|code| ["28", "3D", "42"].iter().any(|class| code.starts_with(class)))
            }
            _ => false,
        }
    }

    /// Whether the same data would be refused again by a healthy database: a defect, not an outage.
    #[must_use]
    pub fn is_defect(&self) -> bool {
        match self {
            Self::Row(_) => true,
            // Classes of SQLSTATE: 21 cardinality, 22 data, 23 constraint. Rights and the schema (42) can be mended.
            Self::Database(sqlx::Error::Database(error)) => {
                error.code().is_some_and(|code| ["21", "22", "23"].iter().any(|class| code.starts_with(class)))
            }
            _ => false,
        }
    }
}

/// For what a row holds and this version can't read.
fn unreadable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Row(error.to_string())
}

/// The inventory's database.
#[derive(Debug, Clone)]
pub struct Store {
    work: PgPool,
    control: PgPool,
    /// For leases alone: nothing else can be in their way.
    leases: PgPool,
    patience: Duration,
    event_committed: Arc<Notify>,
    deployment: Arc<str>,
}

impl Store {
    /// Prepares the pools; connections are made when they are needed.
    ///
    /// # Errors
    /// If the address can't be read.
    pub fn connect(config: &DatabaseConfig, deployment: &str) -> Result<Self, StoreError> {
        let statement_timeout = format!("{}s", config.statement_timeout_s);
        let options: PgConnectOptions = config.url.expose_secret().parse()?;
        let options = options
            .application_name("inventoryd")
            .options([
                ("statement_timeout", statement_timeout.as_str()),
                ("idle_in_transaction_session_timeout", statement_timeout.as_str()),
                ("client_min_messages", "error"),
            ])
            .log_statements(LevelFilter::Trace)
            .log_slow_statements(LevelFilter::Debug, Duration::from_secs(5));
        let pool = |options: &PgConnectOptions, connections| {
            PgPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(seconds(config.acquire_timeout_s))
                // A connection that was in use a moment ago is not asked whether it is still there: that would be a round
                // trip for every statement. If it has just gone, the statement fails, and what it belongs to is tried again.
                .test_before_acquire(false)
                .before_acquire(|connection, lent| {
                    Box::pin(async move {
                        if lent.idle_for > TRUSTED_FOR {
                            connection.ping().await?;
                        }
                        Ok(true)
                    })
                })
                .connect_lazy_with(options.clone())
        };
        Ok(Self {
            // Every statement of a run goes by keys: one plan is as good as another, and planning takes longer than doing.
            work: pool(&options.clone().options([("plan_cache_mode", "force_generic_plan")]), config.max_connections),
            control: pool(&options, config.control_connections),
            leases: pool(&options, 1),
            patience: seconds(config.acquire_timeout_s + config.statement_timeout_s),
            event_committed: Arc::new(Notify::new()),
            deployment: deployment.into(),
        })
    }

    /// Waits as long as the database may take by its own statement timeout. A server that has died without a word never
    /// sends that error, and the client would wait until TCP gives up, a quarter of an hour later.
    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        tokio::time::timeout(self.patience, answer).await.unwrap_or(Err(StoreError::Silent))
    }

    /// Brings the schema to this version.
    ///
    /// # Errors
    /// If the database is away, or was migrated by another version.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        MIGRATIONS.run(&self.control).await.map_err(|error| StoreError::Schema(error.to_string()))
    }

    /// Whether the schema is the one of this version.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if it is not, or the database is away.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        let newest = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default();
        let applied = sqlx::query_scalar::<_, Option<i64>>("select max(version) from _sqlx_migrations where success")
            .fetch_one(&self.control)
            .await;
        let applied = match applied {
            Ok(version) => version.unwrap_or_default(),
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => 0,
            Err(error) => return Err(error.into()),
        };
        if applied == newest {
            return Ok(());
        }
        Err(StoreError::Schema(format!("the database's schema is at version {applied}, this daemon needs {newest}")))
    }

    /// Whether the database answers and takes writes: one that was failed over to a standby does the first alone.
    ///
    /// # Errors
    /// If it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let read_only =
            sqlx::query_scalar!(r#"select current_setting('transaction_read_only') = 'on' as "read_only!""#);
        if read_only.fetch_one(&self.control).await? { Err(StoreError::ReadOnly) } else { Ok(()) }
    }

    /// Woken whenever a run of this process has ended and its event waits in the outbox.
    #[must_use]
    pub fn event_committed(&self) -> Arc<Notify> {
        Arc::clone(&self.event_committed)
    }

    /// Closes every connection.
    pub async fn close(&self) {
        tokio::join!(self.work.close(), self.control.close(), self.leases.close());
    }
}
