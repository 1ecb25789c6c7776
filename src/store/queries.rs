//! Queries of the command line and of other readers.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::error::corrupt_row;
use super::run_row::{RunRow, columns, outcomes_of, rows_of};
use super::{Store, StoreError};
use crate::domain::event::rfc3339;
use crate::domain::run::{GraphUsage, RunKey, RunStatus, TypeCounters, TypeOutcome};
use crate::domain::selection::Selection;

/// Filter of a list of runs.
#[derive(Debug, Clone)]
pub struct RunFilter {
    /// Runs of this tenant only.
    pub tenant_id: Option<Uuid>,
    /// Runs with this status only.
    pub status: Option<RunStatus>,
    /// Limit of the number of runs.
    pub limit: u32,
}

/// A run for readers.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Run {
    /// The run.
    pub run_id: Uuid,
    /// The tenant.
    pub tenant_id: Uuid,
    /// Name of the tenant.
    pub tenant_name: String,
    /// Key of the request.
    pub idempotency_key: String,
    /// Hash of the selection.
    pub selection_hash: String,
    /// The selection.
    pub selection: Selection,
    /// Status.
    pub status: RunStatus,
    /// True if there is any error code or a counted error.
    pub had_errors: bool,
    /// Distinct error codes, sorted.
    pub error_codes: Vec<String>,
    /// Failures by type.
    pub error_context: Value,
    /// Sums over all types.
    #[serde(flatten)]
    pub counters: TypeCounters,
    /// Use of Graph, over all attempts.
    #[serde(flatten)]
    pub usage: GraphUsage,
    /// Attempts, the current one included.
    pub attempt: i32,
    /// Replica that holds the lease.
    pub lease_owner: Option<String>,
    /// Remaining seconds of the lease by the database clock; none unless the run is running.
    pub lease_left_s: Option<f64>,
    /// Copied from the request.
    pub correlation_id: Option<String>,
    /// Copied from the request.
    pub requested_by: Option<String>,
    /// Start, RFC 3339.
    pub started_at: String,
    /// End, RFC 3339.
    pub finished_at: Option<String>,
    /// Seconds from start to end, or until now.
    pub duration_s: f64,
    /// Seconds after which to request again.
    pub retry_after_s: Option<i32>,
    /// Version of the daemon that admitted the run.
    pub daemon_version: String,
}

/// A run with its types.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct RunDetails {
    /// The run.
    #[serde(flatten)]
    pub run: Run,
    /// Outcomes of the types that have ended.
    pub types: Vec<TypeOutcome>,
    /// While it runs: items observed so far, by type.
    pub observed_so_far: Vec<(String, i64)>,
}

/// A missing item.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct MissingItem {
    /// Policy type.
    pub policy_type: String,
    /// Id in Graph.
    pub external_id: String,
    /// Name.
    pub display_name: Option<String>,
    /// Last observation, RFC 3339.
    pub last_seen_at: String,
    /// Run of the last observation.
    pub last_seen_run_id: Uuid,
    /// `high` or `low`.
    pub confidence: String,
    /// True if its type was read to the end.
    pub type_complete: bool,
}

/// A run with the columns of a list that its row does not have.
struct ListedRun {
    row: RunRow,
    tenant_name: String,
    duration_s: f64,
    lease_left_s: Option<f64>,
}

impl Store {
    /// Runs, newest first by the database clock.
    pub async fn list_runs(&self, filter: &RunFilter) -> Result<Vec<Run>, StoreError> {
        // Two statements and not one with an optional tenant: each has its own index, in the order wanted.
        let status = filter.status.map(RunStatus::as_str);
        let keys = match filter.tenant_id {
            Some(tenant_id) => {
                sqlx::query_as!(
                    RunKey,
                    "select tenant_id, id as run_id from inventory_sync_runs
                      where tenant_id = $1 and ($2::text is null or status = $2) order by id desc limit $3",
                    tenant_id,
                    status,
                    i64::from(filter.limit)
                )
                .fetch_all(&self.control)
                .await?
            }
            None => {
                sqlx::query_as!(
                    RunKey,
                    "select tenant_id, id as run_id from inventory_sync_runs
                      where $1::text is null or status = $1 order by id desc limit $2",
                    status,
                    i64::from(filter.limit)
                )
                .fetch_all(&self.control)
                .await?
            }
        };
        self.runs(&keys).await
    }

    /// Runs by key, newest first.
    async fn runs(&self, keys: &[RunKey]) -> Result<Vec<Run>, StoreError> {
        let mut connection = self.control.acquire().await?;
        let rows = rows_of(&mut connection, keys).await?;
        let (tenants, _) = columns(keys);
        let names = sqlx::query!(
            r#"select tenant_id, display_name, clock_timestamp() as "now!" from tenants where tenant_id = any($1)"#,
            &tenants
        )
        .fetch_all(&mut *connection)
        .await?;
        let runs = rows.into_iter().filter_map(|row| {
            let tenant = names.iter().find(|tenant| tenant.tenant_id == row.tenant_id)?;
            let until = row.finished_at.unwrap_or(tenant.now);
            let listed = ListedRun {
                tenant_name: tenant.display_name.clone(),
                duration_s: (until - row.started_at).as_seconds_f64(),
                lease_left_s: row
                    .lease_expires_at
                    .filter(|_| row.finished_at.is_none())
                    .map(|expires_at| (expires_at - tenant.now).as_seconds_f64()),
                row,
            };
            Some(listed.into_run())
        });
        runs.collect()
    }

