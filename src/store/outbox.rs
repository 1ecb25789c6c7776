//! Run-completed events: built from the run and its types whenever they are published, and due until the broker has
//! confirmed them. A terminal run and its types never change, so every build of an event has the same bytes.

use time::OffsetDateTime;
use uuid::Uuid;

use super::error::corrupt_row;
use super::run_row::{RunRow, columns, outcomes_of, rows_of};
use super::{Store, StoreError};
use crate::domain::event::{RunCompleted, rfc3339};
use crate::domain::run::{RunKey, RunStatus, TypeOutcome};

/// Events that wait for a confirmation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Backlog {
    /// Number of events.
    pub unsent: i64,
    /// Age of the oldest, in seconds by the database clock.
    pub oldest_age_s: f64,
}

/// Runs whose events are to be published again.
#[derive(Debug, Clone, Copy)]
pub struct ReplayFilter {
    /// Runs that ended at this time or later.
    pub since: OffsetDateTime,
    /// Runs that ended before this time.
    pub until: Option<OffsetDateTime>,
    /// Runs of this tenant only.
    pub tenant_id: Option<Uuid>,
    /// Runs with this status only.
    pub status: Option<RunStatus>,
}

impl Store {
    /// Builds the events of completed runs, in no particular order. A run that was deleted meanwhile has none.
    pub async fn load_events(&self, runs: &[RunKey]) -> Result<Vec<(RunCompleted, Option<String>)>, StoreError> {
        let load = async {
            let mut connection = self.control.acquire().await?;
            let rows = rows_of(&mut connection, runs).await?;
            let mut outcomes = outcomes_of(&mut connection, runs).await?;
            let events = rows.into_iter().map(|row| {
                let types = outcomes.remove(&row.key()).unwrap_or_default();
                let traceparent = row.traceparent.clone();
                Ok((completed(row, types)?, traceparent))
            });
            events.collect()
        };
        self.with_timeout(load).await
    }

    /// Claims events that are due, for `claim_s` seconds.
    pub async fn claim_due_events(&self, limit: u32, claim_s: u64) -> Result<Vec<RunKey>, StoreError> {
        // The claim is committed before anything is published, so that no transaction stays open meanwhile.
        let claimed = sqlx::query_as!(
            RunKey,
            r#"select tenant_id as "tenant_id!", run_id as "run_id!" from inventory_claim_due_events($1, $2)"#,
            i64::from(limit),
            claim_s as f64
        );
        self.with_timeout(async { Ok(claimed.fetch_all(&self.control).await?) }).await
    }

    /// Removes events that the broker has confirmed. If this fails they are published once more, with the same ids.
    pub async fn remove_confirmed_events(&self, runs: &[RunKey]) -> Result<(), StoreError> {
        let (tenants, ids) = columns(runs);
        let removed = sqlx::query!(
            "delete from outbox o using unnest($1::uuid[], $2::uuid[]) as k(tenant_id, run_id)
              where o.tenant_id = k.tenant_id and o.run_id = k.run_id",
            &tenants,
            &ids
        );
        self.with_timeout(async { Ok(removed.execute(&self.control).await?) }).await?;
        Ok(())
    }

    /// Delays events that no queue took: they are due again after a wait that doubles with each attempt, from five seconds to
    /// five minutes.
    pub async fn delay_events(&self, runs: &[RunKey]) -> Result<(), StoreError> {
        let (tenants, ids) = columns(runs);
        let delayed = sqlx::query!(
            "update outbox o
                set attempts = greatest(attempts, 1),
                    due_at = to_timestamp(extract(epoch from statement_timestamp())::float8
                      + least(5 * power(2, least(greatest(attempts, 1), 10) - 1), 300))
               from unnest($1::uuid[], $2::uuid[]) as k(tenant_id, run_id)
              where o.tenant_id = k.tenant_id and o.run_id = k.run_id",
            &tenants,
            &ids
        );
        self.with_timeout(async { Ok(delayed.execute(&self.control).await?) }).await?;
        Ok(())
    }

    /// Makes events due at once that did not reach a broker, for whichever replica reaches one first.
    pub async fn release_events(&self, runs: &[RunKey]) -> Result<(), StoreError> {
        let (tenants, ids) = columns(runs);
        let released = sqlx::query!(
            "update outbox o set due_at = statement_timestamp(), attempts = greatest(attempts - 1, 0)
               from unnest($1::uuid[], $2::uuid[]) as k(tenant_id, run_id)
              where o.tenant_id = k.tenant_id and o.run_id = k.run_id",
            &tenants,
            &ids
        );
        self.with_timeout(async { Ok(released.execute(&self.control).await?) }).await?;
        Ok(())
    }

    /// Number and age of the events that wait.
    pub async fn outbox_backlog(&self) -> Result<Backlog, StoreError> {
        let backlog = sqlx::query_as!(
            Backlog,
            r#"select count(*) as "unsent!",
                      coalesce(extract(epoch from clock_timestamp() - min(committed_at)), 0)::float8 as "oldest_age_s!"
                 from outbox"#
        );
        self.with_timeout(async { Ok(backlog.fetch_one(&self.control).await?) }).await
    }

    /// Completed runs to publish again, oldest first, at most `limit` with an id above `after`.
    pub async fn runs_to_replay(
        &self,
        filter: &ReplayFilter,
        after: Uuid,
        limit: u32,
    ) -> Result<Vec<RunKey>, StoreError> {
        let runs = sqlx::query_as!(
            RunKey,
            "select tenant_id, id as run_id from inventory_sync_runs
              where id > $1 and finished_at >= $2 and ($3::timestamptz is null or finished_at < $3)
                and ($4::uuid is null or tenant_id = $4) and ($5::text is null or status = $5)
              order by id limit $6",
            after,
            filter.since,
            filter.until,
            filter.tenant_id,
            filter.status.map(RunStatus::as_str),
            i64::from(limit)
        );
        self.with_timeout(async { Ok(runs.fetch_all(&self.control).await?) }).await
    }
}

/// Projects a terminal run and its types onto the event.
fn completed(run: RunRow, types: Vec<TypeOutcome>) -> Result<RunCompleted, StoreError> {
    let finished_at = run.finished_at.ok_or_else(|| corrupt_row("a run in the outbox has not ended"))?;
    let error_codes: Result<Vec<_>, _> = run.error_codes.iter().map(|code| code.parse()).collect();
    Ok(RunCompleted {
        run_id: run.id,
        tenant_id: run.tenant_id,
        counters: run.counters(),
        usage: run.usage(),
        selection_hash: run.selection_hash,
        selection: serde_json::from_value(run.selection_payload).map_err(corrupt_row)?,
        idempotency_key: run.idempotency_key,
        correlation_id: run.correlation_id,
        requested_by: run.requested_by,
        status: run.status.parse().map_err(corrupt_row)?,
        had_errors: run.had_errors,
        error_codes: error_codes.map_err(corrupt_row)?,
        types,
        started_at: rfc3339(run.started_at),
        finished_at: rfc3339(finished_at),
        attempt: run.attempt,
        missing_high_count: run.missing_high_count,
        missing_low_count: run.missing_low_count,
        retry_after_s: run.retry_after_s,
        daemon_version: run.daemon_version,
    })
}
