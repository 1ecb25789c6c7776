//! Coordination of replicas: membership, and throttling shared across the fleet.

use std::time::Duration;

use serde_json::json;

use crate::sim::SimConfig;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_tenant_is_paused_on_every_replica() {
    let world = World::new().await;
    let rule = json!({ "path": "deviceAppManagement/mobileApps", "times": 1,
                       "action": { "kind": "status", "status": 429, "retry_after": "20" } });
    world.sim.add_rule(serde_json::from_value(rule).unwrap());
    let mut config = world.config();
    config.consumer.prefetch = 1;
    let _one = Replica::with(config.clone()).await;
    let _two = Replica::with(config).await;
    world.publish(&world.request("throttled", &["mobileApp"])).await;
    eventually("Graph throttles", || async {
        world.sim.requests().iter().any(|request| request.status == 429).then_some(())
    })
    .await;
    eventually("the pause is published to the database", || async {
        (world.count("select count(*) from tenant_pauses where paused_until > now()").await == 1).then_some(())
    })
    .await;
    // Each replica polls the pauses every three seconds; a busy machine takes longer.
    tokio::time::sleep(Duration::from_secs(9)).await;
    world.publish(&world.request("other", &["deviceCompliancePolicy"])).await;
    assert_eq!(world.ended("other").await["status"], "success");
    assert_eq!(world.ended("throttled").await["status"], "success");
    let asked: Vec<(u64, u16)> = (world.sim.requests().iter())
        .filter(|request| !request.path.ends_with("/token"))
        .map(|request| (request.unix_ms, request.status))
        .collect();
    let (throttled_at, _) = asked.iter().find(|(_, status)| *status == 429).copied().unwrap();
    let early: Vec<u64> =
        asked.iter().map(|(at, _)| at - throttled_at).filter(|after| *after > 0 && *after < 20_000).collect();
    assert!(early.is_empty(), "requests were sent {early:?} ms after a 429 with Retry-After: 20");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_are_registered_until_they_stop() {
    let world = World::new().await;
    let one = Replica::start(&world).await;
    let two = Replica::start(&world).await;
    let members = || world.count("select count(*) from daemon_replicas");
    eventually("both are registered", || async { (members().await == 2).then_some(()) }).await;
    one.stop().await;
    eventually("one is deregistered", || async { (members().await == 1).then_some(()) }).await;
    two.stop().await;
    assert_eq!(members().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_divide_the_rate_limit() {
    const APPS: &str = "deviceAppManagement/mobileApps";
    let mut simulator = SimConfig::default();
    simulator.page_sizes.top_caps.insert(APPS.to_owned(), 1);
    let world = World::with_sim(simulator).await;
    world.sim.set_size(None, Some(APPS), 60).unwrap();
    let mut config = world.config();
    (config.graph.intune_per_20s, config.graph.rate_share) = (40, 1.0);
    let members = || world.count("select count(*) from daemon_replicas");
    let idle = Replica::with(config.clone()).await;
    eventually("the idle replica is registered", || async { (members().await == 1).then_some(()) }).await;
    idle.daemon().stop().paused.send_replace(true);
    eventually("it takes no requests", || async { (!idle.daemon().health().subscribed()).then_some(()) }).await;
    let _worker = Replica::with(config).await;
    eventually("both are registered", || async { (members().await == 2).then_some(()) }).await;
    world.publish(&world.request("long", &["mobileApp"])).await;
    let times = eventually("more pages are read than one share allows", || async {
        let pages = world.sim.requests().into_iter().filter(|request| request.path.contains("mobileApps"));
        let times: Vec<u64> = pages.map(|request| request.unix_ms).collect();
        (times.len() > 24).then_some(times)
    })
    .await;
    let in_window = |start: &u64| times.iter().filter(|at| (*start..start + 20_000).contains(*at)).count();
    let most = times.iter().map(in_window).max().unwrap();
    assert!(most <= 21, "{most} requests within 20 s, although half of 40 is the share of one replica");
}
