//! Outcomes of a run: types as they end, and the run itself with the last of them.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::items::{BatchCounts, ItemBatch, ItemColumns};
use super::run_row::outcomes_of;
use super::{Store, StoreError};
use crate::domain::failure::ErrorCode;
use crate::domain::run::{GraphUsage, Lease, RunKey, RunReport, RunStatus, TypeCounters, TypeOutcome};

/// Rule for a suspicious drop: a complete listing that is much shorter than the one before.
#[derive(Debug, Clone, Copy)]
pub struct SuspiciousDropRule {
    /// Share of the previous complete listing below which a listing is suspicious.
    pub share: f64,
    /// Least size of the previous listing to which the rule applies.
    pub min_items: i64,
}

/// Rules for the end of a run.
#[derive(Debug, Clone, Copy)]
pub struct RunEnd {
    /// Rule for suspicious drops.
    pub suspicious_drop: SuspiciousDropRule,
    /// Seconds that the replica has to publish the event before others may.
    pub event_due_s: u64,
}

/// Columns of the run that its end sets.
#[derive(Serialize)]
struct TerminalState {
    status: RunStatus,
    had_errors: bool,
    error_codes: BTreeSet<&'static str>,
    error_context: Value,
    retry_after_s: Option<i32>,
    #[serde(flatten)]
    totals: TypeCounters,
}

/// Parts of a run that are recorded with its end.
struct Unrecorded<'a> {
    usage: &'a GraphUsage,
    outcomes: &'a [TypeOutcome],
    items: Option<ItemBatch<'a>>,
}

impl Store {
    /// Records types that have ended, and what Graph was asked since the last call; marks suspicious drops in `outcomes`.
    pub async fn record_types(
        &self,
        lease: &Lease,
        outcomes: &mut [TypeOutcome],
        usage: &GraphUsage,
        rule: SuspiciousDropRule,
    ) -> Result<(), StoreError> {
        let mut connection = self.work.acquire().await?;
        let recorded = sqlx::query_scalar!(
            "select inventory_record_types($1, $2, $3, $4, $5, $6, $7)",
            lease.tenant_id,
            lease.run_id,
            lease.attempt,
            json!(usage),
            json!(outcomes),
            rule.share,
            rule.min_items
        )
        .fetch_one(&mut *connection);
        let suspicious = self.with_timeout(async { Ok(recorded.await?) }).await?.ok_or(StoreError::LeaseLost)?;
        mark_suspicious(outcomes, &suspicious);
        Ok(())
    }