    /// A run with its types.
    pub async fn show_run(&self, run_id: Uuid) -> Result<Option<RunDetails>, StoreError> {
        let key =
            sqlx::query_as!(RunKey, "select tenant_id, id as run_id from inventory_sync_runs where id = $1", run_id);
        let Some(key) = key.fetch_optional(&self.control).await? else { return Ok(None) };
        let Some(run) = self.runs(&[key]).await?.pop() else { return Ok(None) };
        let types = {
            let mut connection = self.control.acquire().await?;
            outcomes_of(&mut connection, &[key]).await?.remove(&key).unwrap_or_default()
        };
        let observed_so_far = if run.status == RunStatus::Running { self.observed_so_far(&run).await? } else { vec![] };
        Ok(Some(RunDetails { run, types, observed_so_far }))
    }

    /// Counts the items of a running run: progress costs its reader, not the run.
    async fn observed_so_far(&self, run: &Run) -> Result<Vec<(String, i64)>, StoreError> {
        let rows = sqlx::query!(
            r#"select policy_type, count(*) as "count!" from inventory_items
                where tenant_id = $1 and last_seen_run_id = $2 group by policy_type order by policy_type"#,
            run.tenant_id,
            run.run_id
        )
        .fetch_all(&self.control)
        .await?;
        Ok(rows.into_iter().map(|row| (row.policy_type, row.count)).collect())
    }

    /// Run of an idempotency key of a tenant.
    pub async fn find_run(&self, tenant_id: Uuid, idempotency_key: &str) -> Result<Option<Uuid>, StoreError> {
        let run_id = sqlx::query_scalar!(
            "select id from inventory_sync_runs where tenant_id = $1 and idempotency_key = $2",
            tenant_id,
            idempotency_key
        );
        Ok(run_id.fetch_optional(&self.control).await?)
    }

    /// Latest completed run of every selection of a tenant, the latest first.
    pub async fn latest_runs(&self, tenant_id: Uuid) -> Result<Vec<Run>, StoreError> {
        let keys = sqlx::query_as!(
            RunKey,
            "select tenant_id, latest_run_id as run_id from inventory_selections where tenant_id = $1",
            tenant_id
        )
        .fetch_all(&self.control)
        .await?;
        let mut runs = self.runs(&keys).await?;
        runs.sort_by(|one, other| other.finished_at.cmp(&one.finished_at));
        Ok(runs)
    }

    /// Missing items of a selection, relative to its latest completed run; none if there is no such run.
    pub async fn missing(&self, tenant_id: Uuid, selection_hash: &str) -> Result<Vec<MissingItem>, StoreError> {
        let rows = sqlx::query!(
            r#"select policy_type as "policy_type!", external_id as "external_id!", display_name,
                      last_seen_at as "last_seen_at!", last_seen_run_id as "last_seen_run_id!",
                      confidence as "confidence!", type_complete as "type_complete!"
                 from inventory_missing($1, $2) order by 1, 3, 2"#,
            tenant_id,
            selection_hash
        )
        .fetch_all(&self.control)
        .await?;
        let items = rows.into_iter().map(|row| MissingItem {
            policy_type: row.policy_type,
            external_id: row.external_id,
            display_name: row.display_name,
            last_seen_at: rfc3339(row.last_seen_at),
            last_seen_run_id: row.last_seen_run_id,
            confidence: row.confidence,
            type_complete: row.type_complete,
        });
        Ok(items.collect())
    }

    /// Number of runs with a live lease, over all replicas.
    pub async fn running_runs(&self) -> Result<i64, StoreError> {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from inventory_sync_runs
                where status = 'running' and lease_expires_at > clock_timestamp()"#
        );
        Ok(count.fetch_one(&self.control).await?)
    }
}

impl ListedRun {
    fn into_run(self) -> Result<Run, StoreError> {
        let row = self.row;
        Ok(Run {
            run_id: row.id,
            tenant_id: row.tenant_id,
            tenant_name: self.tenant_name,
            counters: row.counters(),
            usage: row.usage(),
            idempotency_key: row.idempotency_key,
            selection_hash: row.selection_hash,
            selection: serde_json::from_value(row.selection_payload).map_err(corrupt_row)?,
            status: row.status.parse().map_err(corrupt_row)?,
            had_errors: row.had_errors,
            error_codes: row.error_codes,
            error_context: row.error_context,
            attempt: row.attempt,
            lease_owner: row.lease_owner,
            lease_left_s: self.lease_left_s,
            correlation_id: row.correlation_id,
            requested_by: row.requested_by,
            started_at: rfc3339(row.started_at),
            finished_at: row.finished_at.map(rfc3339),
            duration_s: self.duration_s,
            retry_after_s: row.retry_after_s,
            daemon_version: row.daemon_version,
        })
    }
}
