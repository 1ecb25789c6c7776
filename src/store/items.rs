//! The inventory itself: one fenced call per batch.

use std::time::Instant;

use serde::{Serialize, Serializer};
use time::OffsetDateTime;

use super::{Store, StoreError};
use crate::domain::clock::ObservationClock;
use crate::domain::event::rfc3339;
use crate::domain::item::InventoryItem;
use crate::domain::policy_type::PolicyType;
use crate::domain::run::{Lease, TypeCounters};

/// An object of Graph with the time of its observation.
#[derive(Debug)]
pub struct ObservedItem {
    /// The object.
    pub item: InventoryItem,
    /// Time when its page was requested.
    pub requested_at: Instant,
}

/// Objects of one policy type that are written together.
#[derive(Debug, Clone, Copy)]
pub struct ItemBatch<'a> {
    /// Their type.
    pub policy_type: &'a PolicyType,
    /// Clock of the run.
    pub clock: &'a ObservationClock,
    /// The objects.
    pub items: &'a [ObservedItem],
}

/// Columns of a batch.
#[derive(Default, Serialize)]
pub(super) struct ItemColumns<'a> {
    pub(super) ids: Vec<&'a str>,
    pub(super) names: Vec<Option<&'a str>>,
    pub(super) platforms: Vec<Option<&'a str>>,
    pub(super) metas: Vec<&'a str>,
    #[serde(serialize_with = "as_rfc3339")]
    pub(super) seen_at: Vec<OffsetDateTime>,
}

impl<'a> ItemColumns<'a> {
    pub(super) fn of(batch: ItemBatch<'a>) -> Self {
        // Each id once and in the order of the index: batches of different runs lock the rows of an overlap in the same order, so
        // that they cannot deadlock.
        let items = once_and_in_order(batch.items);
        Self {
            ids: items.iter().map(|observed| observed.item.external_id.as_str()).collect(),
            names: items.iter().map(|observed| observed.item.display_name.as_deref()).collect(),
            platforms: items.iter().map(|observed| observed.item.platform.as_deref()).collect(),
            metas: items.iter().map(|observed| observed.item.meta.as_str()).collect(),
            seen_at: items.iter().map(|observed| batch.clock.at(observed.requested_at)).collect(),
        }
    }
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

impl BatchCounts {
    /// Adds the rows to the counters of their type.
    pub fn add_to(&self, counters: &mut TypeCounters) {
        counters.items_upserted_count += self.upserted;
        counters.items_created_count += self.created;
        counters.items_changed_count += self.changed;
    }
}

impl Store {
    /// Writes a batch of objects of one policy type.
    pub async fn upsert_items(&self, lease: &Lease, batch: ItemBatch<'_>) -> Result<BatchCounts, StoreError> {
        let columns = ItemColumns::of(batch);
        let mut connection = self.work.acquire().await?;
        let written = sqlx::query!(
            r#"select upserted as "upserted!", created as "created!", changed as "changed!"
                 from inventory_write_items($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"#,
            lease.tenant_id,
            lease.run_id,
            lease.attempt,
            batch.policy_type.key,
            batch.policy_type.category,
            &columns.ids as &[&str],
            &columns.names as &[Option<&str>],
            &columns.platforms as &[Option<&str>],
            &columns.metas as &[&str],
            &columns.seen_at
        )
        .fetch_optional(&mut *connection);
        let row = self.with_timeout(async { Ok(written.await?) }).await?.ok_or(StoreError::LeaseLost)?;
        Ok(BatchCounts { upserted: row.upserted, created: row.created, changed: row.changed })
    }
}

fn as_rfc3339<S: Serializer>(times: &[OffsetDateTime], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(times.iter().map(|time| rfc3339(*time)))
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
