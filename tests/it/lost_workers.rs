//! Runs whose worker is lost: they are restarted while attempts are left, and end as `worker_lost` only then.

use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::{Rule, Which};
use crate::support::daemon::{Process, Replica};
use crate::support::proxy::Proxy;
use crate::support::world::World;
use crate::support::{eventually, within};

const APPS: &str = "deviceAppManagement/mobileApps";

/// A replica that takes one request at a time, and its run of `key`.
async fn worker_at_work(world: &World, key: &str) -> Process {
    world.sim.add_rule(slow(world.tenant, 30_000));
    let worker = Process::start(world, "lost", &[("CONSUMER__PREFETCH", "1")]);
    world.publish(&world.request(key, &["mobileApp"])).await;
    eventually("the run begins", || async { world.runs(key).await.pop() }).await;
    worker
}

#[tokio::test(flavor = "multi_thread")]
async fn run_whose_message_waits_in_a_backlog_goes_on() {
    let world = World::new().await;
    let mut worker = worker_at_work(&world, "lost").await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    let stuck = world.sim.add_rule(slow(other, 40_000));
    let mut config = world.config();
    config.consumer.prefetch = 1;
    config.run.restart_after_s = 5;
    let _survivor = Replica::with(config).await;
    world.publish(&World::request_of(other, "busy", &["mobileApp"])).await;
    let is_stuck = || async { world.sim.rules().iter().any(|rule| rule.id == stuck && rule.fired > 0).then_some(()) };
    eventually("the survivor waits for Graph", is_stuck).await;
    worker.signal("KILL");
    worker.ended(Duration::from_secs(10)).await;
    world.sim.remove_rules(None);
    eventually("its message waits", || async { (world.depth("inventory.sync.requests").await == 1).then_some(()) })
        .await;
    let run = world.ended("lost").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(2)), "its message was there: {run}");
    assert_eq!(world.ended("busy").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn run_whose_message_is_lost_goes_on() {
    let world = World::new().await;
    let mut worker = worker_at_work(&world, "lost").await;
    worker.signal("KILL");
    worker.ended(Duration::from_secs(10)).await;
    eventually("its message is back, and lost", || world.take("inventory.sync.requests")).await;
    world.sim.remove_rules(None);
    let mut config = world.config();
    config.run.lease_s = 6;
    config.run.restart_after_s = 5;
    let _survivor = Replica::with(config).await;
    let run = world.ended("lost").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(2)), "its row has the request: {run}");
}

#[tokio::test(flavor = "multi_thread")]
async fn request_of_the_same_selection_ends_no_run_that_can_go_on() {
    let world = World::new().await;
    let mut worker = worker_at_work(&world, "lost").await;
    worker.signal("KILL");
    worker.ended(Duration::from_secs(10)).await;
    let message = eventually("its message is back", || world.take("inventory.sync.requests")).await;
    world.sim.remove_rules(None);
    let expired = "select count(*) from inventory_sync_runs where lease_expires_at < clock_timestamp()";
    eventually("its lease expires", || async { (world.count(expired).await == 1).then_some(()) }).await;
    let _survivor = Replica::start(&world).await;
    let next = world.sync("next", &["mobileApp"]).await;
    assert_eq!((&next["status"], &next["error_codes"]), (&json!("skipped"), &json!(["lock_contended"])), "{next}");
    world.publish_bytes(&message.data, message.properties.clone()).await;
    let run = world.ended("lost").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(2)), "{run}");
}

#[tokio::test(flavor = "multi_thread")]
async fn run_that_ends_worker_lost_makes_all_of_its_types_doubtful() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.delete_objects(world.tenant, APPS, Which::Count(3)).unwrap();
    let second = world.sync("second", &["mobileApp"]).await;
    let missing = world.missing(&second).await;
    assert_eq!((missing.len(), &missing[0]["confidence"]), (3, &json!("high")), "{missing:?}");
    replica.stop().await;
    let mut worker = worker_at_work(&world, "lost").await;
    worker.signal("KILL");
    worker.ended(Duration::from_secs(10)).await;
    let mut config = world.config();
    config.run.max_attempts = 1;
    let _survivor = Replica::with(config).await;
    let events = world.subscribe().await;
    let run = world.ended("lost").await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("failed"), &json!(["worker_lost"])), "{run}");
    let missing = world.missing(&run).await;
    assert_eq!(missing.len(), 12, "nothing was observed: {missing:?}");
    assert!(missing.iter().all(|item| item["confidence"] == "low" && item["type_complete"] == false), "{missing:?}");
    let data = &events.event_of(&run).await["data"];
    assert_eq!((&data["missing_high_count"], &data["missing_low_count"]), (&json!(0), &json!(12)));
    assert_eq!(data["types"][0]["policy_type"], "mobileApp", "{data}");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscription_that_flaps_does_not_keep_a_lost_run_from_going_on() {
    let world = World::new().await;
    let mut worker = worker_at_work(&world, "lost").await;
    worker.signal("KILL");
    worker.ended(Duration::from_secs(10)).await;
    eventually("its message is back, and lost", || world.take("inventory.sync.requests")).await;
    world.sim.remove_rules(None);
    let broker = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&broker).into();
    config.run.lease_s = 6;
    config.run.restart_after_s = 5;
    let replica = Replica::with(config).await;
    let health = replica.daemon().health();
    within(Duration::from_secs(100), "the run ends", || async {
        if health.subscribed() {
            broker.cut();
        }
        world.runs("lost").await.into_iter().find(|run| run["status"] != "running" || run["attempt"] != 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_that_no_worker_restarts_is_given_up_and_its_late_copies_change_nothing() {
    let world = World::new().await;
    let mut worker = worker_at_work(&world, "lost").await;
    worker.signal("KILL");
    worker.ended(Duration::from_secs(10)).await;
    eventually("its message is back, and lost", || world.take("inventory.sync.requests")).await;
    world.sim.remove_rules(None);
    let mut config = world.config();
    config.run.restart_after_s = 2;
    config.run.give_up_after_s = 5;
    let replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let paused = replica.daemon().stop().paused;
    paused.send_replace(true);
    let run = world.ended("lost").await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("failed"), &json!(["worker_lost"])), "{run}");
    let types = world.rows("select policy_type, status, error_code from inventory_sync_run_types").await;
    assert_eq!(types, [json!({ "policy_type": "mobileApp", "status": "failed", "error_code": "worker_lost" })]);
    assert_eq!(events.event_of(&run).await["data"]["status"], "failed");
    assert!(world.depth("inventory.sync.requests").await > 0, "its request was published again");
    paused.send_replace(false);
    eventually("the copies are taken", || async { (world.depth("inventory.sync.requests").await == 0).then_some(()) })
        .await;
    world.sync("next", &["mobileApp"]).await;
    assert_eq!(world.runs("lost").await, [run], "a late copy is a duplicate");
}

fn slow(tenant: Uuid, delay_ms: u64) -> Rule {
    rule(json!({ "tenant": tenant, "action": { "kind": "slow", "delay_ms": delay_ms } }))
}

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}
