//! The life of a run after its admission: types that end, the end itself, and the event that goes with it.

use std::sync::Arc;

use sqlx::PgConnection;
use tracing::warn;
use uuid::Uuid;

use super::items::Written;
use super::recording::{Ending, Recording, RunRow, SuspiciousDrop};
use super::transaction::Transaction;
use super::{Store, StoreError, items, recording, run_types, unreadable};
use crate::domain::event::{RunCompleted, rfc3339};
use crate::domain::failure::ErrorCode;
use crate::domain::item::InventoryItem;
use crate::domain::policy_type::PolicyType;
use crate::domain::run::{GraphUsage, Lease, RunReport, RunStatus, TypeCounters, TypeOutcome};

/// What the end of a run goes by.
#[derive(Debug, Clone, Copy)]
pub struct FinishRules {
    /// Rows of one statement.
    pub batch_rows: usize,
    /// When a complete listing counts as a suspicious drop.
    pub suspicious_drop: SuspiciousDrop,
}

/// A type whose last objects are written with the end of its run.
#[derive(Debug)]
pub struct LastType {
    /// The type.
    pub policy_type: Arc<PolicyType>,
    /// What is not written yet.
    pub items: Vec<InventoryItem>,
    /// How it has ended; what is written is added to it.
    pub outcome: TypeOutcome,
}

impl LastType {
    fn add(&mut self, written: &Written) {
        let counters = &mut self.outcome.counters;
        counters.items_upserted_count += written.upserted;
        counters.items_created_count += written.created;
        counters.items_changed_count += written.changed;
    }
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
        let recording = Recording { lease, usage, drop_rule, ending: None };
        recording::record(&self.work, recording, outcomes).await?;
        Ok(())
    }

    /// Ends a run: the last of its objects and types, its row and its event in one transaction, the only truth.
    ///
    /// `report` has the types that are recorded already, and gets those that are recorded here.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] if the run is no longer this worker's: then nothing was written.
    pub async fn finish_run(
        &self,
        lease: &Lease,
        report: &mut RunReport,
        last: Vec<LastType>,
        rules: FinishRules,
    ) -> Result<(), StoreError> {
        let mut transaction = Transaction::begin(&self.work).await?;
        let mut outcomes = Vec::with_capacity(last.len());
        for mut ended in last {
            let items = std::mem::take(&mut ended.items);
            for batch in items.chunks(rules.batch_rows) {
                let written = items::upsert(&mut *transaction, lease, &ended.policy_type, batch).await?;
                ended.add(&written);
            }
            outcomes.push(ended.outcome);
        }
        let recorded = report.outcomes.len();
        report.outcomes.append(&mut outcomes);
        let ending = Ending::of(report);
        let (usage, drop_rule) = (&report.usage, rules.suspicious_drop);
        let recording = Recording { lease, usage, drop_rule, ending: Some(&ending) };
        let run = recording::record(&mut *transaction, recording, &mut report.outcomes[recorded..]).await?;
        report.outcomes.sort_by(|one, other| one.policy_type.cmp(&other.policy_type));
        let types = report.outcomes.clone();
        announce(&mut transaction, &self.deployment, (lease.tenant_id, lease.run_id), (run, types)).await?;
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
            match self.in_time(self.end_if_still_abandoned(run.tenant_id, run.id, abandoned_after_s)).await {
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
        let mut transaction = Transaction::begin(&self.control).await?;
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

/// Ends a run whose worker is lost, and whose row is locked. What its types had counted by then stays counted.
pub(super) async fn end_lost(
    db: &mut PgConnection,
    deployment: &str,
    tenant_id: Uuid,
    run_id: Uuid,
) -> Result<(), StoreError> {
    let attempt = sqlx::query_scalar!(
        "select attempt from inventory_sync_runs where tenant_id = $1 and id = $2",
        tenant_id,
        run_id
    );
    let lease = Lease { tenant_id, run_id, attempt: attempt.fetch_one(&mut *db).await? };
    let outcomes = run_types::of_run(db, tenant_id, run_id).await?;
    let report = RunReport { outcomes, usage: GraphUsage::default(), retry_after_s: None };
    let mut ending = Ending { status: RunStatus::Failed, ..Ending::of(&report) };
    ending.totals.errors_count += 1;
    ending.error_codes.push(ErrorCode::WorkerLost.as_str().to_owned());
    ending.error_codes.sort();
    ending.error_codes.dedup();
    let (usage, drop_rule) = (&report.usage, SuspiciousDrop::NEVER);
    let recording = Recording { lease: &lease, usage, drop_rule, ending: Some(&ending) };
    let run = recording::record(&mut *db, recording, &mut []).await?;
    announce(db, deployment, (tenant_id, run_id), (run, report.outcomes)).await
}

/// Writes the event of a run that has just ended, in the transaction that ended it.
pub(super) async fn announce(
    db: &mut PgConnection,
    deployment: &str,
    (tenant_id, run_id): (Uuid, Uuid),
    (run, types): (RunRow, Vec<TypeOutcome>),
) -> Result<(), StoreError> {
    let ended_at = run.finished_at.ok_or_else(|| unreadable("a run that has ended has no end"))?;
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
        types,
        started_at: rfc3339(run.started_at),
        finished_at: rfc3339(ended_at),
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
