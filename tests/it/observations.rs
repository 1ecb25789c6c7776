//! Observation times: a late write of an early observation overwrites nothing newer, and deleted objects stay deleted.

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use crate::sim::{Rule, Which};
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
/// Advisory lock at which the first write of an item waits.
const LOCK: i64 = 8_046;

/// Storage of `inventory_items`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Items {
    OneTable,
    Partitioned,
}

/// Run that has read its list and is held at the first of two batches.
struct LateRun {
    world: World,
    _replica: Replica,
    lock: PgConnection,
    /// Ids of the list in the order of Graph; the last two are in the second batch.
    ids: Vec<String>,
}

impl LateRun {
    /// Starts the run `early` with all twelve objects recorded before, of which some are deleted before it reads its list,
    /// and waits until its first batch is held.
    async fn start(items: Items, deletions: u32) -> Self {
        let world = World::new().await;
        if items == Items::Partitioned {
            world.partition_items(4).await;
        }
        let mut config = world.config();
        config.run.batch_rows = 10;
        config.run.lease_s = 600;
        let replica = Replica::with(config).await;
        world.sync("before", &["mobileApp"]).await;
        if deletions > 0 {
            world.sim.delete_objects(world.tenant, APPS, Which::Count(deletions)).unwrap();
        }
        let ids = world.sim.object_ids(world.tenant, APPS).unwrap();
        let mut lock = PgConnection::connect(&world.database_url).await.unwrap();
        sqlx::query("select pg_advisory_lock($1)").bind(LOCK).execute(&mut lock).await.unwrap();
        world
            .execute(&format!(
                "create sequence held_once;
                 create function hold_first_write() returns trigger language plpgsql as $$ begin
                   if nextval('held_once') = 1 then perform pg_advisory_xact_lock({LOCK}); end if; return new; end $$;
                 create trigger hold_first_write before insert on inventory_items for each row
                   execute function hold_first_write();"
            ))
            .await;
        world.publish(&world.request("early", &["mobileApp"])).await;
        let waiting = "select count(*) from pg_stat_activity
            where datname = current_database() and wait_event_type = 'Lock' and wait_event = 'advisory'";
        eventually("the first batch waits", || async { (world.count(waiting).await == 1).then_some(()) }).await;
        Self { world, _replica: replica, lock, ids }
    }

    /// Lets the held batch and the one after it be written, and waits for the end of the run.
    async fn finish(&mut self) -> Value {
        sqlx::query("select pg_advisory_unlock($1)").bind(LOCK).execute(&mut self.lock).await.unwrap();
        self.world.ended("early").await
    }

    async fn name_of(&self, id: &str) -> String {
        let item = self.world.rows(&format!("select * from inventory_items where external_id = '{id}'")).await;
        item[0]["display_name"].as_str().unwrap().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_write_does_not_revert_a_rename() {
    for items in [Items::OneTable, Items::Partitioned] {
        assert_rename_survives(LateRun::start(items, 0).await).await;
    }
}

async fn assert_rename_survives(mut late: LateRun) {
    // One in the batch that is held, one in the batch whose statement starts after the rename was recorded.
    for (index, name) in [(0, "Renamed 0"), (10, "Renamed 10")] {
        late.world.sim.rename_object(late.world.tenant, APPS, Which::Index(index), name).unwrap();
    }
    let newer = late.world.sync("newer", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!((&newer["status"], &newer["items_changed_count"]), (&json!("success"), &json!(2)), "{newer}");
    let stored = "select * from inventory_items order by policy_type, external_id";
    let before = late.world.rows(stored).await;
    let run = late.finish().await;
    assert_eq!(run["status"], "success", "{run}");
    assert_eq!(late.name_of(&late.ids[0]).await, "Renamed 0");
    assert_eq!(late.name_of(&late.ids[10]).await, "Renamed 10");
    assert_eq!(run["items_changed_count"], 0, "an older observation changes nothing");
    assert_eq!(late.world.rows(stored).await, before, "nothing of the newer observation is overwritten");
}

#[tokio::test(flavor = "multi_thread")]
async fn late_write_does_not_bring_a_deleted_object_back() {
    for items in [Items::OneTable, Items::Partitioned] {
        assert_deletion_survives(LateRun::start(items, 0).await).await;
    }
}

async fn assert_deletion_survives(mut late: LateRun) {
    let deleted = late.ids[11].clone();
    late.world.sim.delete_objects(late.world.tenant, APPS, Which::Ids(vec![deleted.clone()])).unwrap();
    let newer = late.world.sync("newer", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!((&newer["status"], late.world.missing(&newer).await.len()), (&json!("success"), 1));
    late.finish().await;
    let current = format!("select count(*) from inventory_items_current where external_id = '{deleted}'");
    assert_eq!(late.world.count(&current).await, 0, "it was read before the run that did not find it");
    let missing = late.world.missing(&newer).await;
    assert_eq!((missing.len(), &missing[0]["external_id"]), (1, &json!(deleted)), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_objects_stay_deleted_after_retention_removed_the_run_that_missed_them() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.delete_objects(world.tenant, APPS, Which::Count(3)).unwrap();
    let complete = world.sync("complete", &["mobileApp"]).await;
    let current = "select count(*) from inventory_items_current";
    assert_eq!((&complete["status"], world.count(current).await), (&json!("success"), 9));
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "forbidden" } })));
    assert_eq!(world.sync("forbidden", &["mobileApp"]).await["status"], "failed");
    replica.stop().await;
    let mut config = world.config();
    config.retention.runs_days = 0;
    config.retention.interval_s = 1;
    let _replica = Replica::with(config).await;
    eventually("retention deletes the run", || async { world.runs("complete").await.is_empty().then_some(()) }).await;
    assert_eq!(world.count(current).await, 9, "what the latest complete listing did not find stays out");
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_listing_that_ends_late_is_evidence_beside_a_newer_one_with_errors() {
    let mut late = LateRun::start(Items::OneTable, 1).await;
    late.world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "missing_id" } })));
    let newer = late.world.sync("newer", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!((&newer["status"], &newer["errors_count"]), (&json!("partial"), &json!(1)), "{newer}");
    let current = "select count(*) from inventory_items_current where policy_type = 'mobileApp'";
    assert_eq!(late.world.count(current).await, 12, "a listing with errors is no evidence");
    let early = late.finish().await;
    assert_eq!(early["status"], "success", "{early}");
    assert_eq!(late.world.count(current).await, 11, "the earlier one is");
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_with_unreadable_objects_is_no_evidence_of_absence() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    // The object without an id may be the one that is not found.
    world.sim.delete_objects(world.tenant, APPS, Which::Count(1)).unwrap();
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "missing_id" } })));
    let run = world.sync("unreadable", &["mobileApp"]).await;
    assert_eq!((&run["items_observed_count"], &run["errors_count"]), (&json!(11), &json!(1)), "{run}");
    assert_eq!(world.count("select count(*) from inventory_items_current").await, 12);
    let missing = world.missing(&run).await;
    assert_eq!((missing.len(), &missing[0]["confidence"]), (1, &json!("low")), "{missing:?}");
}

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}
