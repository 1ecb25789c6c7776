//! The inventory itself: one fenced statement a batch.

use sqlx::PgExecutor;

use super::{Store, StoreError};
use crate::domain::item::InventoryItem;
use crate::domain::policy_type::PolicyType;
use crate::domain::run::Lease;

/// What one written batch changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Rows written; fewer than items if an id stood in the batch twice.
    pub upserted: i64,
    /// Rows that were not there when the run began; an attempt that takes it over counts those of the one before.
    pub created: i64,
    /// Rows whose name, category, platform or meta differ from when the run began.
    pub changed: i64,
}

impl Store {
    /// Writes a batch of objects of one policy type as observed by a run.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] if the run is no longer this worker's: then nothing was written.
    pub async fn upsert_items(
        &self,
        lease: &Lease,
        policy_type: &PolicyType,
        items: &[InventoryItem],
    ) -> Result<Written, StoreError> {
        upsert(&self.work, lease, policy_type, items).await
    }
}

/// One statement checks the lease, writes and counts. It gets every id once, and in order: two batches take their row
/// locks in the same order, so that they can't deadlock. A batch that waited behind a later one does not set back when an
/// item was last seen. Old and new are compared as they are stored (`*<>`): to walk through two documents would cost a
/// fifteenth of the whole statement.
pub(super) async fn upsert(
    db: impl PgExecutor<'_>,
    lease: &Lease,
    policy_type: &PolicyType,
    items: &[InventoryItem],
) -> Result<Written, StoreError> {
    let items = once_and_in_order(items);
    let ids: Vec<&str> = items.iter().map(|item| item.external_id.as_str()).collect();
    let names: Vec<Option<&str>> = items.iter().map(|item| item.display_name.as_deref()).collect();
    let platforms: Vec<Option<&str>> = items.iter().map(|item| item.platform.as_deref()).collect();
    let metas: Vec<&str> = items.iter().map(|item| item.meta.as_str()).collect();
    let row = sqlx::query!(
        r#"with fence as materialized (
             select started_at from inventory_sync_runs
              where tenant_id = $1 and id = $2 and attempt = $3 and status = 'running' for share),
           written as (
             insert into inventory_items as i (tenant_id, policy_type, external_id, display_name, category, platform,
                    meta_jsonb, first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
             select $1, $4, u.id, u.name, $5, u.platform, u.meta::jsonb, now(), now(), now(), $2
               from fence, unnest($6::text[], $7::text[], $8::text[], $9::text[]) u(id, name, platform, meta)
             on conflict (tenant_id, policy_type, external_id) do update set
               display_name = excluded.display_name, category = excluded.category, platform = excluded.platform,
               meta_jsonb = excluded.meta_jsonb,
               last_seen_at = greatest(i.last_seen_at, excluded.last_seen_at),
               last_seen_run_id = case when excluded.last_seen_at >= i.last_seen_at
                 then excluded.last_seen_run_id else i.last_seen_run_id end,
               last_changed_at = case when row(i.display_name, i.category, i.platform, i.meta_jsonb)::record
                   *<> row(excluded.display_name, excluded.category, excluded.platform, excluded.meta_jsonb)::record
                 then excluded.last_changed_at else i.last_changed_at end
             returning first_seen_at >= (select started_at from fence) as created,
                       last_changed_at >= (select started_at from fence) as changed)
           select exists (select from fence) as "fenced!", count(*) as "upserted!",
                  count(*) filter (where created) as "created!",
                  count(*) filter (where changed and not created) as "changed!"
             from written"#,
        lease.tenant_id,
        lease.run_id,
        lease.attempt,
        policy_type.key,
        policy_type.category,
        &ids as &[&str],
        &names as &[Option<&str>],
        &platforms as &[Option<&str>],
        &metas as &[&str]
    )
    .fetch_one(db)
    .await?;
    if !row.fenced {
        return Err(StoreError::LeaseLost);
    }
    Ok(Written { upserted: row.upserted, created: row.created, changed: row.changed })
}

/// By bytes, as the index goes. Of two with the same id the later one was observed last.
fn once_and_in_order(items: &[InventoryItem]) -> Vec<&InventoryItem> {
    let mut items: Vec<&InventoryItem> = items.iter().rev().collect();
    items.sort_by(|one, other| one.external_id.cmp(&other.external_id));
    items.dedup_by(|later, earlier| later.external_id == earlier.external_id);
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_repeated_id_the_last_observation_is_kept() {
        let item = |id: &str, name: &str| InventoryItem {
            external_id: id.to_owned(),
            display_name: Some(name.to_owned()),
            platform: None,
            meta: "{}".to_owned(),
        };
        let items = [item("b", "first"), item("a", "only"), item("b", "second"), item("B", "other"), item("b", "last")];
        let kept = once_and_in_order(&items);
        let kept: Vec<_> =
            kept.iter().map(|item| (&*item.external_id, item.display_name.as_deref().unwrap())).collect();
        assert_eq!(kept, [("B", "other"), ("a", "only"), ("b", "last")]);
    }
}
