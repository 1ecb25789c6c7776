//! Limits under load: prefetch, idempotency keys, and runs per tenant.

use std::collections::BTreeMap;

use serde_json::json;
use uuid::Uuid;

use crate::sim::Rule;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn prefetch_bounds_concurrent_runs() {
    let world = World::new().await;
    world.execute(
        "create table most_running (n bigint);
         create function note_running() returns trigger language plpgsql as $$ begin
           insert into most_running select count(*) from inventory_sync_runs where status = 'running'; return null; end $$;
         create trigger note_running after insert on inventory_sync_runs for each row execute function note_running();",
    ).await;
    world
        .sim
        .add_rule(serde_json::from_value::<Rule>(json!({ "action": { "kind": "slow", "delay_ms": 150 } })).unwrap());
    let mut config = world.config();
    config.consumer.prefetch = 4;
    let _replica = Replica::with(config).await;
    for number in 0..50 {
        let tenant = Uuid::new_v4();
        world.register(tenant, None).await;
        world.publish(&World::request_of(tenant, &format!("k{number}"), &["mobileApp"])).await;
    }
    eventually("all fifty end", || async {
        (world.count("select count(*) from inventory_sync_runs where status = 'success'").await == 50).then_some(())
    })
    .await;
    assert_eq!(world.count("select max(n) from most_running").await, 4, "the prefetch is reached and never exceeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_of_a_key_over_four_replicas_make_one_run() {
    let world = World::new().await;
    world
        .sim
        .add_rule(serde_json::from_value::<Rule>(json!({ "action": { "kind": "slow", "delay_ms": 300 } })).unwrap());
    let mut replicas = Vec::new();
    for _ in 0..4 {
        replicas.push(Replica::start(&world).await);
    }
    let events = world.subscribe().await;
    for _ in 0..100 {
        world.publish(&world.request("repeated", &["mobileApp"])).await;
    }
    let run = world.ended("repeated").await;
    events.event_of(&run).await;
    eventually("every copy is settled", || async {
        let waiting = world.depth("inventory.sync.requests").await
            + world.depth("inventory.retry.5s").await
            + world.depth("inventory.retry.30s").await;
        (waiting == 0).then_some(())
    })
    .await;
    for replica in replicas {
        replica.stop().await;
    }
    assert_eq!(world.runs("repeated").await, [run]);
    assert_eq!(events.received().len(), 1);
    assert_eq!(world.depth("inventory.sync.requests").await, 0, "no copy was requeued");
    assert_eq!(world.sim.requests().iter().filter(|r| r.path.ends_with("mobileApps")).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_one_tenant_do_not_starve_another() {
    let world = World::new().await;
    world
        .sim
        .add_rule(serde_json::from_value::<Rule>(json!({ "action": { "kind": "slow", "delay_ms": 200 } })).unwrap());
    let _replica = Replica::start(&world).await;
    let small = Uuid::new_v4();
    world.register(small, None).await;
    for number in 0..200 {
        // One selection each, so that the limit applies and not the lock of a selection.
        let category = format!("category-{number}");
        let mut request = world.request(&format!("busy-{number}"), &["mobileApp"]);
        request["selection"]["categories"] = json!([category]);
        world.publish(&request).await;
    }
    world.publish(&World::request_of(small, "small", &["mobileApp"])).await;
    assert_eq!(world.ended("small").await["status"], "success");
    eventually("every request has ended", || async {
        (world.count("select count(*) from inventory_sync_runs where finished_at is not null").await == 201)
            .then_some(())
    })
    .await;
    let mut statuses: BTreeMap<String, i64> = BTreeMap::new();
    for row in world.rows("select status, count(*) as n from inventory_sync_runs group by status").await {
        statuses.insert(row["status"].as_str().unwrap().to_owned(), row["n"].as_i64().unwrap());
    }
    assert!(statuses["partial"] >= 2 && statuses["skipped"] > 0, "{statuses:?}");
    let skipped_for = "select distinct error_codes::text as codes from inventory_sync_runs where status = 'skipped'";
    assert_eq!(world.rows(skipped_for).await, [json!({ "codes": "{concurrency_limit_tenant}" })]);
}
