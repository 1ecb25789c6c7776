//! Replicas together: what one learns of Graph's limits holds for all.

use std::time::Duration;

use serde_json::json;

use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_throttles_one_replica_is_left_alone_by_all() {
    let world = World::new().await;
    let rule = json!({ "path": "deviceAppManagement/mobileApps", "times": 1,
                       "action": { "kind": "status", "status": 429, "retry_after": "9" } });
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
    eventually("the gate is known to all", || async {
        (world.count("select count(*) from tenant_gates where closed_until > now()").await == 1).then_some(())
    })
    .await;
    // Each replica looks at the gates every three seconds.
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    world.publish(&world.request("other", &["deviceCompliancePolicy"])).await;
    assert_eq!(world.ended("other").await["status"], "success");
    assert_eq!(world.ended("throttled").await["status"], "success");
    let asked: Vec<(u64, u16)> = (world.sim.requests().iter())
        .filter(|request| !request.path.ends_with("/token"))
        .map(|request| (request.unix_ms, request.status))
        .collect();
    let (throttled_at, _) = asked.iter().find(|(_, status)| *status == 429).copied().unwrap();
    let early: Vec<u64> =
        asked.iter().map(|(at, _)| at - throttled_at).filter(|after| *after > 0 && *after < 9_000).collect();
    assert!(early.is_empty(), "asked {early:?} ms after Graph wanted to be left alone for 9 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_count_each_other_and_leave_in_order() {
    let world = World::new().await;
    let one = Replica::start(&world).await;
    let two = Replica::start(&world).await;
    let members = || world.count("select count(*) from daemon_replicas");
    eventually("both are counted", || async { (members().await == 2).then_some(()) }).await;
    one.stop().await;
    eventually("one has left", || async { (members().await == 1).then_some(()) }).await;
    two.stop().await;
    assert_eq!(members().await, 0);
}
