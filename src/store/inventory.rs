//! Queries about the inventory of one tenant: its items, and the difference between two runs.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::event::rfc3339;

/// Filter of a list of items.
#[derive(Debug, Clone)]
pub struct ItemFilter {
    /// The tenant.
    pub tenant_id: Uuid,
    /// Items of these policy types only; of every type if empty.
    pub policy_types: Vec<String>,
    /// Items that appeared or changed at this time or later only.
    pub changed_since: Option<OffsetDateTime>,
    /// Items that the latest listing with evidence of absence did not contain, instead of current ones.
    pub missing: bool,
}

/// An item for readers.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Item {
    /// Policy type.
    pub policy_type: String,
    /// Id in Graph.
    pub external_id: String,
    /// Name.
    pub display_name: Option<String>,
    /// Category of the type.
    pub category: String,
    /// Platform, if the object has one.
    pub platform: Option<String>,
    /// First observation, RFC 3339.
    pub first_seen_at: String,
    /// First observation of the present name, platform and properties, RFC 3339.
    pub last_changed_at: String,
    /// Last observation, RFC 3339.
    pub last_seen_at: String,
    /// Run of the last observation.
    pub last_seen_run_id: Uuid,
    /// Properties that the contract of the type allows.
    pub meta: Value,
}

/// Kind of a difference between two runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// First observed after the old run, and observed by the new one or later.
    New,
    /// Known to the old run, and last changed between the two.
    Changed,
    /// Observed by the old run or after it, and by neither the new run nor a later one.
    Missing,
}

/// One item that differs between two runs.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Difference {
    /// Kind of the difference.
    pub change: Change,
    /// Policy type.
    pub policy_type: String,
    /// Id in Graph.
    pub external_id: String,
    /// Name as last observed.
    pub display_name: Option<String>,
    /// First observation, last change or last observation, by the kind; RFC 3339.
    pub at: String,
}

/// Differences between two completed runs of one selection, as far as the stored state can tell.
#[derive(Debug, Clone, Default, Serialize, JsonSchema)]
pub struct RunDiff {
    /// The differences, by kind, type and name.
    pub differences: Vec<Difference>,
    /// Types that both runs listed completely.
    pub compared_types: Vec<String>,
    /// Types of either run that are not compared, because one of the two has no complete list of it.
    pub types_not_compared: Vec<String>,
    /// Items that changed after the new run: whether they had changed between the two is not stored.
    pub changed_later_count: i64,
    /// Items observed again after the new run: whether the new run missed them is not stored.
    pub seen_later_count: i64,
}

impl Store {
    /// Items of a tenant, by type and name.
    pub async fn list_items(&self, filter: &ItemFilter) -> Result<Vec<Item>, StoreError> {
        // The condition of inventory_items_current, so that every item is either current or missing.
        let rows = sqlx::query!(
            r#"select i.policy_type, i.external_id, i.display_name, i.category, i.platform, i.meta_jsonb, i.first_seen_at,
                      i.last_changed_at, i.last_seen_at, i.last_seen_run_id
                 from inventory_items i
                 left join inventory_complete_listings l on l.tenant_id = i.tenant_id and l.policy_type = i.policy_type
                where i.tenant_id = $1
                  and (cardinality($2::text[]) = 0 or i.policy_type = any($2))
                  and ($3::timestamptz is null or i.last_changed_at >= $3)
                  and coalesce(i.last_seen_at < l.evidence_at, false) = $4
                order by i.policy_type, i.display_name, i.external_id"#,
            filter.tenant_id,
            &filter.policy_types,
            filter.changed_since,
            filter.missing
        )
        .fetch_all(&self.control)
        .await?;
        let items = rows.into_iter().map(|row| Item {
            policy_type: row.policy_type,
            external_id: row.external_id,
            display_name: row.display_name,
            category: row.category,
            platform: row.platform,
            first_seen_at: rfc3339(row.first_seen_at),
            last_changed_at: rfc3339(row.last_changed_at),
            last_seen_at: rfc3339(row.last_seen_at),
            last_seen_run_id: row.last_seen_run_id,
            meta: row.meta_jsonb,
        });
        Ok(items.collect())
    }

