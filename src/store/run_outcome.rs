//! Outcomes of a run: types as they end, and the run itself with the last of them.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::batcher::Batched;
use super::items::{BatchCounts, ItemBatch, ItemColumns};
use super::run_row::outcomes_of;
use super::{Store, StoreError};
use crate::domain::failure::ErrorCode;
use crate::domain::run::{GraphUsage, Lease, RunKey, RunReport, RunStatus, TypeCounters, TypeOutcome};

/// Limit of observed objects of a run whose end is part of a batch: a longer one would delay the others.
const MAX_BATCHED_ITEMS: i64 = 100;

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
        let unrecorded = Unrecorded { usage: &report.usage, outcomes: &report.outcomes[recorded..], items: last };
        let call = EndCall::of(lease, &state, unrecorded, rules);
        let is_short = state.totals.items_observed_count <= MAX_BATCHED_ITEMS;
        let batched = if is_short { self.ends.execute(lease.tenant_id, call.to_json()).await? } else { None };
        let ended = match batched {
            Some(executed) => executed.row,
            None => {
                let mut connection = self.work.acquire().await?;
                self.with_timeout(end(&mut connection, &call)).await?
            }
        };
        let (suspicious, written) = ended.into_written()?;
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
        let call = EndCall::of(&lease, &state, unrecorded, rules);
        let ended = self.with_timeout(end(&mut connection, &call)).await?;
        Ok(ended.is_ended)
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

/// Arguments of `inventory_end_run`.
#[derive(Serialize)]
struct EndCall<'a> {
    tenant_id: Uuid,
    run_id: Uuid,
    attempt: i32,
    policy_type: Option<&'a str>,
    category: Option<&'a str>,
    #[serde(flatten)]
    columns: ItemColumns<'a>,
    usage: &'a GraphUsage,
    types: &'a [TypeOutcome],
    drop_share: f64,
    drop_min_items: i64,
    ending: &'a TerminalState,
    event_due_s: u64,
}

impl<'a> EndCall<'a> {
    fn of(lease: &Lease, ending: &'a TerminalState, unrecorded: Unrecorded<'a>, rules: RunEnd) -> Self {
        let policy_type = unrecorded.items.map(|batch| batch.policy_type);
        Self {
            tenant_id: lease.tenant_id,
            run_id: lease.run_id,
            attempt: lease.attempt,
            policy_type: policy_type.map(|of| of.key.as_str()),
            category: policy_type.map(|of| of.category.as_str()),
            columns: unrecorded.items.map(ItemColumns::of).unwrap_or_default(),
            usage: unrecorded.usage,
            types: unrecorded.outcomes,
            drop_share: rules.suspicious_drop.share,
            drop_min_items: rules.suspicious_drop.min_items,
            ending,
            event_due_s: rules.event_due_s,
        }
    }

    fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers always serialise")
    }
}

/// Row of `inventory_end_batch`, or of `inventory_end_run` if there was one.
#[derive(Debug)]
pub(super) struct Ended {
    is_ended: bool,
    suspicious: Option<Vec<String>>,
    upserted: Option<i64>,
    created: Option<i64>,
    changed: Option<i64>,
}

impl Batched for Ended {
    async fn execute(connection: &mut PgConnection, runs: String) -> sqlx::Result<Vec<Self>> {
        let ended = sqlx::query_as!(
            Ended,
            r#"select is_ended as "is_ended!", suspicious, upserted, created, changed
                 from inventory_end_batch($1::text::jsonb)"#,
            runs
        );
        ended.fetch_all(connection).await
    }
}

impl Ended {
    fn into_written(self) -> Result<(Vec<String>, BatchCounts), StoreError> {
        if !self.is_ended {
            return Err(StoreError::LeaseLost);
        }
        let written = BatchCounts {
            upserted: self.upserted.unwrap_or_default(),
            created: self.created.unwrap_or_default(),
            changed: self.changed.unwrap_or_default(),
        };
        Ok((self.suspicious.unwrap_or_default(), written))
    }
}

/// Ends a run under the fence of its lease.
async fn end(connection: &mut PgConnection, call: &EndCall<'_>) -> Result<Ended, StoreError> {
    let columns = &call.columns;
    let ended = sqlx::query_as!(
        Ended,
        r#"select true as "is_ended!", suspicious, upserted, created, changed
           from inventory_end_run($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"#,
        call.tenant_id,
        call.run_id,
        call.attempt,
        call.policy_type,
        call.category,
        &columns.ids as &[&str],
        &columns.names as &[Option<&str>],
        &columns.platforms as &[Option<&str>],
        &columns.metas as &[&str],
        &columns.seen_at,
        json!(call.usage),
        json!(call.types),
        call.drop_share,
        call.drop_min_items,
        json!(call.ending),
        call.event_due_s as f64
    )
    .fetch_optional(connection)
    .await?;
    Ok(ended.unwrap_or(Ended { is_ended: false, suspicious: None, upserted: None, created: None, changed: None }))
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
