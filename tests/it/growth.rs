//! Schema properties promised in deploy/SCALING.md: partitioning, distribution by tenant, and connection poolers.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::Which;
use crate::support::daemon::Replica;
use crate::support::pooler::Pooler;
use crate::support::scheduler::requests;
use crate::support::world::World;

/// Tables without a tenant; on Citus they are reference tables.
const WITHOUT_TENANT: [&str; 4] = ["inventory_fleet", "daemon_replicas", "policy_types", "_sqlx_migrations"];

#[tokio::test(flavor = "multi_thread")]
async fn every_key_begins_with_the_tenant() {
    let world = World::new().await;
    let keys = "select c.relname as of, i.indexrelid::regclass::text as name, a.attname as first
                  from pg_index i join pg_class c on c.oid = i.indrelid
                  join pg_attribute a on a.attrelid = c.oid and a.attnum = i.indkey[0]
                 where i.indisunique and c.relnamespace = 'public'::regnamespace";
    let unique = world.rows(keys).await;
    let foreign = world
        .rows(
            "select k.conrelid::regclass::text as of, k.conname as name, a.attname as first, b.attname as refers_to
               from pg_constraint k
               join pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
               join pg_attribute b on b.attrelid = k.confrelid and b.attnum = k.confkey[1]
              where k.contype = 'f' and k.connamespace = 'public'::regnamespace",
        )
        .await;
    let of_tenants = |key: &&Value| !WITHOUT_TENANT.contains(&key["of"].as_str().unwrap());
    let unique: Vec<&Value> = unique.iter().filter(of_tenants).collect();
    assert!(unique.len() >= 7 && foreign.len() >= 2, "{unique:?} {foreign:?}");
    for key in unique.into_iter().chain(&foreign) {
        assert_eq!(key["first"], "tenant_id", "{key}");
        assert!(key.get("refers_to").is_none_or(|column| column == "tenant_id"), "{key}");
    }
    let tables = world.rows("select tablename from pg_tables where schemaname = 'public'").await;
    let without = "select tablename from pg_tables t where schemaname = 'public' and not exists
        (select from information_schema.columns c where c.table_name = t.tablename and c.column_name = 'tenant_id')";
    let without = world.rows(without).await;
    assert!(tables.len() > without.len() && without.len() == WITHOUT_TENANT.len(), "{without:?}");
}

/// Reads every view and function of the SQL interface, and the rows beneath.
async fn read_everything(world: &World) -> BTreeMap<&'static str, Vec<Value>> {
    let mut all = BTreeMap::new();
    for (name, query) in [
        ("rows", "select * from inventory_items order by 1, 2, 3"),
        ("current", "select * from inventory_items_current order by 1, 3, 4"),
        ("latest", "select * from inventory_latest_runs order by 1, 2"),
        (
            "missing",
            "select r.tenant_id, m.* from inventory_latest_runs r, inventory_missing(r.tenant_id, r.selection_hash) m
              order by 1, 2, 3",
        ),
    ] {
        all.insert(name, world.rows(query).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn partitioning_items_changes_no_read_and_the_daemon_works_on_it() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    let tenants: Vec<Uuid> = (0..12).map(|_| Uuid::new_v4()).collect();
    let apps = "deviceAppManagement/mobileApps";
    for tenant in &tenants {
        world.register(*tenant, None).await;
        for turn in ["first", "second"] {
            let key = format!("{turn}-{tenant}");
            world.publish(&World::request_of(*tenant, &key, &["mobileApp", "deviceShellScript"])).await;
            assert_eq!(world.ended(&key).await["status"], "success");
            if turn == "first" {
                world.sim.delete_objects(*tenant, apps, Which::Count(1)).unwrap();
            }
        }
    }
    replica.stop().await;
    let before = read_everything(&world).await;
    assert_eq!((before["missing"].len(), before["rows"].len()), (12, 12 * 24), "the comparison is not empty");

    for partitions in [4, 8] {
        world.partition_items(partitions).await;
        assert_eq!(read_everything(&world).await, before);
        let parts = "select count(distinct tableoid) from inventory_items";
        let torn = "select count(*) from (select from inventory_items group by tenant_id having count(distinct tableoid) > 1) t";
        assert!(world.count(parts).await > 1, "the tenants are spread over partitions");
        assert_eq!(world.count(torn).await, 0);
    }

    let replica = Replica::start(&world).await;
    let tenant = tenants[0];
    world.sim.delete_objects(tenant, apps, Which::Count(1)).unwrap();
    world.publish(&World::request_of(tenant, "third", &["mobileApp", "deviceShellScript"])).await;
    let third = world.ended("third").await;
    assert_eq!((&third["status"], &third["items_observed_count"]), (&json!("success"), &json!(22)));
    assert_eq!((&third["items_created_count"], &third["items_changed_count"]), (&json!(0), &json!(0)));
    assert_eq!(world.missing(&third).await.len(), 2);
    replica.stop().await;
    let plan = format!("explain (format json) select * from inventory_items where tenant_id = '{tenant}'");
    let plan: Value = sqlx::query_scalar(sqlx::AssertSqlSafe(plan)).fetch_one(&world.db).await.unwrap();
    assert_eq!(plan.to_string().matches("inventory_items_").count(), plan.to_string().matches("_of_8").count());
    assert!(!plan.to_string().contains("Append"), "one tenant reads one partition: {plan}");
}

/// Session state would be lost, or leak to another client, behind a pooler in transaction mode.
#[test]
fn no_statement_leaves_session_state() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".sqlx");
    let queries: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| serde_json::from_slice::<Value>(&std::fs::read(entry.unwrap().path()).unwrap()).unwrap())
        .map(|query| query["query"].as_str().unwrap().to_lowercase())
        .collect();
    assert!(queries.len() > 30);
    for words in
        ["advisory", "listen ", "temporary ", "temp table", "set session", "set_config", "declare ", "with hold"]
    {
        let found = queries.iter().find(|query| query.contains(words));
        assert!(found.is_none(), "{words} in {found:?}");
    }
    assert!(!queries.iter().any(|query| query.starts_with("set ")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_works_through_pgbouncer() {
    for mode in Pooler::modes().await {
        let world = World::new().await;
        let pooler = Pooler::start(&world, *mode).await;
        let events = world.subscribe().await;
        let mut config = world.config();
        config.database.url = pooler.url.as_str().into();
        let replicas = [Replica::with(config.clone()).await, Replica::with(config).await];
        let (keys, requests) = requests(&world, "pooled", 24, &["mobileApp", "deviceShellScript"]).await;
        for request in &requests {
            world.publish(request).await;
        }
        for key in &keys {
            let run = world.ended(key).await;
            assert_eq!((&run["status"], &run["items_upserted_count"]), (&json!("success"), &json!(24)), "{mode:?}");
            events.event_of(&run).await;
        }
        let through = "select count(*) from pg_stat_activity
            where datname = current_database() and application_name = 'inventoryd'";
        let through = world.count(through).await;
        assert!((1..=mode.pool_size()).contains(&through), "{mode:?}: {through} server connections");
        for replica in replicas {
            replica.stop().await;
        }
    }
}