    /// Compares two completed runs of one tenant and selection. An item's row holds its first observation, its last change
    /// and its last observation, so that later runs hide what happened before; the result counts such items.
    pub async fn diff_runs(&self, tenant_id: Uuid, old: Uuid, new: Uuid) -> Result<RunDiff, StoreError> {
        let types = sqlx::query!(
            r#"select coalesce(o.policy_type, n.policy_type) as "policy_type!",
                      coalesce(o.status = 'complete' and n.status = 'complete', false) as "is_compared!"
                 from (select * from inventory_sync_run_types where tenant_id = $1 and run_id = $2) o
                 full join (select * from inventory_sync_run_types where tenant_id = $1 and run_id = $3) n
                   on n.policy_type = o.policy_type
                order by 1"#,
            tenant_id,
            old,
            new
        )
        .fetch_all(&self.control)
        .await?;
        let (compared, others): (Vec<_>, Vec<_>) = types.into_iter().partition(|row| row.is_compared);
        let compared_types: Vec<String> = compared.into_iter().map(|row| row.policy_type).collect();
        let types_not_compared = others.into_iter().map(|row| row.policy_type).collect();
        let mut diff = RunDiff { compared_types, types_not_compared, ..RunDiff::default() };
        self.compare_items(&mut diff, tenant_id, old, new).await?;
        Ok(diff)
    }

    async fn compare_items(&self, diff: &mut RunDiff, tenant_id: Uuid, old: Uuid, new: Uuid) -> Result<(), StoreError> {
        let rows = sqlx::query!(
            r#"with compared as (
                 select i.policy_type, i.external_id, i.display_name, i.first_seen_at, i.last_changed_at, i.last_seen_at,
                        case when i.last_seen_at < n.started_at then
                               case when i.first_seen_at <= o.finished_at and i.last_seen_at >= o.started_at then 'missing' end
                             when i.first_seen_at > n.finished_at then null
                             when i.first_seen_at > o.finished_at then 'new'
                             when i.last_changed_at > o.finished_at and i.last_changed_at <= n.finished_at then 'changed'
                        end as change
                   from inventory_sync_runs o
                   join inventory_sync_runs n on n.tenant_id = o.tenant_id and n.id = $3
                   join inventory_items i on i.tenant_id = o.tenant_id and i.policy_type = any($4)
                  where o.tenant_id = $1 and o.id = $2)
               select change as "change!", policy_type, external_id, display_name, first_seen_at, last_changed_at, last_seen_at
                 from compared where change is not null order by 1, 2, 4, 3"#,
            tenant_id,
            old,
            new,
            &diff.compared_types
        )
        .fetch_all(&self.control)
        .await?;
        for row in rows {
            let (change, at) = match row.change.as_str() {
                "new" => (Change::New, row.first_seen_at),
                "changed" => (Change::Changed, row.last_changed_at),
                _ => (Change::Missing, row.last_seen_at),
            };
            diff.differences.push(Difference {
                change,
                policy_type: row.policy_type,
                external_id: row.external_id,
                display_name: row.display_name,
                at: rfc3339(at),
            });
        }
        self.count_undecided(diff, tenant_id, old, new).await
    }

    async fn count_undecided(
        &self,
        diff: &mut RunDiff,
        tenant_id: Uuid,
        old: Uuid,
        new: Uuid,
    ) -> Result<(), StoreError> {
        let undecided = sqlx::query!(
            r#"select count(*) filter (where i.last_changed_at > n.finished_at) as "changed_later!",
                      count(*) filter (where i.last_seen_at > n.finished_at) as "seen_later!"
                 from inventory_sync_runs o
                 join inventory_sync_runs n on n.tenant_id = o.tenant_id and n.id = $3
                 join inventory_items i on i.tenant_id = o.tenant_id and i.policy_type = any($4)
                  and i.first_seen_at <= o.finished_at
                where o.tenant_id = $1 and o.id = $2"#,
            tenant_id,
            old,
            new,
            &diff.compared_types
        )
        .fetch_one(&self.control)
        .await?;
        diff.changed_later_count = undecided.changed_later;
        diff.seen_later_count = undecided.seen_later;
        Ok(())
    }

    /// Ids of runs within a range, at most three: enough to tell whether a shortened id is unique.
    pub async fn run_ids_between(&self, first: Uuid, last: Uuid) -> Result<Vec<Uuid>, StoreError> {
        let ids = sqlx::query_scalar!(
            "select id from inventory_sync_runs where id between $1 and $2 order by id limit 3",
            first,
            last
        );
        Ok(ids.fetch_all(&self.control).await?)
    }
}
