//! Leases: renewal, hand-back, and the runs whose lease expired.

use tracing::warn;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::request::{SCHEMA_VERSION, SyncRequest};
use crate::domain::run::{Lease, RunKey};

/// Leases that one statement renewed. The others are lost, or their row was locked at that moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Renewed {
    /// Renewed leases.
    pub leases: Vec<Lease>,
    /// Least time that was left on any of them, in seconds by the database clock; infinite if there is none.
    pub least_left_s: f64,
}

/// A run whose lease expired a while ago.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InterruptedRun {
    /// Request to publish again, with its trace context.
    Restart(SyncRequest, Option<String>),
    /// Run without attempts left, or that nothing restarted for a day.
    GiveUp(RunKey, SyncRequest),
}

impl Store {
    /// Renews leases in one statement. A lease that has expired is not renewed, even if no other worker has taken it over.
    pub async fn renew_leases(&self, leases: &[Lease], owner: &str, lease_s: u64) -> Result<Renewed, StoreError> {
        let tenants: Vec<Uuid> = leases.iter().map(|lease| lease.tenant_id).collect();
        let runs: Vec<Uuid> = leases.iter().map(|lease| lease.run_id).collect();
        let attempts: Vec<i32> = leases.iter().map(|lease| lease.attempt).collect();
        let rows = sqlx::query!(
            r#"select tenant_id as "tenant_id!", run_id as "run_id!", attempt as "attempt!", left_s as "left_s!"
                 from inventory_renew_leases($1, $2, $3, $4, $5)"#,
            &tenants,
            &runs,
            &attempts,
            owner,
            lease_s as f64
        )
        .fetch_all(&self.leases)
        .await?;
        let least_left_s = rows.iter().map(|row| row.left_s).fold(f64::INFINITY, f64::min);
        let leases = rows
            .iter()
            .map(|row| Lease { tenant_id: row.tenant_id, run_id: row.run_id, attempt: row.attempt })
            .collect();
        Ok(Renewed { leases, least_left_s })
    }

    /// Hands back a lease: another replica may take the run over at once, and no attempt is counted.
    ///
    /// If its row is locked nothing happens, and the lease expires: neither a stop nor another run waits for a session
    /// that lingers in a dead transaction.
    pub async fn hand_back_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        let handed_back = sqlx::query!(
            "with free as (
               select tenant_id, id from inventory_sync_runs
                where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running' for no key update skip locked)
             update inventory_sync_runs r set lease_owner = null, lease_expires_at = statement_timestamp()
               from free f where r.tenant_id = f.tenant_id and r.id = f.id",
            lease.tenant_id,
            lease.run_id,
            lease.attempt
        )
        .execute(&self.control);
        self.with_timeout(async { Ok(handed_back.await?) }).await?;
        Ok(())
    }

    /// Runs that need the janitor, at most `limit`: those whose lease expired `restart_after_s` ago and whose request is due to be
    /// published again, and those to be given up.
    ///
    /// The first restart is due `restart_after_s` after the end of the lease, each further one after twice the time, so that a
    /// backlog of hours does not fill with copies. A run is given up when its attempts are used up, or when no worker took
    /// it over for `give_up_after_s` after its request was published again.
    pub async fn claim_interrupted_runs(
        &self,
        restart_after_s: u64,
        give_up_after_s: u64,
        max_attempts: i32,
        limit: u32,
    ) -> Result<Vec<InterruptedRun>, StoreError> {
        let claimed = sqlx::query!(
            r#"select tenant_id as "tenant_id!", run_id as "run_id!", idempotency_key as "idempotency_key!",
                      selection_payload as "selection_payload!", correlation_id, requested_by, traceparent, give_up as "give_up!"
                 from inventory_claim_interrupted_runs($1, $2, $3, $4)"#,
            restart_after_s as f64,
            give_up_after_s as f64,
            max_attempts,
            i64::from(limit)
        )
        .fetch_all(&self.control);
        let claimed = self.with_timeout(async { Ok(claimed.await?) }).await?;
        let runs = claimed.into_iter().filter_map(|row| {
            let run = RunKey { tenant_id: row.tenant_id, run_id: row.run_id };
            let selection = serde_json::from_value(row.selection_payload)
                // An unreadable run must not delay the others.
                .inspect_err(
                    |error| warn!(%error, run_id = %run.run_id, "the selection of an interrupted run cannot be read"),
                )
                .ok()?;
            let request = SyncRequest {
                schema_version: SCHEMA_VERSION,
                tenant_id: row.tenant_id,
                idempotency_key: row.idempotency_key,
                selection,
                correlation_id: row.correlation_id,
                requested_by: row.requested_by,
            };
            Some(if row.give_up {
                InterruptedRun::GiveUp(run, request)
            } else {
                InterruptedRun::Restart(request, row.traceparent)
            })
        });
        Ok(runs.collect())
    }
}
