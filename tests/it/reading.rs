//! The SQL interface of migrations/README.md: its examples run unchanged, and its relations have the listed columns.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::Which;
use crate::support::daemon::Replica;
use crate::support::world::World;

const PAGE: &str = include_str!("../../migrations/README.md");

/// Statements of the page's SQL blocks with the comment before each.
fn statements() -> Vec<(&'static str, &'static str)> {
    let blocks = PAGE.split("```sql\n").skip(1).filter_map(|rest| rest.split("```").next());
    let all = blocks.flat_map(|block| block.split(';')).map(str::trim).filter(|text| !text.is_empty());
    all.filter_map(|text| text.strip_prefix("-- ").and_then(|text| text.split_once('\n'))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_queries_return_what_they_describe() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let stuck = Uuid::new_v4();
    world.register(stuck, None).await;
    world.execute("update tenants set created_at = now() - interval '3 days'").await;
    let selection = ["mobileApp", "deviceCompliancePolicy"];
    world.sync("first", &selection).await;
    world.sim.delete_objects(world.tenant, "deviceAppManagement/mobileApps", Which::Count(2)).unwrap();
    let run = world.sync("second", &selection).await;
    let answer = async |about: &str| -> Vec<Value> {
        let found = statements().into_iter().find(|(comment, _)| comment.contains(about));
        let (_, statement) = found.unwrap_or_else(|| panic!("the page has no SQL about {about:?}"));
        let (tenant, hash) = (format!("'{}'", world.tenant), run["selection_hash"].to_string().replace('"', "'"));
        world.rows(&statement.replace("$1", &tenant).replace("$2", &hash)).await
    };
    assert_eq!(answer("Current compliance policies").await.len(), 12);
    let missing = answer("Objects of one selection").await;
    assert_eq!(missing.len(), 2);
    assert!(missing.iter().all(|item| item["policy_type"] == "mobileApp"), "{missing:?}");
    assert_eq!(answer("Objects missing from any selection").await.len(), 2);
    let fresh = answer("Age of the inventory").await;
    assert_eq!((fresh.len(), &fresh[0]["status"]), (1, &json!("success")));
    let waiting = answer("Stuck tenants").await;
    assert_eq!((waiting.len(), &waiting[0]["tenant_id"]), (1, &json!(stuck)));
    assert_eq!(statements().len(), 5, "every example of the page is run here");
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_columns_are_the_columns_of_the_schema() {
    let world = World::new().await;
    let promised = |relation: &str| -> Vec<String> {
        let section = PAGE.split("\n### ").find(|section| section.starts_with(&format!("`{relation}")));
        let columns = section.and_then(|section| section.split("Columns: ").nth(1)).expect("the page lists columns");
        let columns = columns.split("\n\n").next().unwrap_or_default().trim_end().trim_end_matches('.');
        columns.split(',').map(|name| name.trim().trim_matches('`').to_owned()).collect()
    };
    for relation in ["inventory_items_current", "inventory_latest_runs"] {
        let real = world
            .rows(&format!(
                "select column_name from information_schema.columns where table_name = '{relation}' order by ordinal_position"
            ))
            .await;
        let real: Vec<&str> = real.iter().map(|row| row["column_name"].as_str().unwrap()).collect();
        assert_eq!(promised(relation), real, "{relation}");
    }
    let columns = "select unnest(proargnames) as name, unnest(proargmodes) as mode from pg_proc where proname = 'inventory_missing'";
    let real = world.rows(columns).await;
    let real =
        real.iter().filter(|argument| argument["mode"] == "t").map(|argument| argument["name"].as_str().unwrap());
    assert_eq!(promised("inventory_missing"), real.collect::<Vec<_>>());
}
