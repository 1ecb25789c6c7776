//! Retention: what is old enough is deleted in batches that hold no lock for long. Items are never deleted.

use super::{Store, StoreError};

const BATCH_ROWS: i64 = 1_000;

impl Store {
    /// Deletes a batch of runs, with their types, that ended more than `days` ago and whose event was published. The
    /// latest completed run of every selection stays, whatever its age: what is missing is derived from it.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn delete_old_runs(&self, days: u32) -> Result<u64, StoreError> {
        let deleted = sqlx::query!(
            "with old as (
               select r.tenant_id, r.id from inventory_sync_runs r
                where r.finished_at < clock_timestamp() - make_interval(days => $1)
                  and not exists (select from outbox_events e
                                   where e.tenant_id = r.tenant_id and e.id = r.id and e.sent_at is null)
                  and not exists (select from inventory_latest_runs l where l.tenant_id = r.tenant_id
                                     and l.selection_hash = r.selection_hash and l.run_id = r.id)
                order by r.finished_at limit $2)
             delete from inventory_sync_runs r using old where r.tenant_id = old.tenant_id and r.id = old.id",
            days.try_into().unwrap_or(i32::MAX),
            BATCH_ROWS
        );
        self.in_time(async { Ok(deleted.execute(&self.work).await?.rows_affected()) }).await
    }

    /// Deletes a batch of events that were published more than `days` ago.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn delete_sent_events(&self, days: u32) -> Result<u64, StoreError> {
        let deleted = sqlx::query!(
            "with old as (
               select tenant_id, id from outbox_events
                where sent_at < clock_timestamp() - make_interval(days => $1) order by sent_at limit $2)
             delete from outbox_events e using old where e.tenant_id = old.tenant_id and e.id = old.id",
            days.try_into().unwrap_or(i32::MAX),
            BATCH_ROWS
        );
        self.in_time(async { Ok(deleted.execute(&self.work).await?.rows_affected()) }).await
    }
}
