//! Types without a licence: a run of `*` succeeds beside them, and their items stay doubtful.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::sim::{Action, ErrorBody, Rule, Which};
use crate::support::daemon::Replica;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
const CONDITIONAL_ACCESS: &str = "identity/conditionalAccess/policies";
const SCRIPTS: &str = "deviceManagement/deviceShellScripts";

fn everything(world: &World, key: &str) -> Value {
    json!({ "schema_version": 1, "tenant_id": world.tenant, "idempotency_key": key,
            "selection": { "policy_types": ["*"] } })
}

fn not_licensed(path: &str) -> Rule {
    serde_json::from_value(json!({ "path": path, "action": { "kind": "not_licensed" } })).unwrap()
}

async fn run_of_everything(world: &World, key: &str) -> Value {
    world.publish(&everything(world, key)).await;
    world.ended(key).await
}

#[tokio::test(flavor = "multi_thread")]
async fn run_of_everything_succeeds_without_a_licence_for_some_types() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    world.sim.add_rule(not_licensed(SCRIPTS));
    // Conditional Access without a premium licence has an error of its own.
    let premium =
        json!({ "error": { "code": "Authentication_RequestFromNonPremiumTenantOrB2CTenant", "message": "" } });
    let body = ErrorBody::Literal(premium.to_string());
    let action = Action::Status { status: 403, retry_after: None, body };
    world.sim.add_rule(Rule::new(action).path(CONDITIONAL_ACCESS));
    let run = run_of_everything(&world, "all").await;
    assert_eq!(
        (&run["status"], &run["had_errors"], &run["error_codes"], &run["errors_count"]),
        (&json!("success"), &json!(false), &json!([]), &json!(0)),
        "{run}"
    );
    let without = "select policy_type from inventory_sync_run_types where status = 'not_applicable' order by 1";
    let types = ["conditionalAccessPolicy", "deviceShellScript"].map(|key| json!({ "policy_type": key }));
    assert_eq!(world.rows(without).await, types);
    assert_eq!(events.event_of(&run).await["data"]["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn type_without_a_licence_is_an_error_when_it_is_named() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sim.add_rule(not_licensed(SCRIPTS));
    let run = world.sync("named", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("partial"), &json!(["graph_not_applicable"])), "{run}");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_of_a_licensed_type_is_certain_beside_one_without_a_licence() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    run_of_everything(&world, "licensed").await;
    world.sim.add_rule(not_licensed(SCRIPTS));
    let deleted = world.sim.delete_objects(world.tenant, APPS, Which::Count(1)).unwrap();
    let run = run_of_everything(&world, "unlicensed").await;
    let mut by_type: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for item in world.missing(&run).await {
        let text = |key: &str| item[key].as_str().unwrap().to_owned();
        by_type.entry((text("policy_type"), text("confidence"))).or_default().push(text("external_id"));
    }
    let certain: Vec<&Vec<String>> =
        by_type.iter().filter(|((_, confidence), _)| confidence == "high").map(|(_, ids)| ids).collect();
    assert_eq!(certain, [&deleted], "{by_type:?}");
    let doubtful = &by_type[&("deviceShellScript".to_owned(), "low".to_owned())];
    assert_eq!(doubtful.len(), 12, "objects of the type that could not be listed are doubtful");
    let current = "select count(*) from inventory_items_current where policy_type = 'deviceShellScript'";
    assert_eq!(world.count(current).await, 12, "no item of it is known to be missing");
}
