//! The policy types of a run: how each has ended, recorded as they end.

use std::collections::BTreeMap;

use sqlx::{PgConnection, PgExecutor};
use uuid::Uuid;

use super::StoreError;
use super::runs::{SuspiciousDrop, unreadable};
use crate::domain::failure::Failure;
use crate::domain::run::{GraphUsage, Lease, TypeCounters, TypeOutcome};

/// Records types that have ended, and adds to the run what was spent on Graph since the last time. One statement: its
/// first part is the fence of the rest.
pub(super) async fn record(
    db: impl PgExecutor<'_>,
    lease: &Lease,
    outcomes: &mut [TypeOutcome],
    usage: &GraphUsage,
    drop_rule: SuspiciousDrop,
) -> Result<(), StoreError> {
    let Columns { names, complete, failures, codes, counters: [observed, upserted, created, changed, errors] } =
        Columns::of(outcomes);
    let recorded = sqlx::query!(
        r#"with fence as (
             update inventory_sync_runs set graph_requests_count = graph_requests_count + $4,
                    graph_throttled_count = graph_throttled_count + $5, graph_throttle_wait_ms = graph_throttle_wait_ms + $6,
                    items_unclassified_count = items_unclassified_count + $7,
                    graph_select_refused_count = graph_select_refused_count + $8
              where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running' returning selection_hash),
           previous as (
             select o.name as policy_type, p.observed
               from fence, unnest($11::text[]) o(name),
                    lateral (select t.items_observed_count as observed
                               from inventory_sync_runs p
                               join inventory_sync_run_types t on t.tenant_id = p.tenant_id and t.run_id = p.id
                              where p.tenant_id = $1 and p.selection_hash = fence.selection_hash
                                and p.status in ('success', 'partial', 'failed')
                                and t.policy_type = o.name and t.status = 'complete'
                              order by p.finished_at desc limit 1) p),
           recorded as (
             insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
                    items_upserted_count, items_created_count, items_changed_count, errors_count, error_code, failure,
                    suspicious_drop)
             select $1, $2, o.name, case when o.complete then 'complete' else 'failed' end, o.observed, o.upserted,
                    o.created, o.changed, o.errors, o.code, o.failure::jsonb,
                    o.complete and exists (select from previous p where p.policy_type = o.name
                                              and p.observed >= $9 and o.observed < p.observed * $10::float8)
               from fence, unnest($11::text[], $12::bool[], $13::text[], $14::text[], $15::bigint[], $16::bigint[],
                                  $17::bigint[], $18::bigint[], $19::bigint[])
                           o(name, complete, failure, code, observed, upserted, created, changed, errors)
             on conflict (tenant_id, run_id, policy_type) do nothing
             returning policy_type, suspicious_drop)
           select exists (select from fence) as "fenced!",
                  array(select policy_type from recorded where suspicious_drop) as "suspicious!""#,
        lease.tenant_id,
        lease.run_id,
        lease.attempt,
        usage.graph_requests_count,
        usage.graph_throttled_count,
        usage.graph_throttle_wait_ms,
        usage.items_unclassified_count,
        usage.graph_select_refused_count,
        drop_rule.min_items,
        drop_rule.share,
        &names,
        &complete,
        &failures as &[Option<String>],
        &codes as &[Option<&str>],
        &observed,
        &upserted,
        &created,
        &changed,
        &errors
    )
    .fetch_one(db)
    .await?;
    if !recorded.fenced {
        return Err(StoreError::LeaseLost);
    }
    for outcome in outcomes {
        outcome.suspicious_drop = recorded.suspicious.contains(&outcome.policy_type);
    }
    Ok(())
}

/// Outcomes as PostgreSQL takes many of them at once.
struct Columns {
    names: Vec<String>,
    complete: Vec<bool>,
    failures: Vec<Option<String>>,
    codes: Vec<Option<&'static str>>,
    counters: [Vec<i64>; 5],
}

impl Columns {
    fn of(outcomes: &[TypeOutcome]) -> Self {
        let text = |failure: &Failure| serde_json::to_string(failure).expect("plain data serialises");
        let count = |of: fn(&TypeCounters) -> i64| outcomes.iter().map(|outcome| of(&outcome.counters)).collect();
        Self {
            names: outcomes.iter().map(|outcome| outcome.policy_type.clone()).collect(),
            complete: outcomes.iter().map(|outcome| outcome.complete).collect(),
            failures: outcomes.iter().map(|outcome| outcome.failure.as_ref().map(text)).collect(),
            codes: outcomes.iter().map(|outcome| outcome.failure.as_ref().map(|f| f.code.as_str())).collect(),
            counters: [
                count(|counters| counters.items_observed_count),
                count(|counters| counters.items_upserted_count),
                count(|counters| counters.items_created_count),
                count(|counters| counters.items_changed_count),
                count(|counters| counters.errors_count),
            ],
        }
    }
}

/// What earlier attempts of a run have finished.
pub(super) async fn finished(
    db: &mut PgConnection,
    lease: &Lease,
) -> Result<BTreeMap<String, TypeOutcome>, StoreError> {
    let outcomes = of_run(db, lease.tenant_id, lease.run_id).await?;
    Ok(outcomes.into_iter().map(|outcome| (outcome.policy_type.clone(), outcome)).collect())
}

pub(super) async fn of_run(
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
