//! The inventory: identity, selected properties, tenant isolation, and tables that are never touched.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::{Action, Rule, Which};
use crate::support::daemon::Replica;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
const ENROLLMENT: &str = "deviceManagement/deviceEnrollmentConfigurations";
const ITEMS: &str = "select * from inventory_items order by tenant_id, policy_type, external_id";

#[tokio::test(flavor = "multi_thread")]
async fn a_resync_updates_last_seen_and_creates_no_duplicates() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let first = world.sync("first", &["mobileApp"]).await;
    let before = world.rows(ITEMS).await;
    assert_eq!(first["status"], "success");
    assert_eq!(before.len(), 12);
    assert_eq!((&first["items_created_count"], &first["items_observed_count"]), (&json!(12), &json!(12)));

    let second = world.sync("second", &["mobileApp"]).await;
    let after = world.rows(ITEMS).await;
    assert_eq!((&second["items_created_count"], &second["items_changed_count"]), (&json!(0), &json!(0)));
    assert_eq!((&second["items_upserted_count"], after.len()), (&json!(12), 12));
    for (old, new) in before.iter().zip(&after) {
        assert_eq!(old["external_id"], new["external_id"]);
        assert_eq!((&new["last_seen_run_id"], &old["last_seen_run_id"]), (&second["id"], &first["id"]));
        assert!(new["last_seen_at"].as_str() > old["last_seen_at"].as_str());
        assert_eq!(old["first_seen_at"], new["first_seen_at"]);
        assert_eq!(old["last_changed_at"], new["last_changed_at"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn renamed_objects_count_as_changed_and_new_ones_as_created() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.rename_object(world.tenant, APPS, Which::Index(0), "Brand new name").unwrap();
    world.sim.add_objects(world.tenant, APPS, 2).unwrap();
    let second = world.sync("second", &["mobileApp"]).await;
    assert_eq!(second["items_changed_count"], 1);
    assert_eq!(second["items_created_count"], 2);
    assert_eq!(world.count("select count(*) from inventory_items where display_name = 'Brand new name'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_and_the_order_of_scope_tags_are_no_change() {
    const PARTNERS: &str = "deviceManagement/complianceManagementPartners";
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let observe = async |key: &str, tags: Value, heartbeat: &str, state: &str| {
        world.sim.remove_rules(None);
        let app = json!({ "@odata.type": "#microsoft.graph.webApp", "id": "app", "roleScopeTagIds": tags });
        let partner = json!({ "id": "partner", "partnerState": state, "lastHeartbeatDateTime": heartbeat });
        world.sim.add_rule(rule(APPS, Action::ExtraObject { object: app }));
        world.sim.add_rule(rule(PARTNERS, Action::ExtraObject { object: partner }));
        let run = world.sync(key, &["mobileApp", "complianceManagementPartner"]).await;
        (run["status"].clone(), run["items_changed_count"].clone())
    };
    observe("first", json!(["1", "0"]), "2026-11-23T10:00:00Z", "enabled").await;
    let same = observe("same", json!(["0", "1"]), "2026-11-23T10:05:00Z", "enabled").await;
    assert_eq!(same, (json!("success"), json!(0)));
    let changed = observe("changed", json!(["0", "2"]), "2026-11-23T10:05:00Z", "unresponsive").await;
    assert_eq!(changed, (json!("success"), json!(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_repeated_across_pages_are_one_item() {
    let world = World::with_three_pages(APPS).await;
    let _replica = Replica::start(&world).await;
    world.sim.add_rule(rule(APPS, Action::DuplicateIds { count: 3 }));
    let run = world.sync("overlap", &["mobileApp"]).await;
    assert_eq!((&run["status"], &run["items_observed_count"]), (&json!("success"), &json!(60)));
    assert_eq!(world.count("select count(*) from inventory_items").await, 60);
    let sent = world.sim.state().tenants[&world.tenant].objects;
    assert_eq!(sent, 66, "Graph sent some objects twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_listed_and_only_by_get() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world
        .publish(&json!({ "schema_version": 1, "tenant_id": world.tenant, "idempotency_key": "all",
                           "selection": { "policy_types": ["*"] } }))
        .await;
    let run = world.ended("all").await;
    let catalog = inventoryd::domain::catalog::Catalog::built_in();
    let ended: BTreeSet<String> = world
        .rows("select policy_type from inventory_sync_run_types where status = 'complete'")
        .await
        .iter()
        .map(|row| row["policy_type"].as_str().unwrap().to_owned())
        .collect();
    let known: BTreeSet<String> = catalog.types().filter(|one| !one.only_by_name).map(|one| one.key.clone()).collect();
    assert_eq!(ended, known, "{run}");
    assert_eq!(run["status"], "success", "{run}");
    assert!(world.sim.requests().iter().filter(|request| !request.path.ends_with("/token")).all(|r| r.method == "GET"));
    assert_eq!(world.sim.state().non_get, 0);
    for policy_type in catalog.types() {
        let metas = world
            .rows(&format!(
                "select distinct k from inventory_items, jsonb_object_keys(meta_jsonb) k where policy_type = '{}'",
                policy_type.key
            ))
            .await;
        let keys: BTreeSet<String> = metas.iter().map(|row| row["k"].as_str().unwrap().to_owned()).collect();
        assert!(keys.is_subset(&policy_type.meta), "{}: {keys:?}", policy_type.key);
    }
    assert_eq!(world.count("select count(*) from inventory_items where meta_jsonb::text like '%Bearer %' or meta_jsonb::text like '%SECRET%'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_isolated() {
    let world = World::new().await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    let _replica = Replica::start(&world).await;
    world.sync("mine", &["mobileApp", "windowsUpdateRing"]).await;
    let mine = world
        .rows(&format!("select * from inventory_items where tenant_id = '{}' order by 1, 2, 3", world.tenant))
        .await;
    world.publish(&World::request_of(other, "theirs", &["mobileApp", "windowsUpdateRing"])).await;
    let run = world.ended("theirs").await;
    assert_eq!(run["tenant_id"], json!(other));
    let mine_after = world
        .rows(&format!("select * from inventory_items where tenant_id = '{}' order by 1, 2, 3", world.tenant))
        .await;
    assert_eq!(mine, mine_after);
    let crossed = "select count(*) from inventory_items i join inventory_sync_runs r on r.id = i.last_seen_run_id and r.tenant_id <> i.tenant_id";
    assert_eq!(world.count(crossed).await, 0);
    assert_eq!(
        world.missing(&json!({ "tenant_id": other, "selection_hash": run["selection_hash"] })).await,
        Vec::<Value>::new()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_tables_are_never_touched() {
    let world = World::new().await;
    world
        .execute(
            "create table policy_versions (id int, body text); create table backup_sets (id int, body text);
         insert into policy_versions select n, repeat('v', n) from generate_series(1, 50) n;
         insert into backup_sets select n, repeat('b', n) from generate_series(1, 50) n;",
        )
        .await;
    let role = format!("role_{}", Uuid::new_v4().simple());
    world.execute(&format!(
        "create role {role} login;
         grant select, insert, update, delete on tenants, inventory_fleet, inventory_sync_runs, inventory_sync_run_types,
               inventory_items, outbox, inventory_latest_runs, daemon_replicas, tenant_pauses, policy_types,
               inventory_complete_listings, inventory_selections to {role};
         grant select on _sqlx_migrations to {role}",
    )).await;
    let fingerprint = "select md5(string_agg(t::text || xmin::text, ',' order by id)) from";
    let both = format!("select ({fingerprint} policy_versions t) as v, ({fingerprint} backup_sets t) as b");
    let before = world.rows(&both).await;
    let mut config = world.config();
    config.database.url = world.database_url.replace("inventoryd@", &format!("{role}@")).into();
    let _replica = Replica::with(config).await;
    let run = world.sync("run", &["mobileApp", "deviceConfiguration"]).await;
    assert_eq!(run["status"], "success");
    assert_eq!(world.rows(&both).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unclassified_object_is_counted_and_not_stored() {
    let world = World::with_three_pages(ENROLLMENT).await;
    let _replica = Replica::start(&world).await;
    let before = world.sync("before", &["enrollmentDeviceLimit"]).await;
    // On every page, with one id.
    let object = json!({ "@odata.type": "#microsoft.graph.unknownEnrollmentConfiguration", "id": "unknown" });
    world.sim.add_rule(rule(ENROLLMENT, Action::ExtraObject { object }));
    let run = world.sync("odd", &["enrollmentDeviceLimit"]).await;
    let unclassified = |run: &Value| run["items_unclassified_count"].as_i64().unwrap();
    assert_eq!((&run["status"], unclassified(&run)), (&json!("success"), unclassified(&before) + 1), "{run}");
    assert_eq!(world.count("select count(*) from inventory_items where external_id = 'unknown'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_object_of_a_shared_list_is_an_error_of_its_fallback_type() {
    const CONFIGURATIONS: &str = "deviceManagement/deviceConfigurations";
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sim.add_rule(rule(CONFIGURATIONS, Action::ExtraObject { object: json!(17) }));
    let run = world.sync("odd", &["deviceConfiguration", "windowsUpdateRing"]).await;
    assert_eq!((&run["status"], &run["errors_count"]), (&json!("partial"), &json!(1)), "{run}");
    let faulty = world.rows("select policy_type from inventory_sync_run_types where errors_count > 0").await;
    assert_eq!(faulty, [json!({ "policy_type": "deviceConfiguration" })]);
}

fn rule(path: &str, action: Action) -> Rule {
    serde_json::from_value(json!({ "path": path, "action": action })).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_a_type_that_no_daemon_lists_any_more_are_marked() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("apps", &["mobileApp"]).await;
    // As if an earlier version had listed a type that this one does not.
    world
        .execute(
            "insert into policy_types values ('legacyApp', 'Legacy app', 'apps', true);
             insert into inventory_items
             select (jsonb_populate_record(i, '{\"policy_type\": \"legacyApp\"}')).* from inventory_items i;
             insert into inventory_complete_listings
             select (jsonb_populate_record(l, '{\"policy_type\": \"legacyApp\"}')).* from inventory_complete_listings l",
        )
        .await;
    let marked = async || {
        let query = "select policy_type, type_supported, count(*) as items from inventory_items_current group by 1, 2 order by 1";
        world.rows(query).await
    };
    let before = marked().await;
    assert_eq!(before[0]["policy_type"], "legacyApp");
    assert_eq!((&before[0]["type_supported"], &before[1]["type_supported"]), (&json!(true), &json!(true)));
    let _restarted = Replica::start(&world).await;
    let after = marked().await;
    assert_eq!((&after[0]["type_supported"], &after[1]["type_supported"]), (&json!(false), &json!(true)), "{after:?}");
    assert_eq!(after[0]["items"], before[0]["items"], "nothing is deleted");
}
