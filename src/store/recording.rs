//! What has ended, recorded: types as they end, and the run itself with the last of them.

use serde_json::Value;
use sqlx::PgExecutor;
use time::OffsetDateTime;

use super::StoreError;
use crate::domain::failure::Failure;
use crate::domain::run::{GraphUsage, Lease, RunReport, RunStatus, TypeCounters, TypeOutcome};

/// When a complete listing counts as a suspicious drop.
#[derive(Debug, Clone, Copy)]
pub struct SuspiciousDrop {
    /// It fell below this share of what the previous completed run had ...
    pub share: f64,
    /// ... and that run had at least so many objects.
    pub min_items: i64,
}

impl SuspiciousDrop {
    /// Where nothing is listed, nothing drops.
    pub(super) const NEVER: Self = Self { share: 0.0, min_items: i64::MAX };
}

/// How a run ends.
pub(super) struct Ending {
    pub(super) status: RunStatus,
    pub(super) totals: TypeCounters,
    pub(super) error_codes: Vec<String>,
    pub(super) error_context: Value,
    pub(super) retry_after_s: Option<i32>,
}

impl Ending {
    pub(super) fn of(report: &RunReport) -> Self {
        Self {
            status: report.status(),
            totals: report.totals(),
            error_codes: report.error_codes().into_iter().map(str::to_owned).collect(),
            error_context: report.error_context(),
            retry_after_s: report.retry_after_s,
        }
    }

    pub(super) fn had_errors(&self) -> bool {
        self.totals.errors_count > 0 || !self.error_codes.is_empty()
    }
}

/// What the event of a run says of it.
pub(super) struct RunRow {
    pub(super) selection_hash: String,
    pub(super) selection_payload: Value,
    pub(super) idempotency_key: String,
    pub(super) correlation_id: Option<String>,
    pub(super) requested_by: Option<String>,
    pub(super) traceparent: Option<String>,
    pub(super) status: String,
    pub(super) had_errors: bool,
    pub(super) error_codes: Vec<String>,
    pub(super) items_observed_count: i64,
    pub(super) items_upserted_count: i64,
    pub(super) items_created_count: i64,
    pub(super) items_changed_count: i64,
    pub(super) errors_count: i64,
    pub(super) graph_requests_count: i64,
    pub(super) graph_throttled_count: i64,
    pub(super) graph_throttle_wait_ms: i64,
    pub(super) items_unclassified_count: i64,
    pub(super) graph_select_refused_count: i64,
    pub(super) retry_after_s: Option<i32>,
    pub(super) attempt: i32,
    pub(super) started_at: OffsetDateTime,
    pub(super) finished_at: Option<OffsetDateTime>,
    pub(super) daemon_version: String,
    /// Types of which far fewer objects were listed than before.
    pub(super) suspicious: Vec<String>,
    pub(super) missing_high: i64,
    pub(super) missing_low: i64,
}

/// What goes with types that have ended.
pub(super) struct Recording<'a> {
    pub(super) lease: &'a Lease,
    /// What was spent on Graph since the last time.
    pub(super) usage: &'a GraphUsage,
    pub(super) drop_rule: SuspiciousDrop,
    /// The end of the run, if these types are its last.
    pub(super) ending: Option<&'a Ending>,
}

/// Records types that have ended, and ends the run with them if they are the last. One statement: its first part is the
/// fence of the rest. What is missing is counted as `inventory_missing_of_run` would, once all of it is there.
pub(super) async fn record(
    db: impl PgExecutor<'_>,
    Recording { lease, usage, drop_rule, ending }: Recording<'_>,
    outcomes: &mut [TypeOutcome],
) -> Result<RunRow, StoreError> {
    let Columns { names, complete, failures, codes, counters: [observed, upserted, created, changed, errors] } =
        Columns::of(outcomes);
    let totals = ending.map(|ending| ending.totals);
    let run = sqlx::query_as!(
        RunRow,
        r#"with fence as (
             update inventory_sync_runs set graph_requests_count = graph_requests_count + $4,
                    graph_throttled_count = graph_throttled_count + $5, graph_throttle_wait_ms = graph_throttle_wait_ms + $6,
                    items_unclassified_count = items_unclassified_count + $7,
                    graph_select_refused_count = graph_select_refused_count + $8, status = coalesce($20, status),
                    finished_at = case when $20::text is not null then clock_timestamp() end,
                    had_errors = coalesce($21, had_errors), error_codes = coalesce($22, error_codes),
                    error_context = coalesce($23, error_context), retry_after_s = $24,
                    items_observed_count = coalesce($25, items_observed_count),
                    items_upserted_count = coalesce($26, items_upserted_count),
                    items_created_count = coalesce($27, items_created_count),
                    items_changed_count = coalesce($28, items_changed_count), errors_count = coalesce($29, errors_count)
              where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running' returning *),
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
             returning policy_type, suspicious_drop),
           covered as (
             select policy_type, suspicious_drop from recorded
              union all select policy_type, suspicious_drop from inventory_sync_run_types where tenant_id = $1 and run_id = $2),
           missing as (
             select r.status = 'success' and not r.had_errors and not c.suspicious_drop as for_sure
               from fence r, covered c join inventory_items i on i.tenant_id = $1 and i.policy_type = c.policy_type
              where r.finished_at is not null and i.last_seen_at < r.started_at)
           select r.selection_hash, r.selection_payload, r.idempotency_key, r.correlation_id, r.requested_by, r.traceparent,
                  r.status, r.had_errors, r.error_codes, r.items_observed_count, r.items_upserted_count,
                  r.items_created_count, r.items_changed_count, r.errors_count, r.graph_requests_count,
                  r.graph_throttled_count, r.graph_throttle_wait_ms, r.items_unclassified_count,
                  r.graph_select_refused_count, r.retry_after_s, r.attempt, r.started_at, r.finished_at, r.daemon_version,
                  array(select policy_type from recorded where suspicious_drop) as "suspicious!",
                  (select count(*) from missing where for_sure) as "missing_high!",
                  (select count(*) from missing where not for_sure) as "missing_low!"
             from fence r"#,
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
        &errors,
        ending.map(|ending| ending.status.as_str()),
        ending.map(Ending::had_errors),
        ending.map(|ending| ending.error_codes.as_slice()),
        ending.map(|ending| &ending.error_context),
        ending.and_then(|ending| ending.retry_after_s),
        totals.map(|totals| totals.items_observed_count),
        totals.map(|totals| totals.items_upserted_count),
        totals.map(|totals| totals.items_created_count),
        totals.map(|totals| totals.items_changed_count),
        totals.map(|totals| totals.errors_count)
    )
    .fetch_optional(db)
    .await?
    .ok_or(StoreError::LeaseLost)?;
    for outcome in outcomes {
        outcome.suspicious_drop = run.suspicious.contains(&outcome.policy_type);
    }
    Ok(run)
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