    /// Ends a run in one transaction: its last objects, the types from `recorded` on, the run itself, and the fact that its
    /// event is due. The counters of `report` lack the rows of the last objects; they are added.
    pub async fn end_run(
        &self,
        lease: &Lease,
        report: &mut RunReport,
        (recorded, last): (usize, Option<ItemBatch<'_>>),
        rules: RunEnd,
    ) -> Result<BatchCounts, StoreError> {
        let state = TerminalState::of(report);
        let mut connection = self.work.acquire().await?;
        let unrecorded = Unrecorded { usage: &report.usage, outcomes: &report.outcomes[recorded..], items: last };
        let ended = end(&mut connection, lease, &state, unrecorded, rules);
        let (suspicious, written) = self.with_timeout(ended).await?;
        let outcomes = &mut report.outcomes[recorded..];
        mark_suspicious(outcomes, &suspicious);
        let of_last = |outcome: &&mut TypeOutcome| last.is_some_and(|last| last.policy_type.key == outcome.policy_type);
        if let Some(outcome) = outcomes.iter_mut().find(of_last) {
            written.add_to(&mut outcome.counters);
        }
        Ok(written)
    }

    /// Ends a run as failed, `worker_lost`, unless a worker has taken it over. What earlier attempts recorded is kept; every
    /// other type of `policy_types` gets a failed outcome, so that nothing counts as missing for certain. Returns
    /// whether the run was ended.
    pub async fn fail_lost_run(&self, run: RunKey, policy_types: &[String]) -> Result<bool, StoreError> {
        let mut connection = self.control.acquire().await?;
        let lost = sqlx::query!(
            "select attempt from inventory_sync_runs
              where tenant_id = $1 and id = $2 and status = 'running' and lease_expires_at < clock_timestamp()",
            run.tenant_id,
            run.run_id
        )
        .fetch_optional(&mut *connection);
        let Some(lost) = self.with_timeout(async { Ok(lost.await?) }).await? else { return Ok(false) };
        // A take-over from here on changes the attempt, which is the fence of the end.
        let lease = Lease { tenant_id: run.tenant_id, run_id: run.run_id, attempt: lost.attempt };
        let mut outcomes =
            self.with_timeout(outcomes_of(&mut connection, &[run])).await?.remove(&run).unwrap_or_default();
        let recorded = outcomes.len();
        outcomes.extend(lost_outcomes(&outcomes, policy_types));
        let report = RunReport { outcomes, usage: GraphUsage::default(), retry_after_s: None };
        let mut state = TerminalState::of(&report);
        state.status = RunStatus::Failed;
        state.had_errors = true;
        state.error_codes.insert(ErrorCode::WorkerLost.as_str());
        // Nothing was listed now, so nothing can drop; any replica may publish the event at once.
        let rules = RunEnd { suspicious_drop: SuspiciousDropRule { share: 0.0, min_items: i64::MAX }, event_due_s: 0 };
        let unrecorded = Unrecorded { usage: &report.usage, outcomes: &report.outcomes[recorded..], items: None };
        let ended = end(&mut connection, &lease, &state, unrecorded, rules);
        match self.with_timeout(ended).await {
            Ok(_) => Ok(true),
            Err(StoreError::LeaseLost) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl TerminalState {
    fn of(report: &RunReport) -> Self {
        let (error_codes, totals) = (report.error_codes(), report.totals());
        Self {
            status: report.status(),
            had_errors: totals.errors_count > 0 || !error_codes.is_empty(),
            error_codes,
            error_context: report.error_context(),
            retry_after_s: report.retry_after_s,
            totals,
        }
    }
}

/// Ends a run under the fence of `lease`; returns the types with a suspicious drop, and the rows that were written.
async fn end(
    connection: &mut PgConnection,
    lease: &Lease,
    state: &TerminalState,
    unrecorded: Unrecorded<'_>,
    rules: RunEnd,
) -> Result<(Vec<String>, BatchCounts), StoreError> {
    let columns = unrecorded.items.map(ItemColumns::of).unwrap_or_default();
    let policy_type = unrecorded.items.map(|batch| batch.policy_type);
    let ended = sqlx::query!(
        "select suspicious, upserted, created, changed
           from inventory_end_run($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
        lease.tenant_id,
        lease.run_id,
        lease.attempt,
        policy_type.map(|of| of.key.as_str()),
        policy_type.map(|of| of.category.as_str()),
        &columns.ids as &[&str],
        &columns.names as &[Option<&str>],
        &columns.platforms as &[Option<&str>],
        &columns.metas as &[&str],
        &columns.times,
        json!(unrecorded.usage),
        json!(unrecorded.outcomes),
        rules.suspicious_drop.share,
        rules.suspicious_drop.min_items,
        json!(state),
        rules.event_due_s as f64
    )
    .fetch_optional(connection)
    .await?
    .ok_or(StoreError::LeaseLost)?;
    let written = BatchCounts {
        upserted: ended.upserted.unwrap_or_default(),
        created: ended.created.unwrap_or_default(),
        changed: ended.changed.unwrap_or_default(),
    };
    Ok((ended.suspicious.unwrap_or_default(), written))
}

fn mark_suspicious(outcomes: &mut [TypeOutcome], suspicious: &[String]) {
    for outcome in outcomes {
        outcome.suspicious_drop = suspicious.contains(&outcome.policy_type);
    }
}

/// A failed outcome for every type that is not recorded.
fn lost_outcomes(recorded: &[TypeOutcome], policy_types: &[String]) -> Vec<TypeOutcome> {
    let is_recorded = |name: &&String| recorded.iter().any(|outcome| outcome.policy_type == **name);
    let lost = policy_types.iter().filter(|name| !is_recorded(name));
    lost.map(|name| TypeOutcome::failed(name, TypeCounters::default(), ErrorCode::WorkerLost.into())).collect()
}
