//! Rows of runs and of their types, with one definition each.

use std::collections::HashMap;

use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::StoreError;
use super::error::corrupt_row;
use crate::domain::run::{GraphUsage, RunKey, TypeCounters, TypeOutcome};

/// A row of `inventory_sync_runs`, without what only the admission and the janitor need.
pub(super) struct RunRow {
    pub(super) tenant_id: Uuid,
    pub(super) id: Uuid,
    pub(super) idempotency_key: String,
    pub(super) selection_hash: String,
    pub(super) selection_payload: Value,
    pub(super) status: String,
    pub(super) had_errors: bool,
    pub(super) error_codes: Vec<String>,
    pub(super) error_context: Value,
    pub(super) items_observed_count: i64,
    pub(super) items_upserted_count: i64,
    pub(super) items_created_count: i64,
    pub(super) items_changed_count: i64,
    pub(super) errors_count: i64,
    pub(super) items_unclassified_count: i64,
    pub(super) graph_requests_count: i64,
    pub(super) graph_throttled_count: i64,
    pub(super) graph_throttle_wait_ms: i64,
    pub(super) graph_select_refused_count: i64,
    pub(super) missing_high_count: i64,
    pub(super) missing_low_count: i64,
    pub(super) retry_after_s: Option<i32>,
    pub(super) attempt: i32,
    pub(super) lease_owner: Option<String>,
    pub(super) lease_expires_at: Option<OffsetDateTime>,
    pub(super) correlation_id: Option<String>,
    pub(super) requested_by: Option<String>,
    pub(super) traceparent: Option<String>,
    pub(super) daemon_version: String,
    pub(super) started_at: OffsetDateTime,
    pub(super) finished_at: Option<OffsetDateTime>,
}

impl RunRow {
    pub(super) fn key(&self) -> RunKey {
        RunKey { tenant_id: self.tenant_id, run_id: self.id }
    }

    pub(super) fn counters(&self) -> TypeCounters {
        TypeCounters {
            items_observed_count: self.items_observed_count,
            items_upserted_count: self.items_upserted_count,
            items_created_count: self.items_created_count,
            items_changed_count: self.items_changed_count,
            errors_count: self.errors_count,
        }
    }

    pub(super) fn usage(&self) -> GraphUsage {
        GraphUsage {
            graph_requests_count: self.graph_requests_count,
            graph_throttled_count: self.graph_throttled_count,
            graph_throttle_wait_ms: self.graph_throttle_wait_ms,
            items_unclassified_count: self.items_unclassified_count,
            graph_select_refused_count: self.graph_select_refused_count,
        }
    }
}

/// Rows of runs by key, newest first.
///
/// Every column is named, here and below: a newer version may append columns while this one works, and PostgreSQL refuses a
/// prepared statement over `*` from then on.
pub(super) async fn rows_of(db: &mut PgConnection, runs: &[RunKey]) -> Result<Vec<RunRow>, StoreError> {
    let (tenants, ids) = columns(runs);
    let rows = sqlx::query_as!(
        RunRow,
        "select r.tenant_id, r.id, r.idempotency_key, r.selection_hash, r.selection_payload, r.status, r.had_errors,
                r.error_codes, r.error_context, r.items_observed_count, r.items_upserted_count, r.items_created_count,
                r.items_changed_count, r.errors_count, r.items_unclassified_count, r.graph_requests_count,
                r.graph_throttled_count, r.graph_throttle_wait_ms, r.graph_select_refused_count, r.missing_high_count,
                r.missing_low_count, r.retry_after_s, r.attempt, r.lease_owner, r.lease_expires_at, r.correlation_id,
                r.requested_by, r.traceparent, r.daemon_version, r.started_at, r.finished_at
           from unnest($1::uuid[], $2::uuid[]) as k(tenant_id, run_id)
           join inventory_sync_runs r on r.tenant_id = k.tenant_id and r.id = k.run_id order by r.id desc",
        &tenants,
        &ids
    );
    Ok(rows.fetch_all(db).await?)
}

/// Outcomes of the types of runs, as far as they are recorded, sorted by type.
pub(super) async fn outcomes_of(
    db: &mut PgConnection,
    runs: &[RunKey],
) -> Result<HashMap<RunKey, Vec<TypeOutcome>>, StoreError> {
    let (tenants, ids) = columns(runs);
    let rows = sqlx::query!(
        "select t.tenant_id, t.run_id, t.policy_type, t.status, t.items_observed_count, t.items_upserted_count,
                t.items_created_count, t.items_changed_count, t.errors_count, t.failure, t.suspicious_drop
           from unnest($1::uuid[], $2::uuid[]) as k(tenant_id, run_id)
           join inventory_sync_run_types t on t.tenant_id = k.tenant_id and t.run_id = k.run_id order by t.policy_type",
        &tenants,
        &ids
    )
    .fetch_all(db)
    .await?;
    let mut outcomes: HashMap<RunKey, Vec<TypeOutcome>> = HashMap::with_capacity(runs.len());
    for row in rows {
        let outcome = TypeOutcome {
            policy_type: row.policy_type,
            status: row.status.parse().map_err(corrupt_row)?,
            counters: TypeCounters {
                items_observed_count: row.items_observed_count,
                items_upserted_count: row.items_upserted_count,
                items_created_count: row.items_created_count,
                items_changed_count: row.items_changed_count,
                errors_count: row.errors_count,
            },
            failure: row.failure.map(serde_json::from_value).transpose().map_err(corrupt_row)?,
            suspicious_drop: row.suspicious_drop,
        };
        outcomes.entry(RunKey { tenant_id: row.tenant_id, run_id: row.run_id }).or_default().push(outcome);
    }
    Ok(outcomes)
}

/// Keys as the two parameters of `unnest`.
pub(super) fn columns(runs: &[RunKey]) -> (Vec<Uuid>, Vec<Uuid>) {
    runs.iter().map(|run| (run.tenant_id, run.run_id)).unzip()
}
