//! Leases: renewed together, handed back in order.

use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::run::Lease;

/// What a renewal has found; a lease in neither list is lost.
#[derive(Debug, Clone, PartialEq)]
pub struct Renewal {
    /// The leases that go on.
    pub kept: Vec<Lease>,
    /// Those whose row is being written just now: still held, but not renewed this time.
    pub busy: Vec<Lease>,
    /// Least time that was left on any of them, in seconds of the database's clock.
    pub least_left_s: f64,
}

impl Store {
    /// Renews all leases of a process in one statement on a connection of their own. A lease that has expired is not taken
    /// back, even if nobody else has it yet. A row that a writing statement has locked is passed over, so that one
    /// slow batch does not keep the others from being renewed.
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
                  where r.status = 'running' and r.lease_owner = $4 and r.lease_expires_at > clock_timestamp()),
               free as (
                 select r.tenant_id, r.id from held h join inventory_sync_runs r using (tenant_id, id)
                  where r.attempt = h.attempt and r.status = 'running' and r.lease_owner = $4
                    and r.lease_expires_at > clock_timestamp()
                  for no key update of r skip locked),
               renewed as (
                 update inventory_sync_runs r set lease_expires_at = clock_timestamp() + make_interval(secs => $5)
                   from free f where r.tenant_id = f.tenant_id and r.id = f.id returning r.tenant_id, r.id)
               select h.tenant_id, h.id, h.attempt, extract(epoch from h.left_over)::float8 as "left_s!",
                      exists (select from renewed n where n.tenant_id = h.tenant_id and n.id = h.id) as "renewed!"
                 from held h"#,
            &tenants,
            &runs,
            &attempts,
            owner,
            lease_s as f64
        )
        .fetch_all(&self.leases)
        .await?;
        let least_left_s = rows.iter().map(|row| row.left_s).fold(f64::INFINITY, f64::min);
        let (kept, busy): (Vec<_>, Vec<_>) = rows
            .into_iter()
            .map(|row| (row.renewed, Lease { tenant_id: row.tenant_id, run_id: row.id, attempt: row.attempt }))
            .partition(|(renewed, _)| *renewed);
        let leases = |rows: Vec<(bool, Lease)>| rows.into_iter().map(|(_, lease)| lease).collect();
        Ok(Renewal { kept: leases(kept), busy: leases(busy), least_left_s })
    }

    /// Hands a run back in order: whoever takes it over may do so at once, and it does not count as a lost worker.
    ///
    /// # Errors
    /// If the database is away; then the lease runs out by itself.
    pub async fn hand_back_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        let handed_back = sqlx::query!(
            "update inventory_sync_runs set lease_owner = null, lease_expires_at = clock_timestamp()
              where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running'",
            lease.tenant_id,
            lease.run_id,
            lease.attempt
        )
        .execute(&self.leases);
        self.in_time(async { Ok(handed_back.await?) }).await?;
        Ok(())
    }
}
