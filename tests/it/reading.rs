//! The SQL that README shows runs as it stands there, and the columns that it promises are the columns that there are.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::Which;
use crate::support::daemon::Replica;
use crate::support::world::World;

const README: &str = include_str!("../../README.md");

/// The statements of README's SQL blocks with the comment before each.
fn statements() -> Vec<(&'static str, &'static str)> {
    let blocks = README.split("```sql\n").skip(1).filter_map(|rest| rest.split("```").next());
    let all = blocks.flat_map(|block| block.split(';')).map(str::trim).filter(|text| !text.is_empty());
    all.filter_map(|text| text.strip_prefix("-- ").and_then(|text| text.split_once('\n'))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_in_readme_answer_what_they_say() {
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
        let (_, statement) = found.unwrap_or_else(|| panic!("README has no SQL about {about:?}"));
        let (tenant, hash) = (format!("'{}'", world.tenant), run["selection_hash"].to_string().replace('"', "'"));
        world.rows(&statement.replace("$1", &tenant).replace("$2", &hash)).await
    };
    assert_eq!(answer("What is there").await.len(), 12);
    let missing = answer("What is missing of one selection").await;
    assert_eq!(missing.len(), 2);
    assert!(missing.iter().all(|item| item["policy_type"] == "mobileApp"), "{missing:?}");
    assert_eq!(answer("What is missing of all").await.len(), 2);
    let fresh = answer("How fresh").await;
    assert_eq!((fresh.len(), &fresh[0]["status"]), (1, &json!("success")));
    let waiting = answer("Which tenants are stuck").await;
    assert_eq!((waiting.len(), &waiting[0]["tenant_id"]), (1, &json!(stuck)));
    assert_eq!(statements().len(), 5, "every example of README is tried here");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_interface_has_the_columns_that_readme_promises() {
    let world = World::new().await;
    let promised = |relation: &str| -> Vec<String> {
        let row = README.lines().find(|line| line.starts_with(&format!("| `{relation}"))).expect("README has its row");
        let columns = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        columns.split(", ").map(|name| name.trim_matches('`').to_owned()).collect()
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
