//! The life of a run after its admission: types that end, the end itself, and the event that goes with it.

use std::collections::BTreeMap;

use serde_json::Value;
use sqlx::PgConnection;
use tracing::warn;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::event::{RunCompleted, rfc3339};
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::run::{GraphUsage, Lease, RunReport, RunStatus, TypeCounters, TypeOutcome};

/// When a complete listing counts as a suspicious drop.
#[derive(Debug, Clone, Copy)]
pub struct SuspiciousDrop {
    /// It fell below this share of what the previous completed run had ...
    pub share: f64,
    /// ... and that run had at least so many objects.
    pub min_items: i64,
}

impl Store {
    /// Records types that have ended and what they cost Graph, together; marks suspicious drops in `outcomes`.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] if the run is no longer this worker's: then nothing was written.
    pub async fn finish_types(
        &self,
        lease: &Lease,
        outcomes: &mut [TypeOutcome],
        usage: &GraphUsage,
        drop_rule: SuspiciousDrop,
    ) -> Result<(), StoreError> {
        let mut transaction = self.work.begin().await?;
        charge_usage(&mut transaction, lease, usage).await?;
        for outcome in &mut *outcomes {
            outcome.suspicious_drop = insert_type(&mut transaction, lease, outcome, drop_rule).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Ends a run: its row and its event in one transaction, the only truth.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] if the run is no longer this worker's: then nothing was written.
    pub async fn finish_run(&self, lease: &Lease, report: &RunReport) -> Result<(), StoreError> {
        let codes: Vec<String> = report.error_codes().into_iter().map(str::to_owned).collect();
        let mut transaction = self.work.begin().await?;
        charge_usage(&mut transaction, lease, &report.usage).await?;
        end(
            &mut transaction,
            lease.tenant_id,
            lease.run_id,
            &Ending {
                status: report.status(),
                totals: report.totals(),
                error_codes: codes,
                error_context: report.error_context(),
                retry_after_s: report.retry_after_s,
            },
        )
        .await?;
        announce(&mut transaction, &self.deployment, lease.tenant_id, lease.run_id).await?;
        transaction.commit().await?;
        self.event_committed.notify_one();
        Ok(())
    }

    /// Ends runs whose lease has been expired for `abandoned_after_s`, each with its event; says how many.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn end_abandoned_runs(&self, abandoned_after_s: u64) -> Result<u64, StoreError> {
        let abandoned = sqlx::query!(
            "select tenant_id, id from inventory_sync_runs
              where status = 'running' and lease_expires_at < clock_timestamp() - make_interval(secs => $1)
              order by tenant_id limit 100",
            abandoned_after_s as f64
        )
        .fetch_all(&self.control)
        .await?;
        let mut ended = 0;
        for run in abandoned {
            match self.end_if_still_abandoned(run.tenant_id, run.id, abandoned_after_s).await {
                Ok(still) => ended += u64::from(still),
                // One that can't be ended must not keep the others from it.
                Err(error) => warn!(%error, run_id = %run.id, "an abandoned run could not be ended"),
            }
        }
        if ended > 0 {
            self.event_committed.notify_one();
        }
        Ok(ended)
    }

