//! What the command line and other readers ask for.

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::{Store, StoreError, run_types, unreadable};
use crate::domain::event::rfc3339;
use crate::domain::run::{GraphUsage, RunStatus, TypeCounters, TypeOutcome};
use crate::domain::selection::Selection;

/// Which runs to list, newest first.
#[derive(Debug, Clone)]
pub struct RunFilter {
    /// Of this tenant only.
    pub tenant_id: Option<Uuid>,
    /// In this state only.
    pub status: Option<RunStatus>,
    /// So many at most.
    pub limit: u32,
}

/// A run as its row says.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// The run.
    pub run_id: Uuid,
    /// The tenant.
    pub tenant_id: Uuid,
    /// The tenant's name.
    pub tenant_name: String,
    /// The request's key.
    pub idempotency_key: String,
    /// The hash of the selection.
    pub selection_hash: String,
    /// The selection.
    pub selection: Selection,
    /// Its state.
    pub status: RunStatus,
    /// Whether anything went wrong.
    pub had_errors: bool,
    /// The distinct error codes, sorted.
    pub error_codes: Vec<String>,
    /// The failures by type.
    pub error_context: Value,
    /// Sums over all types.
    #[serde(flatten)]
    pub counters: TypeCounters,
    /// What it cost Graph.
    #[serde(flatten)]
    pub usage: GraphUsage,
    /// How many workers held it.
    pub attempt: i32,
    /// The replica that holds it.
    pub lease_owner: Option<String>,
    /// Seconds that its lease has left by the database's clock; none unless it is running.
    pub lease_left_s: Option<f64>,
    /// Handed through from the request.
    pub correlation_id: Option<String>,
    /// Handed through from the request.
    pub requested_by: Option<String>,
    /// When it began, RFC 3339.
    pub started_at: String,
    /// When it ended, RFC 3339.
    pub finished_at: Option<String>,
    /// Seconds from its beginning to its end, or until now.
    pub duration_s: f64,
    /// Seconds after which to ask again.
    pub retry_after_s: Option<i32>,
    /// The daemon's version.
    pub daemon_version: String,
}

/// A run with what is known of its types.
#[derive(Debug, Clone, Serialize)]
pub struct RunDetails {
    /// The run.
    #[serde(flatten)]
    pub run: Run,
    /// The types that have ended.
    pub types: Vec<TypeOutcome>,
    /// While it runs: items observed so far of every type, ended or not.
    pub observed_so_far: Vec<(String, i64)>,
}

/// An item that is missing.
#[derive(Debug, Clone, Serialize)]
pub struct MissingItem {
    /// The kind of object.
    pub policy_type: String,
    /// Graph's id of it.
    pub external_id: String,
    /// Its name.
    pub display_name: Option<String>,
    /// When it was last observed, RFC 3339.
    pub last_seen_at: String,
    /// The run that last observed it.
    pub last_seen_run_id: Uuid,
    /// `high` or `low`.
    pub confidence: String,
    /// Whether its type was read to its end.
    pub type_complete: bool,
}

