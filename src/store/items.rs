//! The inventory itself: one fenced call per batch.

use std::time::Instant;

use time::OffsetDateTime;

use super::{Store, StoreError};
use crate::domain::clock::ObservationClock;
use crate::domain::item::InventoryItem;
use crate::domain::policy_type::PolicyType;
use crate::domain::run::Lease;

/// An object of Graph with the time of its observation.
#[derive(Debug)]
pub struct ObservedItem {
    /// The object.
    pub item: InventoryItem,
    /// Time when its page was requested.
    pub requested_at: Instant,
}

/// Rows that one batch wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchCounts {
    /// Rows written: fewer than items if an id was in the batch twice, or a newer observation was there already.
    pub upserted: i64,
    /// Rows that were not there when the run started; a take-over counts those of the attempt before too.
    pub created: i64,
    /// Rows whose name, category, platform or meta changed since the run started.
    pub changed: i64,
}

impl Store {
    /// Writes a batch of objects of one policy type.
    pub async fn upsert_items(
        &self,
        lease: &Lease,
        policy_type: &PolicyType,
        clock: &ObservationClock,
        items: &[ObservedItem],
    ) -> Result<BatchCounts, StoreError> {
        // Each id once and in the order of the index: batches of different runs lock the rows of an overlap in the same order, so
        // that they cannot deadlock.
        let items = once_and_in_order(items);
        let ids: Vec<&str> = items.iter().map(|observed| observed.item.external_id.as_str()).collect();
        let names: Vec<Option<&str>> = items.iter().map(|observed| observed.item.display_name.as_deref()).collect();
        let platforms: Vec<Option<&str>> = items.iter().map(|observed| observed.item.platform.as_deref()).collect();
        let metas: Vec<&str> = items.iter().map(|observed| observed.item.meta.as_str()).collect();
        let times: Vec<OffsetDateTime> = items.iter().map(|observed| clock.at(observed.requested_at)).collect();
        let mut connection = self.work.acquire().await?;
        let written = sqlx::query!(
            r#"select upserted as "upserted!", created as "created!", changed as "changed!"
                 from inventory_write_items($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"#,
            lease.tenant_id,
            lease.run_id,
            lease.attempt,
            policy_type.key,
            policy_type.category,
            &ids as &[&str],
            &names as &[Option<&str>],
            &platforms as &[Option<&str>],
            &metas as &[&str],
            &times
        )
        .fetch_optional(&mut *connection);
        let row = self.with_timeout(async { Ok(written.await?) }).await?.ok_or(StoreError::LeaseLost)?;
        Ok(BatchCounts { upserted: row.upserted, created: row.created, changed: row.changed })
    }
}

/// Sorts by the bytes of the id. Of two objects with the same id the one observed last is kept.
fn once_and_in_order(items: &[ObservedItem]) -> Vec<&ObservedItem> {
    let mut items: Vec<&ObservedItem> = items.iter().rev().collect();
    items.sort_by(|one, other| one.item.external_id.cmp(&other.item.external_id));
    items.dedup_by(|later, earlier| later.item.external_id == earlier.item.external_id);
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_observation_of_a_repeated_id_is_kept() {
        let requested_at = Instant::now();
        let item = |id: &str, name: &str| InventoryItem {
            external_id: id.to_owned(),
            display_name: Some(name.to_owned()),
            platform: None,
            meta: "{}".to_owned(),
        };
        let items = [item("b", "first"), item("a", "only"), item("b", "second"), item("B", "other"), item("b", "last")]
            .map(|item| ObservedItem { item, requested_at });
        let kept: Vec<_> = once_and_in_order(&items)
            .into_iter()
            .map(|observed| (&*observed.item.external_id, observed.item.display_name.as_deref().unwrap()))
            .collect();
        assert_eq!(kept, [("B", "other"), ("a", "only"), ("b", "last")]);
    }
}