    async fn end_if_still_abandoned(&self, tenant_id: Uuid, run_id: Uuid, after_s: u64) -> Result<bool, StoreError> {
        let mut transaction = self.control.begin().await?;
        // The same order of locks as an admission: the tenant, then its run.
        sqlx::query!("select tenant_id from tenants where tenant_id = $1 for update", tenant_id)
            .fetch_optional(&mut *transaction)
            .await?;
        let still = sqlx::query!(
            "select id from inventory_sync_runs where tenant_id = $1 and id = $2 and status = 'running'
                and lease_expires_at < clock_timestamp() - make_interval(secs => $3) for update",
            tenant_id,
            run_id,
            after_s as f64
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if still.is_some() {
            end_lost(&mut transaction, &self.deployment, tenant_id, run_id).await?;
        }
        transaction.commit().await?;
        Ok(still.is_some())
    }
}

/// Adds what was spent on Graph since the last time, and is the fence of the transaction that it begins.
async fn charge_usage(db: &mut PgConnection, lease: &Lease, usage: &GraphUsage) -> Result<(), StoreError> {
    let fenced = sqlx::query!(
        "update inventory_sync_runs set graph_requests_count = graph_requests_count + $4,
                graph_throttled_count = graph_throttled_count + $5, graph_throttle_wait_ms = graph_throttle_wait_ms + $6,
                items_unclassified_count = items_unclassified_count + $7,
                graph_select_refused_count = graph_select_refused_count + $8
          where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running'",
        lease.tenant_id,
        lease.run_id,
        lease.attempt,
        usage.graph_requests_count,
        usage.graph_throttled_count,
        usage.graph_throttle_wait_ms,
        usage.items_unclassified_count,
        usage.graph_select_refused_count
    )
    .execute(db)
    .await?
    .rows_affected();
    if fenced == 1 { Ok(()) } else { Err(StoreError::LeaseLost) }
}

async fn insert_type(
    db: &mut PgConnection,
    lease: &Lease,
    outcome: &TypeOutcome,
    drop_rule: SuspiciousDrop,
) -> Result<bool, StoreError> {
    let failure = outcome.failure.as_ref().map(|failure| serde_json::to_value(failure).expect("plain data serialises"));
    let counters = &outcome.counters;
    let suspicious = sqlx::query_scalar!(
        r#"with previous as (
             select t.items_observed_count from inventory_sync_runs mine
               join lateral (select p.id from inventory_sync_runs p
                              where p.tenant_id = mine.tenant_id and p.selection_hash = mine.selection_hash
                                and p.status in ('success', 'partial', 'failed')
                              order by p.finished_at desc limit 1) p on true
               join inventory_sync_run_types t on t.tenant_id = mine.tenant_id and t.run_id = p.id
              where mine.tenant_id = $1 and mine.id = $2 and t.policy_type = $3)
           insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
                  items_upserted_count, items_created_count, items_changed_count, errors_count, error_code, failure, suspicious_drop)
           values ($1, $2, $3, case when $4 then 'complete' else 'failed' end, $5, $6, $7, $8, $9, $10, $11,
                  $4 and exists (select from previous
                                  where items_observed_count >= $12 and $5::bigint < items_observed_count * $13::float8))
           on conflict (tenant_id, run_id, policy_type) do nothing
           returning suspicious_drop"#,
        lease.tenant_id,
        lease.run_id,
        outcome.policy_type,
        outcome.complete,
        counters.items_observed_count,
        counters.items_upserted_count,
        counters.items_created_count,
        counters.items_changed_count,
        counters.errors_count,
        outcome.failure.as_ref().map(|failure| failure.code.as_str()),
        failure,
        drop_rule.min_items,
        drop_rule.share
    )
    .fetch_optional(db)
    .await?;
    Ok(suspicious.unwrap_or(false))
}

struct Ending {
    status: RunStatus,
    totals: TypeCounters,
    error_codes: Vec<String>,
    error_context: Value,
    retry_after_s: Option<i32>,
}

async fn end(db: &mut PgConnection, tenant_id: Uuid, run_id: Uuid, ending: &Ending) -> Result<(), StoreError> {
    let totals = &ending.totals;
    let ended = sqlx::query!(
        "update inventory_sync_runs set status = $3, had_errors = $4, error_codes = $5, error_context = $6,
                items_observed_count = $7, items_upserted_count = $8, items_created_count = $9,
                items_changed_count = $10, errors_count = $11, retry_after_s = $12, finished_at = clock_timestamp()
          where tenant_id = $1 and id = $2 and status = 'running'",
        tenant_id,
        run_id,
        ending.status.as_str(),
        totals.errors_count > 0 || !ending.error_codes.is_empty(),
        &ending.error_codes,
        ending.error_context,
        totals.items_observed_count,
        totals.items_upserted_count,
        totals.items_created_count,
        totals.items_changed_count,
        totals.errors_count,
        ending.retry_after_s
    )
    .execute(db)
    .await?
    .rows_affected();
    if ended == 1 { Ok(()) } else { Err(StoreError::LeaseLost) }
}

/// Ends a run whose worker is lost. What its types had counted by then stays counted.
pub(super) async fn end_lost(
    db: &mut PgConnection,
    deployment: &str,
    tenant_id: Uuid,
    run_id: Uuid,
) -> Result<(), StoreError> {
    let outcomes = types_of_run(db, tenant_id, run_id).await?;
    let report = RunReport { outcomes, usage: GraphUsage::default(), retry_after_s: None };
    let mut totals = report.totals();
    totals.errors_count += 1;
    let mut codes = report.error_codes();
    codes.insert(ErrorCode::WorkerLost.as_str());
    end(
        db,
        tenant_id,
        run_id,
        &Ending {
            status: RunStatus::Failed,
            totals,
            error_codes: codes.into_iter().map(str::to_owned).collect(),
            error_context: report.error_context(),
            retry_after_s: None,
        },
    )
    .await?;
    announce(db, deployment, tenant_id, run_id).await
}

