//! The policy types of a run, read again: how each of those that are recorded has ended.

use std::collections::BTreeMap;

use sqlx::PgConnection;
use uuid::Uuid;

use super::{StoreError, unreadable};
use crate::domain::failure::Failure;
use crate::domain::run::{Lease, TypeCounters, TypeOutcome};

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
