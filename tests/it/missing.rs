//! Missing objects: derived, never stored, and relative to the latest finished run of a tenant and selection.

use serde_json::{Value, json};

use crate::sim::{Rule, Which};
use crate::support::daemon::Replica;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
const SCRIPTS: &str = "deviceManagement/deviceShellScripts";

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}

fn confidences(missing: &[Value]) -> Vec<&str> {
    missing.iter().map(|item| item["confidence"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_object_is_missing_with_high_confidence_and_stays_in_the_table() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    let first = world.sync("first", &["mobileApp"]).await;
    assert_eq!(world.missing(&first).await.len(), 0);
    let gone = world.sim.delete_objects(world.tenant, APPS, Which::Count(2)).unwrap();
    let second = world.sync("second", &["mobileApp"]).await;
    let missing = world.missing(&second).await;
    let mut ids: Vec<&str> = missing.iter().map(|item| item["external_id"].as_str().unwrap()).collect();
    let mut expected: Vec<&str> = gone.iter().map(String::as_str).collect();
    ids.sort_unstable();
    expected.sort_unstable();
    assert_eq!(ids, expected);
    assert_eq!(confidences(&missing), ["high", "high"]);
    assert!(missing.iter().all(|item| item["type_complete"] == true && item["last_seen_run_id"] == first["id"]));
    assert_eq!(world.count("select count(*) from inventory_items").await, 12, "nothing is deleted");
    let event = events.event_of(&second).await;
    assert_eq!((&event["data"]["missing_high_count"], &event["data"]["missing_low_count"]), (&json!(2), &json!(0)));
    let current = world.count("select count(*) from inventory_items_current").await;
    assert_eq!(current, 10, "the current view omits objects that are missing with high confidence");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_selection_makes_nothing_missing() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let apps = world.sync("apps", &["mobileApp"]).await;
    world.sync("scripts", &["deviceShellScript"]).await;
    assert_eq!(world.missing(&apps).await.len(), 0);
    // The other selection covers the type too and finds fewer objects; this selection's latest run still counts.
    world.sim.delete_objects(world.tenant, APPS, Which::Count(1)).unwrap();
    let both = world.sync("both", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!(world.missing(&apps).await.len(), 0);
    assert_eq!(world.missing(&both).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_seen_by_another_selection_is_not_missing() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "forbidden" } })));
    let refused = world.sync("refused", &["mobileApp"]).await;
    assert_eq!(world.missing(&refused).await.len(), 12);
    world.sim.remove_rules(None);
    world.sync("wider", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!(world.missing(&refused).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn confidence_is_low_after_a_partial_run_and_names_complete_types() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let selection = ["mobileApp", "deviceShellScript"];
    world.sync("first", &selection).await;
    world.sim.delete_objects(world.tenant, APPS, Which::Count(1)).unwrap();
    world.sim.add_rule(rule(json!({ "path": SCRIPTS, "action": { "kind": "forbidden" } })));
    let partial = world.sync("second", &selection).await;
    assert_eq!((&partial["status"], &partial["error_codes"]), (&json!("partial"), &json!(["graph_forbidden"])));
    let missing = world.missing(&partial).await;
    assert!(missing.iter().all(|item| item["confidence"] == "low"));
    let complete = |name: &str| {
        missing.iter().filter(|i| i["policy_type"] == name).map(|i| &i["type_complete"]).collect::<Vec<_>>()
    };
    assert_eq!(complete("mobileApp"), [true]);
    assert!(complete("deviceShellScript").len() == 12 && complete("deviceShellScript").iter().all(|c| **c == false));
}

#[tokio::test(flavor = "multi_thread")]
async fn confidence_is_low_after_a_failed_run() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "not_licensed" } })));
    let failed = world.sync("second", &["mobileApp"]).await;
    assert_eq!((&failed["status"], &failed["error_codes"]), (&json!("failed"), &json!(["graph_not_applicable"])));
    let missing = world.missing(&failed).await;
    assert_eq!(missing.len(), 12);
    assert!(missing.iter().all(|item| item["confidence"] == "low" && item["type_complete"] == false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_skipped_run_is_not_the_latest() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.delete_objects(world.tenant, APPS, Which::Count(1)).unwrap();
    let second = world.sync("second", &["mobileApp"]).await;
    world.execute("update tenants set enabled = false").await;
    let skipped = world.sync("third", &["mobileApp"]).await;
    assert_eq!((&skipped["status"], &skipped["error_codes"]), (&json!("skipped"), &json!(["tenant_disabled"])));
    assert_eq!(confidences(&world.missing(&second).await), ["high"]);
    let latest = world.rows("select run_id from inventory_latest_runs").await;
    assert_eq!(latest, [json!({ "run_id": second["id"] })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspicious_drop_lowers_the_confidence_of_its_type() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    world.sim.set_size(None, Some(APPS), 30).unwrap();
    let selection = ["mobileApp", "deviceShellScript"];
    world.sync("first", &selection).await;
    world.sim.delete_objects(world.tenant, APPS, Which::Count(20)).unwrap();
    world.sim.delete_objects(world.tenant, SCRIPTS, Which::Count(1)).unwrap();
    let second = world.sync("second", &selection).await;
    assert_eq!(
        (&second["status"], &second["had_errors"]),
        (&json!("success"), &json!(false)),
        "a suspicious drop is a warning, not an error"
    );
    let missing = world.missing(&second).await;
    let of = |name: &str| missing.iter().filter(|i| i["policy_type"] == name).cloned().collect::<Vec<_>>();
    assert_eq!((of("mobileApp").len(), of("deviceShellScript").len()), (20, 1));
    assert!(confidences(&of("mobileApp")).iter().all(|c| *c == "low"));
    assert_eq!(confidences(&of("deviceShellScript")), ["high"]);
    let types = events.event_of(&second).await["data"]["types"].clone();
    let dropped: Vec<&Value> = types.as_array().unwrap().iter().filter(|t| t["suspicious_drop"] == true).collect();
    assert_eq!(dropped.len(), 1);
    assert_eq!(dropped[0]["policy_type"], "mobileApp");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_is_measured_against_the_last_complete_list() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sim.set_size(None, Some(APPS), 30).unwrap();
    world.sync("first", &["mobileApp", "deviceShellScript"]).await;
    let once = json!({ "path": APPS, "times": 1, "action": { "kind": "forbidden" } });
    world.sim.add_rule(rule(once));
    assert_eq!(world.sync("second", &["mobileApp", "deviceShellScript"]).await["status"], "partial");
    world.sim.delete_objects(world.tenant, APPS, Which::Count(20)).unwrap();
    let third = world.sync("third", &["mobileApp", "deviceShellScript"]).await;
    let missing = world.missing(&third).await;
    assert_eq!((missing.len(), confidences(&missing).contains(&"high")), (20, false), "the second run saw none");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_list_does_not_restore_missing_objects() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let current = async || world.count("select count(*) from inventory_items_current").await;
    world.sync("first", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!(current().await, 24);
    world.sim.delete_objects(world.tenant, APPS, Which::Count(2)).unwrap();
    world.sync("second", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!(current().await, 22);
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "forbidden" } })));
    let third = world.sync("third", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!((&third["status"], current().await), (&json!("partial"), 22));
}
