//! Leases: renewed together, handed back in order.

use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::run::Lease;

/// What a renewal has found.
#[derive(Debug, Clone, PartialEq)]
pub struct Renewal {
    /// The leases that go on; every other one is lost.
    pub kept: Vec<Lease>,
    /// Least time that was left on any of them, in seconds of the database's clock.
    pub least_left_s: f64,
}

impl Store {
    /// Renews all leases of a process in one statement on the control pool. A lease that has expired is not taken
    /// back, even if nobody else has it yet.
    ///
    /// # Errors
    /// If the database is away; then nothing is known of any of them.
    pub async fn renew_leases(&self, leases: &[Lease], owner: &str, lease_s: u64) -> Result<Renewal, StoreError> {
        let tenants: Vec<Uuid> = leases.iter().map(|lease| lease.tenant_id).collect();
        let runs: Vec<Uuid> = leases.iter().map(|lease| lease.run_id).collect();
        let attempts: Vec<i32> = leases.iter().map(|lease| lease.attempt).collect();
        let rows = sqlx::query!(
            r#"with held as (
                 select r.tenant_id, r.id, r.attempt, r.lease_expires_at - clock_timestamp() as left_over
                   from unnest($1::uuid[], $2::uuid[], $3::int[]) as l(tenant_id, id, attempt)
                   join inventory_sync_runs r on r.tenant_id = l.tenant_id and r.id = l.id and r.attempt = l.attempt
                  where r.status = 'running' and r.lease_owner = $4 and r.lease_expires_at > clock_timestamp()
                  order by r.tenant_id, r.id for no key update of r)
               update inventory_sync_runs r set lease_expires_at = clock_timestamp() + make_interval(secs => $5)
                 from held h where r.tenant_id = h.tenant_id and r.id = h.id
               returning r.tenant_id, r.id, r.attempt, extract(epoch from h.left_over)::float8 as "left_s!""#,
            &tenants,
            &runs,
            &attempts,
            owner,
            lease_s as f64
        )
        .fetch_all(&self.control)
        .await?;
        let least_left_s = rows.iter().map(|row| row.left_s).fold(f64::INFINITY, f64::min);
        let kept = rows.into_iter().map(|row| Lease { tenant_id: row.tenant_id, run_id: row.id, attempt: row.attempt });
        Ok(Renewal { kept: kept.collect(), least_left_s })
    }

    /// Hands a run back in order: whoever takes it over may do so at once, and it does not count as a lost worker.
    ///
    /// # Errors
    /// If the database is away; then the lease runs out by itself.
    pub async fn hand_back_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        sqlx::query!(
            "update inventory_sync_runs set lease_owner = null, lease_expires_at = clock_timestamp()
              where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running'",
            lease.tenant_id,
            lease.run_id,
            lease.attempt
        )
        .execute(&self.control)
        .await?;
        Ok(())
    }
}