/// What earlier attempts of a run have finished.
pub(super) async fn finished_types(
    db: &mut PgConnection,
    lease: &Lease,
) -> Result<BTreeMap<String, TypeOutcome>, StoreError> {
    let outcomes = types_of_run(db, lease.tenant_id, lease.run_id).await?;
    Ok(outcomes.into_iter().map(|outcome| (outcome.policy_type.clone(), outcome)).collect())
}

pub(super) async fn types_of_run(
    db: &mut PgConnection,
    tenant_id: Uuid,
    run_id: Uuid,
) -> Result<Vec<TypeOutcome>, StoreError> {
    let rows = sqlx::query!(
        "select policy_type, status, items_observed_count, items_upserted_count, items_created_count,
                items_changed_count, errors_count, failure, suspicious_drop
           from inventory_sync_run_types where tenant_id = $1 and run_id = $2 order by policy_type",
        tenant_id,
        run_id
    )
    .fetch_all(db)
    .await?;
    let outcomes = rows.into_iter().map(|row| {
        let failure: Option<Failure> = row.failure.map(serde_json::from_value).transpose().map_err(unreadable)?;
        Ok(TypeOutcome {
            policy_type: row.policy_type,
            complete: row.status == "complete",
            counters: TypeCounters {
                items_observed_count: row.items_observed_count,
                items_upserted_count: row.items_upserted_count,
                items_created_count: row.items_created_count,
                items_changed_count: row.items_changed_count,
                errors_count: row.errors_count,
            },
            failure,
            suspicious_drop: row.suspicious_drop,
        })
    });
    outcomes.collect()
}

pub(super) fn unreadable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Row(error.to_string())
}

/// Writes the event of a run that has just ended, in the transaction that ended it.
pub(super) async fn announce(
    db: &mut PgConnection,
    deployment: &str,
    tenant_id: Uuid,
    run_id: Uuid,
) -> Result<(), StoreError> {
    let run = sqlx::query!(
        r#"select r.*, finished_at as "ended_at!",
                  (select count(*) from inventory_missing_of_run($1, $2) m where m.confidence = 'high') as "missing_high!",
                  (select count(*) from inventory_missing_of_run($1, $2) m where m.confidence = 'low') as "missing_low!"
             from inventory_sync_runs r where r.tenant_id = $1 and r.id = $2"#,
        tenant_id,
        run_id
    )
    .fetch_one(&mut *db)
    .await?;
    let error_codes: Result<Vec<ErrorCode>, _> = run.error_codes.iter().map(|code| code.parse()).collect();
    let completed = RunCompleted {
        run_id,
        tenant_id,
        selection_hash: run.selection_hash,
        selection: serde_json::from_value(run.selection_payload).map_err(unreadable)?,
        idempotency_key: run.idempotency_key,
        correlation_id: run.correlation_id.clone(),
        requested_by: run.requested_by,
        status: run.status.parse().map_err(unreadable)?,
        had_errors: run.had_errors,
        error_codes: error_codes.map_err(unreadable)?,
        counters: TypeCounters {
            items_observed_count: run.items_observed_count,
            items_upserted_count: run.items_upserted_count,
            items_created_count: run.items_created_count,
            items_changed_count: run.items_changed_count,
            errors_count: run.errors_count,
        },
        usage: GraphUsage {
            graph_requests_count: run.graph_requests_count,
            graph_throttled_count: run.graph_throttled_count,
            graph_throttle_wait_ms: run.graph_throttle_wait_ms,
            items_unclassified_count: run.items_unclassified_count,
            graph_select_refused_count: run.graph_select_refused_count,
        },
        types: types_of_run(db, tenant_id, run_id).await?,
        started_at: rfc3339(run.started_at),
        finished_at: rfc3339(run.ended_at),
        attempt: run.attempt,
        missing_high_count: run.missing_high,
        missing_low_count: run.missing_low,
        retry_after_s: run.retry_after_s,
        daemon_version: run.daemon_version,
    };
    let routing_key = completed.routing_key();
    let event = completed.into_event(deployment, run.traceparent.clone());
    sqlx::query!(
        "insert into outbox_events (tenant_id, id, routing_key, payload, correlation_id, traceparent)
         values ($1, $2, $3, $4, $5, $6)",
        tenant_id,
        run_id,
        routing_key,
        serde_json::to_string(&event).map_err(unreadable)?,
        run.correlation_id,
        run.traceparent
    )
    .execute(db)
    .await?;
    Ok(())
}
