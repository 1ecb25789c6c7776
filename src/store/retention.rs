//! Retention: old runs are deleted in batches that hold no lock for long. Items are never deleted.

use super::{Store, StoreError};

const BATCH_ROWS: i64 = 1_000;
/// Longest retention: more days would overflow a timestamp.
const MAX_DAYS: i32 = 36_500;

impl Store {
    /// Deletes a batch of runs, with their types, that ended more than `days` ago and whose event is confirmed; returns its
    /// size. The latest completed run of every selection is kept at any age, because missing items are derived from it.
    pub async fn delete_old_runs(&self, days: u32) -> Result<u64, StoreError> {
        // Ids start with the time of admission, so their index leads to the oldest runs first. now() and not clock_timestamp(): a
        // volatile function cannot bound an index scan.
        let deleted = sqlx::query!(
            "with old as (
               select r.tenant_id, r.id from inventory_sync_runs r
                where r.id < inventory_run_id_at(now() - make_interval(days => $1))
                  and r.finished_at < now() - make_interval(days => $1)
                  and not exists (select from outbox o where o.tenant_id = r.tenant_id and o.run_id = r.id)
                  and not exists (select from inventory_selections s where s.tenant_id = r.tenant_id
                                     and s.selection_hash = r.selection_hash and s.latest_run_id = r.id)
                order by r.id limit $2)
             delete from inventory_sync_runs r using old where r.tenant_id = old.tenant_id and r.id = old.id",
            i32::try_from(days).unwrap_or(MAX_DAYS).min(MAX_DAYS),
            BATCH_ROWS
        );
        self.with_timeout(async { Ok(deleted.execute(&self.control).await?.rows_affected()) }).await
    }
}