impl Store {
    /// Runs, newest first.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn list_runs(&self, filter: &RunFilter) -> Result<Vec<Run>, StoreError> {
        self.read_runs(filter, None).await
    }

    async fn read_runs(&self, filter: &RunFilter, run_id: Option<Uuid>) -> Result<Vec<Run>, StoreError> {
        let rows = sqlx::query!(
            r#"select r.*, t.display_name as tenant_name,
                      extract(epoch from coalesce(finished_at, clock_timestamp()) - started_at)::float8 as "duration_s!",
                      case when status = 'running' then extract(epoch from lease_expires_at - clock_timestamp())::float8 end
                        as lease_left_s
                 from inventory_sync_runs r join tenants t using (tenant_id)
                where ($1::uuid is null or r.tenant_id = $1) and ($2::text is null or r.status = $2)
                  and ($3::uuid is null or r.id = $3)
                order by r.id desc limit $4"#,
            filter.tenant_id,
            filter.status.map(RunStatus::as_str),
            run_id,
            i64::from(filter.limit)
        )
        .fetch_all(&self.control)
        .await?;
        let runs = rows.into_iter().map(|row| {
            Ok(Run {
                run_id: row.id,
                tenant_id: row.tenant_id,
                tenant_name: row.tenant_name,
                idempotency_key: row.idempotency_key,
                selection_hash: row.selection_hash,
                selection: serde_json::from_value(row.selection_payload).map_err(unreadable)?,
                status: row.status.parse().map_err(unreadable)?,
                had_errors: row.had_errors,
                error_codes: row.error_codes,
                error_context: row.error_context,
                counters: TypeCounters {
                    items_observed_count: row.items_observed_count,
                    items_upserted_count: row.items_upserted_count,
                    items_created_count: row.items_created_count,
                    items_changed_count: row.items_changed_count,
                    errors_count: row.errors_count,
                },
                usage: GraphUsage {
                    graph_requests_count: row.graph_requests_count,
                    graph_throttled_count: row.graph_throttled_count,
                    graph_throttle_wait_ms: row.graph_throttle_wait_ms,
                    items_unclassified_count: row.items_unclassified_count,
                    graph_select_refused_count: row.graph_select_refused_count,
                },
                attempt: row.attempt,
                lease_owner: row.lease_owner,
                lease_left_s: row.lease_left_s,
                correlation_id: row.correlation_id,
                requested_by: row.requested_by,
                started_at: rfc3339(row.started_at),
                finished_at: row.finished_at.map(rfc3339),
                duration_s: row.duration_s,
                retry_after_s: row.retry_after_s,
                daemon_version: row.daemon_version,
            })
        });
        runs.collect()
    }

    /// One run with what is known of its types.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn show_run(&self, run_id: Uuid) -> Result<Option<RunDetails>, StoreError> {
        let filter = RunFilter { tenant_id: None, status: None, limit: 1 };
        let Some(run) = self.read_runs(&filter, Some(run_id)).await?.pop() else { return Ok(None) };
        let types = {
            let mut connection = self.control.acquire().await?;
            run_types::of_run(&mut connection, run.tenant_id, run_id).await?
        };
        let observed_so_far = if run.status == RunStatus::Running { self.observed_so_far(&run).await? } else { vec![] };
        Ok(Some(RunDetails { run, types, observed_so_far }))
    }

    /// Progress costs its reader, not the run: what a run has observed so far is counted from the items themselves.
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

    /// The run that a tenant's key has made.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn find_run(&self, tenant_id: Uuid, idempotency_key: &str) -> Result<Option<Uuid>, StoreError> {
        let run_id = sqlx::query_scalar!(
            "select id from inventory_sync_runs where tenant_id = $1 and idempotency_key = $2",
            tenant_id,
            idempotency_key
        );
        Ok(run_id.fetch_optional(&self.control).await?)
    }

    /// The latest completed run of every selection of a tenant.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn latest_runs(&self, tenant_id: Uuid) -> Result<Vec<Run>, StoreError> {
        let ids = sqlx::query_scalar!(
            r#"select run_id as "run_id!" from inventory_latest_runs where tenant_id = $1 order by finished_at desc"#,
            tenant_id
        )
        .fetch_all(&self.control)
        .await?;
        let filter = RunFilter { tenant_id: Some(tenant_id), status: None, limit: 1 };
        let mut runs = Vec::with_capacity(ids.len());
        for run_id in ids {
            runs.extend(self.read_runs(&filter, Some(run_id)).await?);
        }
        Ok(runs)
    }

    /// What is missing of a selection, relative to its latest completed run; nothing if there is none.
    ///
    /// # Errors
    /// If the database is away.
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

    /// Runs that a live lease holds, over all replicas.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn running_runs(&self) -> Result<i64, StoreError> {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from inventory_sync_runs
                where status = 'running' and lease_expires_at > clock_timestamp()"#
        );
        Ok(count.fetch_one(&self.control).await?)
    }
}
