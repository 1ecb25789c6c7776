//! Stopping in order: what is in hand is finished or handed back, and the process ends within its budget.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::sim::Rule;
use crate::support::daemon::{Process, Replica};
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::world::World;

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(
        json!({ "path": "deviceAppManagement/mobileApps", "action": { "kind": "slow", "delay_ms": delay_ms } }),
    )
    .unwrap()
}

async fn running(world: &World, key: &str) {
    eventually("the run begins", || async {
        world.runs(key).await.iter().any(|run| run["status"] == "running").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_daemon_finishes_what_it_can() {
    let world = World::new().await;
    world.sim.add_rule(slow(2_000));
    let mut process = Process::start(&world, "a", &[]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    running(&world, "run").await;
    let events = world.subscribe().await;
    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(15)).await.success(), "{}", process.log());
    let run = &world.runs("run").await[0];
    assert_eq!(run["status"], "success");
    assert_eq!(events.event_of(run).await["id"], run["id"], "the event left before the process did");
    assert_eq!(world.depth("inventory.sync.requests").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_runs_are_requeued_and_finished_by_another_replica() {
    let world = World::new().await;
    world.sim.add_rule(slow(6_000));
    let mut process = Process::start(&world, "a", &[("CONSUMER__DRAIN_S", "1"), ("CONSUMER__PREFETCH", "2")]);
    world.publish(&world.request("run", &["mobileApp", "deviceShellScript"])).await;
    running(&world, "run").await;
    eventually("one of the two types ends", || async {
        (world.count("select count(*) from inventory_sync_run_types").await == 1).then_some(())
    })
    .await;
    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(10)).await.success(), "{}", process.log());
    let handed = &world.runs("run").await[0];
    assert_eq!((&handed["status"], &handed["lease_owner"]), (&json!("running"), &json!(null)));
    world.sim.remove_rules(None);
    let _next = Replica::start(&world).await;
    let run = world.ended("run").await;
    assert_eq!((&run["status"], &run["attempt"], &run["interruptions"]), (&json!("success"), &json!(2), &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_does_not_wait() {
    let world = World::new().await;
    world.sim.add_rule(slow(30_000));
    let mut process = Process::start(&world, "a", &[]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    running(&world, "run").await;
    process.signal("TERM");
    process.wait_for_log("draining").await;
    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(8)).await.success(), "{}", process.log());
    assert_eq!(world.depth("inventory.sync.requests").await, 1, "the request is back in the queue");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_does_not_hold_up_the_end() {
    let world = World::new().await;
    world.sim.add_rule(slow(1_500));
    let wire = Proxy::to(world.database_address()).await;
    let mut config = world.config();
    config.database.url = world.database_through(&wire).into();
    config.consumer.drain_s = 3;
    let replica = Replica::with(config).await;
    world.publish(&world.request("run", &["mobileApp"])).await;
    running(&world, "run").await;
    wire.freeze(true);
    let begun = Instant::now();
    replica.stop().await;
    // 3 s for what is in hand, 2 to hand it back, 3 for the parts beside it, 3 for the connections.
    assert!(begun.elapsed() < Duration::from_secs(14), "{:?}", begun.elapsed());
    wire.cut();
    let _heir = Replica::start(&world).await;
    assert_eq!(world.ended("run").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_at_the_start_is_waited_for_by_a_process_that_answers() {
    let world = World::new().await;
    let wire = Proxy::to(world.database_address()).await;
    wire.refuse(true);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let settings = [("HTTP__LISTEN", listen.as_str()), ("DATABASE__URL", &world.database_through(&wire))];
    let _replica = Process::start(&world, "patient", &settings);
    let client = reqwest::Client::new();
    let status = async |path: &str| {
        let answer = client.get(format!("http://{listen}{path}")).send().await.ok()?;
        Some(answer.status().as_u16())
    };
    eventually("it lives", || async { (status("/livez").await == Some(200)).then_some(()) }).await;
    assert_eq!(status("/readyz").await, Some(503));
    wire.refuse(false);
    eventually("it is ready", || async { (status("/readyz").await == Some(200)).then_some(()) }).await;
    world.sync("run", &["mobileApp"]).await;
}
