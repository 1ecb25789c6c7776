//! Runs of long ago, which retention deletes while the soak runs, and the evidence that it must spare.

use sqlx::AssertSqlSafe;
use uuid::Uuid;

use crate::support::world::World;
use crate::verdict::number;

/// Prefix of the idempotency keys of archived runs.
const PREFIX: &str = "archive-";

/// Expired runs that are inserted at a time.
const RUNS: usize = 2_000;
/// Items of the archive.
const ITEMS: usize = 24;
/// Items in its latest listing; the others are gone.
const LISTED: usize = 12;

/// Tenant with a long history.
pub struct Archive {
    tenant: Uuid,
    runs: usize,
}

impl Archive {
    /// Registers the tenant, with a latest run that is the evidence that half of the items are gone, and the view
    /// `soak_runs` of all runs but the archive's.
    pub async fn create(world: &World) -> Self {
        let tenant = Uuid::new_v4();
        world.register(tenant, None).await;
        let mut archive = Self { tenant, runs: 0 };
        archive.insert(world, 2).await.expect("the database responds");
        world
            .execute(&format!(
                "create view soak_runs as select * from inventory_sync_runs where tenant_id <> '{tenant}';
                 insert into inventory_selections
                 select tenant_id, selection_hash, id, finished_at from inventory_sync_runs where idempotency_key = '{PREFIX}1';
                 insert into inventory_complete_listings
                 select tenant_id, 'mobileApp', started_at, {LISTED}, started_at
                   from inventory_sync_runs where idempotency_key = '{PREFIX}1';
                 insert into inventory_items
                 select '{tenant}', 'mobileApp', '{PREFIX}' || i, 'Archived', 'Apps', null, '{{}}', seen.started_at,
                        seen.started_at, seen.started_at, seen.id
                   from generate_series(1, {ITEMS}) i
                   join inventory_sync_runs seen on seen.idempotency_key = '{PREFIX}' || (1 + i % 2)"
            ))
            .await;
        archive
    }

    /// Inserts more expired runs, each older than all before; a database that is away is left alone.
    pub async fn grow(&mut self, world: &World) {
        // The next insert would otherwise repeat keys of one that committed without a reply.
        let first = self.runs + 1;
        self.runs += RUNS;
        let _ = self.insert_from(world, first, self.runs).await;
    }

    async fn insert(&mut self, world: &World, count: usize) -> sqlx::Result<()> {
        let first = self.runs + 1;
        self.runs += count;
        self.insert_from(world, first, self.runs).await
    }

    async fn insert_from(&self, world: &World, first: usize, last: usize) -> sqlx::Result<()> {
        let tenant = self.tenant;
        let insert = format!(
            "with past as materialized (
               select n, inventory_new_run_id(at) as id, at from generate_series({first}, {last}) n,
                      lateral (select now() - interval '3 days' - n * interval '1 minute' as at) t),
             runs as (
               insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                      daemon_version, started_at, finished_at)
               select '{tenant}', id, '{PREFIX}' || n, repeat('a', 64), '{{}}', 'success', 'soak', at, at from past)
             insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
                    items_upserted_count, items_created_count, items_changed_count, errors_count)
             select '{tenant}', id, 'mobileApp', 'complete', {LISTED}, {LISTED}, 0, 0, 0 from past"
        );
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&world.db).await?;
        Ok(())
    }

    /// Counts expired runs that are left, beside the latest, which is kept.
    pub async fn expired(&self, world: &World) -> Option<i64> {
        let query = format!(
            "select count(*) from inventory_sync_runs r where tenant_id = '{}' and not exists
               (select from inventory_selections s where s.tenant_id = r.tenant_id and s.latest_run_id = r.id)",
            self.tenant
        );
        number(world, &query).await
    }

    /// Counts broken promises: the latest run is kept, and what it did not list stays missing.
    pub async fn broken(&self, world: &World) -> usize {
        let latest = format!("select count(*) from inventory_sync_runs where idempotency_key = '{PREFIX}1'");
        let current = format!("select count(*) from inventory_items_current where tenant_id = '{}'", self.tenant);
        let listed = i64::try_from(LISTED).ok();
        usize::from(number(world, &latest).await != Some(1)) + usize::from(number(world, &current).await != listed)
    }

    /// Number of runs inserted.
    pub const fn runs(&self) -> usize {
        self.runs
    }
}
