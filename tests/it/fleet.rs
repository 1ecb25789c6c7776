//! Coordination of replicas: membership, and throttling shared across the fleet.

use std::time::{Duration, Instant};

use inventoryd::domain::catalog::Catalog;
use inventoryd::domain::run::RunKey;
use inventoryd::store::Store;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::{Limits, SimConfig, Sizes};
use crate::support::daemon::{Process, Replica};
use crate::support::eventually;
use crate::support::servers::free_port;
use crate::support::world::World;

/// Tenants that a replica's `/status` lists as paused, once there is one.
async fn paused_tenants(listen: &str) -> Option<()> {
    let status = reqwest::get(format!("http://{listen}/status")).await.ok()?.text().await.ok()?;
    let status: Value = serde_json::from_str(&status).ok()?;
    (!status["paused_tenants"].as_array()?.is_empty()).then_some(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_tenant_is_paused_on_every_replica() {
    let world = World::new().await;
    let rule = json!({ "path": "deviceAppManagement/mobileApps", "times": 1,
                       "action": { "kind": "status", "status": 429, "retry_after": "20" } });
    world.sim.add_rule(serde_json::from_value(rule).unwrap());
    let listens = [0; 2].map(|_| format!("127.0.0.1:{}", free_port()));
    let _fleet = [("a", &listens[0]), ("b", &listens[1])].map(|(name, listen)| {
        Process::start(&world, name, &[("CONSUMER__PREFETCH", "1"), ("HTTP__LISTEN", listen.as_str())])
    });
    world.publish(&world.request("throttled", &["mobileApp"])).await;
    eventually("Graph throttles", || async {
        world.sim.requests().iter().any(|request| request.status == 429).then_some(())
    })
    .await;
    for listen in &listens {
        eventually("/status lists the pause", || paused_tenants(listen)).await;
    }
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

/// The whole of Graph's limits, and every type that there is: nobody but this run uses the tenant.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_every_type_is_never_throttled() {
    let simulator = SimConfig {
        limits: Some(Limits::default()),
        sizes: Sizes { default: 2, ..Sizes::default() },
        ..SimConfig::default()
    };
    let world = World::with_sim(simulator).await;
    let _replica = Replica::start(&world).await;
    let catalog = Catalog::built_in();
    let only_by_name = catalog.types().filter(|policy_type| policy_type.only_by_name);
    let mut types: Vec<&str> = only_by_name.map(|policy_type| policy_type.key.as_str()).collect();
    types.push("*");
    let mut request = world.request("everything", &types);
    request["selection"]["include_foundations"] = true.into();
    world.publish(&request).await;
    let run = world.ended("everything").await;
    let read = "select count(*) from inventory_sync_run_types where status = 'complete'";
    assert_eq!(world.count(read).await, i64::try_from(catalog.types().count()).unwrap());
    let state = &world.sim.state().tenants[&world.tenant];
    let [conditional_access, others] = [true, false].map(|wanted| {
        let paths = state.paths.keys().filter(|path| path.contains("/conditionalAccess/") == wanted);
        paths.count()
    });
    assert_eq!((state.throttled, run["status"].as_str(), conditional_access), (0, Some("success"), 3), "{state:?}");
    assert!(others > 70, "{others} other lists");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_take_turns_at_a_limit_that_cannot_be_divided() {
    let world = World::new().await;
    let store = || Store::connect(&world.config().database).unwrap();
    let replicas = [store(), store(), store()];
    let interval = Duration::from_secs(60);
    let turns = (0..9).map(|number| replicas[number % 3].take_turn(world.tenant, "conditional_access", interval));
    let mut waits: Vec<Duration> =
        futures_util::future::join_all(turns).await.into_iter().map(Result::unwrap).collect();
    waits.sort();
    // Granted within less than a turn: the k-th has to wait for all turns before it.
    for (number, wait) in (0..).zip(&waits) {
        let last = interval * number;
        assert!(*wait <= last && *wait + interval > last, "turn {number} of {waits:?}");
    }
    let other = replicas[0].take_turn(Uuid::new_v4(), "conditional_access", interval).await.unwrap();
    assert_eq!(other, Duration::ZERO, "tenants have turns of their own");
    assert!(store().pauses().await.unwrap().is_empty(), "a turn is not a pause that Graph asked for");
    world.execute("update tenant_pauses set paused_until = 'infinity'").await;
    let wait = replicas[0].take_turn(world.tenant, "conditional_access", interval).await.unwrap();
    assert!(wait <= Duration::from_secs(600), "{wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_asks_the_fleet_for_turns() {
    let (world, begun) = (World::new().await, Instant::now());
    let values = format!("'{}', 'conditional_access_turn', clock_timestamp() + interval '4 seconds'", world.tenant);
    world.execute(&format!("insert into tenant_pauses values ({values})")).await;
    let _replica = Replica::start(&world).await;
    world.sync("run", &["conditionalAccessPolicy"]).await;
    assert!(begun.elapsed() >= Duration::from_secs(4), "the turn of another replica was used: {:?}", begun.elapsed());
    let next = "select count(*) from tenant_pauses where family = 'conditional_access_turn'";
    assert_eq!(world.count(next).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_replica_gives_an_idle_tenant_all_of_its_limits() {
    let world = World::new().await;
    let store = Store::connect(&world.config().database).unwrap();
    let _replica = Replica::start(&world).await;
    let run = world.sync("run", &["mobileApp"]).await;
    let run_id: Uuid = run["id"].as_str().unwrap().parse().unwrap();
    let idle = async |run_id, window_s| {
        let run = RunKey { tenant_id: world.tenant, run_id };
        store.tenant_was_idle(run, Duration::from_secs(window_s), Duration::from_secs(3_600)).await.unwrap()
    };
    assert!(idle(run_id, 3_600).await, "a run does not count itself");
    assert!(!idle(Uuid::now_v7(), 3_600).await, "the other run has ended within the window");
    world.execute("update inventory_sync_runs set finished_at = clock_timestamp() - interval '30 seconds'").await;
    assert!(idle(Uuid::now_v7(), 20).await);
    world
        .execute("update inventory_sync_runs set status = 'running', finished_at = null, lease_expires_at = now()")
        .await;
    assert!(!idle(Uuid::now_v7(), 20).await, "the other run is at work");
}
