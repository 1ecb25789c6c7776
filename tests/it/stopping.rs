//! Signals: shutdown finishes or requeues the deliveries in flight within its budget; SIGUSR1 pauses consumption.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::sim::Rule;
use crate::support::daemon::{Process, Replica};
use crate::support::proxy::Proxy;
use crate::support::world::World;
use crate::support::{DEADLINE, eventually};

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(
        json!({ "path": "deviceAppManagement/mobileApps", "action": { "kind": "slow", "delay_ms": delay_ms } }),
    )
    .unwrap()
}

async fn running(world: &World, key: &str) {
    eventually("the run starts", || async {
        world.runs(key).await.iter().any(|run| run["status"] == "running").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_finishes_runs_in_flight() {
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
    assert_eq!(events.event_of(run).await["id"], run["id"], "the event was published before the process ended");
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
    assert!(process.ended(DEADLINE).await.success(), "{}", process.log());
    let requeued = &world.runs("run").await[0];
    assert_eq!((&requeued["status"], &requeued["lease_owner"]), (&json!("running"), &json!(null)));
    world.sim.remove_rules(None);
    let _next = Replica::start(&world).await;
    let run = world.ended("run").await;
    assert_eq!((&run["status"], &run["attempt"], &run["interruptions"]), (&json!("success"), &json!(2), &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_requeues_at_once() {
    let world = World::new().await;
    world.sim.add_rule(slow(30_000));
    let mut process = Process::start(&world, "a", &[]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    running(&world, "run").await;
    process.signal("TERM");
    process.wait_for_log("draining").await;
    process.signal("TERM");
    assert!(process.ended(DEADLINE).await.success(), "{}", process.log());
    assert_eq!(world.depth("inventory.sync.requests").await, 1, "the request is back in the queue");
}

#[tokio::test(flavor = "multi_thread")]
async fn third_signal_ends_the_process_at_once() {
    let world = World::new().await;
    world.sim.add_rule(slow(30_000));
    let proxy = Proxy::to(world.database_address()).await;
    let database = world.database_through(&proxy);
    let mut process = Process::start(&world, "a", &[("DATABASE__URL", &database)]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    running(&world, "run").await;
    // A database that does not respond keeps an aborting process busy for seconds.
    proxy.freeze(true);
    for logged in ["draining: no new requests", "aborting: runs in flight"] {
        process.signal("TERM");
        process.wait_for_log(logged).await;
    }
    process.signal("TERM");
    let status = process.ended(DEADLINE).await;
    assert_eq!(status.code(), Some(1), "{}", process.log());
    assert!(process.log().contains("ended at the third signal"), "{}", process.log());
    eventually("the broker requeues the request", || async {
        (world.depth("inventory.sync.requests").await == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigusr1_pauses_consumption_until_the_next_one() {
    let world = World::new().await;
    let mut process = Process::start(&world, "a", &[]);
    world.sync("before", &["mobileApp"]).await;
    process.signal("USR1");
    eventually("the consumer unsubscribes", || async {
        (world.consumers("inventory.sync.requests").await == 0).then_some(())
    })
    .await;
    process.wait_for_log("by_operator").await;
    world.publish(&world.request("during", &["mobileApp"])).await;
    assert_eq!(world.depth("inventory.sync.requests").await, 1, "the request stays in the queue");
    process.signal("USR1");
    assert_eq!(world.ended("during").await["status"], "success");
    process.signal("TERM");
    assert!(process.ended(DEADLINE).await.success(), "a pause is not counted as a stop: {}", process.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_database_does_not_delay_shutdown() {
    let world = World::new().await;
    world.sim.add_rule(slow(1_500));
    let proxy = Proxy::to(world.database_address()).await;
    let mut config = world.config();
    config.database.url = world.database_through(&proxy).into();
    config.consumer.drain_s = 3;
    let replica = Replica::with(config).await;
    world.publish(&world.request("run", &["mobileApp"])).await;
    running(&world, "run").await;
    proxy.freeze(true);
    let begun = Instant::now();
    replica.stop().await;
    // 3 s for runs in flight, 2 to hand them back, 3 for the other components, 3 for the connections.
    assert!(begun.elapsed() < Duration::from_secs(14), "{:?}", begun.elapsed());
    proxy.cut();
    let _successor = Replica::start(&world).await;
    assert_eq!(world.ended("run").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_waits_for_the_database_and_serves_probes() {
    let world = World::new().await;
    let proxy = Proxy::to(world.database_address()).await;
    proxy.refuse(true);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let settings = [("HTTP__LISTEN", listen.as_str()), ("DATABASE__URL", &world.database_through(&proxy))];
    let _replica = Process::start(&world, "waiting", &settings);
    let client = reqwest::Client::new();
    let status = async |path: &str| {
        let response = client.get(format!("http://{listen}{path}")).send().await.ok()?;
        Some(response.status().as_u16())
    };
    eventually("it is alive", || async { (status("/livez").await == Some(200)).then_some(()) }).await;
    assert_eq!(status("/readyz").await, Some(503));
    proxy.refuse(false);
    eventually("it is ready", || async { (status("/readyz").await == Some(200)).then_some(()) }).await;
    world.sync("run", &["mobileApp"]).await;
}
